"""`register_adapter`: register your own method under a name and check that it is complete."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import keras

from keras_lora.adapters import TABLE
from keras_lora.adapters.adapter import Adapter
from keras_lora.adapters.low_rank import LowRank

AdapterClass = TypeVar("AdapterClass", bound=type[Adapter])

#: Arguments of every Keras layer, which do not belong to the method.
_OF_KERAS = {"name", "dtype", "trainable"}


def register_adapter(name: str) -> Callable[[AdapterClass], AdapterClass]:
    """Register your own adapter method under a name. Use it as a class decorator.

    You can then use the method by that name (`apply_lora(model, "name")`) and save it in adapter files. Register it next to
    the class definition, because the process that loads a file needs it too. Then call
    `keras_lora.testing.check_adapter`, which runs the method on every kind of layer.

    Args:
        name: A lower-case word that identifies the method in files.

    Returns:
        A decorator that returns the class itself.

    Raises:
        TypeError: The class is not a subclass of `keras_lora.Adapter`.
        ValueError: The name is taken or is not a lower-case word, or the class lacks a part: `build_for`, `parameter_count`,
            and `delta_kernel` (of a `LowRank`, `pair`), or a `get_config` with every argument of its constructor.

    Example:

    >>> import keras, keras_lora
    >>> @keras_lora.register_adapter("output_gain")
    ... class OutputGain(keras_lora.Adapter):
    ...     "W' = W diag(1 + gain), a number for each output."
    ...
    ...     def build_for(self, linear):
    ...         *groups, _, out_dim = linear.matrix_shape
    ...         self.gain = self.add_factor("gain", (*groups, 1, out_dim), "zeros")
    ...
    ...     def parameter_count(self, matrix_shape):
    ...         *groups, _, out_dim = matrix_shape
    ...         return out_dim * (groups[0] if groups else 1)
    ...
    ...     def delta_kernel(self, matrix):
    ...         return matrix * self.gain
    >>> model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(32), keras.layers.Dense(2)])
    >>> model = keras_lora.apply_lora(model, "output_gain")
    >>> [(v.name, tuple(v.shape)) for v in model.trainable_variables]
    [('gain', (1, 32))]
    """
    if not isinstance(name, str) or not name.isidentifier() or name != name.lower():
        raise ValueError(f'`name` must be a lower-case word, such as "my_method". Received: name={name!r}.')
    if name in TABLE:
        raise ValueError(f"There is a method '{name}' already, {TABLE[name].__name__}. Expected a new name.")

    def register(cls: AdapterClass) -> AdapterClass:
        _check(cls)
        if keras.saving.get_registered_object(keras.saving.get_registered_name(cls)) is not cls:
            keras.saving.register_keras_serializable(package=cls.__module__.partition(".")[0])(cls)
        TABLE[name] = cls
        return cls

    return register


def _check(cls: Any) -> None:
    """Raise an error unless `cls` has every part that a method needs."""
    if not (isinstance(cls, type) and issubclass(cls, Adapter)):
        raise TypeError(f"A method must be a subclass of `keras_lora.Adapter`. Received: {cls!r}.")
    if cls in TABLE.values():
        raise ValueError(f"{cls.__name__} is registered already.")
    parts = ["build_for", "parameter_count", "pair" if issubclass(cls, LowRank) else "delta_kernel"]
    bases = {base for base in cls.__mro__ if base in (Adapter, LowRank)}
    problems = [
        f"it does not define `{each}`" for each in parts if any(getattr(cls, each) is vars(b).get(each) for b in bases)
    ]
    parameters = {
        key: each
        for key, each in inspect.signature(cls).parameters.items()
        if key not in _OF_KERAS and each.kind is not each.VAR_KEYWORD
    }
    if not problems and all(each.default is not each.empty for each in parameters.values()):
        config = cls().get_config()
        problems += [f"its `get_config` lacks the argument `{key}`" for key in parameters if key not in config]
        if not problems and cls.from_config(config).get_config() != config:
            problems.append("its `from_config` makes another adapter than its `get_config` says")
    if problems:
        raise ValueError(f"{cls.__name__} cannot be registered: {'; '.join(problems)}. See `keras_lora.Adapter`.")
