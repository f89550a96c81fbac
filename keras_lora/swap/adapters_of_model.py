"""The adapters of a model by name: their strengths, which names there are, and names for new ones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from keras_lora import adapters
from keras_lora.swap import beside, slots
from keras_lora.swap.adapted import maps_of, named_adapters


@contextlib.contextmanager
def changing_strengths(model: Any) -> Iterator[None]:
    """Change strengths inside this context: the variables that train beside the adapters follow them."""
    beside.store(model)
    yield
    show_beside(model)


def show_beside(model: Any) -> None:
    """Write the values that belong to the strengths into the variables that train beside the adapters."""
    for layer in beside.show(model):
        for linear in maps_of(layer):  # a kernel may be among them, on which another adapter computed something
            for adapter in slots.adapters_of(linear):
                adapter.base_changed(linear)


def new_name(model: Any, name: str | None) -> str:
    """Return the name for an adapter to be added to `model`, or raise an error if the name cannot be used."""
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
