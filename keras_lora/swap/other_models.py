"""Other models that have layers of a model: a layer is one object, so what changes in one model changes in all."""

from __future__ import annotations

import gc
from typing import Any

import keras

from keras_lora import adapters, checks
from keras_lora.compat import keras_internals
from keras_lora.swap.addresses import walk


def sharing(model: Any) -> list[Any]:
    """Return the living models that have layers of `model`, neither inside it nor the model itself.

    Only models whose graph has these layers are found, because looking through all objects takes 0.1 seconds.
    """
    if not keras_internals.is_in_other_graphs(model):
        return []
    own, inside = layers_of(model), {id(place.layer) for place in walk(model)}
    return [each for each in _living_models() if id(each) not in inside and own & layers_of(each)]


def layers_of(model: Any) -> set[int]:
    """The layers at or below `model` that have direct variables, without adapters."""
    found, rest, seen = set(), [model], set()
    while rest:  # `walk` would keep the models alive that it walked
        layer = rest.pop()
        if id(layer) not in seen and not isinstance(layer, adapters.Adapter):
            seen.add(id(layer))
            rest += keras_internals.sublayers(layer)
            if keras_internals.own_variables(layer):
                found.add(id(layer))
    return found


def warn_of_shared(model: Any) -> None:
    """Warn of models that have some layers of `model`, if each also has layers that the other lacks.

    If one has all layers of the other, it is a model around it or a part of it.
    """
    own = layers_of(model)
    if not _siblings(model, own):
        return
    gc.collect()  # a deleted model lives on until then
    for other, common in _siblings(model, own):
        shared = [place.path for place in walk(model) if id(place.layer) in common]
        checks.warn(
            f"'{other.name}' has {len(shared)} of the layers of '{model.name}' too: {', '.join(shared[:5])}"
            f"{', …' * (len(shared) > 5)}. They will be frozen and adapted in both models, and training, merging and "
            f"removing the adapters will change both. If '{other.name}' must stay as it is, make a copy of it first "
            "(`keras.models.clone_model`, then `set_weights`)."
        )


def _siblings(model: Any, own: set[int]) -> list[tuple[Any, set[int]]]:
    """The models that share some layers with `model`, not all of either, each with these layers."""
    pairs = ((each, layers_of(each)) for each in sharing(model))
    return [(each, own & theirs) for each, theirs in pairs if not (own <= theirs or theirs <= own)]


def _living_models() -> list[Any]:
    classes, found = {keras.Model}, [keras.Model]
    while found:
        new = [each for each in type.__subclasses__(found.pop()) if each not in classes]
        classes.update(new)
        found += new
    models = [each for each in gc.get_objects() if type(each) in classes and hasattr(each, "layers")]
    hidden = {id(keras_internals.graph_of(each)) for each in models}
    return [each for each in models if id(each) not in hidden]
