"""The groups that time training steps and inference. All variants of a setting take turns."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import cases
import numpy as np
import peers
from cases import Case
from measuring import Budget, Record, interleaved, record
from variants import ESSENTIAL, METHODS, TRAINING, limit, prepare

FEW = ("full", "keras_lora")  # in a quick run, where most of the time goes to compiling
TINY = Budget(0, 2, 2)
USUAL = Budget(3)
SHORT = Budget(1.5, at_least=3)
HEADLINE = {"d": 1024, "tokens": 256, "rank": 8}
HEADLINE_BUDGET = Budget(24, 200, 30)


def timed(case: Case, quantity: str, calls: Mapping[str, Callable[[], Any]], budget: Budget) -> list[Record]:
    """Time the calls in turns, and make a record for each."""
    times = interleaved(calls, *budget)
    return [record(case.name, case.setting, quantity, "s", variant, values) for variant, values in times.items()]


def steps(case: Case, names: Iterable[str], budget: Budget) -> Iterator[Record]:
    """`train_on_batch` of each variant. A stack of Dense layers on torch includes the peers, in a plain torch loop."""
    models = {name: prepare(name, case) for name in names if case.dropout or name != "keras_lora dropout"}
    calls: dict[str, Callable[[], Any]] = {
        name: functools.partial(model.train_on_batch, case.x, case.y) for name, model in models.items()
    }
    if case.name == "dense" and "keras_lora DoRA" in models and peers.available():
        calls |= {name: peers.step_call(peer, case) for name, peer in peers.checked(case, models).items()}
    yield from timed(case, "step", calls, budget)


def dense_settings(quick: bool) -> list[dict[str, Any]]:
    if quick:
        return [{"d": 32, "tokens": 8, "rank": 2}]
    others = [
        {"d": d, "tokens": tokens, "rank": rank} for d in (512, 1024) for tokens in (32, 256, 1024) for rank in (1, 8, 64)
    ]
    return [HEADLINE, *(each for each in others if each != HEADLINE)]


def dense(quick: bool) -> Iterator[Record]:
    for setting in dense_settings(quick):
        case = cases.dense(**setting)
        whole = quick or case.rank == HEADLINE["rank"]
        budget = TINY if quick else HEADLINE_BUDGET if setting == HEADLINE else USUAL if whole else SHORT
        for each in steps(case, TRAINING if whole else ESSENTIAL, budget):
            yield each
            if each["variant"] == "full":
                yield computed_limit(each, limit(case))


def computed_limit(full: Record, ratio: float) -> Record:
    """The time that LoRA would take at the speed of full fine-tuning. It is not run."""
    return {**full, "variant": "limit", "median": full["median"] * ratio, "minimum": full["minimum"] * ratio, "repeats": 0}


def block(quick: bool) -> Iterator[Record]:
    size = {"width": 32, "length": 8, "batch": 2, "depth": 1, "rank": 2} if quick else {}
    for targets, names in {"all-linear": TRAINING, "query, value": ESSENTIAL}.items():
        yield from steps(cases.block(targets, **size), FEW if quick else names, TINY if quick else USUAL)


def convolution(quick: bool) -> Iterator[Record]:
    size = {"channels": 8, "size": 4, "batch": 2, "rank": 2} if quick else {}
    yield from steps(cases.convolution(**size), FEW if quick else TRAINING, TINY if quick else USUAL)


def embedding(quick: bool) -> Iterator[Record]:
    size = {"vocabulary": 100, "width": 16, "batch": 2, "length": 8, "rank": 2} if quick else {}
    yield from steps(cases.embedding(**size), TRAINING, TINY if quick else USUAL)


def hub(quick: bool) -> Iterator[Record]:
    size = {"depth": 1, "width": 24, "batch": 2, "rank": 2} if quick else {}
    names = FEW if quick else (*ESSENTIAL, "keras_lora DoRA")
    yield from steps(cases.hub(**size), names, TINY if quick else Budget(10, at_least=3))


def methods(quick: bool) -> Iterator[Record]:
    """A training step of every method, beside LoRA and full fine-tuning."""
    case = cases.dense(
        name="methods", **({"d": 32, "tokens": 8, "rank": 2} if quick else {"d": 512, "tokens": 256, "rank": 8})
    )
    names = ("full", "keras_lora", "keras_lora DoRA", *(f"keras_lora {each}" for each in METHODS))
    models = {name: prepare(name, case) for name in names}
    calls = {name: functools.partial(model.train_on_batch, case.x, case.y) for name, model in models.items()}
    yield from timed(case, "method step", calls, TINY if quick else Budget(20, 200, 20))
    for name, model in models.items():
        trained = sum(int(np.prod(v.shape)) for v in model.trainable_variables)
        yield record(case.name, case.setting, "trained by a method", "count", name, [trained])


def inference(quick: bool) -> Iterator[Record]:
    names = ("base", "base again", "enable_lora", "keras_lora", "keras_lora DoRA", "keras_lora merged")
    for tokens in (1, 32, 256) if not quick else (1, 2):
        size = {"d": 32, "rank": 2} if quick else {"d": 1024, "rank": 8}
        case = cases.dense(tokens=tokens, depth=6, name="inference", **size)
        models = {name: prepare(name, case) for name in names}
        calls: dict[str, Callable[[], Any]] = {
            name: functools.partial(model.predict_on_batch, case.x) for name, model in models.items()
        }
        if peers.available():
            found = peers.checked(case, models)
            del found["loralib"]  # which merges on `eval()`
            calls |= {name: peers.predict_call(peer, case) for name, peer in found.items()}
        budget = Budget(20, 1000, 20, times=10) if tokens == 1 else Budget(8, 1000, 20)
        yield from timed(case, "inference", calls, TINY if quick else budget)


def layers(quick: bool) -> Iterator[Record]:
    """Forward and backward of the layers alone, on torch: no optimizer, no training loop."""
    if not peers.available():
        return
    import torch

    for setting in dense_settings(quick):
        if not quick and setting["rank"] != HEADLINE["rank"]:
            continue
        case = cases.dense(**setting, name="layers")
        models = {name: prepare(name, case) for name in ("frozen", "keras_lora", "keras_lora DoRA")}
        found = peers.checked(case, models)
        x = torch.from_numpy(case.x)
        calls = {name: peers.keras_layers_call(model, x) for name, model in models.items()}
        calls |= {name: peers.layers_call(peer.module, peer.trained, x) for name, peer in found.items()}
        headline = {**HEADLINE_BUDGET._asdict(), "seconds": 15}
        budget = TINY if quick else Budget(**headline) if setting == HEADLINE else USUAL
        yield from timed(case, "layers", calls, budget)
