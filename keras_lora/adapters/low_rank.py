"""`LowRank`, the base class of methods whose change is a product of thin factors: `ΔW = scale · A B`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import ops

from keras_lora import backend, checks, factors
from keras_lora.adapters.adapter import Adapter
from keras_lora.compat import call_internals

if TYPE_CHECKING:
    from keras_lora.linear_map import LinearMap


class LowRank(Adapter):
    """Base class for a change `ΔW = scale · A B`.

    A subclass adds weights in `build_for` and returns their factors from `pair`. The library derives the rest from `pair`:
    the definition, the fast path with dropout, sums with other adapters, exact combinations, serving with one adapter per
    example, and the export to an exact LoRA in a PEFT file.

    Args:
        rank: Positive integer.
        alpha: Positive number. The scale is `alpha / rank`.
        dropout: Number in `[0, 1)`, the share of the entries of the input dropped on the way to `A` in training.
        rank_stabilized: Use the scale `alpha / sqrt(rank)`.
        seed: Integer, for the initial values and the dropout. Each layer uses a separate random stream.
        **kwargs: `name`, `dtype` and `trainable` of a Keras layer.

    Raises:
        ValueError: An argument is outside its range.
    """

    def __init__(
        self,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        rank_stabilized: bool = False,
        seed: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.rank = checks.positive_integer("rank", rank)
        self.alpha = checks.positive_number("alpha", alpha)
        self.dropout = checks.dropout_rate("dropout", dropout)
        self.rank_stabilized = checks.flag("rank_stabilized", rank_stabilized)
        self.seed = checks.seed(seed)
        self.seed_generator = keras.random.SeedGenerator(self.seed) if dropout else None

    @property
    def scale(self) -> float:
        """The factor that multiplies `A B`."""
        return factors.scale(self.rank, self.alpha, self.rank_stabilized)

    def pair(self, weights: Mapping[str, Any], matrix_shape: tuple[int, ...] | None) -> tuple[Any, Any]:
        """Return the factors `A (*groups, in_dim, k)` and `B (*groups, k, out_dim)` made from `weights`, without the scale.

        Args:
            weights: The weights by key: variables of this adapter, or NumPy arrays from a file.
            matrix_shape: The shape of the kernel as a matrix; `None` for a file that is read without its base.
        """
        raise TypeError(f"{type(self).__name__} does not define `pair(weights, matrix_shape)`, its factors.")

    def product_rank(self, matrix_shape: tuple[int, ...]) -> int:
        """Return the number of columns of `A`, for a matrix of this shape."""
        return self.rank

    def factors_of(
        self, weights: Mapping[str, np.ndarray], matrix_shape: tuple[int, ...] | None
    ) -> tuple[np.ndarray, np.ndarray] | None:
        a, b = (np.asarray(ops.convert_to_numpy(factor), "float64") for factor in self.pair(weights, matrix_shape))
        return a, self.scale * b

    def current_pair(self) -> tuple[Any, Any]:
        """Return the current factors."""
        return self.pair(self.saved_weights, self.matrix_shape)

    def problem_with(self, linear: LinearMap) -> str | None:
        if not self.dropout or linear.no_dropout is None:
            return None
        return (
            f"`dropout` acts on the input of the adapted map, and {linear.no_dropout}; leave the layer out of `targets` or "
            f"use dropout=0 (received: dropout={self.dropout})"
        )

    def delta_kernel(self, matrix: Any) -> Any:
        # Hu et al., section 4.1: ΔW = scale · A B.
        return self.scale * ops.matmul(*self.current_pair())

    def live_factors(self, training: bool | None = None) -> tuple[Any, Any] | None:
        if self.seed_generator is not None and training:
            return None
        a, b = (ops.convert_to_tensor(factor) for factor in self.current_pair())
        return a, ops.multiply(ops.multiply(self.scale, self.strength), b)

    def adapted_output(self, x: Any, y: Any, linear: LinearMap, training: bool | None = None) -> Any:
        return self.add_product(x, y, linear, training, *self.current_pair(), self.strength)

    def output(self, x: Any, linear: LinearMap, training: bool | None = None) -> Any:
        return self.adapted_output(x, None, linear, training)

    def add_product(
        self, x: Any, y: Any, linear: LinearMap, training: bool | None, a: Any, b: Any, strength: Any, kept: Any = None
    ) -> Any:
        """Return `y + strength · scale · (x a) b`, with dropout before `a` in training; `y=None` is the base output.

        The product of `kept`, frozen factors, is added without scale and dropout.
        """
        if self.seed_generator is None or not training:
            return linear.low_rank_sum(x, a, b, self.scale, strength, y, kept)
        if keras.backend.backend() == "torch" and call_internals.is_rematerialized(linear.layer):
            checks.warn(
                f"Dropout inside a `RematScope` gives wrong gradients on PyTorch, with Keras's own layers too: layer "
                f"'{linear.layer.name}' draws other numbers when it runs the second time. Use dropout=0, or no RematScope."
            )
        drawn = self.seed_generator.next()
        if backend.draws_bytes(x):
            drop = backend.Drop(self.dropout, drawn)
            return linear.low_rank_sum(x, a, b, self.scale, strength, y, kept, drop)
        y = linear.base_output(x) if y is None else y
        y = y if kept is None else linear.low_rank_sum(x, kept[0], kept[1], 1.0, strength, y)

        # The dropped input is not kept for the backward pass; it is recomputed there from the same seed.
        def dropped(x: Any, a: Any, drawn: Any) -> Any:
            seed = call_internals.drawn_seed(self.seed_generator, drawn)
            return linear.contract(keras.random.dropout(x, self.dropout, seed=seed), a)

        h = keras.remat(dropped)(x, ops.cast(a, y.dtype), drawn)
        return ops.add(y, linear.expand(h, ops.cast(ops.multiply(ops.multiply(self.scale, strength), b), y.dtype)))

    def get_config(self) -> dict[str, Any]:
        own = {key: getattr(self, key) for key in ("rank", "alpha", "dropout", "rank_stabilized", "seed")}
        return {**super().get_config(), **own}
