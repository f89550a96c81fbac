"""LoHa: the elementwise product of two low-rank matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import keras
from keras import ops

from keras_lora.adapters import initial
from keras_lora.adapters.low_rank import LowRank

if TYPE_CHECKING:
    from keras_lora.linear_map import LinearMap

KEYS = ("loha_a1", "loha_b1", "loha_a2", "loha_b2")


@keras.saving.register_keras_serializable("keras_lora")
class LoHa(LowRank):
    """Low-rank Hadamard product: `W' = W + scale · (A₁ B₁) ∘ (A₂ B₂)`.

    The change has a rank of up to `rank²` for twice the parameters of a LoRA of this rank. It is an exact product of
    factors with `rank²` columns, whose rows are Kronecker products, and runs as that product; so keep the rank at 8 or
    less. Start at LoRA's learning rate.

    Args:
        rank: Positive integer.
        alpha: Positive number. The scale is `alpha / rank`.
        dropout: Number in `[0, 1)`, the share of the entries of the input dropped on the way to the factors in training.
        rank_stabilized: Use the scale `alpha / sqrt(rank)`.
        seed: Integer, for the initial values and the dropout. Each layer uses a separate random stream.
        **kwargs: `name`, `dtype` and `trainable` of a Keras layer.

    Raises:
        ValueError: An argument is outside its range.

    Example:

    >>> import keras, keras_lora
    >>> model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(32), keras.layers.Dense(2)])
    >>> model = keras_lora.apply_lora(model, keras_lora.LoHa(rank=2))
    >>> [(v.name, tuple(v.shape)) for v in model.trainable_variables]
    [('loha_a1', (16, 2)), ('loha_b1', (2, 32)), ('loha_a2', (16, 2)), ('loha_b2', (2, 32))]

    References:
        - [Hyeon-Woo et al., 2021](https://arxiv.org/abs/2108.06098)
        - [Yeh et al., 2023](https://arxiv.org/abs/2309.14859)
    """

    def __init__(
        self,
        rank: int = 4,
        alpha: float = 16.0,
        dropout: float = 0.0,
        rank_stabilized: bool = False,
        seed: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(rank, alpha, dropout, rank_stabilized, seed, **kwargs)

    def build_for(self, linear: LinearMap) -> None:
        *groups, in_dim, out_dim = linear.matrix_shape
        seeds = [None if self.seed is None else self.seed + n for n in range(3)]  # A₁ and A₂ must differ
        of_a = [initial.uniform(in_dim**-0.5, seed) for seed in seeds[:2]]
        of_b = initial.uniform(self.rank**-0.5, seeds[2])
        self.loha_a1 = self.add_factor("loha_a1", (*groups, in_dim, self.rank), of_a[0])
        self.loha_b1 = self.add_factor("loha_b1", (*groups, self.rank, out_dim), of_b)
        self.loha_a2 = self.add_factor("loha_a2", (*groups, in_dim, self.rank), of_a[1])
        self.loha_b2 = self.add_factor("loha_b2", (*groups, self.rank, out_dim), "zeros")

    def pair(self, weights: Mapping[str, Any], matrix_shape: tuple[int, ...] | None) -> tuple[Any, Any]:
        a1, b1, a2, b2 = (ops.convert_to_tensor(weights[key]) for key in KEYS)
        a = ops.multiply(ops.expand_dims(a1, -1), ops.expand_dims(a2, -2))
        b = ops.multiply(ops.expand_dims(b1, -2), ops.expand_dims(b2, -3))
        return ops.reshape(a, (*a1.shape[:-1], -1)), ops.reshape(b, (*b1.shape[:-2], -1, b1.shape[-1]))

    def product_rank(self, matrix_shape: tuple[int, ...]) -> int:
        return self.rank**2

    def delta_kernel(self, matrix: Any) -> Any:
        # Hyeon-Woo et al., eq. 2: (X₁ Y₁ᵀ) ∘ (X₂ Y₂ᵀ).
        one, two = ops.matmul(self.loha_a1, self.loha_b1), ops.matmul(self.loha_a2, self.loha_b2)
        return ops.multiply(self.scale * one, two)

    def parameter_count(self, matrix_shape: tuple[int, ...]) -> int:
        *groups, in_dim, out_dim = matrix_shape
        return 2 * math.prod(groups) * self.rank * (in_dim + out_dim)
