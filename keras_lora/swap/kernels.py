"""Kernels that are stored in fewer digits: in files, and when their layer has no adapter any more."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from keras_lora.compat import keras_internals, quantization
from keras_lora.linear_map import LinearMap, view_of

#: The beginning of the keys of what NF4 adds to a layer, in its part of a weights file.
_KEY = "keras_lora.nf4."
#: The beginning of the keys of a layer that Keras has quantised with data.
_CALIBRATED = "keras_lora.calibrated."
#: Added to a `base_dtype` if the layer was built with it, and so keeps it without an adapter.
FOUND = ", found"


def restore_found(maps: Iterable[LinearMap]) -> None:
    """Give kernels their original dtype again, unless their layer was built with them in fewer digits."""
    for linear in maps:
        if linear.stored is not None and not linear.stored.found:
            linear.store_kernel(None)


def describe(linear: LinearMap) -> str | None:
    """How a kernel is stored, as a word for a config, or `None` if it has its original dtype."""
    return None if linear.stored is None else f"{linear.base_dtype}{FOUND if linear.stored.found else ''}"


def store(linear: LinearMap, word: str | None) -> None:
    """Store a kernel as `describe` says."""
    linear.store_kernel(word.removesuffix(FOUND) if word else None, found=word is not None and word.endswith(FOUND))


def save_into(layer: Any, maps: Iterable[LinearMap], saved: Any) -> None:
    """Add the variables of an adapted layer to its part of a weights file."""
    if calibrated := quantization.calibrated_variables(layer):
        for name, variable in calibrated.items():
            saved[f"{_CALIBRATED}{name}"] = variable
        return
    parts = [name for linear in maps for name in linear.parts]
    hidden = {**keras_internals.without_variables(layer, parts), **quantization.as_float(layer)}
    view_of(layer, layer.base_class, **hidden).save_own_variables(saved)
    for name in parts:
        saved[f"{_KEY}{name}"] = vars(layer)[name]


def load_from(layer: Any, maps: Iterable[LinearMap], saved: dict[str, Any]) -> None:
    """Load the variables of an adapted layer. A float kernel is quantised as it comes if the layer stores it in NF4."""
    if calibrated := {name.removeprefix(_CALIBRATED): each for name, each in saved.items() if name.startswith(_CALIBRATED)}:
        _load_calibrated(layer, calibrated)
        return
    packed = [linear for linear in maps if linear.parts]
    parts = [name for linear in packed for name in linear.parts]
    found = {key.removeprefix(_KEY): each for key, each in saved.items() if key.startswith(_KEY)}
    rest = {key: each for key, each in saved.items() if not key.startswith(_KEY)}
    if set(found) == set(parts):
        _load(layer, rest, parts)
        for name, value in found.items():
            vars(layer)[name].assign(value)
        return
    if found:
        raise ValueError(
            f"The layer '{layer.name}' cannot load what this file has of it. Expected float kernels, or those that it "
            f"stores in NF4 itself, with {parts}. Received: kernels in NF4, with {sorted(found)}. Load the file into a "
            "model of `keras_lora.apply_lora(..., base_dtype='nf4')` with the same targets."
        )
    words = [(linear, describe(linear)) for linear in packed]
    for linear in packed:
        linear.store_kernel(None)
    try:
        _load(layer, rest, [])
    finally:
        for linear, word in words:
            store(linear, word)


def _load_calibrated(layer: Any, saved: dict[str, Any]) -> None:
    own = quantization.calibrated_variables(layer)
    wrong = sorted({*own} ^ {*saved})
    if wrong or (wrong := [name for name, each in saved.items() if tuple(each.shape) != tuple(own[name].shape)]):
        raise ValueError(
            f"The layer '{layer.name}' cannot load what this file has of it: it was calibrated in another mode or with "
            f"other groups. Expected {sorted(own)} in the shapes of the layer. Received: others at {wrong}. Load the whole "
            "model with `keras.saving.load_model`."
        )
    for name, each in saved.items():
        own[name].assign(each)
    quantization.set_calibrated(layer)


def _load(layer: Any, saved: dict[str, Any], parts: Iterable[str]) -> None:
    hidden = keras_internals.without_variables(layer, parts)
    view = view_of(layer, layer.base_class, **hidden)
    view.load_own_variables(saved)
    # A layer may set attributes when it is loaded.
    vars(layer).update({name: each for name, each in vars(view).items() if name not in hidden})
