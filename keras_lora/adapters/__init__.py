"""The adapter methods: how a kernel is changed. One file per method, and a table of all methods."""

from __future__ import annotations

import inspect
from numbers import Real
from typing import Any

import keras

from keras_lora import checks
from keras_lora.adapters.adalora import AdaLoRA
from keras_lora.adapters.adapter import (
    INIT_ARGUMENTS,
    Adapter,
    TooLarge,
    at_most,
    method_of,
    skip_init,
    strength_of,
    with_sublayers,
)
from keras_lora.adapters.dora import DoRA
from keras_lora.adapters.ia3 import IA3
from keras_lora.adapters.loha import LoHa
from keras_lora.adapters.lokr import LoKr
from keras_lora.adapters.lora import LoRA
from keras_lora.adapters.low_rank import LowRank
from keras_lora.adapters.miss import MiSS
from keras_lora.adapters.oft import OFT
from keras_lora.adapters.per_example import PerExample
from keras_lora.adapters.sum import Sum
from keras_lora.adapters.trainable_tokens import TrainableTokens
from keras_lora.adapters.vera import VeRA

TABLE: dict[str, type[Adapter]] = {
    "adalora": AdaLoRA,
    "dora": DoRA,
    "ia3": IA3,
    "loha": LoHa,
    "lokr": LoKr,
    "lora": LoRA,
    "miss": MiSS,
    "oft": OFT,
    "trainable_tokens": TrainableTokens,
    "vera": VeRA,
}


def get(adapter: str | dict[str, Any] | Adapter, **arguments: Any) -> Adapter:
    """Return an adapter for a name, a config or an instance, like `keras.optimizers.get`.

    Args:
        adapter: `"lora"`, an instance, or a config written by `keras.saving.serialize_keras_object`.
        **arguments: Arguments of the method, such as `rank`; allowed only with a name. `None` values are ignored.

    Raises:
        ValueError: The name is unknown, or arguments were given with an instance.
        TypeError: `adapter` is not a name, a config or an instance.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    if isinstance(adapter, str):
        if adapter.lower() not in TABLE:
            raise ValueError(
                f"There is no adapter method called '{adapter}'. Expected one of {sorted(TABLE)}, or an instance such as "
                f"keras_lora.LoRA(rank=8). Received: adapter={adapter!r}."
            )
        method = TABLE[adapter.lower()]
        parameters = inspect.signature(method).parameters
        checks.unknown_keywords(f"{method.__name__}", given, [name for name in parameters if name != "kwargs"])
        if missing := [name for name, each in parameters.items() if _is_needed(each) and name not in given]:
            words = ", ".join(f"{name}=..." for name in missing)
            raise ValueError(
                f"The method '{adapter}' has arguments without a default. Expected an instance: "
                f"{method.__name__}({words}). Received: adapter={adapter!r}."
            )
        return method(**given)
    if isinstance(adapter, dict):
        adapter = keras.saving.deserialize_keras_object(adapter)
    if not isinstance(adapter, Adapter):
        number = isinstance(adapter, Real) and not isinstance(adapter, bool)
        hint = f" A rank is given by name: rank={adapter!r}." if number else ""
        raise TypeError(
            f"`adapter` must be a name ({', '.join(sorted(TABLE))}), an instance or a config. Received: "
            f"{checks.described(adapter)}.{hint}"
        )
    if given:
        words = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise ValueError(
            f"An adapter instance already has its arguments. Received: {words} beside {type(adapter).__name__}. Write "
            f"{type(adapter).__name__}({words}) instead."
        )
    return adapter


def _is_needed(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD


def copy_of(adapter: Adapter, **changed: Any) -> Adapter:
    """Return a new adapter without weights, with the same config except for the arguments in `changed`."""
    config = adapter.get_config()
    unknown = sorted(set(changed) - set(config))
    if unknown:
        raise ValueError(f"{type(adapter).__name__} has no argument {unknown}. Expected some of {sorted(config)}.")
    found: Adapter = type(adapter).from_config({**config, **changed})
    return found


__all__ = [
    "IA3",
    "INIT_ARGUMENTS",
    "OFT",
    "TABLE",
    "AdaLoRA",
    "Adapter",
    "DoRA",
    "LoHa",
    "LoKr",
    "LoRA",
    "LowRank",
    "MiSS",
    "PerExample",
    "Sum",
    "TooLarge",
    "TrainableTokens",
    "VeRA",
    "at_most",
    "copy_of",
    "get",
    "method_of",
    "strength_of",
    "skip_init",
    "with_sublayers",
]
