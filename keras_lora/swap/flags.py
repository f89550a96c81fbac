"""Trainable flags: freeze the base and keep it frozen.

Keras has a flag on every layer and on every variable, and `model.trainable = True` sets all of them. Keras also does not
save the flags of variables. So every layer of an adapted model has a mark with two sets of flags: those before `apply_lora`
and those that `apply_lora` planned. Removing adapters restores the first, setting `model.trainable = True` restores the
second, and both are saved.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import keras

from keras_lora.compat import keras_internals
from keras_lora.swap.addresses import Place, walk

BIAS_OPTIONS = ("none", "all", "lora_only")
#: The attribute for a mark: the flags before `apply_lora` and the planned flags.
MARK = "_keras_lora_training"


class Flags(NamedTuple):
    """The trainable flags of one layer.

    Attributes:
        layer: The flag of the layer.
        variables: One flag for each variable of the layer itself that was created trainable.
    """

    layer: bool
    variables: list[bool]


def flags_of(layer: keras.layers.Layer) -> Flags:
    """Return the current flags of `layer`."""
    return Flags(layer.trainable, [v.trainable for v in keras_internals.own_trainable_variables(layer)])


def set_flags(layer: keras.layers.Layer, flags: Flags) -> None:
    """Set the flags of one layer, but not of its sublayers. The codes of a kernel never train."""
    keras_internals.set_own_trainable(layer, flags.layer)
    for variable, trainable in zip(keras_internals.own_trainable_variables(layer), flags.variables, strict=True):
        variable.trainable = trainable and keras.backend.is_float_dtype(variable.dtype)


def freeze(
    places: Iterable[Place],
    adapted: Iterable[keras.layers.Layer],
    trained: Iterable[keras.layers.Layer],
    norms: Iterable[keras.layers.Layer] = (),
    bias: str = "none",
    stopped: Iterable[keras.layers.Layer] = (),
) -> None:
    """Freeze every layer at `places`, except the layers in `trained` and the biases selected by the option `bias`.

    In `norms` the variables train, and the statistics of a BatchNormalization stay: its own flag is off.

    Variables that were planned to train before still train, except in the layers in `stopped`.
    Layers without weights are not changed, except a layer that gets its weights when it is first called, perhaps only in
    training: these weights will be frozen. A frozen layer without sublayers gets `trainable = False`, which keeps the
    moving statistics of BatchNormalization fixed. In a layer with sublayers, only its direct variables are frozen.
    """
    groups = (adapted, trained, norms, stopped)
    adapted_ids, trained_ids, norm_ids, stopped_ids = ({id(layer) for layer in each} for each in groups)
    for place in places:
        layer = place.layer
        if not layer.weights and (id(layer) in trained_ids or not _gets_weights(layer)):
            continue
        own, before = keras_internals.own_trainable_variables(layer), vars(layer).get(MARK)
        in_full = id(layer) in trained_ids
        with_bias = bias == "all" or (bias == "lora_only" and id(layer) in adapted_ids)
        stays = [False] * len(own) if before is None or id(layer) in stopped_ids else before["plan"].variables
        is_norm = id(layer) in norm_ids and not in_full
        variables = [
            in_full or is_norm or was or (with_bias and v.name == "bias") for v, was in zip(own, stays, strict=True)
        ]
        plan = Flags(True, variables) if in_full else _plan(layer, variables, statistics=not is_norm)
        # Variables that were planned to train but have been switched off since stay off.
        now = [v.trainable or not was for v, was in zip(own, stays, strict=True)]
        now = [planned and (in_full or on) for planned, on in zip(variables, now, strict=True)]
        mark(layer, flags_of(layer) if before is None else before["found"], plan, Flags(plan.layer, now))


def _gets_weights(layer: keras.layers.Layer) -> bool:
    """Whether a layer without sublayers is not built and may get weights."""
    return not layer.built and not keras_internals.sublayers(layer) and keras_internals.makes_weights(layer)


def mark(layer: keras.layers.Layer, found: Flags, plan: Flags, now: Flags | None = None) -> None:
    """Put a mark on one layer and set its flags to `now`, or else to the plan. Flags may be pairs read from a file.

    A layer that is not built is marked again when it is: its variables were found as the layer, and do not train.
    """
    found, plan, now = Flags(*found), Flags(*plan), Flags(*(plan if now is None else now))
    count = len(keras_internals.own_trainable_variables(layer))
    if count and not plan.variables:
        found = Flags(found.layer, [found.layer] * count)
        plan, now = (Flags(each.layer, [False] * count) for each in (plan, now))
    vars(layer)[MARK] = {"found": found, "plan": plan}
    set_flags(layer, now)
    if not layer.built:
        keras_internals.when_built(layer, lambda: _mark_again(layer))


def _mark_again(layer: keras.layers.Layer) -> None:
    if MARK in vars(layer):  # it is still adapted
        mark(layer, **vars(layer)[MARK])


def _plan(layer: keras.layers.Layer, variables: list[bool], statistics: bool) -> Flags:
    """The flags of a layer of whose variables some train. A layer with its flag off does not update its statistics."""
    fixed = not statistics and has_statistics(layer)
    return Flags((any(variables) and not fixed) or bool(keras_internals.sublayers(layer)), variables)


def has_statistics(layer: keras.layers.Layer) -> bool:
    """Whether a layer has variables that it updates itself in training, as a BatchNormalization does."""
    return len(keras_internals.own_variables(layer)) > len(keras_internals.own_trainable_variables(layer))


def moves_statistics(layer: keras.layers.Layer) -> bool:
    """Whether a marked layer is planned to update its statistics, if it has any."""
    return MARK not in vars(layer) or vars(layer)[MARK]["plan"].layer


def plan_again(layer: keras.layers.Layer, trains: bool | list[bool] | None, statistics: bool = True) -> None:
    """Plan which variables of a marked layer train: all, none or some. `None` keeps the plan and sets the layer's flag.

    Without `statistics`, the layer does not update its own.
    """
    if MARK in vars(layer):
        before = vars(layer)[MARK]
        planned = before["plan"].variables
        variables = planned if trains is None else trains if isinstance(trains, list) else [trains] * len(planned)
        mark(layer, before["found"], _plan(layer, variables, statistics))


def follow_plan(layer: keras.layers.Layer) -> None:
    """Set every layer at or below `layer` to the flags that `apply_lora` gave it."""
    for place in walk(layer):
        if MARK in vars(place.layer):
            set_flags(place.layer, vars(place.layer)[MARK]["plan"])


def restore_found(layer: keras.layers.Layer) -> None:
    """Set every layer at or below `layer` to the flags it had before `apply_lora`, and remove the marks."""
    for place in walk(layer):
        if MARK in vars(place.layer):
            set_flags(place.layer, vars(place.layer).pop(MARK)["found"])


def check_variables(layer: keras.layers.Layer) -> None:
    """Raise an error if a marked layer at or below `layer` has other variables than when it was marked."""
    for place in walk(layer):
        if MARK in vars(place.layer):
            has, had = (
                len(keras_internals.own_trainable_variables(place.layer)),
                len(vars(place.layer)[MARK]["plan"].variables),
            )
            if has != had:
                raise ValueError(
                    f"The layer '{place.path}' has {has} trainable variables. Expected those of when keras_lora adapted the "
                    f"model: it had {had}. Did you call `enable_lora` on it? To adapt it too, call "
                    "`keras_lora.apply_lora(model, targets=..., name=...)` instead."
                )


def marks_of(layer: keras.layers.Layer) -> dict[str, dict[str, Any]]:
    """Return the marks of every layer at or below `layer`, by address, as lists for a config: arguments for `mark`."""
    check_variables(layer)
    marks = {}
    for place in walk(layer):
        if MARK in vars(place.layer):
            mark, now = vars(place.layer)[MARK], flags_of(place.layer)
            said = mark if now == mark["plan"] else {**mark, "now": now}
            marks[place.address] = {key: list(each) for key, each in said.items()}
    return marks


def planned_variables(layer: keras.layers.Layer) -> list[keras.Variable]:
    """Return the direct variables of `layer` that `apply_lora` planned to train."""
    own = keras_internals.own_trainable_variables(layer)
    plan = vars(layer)[MARK]["plan"].variables if MARK in vars(layer) else [False] * len(own)
    return [v for v, planned in zip(own, plan, strict=True) if planned]
