"""Where the layers of a model are: an address that is the same in every process, and a readable path of names."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import keras

from keras_lora.compat import keras_internals


@dataclass(frozen=True)
class Place:
    """One layer of a model.

    Attributes:
        layer: The layer.
        address: Attributes and indices that lead to it, such as `"transformer_layers/0/_self_attention_layer/_query_dense"`.
            It depends only on the model's code, so files use it. The model has the address `""`.
        path: Names that lead to it, such as `"transformer_layer_0/self_attention_layer/query"`, for people and patterns.
            Keras numbers unnamed layers across the whole process, so names are not stable.
        holder: The layer that contains it, or `None` for the model.
    """

    layer: keras.layers.Layer
    address: str
    path: str
    holder: keras.layers.Layer | None

    @property
    def key(self) -> tuple[int, str]:
        """A key that identifies this place."""
        return (id(self.layer), "")


#: The results of walks inside `walking_once`, by the id of the model.
_WALKED: contextvars.ContextVar[dict[int, list[Place]] | None] = contextvars.ContextVar("walked", default=None)


@contextlib.contextmanager
def walking_once() -> Iterator[None]:
    """Reuse the walk of each model inside this context, until `forget_walks`. For one operation on one model."""
    token = _WALKED.set({}) if _WALKED.get() is None else None
    try:
        yield
    finally:
        if token is not None:
            _WALKED.reset(token)


def forget_walks() -> None:
    """Discard the stored walks, after layers were added or removed."""
    if (walked := _WALKED.get()) is not None:
        walked.clear()


def walk(model: keras.layers.Layer) -> list[Place]:
    """Return every layer of `model` once, the model first, in Keras's order. A shared layer has its first place."""
    walked = _WALKED.get()
    if walked is None:
        return _walked(model)
    if id(model) not in walked:
        walked[id(model)] = _walked(model)
    return walked[id(model)]


def _walked(model: keras.layers.Layer) -> list[Place]:
    places: list[Place] = []
    seen: set[int] = set()

    def visit(place: Place) -> None:
        if id(place.layer) in seen:
            return
        seen.add(id(place.layer))
        places.append(place)
        for address, child in _children(place.layer):
            path = child.name if place.holder is None else f"{place.path}/{child.name}"
            visit(Place(child, f"{place.address}/{address}".lstrip("/"), path, place.layer))

    visit(Place(model, "", model.name, None))
    return places


def by_address(model: keras.layers.Layer) -> dict[str, keras.layers.Layer]:
    """Return the layers of `model` by address."""
    return {place.address: place.layer for place in walk(model)}


def _children(layer: keras.layers.Layer) -> Iterator[tuple[str, keras.layers.Layer]]:
    # If Keras tracks attributes set by KerasHub, they come before the layers of the graph, so addresses agree everywhere.
    untracked = (child for _, child in _layers_in(keras_internals.set_past_tracking(layer), ""))
    children = list({id(child): child for child in (*untracked, *keras_internals.sublayers(layer))}.values())
    children = [child for child in children if not isinstance(child, keras.layers.InputLayer)]
    if not children:
        return
    tracked = {id(child) for child in children}
    named: dict[int, str] = {}
    attributes = keras_internals.attributes_of(layer)
    for name in sorted(attributes):
        if name not in _attributes_of_keras() and not keras_internals.is_bookkeeping(name):
            for address, child in _layers_in(attributes[name], name):
                if id(child) in tracked:
                    named.setdefault(id(child), address)
    rest = "layers" if isinstance(layer, keras.Model) else "sublayers"  # a model cannot have an attribute `layers`
    for index, child in enumerate(children):
        yield named.get(id(child), f"{rest}/{index}"), child


def _layers_in(value: Any, address: str) -> Iterator[tuple[str, keras.layers.Layer]]:
    if isinstance(value, keras.layers.Layer):
        yield address, value
    elif isinstance(value, dict):
        for key in value:
            yield from _layers_in(value[key], f"{address}/{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _layers_in(item, f"{address}/{index}")


@functools.cache
def _attributes_of_keras() -> frozenset[str]:
    """Return the attributes that every layer or model has, including Keras's lists of layers."""
    tensor = keras.Input((1,), name="input")
    plain = [
        keras.layers.Layer(name="layer"),
        keras.Sequential([keras.Input((1,), name="input")], name="sequential"),
        keras.Model(tensor, keras.layers.Identity(name="identity")(tensor), name="functional"),
    ]
    return frozenset(name for each in plain for name in vars(each))
