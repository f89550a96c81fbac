"""Arithmetic of low-rank changes: sums, best approximations, pruned merges.

A pair `(a, b)` stands for the change `a @ b`: `a` is `(*groups, in_dim, rank)`, `b` is `(*groups, rank, out_dim)`, with any
scale already in `b`. A dense change is `(*groups, in_dim, out_dim)`. `groups` is empty or one axis. A term is a weight and a
change. This file uses only NumPy; everything is computed and returned in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Factors = tuple[np.ndarray, np.ndarray]
Terms = Sequence[tuple[float, Factors]]
DenseTerms = Sequence[tuple[float, np.ndarray]]

#: A singular value is rounding noise below this share of what the change was computed from. QR, product and SVD leave about
#: 4 units of rounding if terms cancel, for any sizes.
_NOISE = 16 * np.finfo(np.float64).eps


def scale(rank: int, alpha: float, rank_stabilized: bool = False) -> float:
    """Return the number that multiplies `A B` in a LoRA."""
    return alpha / (math.sqrt(rank) if rank_stabilized else rank)


def product(factors: Factors) -> np.ndarray:
    """Return the change `a @ b`, as `(*groups, in_dim, out_dim)`."""
    a, b = _checked(factors)
    return a @ b


def concatenate(terms: Terms) -> Factors:
    """Return the exact weighted sum of the products: `[a₁ a₂ …] [w₁ b₁; w₂ b₂; …]`. Its rank is the sum of the ranks."""
    checked = [(_float64(weight), *_checked(factors)) for weight, factors in terms]
    _same("changes", [(*a.shape[:-1], b.shape[-1]) for _, a, b in checked])
    return np.concatenate([a for _, a, _ in checked], axis=-1), np.concatenate([w * b for w, _, b in checked], axis=-2)


def truncate(factors: Factors, rank: int | None = None, energy: float | None = None) -> tuple[Factors, float]:
    """Return the best low-rank approximation of `a @ b`, and its relative error (Frobenius).

    No array of size `in_dim × out_dim` is formed.

    Args:
        factors: The pair to approximate. Both new factors contain the square roots of the singular values.
        rank: Positive integer, reduced to the largest rank that the product can have.
        energy: Number in `(0, 1]`, instead of `rank`: use the smallest rank that keeps this share of the sum of squared
            singular values in every group. 1 keeps everything except rounding noise; a zero change gets rank 1.
    """
    q_a, core, q_b, size = _core(factors)
    (left, right), error = _best(core, size, rank, energy)
    return (q_a @ left, right @ np.swapaxes(q_b, -1, -2)), error


def low_rank(matrix: np.ndarray, rank: int | None = None, energy: float | None = None) -> tuple[Factors, float]:
    """Return the best low-rank approximation of a dense change, with the arguments of `truncate`."""
    matrix = _matrix(matrix)
    return _best(matrix, np.linalg.norm(matrix, axis=(-2, -1)), rank, energy)


def input_directions(factors: Factors) -> tuple[np.ndarray, np.ndarray]:
    """Return the singular values of `a @ b`, largest first and noise as 0, and the unit vectors of the input they belong to.

    They are `(*groups, k)` and `(*groups, in_dim, k)`. No array of size `in_dim × out_dim` is formed.
    """
    q_a, core, _, size = _core(factors)
    u, s, _ = np.linalg.svd(core, full_matrices=False)
    return _without_noise(s, size), q_a @ u


def rank_for(singular_values: np.ndarray, energy: float) -> int:
    """Return the smallest rank, at least 1, that keeps this share of the sum of the squares in every group."""
    _share("energy", energy)
    # What each rank, from 0 on, drops. Small numbers are summed first, so that none is lost to rounding.
    dropped = np.cumsum(singular_values[..., ::-1] ** 2, axis=-1)[..., ::-1]
    # Allow slightly more to be dropped; otherwise rounding would decide whether a share such as 0.9 is met.
    allowed = (1 - energy) * (1 + 1e-9) * dropped[..., :1]
    rank = max(1, int((dropped > allowed).sum(axis=-1).max()))
    return rank


def inner_product(left: Factors, right: Factors) -> float:
    """Return the sum of the products of the entries of two changes, without forming them."""
    (a, b), (c, d) = _checked(left), _checked(right)
    _same("changes", [(*a.shape[:-1], b.shape[-1]), (*c.shape[:-1], d.shape[-1])])
    return float(np.sum((np.swapaxes(a, -1, -2) @ c) * (b @ np.swapaxes(d, -1, -2))))


def linear(terms: Terms) -> Factors:
    """Return the sum of the factors, each times `sqrt(|weight|)`, with the weight's sign on `b`: PEFT's `"linear"`.

    It keeps the rank. It is not the sum of the products: it adds `aᵢ bⱼ` for every pair of terms. It is exact for one term.
    """
    checked = [(_float64(weight), *_checked(factors)) for weight, factors in terms]
    _same("pairs of factors", [(a.shape, b.shape) for _, a, b in checked])
    scaled = [(np.sqrt(np.abs(w)) * a, np.sign(w) * np.sqrt(np.abs(w)) * b) for w, a, b in checked]
    return np.sum([a for a, _ in scaled], axis=0), np.sum([b for _, b in scaled], axis=0)


def keep_largest(matrix: np.ndarray, density: float) -> np.ndarray:
    """Keep the share `density` of the entries with the largest absolute values, at least one; set the others to 0.

    If several entries are equal, the first are kept.
    """
    _share("density", density)
    matrix = _matrix(matrix)
    magnitude = np.abs(matrix).ravel()
    count = max(1, round(density * magnitude.size))
    smallest = np.partition(magnitude, -count)[-count]
    kept = magnitude > smallest
    kept[np.flatnonzero(magnitude == smallest)[: count - kept.sum()]] = True
    return np.where(kept.reshape(matrix.shape), matrix, 0.0)


def ties(terms: DenseTerms, density: float) -> np.ndarray:
    """TIES of dense changes: trim each with `keep_largest`, elect a sign per entry, and average the values with that sign.

    The sign is that of the weighted sum. The average is over the weighted values with this sign, or 0 if there are none.
    [Yadav et al., 2023](https://arxiv.org/abs/2306.01708).
    """
    return _elected([weight * keep_largest(matrix, density) for weight, matrix in _dense(terms)])


def dare(terms: DenseTerms, density: float, rng: np.random.Generator, ties: bool = False) -> np.ndarray:
    """DARE of dense changes: drop each entry with probability `1 - density`, divide the rest by `density`, then combine.

    The result is the weighted sum, which is unbiased, or with `ties` the elected average as in `ties()`. Each term in turn
    draws one number per entry from `rng`. [Yu et al., 2023](https://arxiv.org/abs/2311.03099).
    """
    _share("density", density)
    left = [w * np.where(rng.random(matrix.shape) < density, matrix / density, 0.0) for w, matrix in _dense(terms)]
    return _elected(left) if ties else np.sum(left, axis=0)


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Return `‖found - expected‖ / ‖expected‖` (Frobenius): 0 if both are zero, infinite if only `expected` is."""
    found, expected = _float64(found), _float64(expected)
    _same("arrays", [found.shape, expected.shape])
    off, whole = float(np.linalg.norm(found - expected)), float(np.linalg.norm(expected))
    return off / whole if whole else (math.inf if off else 0.0)


def _core(factors: Factors) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """`q_a`, `core`, `q_b` and `size`: `a @ b` is `q_a @ core @ q_bᵀ`; `size`, one per group, scales the noise of `core`."""
    a, b = _checked(factors)
    q_a, r_a = np.linalg.qr(a)
    q_b, r_b = np.linalg.qr(np.swapaxes(b, -1, -2))
    # Each column of `a` and row of `b` leaves noise in proportion to its length, even if their products cancel.
    lengths = np.linalg.norm(a, axis=-2) * np.linalg.norm(b, axis=-1)
    return q_a, r_a @ np.swapaxes(r_b, -1, -2), q_b, np.linalg.norm(lengths, axis=-1)


def _without_noise(s: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Singular values with rounding noise as 0."""
    return np.where(s > _NOISE * size[..., None], s, 0.0)


def _best(matrix: np.ndarray, size: np.ndarray, rank: int | None, energy: float | None) -> tuple[Factors, float]:
    """The truncated SVD of `matrix`, its best approximation (Eckart and Young). `size`, one per group, scales the noise."""
    if (rank is None) == (energy is None):
        raise ValueError(f"Expected one of `rank` and `energy`. Received: rank={rank!r}, energy={energy!r}.")
    if energy is None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"`rank` must be a positive integer. Received: rank={rank!r}.")
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    s = _without_noise(s, size)
    if energy is not None:
        rank = rank_for(s, energy)
    whole = float(np.linalg.norm(s))
    error = float(np.linalg.norm(s[..., rank:])) / whole if whole else 0.0
    root = np.sqrt(s[..., :rank])
    return (u[..., :rank] * root[..., None, :], root[..., :, None] * v[..., :rank, :]), error


def _elected(values: list[np.ndarray]) -> np.ndarray:
    """For each entry, the mean of the values that have the sign of the sum, or 0 if the sum is 0."""
    stacked = np.stack(values)
    agree = np.sign(stacked) == np.sign(stacked.sum(axis=0))
    found: np.ndarray = np.where(agree, stacked, 0.0).sum(axis=0) / np.maximum(agree.sum(axis=0), 1)
    return found


def _checked(factors: Factors) -> Factors:
    a, b = (_matrix(each) for each in factors)
    if (*a.shape[:-2], a.shape[-1]) != b.shape[:-1]:
        raise ValueError(f"Expected (*groups, in_dim, rank), (*groups, rank, out_dim). Received: {a.shape}, {b.shape}.")
    return a, b


def _dense(terms: DenseTerms) -> list[tuple[np.ndarray, np.ndarray]]:
    dense = [(_float64(weight), _matrix(matrix)) for weight, matrix in terms]
    _same("changes", [matrix.shape for _, matrix in dense])
    return dense


def _matrix(array: Any) -> np.ndarray:
    array = _float64(array)
    if array.ndim not in (2, 3) or not array.size:
        raise ValueError(f"Expected a matrix, not empty, in the last 2 of 2 or 3 axes. Received: shape {array.shape}.")
    found: np.ndarray = array
    return found


def _same(what: str, shapes: list[Any]) -> None:
    if len(set(shapes)) != 1:
        raise ValueError(f"Expected one or more {what}, all of one shape. Received the shapes: {shapes}.")


def _share(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (0 < value <= 1):
        raise ValueError(f"`{name}` must be a number in (0, 1]. Received: {name}={value!r}.")


def _float64(array: Any) -> np.ndarray:
    array = np.asarray(array, np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"Expected finite numbers. Received: {np.count_nonzero(~np.isfinite(array))} that are not.")
    found: np.ndarray = array
    return found
