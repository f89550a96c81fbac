"""The groups in which one size grows: the number of layers, the rank, the number of adapters."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cases
import keras
import numpy as np
from measuring import Record, cpu_seconds, record
from timings import TINY, USUAL, computed_limit, timed
from variants import limit, prepare

import keras_lora


def depth(quick: bool) -> Iterator[Record]:
    """Stacks of a growing number of layers: one-time work, and the first step, which compiles."""
    for layers in (2, 4) if quick else (4, 16, 64, 256, 512):
        case = cases.dense(d=64, tokens=32, rank=8, depth=layers, name="depth")
        times: dict[str, list[float]] = {}
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(1 if quick or layers > 64 else 3):
                for quantity, seconds in once(case.build, case.rank, Path(folder) / "adapter.safetensors").items():
                    times.setdefault(quantity, []).append(seconds)
        for quantity, values in times.items():
            yield record(case.name, case.setting, quantity, "s", "keras_lora", values)
        for variant in ("frozen", "enable_lora", "keras_lora"):
            model = prepare(variant, case)
            seconds = cpu_seconds(functools.partial(model.train_on_batch, case.x, case.y))
            yield record(case.name, case.setting, "first step", "s", variant, [seconds])


def once(build: Callable[[], keras.Model], rank: int, path: Path) -> dict[str, float]:
    """CPU seconds of the one-time work for a model."""
    model, fresh = build(), build()
    return {
        "apply_lora": cpu_seconds(lambda: keras_lora.apply_lora(model, rank=rank, head=None)),
        "save_adapter": cpu_seconds(lambda: keras_lora.save_adapter(model, path)),
        "load_adapter": cpu_seconds(lambda: keras_lora.load_adapter(fresh, path)),
        "merge_lora": cpu_seconds(lambda: keras_lora.merge_lora(model)),
    }


def ranks(quick: bool) -> Iterator[Record]:
    """All ranks take turns with full fine-tuning, whose time is recorded with each of them."""
    size = {"d": 32, "tokens": 8} if quick else {"d": 512, "tokens": 256}
    by_rank = {
        rank: cases.dense(rank=rank, name="ranks", **size) for rank in ((1, 2) if quick else (2**n for n in range(9)))
    }
    case = next(iter(by_rank.values()))
    models = {"full": prepare("full", case)} | {str(rank): prepare("keras_lora", each) for rank, each in by_rank.items()}
    calls = {name: functools.partial(model.train_on_batch, case.x, case.y) for name, model in models.items()}
    found = {each["variant"]: each for each in timed(case, "step", calls, TINY if quick else USUAL._replace(seconds=15))}
    for rank, each in by_rank.items():
        full: Record = {**found["full"], "setting": each.setting}
        yield from (full, computed_limit(full, limit(each)))
        yield {**found[str(rank)], "setting": each.setting, "variant": "keras_lora"}


@keras.saving.register_keras_serializable("benchmarks")
class CountCalls(keras.layers.Layer):
    """Counts how often Python code of the model runs: once for each trace, if a step is compiled."""

    calls = 0

    def call(self, x: Any) -> Any:
        self.calls += 1
        return x


def adapters(quick: bool) -> Iterator[Record]:
    """Files of one shape loaded in turn into one compiled model: nothing may be traced again."""
    plain = cases.dense(
        name="adapters", **({"d": 32, "tokens": 8, "rank": 2} if quick else {"d": 512, "tokens": 256, "rank": 8})
    )
    model = keras.Sequential([keras.Input(plain.x.shape[1:]), CountCalls(), *plain.build().layers])
    keras_lora.apply_lora(model, rank=plain.rank, head=None)
    model.compile(keras.optimizers.Adam(1e-4), "mse")
    model.train_on_batch(plain.x, plain.y)
    for number in (1, 2) if quick else (1, 4, 16, 64):
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder) / f"{index}.safetensors" for index in range(number)]
            for index, path in enumerate(paths):
                give_values(model, index)
                keras_lora.save_adapter(model, path)
            model.train_on_batch(plain.x, plain.y)
            traced = model.layers[0].calls
            turns = paths * max(1, (4 if quick else 32) // number)
            seconds = [cpu_seconds(functools.partial(swap, model, path, plain)) for path in turns]
        setting = {**plain.setting, "adapters": number}
        yield record(plain.name, setting, "load and step", "s", "keras_lora", seconds)
        if keras.backend.backend() != "torch":  # which traces nothing
            again = model.layers[0].calls - traced
            if again:
                raise AssertionError(f"Loading {len(turns)} times traced the step again {again} times; expected none.")
            yield record(plain.name, setting, "traces", "count", "keras_lora", [again])


def swap(model: keras.Model, path: Path, case: cases.Case) -> None:
    keras_lora.load_adapter(model, path)
    model.train_on_batch(case.x, case.y)


def give_values(model: keras.Model, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for v in model.trainable_variables:
        v.assign(rng.normal(0, 0.01, v.shape).astype("float32"))
