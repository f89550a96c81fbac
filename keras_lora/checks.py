"""Checks of arguments, shared by many functions. Each error says what was expected and what was received."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import operator
import os
import warnings
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:
    import keras  # the command line checks arguments too, and starts without Keras

#: A model or layer that a function changes in place and returns, with its type.
AnyLayer = TypeVar("AnyLayer", bound="keras.layers.Layer")

_P = ParamSpec("_P")
_R = TypeVar("_R")

#: Argument names of PEFT and of Keras's own LoRA, and what to write here.
WORDS = {
    "adapter_name": "`name`",
    "exclude_modules": "`exclude`",
    "init_lora_weights": "`a_initializer` and `b_initializer` of `keras_lora.LoRA`",
    "layers_to_transform": "`blocks`",
    "lora_alpha": "`alpha`",
    "lora_dropout": "`adapter=keras_lora.LoRA(dropout=...)`",
    "lora_rank": "`rank`",
    "modules_to_save": "`train`",
    "r": "`rank`",
    "target_layer_names": "`targets`",
    "target_modules": "`targets`",
    "use_dora": '`adapter="dora"`',
    "use_rslora": "`adapter=keras_lora.LoRA(rank_stabilized=True)`",
}


def unknown_keywords(function: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise an error for a keyword that `function` does not have. It names the word to use."""
    known = list(known)
    for word in given:
        if word not in known:
            near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
            use = WORDS.get(word) or (f"`{near[0]}`" if near else None)
            hint = f"Use {use}." if use else f"It takes {', '.join(f'`{each}`' for each in known)}."
            raise TypeError(f"`{function}()` has no argument `{word}`. {hint}")


def helpful(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorate a public function: if a keyword is wrong or there are too many arguments, the error says what to write."""
    parameters = inspect.signature(function).parameters.values()
    positional = [each.name for each in parameters if each.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    names = [each.name for each in parameters]
    by_keyword = [name for name in names if name not in positional]

    @functools.wraps(function)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        unknown_keywords(function.__name__, kwargs, names)
        _in_order(function.__name__, positional, args)
        if len(args) > len(positional):
            given = ", ".join(repr(each)[:80] for each in args[len(positional) :])
            raise TypeError(
                f"`{function.__name__}()` takes {len(positional)} arguments by position ({', '.join(positional)}), the rest "
                f"by name ({', '.join(by_keyword)}). Received by position: {given}. Write for example `{by_keyword[0]}=...`."
            )
        return function(*args, **kwargs)

    return checked


def _in_order(function: str, names: list[str], given: tuple[Any, ...]) -> None:
    """Raise an error if a path was given instead of the model, and something else instead of the path."""
    paths = [isinstance(each, (str, os.PathLike)) for each in given[:2]]
    if paths == [True, False] and names[1:2] in (["path"], ["folder"]):
        raise TypeError(
            f"`{function}()` takes the {names[0]} first, and then the {names[1]}. Received: {str(given[0])!r}, and "
            f"then a {type(given[1]).__name__}. Write `{function}({names[0]}, {names[1]})`."
        )


def warn(message: str) -> None:
    """Warn at the line of the caller outside this package."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("keras_lora", "contextlib"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def positive_integer(name: str, value: Any, least: int = 1) -> int:
    """`value` as a Python integer. NumPy integers are accepted, bools are not."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        kind = {0: "a non-negative integer", 1: "a positive integer"}.get(least, f"an integer of at least {least}")
        raise ValueError(f"`{name}` must be {kind}. Received: {name}={_short(value)}.")
    return number


def flag(name: str, value: Any) -> bool:
    """`value` as a Python bool; NumPy's bools are bools too, and so are 0 and 1."""
    known = isinstance(value, Integral) or type(value).__name__ in ("bool", "bool_")  # NumPy is not imported for this
    if not known or value not in (0, 1):
        raise ValueError(f"`{name}` must be True or False. Received: {name}={_short(value)}.")
    return bool(value)


def seed(value: Any) -> int | None:
    """`value` as a Python integer, if it is one or None."""
    if value is not None and not is_integer(value):
        raise ValueError(f"`seed` must be an integer or None. Received: seed={_short(value)}.")
    return None if value is None else operator.index(value)


def is_integer(value: Any) -> bool:
    """Whether `value` is an integer, Python's or NumPy's, but not a bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether `value` is a finite real number, Python's or NumPy's, but not a bool."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def positive_number(name: str, value: Any) -> float:
    """`value`, if it is a positive finite number."""
    if not is_number(value) or value <= 0:
        raise ValueError(f"`{name}` must be a positive finite number. Received: {name}={_short(value)}.")
    return _plain(value)


def share(name: str, value: Any) -> float:
    """`value`, if it is a number in `(0, 1]`."""
    if not is_number(value) or not 0 < value <= 1:
        raise ValueError(f"`{name}` must be a number in (0, 1]. Received: {name}={_short(value)}.")
    return _plain(value)


def dropout_rate(name: str, value: Any) -> float:
    """`value`, if it is a number in `[0, 1)`."""
    if not is_number(value) or not 0 <= value < 1:
        raise ValueError(f"`{name}` must be a number in [0, 1). Received: {name}={_short(value)}.")
    return _plain(value)


def _plain(value: Any) -> float:
    """`value` as a Python number. An integer stays one, so that configs and files have 16 and not 16.0."""
    return value if type(value) in (int, float) else float(value)


def keras_layer(model: Any, second: Any = None, no: tuple[type, ...] = ()) -> None:
    """Raise unless `model` is a Keras model or layer, and not of a class in `no`. The next argument, `second`, may be it."""
    import keras

    if not isinstance(model, keras.layers.Layer) or isinstance(model, no):
        hint = " Expected the model first: swap the two." if isinstance(second, keras.layers.Layer) else ""
        raise TypeError(f"`model` must be a Keras model or layer. Received: {described(model)}.{hint}")


def described(value: Any) -> str:
    """Any value in a few words, because a list of variables would print all its numbers."""
    kind = type(value).__name__
    if isinstance(value, (list, tuple, set, dict)):
        of = f", the first of type {type(next(iter(value))).__name__}" if value else ""
        return f"a {kind} of length {len(value)}{of}"
    if value is None or isinstance(value, (str, bytes, Real, type)):
        return f"{_short(value)} of type {kind}"
    return f"an object of type {kind}"


def _short(value: Any) -> str:
    """What `repr` says, cut to a readable length."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def bullets(problems: Iterable[str]) -> str:
    """Problems as the lines of a list, each cut to a readable length."""
    return "".join(f"\n  - {each if len(each) <= 1000 else each[:1000] + '…'}" for each in problems)
