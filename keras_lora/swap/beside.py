"""Base variables that train with an adapter, such as a head or biases. Each adapter has separate values of them.

The value of a variable is `found + Σ strength · (own - found)` over the active adapters. `found` is the value before
`apply_lora`, `own` that of an adapter. So without active adapters it is `found`, bit for bit. Call `store` before strengths
change and `show` after.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np

from keras_lora import adapters, backend
from keras_lora.compat import keras_internals
from keras_lora.swap.addresses import walk

#: The attribute of a layer, and the beginning of its keys in a weights file.
_KEY = "_keras_lora_beside"
_STORED = "keras_lora.beside."


@dataclass
class Values:
    """The values of the variables of one layer that train with adapters. Not a dict, because Keras would search it.

    Attributes:
        found: The values before `apply_lora`, by key: place and name of the variable, `"0.kernel"`.
        own: The values of each adapter, by its name and by key.
        rebased: Whether a file of the base alone is being loaded into the layer.
    """

    found: dict[str, np.ndarray] = field(default_factory=dict)
    own: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    rebased: bool = False

    def shown(self, strengths: Mapping[str, float]) -> dict[str, np.ndarray]:
        """The values of the variables if the adapters have these strengths."""
        return {key: self._shown(key, strengths) for key in self.found}

    def _shown(self, key: str, strengths: Mapping[str, float]) -> np.ndarray:
        active = {name: strengths[name] for name in self._owners(key) if strengths.get(name)}
        if list(active.values()) == [1.0]:
            return self.own[next(iter(active))][key]
        found = self.found[key]
        change = sum(strength * (self.own[name][key].astype("float64") - found) for name, strength in active.items())
        return (found + change).astype(found.dtype) if active else found

    def keep(self, key: str, now: np.ndarray, strengths: Mapping[str, float]) -> None:
        """Keep the current value of a variable: what it learned belongs to the active adapters that own it."""
        if self.rebased:
            self.found[key] = now
        before = self._shown(key, strengths)
        if np.array_equal(now, before):
            return
        active = {name: strengths[name] for name in self._owners(key) if strengths.get(name)}
        if not active:
            self.found[key] = now
        elif list(active.values()) == [1.0]:
            self.own[next(iter(active))][key] = now
        else:
            share = sum(strength**2 for strength in active.values())
            for name, strength in active.items():
                change = (now.astype("float64") - before) * (strength / share)
                self.own[name][key] = (self.own[name][key] + change).astype(now.dtype)

    def _owners(self, key: str) -> list[str]:
        return [name for name, values in self.own.items() if key in values]


def variables(layer: keras.layers.Layer, trains: list[bool], statistics: bool = True) -> dict[str, keras.Variable]:
    """The layer's own variables that train, by place and name. If it trains in full, these are all, with its statistics."""
    own, in_full = keras_internals.own_variables(layer), all(trains) and statistics
    return {f"{i}.{v.name}": v for i, v in enumerate(own) if in_full or (i < len(trains) and trains[i])}


def start(layer: keras.layers.Layer, name: str, trains: list[bool], statistics: bool = True) -> None:
    """Let the adapter `name` own the variables of a layer that train. They have their found values now."""
    if not any(trains):
        return
    values = vars(layer).setdefault(_KEY, Values())
    now = {key: _array(v) for key, v in variables(layer, trains, statistics).items()}
    values.found = {**now, **values.found}
    values.own[name] = {**{key: values.found[key] for key in now}, **values.own.get(name, {})}


def start_what_trains(layer: keras.layers.Layer, name: str) -> None:
    """Let the adapter `name` own what trains in a layer because its flags were set by hand, and no adapter owns yet."""
    found = vars(layer)[_KEY].found if _KEY in vars(layer) else {}
    own = keras_internals.own_trainable_variables(layer)
    start(layer, name, [v.trainable and f"{i}.{v.name}" not in found for i, v in enumerate(own)])


