"""MiSS: inputs summed in groups, then one trained matrix."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import ops

from keras_lora.adapters.low_rank import LowRank

if TYPE_CHECKING:
    from keras_lora.linear_map import LinearMap


@keras.saving.register_keras_serializable("keras_lora")
class MiSS(LowRank):
    """Matrix shard sharing: `W' = W + F D`, with a trained `D (rank, out_dim)` and a fixed `F (in_dim, rank)`.

    `F` has zeros and ones: `x F` sums the inputs in `rank` groups, and input `i` is in group `i % rank`. There is no `A` to
    train, so a step keeps `tokens · rank` numbers for the backward pass instead of the layer's input, and the method has
    half of LoRA's parameters. With Adam, a step moves the kernel's entries about as far as one of full fine-tuning: start
    at a tenth to a third of LoRA's learning rate.

    Args:
        rank: Positive integer, the number of groups. At equal parameters, it is about twice LoRA's.
        dropout: Number in `[0, 1)`, the share of the entries of the input dropped on the way to `F` in training.
        seed: Integer, for the dropout. Each layer uses a separate random stream.
        **kwargs: `name`, `dtype` and `trainable` of a Keras layer.

    Raises:
        ValueError: An argument is outside its range.

    Example:

    >>> import keras, keras_lora
    >>> model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(32), keras.layers.Dense(2)])
    >>> model = keras_lora.apply_lora(model, "miss", rank=4)
    >>> [(v.name, tuple(v.shape)) for v in model.trainable_variables]
    [('miss_d', (4, 32))]

    Reference:
        [Kang and Yin, 2024](https://arxiv.org/abs/2409.15371)
    """

    scale = 1.0

    def __init__(self, rank: int = 16, dropout: float = 0.0, seed: int | None = None, **kwargs: Any):
        super().__init__(rank, dropout=dropout, seed=seed, **kwargs)

    def build_for(self, linear: LinearMap) -> None:
        *groups, _, out_dim = linear.matrix_shape
        self.miss_d = self.add_factor("miss_d", (*groups, self.rank, out_dim), "zeros")

    def pair(self, weights: Mapping[str, Any], matrix_shape: tuple[int, ...] | None) -> tuple[Any, Any]:
        if matrix_shape is None:
            raise ValueError("the fixed factor of a MiSS follows from the shape of the kernel")
        *groups, in_dim, _ = matrix_shape
        a = ops.convert_to_tensor(_groups(in_dim, self.rank))
        return ops.broadcast_to(a, (*groups, in_dim, self.rank)) if groups else a, weights["miss_d"]

    def factors_of(
        self, weights: Mapping[str, np.ndarray], matrix_shape: tuple[int, ...] | None
    ) -> tuple[np.ndarray, np.ndarray] | None:
        return None if matrix_shape is None else super().factors_of(weights, matrix_shape)

    def current_pair(self) -> tuple[Any, Any]:
        return self.pair({"miss_d": self.miss_d}, self.matrix_shape)

    def adapted_output(self, x: Any, y: Any, linear: LinearMap, training: bool | None = None) -> Any:
        if not linear.picks_rows:
            return super().adapted_output(x, y, linear, training)
        y = linear.base_output(x) if y is None else y
        rows = linear.contract(x % self.rank, ops.multiply(self.strength, self.miss_d))
        return ops.add(y, ops.cast(rows, y.dtype))

    def parameter_count(self, matrix_shape: tuple[int, ...]) -> int:
        return math.prod(matrix_shape[:-2]) * self.rank * matrix_shape[-1]

    def get_config(self) -> dict[str, Any]:
        return {key: each for key, each in super().get_config().items() if key not in ("alpha", "rank_stabilized")}


@functools.lru_cache(maxsize=32)
def _groups(in_dim: int, rank: int) -> np.ndarray:
    """The fixed factor: a one for each input in the column of its group."""
    found: np.ndarray = np.equal(np.arange(in_dim)[:, None] % rank, np.arange(rank)).astype("float32")
    return found
