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
    """One variable, and what fills it.

    Attributes:
        layer: The layer that has it.
        attribute: Its attribute there, `"kernel"` say.
        key: The tensor of the checkpoint, `"model.layers.0.self_attn.q_proj.weight"` say.
        hook: From that tensor and the shape of the variable to the value; `None` where they are the same.
    """

    layer: keras.layers.Layer
    attribute: str
    key: str
    hook: Callable[[Any, list[int]], Any] | None

    @property
    def meaning(self) -> Any:
        """What tells hooks apart: two that are equal here turn tensors into values in the same way."""
        return _meaning(self.hook)


def as_it_is_now(function: Any) -> Any:
    """`function` with the values that it refers to now: a converter's loop goes on, and its hooks are called later."""
    if not isinstance(function, types.FunctionType) or not function.__closure__:
        return function
    cells = tuple(types.CellType(as_it_is_now(cell.cell_contents)) for cell in function.__closure__)
    return types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)


def _meaning(value: Any) -> Any:
    if isinstance(value, types.FunctionType):
        inner = [cell.cell_contents for cell in value.__closure__ or ()]
        return (value.__code__, *map(_meaning, (*inner, *(value.__defaults__ or ()))))
    return (type(value), value) if isinstance(value, (int, str, float, type(None))) else id(value)


def shape_of(layer: keras.layers.Layer, attribute: str) -> tuple[int, ...]:
    """The shape of a layer's variable; of a packed kernel, that of the kernel."""
    for linear in maps_of(layer):
        if linear.kernel_name == attribute:
            return linear.kernel_shape
    return tuple(operator.attrgetter(attribute)(layer).shape)
