"""LoRA: a low-rank change added to the kernel."""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_lora.adapters.adapter import Adapter
from keras_lora.compat import keras_internals


@keras.saving.register_keras_serializable("keras_lora")
class LoRA(Adapter):
    """Low-rank adaptation: `W' = W + scale · A B`.

    `A` is `(in_dim, rank)`, `B` is `(rank, out_dim)`; a kernel with groups has one pair for each group. `ΔW` is never
    formed in training or inference: the output is `y + (x A)(scale · B)`.

    Args:
        rank: Positive integer. 8 is a good start; 1 is often enough.
        alpha: Positive number. The scale is `alpha / rank`, so that the best learning rate changes little with the rank.
        dropout: Number in `[0, 1)`, the share of the entries of `x` dropped on the way to `A` in training.
        rank_stabilized: Use the scale `alpha / sqrt(rank)`, for ranks of 64 and more.
        a_initializer, b_initializer: Keras initializers. By default `A ~ U(±1/sqrt(in_dim))` and `B = 0`, as PEFT has
            it. For an embedding, whose inputs pick one row of `A`, `A = 0` and `B ~ N(0, 1)`.
        seed: Integer, for the initial values and the dropout. Each layer is given its own stream of it.
        freeze_a: Train `B` alone (LoRA-FA). The layer's input is then not kept for the backward pass, only `tokens · rank`
            numbers. `A` must not be zero, so an embedding is refused.
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
        super().__init__(**kwargs)
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"`rank` must be a positive integer. Received: rank={rank!r}.")
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not (0 < alpha < math.inf):
            raise ValueError(f"`alpha` must be a positive finite number. Received: alpha={alpha!r}.")
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not (0 <= dropout < 1):
            raise ValueError(f"`dropout` must be a number in [0, 1). Received: dropout={dropout!r}.")
        self.rank = rank
        self.alpha = alpha
        self.dropout = dropout
        self.rank_stabilized = rank_stabilized
        self.a_initializer = keras.initializers.get(a_initializer)
        self.b_initializer = keras.initializers.get(b_initializer)
        self.seed = seed
        self.freeze_a = bool(freeze_a)
        self.seed_generator = keras.random.SeedGenerator(seed) if dropout else None

    @property
    def scale(self) -> float:
        """What multiplies `A B`."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def problem_with(self, linear: Any) -> str | None:
        if self.freeze_a and linear.picks_rows and self.a_initializer is None:
            return "`freeze_a` keeps A as it starts, and for an embedding that is zero; leave it out or use freeze_a=False"
        if not self.dropout or linear.no_dropout is None:
            return None
        return (
            f"`dropout` acts on the input of the adapted map, and {linear.no_dropout}; leave the layer out of `targets` or "
            f"use dropout=0 (received: dropout={self.dropout})"
        )

    def build_for(self, linear: Any) -> None:
        if (problem := self.problem_with(linear)) is not None:
            raise ValueError(f"Layer '{linear.layer.name}' cannot be adapted: {problem}.")
        *groups, in_dim, out_dim = linear.matrix_shape
        a_default = keras.initializers.RandomUniform(-1 / math.sqrt(in_dim), 1 / math.sqrt(in_dim), seed=self.seed)
        b_default: Any = "zeros"
        if linear.picks_rows:
            a_default, b_default = "zeros", keras.initializers.RandomNormal(stddev=1.0, seed=self.seed)
        self.lora_a = self.add_factor(
            "lora_a", (*groups, in_dim, self.rank), self.a_initializer or a_default, not self.freeze_a
        )
        self.lora_b = self.add_factor("lora_b", (*groups, self.rank, out_dim), self.b_initializer or b_default)
        self.built = True

    def parameter_count(self, matrix_shape: tuple[int, ...]) -> int:
        *groups, in_dim, out_dim = matrix_shape
        return math.prod(groups) * self.rank * (out_dim if self.freeze_a else in_dim + out_dim)

    def delta_kernel(self, matrix: Any) -> Any:
        # Hu et al., section 4.1: ΔW = scale · A B.
        return self.scale * ops.matmul(self.lora_a, self.lora_b)

    def numpy_factors(self) -> tuple[Any, Any] | None:
        a, b = (np.asarray(ops.convert_to_numpy(factor), "float64") for factor in (self.lora_a, self.lora_b))
        return a, self.scale * b

    def live_factors(self, training: bool | None = None) -> tuple[Any, Any] | None:
        if self.seed_generator is not None and training:
            return None
        a, b = (ops.convert_to_tensor(factor) for factor in (self.lora_a, self.lora_b))
        return a, ops.multiply(ops.multiply(self.scale, self.strength), b)

    def adapted_output(self, x: Any, y: Any, linear: Any, training: bool | None = None) -> Any:
        return self.add_product(x, y, linear, training, self.lora_b, self.strength)

    def output(self, x: Any, linear: Any, training: bool | None = None) -> Any:
        return self.adapted_output(x, None, linear, training)

    def add_product(self, x: Any, y: Any, linear: Any, training: bool | None, b: Any, strength: Any) -> Any:
        """`y + strength · scale · (x A) b`, with dropout before `A` in training. `y` that is `None` is the base output."""
        if self.seed_generator is None or not training:
            return linear.low_rank_sum(x, self.lora_a, b, self.scale, strength, y)
        y = linear.base_output(x) if y is None else y

        # The dropped input is not kept for the backward pass: it is made again there, from the same seed.
        def dropped(x: Any, a: Any, drawn: Any) -> Any:
            seed = keras_internals.drawn_seed(self.seed_generator, drawn)
            return linear.contract(keras.random.dropout(x, self.dropout, seed=seed), a)

        h = keras.remat(dropped)(x, ops.cast(self.lora_a, y.dtype), self.seed_generator.next())
        return ops.add(y, linear.expand(h, ops.cast(ops.multiply(ops.multiply(self.scale, strength), b), y.dtype)))

    def misfit_with(self, other: Adapter) -> str | None:
        """A LoRA takes the values of another of equal or smaller rank, whatever its scale."""
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
            "rank": self.rank,
            "alpha": self.alpha,
            "dropout": self.dropout,
            "rank_stabilized": self.rank_stabilized,
            "a_initializer": keras.initializers.serialize(self.a_initializer) if self.a_initializer else None,
            "b_initializer": keras.initializers.serialize(self.b_initializer) if self.b_initializer else None,
            "seed": self.seed,
            "freeze_a": self.freeze_a,
        }


def _with_size_of(lora: LoRA, other: LoRA) -> LoRA:
    """`other` with the rank and the scale of `lora`."""
    size = {key: lora.get_config()[key] for key in ("rank", "alpha", "rank_stabilized")}
    return LoRA.from_config({**other.get_config(), **size})
