"""Named adapters: which of them are active, how strongly, which train, and how one goes away.

Whether an adapter is active is a number, its strength, in a variable of each layer. So `fit`, `predict` and `generate` that
were compiled before a switch give the right result after it, and nothing is traced again. An inactive adapter still costs
its two thin products; `delete_adapter` takes it out.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from numbers import Real
from typing import Any

from keras_lora import adapters, checks
from keras_lora.applying import require_adapted, reset_compilation, take_out
from keras_lora.checks import AnyLayer
from keras_lora.compat import keras_internals
from keras_lora.swap import flags, slots
from keras_lora.swap.adapted import AdaptedLayer, named_adapters, set_containers, set_plain
from keras_lora.swap.adapters_of_model import check_names
from keras_lora.swap.addresses import walk


def activate_adapters(model: AnyLayer, names: str | Iterable[str] | Mapping[str, float] | None) -> AnyLayer:
    """Choose which adapters change the model: one, several added up, or none. Nothing is compiled again.

    Args:
        model: An adapted model, or an adapted part of one.
        names: The name of an adapter, several names, a mapping from names to strengths (`{"french": 0.7, "formal": 0.3}`;
            a negative one takes away what the adapter learned), or `None` for none. An adapter that is not named is off.
            With several, each layer's kernel is `W + Σ strength · ΔW`, where every ΔW is the change of `W` alone.

    Returns:
        `model` itself. What trains stays as it is, see `train_adapters`.

    Raises:
        ValueError: The model is not adapted, or has no adapter of a name, or a strength is not a finite number. Nothing is
            switched then.

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
    for name, found in named.items():
        for _, adapter in found.values():
            adapter.strength.assign(strengths.get(name, 0.0))
    return model


def active_adapters(model: Any) -> dict[str, float]:
    """The strengths of the adapters that are active, by name.

    Args:
        model: An adapted model, or an adapted part of one.

    Returns:
        `{name: strength}`. The strength is NaN where layers disagree, because something set them one by one.

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
        each = {adapters.strength_of(adapter) for _, adapter in found.values()}
        strengths[name] = each.pop() if len(each) == 1 else math.nan
    return {name: strength for name, strength in strengths.items() if strength != 0}


@contextlib.contextmanager
def disable_adapters(model: Any) -> Iterator[Any]:
    """Run the base: inside this context no adapter is active; after it each is as it was. Nothing is compiled again.

    It may be nested. Where biases or whole layers were trained beside the adapters, those stay as trained, so the outputs
    are not the base's; a warning says so.

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
    trained = [
        place.path
        for place in walk(model)
        if not isinstance(place.layer, adapters.Adapter) and flags.planned_variables(place.layer)
    ]
    if trained:
        checks.warn(
            f"Without its adapters '{model.name}' is not its base: {trained} train beside them, and stay as they are."
        )
    each = [adapter for found in named.values() for _, adapter in found.values()]
    before = [adapters.strength_of(adapter) for adapter in each]
    for adapter in each:
        adapter.strength.assign(0.0)
    try:
        yield model
    finally:
        for adapter, strength in zip(each, before, strict=True):
            adapter.strength.assign(strength)


def train_adapters(model: AnyLayer, names: str | Iterable[str]) -> AnyLayer:
    """Choose which adapters train; the others are frozen, active or not. What else was to train still does.

    An adapter that trains should be active: through an inactive one no gradient flows, and weight decay still shrinks it.

    Args:
        model: An adapted model, or an adapted part of one.
        names: The name of an adapter, or several.

    Returns:
        `model` itself. Call `compile` after it.

    Raises:
        ValueError: The model is not adapted, or has no adapter of a name. Nothing is changed then.

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
    reset_compilation(model)
    return model


def delete_adapter(model: AnyLayer, name: str) -> AnyLayer:
    """Take an adapter out of a model, and free its memory. Deleting the last one leaves a plain model, like `remove_lora`.

    Args:
        model: An adapted model, or an adapted part of one.
        name: Which adapter.

    Returns:
        `model` itself. Call `compile` after it: the optimizer is gone with the variables it held.

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
        for linear, adapter in named[name].values():
            slots.take(linear, adapter)
            layer: Any = linear.layer
            if isinstance(layer, AdaptedLayer) and not slots.adapters_in(layer):
                set_plain(layer)
                flags.plan_again(layer, None)
        set_containers(model)
    keras_internals.forget_compilation(model)
    reset_compilation(model)
    return model


def _named(model: Any, function: str) -> dict[str, dict[str, tuple[Any, adapters.Adapter]]]:
    require_adapted(model, function)
    return named_adapters(model)


def strengths_of(names: str | Iterable[str] | Mapping[str, float] | None) -> dict[str, float]:
    """A number for each adapter that is named: the one it is mapped to, or 1."""
    if names is None:
        return {}
    if isinstance(names, Mapping):
        numbers = {name: isinstance(each, Real) and not isinstance(each, bool) for name, each in names.items()}
        wrong = {name: each for name, each in names.items() if not (numbers[name] and math.isfinite(each))}
        if wrong:
            raise ValueError(f"A strength must be a finite number. Received: {wrong}.")
        return dict(names)
    return dict.fromkeys([names] if isinstance(names, str) else names, 1.0)
