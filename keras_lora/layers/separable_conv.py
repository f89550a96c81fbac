"""Depthwise and separable convolutions.

A depthwise kernel is the matrix `(window, channels)`. It is small, so its change is computed in full, and it is adapted only
if you name it as a target. A separable convolution is a depthwise convolution followed by a pointwise one, which is an
ordinary linear map of the channels.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_lora.layers.changed_kernel import ChangedKernelLayer
from keras_lora.layers.conv import ConvMap
from keras_lora.linear_map import LinearMap
from keras_lora.swap.adapted import AdaptedLayer


class DepthwiseMap(LinearMap):
    """Kernel `(*window, channels, multiplier)`."""

    by_default = False
    no_dropout = no_examples = "a depthwise kernel is changed whole, without its input"

    @property
    def kernel_axes(self) -> str:
        found: str = "i" * self.layer.rank + "oo"
        return found


class DepthwiseConv1DMap(DepthwiseMap):
    """`DepthwiseConv1D`."""

    layer_class = keras.layers.DepthwiseConv1D


class DepthwiseConv2DMap(DepthwiseMap):
    """`DepthwiseConv2D`."""

    layer_class = keras.layers.DepthwiseConv2D


class PointwiseMap(ConvMap):
    """Kernel `(*ones, channels · multiplier, filters)`, applied to the output of the depthwise kernel."""

    kernel_name = part = "pointwise_kernel"
    groups = ()
    packs = False  # the code for its depthwise kernel reads the layer

    def own_output(self, x: Any) -> Any:
        return self.apply(x, self.matrix) if self.base_dtype is None else super().own_output(x)

    def call_with(self, x: Any, kernel: Any) -> Any:
        return ops.conv(x, kernel, strides=1, padding="valid", data_format=self.layer.data_format)


class SeparableConv1DMap(PointwiseMap):
    """The pointwise kernel of `SeparableConv1D`."""

    layer_class = keras.layers.SeparableConv1D


class SeparableConv2DMap(PointwiseMap):
    """The pointwise kernel of `SeparableConv2D`."""

    layer_class = keras.layers.SeparableConv2D


class SeparableDepthwiseMap(DepthwiseMap):
    """The depthwise kernel of a separable convolution."""

    kernel_name = part = "depthwise_kernel"


class AdaptedSeparableConv(AdaptedLayer):
    """Base class of the two adapted separable convolutions."""

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        layer: Any = self
        changes = {linear.part: (linear, change) for linear, change in self.maps_in_call()}
        depthwise = ops.cast(layer.depthwise_kernel, layer.compute_dtype)
        if "depthwise_kernel" in changes:
            linear, change = changes["depthwise_kernel"]
            depthwise = ops.cast(linear.changed_kernel(change), depthwise.dtype)
        h = ops.depthwise_conv(
            inputs,
            depthwise,
            strides=layer.strides,
            padding=layer.padding,
            dilation_rate=layer.dilation_rate,
            data_format=layer.data_format,
        )
        pointwise = self.linear_map
        y = pointwise.base_output(h)
        if "pointwise_kernel" in changes:
            y = changes["pointwise_kernel"][1].adapted_output(h, y, pointwise, training=training)
        return pointwise.finish(y)


class LoRADepthwiseConv1D(ChangedKernelLayer, keras.layers.DepthwiseConv1D):
    """A `DepthwiseConv1D` layer with a frozen kernel and a trainable change of it, `(window, rank)(rank, channels)`.

    Args:
        kernel_size: As for `keras.layers.DepthwiseConv1D`.
        rank, alpha, adapter: As for `keras_lora.LoRADense`. Dropout is refused: there is no input of rank size to drop from.
        **kwargs: The other arguments of `keras.layers.DepthwiseConv1D`.

    Input shape, output shape:
        As for `keras.layers.DepthwiseConv1D`.

    Example:

    >>> import keras, keras_lora
    >>> keras_lora.layers.LoRADepthwiseConv1D(3, rank=1, data_format="channels_last")(keras.ops.ones((1, 10, 4))).shape
    (1, 8, 4)

    Reference:
        [Hu et al., 2021](https://arxiv.org/abs/2106.09685)
    """

    linear_maps = (DepthwiseConv1DMap,)


class LoRADepthwiseConv2D(ChangedKernelLayer, keras.layers.DepthwiseConv2D):
    """A `DepthwiseConv2D` layer with a frozen kernel and a trainable change of it, `(window, rank)(rank, channels)`.

    Args:
        kernel_size: As for `keras.layers.DepthwiseConv2D`.
        rank, alpha, adapter: As for `keras_lora.LoRADense`. Dropout is refused: there is no input of rank size to drop from.
        **kwargs: The other arguments of `keras.layers.DepthwiseConv2D`.

    Input shape, output shape:
        As for `keras.layers.DepthwiseConv2D`.

    Example:

    >>> import keras, keras_lora
    >>> keras_lora.layers.LoRADepthwiseConv2D(3, rank=1, data_format="channels_last")(keras.ops.ones((1, 9, 9, 4))).shape
    (1, 7, 7, 4)

    Reference:
        [Hu et al., 2021](https://arxiv.org/abs/2106.09685)
    """

    linear_maps = (DepthwiseConv2DMap,)


class LoRASeparableConv1D(AdaptedSeparableConv, keras.layers.SeparableConv1D):
    """A `SeparableConv1D` layer with frozen kernels and a trainable low-rank change of the pointwise one.

    Args:
        filters, kernel_size: As for `keras.layers.SeparableConv1D`.
        rank, alpha, adapter: As for `keras_lora.LoRADense`.
        **kwargs: The other arguments of `keras.layers.SeparableConv1D`.

    Input shape, output shape:
        As for `keras.layers.SeparableConv1D`.

    Example:

    >>> import keras, keras_lora
    >>> keras_lora.layers.LoRASeparableConv1D(8, 3, rank=2, data_format="channels_last")(keras.ops.ones((1, 10, 4))).shape
    (1, 8, 8)

    Reference:
        [Hu et al., 2021](https://arxiv.org/abs/2106.09685)
    """

    linear_maps = (SeparableConv1DMap, SeparableDepthwiseMap)


class LoRASeparableConv2D(AdaptedSeparableConv, keras.layers.SeparableConv2D):
    """A `SeparableConv2D` layer with frozen kernels and a trainable low-rank change of the pointwise one.

    Args:
        filters, kernel_size: As for `keras.layers.SeparableConv2D`.
        rank, alpha, adapter: As for `keras_lora.LoRADense`.
        **kwargs: The other arguments of `keras.layers.SeparableConv2D`.

    Input shape, output shape:
        As for `keras.layers.SeparableConv2D`.

    Example:

    >>> import keras, keras_lora
    >>> keras_lora.layers.LoRASeparableConv2D(8, 3, rank=2, data_format="channels_last")(keras.ops.ones((1, 9, 9, 4))).shape
    (1, 7, 7, 8)

    Reference:
        [Hu et al., 2021](https://arxiv.org/abs/2106.09685)
    """

    linear_maps = (SeparableConv2DMap, SeparableDepthwiseMap)
