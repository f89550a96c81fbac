"""VeRA: frozen random factors, drawn from a seed, and two trained vectors."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import ops

from keras_lora import checks
from keras_lora.adapters.low_rank import LowRank

if TYPE_CHECKING:
    from keras_lora.linear_map import LinearMap

#: The frozen factors in use, by seed and shape: layers of one shape share them.
_DRAWN: weakref.WeakValueDictionary[tuple[int, ...], keras.Variable] = weakref.WeakValueDictionary()


@keras.saving.register_keras_serializable("keras_lora")
class VeRA(LowRank):
    """Vector-based random matrix adaptation: `W' = W + A diag(d) B diag(b)`.

    `A (in_dim, rank)` and `B (rank, out_dim)` are random and frozen; only `d (rank,)` and `b (out_dim,)` train. Kernels of
    one shape share `A` and `B`, which are drawn again from `projection_seed` when a file is loaded, with the same numbers on
    every backend. So files have a few hundred numbers for a kernel. A step costs as much as one of a LoRA of this large
    rank. It needs a high learning rate: start at ten times LoRA's.

    Args:
        rank: Positive integer.
        projection_seed: Integer, not negative, for `A` and `B`. It is part of the meaning of a file.
        d_initial: Number, the initial value of `d`; `b` starts at zero.
        dropout: Number in `[0, 1)`, the share of the entries of the input dropped on the way to `A` in training.
        seed: Integer, for the dropout. Each layer uses a separate random stream.
        **kwargs: `name`, `dtype` and `trainable` of a Keras layer.

    Raises:
        ValueError: An argument is outside its range.

    Example:

    >>> import keras, keras_lora
    >>> model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(32), keras.layers.Dense(2)])
    >>> model = keras_lora.apply_lora(model, keras_lora.VeRA(rank=64))
    >>> [(v.name, tuple(v.shape)) for v in model.trainable_variables]
    [('vera_d', (64,)), ('vera_b', (32,))]

    Reference:
        [Kopiczko et al., 2023](https://arxiv.org/abs/2310.11454)
    """

    scale = 1.0
    derived = ("vera_frozen_a", "vera_frozen_b")

    def __init__(
        self,
        rank: int = 256,
        projection_seed: int = 0,
        d_initial: float = 0.1,
        dropout: float = 0.0,
        seed: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(rank, dropout=dropout, seed=seed, **kwargs)
        self.projection_seed = checks.positive_integer("projection_seed", projection_seed, least=0)
        self.d_initial = checks.positive_number("d_initial", d_initial)

    def problem_with(self, linear: LinearMap) -> str | None:
        numbers, most = self._frozen_size(linear.matrix_shape), max(8 * math.prod(linear.matrix_shape), 2**20)
        if numbers > most:
            return (
                f"the frozen factors would have {numbers} numbers, and at most {most} are drawn for a kernel of this size; "
                f"use a smaller rank (received: rank={self.rank})"
            )
        return super().problem_with(linear)

    def build_for(self, linear: LinearMap) -> None:
        *groups, _, out_dim = linear.matrix_shape
        self.vera_d = self.add_factor("vera_d", (*groups, self.rank), keras.initializers.Constant(self.d_initial))
        self.vera_b = self.add_factor("vera_b", (*groups, out_dim), "zeros")
        self.vera_frozen_a, self.vera_frozen_b = (
            shared(name, self.projection_seed, shape, bound)
            for name, (shape, bound) in zip(self.derived, self._frozen(linear.matrix_shape), strict=True)
        )

    def _frozen(self, matrix_shape: tuple[int, ...]) -> list[tuple[tuple[int, ...], float]]:
        """The shapes of the frozen factors, and the bounds of their uniform distributions: He's, as in the paper."""
        *groups, in_dim, out_dim = matrix_shape
        a, b = (*groups, in_dim, self.rank), (*groups, self.rank, out_dim)
        return [(a, math.sqrt(6 / in_dim)), (b, math.sqrt(6 / self.rank))]

    def _frozen_size(self, matrix_shape: tuple[int, ...]) -> int:
        return sum(math.prod(shape) for shape, _ in self._frozen(matrix_shape))

    def pair(self, weights: Mapping[str, Any], matrix_shape: tuple[int, ...] | None) -> tuple[Any, Any]:
        if matrix_shape is None:
            raise ValueError("the frozen factors of a VeRA follow from the shape of the kernel")
        a, b = (drawn(self.projection_seed, shape, bound) for shape, bound in self._frozen(matrix_shape))
        return a, _scaled(b, weights)

    def current_pair(self) -> tuple[Any, Any]:
        return self.vera_frozen_a, _scaled(self.vera_frozen_b, {"vera_d": self.vera_d, "vera_b": self.vera_b})

    def factors_of(
        self, weights: Mapping[str, np.ndarray], matrix_shape: tuple[int, ...] | None
    ) -> tuple[np.ndarray, np.ndarray] | None:
        return None if matrix_shape is None else super().factors_of(weights, matrix_shape)

    def parameter_count(self, matrix_shape: tuple[int, ...]) -> int:
        return math.prod(matrix_shape[:-2]) * (self.rank + matrix_shape[-1])

    def size(self, matrix_shape: tuple[int, ...]) -> int:
        return self.parameter_count(matrix_shape) + self._frozen_size(matrix_shape)

    def get_config(self) -> dict[str, Any]:
        own = {"projection_seed": self.projection_seed, "d_initial": self.d_initial}
        inherited = {key: each for key, each in super().get_config().items() if key not in ("alpha", "rank_stabilized")}
        return {**inherited, **own}


def _scaled(b: Any, weights: Mapping[str, Any]) -> Any:
    """`diag(d) B diag(b)`. With `d` on this side, `A` needs no gradient, and the input is not kept for one."""
    return ops.multiply(ops.multiply(ops.expand_dims(weights["vera_d"], -1), b), ops.expand_dims(weights["vera_b"], -2))


def drawn(seed: int, shape: tuple[int, ...], bound: float) -> np.ndarray:
    """Return uniform numbers within `±bound`, in float32.

    They come from the raw words of a counter-based generator, which NumPy keeps the same in all versions; its distributions
    may change.
    """
    words = np.random.Philox(np.random.SeedSequence((seed, *shape))).random_raw(math.prod(shape))
    unit = (words >> np.uint64(40)).astype("float32") * np.float32(2.0**-23) - np.float32(1.0)  # 24 bits, in [-1, 1)
    return (unit * np.float32(bound)).reshape(shape)


def shared(name: str, seed: int, shape: tuple[int, ...], bound: float) -> keras.Variable:
    """Return the frozen variable of this seed and shape, the same object for all layers."""
    key = (seed, *shape)
    if (found := _DRAWN.get(key)) is None:
        found = keras.Variable(drawn(seed, shape, bound), dtype="float32", trainable=False, autocast=False, name=name)
        _DRAWN[key] = found
    return found
