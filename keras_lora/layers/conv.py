"""Convolutions and transposed convolutions: the sum over a window and its channels.

The matrix is `(window · channels in, filters)`. A change of rank r is the same convolution to r channels, then a 1×1
convolution to the filters. Where that is cheaper, the changed kernel is formed for a call instead. A grouped convolution
is one matrix per group. A transposed convolution is the same, except that it places the window differently.
"""

from __future__ import annotations

import math
from typing import Any

import keras
from keras import ops

from keras_lora import backend
from keras_lora.compat import quantization
from keras_lora.linear_map import LinearMap
from keras_lora.swap.adapted import AdaptedLayer


class ConvMap(LinearMap):
    """Kernel `(*window, in / groups, filters)`; the filters of a group are next to each other."""

    held_out = {"use_bias": False, "activation": None}
    packs = True

    @property
    def groups(self) -> tuple[int, ...]:
        """`()` or `(number of groups,)`, the leading axis of the matrix."""
        return () if self.layer.groups == 1 else (self.layer.groups,)

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        window, filters = self.kernel_shape[:-1], self.kernel_shape[-1]
        return super().matrix_shape if not self.groups else (*self.groups, math.prod(window), filters // self.layer.groups)

    def as_matrix(self, kernel: Any) -> Any:
        if not self.groups:
            return super().as_matrix(kernel)
        groups, in_dim, out_dim = self.matrix_shape
        return ops.transpose(ops.reshape(kernel, (in_dim, groups, out_dim)), (1, 0, 2))

    def as_kernel(self, matrix: Any) -> Any:
        if not self.groups:
            return super().as_kernel(matrix)
        return ops.reshape(ops.transpose(matrix, (1, 0, 2)), (*self.kernel_shape[:-1], -1))

    def contract(self, x: Any, m: Any) -> Any:
        """`(batch, *positions, *groups, k)`, or `(batch, *groups, k, *positions)` if channels come first."""
        h = self.call_with(x, self.as_kernel(m))
        if not self.groups:
            return h
        shape = ops.shape(h)
        if self._channels_last:
            return ops.reshape(h, (*shape[:-1], *self.groups, m.shape[-1]))
        return ops.reshape(h, (shape[0], *self.groups, m.shape[-1], *shape[2:]))

    def expand(self, h: Any, m: Any) -> Any:
        if self._channels_last:
            if not self.groups:
                return super().expand(h, m)
            y = ops.einsum("...gk,gko->...go", h, m)
            return ops.reshape(y, (*ops.shape(y)[:-2], self.layer.filters))
        if not self.groups:
            return ops.einsum("bk...,ko->bo...", h, m)
        y = ops.einsum("bgk...,gko->bgo...", h, m)
        return ops.reshape(y, (ops.shape(y)[0], self.layer.filters, *ops.shape(y)[3:]))

    # The changed kernel, formed for a call.

    def forms_kernel(self, x: Any) -> bool:
        """If it is float32 and has no more numbers than `x`: then it costs little to form, and a step keeps little more.

        In fewer digits, `W + ΔW` would round the change.
        """
        float32 = keras.backend.standardize_dtype(self.layer.compute_dtype) == "float32"
        as_stored = self.base_dtype is None and quantization.mode_of(self.layer) is None
        known = [size for size in x.shape if isinstance(size, int)]
        plain = not self.groups and not backend.has_symbolic_sizes(x)
        return float32 and as_stored and plain and math.prod(self.matrix_shape) <= math.prod(known)

    def formed_sum(self, x: Any, a: Any, b: Any) -> Any:
        parts = backend.Parts(self.apply, self.contract, self.expand, self._channels_last, self._shifts)
        return backend.formed_sum(parts, ops.cast(x, "float32"), self.matrix, a, b)

    @property
    def _shifts(self) -> backend.Shifts | None:
        """The window, if the layer moves it by one step at a time."""
        layer = self.layer
        if not self._channels_last or self.groups or any(step != 1 for step in layer.strides):
            return None
        reach = [(size - 1) * step for size, step in zip(layer.kernel_size, layer.dilation_rate, strict=True)]
        if layer.padding == "valid":
            outside = [(0, 0) for _ in reach]
        else:
            outside = [(r, 0) if layer.padding == "causal" else (r // 2, r - r // 2) for r in reach]
        return backend.Shifts(layer.kernel_size, layer.dilation_rate, outside)

    def along_outputs(self, v: Any, y: Any) -> Any:
        v = ops.reshape(v, (-1,))
        return v if self._channels_last else ops.reshape(v, (1, -1, *(1,) * self.layer.rank))

    def finish(self, y: Any) -> Any:
        if self.layer.use_bias:
            bias = self.along_outputs(self.layer.bias, y)
            # Keras on TensorFlow adds a second vector to the last axis if that is as long, so there it comes first.
            y = ops.add(y, bias) if self._channels_last else ops.add(bias, y)
        if self.layer.activation is not None:
            y = self.layer.activation(y)
        return y

    @property
    def _channels_last(self) -> bool:
        found: bool = self.layer.data_format == "channels_last"
        return found


class Conv1DMap(ConvMap):
    """`Conv1D`, causal padding included."""

    layer_class = keras.layers.Conv1D


class Conv2DMap(ConvMap):
    """`Conv2D`."""

    layer_class = keras.layers.Conv2D


class Conv3DMap(ConvMap):
    """`Conv3D`."""

    layer_class = keras.layers.Conv3D


class ConvTransposeMap(ConvMap):
    """Kernel `(*window, filters, in)`."""

    groups = ()
    _shifts = None

    @property
    def kernel_axes(self) -> str:
        found: str = "i" * self.layer.rank + "oi"
        return found


class Conv1DTransposeMap(ConvTransposeMap):
    """`Conv1DTranspose`."""

    layer_class = keras.layers.Conv1DTranspose


class Conv2DTransposeMap(ConvTransposeMap):
    """`Conv2DTranspose`."""

    layer_class = keras.layers.Conv2DTranspose


class Conv3DTransposeMap(ConvTransposeMap):
    """`Conv3DTranspose`."""

    layer_class = keras.layers.Conv3DTranspose


class LoRAConv1D(AdaptedLayer, keras.layers.Conv1D):
    """A `Conv1D` layer with a frozen kernel and a trainable low-rank change of it.

    Args:
        filters, kernel_size: As for `keras.layers.Conv1D`.
        rank, alpha, adapter: As for `keras_lora.LoRADense`. With `groups > 1` every group has factors of this rank.
        **kwargs: The other arguments of `keras.layers.Conv1D`.

    Input shape:
        `(batch, steps, channels)`, or `(batch, channels, steps)` with `data_format="channels_first"`.

    Output shape:
        `(batch, new steps, filters)`, or `(batch, filters, new steps)`.

    Example:

    >>> import keras, keras_lora
    >>> keras_lora.layers.LoRAConv1D(8, 3, rank=2)(keras.ops.ones((1, 10, 4))).shape
    (1, 8, 8)

    Reference:
        [Hu et al., 2021](https://arxiv.org/abs/2106.09685)
    """

    linear_maps = (Conv1DMap,)


class LoRAConv2D(AdaptedLayer, keras.layers.Conv2D):
    """A `Conv2D` layer with a frozen kernel and a trainable low-rank change of it.

    Args:
        filters, kernel_size: As for `keras.layers.Conv2D`.
        rank, alpha, adapter: As for `keras_lora.LoRADense`. With `groups > 1` every group has factors of this rank.
        **kwargs: The other arguments of `keras.layers.Conv2D`.

    Input shape:
        `(batch, height, width, channels)`, or `(batch, channels, height, width)` with `data_format="channels_first"`.

    Output shape:
        `(batch, new height, new width, filters)`, or `(batch, filters, new height, new width)`.

    Example:

    >>> import keras, keras_lora
    >>> layer = keras_lora.layers.LoRAConv2D(8, 3, rank=2, data_format="channels_last")
    >>> layer(keras.ops.ones((1, 10, 10, 4))).shape
    (1, 8, 8, 8)

    Reference:
        [Hu et al., 2021](https://arxiv.org/abs/2106.09685)
    """

    linear_maps = (Conv2DMap,)


class LoRAConv3D(AdaptedLayer, keras.layers.Conv3D):
    """A `Conv3D` layer with a frozen kernel and a trainable low-rank change of it.

    Args:
        filters, kernel_size: As for `keras.layers.Conv3D`.
        rank, alpha, adapter: As for `keras_lora.LoRADense`. With `groups > 1` every group has factors of this rank.
        **kwargs: The other arguments of `keras.layers.Conv3D`.

    Input shape:
        `(batch, depth, height, width, channels)`, or channels second with `data_format="channels_first"`.

    Output shape:
        `(batch, new depth, new height, new width, filters)`, or filters second.

    Example:

    >>> import keras, keras_lora
    >>> layer = keras_lora.layers.LoRAConv3D(8, 3, rank=2, data_format="channels_last")
    >>> layer(keras.ops.ones((1, 5, 5, 5, 4))).shape
    (1, 3, 3, 3, 8)

    Reference:
        [Hu et al., 2021](https://arxiv.org/abs/2106.09685)
    """

    linear_maps = (Conv3DMap,)


class LoRAConv1DTranspose(AdaptedLayer, keras.layers.Conv1DTranspose):
    """A `Conv1DTranspose` layer with a frozen kernel and a trainable low-rank change of it.

    Args:
        filters, kernel_size: As for `keras.layers.Conv1DTranspose`.
        rank, alpha, adapter: As for `keras_lora.LoRADense`.
        **kwargs: The other arguments of `keras.layers.Conv1DTranspose`.

    Input shape, output shape:
        As for `keras.layers.Conv1DTranspose`.

    Example:

    >>> import keras, keras_lora
    >>> layer = keras_lora.layers.LoRAConv1DTranspose(8, 3, strides=2, rank=2, data_format="channels_last")
    >>> layer(keras.ops.ones((1, 5, 4))).shape
    (1, 11, 8)

    Reference:
        [Hu et al., 2021](https://arxiv.org/abs/2106.09685)
    """

    linear_maps = (Conv1DTransposeMap,)


class LoRAConv2DTranspose(AdaptedLayer, keras.layers.Conv2DTranspose):
    """A `Conv2DTranspose` layer with a frozen kernel and a trainable low-rank change of it.

    Args:
        filters, kernel_size: As for `keras.layers.Conv2DTranspose`.
        rank, alpha, adapter: As for `keras_lora.LoRADense`.
        **kwargs: The other arguments of `keras.layers.Conv2DTranspose`.

    Input shape, output shape:
        As for `keras.layers.Conv2DTranspose`.

    Example:

    >>> import keras, keras_lora
    >>> layer = keras_lora.layers.LoRAConv2DTranspose(8, 3, strides=2, rank=2, data_format="channels_last")
    >>> layer(keras.ops.ones((1, 5, 5, 4))).shape
    (1, 11, 11, 8)

    Reference:
        [Hu et al., 2021](https://arxiv.org/abs/2106.09685)
    """

    linear_maps = (Conv2DTransposeMap,)


class LoRAConv3DTranspose(AdaptedLayer, keras.layers.Conv3DTranspose):
    """A `Conv3DTranspose` layer with a frozen kernel and a trainable low-rank change of it.

    Args:
        filters, kernel_size: As for `keras.layers.Conv3DTranspose`.
        rank, alpha, adapter: As for `keras_lora.LoRADense`.
        **kwargs: The other arguments of `keras.layers.Conv3DTranspose`.

    Input shape, output shape:
        As for `keras.layers.Conv3DTranspose`.

    Example:

    >>> import keras, keras_lora
    >>> layer = keras_lora.layers.LoRAConv3DTranspose(8, 3, strides=2, rank=2, data_format="channels_last")
    >>> layer(keras.ops.ones((1, 5, 5, 5, 4))).shape
    (1, 11, 11, 11, 8)

    Reference:
        [Hu et al., 2021](https://arxiv.org/abs/2106.09685)
    """

    linear_maps = (Conv3DTransposeMap,)
