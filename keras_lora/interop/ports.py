"""A port: one variable of a model, and the tensor of a checkpoint that fills it."""

from __future__ import annotations

import operator
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras

from keras_lora.swap.adapted import maps_of


@dataclass(frozen=True)
class Port:
    """One variable, and the tensor that fills it.

    Attributes:
        layer: The layer with the variable.
        attribute: The attribute of the layer, for example `"kernel"`.
        key: The name of the checkpoint tensor, for example `"model.layers.0.self_attn.q_proj.weight"`.
        hook: A function from that tensor and the shape of the variable to the value; `None` if they are the same.
    """

    layer: keras.layers.Layer
    attribute: str
    key: str
    hook: Callable[[Any, list[int]], Any] | None

    @property
    def meaning(self) -> Any:
        """A key for the hook: hooks with equal keys convert tensors in the same way."""
        return _meaning(self.hook)


def as_it_is_now(function: Any) -> Any:
    """Bind `function` to the current values of its closure, because a converter's loop changes them before hooks run."""
    if not isinstance(function, types.FunctionType) or not function.__closure__:
        return function
    cells = tuple(types.CellType(as_it_is_now(cell.cell_contents)) for cell in function.__closure__)
    return types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)


def _meaning(value: Any) -> Any:
    if isinstance(value, types.FunctionType):
        inner = [cell.cell_contents for cell in value.__closure__ or ()]
        return (value.__code__, *map(_meaning, (*inner, *(value.__defaults__ or ()))))
    return (type(value), value) if isinstance(value, (int, str, float, type(None))) else id(value)


def attribute_of(layer: keras.layers.Layer, variable: keras.Variable) -> str:
    """Return the attribute of a layer that is one of its own variables."""
    kernels = (each.kernel_name for each in maps_of(layer) if each.kernel_variable is variable)
    names = (name for name, value in vars(layer).items() if value is variable)
    return next(kernels, None) or next(names, variable.name)


def shape_of(layer: keras.layers.Layer, attribute: str) -> tuple[int, ...]:
    """Return the shape of a layer's variable; for a packed kernel, the unpacked shape."""
    for linear in maps_of(layer):
        if linear.kernel_name == attribute:
            return linear.kernel_shape
    return tuple(operator.attrgetter(attribute)(layer).shape)
