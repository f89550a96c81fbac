"""Small measures the tests share."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import keras
import numpy as np
import pytest
import safetensors

#: For tests of what runs no code of a backend: files, the network, the terminal. Torch makes models the fastest.
once = pytest.mark.once


def covering(names: Iterable[Any], kept: Iterable[Any], *marks: Any, quick: Iterable[Any] = ()) -> list[Any]:
    """Parameters of a test: those in `kept` run always, the others on torch, and elsewhere in `make test-all`.

    Args:
        names: All parameters.
        kept: Those that cover what differs between backends.
        marks: Further marks of the others.
        quick: Those of the others without the further marks.
    """
    kept, quick = list(kept), list(quick)
    assert all(each in names for each in kept + quick), kept + quick

    def marks_of(each: Any) -> Any:
        if each in kept:
            return pytest.mark.every_backend
        return [pytest.mark.torch_first, *(() if each in quick else marks)]

    return [pytest.param(each, marks=marks_of(each)) for each in names]


def value(tensor: Any) -> np.ndarray:
    """A tensor or variable as float64, or as it is where it is not a float."""
    array = keras.ops.convert_to_numpy(getattr(tensor, "value", tensor))
    return array.astype("float64") if array.dtype.kind == "f" or array.dtype.name == "bfloat16" else array


def values(variables: Any) -> dict[str, np.ndarray]:
    """The values of variables by path."""
    return {v.path: value(v).copy() for v in variables}


def outputs(model: Any, x: Any) -> list[np.ndarray]:
    """What `predict` gives, as a list of float64 arrays."""
    return [np.asarray(y, "float64") for y in keras.tree.flatten(model.predict(x, verbose=0))]


def difference(left: Any, right: Any) -> float:
    """The largest absolute difference of two lists of arrays, relative to the largest number where that exceeds one."""
    left, right = keras.tree.flatten(left), keras.tree.flatten(right)
    assert len(left) == len(right)
    scale = max(1.0, *(float(np.abs(each).max()) for each in right))
    return float(np.max([np.abs(a - b).max() for a, b in zip(left, right, strict=True)])) / scale


def perturb(layer_or_model: Any, size: float = 0.1, seed: int = 11) -> None:
    """Move every trainable variable, so that no adapter is at its start."""
    rng = np.random.default_rng(seed)
    for variable in layer_or_model.trainable_variables:
        moved = value(variable) + size * rng.normal(size=tuple(variable.shape))
        variable.assign(moved.astype("float32"))


def gradients(loss: Any, variables: list[Any]) -> list[np.ndarray]:
    """The backend's own gradients of the scalar `loss()` with respect to Keras variables."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        def of(values: list[Any]) -> Any:
            with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
                return loss()

        return [value(each) for each in jax.grad(of)([v.value for v in variables])]
    if backend == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            scalar = loss()
        return [value(each) for each in tape.gradient(scalar, [v.value for v in variables])]
    import torch

    return [value(each) for each in torch.autograd.grad(loss(), [v.value for v in variables])]


def header_of(path: Any) -> dict[str, Any]:
    """The header of an adapter file, unchecked."""
    with safetensors.safe_open(path, framework="numpy") as file:
        return json.loads(file.metadata()["keras_lora"])
