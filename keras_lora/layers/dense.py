"""`Dense`: `y = x @ kernel`, the simplest linear map."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_lora.linear_map import LinearMap
from keras_lora.swap.adapted import AdaptedLayer


class DenseMap(LinearMap):
    """Kernel `(in, units)`; the defaults of `LinearMap` are written for it."""

    layer_class = keras.layers.Dense
    is_matmul = packs = True

    @property
    def calls_matmul(self) -> bool:  # type: ignore[override]
        return self.layer_class is keras.layers.Dense  # a class registered with `like=` has a different `call`

    def transposed(self, dy: Any) -> Any:
        kernel = self.kernel
        return ops.matmul(ops.cast(dy, kernel.dtype), ops.transpose(kernel))


class LoRADense(AdaptedLayer, keras.layers.Dense):
    """A `Dense` layer with a frozen kernel and a trainable low-rank change of it.

    `apply_lora` turns a `keras.layers.Dense` into this layer. You can also use it in a new model yourself.

    Args:
        units: Positive integer, size of the output.
        rank: Positive integer, the rank of the change. Defaults to the method's default.
        alpha: Number; the change is scaled by `alpha / rank`. Defaults to the method's default.
        adapter: The method: `"lora"` (the default), `"dora"`, or an instance such as
            `keras_lora.LoRA(rank=8, dropout=0.1)`, which then sets rank and alpha.
        **kwargs: The other arguments of `keras.layers.Dense`.

    Input shape:
        `(batch, ..., in)`.

    Output shape:
        `(batch, ..., units)`.

    Example:

    >>> import keras, keras_lora
    >>> layer = keras_lora.LoRADense(64, rank=4)
    >>> layer(keras.ops.ones((2, 32))).shape
    (2, 64)
    >>> [(v.name, tuple(v.shape)) for v in layer.trainable_variables]
    [('lora_a', (32, 4)), ('lora_b', (4, 64))]

    Reference:
        [Hu et al., 2021](https://arxiv.org/abs/2106.09685)
    """

    linear_maps = (DenseMap,)
