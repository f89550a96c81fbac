"""How much the changes of several adapters have in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from keras_lora import checks, factors
from keras_lora.plots.measuring import Change, changes_of

Table = tuple[tuple[float, ...], ...]
_Space = list[np.ndarray]  # for each group, directions of the input as the columns of a matrix
_T = TypeVar("_T")


@dataclass(frozen=True)
class Overlaps:
    """How much the changes of several adapters have in common.

    Attributes:
        names: The names of the adapters.
        measure: `"subspace"` or `"cosine"`.
        values: A row for each adapter, with the overlap with each adapter. NaN if a change is zero, or if the two adapters
            change no kernel in common.
        layers: The same table for each layer.
        chance: The overlap of random subspaces of the same sizes, the mean over pairs and layers; 0 for `"cosine"`.
    """

    names: tuple[str, ...]
    measure: str
    values: Table
    layers: dict[str, Table]
    chance: float


@checks.helpful
def measure_overlaps(
    model: Any, *, names: Iterable[str] | None = None, measure: str = "subspace", directions: int | None = None
) -> Overlaps:
    """Measure how much the changes of two or more adapters have in common. These are the numbers behind `plot_overlaps`.

    Strengths do not matter.

    Args:
        model: An adapted model with several adapters, or an adapted part of one.
        names: Their names, at least two. All of them by default.
        measure: One of:

            - `"subspace"`: `‖U_iᵀ U_j‖² / min(k_i, k_j)`, where the columns of U_i are the `k_i` directions of a kernel's
              input that the change i uses most. 1 if one subspace contains the other, 0 if they are orthogonal. The whole
              is the mean over the layers that both adapters change.
            - `"cosine"`: the sum of the products of all entries of two changes, divided by their norms. 1 if they are
              equal up to a positive factor, -1 if they are opposite. The whole is the cosine of all layers taken as one
              vector; a layer that an adapter does not change counts as zeros.
        directions: For `"subspace"`, the largest number of directions. By default the rank of the adapter.

    Returns:
        The `Overlaps`.

    Raises:
        ValueError: The model is not adapted, a name is unknown, there are fewer than two, or an argument is out of range.

    Example:

    >>> import keras, keras_lora
    >>> model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(32), keras.layers.Dense(2)])
    >>> for name in ("french", "formal"):
    ...     model = keras_lora.apply_lora(model, keras_lora.LoRA(2, b_initializer="ones"), name=name)
    >>> overlaps = keras_lora.plots.measure_overlaps(model, measure="cosine")
    >>> overlaps.names, round(overlaps.values[0][0], 3)
    (('french', 'formal'), 1.0)

    Reference:
        [Hu et al., 2021](https://arxiv.org/abs/2106.09685), section 7.2
    """
    if measure not in ("subspace", "cosine"):
        raise ValueError(f"`measure` must be 'subspace' or 'cosine'. Received: measure={measure!r}.")
    if directions is not None:
        if measure == "cosine":
            raise ValueError(f"'cosine' does not use `directions`. Received: directions={directions!r}.")
        directions = checks.positive_integer("directions", directions)
    given = names if names is None else [names] if isinstance(names, str) else list(names)
    layers: dict[str, dict[str, Change]] = {}
    for change in changes_of(model, given, "measure_overlaps"):
        layers.setdefault(change.layer, {})[change.name] = change
    wanted = dict.fromkeys(given) if given is not None else dict.fromkeys(name for each in layers.values() for name in each)
    if len(wanted) < 2:
        raise ValueError(f"An overlap needs two adapters or more. Received: {list(wanted)}.")
    return (_cosines if measure == "cosine" else _subspaces)(tuple(wanted), layers, directions)


def _cosines(names: tuple[str, ...], layers: dict[str, dict[str, Change]], directions: int | None) -> Overlaps:
    products = {}
    for layer, changes in layers.items():
        products[layer] = _table(names, changes, _inner)
    whole = np.sum(list(products.values()), axis=0)
    tables = {layer: _plain(_normalised(each)) for layer, each in products.items()}
    return Overlaps(names, "cosine", _plain(_normalised(whole)), tables, 0.0)


def _inner(left: Change | None, right: Change | None) -> float:
    return 0.0 if left is None or right is None else factors.inner_product(left.pair, right.pair)


def _normalised(products: np.ndarray) -> np.ndarray:
    """Inner products divided by the norms, NaN if a norm is 0."""
    norms = np.sqrt(np.diag(products))
    norms = np.where(norms > 0, norms, np.nan)
    cosines: np.ndarray = np.clip(products / np.outer(norms, norms), -1.0, 1.0)
    return cosines


def _subspaces(names: tuple[str, ...], layers: dict[str, dict[str, Change]], directions: int | None) -> Overlaps:
    tables, chances = {}, []
    for layer, changes in layers.items():
        spaces = {name: _space(change, directions) for name, change in changes.items()}
        tables[layer] = _table(names, spaces, _shared)
        for at, i in enumerate(names):
            chances += [_by_chance(spaces.get(i), spaces.get(j)) for j in names[at + 1 :]]
    stacked = np.stack(list(tables.values()))
    plain = {layer: _plain(each) for layer, each in tables.items()}
    return Overlaps(names, "subspace", _plain(_mean(stacked)), plain, float(_mean(np.array(chances))))


def _space(change: Change, directions: int | None) -> _Space:
    """The directions of the input that the change uses most."""
    s, u = change.spectrum()
    most = directions or getattr(change.adapter, "rank", None) or s.shape[-1]
    pairs = zip(s.reshape(-1, s.shape[-1]), u.reshape(-1, *u.shape[-2:]), strict=True)
    return [vectors[:, : min(most, int((values > 0).sum()))] for values, vectors in pairs]


def _shared(left: _Space | None, right: _Space | None) -> float:
    return _over_groups(left, right, lambda u, v: float(np.sum((u.T @ v) ** 2)) / min(u.shape[1], v.shape[1]))


def _by_chance(left: _Space | None, right: _Space | None) -> float:
    """The expected overlap of random subspaces: each of k directions has the share l / n of its square in l of n."""
    return _over_groups(left, right, lambda u, v: max(u.shape[1], v.shape[1]) / u.shape[0])


def _over_groups(left: _Space | None, right: _Space | None, function: Callable[[np.ndarray, np.ndarray], float]) -> float:
    """The mean over the groups in which both have a direction, or NaN if there are none."""
    pairs = zip(left or [], right or [], strict=False)
    found = [function(u, v) for u, v in pairs if u.shape[1] and v.shape[1]]
    return sum(found) / len(found) if found else math.nan


def _table(names: tuple[str, ...], found: Mapping[str, _T], function: Callable[[_T | None, _T | None], float]) -> np.ndarray:
    return np.array([[function(found.get(i), found.get(j)) for j in names] for i in names])


def _mean(values: np.ndarray) -> np.ndarray:
    """The mean over the first axis of what is not NaN, or NaN."""
    known = ~np.isnan(values)
    counts = known.sum(axis=0)
    found: np.ndarray = np.where(known, values, 0.0).sum(axis=0) / np.where(counts > 0, counts, np.nan)
    return found


def _plain(table: np.ndarray) -> Table:
    return tuple(tuple(float(each) for each in row) for row in table)
