"""Combine adapters into a new one, or compress one. The error of the result is reported."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from rich.table import Table

from keras_lora import adapters, backend, checks, factors, reports
from keras_lora.applying import inject, require_adapted, reset_compilation
from keras_lora.compat import keras_internals
from keras_lora.factors import Factors
from keras_lora.linear_map import LinearMap
from keras_lora.swap import beside, flags, slots
from keras_lora.swap.adapted import address_of, named_adapters, set_adapter
from keras_lora.swap.adapters_of_model import check_names, new_name, only_name, show_beside
from keras_lora.swap.addresses import walk
from keras_lora.switching import strengths_of

#: A weight and the adapter it belongs to.
_Terms = list[tuple[float, adapters.Adapter]]

METHODS = ("cat", "svd", "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")


@dataclass(frozen=True)
class CombinedKernel:
    """The result for one kernel.

    Attributes:
        layer: The path of the layer, with the kernel's name if it has several.
        rank: The rank of the new adapter.
        error: How far its change is from the exact one, `‖found - wanted‖ / ‖wanted‖` (Frobenius).
    """

    layer: str
    rank: int
    error: float


class CombinationReport(list[CombinedKernel]):
    """A list of `CombinedKernel`; printing it prints a table."""

    @property
    def error(self) -> float:
        """The largest error of any kernel."""
        return max(row.error for row in self)

    def __str__(self) -> str:
        table = Table()
        table.add_column("layer", overflow="fold")
        table.add_column("rank", justify="right")
        table.add_column("error", justify="right")
        for row in self:
            table.add_row(row.layer, str(row.rank), f"{row.error:.2g}")
        return f"{reports.text(table)}largest error: {self.error:.2g}"

    __repr__ = __str__


@checks.helpful
@keras_internals.without_tensorflow()
def combine_adapters(
    model: Any,
    names: str | Iterable[str] | Mapping[str, float],
    *,
    name: str,
    method: str = "cat",
    rank: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    seed: int | None = None,
) -> CombinationReport:
    """Combine several adapters into a new one, a plain LoRA: `ΔW = Σ weight · ΔW_i`, or as another method defines.

    The new adapter is added to the model; the others stay. Only the new one is then active and trainable.

    Args:
        model: An adapted model, or an adapted part of one.
        names: Names of adapters, or a mapping from names to weights. A negative weight subtracts. Their strengths in the
            model do not matter. If an adapter does not change a kernel, it adds nothing to it.
        name: The name of the new adapter.
        method: One of:

            - `"cat"`: the exact sum; its rank is the sum of the ranks. With `rank` or `energy` it is the same as `"svd"`.
            - `"svd"`: the best approximation of the sum at a rank, or at a share of its energy.
            - `"linear"`: adds the factors themselves, as PEFT does; for adapters with the same initial weights and equal
              ranks. This is not the sum of the changes; the error shows the difference.
            - `"ties"`: keeps the largest entries of each change, elects a sign for each entry, and takes the mean of the
              values with that sign.
            - `"dare_linear"`, `"dare_ties"`: drops entries at random and scales up the rest, then sums them, or elects
              signs.
            - `"magnitude_prune"`: keeps the largest entries of each change, then sums them.

            The last four work on the whole ΔW of one kernel at a time. They need `density`, and `rank` or `energy`.
        rank: The rank of the result.
        energy: Instead of `rank`, a number in (0, 1]: each kernel gets the smallest rank that keeps this share of the sum
            of the squared singular values.
        density: The share of the entries of a change that is kept.
        seed: For the methods that drop entries at random.

    Returns:
        A row for each kernel, with its rank and error. The error is relative to the sum for `"cat"`, `"svd"` and
        `"linear"`, and to the pruned matrix for the others. Call `compile` on the model before training.

    Raises:
        ValueError: A name is unknown, the new name is taken, an argument is missing, out of range or not used by the
            method, or ranks differ for `"linear"`. Nothing is changed then.

    Example:

    >>> import keras, keras_lora
    >>> model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(32), keras.layers.Dense(2)])
    >>> model = keras_lora.apply_lora(model, rank=1, name="french")
    >>> model = keras_lora.apply_lora(model, rank=2, name="formal")
    >>> keras_lora.combine_adapters(model, {"french": 1, "formal": -0.5}, name="informal french")[0].rank
    3

    References:
        - [Yadav et al., 2023](https://arxiv.org/abs/2306.01708), for TIES
        - [Yu et al., 2023](https://arxiv.org/abs/2311.03099), for DARE
    """
    require_adapted(model, "combine_adapters")
    weights = strengths_of(names)
    check_names(model, weights)
    name = new_name(model, name)
    _check_arguments(method, weights, rank, energy, density)
    rank, energy = _plain_numbers(rank, energy)
    density = None if density is None else checks.share("density", density)
    rng = np.random.default_rng(seed)
    terms: dict[str, _Terms] = {}
    linears: dict[str, LinearMap] = {}
    named = named_adapters(model)
    for each, weight in weights.items():
        for address, (linear, adapter) in named[each].items():
            terms.setdefault(address, []).append((weight, adapter))
            linears[address] = linear
    made = {}
    with reports.progress(len(linears)) as step:
        for address, linear in linears.items():
            step(f"combining {address}")
            try:
                made[address] = _combined(linear, terms[address], method, rank, energy, density, rng)
            except ValueError as error:
                raise ValueError(f"The adapters at '{address}' cannot be combined by '{method}': {error}") from error
    new = {address: _plain_lora(linears[address], found) for address, (found, _) in made.items()}
    inject(model, [(linears[address], adapter) for address, adapter in new.items()], name)
    beside.combine(model, weights, name)
    show_beside(model)
    reset_compilation(model)
    return _report(model, linears, {address: (new[address].rank, error) for address, (_, error) in made.items()})


@checks.helpful
@keras_internals.without_tensorflow()
def compress_adapter(
    model: Any, *, name: str | None = None, rank: int | None = None, energy: float | None = None
) -> CombinationReport:
    """Replace an adapter with its best LoRA approximation of a given rank, or of a given share of the energy.

    Use it to make an adapter smaller, or to turn one of another method (DoRA, trainable tokens) into a LoRA. It stays as
    active and as trainable as before.

    Args:
        model: An adapted model, or an adapted part of one.
        name: The name of the adapter. Needed if the model has several.
        rank: The new rank, limited to the largest that each kernel allows.
        energy: Instead of `rank`, a number in (0, 1]: each kernel gets the smallest rank that keeps this share of the sum
            of the squared singular values of ΔW; 1 keeps everything except rounding noise.

    Returns:
        A row for each kernel, with its rank and error. Call `compile` on the model before training.

    Raises:
        ValueError: The name is unknown, or not exactly one of `rank` and `energy` is given. Nothing is changed then.

    Example:

    >>> import keras, keras_lora
    >>> model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(32), keras.layers.Dense(2)])
    >>> model = keras_lora.apply_lora(model, "dora", rank=8, name="french")
    >>> [(row.layer, row.rank) for row in keras_lora.compress_adapter(model, name="french", rank=2)][0][1]
    2
    """
    require_adapted(model, "compress_adapter")
    name = only_name(model, name)
    old = named_adapters(model)[name]
    rank, energy = _plain_numbers(rank, energy)
    made = {}
    with reports.progress(len(old)) as step:
        for address, (linear, adapter) in old.items():
            step(f"compressing {address}")
            made[address] = _approximated(linear, [(1.0, adapter)], rank, energy)
    new = {address: _plain_lora(old[address][0], found) for address, (found, _) in made.items()}
    replace(model, name, new)
    linears = {address: linear for address, (linear, _) in old.items()}
    return _report(model, linears, {address: (new[address].rank, error) for address, (_, error) in made.items()})


def replace(model: Any, name: str, made: Mapping[str, adapters.Adapter]) -> None:
    """Replace the parts of a named adapter. The new parts are as active and as trainable as the old ones.

    Args:
        model: An adapted model.
        name: The adapter whose parts are replaced.
        made: The new adapters, with weights, by the address of their kernel; parts at other addresses stay.
    """
    old = named_adapters(model)[name]
    for address, adapter in made.items():
        linear, before = old[address]
        adapter.strength.assign(before.strength)
        set_adapter(linear, adapter, name)  # first, so the kernel always has one and keeps its stored dtype
        planned = any(flags.planned_variables(layer) for layer in adapters.with_sublayers(before))
        now = bool(before.trainable_variables)
        for layer in adapters.with_sublayers(adapter):
            own = len(keras_internals.own_trainable_variables(layer))
            both = (flags.Flags(each, [each] * own) for each in (planned, now))
            flags.mark(layer, flags.flags_of(layer), *both)
        slots.take(linear, before)
    reset_compilation(model)


def _combined(
    linear: LinearMap,
    terms: _Terms,
    method: str,
    rank: int | None,
    energy: float | None,
    density: Any,
    rng: np.random.Generator,
) -> tuple[Factors, float]:
    """The factors of a new adapter for one kernel, and their error."""
    whole = method == "cat" and rank is None and energy is None
    if method in ("cat", "svd") and not whole:
        return _approximated(linear, terms, rank, energy)
    if method in ("cat", "linear"):
        pairs = [(weight, _factors_of(adapter)) for weight, adapter in terms]
        exact = factors.concatenate(pairs)
        if whole:
            return exact, 0.0
        found = factors.linear(pairs)
        return found, factors.relative_error(factors.product(found), factors.product(exact))
    dense = [(weight, _delta(linear, adapter)) for weight, adapter in terms]
    if method == "ties":
        wanted = factors.ties(dense, density)
    elif method == "magnitude_prune":
        wanted = _sum([weight * factors.keep_largest(matrix, density) for weight, matrix in dense])
    else:
        wanted = factors.dare(dense, density, rng, ties=method == "dare_ties")
    return factors.low_rank(wanted, rank, energy)


def _approximated(linear: LinearMap, terms: _Terms, rank: int | None, energy: float | None) -> tuple[Factors, float]:
    """The best approximation of a weighted sum of changes; whole matrices are formed only if a method has no factors."""
    if all(adapter.numpy_factors() is not None for _, adapter in terms):
        return factors.truncate(factors.concatenate([(w, _factors_of(adapter)) for w, adapter in terms]), rank, energy)
    return factors.low_rank(_sum([weight * _delta(linear, adapter) for weight, adapter in terms]), rank, energy)


def _sum(matrices: list[np.ndarray]) -> np.ndarray:
    found: np.ndarray = np.sum(matrices, axis=0)
    return found


def _factors_of(adapter: adapters.Adapter) -> Factors:
    found = adapter.numpy_factors()
    if found is None:
        raise ValueError(
            f"the change of a {type(adapter).__name__} has no factors to add. Expected adapters such as LoRA; "
            "`keras_lora.compress_adapter` turns it into one, and 'svd' accepts it as it is"
        )
    return found


def _delta(linear: LinearMap, adapter: adapters.Adapter) -> np.ndarray:
    matrix = keras.ops.cast(linear.matrix, "float32")
    return np.asarray(backend.to_numpy(adapter.delta_kernel(matrix)), "float64")


def _plain_lora(linear: LinearMap, found: Factors) -> adapters.LoRA:
    """A LoRA for a kernel with these factors and the scale 1."""
    a, b = found
    adapter = adapters.LoRA(rank=a.shape[-1], alpha=a.shape[-1])
    with adapters.skip_init():
        slots.start(linear, adapter)
    adapter.lora_a.assign(a.astype("float32"))
    adapter.lora_b.assign(b.astype("float32"))
    return adapter


def _report(model: Any, linears: dict[str, LinearMap], made: dict[str, tuple[int, float]]) -> CombinationReport:
    paths = {id(place.layer): place.path for place in walk(model)}
    rows = CombinationReport()
    for address, (rank, error) in made.items():
        linear = linears[address]
        rows.append(CombinedKernel(address_of(paths[id(linear.layer)], linear), rank, error))
    return rows


def _plain_numbers(rank: Any, energy: Any) -> tuple[int | None, float | None]:
    """A rank and an energy as Python numbers."""
    rank = None if rank is None else checks.positive_integer("rank", rank)
    return rank, None if energy is None else checks.share("energy", energy)


def _check_arguments(method: str, weights: dict[str, float], rank: Any, energy: Any, density: Any) -> None:
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {METHODS}. Received: method={method!r}.")
    if not weights:
        raise ValueError("`names` must name at least one adapter. Received: none.")
    if rank is not None and energy is not None:
        raise ValueError(f"Expected one of `rank` and `energy`. Received: {rank=}, {energy=}.")
    if method not in ("cat", "linear") and rank is None and energy is None:
        raise ValueError(f"'{method}' needs `rank` or `energy`. Received neither.")
    if method == "linear" and (rank is not None or energy is not None):
        raise ValueError(f"'linear' keeps the rank that the adapters have. Received: {rank=}, {energy=}.")
    if (density is None) == (method in METHODS[3:]):
        wants = "needs" if density is None else "does not use"
        raise ValueError(f"'{method}' {wants} `density`. Received: {density=}.")
