"""Thin factorisations in NumPy: of a large matrix by a few products with it, and of a matrix known only by its products."""

from __future__ import annotations

import numpy as np

#: Left singular vectors, singular values, and right singular vectors as rows.
Triplets = tuple[np.ndarray, np.ndarray, np.ndarray]


def leading(matrix: np.ndarray, rank: int, rng: np.random.Generator, iterations: int = 4) -> Triplets:
    """Return `u (…, m, k)`, `s (…, k)` and `v (…, k, n)` of the `k` largest singular values; `k` is at most `rank`.

    A large matrix is multiplied by a few random vectors instead ([Halko et al., 2011](https://arxiv.org/abs/0909.4061),
    algorithms 4.4 and 5.1): it costs `2 · iterations + 2` products with `rank + 10` columns.
    """
    small = min(matrix.shape[-2:])
    rank = min(rank, small)
    if small <= 4 * (rank + 10):
        u, s, v = np.linalg.svd(matrix.astype("float64"), full_matrices=False)
        return u[..., :rank], s[..., :rank], v[..., :rank, :]
    transposed = np.swapaxes(matrix, -1, -2)
    q = _orthonormal(matrix @ _normal(rng, (*matrix.shape[:-2], matrix.shape[-1], rank + 10), matrix.dtype))
    for _ in range(iterations):
        q = _orthonormal(matrix @ _orthonormal(transposed @ q))
    u, s, v = np.linalg.svd(np.swapaxes(q, -1, -2) @ matrix, full_matrices=False)
    return q @ u[..., :rank], s[..., :rank], v[..., :rank, :]


def rows_of_qr(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Return `a (…, m, k)` and `b (…, k, n)`: of `matrixᵀ = Q R`, `bᵀ` is the first columns of `Q`, and `aᵀ` rows of `R`.

    Only the first rows of `matrix` decide these columns.
    """
    q = _orthonormal(np.swapaxes(matrix[..., :rank, :], -1, -2))
    return matrix @ q, np.swapaxes(q, -1, -2)


def halves(groups: tuple[int, ...], sizes: tuple[int, int], rank: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Return `a (…, m, rank)` and `b (…, rank, n)` with `a b = 0`, whose entries have variance one on average.

    The rows of `a` are in the span of half the rows of an orthogonal matrix, the columns of `b` in that of the other half.
    """
    q = _orthonormal(rng.normal(size=(*groups, rank, rank)))
    first, second = q[..., : rank // 2, :], q[..., rank // 2 :, :]
    a = rng.normal(size=(*groups, sizes[0], first.shape[-2])) @ first
    b = np.swapaxes(second, -1, -2) @ rng.normal(size=(*groups, second.shape[-2], sizes[1]))
    return a * np.sqrt(rank / first.shape[-2]), b * np.sqrt(rank / second.shape[-2])


def eigenvectors(omega: np.ndarray, sketch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the eigenvalues, largest first, and eigenvectors `(…, n, k)` of a matrix C ≥ 0, given `sketch = C omega`.

    Nyström, stabilised by a small shift ([Tropp et al., 2017](https://arxiv.org/abs/1706.05736), algorithm 3).
    """
    omega, sketch = omega.astype("float64"), sketch.astype("float64")
    # The sketch was summed in float32, whose rounding must not make the core indefinite.
    shift = 1e-6 * np.linalg.norm(sketch, axis=(-2, -1), keepdims=True) / np.sqrt(omega.shape[-2])
    shift = np.where(shift > 0, shift, 1.0)
    shifted = sketch + shift * omega
    core = np.swapaxes(omega, -1, -2) @ shifted
    values, vectors = np.linalg.eigh((core + np.swapaxes(core, -1, -2)) / 2)
    root = vectors / np.sqrt(np.maximum(values, 1e-12 * values[..., -1:]))[..., None, :]
    u, s, _ = np.linalg.svd(shifted @ root, full_matrices=False)
    return np.maximum(s**2 - shift[..., 0], 0.0), u


def from_both_sides(omega: np.ndarray, left: np.ndarray, right: np.ndarray) -> Triplets:
    """Return `u`, `s`, `v` of `G ≈ right (omegaᵀ right)⁺ left`, given `left = omegaᵀ G` and `right = G psi`.

    The generalised Nyström approximation ([Nakatsukasa, 2020](https://arxiv.org/abs/2009.11392)).
    """
    omega, left, right = (each.astype("float64") for each in (omega, left, right))
    q = _orthonormal(right)
    core = np.linalg.pinv(np.swapaxes(omega, -1, -2) @ q, rcond=1e-6) @ left
    u, s, v = np.linalg.svd(core, full_matrices=False)
    return q @ u, s, v


def shared_out(values: dict[str, np.ndarray], budget: int, most: dict[str, int]) -> dict[str, int]:
    """Return ranks that sum to `budget`, or to what `most` allows: one each, and the rest to the largest of `values`."""
    ranks = dict.fromkeys(values, 1)
    offers = [(value, key) for key, each in values.items() for value in each[1 : most[key]]]
    for _, key in sorted(offers, key=lambda offer: -offer[0])[: max(0, budget - len(ranks))]:
        ranks[key] += 1
    return ranks


def _normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    return rng.standard_normal(shape).astype(dtype)


def _orthonormal(matrix: np.ndarray) -> np.ndarray:
    q: np.ndarray = np.linalg.qr(matrix)[0]
    return q
