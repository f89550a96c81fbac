"""A port: one variable of a model, and the tensor of a checkpoint that fills it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras

from keras_lora.adapted import maps_of


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


def shape_of(layer: keras.layers.Layer, attribute: str) -> tuple[int, ...]:
    """The shape of a layer's variable; of a packed kernel, that of the kernel."""
    for linear in maps_of(layer):
        if linear.kernel_name == attribute:
            return linear.kernel_shape
    return tuple(operator.attrgetter(attribute)(layer).shape)
