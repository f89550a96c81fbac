"""Rebuild objects from their configs and check that they match."""

from __future__ import annotations

import random
import re
from typing import Any

import keras

from keras_lora import adapters
from keras_lora.compat import keras_internals
from keras_lora.compat.stored_kernel import float_shapes
from keras_lora.swap.addresses import by_address


def rebuilt(config: dict[str, Any], description: dict[str, Any], custom_objects: dict[str, Any] | None) -> Any:
    """Return the plain object described by `config`."""
    whole = {**description["base"], "config": config, "build_config": description["build_config"]}
    found = keras.saving.deserialize_keras_object(whole, custom_objects=custom_objects)
    if not isinstance(found, keras.layers.Layer):
        raise ValueError(f"The base of an adapted layer in this file is not a layer: {description['base']}.")
    return found


def check_description(description: Any, expected: int) -> None:
    """Raise an error unless the description of an adapted layer in a file has every part that is read, of the right type."""

    def table(value: Any, inside: type = object) -> bool:
        return isinstance(value, dict) and all(isinstance(each, inside) for each in value.values())

    def entry(value: Any) -> bool:
        words = table(value) and all(isinstance(value.get(key), str) for key in ("address", "name", "slot"))
        fits = words and isinstance(value.get("adapter"), dict) and isinstance(value.get("strength"), (int, float))
        return fits and re.fullmatch(r"(\w+_)?adapter(_\d+)?", value["slot"]) is not None

    if (version := description.get("version") if table(description) else None) != expected:
        raise ValueError(
            f"This file of an adapted model has format version {version!r}. Expected {expected}. Load it with the "
            "keras_lora that wrote it."
        )
    fits: dict[str, Any] = {
        "base": table,
        "build_config": lambda value: value is None or table(value),
        "adapters": lambda value: isinstance(value, list) and all(map(entry, value)),
        "base_dtypes": lambda value: value is None or table(value, str),
        "quantized": lambda value: table(value, dict),
        "training": lambda value: table(value, dict),
    }
    if wrong := [key for key, check in fits.items() if not check(description.get(key))]:
        raise ValueError(
            f"The description of an adapted layer in this file has a missing or wrong {', '.join(wrong)}. "
            "Expected a file that Keras wrote of a model of keras_lora. It may be damaged."
        )


def check_rebuilds(owner: Any, config: dict[str, Any], description: dict[str, Any]) -> None:
    """Refuse to save a container that has other layers when it is rebuilt from its config, because it would load wrongly.

    Classes of Keras and KerasHub are trusted; a user's class is rebuilt once, in memory, and compared.
    """
    if owner.base_class.__module__.partition(".")[0] in ("keras", "keras_hub"):
        return
    layers = by_address(owner)
    classes = {type(layer).__name__: getattr(layer, "base_class", type(layer)) for layer in layers.values()}
    own = {name: cls for name, cls in classes.items() if cls.__module__.partition(".")[0] not in ("keras", "keras_hub")}
    state = random.getstate()  # Keras takes the seeds of new layers from it
    try:
        copy = rebuilt(config, description, own)
    except Exception as error:
        raise ValueError(
            f"'{owner.name}' cannot be saved: its class {type(owner).__name__} cannot be rebuilt from its own config "
            f"({error}). Expected a `get_config` that returns all that the constructor needs."
        ) from error
    finally:
        random.setstate(state)
    found = {address: _fingerprint(layer) for address, layer in by_address(copy).items()}
    wrong = [
        f"{address or 'itself'} ({type(layer).__name__})"
        for address, layer in layers.items()
        if address in description["training"]
        and not isinstance(layer, adapters.Adapter)
        and address not in description["quantized"]  # it is quantised again after it is rebuilt
        # A layer that Keras builds only on the first call has no variables to compare yet.
        if found.get(address) not in (_fingerprint(layer), (type(layer).__name__, None))
    ]
    if copy.built and wrong:
        raise ValueError(
            f"'{owner.name}' cannot be saved: rebuilt from its config, a {type(owner).__name__} has other layers than this "
            f"one. Expected a `get_config` that returns all that the constructor needs. Received: nothing, or other "
            f"variables, at {wrong}. Write `get_config`, or keep the adapter apart with `keras_lora.save_adapter`."
        )


def _fingerprint(layer: keras.layers.Layer) -> tuple[str, list[tuple[int, ...]] | None]:
    shapes = float_shapes(layer) if layer.built else None
    return type(layer).__name__, shapes


def check_addresses(
    owner: keras.layers.Layer, layers: dict[str, Any], maps: dict[str, Any], description: dict[str, Any]
) -> None:
    """Raise an error unless the rebuilt `owner` has the layers and variables that `description` needs."""
    missing = [address for address in description["quantized"] if address not in layers]
    missing += [entry["address"] for entry in description["adapters"] if entry["address"] not in maps]
    if missing:
        raise ValueError(
            f"'{owner.name}' cannot be restored as it was saved: rebuilt from its config, it has nothing to adapt at "
            f"{sorted(missing)}. Expected a class whose `get_config` returns all that its constructor needs, and "
            "`keras_lora.register_layer` before loading if a layer was registered before saving. Received: class "
            f"{type(owner).__name__}, with layers at {sorted(layers)}."
        )
    changed = [
        f"{address or 'itself'} ({type(layers[address]).__name__})"
        for address, mark in description["training"].items()
        if address in layers
        and address not in description["quantized"]  # these get their variables when they are quantised again
        and layers[address].built
        and not isinstance(layers[address], adapters.Adapter)
        and len(keras_internals.own_trainable_variables(layers[address])) != len(mark["plan"][1])
    ]
    if changed:
        raise ValueError(
            f"'{owner.name}' cannot be restored as it was saved: rebuilt from its config, it has other variables at "
            f"{changed}. "
            f"Expected a `get_config` that returns all that the constructor needs. Received: a {type(owner).__name__} that "
            "does not; a plain model of it would not load either. Keep the adapter apart with `keras_lora.save_adapter`."
        )
