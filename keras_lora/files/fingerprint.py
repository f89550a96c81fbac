"""Fingerprints of a base: they identify the model that an adapter file was made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import keras
import numpy as np

from keras_lora import adapters, backend
from keras_lora.compat import keras_internals, quantization
from keras_lora.compat.stored_kernel import float_shapes
from keras_lora.linear_map import LinearMap
from keras_lora.swap.adapted import maps_of
from keras_lora.swap.addresses import walk


def structure(model: keras.layers.Layer) -> str:
    """The fingerprint of the base's addresses, classes and shapes: equal on every backend, in every process and dtype."""
    rows, inside = [], set()
    for place in walk(model):
        if isinstance(place.layer, adapters.Adapter) or id(place.holder) in inside:
            inside.add(id(place.layer))
        else:
            rows.append([place.address, type(place.layer).__name__, _shapes(place.layer)])
    return hashlib.sha256(json.dumps(sorted(rows), separators=(",", ":")).encode()).hexdigest()


def _shapes(layer: keras.layers.Layer) -> list[list[int]]:
    variables = keras_internals.own_variables(layer)
    if quantization.mode_of(layer) is None:
        return sorted(list(shape) for shape in float_shapes(layer))
    kernels = {linear.kernel_name: list(linear.kernel_shape) for linear in maps_of(layer)}
    floats = [
        v
        for v in variables
        if v.name not in kernels and not v.name.endswith(("_scale", "_zero", "g_idx", "zero_point", "awq_scales"))
    ]
    return sorted([*kernels.values(), *(list(v.shape) for v in floats)])


def weights(kernels: Mapping[str, LinearMap], trained: Iterable[Any] = ()) -> str:
    """The fingerprint of the stored kernels, except those that were trained. One kernel is read at a time."""
    found, left_out = hashlib.sha256(), {id(v) for v in trained}
    for address in sorted(kernels):
        stored = kernels[address].kernel_variable
        if id(stored) not in left_out:
            array = to_numpy(stored)
            said = [address, keras.backend.standardize_dtype(stored.dtype), list(array.shape)]
            found.update(json.dumps(said, separators=(",", ":")).encode())
            found.update(array.astype(array.dtype.newbyteorder("<"), copy=False).data)
    return found.hexdigest()


def to_numpy(variable: Any) -> np.ndarray:
    """A variable or tensor as a file stores it."""
    array = np.ascontiguousarray(backend.to_numpy(variable))
    return array.astype("float32") if array.dtype.name == "bfloat16" else array  # NumPy has no bfloat16; this is exact
