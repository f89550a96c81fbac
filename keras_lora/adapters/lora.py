"""LoRA: a low-rank change added to the kernel. A second, frozen pair of factors can stand beside the trained one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import ops

from keras_lora import checks
from keras_lora.adapters import initial
from keras_lora.adapters.adapter import Adapter
from keras_lora.adapters.low_rank import LowRank

if TYPE_CHECKING:
    from keras_lora.linear_map import LinearMap


@keras.saving.register_keras_serializable("keras_lora")
class LoRA(LowRank):
    """Low-rank adaptation: `W' = W + scale · A B`.

    `A` is `(in_dim, rank)`, `B` is `(rank, out_dim)`; a kernel with groups has one pair per group. `ΔW` is not
    formed in training or inference, except in convolutions where that is cheaper; the output is `y + (x A)(scale · B)`.

    With `kept`, a frozen pair is saved beside the trained one: `W' = W + scale · A B + K_a K_b`. So training can start from
    factors whose product is not zero (`K_a K_b = -scale · A B`), or add to an earlier change, and the base does not move.

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
        kept: Non-negative integer, the rank of the frozen pair, which is zero until it is assigned. Dropout does not act on
            it, and no gradient of it is computed.
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
        kept: int = 0,
        **kwargs: Any,
    ):
        super().__init__(rank, alpha, dropout, rank_stabilized, seed, **kwargs)
        self.a_initializer = keras.initializers.get(a_initializer)
        self.b_initializer = keras.initializers.get(b_initializer)
        self.freeze_a = checks.flag("freeze_a", freeze_a)
        self.kept = checks.positive_integer("kept", kept, least=0)

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
            "lora_a", (*groups, in_dim, self.rank), self.a_initializer or a_default, not self.freeze_a, axes="gir"
        )
        self.lora_b = self.add_factor("lora_b", (*groups, self.rank, out_dim), self.b_initializer or b_default, axes="gro")
        if self.kept:
            self.kept_a = self.add_factor("kept_a", (*groups, in_dim, self.kept), "zeros", trainable=False, axes="gir")
            self.kept_b = self.add_factor("kept_b", (*groups, self.kept, out_dim), "zeros", trainable=False, axes="gro")

    def product_rank(self, matrix_shape: tuple[int, ...]) -> int:
        return self.rank + self.kept

    def pair(self, weights: Mapping[str, Any], matrix_shape: tuple[int, ...] | None) -> tuple[Any, Any]:
        (a, b), *kept = self._pairs(weights)
        for kept_a, kept_b in kept:
            a = ops.concatenate([a, kept_a], axis=-1)
            b = ops.concatenate([b, ops.divide(kept_b, self.scale)], axis=-2)
        return a, b

    def _pairs(self, weights: Mapping[str, Any]) -> list[tuple[Any, Any]]:
        """The trained pair, without the scale, and the kept pair, if there is one."""
        ranks = {"lora": self.rank, "kept": self.kept} if self.kept else {"lora": self.rank}
        if missing := [f"{name}_{end}" for name in ranks for end in "ab" if f"{name}_{end}" not in weights]:
            raise ValueError(f"the file lacks {' and '.join(missing)}")
        for name, rank in ranks.items():
            shape = tuple(weights[f"{name}_a"].shape)
            if len(shape) < 2 or shape[-1] != rank:
                raise ValueError(
                    f"the file says {'rank' if name == 'lora' else name} {rank}, and {name}_a has shape {shape}"
                )
        return [(weights[f"{name}_a"], weights[f"{name}_b"]) for name in ranks]

    def factors_of(
        self, weights: Mapping[str, np.ndarray], matrix_shape: tuple[int, ...] | None
    ) -> tuple[np.ndarray, np.ndarray] | None:
        # Not from `pair`: in float64 two pairs that cancel leave no rounding.
        (a, b), *kept = ([np.asarray(each, "float64") for each in pair] for pair in self._pairs(weights))
        b = self.scale * b
        for kept_a, kept_b in kept:
            a, b = np.concatenate([a, kept_a], axis=-1), np.concatenate([b, kept_b], axis=-2)
        return a, b

    def current_pair(self) -> tuple[Any, Any]:
        return self.pair(self.saved_weights, self.matrix_shape) if self.kept else (self.lora_a, self.lora_b)

    def delta_kernel(self, matrix: Any) -> Any:
        # Hu et al., section 4.1: ΔW = scale · A B; beside it the kept pair, which has no scale.
        delta = self.scale * ops.matmul(self.lora_a, self.lora_b)
        return ops.add(delta, ops.matmul(self.kept_a, self.kept_b)) if self.kept else delta

    def adapted_output(self, x: Any, y: Any, linear: LinearMap, training: bool | None = None) -> Any:
        kept = (self.kept_a, self.kept_b) if self.kept else None
        return self.add_product(x, y, linear, training, self.lora_a, self.lora_b, self.strength, kept)

    def parameter_count(self, matrix_shape: tuple[int, ...]) -> int:
        *groups, in_dim, out_dim = matrix_shape
        return math.prod(groups) * self.rank * (out_dim if self.freeze_a else in_dim + out_dim)

    def size(self, matrix_shape: tuple[int, ...]) -> int:
        *groups, in_dim, out_dim = matrix_shape
        return math.prod(groups) * (self.rank + self.kept) * (in_dim + out_dim)

    def misfit_with(self, other: Adapter) -> str | None:
        """Return `None` if `other` is a LoRA of equal or smaller ranks, with any scale."""
        if not isinstance(other, LoRA) or other.rank > self.rank or other.kept > self.kept:
            return super().misfit_with(other)
        return super().misfit_with(_with_size_of(self, other))

    def values_from(self, other: Adapter, values: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(other, LoRA) or not {"lora_a", "lora_b"} <= values.keys():
            return values
        a, b = _padded(values["lora_a"], values["lora_b"], self.rank - other.rank)
        found = {**values, "lora_a": a, "lora_b": b * np.asarray(other.scale / self.scale, b.dtype)}
        if self.kept and not other.kept:
            *groups, in_dim, out_dim = self.matrix_shape
            shapes = {"kept_a": (*groups, in_dim, self.kept), "kept_b": (*groups, self.kept, out_dim)}
            found |= {key: np.zeros(shape, b.dtype) for key, shape in shapes.items()}
        elif {"kept_a", "kept_b"} <= values.keys():
            kept_a, kept_b = _padded(values["kept_a"], values["kept_b"], self.kept - other.kept)
            found |= {"kept_a": kept_a, "kept_b": kept_b}
        return found

    def get_config(self) -> dict[str, Any]:
        kept = {"kept": self.kept} if self.kept else {}  # files of a plain LoRA stay as they are
        return {
            **super().get_config(),
            "a_initializer": keras.initializers.serialize(self.a_initializer) if self.a_initializer else None,
            "b_initializer": keras.initializers.serialize(self.b_initializer) if self.b_initializer else None,
            "freeze_a": self.freeze_a,
            **kept,
        }


def _with_size_of(lora: LoRA, other: LoRA) -> LoRA:
    """Return a copy of `other` with the ranks and scale of `lora`."""
    size = {key: getattr(lora, key) for key in ("rank", "alpha", "rank_stabilized", "kept")}
    found: LoRA = LoRA.from_config({**other.get_config(), **size})
    return found


def _padded(a: np.ndarray, b: np.ndarray, more: int) -> tuple[np.ndarray, np.ndarray]:
    """Factors of a rank larger by `more`: columns of zeros do nothing."""
    if a.ndim > 1 and b.ndim > 1 and more > 0:
        a = np.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, more)])
        b = np.pad(b, [(0, 0)] * (b.ndim - 2) + [(0, more), (0, 0)])
    return a, b
