"""AdaLoRA: a low-rank change in the form of a singular value decomposition, whose terms can be masked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import keras
from keras import ops

from keras_lora import checks
from keras_lora.adapters import initial
from keras_lora.adapters.low_rank import LowRank

if TYPE_CHECKING:
    from keras_lora.linear_map import LinearMap


@keras.saving.register_keras_serializable("keras_lora")
class AdaLoRA(LowRank):
    """Adaptive low-rank adaptation: `W' = W + scale · P (Λ ∘ mask) Q`, with Λ diagonal.

    `P` is `lora_a (in_dim, rank)`, `Λ` is `lora_e (rank,)` and `Q` is `lora_b (rank, out_dim)`. A penalty keeps the columns
    of `P` and the rows of `Q` close to orthonormal, so the terms can be compared and dropped one by one. The mask has a one
    for each term in use, is saved and does not train. `keras_lora.callbacks.AdaLoRABudget` moves the budget of ranks to the
    kernels that need it, by setting masks. All shapes stay the same, so nothing is traced again.

    After training, `keras_lora.compress_adapter(model, energy=1.0)` removes the masked terms and leaves an exact LoRA.

    Args:
        rank, alpha, dropout, rank_stabilized, seed: As for `keras_lora.LoRA`. The rank is that before masking: take about
            1.5 times the average rank wanted in the end. The scale does not change with the mask.
        orthogonality: Non-negative number, the weight of the penalty `‖PᵀP - I‖² + ‖QQᵀ - I‖²` of each kernel in the loss.
        **kwargs: `name`, `dtype` and `trainable` of a Keras layer.

    Raises:
        ValueError: An argument is outside its range.

    Example:

    >>> import keras, keras_lora
    >>> model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(32), keras.layers.Dense(2)])
    >>> model = keras_lora.apply_lora(model, "adalora", rank=6)
    >>> [(v.name, tuple(v.shape)) for v in model.trainable_variables]
    [('lora_a', (16, 6)), ('lora_e', (6,)), ('lora_b', (6, 32))]

    Reference:
        [Zhang et al., 2023](https://arxiv.org/abs/2303.10512)
    """

    def __init__(
        self,
        rank: int = 12,
        alpha: float = 16.0,
        dropout: float = 0.0,
        rank_stabilized: bool = False,
        seed: int | None = None,
        orthogonality: float = 0.1,
        **kwargs: Any,
    ):
        super().__init__(rank, alpha, dropout, rank_stabilized, seed, **kwargs)
        if not checks.is_number(orthogonality) or orthogonality < 0:
            raise ValueError(f"`orthogonality` must be a non-negative number. Received: orthogonality={orthogonality!r}.")
        self.orthogonality = float(orthogonality)

    def build_for(self, linear: LinearMap) -> None:
        *groups, in_dim, out_dim = linear.matrix_shape
        penalty = _Penalty(self.orthogonality) if self.orthogonality else None
        a, b = (*groups, in_dim, self.rank), (*groups, self.rank, out_dim)
        draw = initial.normal(0.02, self.seed)
        self.lora_a = self.add_factor("lora_a", a, draw, regularizer=penalty and penalty.of_columns)
        self.lora_e = self.add_factor("lora_e", (*groups, self.rank), "zeros")
        self.lora_b = self.add_factor("lora_b", b, draw, regularizer=penalty and penalty.of_rows)
        self.rank_mask = self.add_factor("rank_mask", (*groups, self.rank), "ones", trainable=False)

    def pair(self, weights: Mapping[str, Any], matrix_shape: tuple[int, ...] | None) -> tuple[Any, Any]:
        names = ("lora_a", "lora_e", "lora_b", "rank_mask")
        if missing := [name for name in names if name not in weights]:
            raise ValueError(f"the file lacks {' and '.join(missing)}")
        a, e, b, mask = (weights[name] for name in names)
        if len(a.shape) < 2 or a.shape[-1] != self.rank:
            raise ValueError(f"the file says rank {self.rank}, and lora_a has shape {tuple(a.shape)}")
        # Zhang et al., eq. 3: ΔW = P Λ Q.
        return ops.multiply(a, ops.expand_dims(ops.multiply(e, mask), -2)), b

    def parameter_count(self, matrix_shape: tuple[int, ...]) -> int:
        *groups, in_dim, out_dim = matrix_shape
        return math.prod(groups) * self.rank * (in_dim + out_dim + 1)

    def size(self, matrix_shape: tuple[int, ...]) -> int:
        return self.parameter_count(matrix_shape) + math.prod(matrix_shape[:-2]) * self.rank

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "orthogonality": self.orthogonality}


class _Penalty:
    """`weight · ‖MᵀM - I‖²`, Zhang et al., eq. 4."""

    def __init__(self, weight: float):
        self.weight = weight

    def of_columns(self, m: Any) -> Any:
        return self._of(ops.matmul(ops.swapaxes(m, -1, -2), m))

    def of_rows(self, m: Any) -> Any:
        return self._of(ops.matmul(m, ops.swapaxes(m, -1, -2)))

    def _of(self, gram: Any) -> Any:
        return self.weight * ops.sum(ops.square(ops.subtract(gram, ops.eye(gram.shape[-1], dtype=gram.dtype))))