def owned(model: keras.layers.Layer, name: str) -> dict[str, tuple[keras.layers.Layer, dict[str, np.ndarray]]]:
    """The layers at or below `model` whose variables an adapter owns, with its values of them, by address. Store before."""
    return {place.address: (place.layer, values.own[name]) for place, values in _kept(model) if name in values.own}


def trains(layer: keras.layers.Layer, names: Iterable[str]) -> list[bool] | None:
    """Which trainable variables of a layer these adapters own, or `None` if no adapter owns any of them."""
    values = vars(layer).get(_KEY)
    if values is None:
        return None
    keys = {key for name in names for key in values.own.get(name, {})}
    return [f"{i}.{v.name}" in keys for i, v in enumerate(keras_internals.own_trainable_variables(layer))]


def moves_statistics(layer: keras.layers.Layer, names: Iterable[str]) -> bool:
    """Whether these adapters own the statistics of a layer too, or it has none, or they own only a part of it."""
    of_layer = trains(layer, names) or [False]
    keys = {key for name in names for key in vars(layer)[_KEY].own.get(name, {})} if any(of_layer) else set()
    return not all(of_layer) or all(f"{i}.{v.name}" in keys for i, v in enumerate(keras_internals.own_variables(layer)))


def owners(layer: keras.layers.Layer) -> list[str]:
    """The adapters that own variables of a layer."""
    return list(vars(layer)[_KEY].own) if _KEY in vars(layer) else []


def strengths_in(model: keras.layers.Layer) -> dict[str, float]:
    """The strength of each adapter at or below `model`, by name."""
    strengths: dict[str, float] = {}
    for place in walk(model):
        each = place.layer
        if isinstance(each, adapters.Adapter) and not isinstance(place.holder, adapters.Adapter) and each.built:
            strengths.setdefault(each.adapter_name, 0.0 if each.off else adapters.strength_of(each))
    return strengths


def store(model: keras.layers.Layer) -> None:
    """Keep what the variables learned since `show`."""
    kept = _kept(model)
    strengths = strengths_in(model) if kept else {}
    for place, values in kept:
        for key, variable in _all_variables(place.layer, values).items():
            values.keep(key, _array(variable), strengths)
        values.rebased = False


def show(model: keras.layers.Layer, strengths: Mapping[str, float] | None = None) -> list[keras.layers.Layer]:
    """Write the values that belong to the strengths into the variables. Returns the layers that changed."""
    changed, kept = [], _kept(model)
    if strengths is None:
        strengths = strengths_in(model) if kept else {}
    for place, values in kept:
        shown = values.shown(strengths)
        of_layer = _all_variables(place.layer, values)
        different = [key for key, variable in of_layer.items() if not np.array_equal(_array(variable), shown[key])]
        for key in different:
            of_layer[key].assign(shown[key])
        changed += [place.layer] if different else []
    return changed


def loaded(model: keras.layers.Layer) -> None:
    """Update after loading a weights file, which has no strengths. Values from a file of the base alone become `found`."""
    if any(values.rebased for _, values in _kept(model)):
        store(model)
    else:
        show(model)


@contextlib.contextmanager
def base_shown(model: keras.layers.Layer) -> Iterator[None]:
    """Give the variables their found values inside this context, and their present ones afterwards. Works inside a step."""
    pairs = [
        (variable, values.found[key])
        for place, values in _kept(model)
        for key, variable in _all_variables(place.layer, values).items()
    ]
    with backend.holding(pairs):
        yield


