"""LoRA: a low-rank change added to the kernel."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from keras_lora import checks
from keras_lora.adapters import initial
from keras_lora.adapters.adapter import Adapter
from keras_lora.adapters.low_rank import LowRank

if TYPE_CHECKING:
    from keras_lora.linear_map import LinearMap


@keras.saving.register_keras_serializable("keras_lora")
class LoRA(LowRank):
    """Low-rank adaptation: `W' = W + scale · A B`.

    `A` is `(in_dim, rank)`, `B` is `(rank, out_dim)`; a kernel with groups has one pair per group. `ΔW` is never
    formed in training or inference; the output is `y + (x A)(scale · B)`.

    Args:
        rank: Positive integer. 8 is a good start; 1 is often enough.
        alpha: Positive number. The scale is `alpha / rank`, so the best learning rate changes little with the rank.
        dropout: Number in `[0, 1)`, the share of the entries of `x` dropped on the way to `A` in training.
        rank_stabilized: Use the scale `alpha / sqrt(rank)`, for ranks of 64 and more.
        a_initializer, b_initializer: Keras initializers. By default `A ~ U(±1/sqrt(in_dim))` and `B = 0`, as in
            PEFT. For an embedding, whose inputs select one row of `A`, `A = 0` and `B ~ N(0, 1)`.
        seed: Integer, for the initial values and the dropout. Each layer uses a separate random stream.
        freeze_a: Train only `B` (LoRA-FA). The layer's input is then not kept for the backward pass, only `tokens · rank`
            numbers. `A` must not be zero, so embeddings are refused.
        **kwargs: `name`, `dtype` and `trainable` of a Keras layer.

    Raises:
        ValueError: An argument is outside its range.

    Example:

    >>> import keras, keras_lora
    >>> model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(32), keras.layers.Dense(2)])
    >>> model = keras_lora.apply_lora(model, keras_lora.LoRA(rank=4, alpha=8))
    >>> sum(v.shape[0] * v.shape[1] for v in model.trainable_variables)
    192

    References:
        - [Hu et al., 2021](https://arxiv.org/abs/2106.09685)
        - [Kalajdzievski, 2023](https://arxiv.org/abs/2312.03732), for `rank_stabilized`
        - [Zhang et al., 2023](https://arxiv.org/abs/2308.03303), for `freeze_a`
    """

    def __init__(
        self,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        rank_stabilized: bool = False,
        a_initializer: Any = None,
        b_initializer: Any = None,
        seed: int | None = None,
        freeze_a: bool = False,
        **kwargs: Any,
    ):
        super().__init__(rank, alpha, dropout, rank_stabilized, seed, **kwargs)
        self.a_initializer = keras.initializers.get(a_initializer)
        self.b_initializer = keras.initializers.get(b_initializer)
        self.freeze_a = checks.flag("freeze_a", freeze_a)

    def problem_with(self, linear: LinearMap) -> str | None:
        if self.freeze_a and linear.picks_rows and self.a_initializer is None:
            return "`freeze_a` keeps A as it starts, and for an embedding that is zero; leave it out or use freeze_a=False"
        return super().problem_with(linear)

    def build_for(self, linear: LinearMap) -> None:
        *groups, in_dim, out_dim = linear.matrix_shape
        a_default, b_default = initial.uniform(1 / math.sqrt(in_dim), self.seed), initial.zeros
        if linear.picks_rows:
            a_default, b_default = initial.zeros, initial.normal(1.0, self.seed)
        self.lora_a = self.add_factor(
            "lora_a", (*groups, in_dim, self.rank), self.a_initializer or a_default, not self.freeze_a
        )
        self.lora_b = self.add_factor("lora_b", (*groups, self.rank, out_dim), self.b_initializer or b_default)

    def pair(self, weights: Mapping[str, Any], matrix_shape: tuple[int, ...] | None) -> tuple[Any, Any]:
        if missing := [key for key in ("lora_a", "lora_b") if key not in weights]:
            raise ValueError(f"the file lacks {' and '.join(missing)}")
        a, b = weights["lora_a"], weights["lora_b"]
        if len(a.shape) < 2 or a.shape[-1] != self.rank:
            raise ValueError(f"the file says rank {self.rank}, and lora_a has shape {tuple(a.shape)}")
        return a, b

    def current_pair(self) -> tuple[Any, Any]:
        return self.lora_a, self.lora_b

    def parameter_count(self, matrix_shape: tuple[int, ...]) -> int:
        *groups, in_dim, out_dim = matrix_shape
        return math.prod(groups) * self.rank * (out_dim if self.freeze_a else in_dim + out_dim)

    def size(self, matrix_shape: tuple[int, ...]) -> int:
        *groups, in_dim, out_dim = matrix_shape
        return math.prod(groups) * self.rank * (in_dim + out_dim)

    def misfit_with(self, other: Adapter) -> str | None:
        """Return `None` if `other` is a LoRA of equal or smaller rank, with any scale."""
        if not isinstance(other, LoRA) or other.rank > self.rank:
            return super().misfit_with(other)
        return super().misfit_with(_with_size_of(self, other))

    def values_from(self, other: Adapter, values: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(other, LoRA) or not {"lora_a", "lora_b"} <= values.keys():
            return values
        a, b, more = values["lora_a"], values["lora_b"], self.rank - other.rank
        if a.ndim > 1 and b.ndim > 1 and more:  # columns of zeros do nothing
            a = np.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, more)])
            b = np.pad(b, [(0, 0)] * (b.ndim - 2) + [(0, more), (0, 0)])
        return {**values, "lora_a": a, "lora_b": b * np.asarray(other.scale / self.scale, b.dtype)}

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "a_initializer": keras.initializers.serialize(self.a_initializer) if self.a_initializer else None,
            "b_initializer": keras.initializers.serialize(self.b_initializer) if self.b_initializer else None,
            "freeze_a": self.freeze_a,
        }


def _with_size_of(lora: LoRA, other: LoRA) -> LoRA:
    """Return a copy of `other` with the rank and scale of `lora`."""
    size = {key: lora.get_config()[key] for key in ("rank", "alpha", "rank_stabilized")}
    found: LoRA = LoRA.from_config({**other.get_config(), **size})
    return found
