"""Initial values from NumPy: the same numbers on every backend, and no function for JAX to compile for each shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

Initial = Callable[..., np.ndarray]


def zeros(shape: tuple[int, ...], dtype: Any = "float32") -> np.ndarray:
    """Zeros."""
    return np.zeros(shape, dtype)


def ones(shape: tuple[int, ...], dtype: Any = "float32") -> np.ndarray:
    """Ones."""
    return np.ones(shape, dtype)


def uniform(limit: float, seed: int | None) -> Initial:
    """Draws from `U(-limit, limit)`."""
    return _drawn(lambda generator, shape: generator.uniform(-limit, limit, shape), seed)


def normal(stddev: float, seed: int | None) -> Initial:
    """Draws from `N(0, stddev²)`."""
    return _drawn(lambda generator, shape: generator.normal(0.0, stddev, shape), seed)


def _drawn(draw: Callable[[np.random.Generator, tuple[int, ...]], Any], seed: int | None) -> Initial:
    """Draws for `seed`. Without one, Keras chooses it, so that `keras.utils.set_random_seed` has its effect."""
    generator = np.random.Generator(np.random.Philox(keras.initializers.RandomUniform(seed=seed).seed))

    def values(shape: tuple[int, ...], dtype: Any = "float32") -> np.ndarray:
        return np.asarray(draw(generator, shape), dtype)

    return values


NAMED: dict[str, Initial] = {"zeros": zeros, "ones": ones}