def give(model: keras.layers.Layer, name: str, new: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Set the values that an adapter owns, by address and key. Show them afterwards."""
    for address, (_, own) in owned(model, name).items():
        own.update(new.get(address, {}))


def combine(model: keras.layers.Layer, weights: Mapping[str, float], name: str) -> None:
    """Let the adapter `name` own the weighted sum of the changes of these adapters. Store before."""
    for _, values in _kept(model):
        keys = {key for each in weights for key in values.own.get(each, {})}
        if keys:
            sums = values.shown(weights)
            values.own[name] = {key: sums[key] for key in sorted(keys)}


def forget(model: keras.layers.Layer, name: str | None = None) -> None:
    """Forget the values of one adapter, or everything. The variables stay as they are."""
    for place, values in _kept(model):
        values.own.pop(name, None) if name is not None else values.own.clear()
        if not values.own:
            del vars(place.layer)[_KEY]


def taken(model: keras.layers.Layer) -> dict[str, Values]:
    """All values by address, to put back with `put_back`."""
    return {place.address: values for place, values in _kept(model)}


def put_back(model: keras.layers.Layer, values: Mapping[str, Values]) -> None:
    """Undo `forget`: give the layers the values that were `taken`."""
    for place in walk(model):
        if place.address in values:
            vars(place.layer)[_KEY] = values[place.address]


# Into a `.keras` file and back. The config has the owners; the arrays are saved with the weights of the containing layer.


def describe(layer: keras.layers.Layer) -> dict[str, dict[str, list[bool]]]:
    """Which variables each adapter owns, by address and name, as plain data."""
    return {
        place.address: {name: trains(place.layer, [name]) or [] for name in values.own} for place, values in _kept(layer)
    }


def describe_fixed(layer: keras.layers.Layer) -> dict[str, list[str]]:
    """The adapters that own all that trains in a layer but not its statistics, by address, as plain data."""
    fixed = {
        place.address: [name for name in values.own if not moves_statistics(place.layer, [name])]
        for place, values in _kept(layer)
    }
    return {address: names for address, names in fixed.items() if names}


def save_into(container: keras.layers.Layer, saved: Any) -> None:
    """Add the values of a container and of the layers directly in it to its part of a weights file."""
    for key, holder, name in _places(container):
        holder_values: Values = vars(holder)[_KEY]
        arrays = holder_values.found if name is None else holder_values.own[name]
        for variable, array in arrays.items():
            saved[f"{key}.{variable}"] = array


def load_from(container: keras.layers.Layer, saved: Any) -> dict[str, Any]:
    """Load these values from a part of a weights file, and return the rest of that part."""
    rest = {key: saved[key] for key in saved.keys()}  # noqa: SIM118  # not a dict
    ours = [key for key in rest if key.startswith(_STORED)]
    for key, holder, name in _places(container):
        values: Values = vars(holder)[_KEY]
        values.rebased = not ours
        arrays = values.found if name is None else values.own[name]
        for variable in list(arrays):
            if (stored := rest.get(f"{key}.{variable}")) is not None:
                arrays[variable] = np.asarray(stored)
    return {key: value for key, value in rest.items() if key not in ours}


def _places(container: keras.layers.Layer) -> Iterator[tuple[str, keras.layers.Layer, str | None]]:
    """A key for the found values and one for those of each adapter, of each layer that `save_into` has to save."""
    inside = [each for each in keras_internals.sublayers(container) if not isinstance(each, adapters.Adapter)]
    for number, layer in enumerate([container, *inside]):
        for place, name in enumerate([None, *owners(layer)] if _KEY in vars(layer) else []):
            yield f"{_STORED}{number}.{place}", layer, name


def _kept(model: keras.layers.Layer) -> list[tuple[Any, Values]]:
    return [(place, vars(place.layer)[_KEY]) for place in walk(model) if _KEY in vars(place.layer)]


def _all_variables(layer: keras.layers.Layer, values: Values) -> dict[str, keras.Variable]:
    of_layer = {f"{i}.{v.name}": v for i, v in enumerate(keras_internals.own_variables(layer))}
    return {key: of_layer[key] for key in values.found}


def _array(variable: keras.Variable) -> np.ndarray:
    array = np.array(backend.to_numpy(variable))
    return array.astype("float32") if array.dtype.name == "bfloat16" else array
