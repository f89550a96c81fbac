"""Checks that many arguments share, each with the error that says what was expected and what came."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from numbers import Real
from typing import Any

import keras


def positive_integer(name: str, value: Any, least: int = 1) -> int:
    """`value` as a Python integer; NumPy's integers are integers too, and a bool is none."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        kind = "positive" if least == 1 else f"at least {least}, an"
        raise ValueError(f"`{name}` must be a {kind} integer. Received: {name}={value!r}.")
    return number


def is_number(value: Any) -> bool:
    """Whether `value` is a finite real number, Python's or NumPy's, and no bool."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def positive_number(name: str, value: Any) -> float:
    """`value`, if it is a positive finite number."""
    if not is_number(value) or value <= 0:
        raise ValueError(f"`{name}` must be a positive finite number. Received: {name}={value!r}.")
    return _plain(value)


def share(name: str, value: Any) -> float:
    """`value`, if it is a number in `(0, 1]`."""
    if not is_number(value) or not 0 < value <= 1:
        raise ValueError(f"`{name}` must be a number in (0, 1]. Received: {name}={value!r}.")
    return _plain(value)


def dropout_rate(name: str, value: Any) -> float:
    """`value`, if it is a number in `[0, 1)`."""
    if not is_number(value) or not 0 <= value < 1:
        raise ValueError(f"`{name}` must be a number in [0, 1). Received: {name}={value!r}.")
    return _plain(value)


def _plain(value: Any) -> float:
    """An integer stays one: configs and files say 16 and not 16.0."""
    return value if type(value) in (int, float) else float(value)


def keras_layer(model: Any) -> None:
    """Raise unless `model` is a Keras model or layer."""
    if not isinstance(model, keras.layers.Layer):
        raise TypeError(f"`model` must be a Keras model or layer. Received: {model!r} of type {type(model).__name__}.")


def bullets(problems: Iterable[str]) -> str:
    """Problems as the lines of a list, each cut to a readable length."""
    return "".join(f"\n  - {each if len(each) <= 1000 else each[:1000] + '…'}" for each in problems)
