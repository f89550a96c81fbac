"""How large the change of each kernel is, and how many directions it uses."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from keras_lora import adapters, backend, checks, factors
from keras_lora.applying import require_adapted
from keras_lora.factors import Factors
from keras_lora.linear_map import LinearMap
from keras_lora.swap.adapted import address_of, named_adapters
from keras_lora.swap.adapters_of_model import check_names
from keras_lora.swap.addresses import walk

#: A change computed in float32 as `W' - W` has singular values below this share of `‖W‖` that are rounding.
_ROUNDING = float(np.finfo(np.float32).eps)


@dataclass(frozen=True)
class AdapterMeasure:
    """What one adapter does to one kernel.

    Attributes:
        layer: The path of the layer, with the kernel's name if it has several.
        name: The adapter's name.
        method: The class of the adapter.
        rank: Its rank, or `None` if the method has no rank.
        strength: The current factor of the whole change; 0 is off.
        singular_values: Those of ΔW without the strength, largest first, at least one. If the kernel has groups, the root
            mean square over the groups.
        effective_rank: `exp(-Σ p log p)` with `p` the singular values divided by their sum: between 1 and the number of
            singular values above 0, and 0 if ΔW is zero.
        compressed_rank: The smallest rank that keeps a share of the squared singular values in every group, 0.9 unless you
            choose another. `keras_lora.compress_adapter` gives the same rank for the same `energy`.
        relative_change: `‖strength · ΔW‖ / ‖W‖` (Frobenius), where W is the kernel without adapters.
    """

    layer: str
    name: str
    method: str
    rank: int | None
    strength: float
    singular_values: tuple[float, ...]
    effective_rank: float
    compressed_rank: int
    relative_change: float


@checks.helpful
def measure_adapters(model: Any, *, names: str | Iterable[str] | None = None, energy: float = 0.9) -> list[AdapterMeasure]:
    """Measure the change of each adapted kernel: its singular values, its effective rank and its size.

    These are the numbers behind `plot_ranks` and `plot_changes`. They come from the factors of an adapter in float64. If a
    method has no factors (DoRA), the whole ΔW of one kernel at a time is formed, and everything is measured on it.

    Args:
        model: An adapted model, or an adapted part of one.
        names: The name of an adapter, or several. All of them by default.
        energy: Number in (0, 1], the share of the squared singular values that `compressed_rank` keeps.

    Returns:
        A list of `AdapterMeasure`, one for each adapter of each kernel, in the order of the layers.

    Raises:
        ValueError: The model is not adapted, a name is unknown, `energy` is out of range, or a weight is not finite.

    Example:

    >>> import keras, keras_lora
    >>> model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(32, name="hidden"), keras.layers.Dense(2)])
    >>> [row] = keras_lora.plots.measure_adapters(keras_lora.apply_lora(model, rank=4))
    >>> row.layer, row.rank, row.effective_rank  # a new adapter changes nothing
    ('hidden', 4, 0.0)

    Reference:
        Roy and Vetterli, "The effective rank", EUSIPCO 2007
    """
    energy = checks.share("energy", energy)
    return [_measured(each, energy) for each in changes_of(model, names, "measure_adapters")]


@dataclass(frozen=True)
class Change:
    """An adapter of one kernel, with factors of its ΔW."""

    layer: str
    name: str
    adapter: adapters.Adapter
    kernel_norm: float
    pair: Factors

    def spectrum(self) -> tuple[np.ndarray, np.ndarray]:
        """The singular values of ΔW, `(*groups, k)`, and the directions of the input, `(*groups, in_dim, k)`."""
        return factors.input_directions(self.pair)


def changes_of(model: Any, names: str | Iterable[str] | None, function: str) -> Iterable[Change]:
    """Each adapter of each kernel, in the order of the layers; several of one kernel in the order of their names."""
    require_adapted(model, function)
    chosen = chosen_names(model, names)
    places = walk(model)
    order = {id(place.layer): (number, place.path) for number, place in enumerate(places)}
    found = []
    for name in chosen:
        for linear, adapter in named_adapters(model)[name].values():
            number, path = order[id(linear.layer)]
            found.append((number, address_of(path, linear), name, linear, adapter))
    parts = {layer: place for place, layer in enumerate(dict.fromkeys(each[1] for each in found))}
    for _, layer, name, linear, adapter in sorted(found, key=lambda each: (each[0], parts[each[1]])):
        try:
            kernel = _finite(_numpy(linear.matrix))
            yield Change(layer, name, adapter, float(np.linalg.norm(kernel)), _factors(linear, adapter, kernel))
        except ValueError as error:
            raise ValueError(f"The adapter '{name}' at '{layer}' cannot be measured: {error}") from error


def chosen_names(model: Any, names: str | Iterable[str] | None) -> list[str]:
    """The names of adapters that an argument chooses: all of them if it is `None`."""
    if names is None:
        return list(named_adapters(model))
    chosen = list(dict.fromkeys([names] if isinstance(names, str) else names))
    if not chosen:
        raise ValueError("`names` must name at least one adapter. Received: none.")
    check_names(model, chosen)
    return chosen


def effective_rank(singular_values: np.ndarray) -> float:
    """Return `exp(-Σ p log p)` of the singular values divided by their sum, or 0 if all are 0."""
    above = singular_values[singular_values > 0]
    if not above.size:
        return 0.0
    shares = above / above.sum()
    return float(np.exp(-np.sum(shares * np.log(shares))))


def _measured(change: Change, energy: float) -> AdapterMeasure:
    s, _ = change.spectrum()
    one = np.sqrt(np.mean(s.reshape(-1, s.shape[-1]) ** 2, axis=0))
    strength = adapters.strength_of(change.adapter)
    size = abs(strength) * float(np.linalg.norm(s))
    return AdapterMeasure(
        layer=change.layer,
        name=change.name,
        method=type(change.adapter).__name__,
        rank=getattr(change.adapter, "rank", None),
        strength=strength,
        singular_values=tuple(float(each) for each in one),
        effective_rank=effective_rank(one),
        compressed_rank=factors.rank_for(s, energy),
        relative_change=size / change.kernel_norm if change.kernel_norm else (math.inf if size else 0.0),
    )


def _factors(linear: LinearMap, adapter: adapters.Adapter, kernel: np.ndarray) -> Factors:
    """Factors of ΔW: those of the method, or of the singular value decomposition of ΔW."""
    found = adapter.numpy_factors()
    if found is not None:
        a, b = found
        return _finite(a), _finite(b)
    delta = _finite(_numpy(adapter.delta_kernel(linear.matrix)))
    u, s, v = np.linalg.svd(delta, full_matrices=False)
    noise = _ROUNDING * np.linalg.norm(kernel, axis=(-2, -1))
    s = np.where(s > noise[..., None], s, 0.0)
    return u * s[..., None, :], v


def _finite(array: np.ndarray) -> np.ndarray:
    if not np.isfinite(array).all():
        raise ValueError(f"Expected finite numbers. Received: {np.count_nonzero(~np.isfinite(array))} that are not.")
    return array


def _numpy(tensor: Any) -> np.ndarray:
    return np.asarray(backend.to_numpy(keras.ops.cast(tensor, "float32")), "float64")
