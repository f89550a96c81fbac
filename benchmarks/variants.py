"""How a fresh model is prepared in each variant: what trains in it, and what adapts it."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import keras
from cases import Case

import keras_lora


def prepare(variant: str, case: Case) -> keras.Model:
    """A fresh model of the case, with the same weights each time, prepared and compiled."""
    keras.utils.set_random_seed(0)
    model = case.build()
    VARIANTS[variant](model, case)
    model.compile(keras.optimizers.Adam(1e-4), "mse")
    return model


def train_only(model: keras.Model, variables: list[keras.Variable]) -> None:
    """Freeze every variable except these."""
    wanted = {id(v) for v in variables}
    for v in model.trainable_variables:
        v.trainable = id(v) in wanted
    assert len(model.trainable_variables) == len(variables), [v.path for v in model.trainable_variables]


def adapted_layers(model: keras.Model, case: Case) -> list[keras.layers.Layer]:
    """The layers that keras_lora adapts."""
    return [row.layer for row in keras_lora.list_targets(model, targets=case.targets, head=case.train).of("adapt")]


def full(model: keras.Model, case: Case) -> None:
    """Everything trains, as in a plain Keras model."""


def frozen(model: keras.Model, case: Case) -> None:
    """The lower reference: the whole forward and backward pass, in which only the first adapted layer's bias trains.

    An embedding has no bias, and nothing below it needs a gradient. There, the head's bias trains.
    """
    biases = [layer.bias for layer in adapted_layers(model, case) if getattr(layer, "bias", None) is not None]
    train_only(model, biases[:1] or [model.layers[-1].bias])


def enable_lora(model: keras.Model, case: Case) -> None:
    """Keras's own LoRA on the same layers. Only its factors train."""
    adapted = adapted_layers(model, case)
    for layer in adapted:
        layer.enable_lora(case.rank)
    factors = [v for layer in adapted for v in layer.trainable_variables if v.name.startswith("lora_")]
    beside = model.get_layer(case.train).trainable_variables if case.train else []
    train_only(model, factors + beside)


def lora(adapter: Callable[[int], keras_lora.Adapter] = keras_lora.LoRA) -> Callable[[keras.Model, Case], None]:
    def apply(model: keras.Model, case: Case) -> None:
        keras_lora.apply_lora(model, adapter(case.rank), targets=case.targets, head=case.train, train=case.train)

    return apply


def merged(model: keras.Model, case: Case) -> None:
    lora()(model, case)
    keras_lora.merge_lora(model)


#: The methods besides LoRA and DoRA, at their usual sizes; those with a rank like LoRA's have its rank.
METHODS: dict[str, Callable[[int], keras_lora.Adapter]] = {
    "MiSS": keras_lora.MiSS,
    "IA3": lambda rank: keras_lora.IA3(),
    "IA3 inputs": lambda rank: keras_lora.IA3(side="inputs"),
    "LoKr": keras_lora.LoKr,
    "OFT": lambda rank: keras_lora.OFT(),
    "LoHa": lambda rank: keras_lora.LoHa(),
    "VeRA": lambda rank: keras_lora.VeRA(),
}
#: By name. "base", "base again" and "keras_lora merged" are for inference; a base model that trains is "full".
VARIANTS: dict[str, Callable[[keras.Model, Case], None]] = {
    "full": full,
    "frozen": frozen,
    "enable_lora": enable_lora,
    "keras_lora": lora(),
    "keras_lora dropout": lora(lambda rank: keras_lora.LoRA(rank, dropout=0.1)),
    "keras_lora DoRA": lora(keras_lora.DoRA),
    "keras_lora merged": merged,
    **{f"keras_lora {name}": lora(make) for name, make in METHODS.items()},
    "base": full,
    "base again": full,  # how much two copies of one model differ
}
TRAINING = tuple(itertools.islice(VARIANTS, 6))
ESSENTIAL = TRAINING[:4]


def limit(case: Case) -> float:
    """FLOPs of LoRA over those of full fine-tuning, for a stack of square Dense layers."""
    depth, share = case.setting["layers"], case.rank / case.setting["d"]
    return ((4 * depth - 2) + (12 * depth - 2) * share) / (6 * depth - 2)
