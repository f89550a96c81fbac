"""OFT: a rotation of the inputs in blocks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import ops

from keras_lora import checks
from keras_lora.adapters.adapter import Adapter

if TYPE_CHECKING:
    from keras_lora.linear_map import LinearMap

#: The most terms of a series; a file may ask for any number.
_MOST_TERMS = 50


@keras.saving.register_keras_serializable("keras_lora")
class OFT(Adapter):
    """Orthogonal fine-tuning: `W' = R W`, with a block-diagonal rotation `R` of the inputs.

    Each block is `R = (I + Q) (I - Q)⁻¹`, the Cayley transform of a skew matrix `Q`, so it is orthogonal exactly, and
    angles and lengths of the columns of `W` are kept. The input is rotated, `(x R) W`; the rotated kernel is not formed if
    the layer is a product of rows and a matrix. Use it for images, and where the base must be disturbed little. Start at
    LoRA's learning rate.

    Args:
        block_size: Integer of at least 2. Each layer has blocks of the largest divisor of its inputs that is not larger.
        terms: Instead of the inverse, this many terms of its Neumann series, from 4 on; orthogonal only while `Q` is small.
            PEFT's default is 5.
        **kwargs: `name`, `dtype` and `trainable` of a Keras layer.

    Raises:
        ValueError: An argument is outside its range.

    Example:

    >>> import keras, keras_lora
    >>> model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(32), keras.layers.Dense(2)])
    >>> model = keras_lora.apply_lora(model, keras_lora.OFT(block_size=8))
    >>> [(v.name, tuple(v.shape)) for v in model.trainable_variables]
    [('oft_q', (2, 28))]

    References:
        - [Qiu et al., 2023](https://arxiv.org/abs/2306.07280)
        - [Qiu et al., 2025](https://arxiv.org/abs/2506.19847), for `terms`
    """

    adds = False

    def __init__(self, block_size: int = 32, terms: int | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        self.block_size = checks.positive_integer("block_size", block_size, least=2)
        self.terms = None if terms is None else checks.positive_integer("terms", terms, least=4)
        if terms is not None and terms > _MOST_TERMS:
            raise ValueError(f"`terms` must be at most {_MOST_TERMS}. Received: terms={terms}.")

    def problem_with(self, linear: LinearMap) -> str | None:
        if linear.picks_rows:
            return "`OFT` rotates the input, and that of an embedding is token ids; leave it out of `targets`"
        if self.block_of(linear.matrix_shape) < 2:
            return (
                f"no block of 2 to {self.block_size} inputs divides its {linear.matrix_shape[-2]} inputs; leave it out of "
                "`targets` or use another `block_size`"
            )
        return None

    def block_of(self, matrix_shape: tuple[int, ...]) -> int:
        """Return the size of a block: the largest divisor of the inputs up to `block_size`."""
        in_dim = matrix_shape[-2]
        return max(size for size in range(1, min(self.block_size, in_dim) + 1) if in_dim % size == 0)

    def build_for(self, linear: LinearMap) -> None:
        *groups, in_dim, _ = linear.matrix_shape
        size = self.block_of(linear.matrix_shape)
        self.oft_q = self.add_factor("oft_q", (*groups, in_dim // size, size * (size - 1) // 2), "zeros")

    def parameter_count(self, matrix_shape: tuple[int, ...]) -> int:
        *groups, in_dim, _ = matrix_shape
        return math.prod(groups) * in_dim * (self.block_of(matrix_shape) - 1) // 2

    def turn(self) -> Any:
        """Return `R - I`, `(*groups, blocks, size, size)`, in float32."""
        size = self.block_of(self.matrix_shape)
        # Entry (i, j) of Q is the number of its place above the diagonal, with a minus below it.
        place, sign = np.zeros((size, size), "int32"), np.zeros((size, size), "float32")
        above = np.triu_indices(size, 1)
        place[above] = place.T[above] = np.arange(len(above[0]))
        sign[above], sign.T[above] = 1, -1
        q = ops.take(ops.convert_to_tensor(self.oft_q), place.reshape(-1), axis=-1)
        q = ops.multiply(ops.reshape(q, (*self.oft_q.shape[:-1], size, size)), sign)
        if self.terms is None:  # (I + Q) (I - Q)⁻¹ - I = 2 Q (I - Q)⁻¹ = 2 (I - Q)⁻¹ Q
            return 2.0 * ops.solve(ops.subtract(ops.eye(size, dtype="float32"), q), q)
        # I + 2 Q + 2 Q² + … + Q to the last power once, as in the reference code.
        power, total = q, 2.0 * q
        for term in range(2, self.terms):
            power = ops.matmul(power, q)
            total = ops.add(total, power if term == self.terms - 1 else 2.0 * power)
        return total

    def delta_kernel(self, matrix: Any) -> Any:
        # Qiu et al., eq. 2: W' = R W; so ΔW = (R - I) W, a block of inputs at a time.
        turn, matrix = self.turn(), ops.cast(matrix, "float32")
        blocks = ops.reshape(matrix, (*matrix.shape[:-2], turn.shape[-3], turn.shape[-1], matrix.shape[-1]))
        return ops.reshape(ops.matmul(turn, blocks), matrix.shape)

    def adapted_output(self, x: Any, y: Any, linear: LinearMap, training: bool | None = None) -> Any:
        return self.output(x, linear) if linear.is_matmul else super().adapted_output(x, y, linear, training)

    def output(self, x: Any, linear: LinearMap, training: bool | None = None) -> Any:
        if not linear.is_matmul:
            return super().adapted_output(x, linear.base_output(x), linear, training)
        x = ops.cast(x, linear.layer.compute_dtype)
        return linear.base_output(ops.reshape(self.rotated(linear.as_rows(x)), ops.shape(x)))

    def rotated(self, rows: Any) -> Any:
        """Return `rows (n, in_dim)` times `I + strength (R - I)`."""
        turn = ops.multiply(self.strength, self.turn())
        float32 = keras.backend.standardize_dtype(rows.dtype) == "float32"
        if float32:
            turn = ops.add(turn, ops.eye(turn.shape[-1], dtype=turn.dtype))
        # One product for each block: as one product of three axes it takes several times as long on a CPU.
        blocks = ops.transpose(ops.reshape(rows, (-1, turn.shape[-3], turn.shape[-1])), (1, 0, 2))
        turned = ops.transpose(ops.matmul(blocks, ops.cast(turn, rows.dtype)), (1, 0, 2))
        turned = ops.reshape(turned, (-1, rows.shape[-1]))
        return turned if float32 else ops.add(rows, turned)  # bfloat16 would keep 3 digits of I + (R - I)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "block_size": self.block_size, "terms": self.terms}
