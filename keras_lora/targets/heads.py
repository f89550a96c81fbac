"""Find the output head of a model by its role: it makes the model's outputs."""

from __future__ import annotations

from typing import Any

import keras

from keras_lora.compat import keras_internals
from keras_lora.swap.adapted import maps_of
from keras_lora.swap.addresses import Place, walk

DENSE = (keras.layers.Dense, keras.layers.EinsumDense)
CONVOLUTIONS = (
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
    keras.layers.Conv1DTranspose,
    keras.layers.Conv2DTranspose,
    keras.layers.Conv3DTranspose,
    keras.layers.SeparableConv1D,
    keras.layers.SeparableConv2D,
)
#: A convolution before one of these makes features of the model, not its outputs.
POOLING = (
    keras.layers.AveragePooling1D,
    keras.layers.AveragePooling2D,
    keras.layers.AveragePooling3D,
    keras.layers.MaxPooling1D,
    keras.layers.MaxPooling2D,
    keras.layers.MaxPooling3D,
)


def find_head(model: keras.layers.Layer, places: list[Place]) -> list[Place]:
    """Find the output head, which `apply_lora` leaves out by default.

    - A model with a `backbone` (a KerasHub task): every linear layer outside the backbone.
    - A model with a graph (Functional, Sequential): the search goes back from each output through layers with one input
      and no variables. The first `Dense`, `EinsumDense` or convolution is a head, also inside a wrapper such as
      `TimeDistributed`. If a normalization, a merge or a block comes first, that output has no head. A convolution before
      a pooling layer with windows is not a head: it makes features.
    - Any other model: the last of its direct sublayers with variables, if that is such a layer or ends in one.
    - A single layer has no head.
    """
    if (outside := _outside_the_backbone(model, places)) is not None:
        return [place for place in outside if maps_of(place.layer)]
    if not isinstance(model, keras.Model):
        return []
    if getattr(model, "outputs", None):
        heads = _heads_of(model)
    else:
        own = [layer for layer in keras_internals.sublayers(model) if layer.weights]
        heads = _heads_in(own[-1], DENSE + CONVOLUTIONS) if own else []
    found = {id(layer) for layer in heads}
    return [place for place in places if id(place.layer) in found]


def layers_to_train(model: keras.layers.Layer, heads: list[Place], places: list[Place]) -> list[Place]:
    """The layers that `train="head"` trains: the head, and in a KerasHub task also the norms around it."""
    outside = _outside_the_backbone(model, places) or []
    return [place for place in outside if keras_internals.own_variables(place.layer)] or heads


def looks_new(layer: keras.layers.Layer) -> bool:
    """Whether a layer has the bias of an untrained layer: zeros."""
    bias = getattr(layer, "bias", None)
    return bias is not None and not bool(keras.ops.any(bias.value))


def _outside_the_backbone(model: keras.layers.Layer, places: list[Place]) -> list[Place] | None:
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, keras.layers.Layer):
        return None
    inside = {id(place.layer) for place in walk(backbone)}
    return [place for place in places if id(place.layer) not in inside and place.layer is not model]


def _heads_of(model: Any, kinds: tuple[type, ...] = DENSE + CONVOLUTIONS) -> list[keras.layers.Layer]:
    return [layer for output in model.outputs for layer in _heads_behind(output, kinds)]


def _heads_behind(tensor: Any, kinds: tuple[type, ...]) -> list[keras.layers.Layer]:
    operation, inputs = keras_internals.producer_of(tensor)
    if getattr(operation, "weights", None):
        return _heads_in(operation, kinds)
    if len(inputs) != 1:
        return []
    return _heads_behind(inputs[0], DENSE if isinstance(operation, POOLING) else kinds)


def _heads_in(layer: Any, kinds: tuple[type, ...]) -> list[keras.layers.Layer]:
    """The heads in a layer whose outputs are those of the model: the layer itself, or what it wraps or ends in."""
    if isinstance(layer, kinds):
        return [layer]
    if isinstance(layer, keras.layers.Wrapper):
        return _heads_in(layer.layer, kinds)
    return _heads_of(layer, kinds) if isinstance(layer, keras.Model) and getattr(layer, "outputs", None) else []


def trained_head(model: keras.layers.Layer) -> list[keras.Variable]:
    """The variables that train and are those of layers that `train="head"` trains, in an adapted model."""
    places = walk(model)
    layers = [place.layer for place in layers_to_train(model, find_head(model, places), places)]
    return [v for layer in layers for v in keras_internals.own_variables(layer) if v.trainable]
