"""Describe why an adapter as plain data does not fit a model, and raise one error that lists all reasons."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from keras_lora import adapters, checks
from keras_lora.adapters import Adapter
from keras_lora.compat import keras_internals
from keras_lora.files import fingerprint
from keras_lora.linear_map import LinearMap

if TYPE_CHECKING:
    from keras_lora.files.adapter_state import AdapterEntry, TrainedEntry


def of_layer(address: str, layer: Any, in_file: str) -> list[str]:
    """Problems if there is no layer at an address, or if its class is not the one in the file."""
    if layer is None:
        return [f"the model has no layer at '{address}'; the file has a {in_file} there"]
    if type(layer).__name__ != in_file:
        return [f"the layer at '{address}' is a {type(layer).__name__}; in the file it is a {in_file}"]
    return []


def of_variables(address: str, layer: Any, entry: TrainedEntry) -> list[str]:
    """Problems if a layer's variables are not those in the file."""
    shapes = [list(v.shape) for v in keras_internals.own_variables(layer)]
    if shapes != entry.shapes:
        return [f"the variables of '{address}' have shapes {shapes}; in the file they have {entry.shapes}"]
    if len(keras_internals.own_trainable_variables(layer)) != len(entry.flags.variables):
        return [f"the file has trainable flags for {len(entry.flags.variables)} variables of '{address}'"]
    return []


def of_adapter(
    address: str, linear: LinearMap, own: Adapter | None, entry: AdapterEntry, made: Callable[[AdapterEntry], Adapter]
) -> list[str]:
    """Problems if a kernel cannot have the file's adapter, or if the adapter `own` cannot take its values."""
    if not linear.layer.built:
        return [f"the layer at '{address}' is not built"]
    if (shape := list(linear.kernel_shape)) != entry.kernel_shape:
        return [f"the kernel at '{address}' has shape {shape}; in the file it has {entry.kernel_shape}"]
    if entry.method not in adapters.TABLE:
        return [f"the adapter at '{address}' has the method '{entry.method}'; known are {sorted(adapters.TABLE)}"]
    try:
        in_file = made(entry)  # with arguments that are newer than the file
    except (TypeError, ValueError, ArithmeticError) as error:
        return [f"the adapter at '{address}' cannot be made: {error}"]
    if own is None:
        problem = in_file.problem_with(linear)
        return [] if problem is None else [f"the adapter at '{address}' cannot be made: {problem}"]
    misfit = own.misfit_with(in_file)
    return [] if misfit is None else [f"the adapter at '{address}' cannot take that of the file: {misfit}"]


def of_tensors(tensors: dict[str, np.ndarray], variables: dict[str, keras.Variable]) -> list[str]:
    """Problems unless each variable has a tensor and each tensor a variable, of the same shape and kind."""
    problems = [f"the file lacks the tensor '{key}'" for key in sorted(variables.keys() - tensors.keys())]
    problems += [f"the file has a tensor '{key}' that fits nothing" for key in sorted(tensors.keys() - variables.keys())]
    for key in sorted(variables.keys() & tensors.keys()):
        if tuple(variables[key].shape) != tensors[key].shape:
            expected = tuple(variables[key].shape)
            problems.append(f"the tensor '{key}' has shape {tensors[key].shape}; expected is {expected}")
        dtype = keras.backend.standardize_dtype(variables[key].dtype)
        if (tensors[key].dtype.kind == "f") != keras.backend.is_float_dtype(dtype):
            problems.append(f"the tensor '{key}' is of {tensors[key].dtype}; expected is {dtype}")
    return problems


def raise_problems(
    source: str,
    model: Any,
    problems: list[str],
    base_structure: str | None = None,
    do: str = "Load it into the base model it was trained on, plain or adapted in the same way.",
) -> None:
    """If there are problems, raise an error that lists them and advises what to `do`."""
    if problems:
        listed = checks.bullets(problems)
        same = base_structure is None or base_structure == fingerprint.structure(model)
        other = "" if same else "The file was made from a base of another structure. "
        raise ValueError(f"{source} does not fit '{model.name}', and nothing was changed:{listed}\n{other}{do}")
