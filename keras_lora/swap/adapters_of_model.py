"""The adapters of a model by name: their strengths, the names in use, and names for new adapters."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

from keras_lora import adapters
from keras_lora.swap import beside, slots
from keras_lora.swap.adapted import maps_of, named_adapters
from keras_lora.swap.addresses import walk
from keras_lora.swap.other_models import layers_of


@contextlib.contextmanager
def changing_strengths(model: Any) -> Iterator[None]:
    """Change strengths inside this context: the base variables that train with the adapters follow them."""
    beside.store(model)
    yield
    show_beside(model)


def show_beside(model: Any) -> None:
    """Write the values for the current strengths into the base variables that train with the adapters."""
    for layer in beside.show(model):
        for linear in maps_of(layer):  # another adapter may have computed something from a kernel among them
            for adapter in slots.adapters_of(linear):
                adapter.base_changed(linear)


#: The model in which each adapter was added, as long as both live.
_MODELS: weakref.WeakKeyDictionary[adapters.Adapter, weakref.ref[Any]] = weakref.WeakKeyDictionary()


def added_in(model: Any, new: Iterable[adapters.Adapter]) -> None:
    """Remember that adapters were added to `model`, for models that share its layers."""
    for adapter in new:
        _MODELS[adapter] = weakref.ref(model)


def refuse_shared(model: Any) -> None:
    """Raise an error if `model` shares adapted layers with another model, and each also has layers that the other lacks.

    If one has all layers of the other, it is a model around it or a part of it, and both are adapted together.
    """
    inside = layers_of(model)
    shared: dict[int, tuple[Any, list[str]]] = {}
    for place in walk(model):
        other = _MODELS[place.layer]() if place.layer in _MODELS else None
        if other is not None and other is not model:
            shared.setdefault(id(other), (other, []))[1].append(place.path.rpartition("/")[0])
    for other, paths in shared.values():
        if (others := layers_of(other)) <= inside or inside <= others:
            continue
        raise ValueError(
            f"'{model.name}' shares layers with '{other.name}', which is adapted: {', '.join(paths[:5])}. Another adapter "
            f"would switch off those of '{other.name}', and removing one would change both models. Expected layers that no "
            "other model has. Adapt one model that contains both, or make a copy with separate layers "
            "(`keras.models.clone_model`, then `set_weights`)."
        )


def new_name(model: Any, name: str | None) -> str:
    """Return the name for an adapter to be added to `model`, or raise an error if the name cannot be used."""
    refuse_shared(model)
    taken = list(named_adapters(model))
    if name is None and taken:
        raise ValueError(
            f"'{model.name}' is adapted already. Expected a plain model, or a `name` for an adapter in addition to {taken}. "
            "Received: name=None. `keras_lora.remove_lora(model)` and `keras_lora.merge_lora(model)` make it plain."
        )
    name = adapters.Adapter.adapter_name if name is None else name
    if not isinstance(name, str) or not name:
        raise ValueError(f"`name` must be a word for the adapter. Received: name={name!r}.")
    if name in taken:
        raise ValueError(f"'{model.name}' has an adapter '{name}' already. Expected a new name. Received: name={name!r}.")
    return name


def only_name(model: Any, name: str | None) -> str:
    """Return the name of the adapter to use: `name` if given, else the only adapter."""
    names = list(named_adapters(model))
    if name is None and len(names) > 1:
        raise ValueError(f"'{model.name}' has several adapters. Expected one of {names} as `name`. Received: name=None.")
    if name is not None and name not in names:
        raise ValueError(f"'{model.name}' has no adapter '{name}'. Expected one of {names}. Received: name={name!r}.")
    return names[0] if name is None else name


def check_names(model: Any, names: Iterable[str]) -> None:
    """Raise an error unless `model` has an adapter for every name."""
    known = list(named_adapters(model))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"'{model.name}' has no adapter {unknown}. Expected some of {known}.")
