"""Many adapters on one base: one for each example of a batch, and the cost of inactive adapters."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cases
import keras
import numpy as np
import peers
from cases import Case
from measuring import Budget, Record
from sweeps import give_values
from timings import TINY, timed
from variants import prepare

import keras_lora

#: "one by one" runs each example separately through a model with one adapter. This is what you can do without stacked
#: factors. It even leaves out the time to load adapters in between.
VARIANTS = ("base", "keras_lora per example", "one by one", "PEFT mixed batch")


def one_by_one(model: keras.Model, x: Any) -> list[Any]:
    return [model.predict_on_batch(x[i : i + 1]) for i in range(len(x))]


def serving(quick: bool) -> Iterator[Record]:
    """One batch with as many adapters as examples. Each example is a prompt, or a single token."""
    d, examples, rank = (32, 4, 2) if quick else (1024, 64, 8)
    for length in (2,) if quick else (4, 1, 16):
        x = cases.normal(examples, length, d)
        setting = {"d": d, "examples": examples, "tokens": length, "rank": rank, "layers": 4}
        case = Case("serving", setting, functools.partial(stack, length, d), x, x)
        adapted = prepare("keras_lora", case)
        with tempfile.TemporaryDirectory() as folder:
            served = keras_lora.MultiAdapterModel(prepare("base", case), capacity=examples, rank=rank, head=None)
            for number in range(examples):
                give_values(adapted, number)
                path = Path(folder) / f"{number}.safetensors"
                keras_lora.save_adapter(adapted, path)
                served.load(path, str(number))
        batch = {"inputs": x, "adapter_index": served.index_of(map(str, range(examples)))}
        base = prepare("base", case)
        found = served.predict_on_batch(batch)[-1]
        assert np.abs(found - adapted.predict_on_batch(x[-1:])[0]).max() < 1e-4 * np.abs(found).max()
        calls: dict[str, Callable[[], Any]] = {
            "base": functools.partial(base.predict_on_batch, x),
            "keras_lora per example": functools.partial(served.predict_on_batch, batch),
            "one by one": functools.partial(one_by_one, adapted, x),
        }
        if peers.available():
            calls["PEFT mixed batch"] = peft_mixed(adapted, x, rank)
        yield from timed(case, "mixed batch", calls, TINY if quick else Budget(20, 200, 10))


def stack(length: int, d: int) -> keras.Model:
    return keras.Sequential([keras.Input((length, d)), *(keras.layers.Dense(d, activation="relu") for _ in range(4))])


def peft_mixed(adapted: keras.Model, x: np.ndarray, rank: int) -> Callable[[], Any]:
    """PEFT's mixed batch: `adapter_names`, one for each example."""
    import torch
    from peft import LoraConfig, get_peft_model

    base = peers.stack(peers.linears(adapted))
    names = [str(2 * index) for index in range(len(adapted.layers))]
    config = LoraConfig(r=rank, lora_alpha=peers.ALPHA, target_modules=names, init_lora_weights=False)
    module = get_peft_model(base, config, adapter_name="0")
    for number in range(1, len(x)):
        module.add_adapter(str(number), config)
    module.eval()
    tensor = torch.from_numpy(x)
    which = [str(number) for number in range(len(x))]

    def call() -> Any:
        with torch.no_grad():
            return module(tensor, adapter_names=which)

    return call


def inactive(quick: bool) -> Iterator[Record]:
    """One active adapter and a growing number of inactive ones: the cost of switching without compiling."""
    size = {"d": 32, "tokens": 8, "rank": 2} if quick else {"d": 1024, "tokens": 256, "rank": 8}
    models = {}
    for number in (0, 1) if quick else (0, 1, 4, 16):
        case = cases.dense(**size, name="inactive")
        model = prepare("keras_lora", case)
        for index in range(number):
            keras_lora.apply_lora(model, rank=case.rank, head=None, name=f"{index}")
        keras_lora.activate_adapters(model, "default")
        keras_lora.train_adapters(model, "default")
        model.compile(keras.optimizers.Adam(1e-4), "mse")
        models[number] = model
    base = {"inference": prepare("base", case), "step": prepare("frozen", case)}
    for quantity in ("inference", "step"):

        def call(model: keras.Model, quantity: str = quantity) -> Callable[[], Any]:
            if quantity == "inference":
                return functools.partial(model.predict_on_batch, case.x)
            return functools.partial(model.train_on_batch, case.x, case.y)

        floor = "base" if quantity == "inference" else "frozen"
        calls = {str(number): call(model) for number, model in models.items()} | {floor: call(base[quantity])}
        found = {each["variant"]: each for each in timed(case, quantity, calls, TINY if quick else Budget(12, 200, 10))}
        for number in models:
            setting = {**case.setting, "inactive": number}
            yield {**found[floor], "setting": setting}
            yield {**found[str(number)], "setting": setting, "variant": "keras_lora"}
