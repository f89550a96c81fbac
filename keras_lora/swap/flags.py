"""What trains: the base is frozen, and stays so.

Keras keeps two flags, one on each layer and one on each variable, and `model.trainable = True` sets all of them. Keras
also forgets the flags of variables when it saves. So every layer of an adapted model carries a mark with its flags as they
were found and as `apply_lora` planned them: removing restores the first, switching a model on restores the second, and
both are saved.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import keras

from keras_lora.compat import keras_internals
from keras_lora.swap.addresses import Place, walk

BIAS_OPTIONS = ("none", "all", "lora_only")
#: The attribute that holds a mark: the flags as found and as planned.
MARK = "_keras_lora_training"


class Flags(NamedTuple):
    """What trains of one layer.

    Attributes:
        layer: The layer's own flag.
        variables: One for each of its own variables that was created trainable.
    """

    layer: bool
    variables: list[bool]


def flags_of(layer: keras.layers.Layer) -> Flags:
    """The flags of `layer` now."""
    return Flags(layer.trainable, [v.trainable for v in keras_internals.own_trainable_variables(layer)])


def set_flags(layer: keras.layers.Layer, flags: Flags) -> None:
    """Set the flags of one layer, and of nothing below it."""
    keras_internals.set_own_trainable(layer, flags.layer)
    for variable, trainable in zip(keras_internals.own_trainable_variables(layer), flags.variables, strict=True):
        variable.trainable = trainable


def freeze(
    places: Iterable[Place],
    adapted: Iterable[keras.layers.Layer],
    trained: Iterable[keras.layers.Layer],
    bias: str = "none",
    stopped: Iterable[keras.layers.Layer] = (),
) -> None:
    """Freeze every layer at `places`, but for the layers in `trained`, and the biases that the option `bias` names.

    What was planned to train before still does, but for the layers in `stopped`.
    Layers without weights are left as they are. A frozen layer that holds no other has `trainable = False`, which is
    what keeps the moving statistics of BatchNormalization still; one that holds others has only its own variables frozen.
    """
    adapted_ids, trained_ids, stopped_ids = ({id(layer) for layer in each} for each in (adapted, trained, stopped))
    for place in places:
        layer = place.layer
        if not layer.weights:
            continue
        own, before = keras_internals.own_trainable_variables(layer), vars(layer).get(MARK)
        in_full = id(layer) in trained_ids
        with_bias = bias == "all" or (bias == "lora_only" and id(layer) in adapted_ids)
        stays = [False] * len(own) if before is None or id(layer) in stopped_ids else before["plan"].variables
        variables = [in_full or was or (with_bias and v.name == "bias") for v, was in zip(own, stays, strict=True)]
        plan = Flags(in_full or any(variables) or bool(keras_internals.sublayers(layer)), variables)
        # What was planned before and has been switched off since stays off.
        now = [v.trainable or not was for v, was in zip(own, stays, strict=True)]
        now = [planned and (in_full or on) for planned, on in zip(variables, now, strict=True)]
        mark(layer, flags_of(layer) if before is None else before["found"], plan, Flags(plan.layer, now))


def mark(layer: keras.layers.Layer, found: Flags, plan: Flags, now: Flags | None = None) -> None:
    """Put a mark on one layer, and set its flags to `now`, or to the plan. Each may be a pair from a file."""
    vars(layer)[MARK] = {"found": Flags(*found), "plan": Flags(*plan)}
    set_flags(layer, Flags(*(plan if now is None else now)))


def plan_again(layer: keras.layers.Layer, trains: bool | None) -> None:
    """Plan all own variables of a marked layer to train or not; `None` keeps their plan and sets the layer's flag by it."""
    if MARK in vars(layer):
        before = vars(layer)[MARK]
        variables = before["plan"].variables if trains is None else [trains] * len(before["plan"].variables)
        mark(layer, before["found"], Flags(any(variables) or bool(keras_internals.sublayers(layer)), variables))


def follow_plan(layer: keras.layers.Layer) -> None:
    """Set every layer at or below `layer` to the flags that `apply_lora` gave it."""
    for place in walk(layer):
        if MARK in vars(place.layer):
            set_flags(place.layer, vars(place.layer)[MARK]["plan"])


def restore_found(layer: keras.layers.Layer) -> None:
    """Set every layer at or below `layer` to the flags it had before `apply_lora`, and take the marks off."""
    for place in walk(layer):
        if MARK in vars(place.layer):
            set_flags(place.layer, vars(place.layer).pop(MARK)["found"])


def marks_of(layer: keras.layers.Layer) -> dict[str, dict[str, Any]]:
    """The marks of every layer at or below `layer`, by address, as lists that a config can hold: arguments for `mark`."""
    marks = {}
    for place in walk(layer):
        if MARK in vars(place.layer):
            mark, now = vars(place.layer)[MARK], flags_of(place.layer)
            said = mark if now == mark["plan"] else {**mark, "now": now}
            marks[place.address] = {key: list(each) for key, each in said.items()}
    return marks


def planned_variables(layer: keras.layers.Layer) -> list[keras.Variable]:
    """The own variables of `layer` that `apply_lora` planned to train."""
    own = keras_internals.own_trainable_variables(layer)
    plan = vars(layer)[MARK]["plan"].variables if MARK in vars(layer) else [False] * len(own)
    return [v for v, planned in zip(own, plan, strict=True) if planned]


def trained_variables(layer: keras.layers.Layer) -> list[keras.Variable]:
    """The own variables of `layer` that train now, or would if the model were switched on."""
    planned = {id(v) for v in planned_variables(layer)}
    return [v for v in keras_internals.own_trainable_variables(layer) if v.trainable or id(v) in planned]
