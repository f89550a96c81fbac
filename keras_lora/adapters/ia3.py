"""IA3: a gain for each output, or for each input."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import keras
from keras import ops

from keras_lora.adapters.adapter import Adapter

if TYPE_CHECKING:
    from keras_lora.linear_map import LinearMap

SIDES = ("outputs", "inputs")


@keras.saving.register_keras_serializable("keras_lora")
class IA3(Adapter):
    """Learned gains: `W' = W diag(g)` for the outputs, or `W' = diag(g) W` for the inputs. `g` starts at one.

    It has `out_dim` or `in_dim` parameters for a kernel, and a step costs less than one of LoRA. Use it for very small
    files. The paper scales the outputs of the keys' and values' projections and the inputs of the second feed-forward
    layer: `apply_lora(model, "ia3", targets=["key", "value"], adapter_pattern={"output_dense": IA3(side="inputs")})`.
    It needs a high learning rate: start at ten times LoRA's. The gains act before the bias.

    Args:
        side: `"outputs"` or `"inputs"`. In a convolution, an input is a position of the window and a channel; in an
            embedding it is a token.
        **kwargs: `name`, `dtype` and `trainable` of a Keras layer.

    Raises:
        ValueError: `side` is another word.

    Example:

    >>> import keras, keras_lora
    >>> model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(32), keras.layers.Dense(2)])
    >>> model = keras_lora.apply_lora(model, "ia3")
    >>> [(v.name, tuple(v.shape)) for v in model.trainable_variables]
    [('ia3_gain', (32,))]

    Reference:
        [Liu et al., 2022](https://arxiv.org/abs/2205.05638)
    """

    adds = False

    def __init__(self, side: str = "outputs", **kwargs: Any):
        super().__init__(**kwargs)
        if side not in SIDES:
            raise ValueError(f"`side` must be one of {SIDES}. Received: side={side!r}.")
        self.side = side

    def build_for(self, linear: LinearMap) -> None:
        self.ia3_gain = self.add_factor("ia3_gain", self._shape(linear.matrix_shape), "ones")

    def _shape(self, matrix_shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*matrix_shape[:-2], matrix_shape[-1 if self.side == "outputs" else -2])

    def parameter_count(self, matrix_shape: tuple[int, ...]) -> int:
        return math.prod(self._shape(matrix_shape))

    def delta_kernel(self, matrix: Any) -> Any:
        # Liu et al., section 3.3: l ∘ y, with y = x W; so W' = W diag(l).
        gain = ops.expand_dims(self.ia3_gain, -2 if self.side == "outputs" else -1)
        return ops.multiply(ops.cast(matrix, "float32"), ops.subtract(gain, 1.0))

    def adapted_output(self, x: Any, y: Any, linear: LinearMap, training: bool | None = None) -> Any:
        more = ops.multiply(self.strength, ops.subtract(self.ia3_gain, 1.0))
        if self.side == "outputs" and linear.scales_outputs:
            return _scaled(y, linear.along_outputs(more, y))
        if self.side == "inputs" and linear.is_matmul:
            x = ops.cast(x, linear.layer.compute_dtype)
            return linear.base_output(_scaled(x, linear.along_inputs(more, x)))
        if self.side == "inputs" and linear.picks_rows:
            return _scaled(y, linear.contract(x, ops.expand_dims(more, -1)))
        return super().adapted_output(x, y, linear, training)

    def output(self, x: Any, linear: LinearMap, training: bool | None = None) -> Any:
        y = None if self.side == "inputs" and linear.is_matmul else linear.base_output(x)
        return self.adapted_output(x, y, linear, training)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "side": self.side}


def _scaled(x: Any, more: Any) -> Any:
    """Return `(1 + more) x`. In bfloat16, `1 + more` would keep 3 digits, and `more` keeps 3 of its own."""
    if keras.backend.standardize_dtype(x.dtype) == "float32":
        return ops.multiply(x, ops.add(more, 1.0))
    return ops.add(x, ops.multiply(x, ops.cast(more, x.dtype)))
