"""Named adapters: choose which are active, how strongly, and which train, and delete them.

An adapter's strength is a number in a variable of each layer; 0 means inactive. So `fit`, `predict` and `generate` give the
right result after a switch even if they were compiled before it, and nothing is traced again. An inactive adapter still
costs its two thin products; `delete_adapter` removes it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from numbers import Real
from typing import Any

import keras

from keras_lora import adapters
from keras_lora.applying import require_adapted, reset_compilation, take_out
from keras_lora.checks import AnyLayer
from keras_lora.compat import keras_internals, training_internals
from keras_lora.swap import beside, flags, slots
from keras_lora.swap.adapted import AdaptedLayer, named_adapters, set_containers, set_plain
from keras_lora.swap.adapters_of_model import changing_strengths, check_names, show_beside
from keras_lora.swap.addresses import walk


def activate_adapters(model: AnyLayer, names: str | Iterable[str] | Mapping[str, float] | None) -> AnyLayer:
    """Choose which adapters are active: one, several added up, or none. Nothing is compiled again.

    Args:
        model: An adapted model, or an adapted part of one.
        names: The name of an adapter, several names, a mapping from names to strengths (`{"french": 0.7, "formal": 0.3}`;
            a negative one subtracts the change), or `None` for none. An adapter that is not named is off.
            With several, each layer's kernel is `W + Σ strength · ΔW`; each ΔW is computed from `W` alone. Base
            variables that trained with them, such as a head, add up in the same way.

    Returns:
        `model` itself. Which adapters train does not change; see `train_adapters`.

    Raises:
        ValueError: The model is not adapted, has no adapter of a given name, or a strength is not a finite number. Nothing
            is switched then.

    Example:

    >>> import keras, keras_lora
    >>> model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(32), keras.layers.Dense(2)])
    >>> model = keras_lora.apply_lora(model, rank=1, name="french")
    >>> model = keras_lora.apply_lora(model, "dora", rank=4, name="formal")
    >>> keras_lora.active_adapters(keras_lora.activate_adapters(model, {"french": 0.5, "formal": 1}))
    {'french': 0.5, 'formal': 1.0}
    """
    named = _named(model, "activate_adapters")
    strengths = strengths_of(names)
    check_names(model, strengths)
    with changing_strengths(model):
        for name, found in named.items():
            for _, adapter in found.values():
                adapter.strength.assign(strengths.get(name, 0.0))
    return model


def active_adapters(model: Any) -> dict[str, float]:
    """Return the strengths of the active adapters, by name.

    Args:
        model: An adapted model, or an adapted part of one.

    Returns:
        `{name: strength}`. The strength is NaN if layers disagree, because their strengths were set one by one.

    Raises:
        ValueError: The model is not adapted.

    Example:

    >>> import keras, keras_lora
    >>> model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(32), keras.layers.Dense(2)])
    >>> keras_lora.active_adapters(keras_lora.apply_lora(model))
    {'default': 1.0}
    """
    strengths = {}
    for name, found in _named(model, "active_adapters").items():
        each = {0.0 if adapter.off else adapters.strength_of(adapter) for _, adapter in found.values()}
        strengths[name] = each.pop() if len(each) == 1 else math.nan
    return {name: strength for name, strength in strengths.items() if strength != 0}


@contextlib.contextmanager
def disable_adapters(model: Any) -> Iterator[Any]:
    """Context manager that runs the base model, with no adapter active. Nothing is compiled again.

    On exit every adapter has its previous strength. You may nest it, and use it inside `compute_loss` or `train_step`: then
    the base is the reference of DPO, GRPO or a KL penalty, at the cost of the base alone. Base variables that trained with
    the adapters, such as a head, have their values from before `apply_lora`. Do not train inside: nothing would learn.

    Args:
        model: An adapted model, or an adapted part of one.

    Raises:
        ValueError: The model is not adapted.

    Example:

    >>> import keras, keras_lora
    >>> model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(32), keras.layers.Dense(2)])
    >>> model = keras_lora.apply_lora(model)
    >>> with keras_lora.disable_adapters(model):
    ...     keras_lora.active_adapters(model)
    {}
    >>> keras_lora.active_adapters(model)
    {'default': 1.0}
    """
    named = _named(model, "disable_adapters")
    each = [adapter for found in named.values() for _, adapter in found.values()]
    # A strength of 0 also reaches functions that are compiled already. But a step that is being traced, or whose gradient
    # is still to come, must not write to variables: there, calls leave the adapters out.
    in_a_trace = training_internals.in_a_trace()
    leaves_out = in_a_trace or keras.backend.backend() == "torch"
    before = [(adapter, adapter.off, None if in_a_trace else adapters.strength_of(adapter)) for adapter in each]
    for adapter in each:
        if leaves_out:
            adapter.off = True
        else:
            adapter.strength.assign(0.0)
    try:
        with beside.base_shown(model):
            yield model
    finally:
        for adapter, off, strength in before:
            adapter.off = off
            if strength is not None and adapters.strength_of(adapter) != strength:
                adapter.strength.assign(strength)


def train_adapters(model: AnyLayer, names: str | Iterable[str]) -> AnyLayer:
    """Choose which adapters train. The others are frozen, active or not.

    A head or biases that belong to an adapter train with it. An adapter that trains should be active: an inactive one gets
    no gradient, but weight decay still shrinks it.

    Args:
        model: An adapted model, or an adapted part of one.
        names: The name of an adapter, or several.

    Returns:
        `model` itself. Call `compile` after it.

    Raises:
        ValueError: The model is not adapted, or has no adapter of a given name. Nothing is changed then.

    Example:

    >>> import keras, keras_lora
    >>> model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(32), keras.layers.Dense(2)])
    >>> model = keras_lora.apply_lora(model, rank=1, name="french")
    >>> model = keras_lora.apply_lora(model, rank=4, name="formal")
    >>> [tuple(v.shape) for v in keras_lora.train_adapters(model, "french").trainable_variables]
    [(16, 1), (1, 32)]
    """
    named = _named(model, "train_adapters")
    chosen = strengths_of(names)
    check_names(model, chosen)
    for name, found in named.items():
        for linear, adapter in found.values():
            for layer in adapters.with_sublayers(adapter):
                flags.plan_again(layer, name in chosen)
            flags.plan_again(linear.layer, None)
    for place in walk(model):
        if (trains := beside.trains(place.layer, chosen)) is not None:
            flags.plan_again(place.layer, trains, beside.moves_statistics(place.layer, chosen))
    reset_compilation(model)
    return model


def delete_adapter(model: AnyLayer, name: str) -> AnyLayer:
    """Remove an adapter from a model and free its memory.

    Deleting the last adapter leaves a plain model, like `remove_lora`.

    Args:
        model: An adapted model, or an adapted part of one.
        name: The name of the adapter.

    Returns:
        `model` itself. Call `compile` after it, since the optimizer is dropped together with its variables.

    Raises:
        ValueError: The model is not adapted, or has no adapter of that name.

    Example:

    >>> import keras, keras_lora
    >>> model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(32), keras.layers.Dense(2)])
    >>> model = keras_lora.apply_lora(model, rank=1, name="french")
    >>> model = keras_lora.apply_lora(model, rank=4, name="formal")
    >>> keras_lora.active_adapters(keras_lora.activate_adapters(keras_lora.delete_adapter(model, "formal"), "french"))
    {'french': 1.0}
    """
    named = _named(model, "delete_adapter")
    check_names(model, [name])
    if len(named) == 1:
        take_out(model)
    else:
        beside.store(model)
        for place in walk(model):
            others = [each for each in beside.owners(place.layer) if each != name]
            if (kept := beside.trains(place.layer, others)) is not None:
                planned = {id(v) for v in flags.planned_variables(place.layer)}
                own = keras_internals.own_trainable_variables(place.layer)
                trains = [id(v) in planned and each for v, each in zip(own, kept, strict=True)]
                flags.plan_again(place.layer, trains, beside.moves_statistics(place.layer, others))
        for linear, adapter in named[name].values():
            slots.take(linear, adapter)
            layer: Any = linear.layer
            if isinstance(layer, AdaptedLayer) and not slots.adapters_in(layer):
                set_plain(layer)
                flags.plan_again(layer, None)
        show_beside(model)
        beside.forget(model, name)
        set_containers(model)
    training_internals.forget_compilation(model)
    reset_compilation(model)
    return model


def _named(model: Any, function: str) -> dict[str, dict[str, tuple[Any, adapters.Adapter]]]:
    require_adapted(model, function)
    return named_adapters(model)


def strengths_of(names: str | Iterable[str] | Mapping[str, float] | None) -> dict[str, float]:
    """The strength of each adapter named: the one it is mapped to, or 1."""
    if names is None:
        return {}
    if isinstance(names, Mapping):
        numbers = {name: isinstance(each, Real) and not isinstance(each, bool) for name, each in names.items()}
        wrong = {name: each for name, each in names.items() if not (numbers[name] and math.isfinite(each))}
        if wrong:
            raise ValueError(f"A strength must be a finite number. Received: {wrong}.")
        return dict(names)
    return dict.fromkeys([names] if isinstance(names, str) else names, 1.0)
