"""Does LoRA lose quality? Fits of every arm on three real tasks, with rates swept for every arm, and five seeds at the best.

    python benchmarks/learning.py                     # everything that has no result yet, task by task
    python benchmarks/learning.py --task table        # one task
    python benchmarks/learning.py --task text --arms full "LoRA rank 8" --most 10

Each fit is written to `results/learning/<task>.json` as it ends, so a run that is cut off goes on where it was. Rates are
chosen on the validation part with two seeds of their own. The best rate of each arm then gets five other seeds, and the test
part. `learning_page.py` writes the page.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np
from learning_tasks import TASKS, Task

import keras_lora

RESULTS = Path(__file__).with_name("results") / "learning"
SWEEP_SEEDS, SEEDS = (100, 101), (0, 1, 2, 3, 4)

Apply = Callable[[keras.Model, Task], None]


def only_the_head(model: keras.Model, task: Task) -> None:
    for layer in model.layers:
        layer.trainable = layer.name == task.head


def everything(model: keras.Model, task: Task) -> None:
    model.trainable = True


def adapted(adapter: Any, **arguments: Any) -> Apply:
    def apply(model: keras.Model, task: Task) -> None:
        keras_lora.apply_lora(model, adapter, targets=task.targets, train=task.head, **arguments)

    return apply


#: How the model is prepared, and the name of the sweep: an arm is compared at the best rate of its own.
ARMS: dict[str, tuple[Apply, str]] = {
    "frozen": (only_the_head, "frozen"),
    "LoRA rank 1": (adapted(keras_lora.LoRA(rank=1)), "adapter"),
    "LoRA rank 8": (adapted(keras_lora.LoRA(rank=8)), "adapter"),
    "LoRA rank 8, biases": (adapted(keras_lora.LoRA(rank=8), bias="all"), "adapter"),
    "LoRA rank 32": (adapted(keras_lora.LoRA(rank=32)), "adapter"),
    "DoRA rank 8": (adapted(keras_lora.DoRA(rank=8)), "adapter"),
    "full": (everything, "full"),
}


def fit(task: Task, data: dict[str, Any], arm: str, rate: float, seed: int, part: str) -> dict[str, Any]:
    """Train a fresh model in one way, and measure it on one part."""
    keras.backend.clear_session()
    gc.collect()
    keras.utils.set_random_seed(seed)
    model = task.build()
    keras.utils.set_random_seed(seed)
    ARMS[arm][0](model, task)
    steps = task.epochs * math.ceil(len(data["train"][1]) / task.batch)
    schedule = keras.optimizers.schedules.CosineDecay(0.0, steps - steps // 10, warmup_target=rate, warmup_steps=steps // 10)
    model.compile(keras.optimizers.AdamW(schedule, weight_decay=0.0), task.loss)
    ends: list[float] = []  # CPU seconds at the end of each step; the first, which compiles, gives no difference
    timer = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: ends.append(time.process_time()))
    history = model.fit(*data["train"], batch_size=task.batch, epochs=task.epochs, callbacks=[timer], verbose=0)
    found = {
        "arm": arm,
        "rate": rate,
        "seed": seed,
        "part": part,
        "score": scored(model, task, data[part]),
        "loss": float(history.history["loss"][-1]),
        "trained": sum(math.prod(v.shape) for v in model.trainable_variables),
        "bytes": bytes_of(model),
        "cpu s/step": float(np.median(np.diff(ends))),
    }
    if "before" in data:
        found["before"] = scored(model, task, data["before"])
    return found


def scored(model: keras.Model, task: Task, data: Any) -> float:
    return task.score(model.predict(data[0], batch_size=500, verbose=0), data[1])


def bytes_of(model: keras.Model) -> int:
    """The bytes of the smallest file with the result: the adapter, or what trained in float32."""
    if not keras_lora.list_adapters(model):
        return 4 * sum(math.prod(v.shape) for v in model.trainable_variables)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        keras_lora.save_adapter(model, path)
        return path.stat().st_size


def best_rate(task: Task, arm: str, fits: list[dict[str, Any]]) -> float | None:
    """The rate with the best mean on the validation part, or `None` before the sweep is whole."""
    rates = task.rates[ARMS[arm][1]]
    means = {}
    for rate in rates:
        scores = [each["score"] for each in fits if (each["arm"], each["rate"], each["part"]) == (arm, rate, "validation")]
        if len(scores) < len(SWEEP_SEEDS):
            return None
        means[rate] = float(np.mean(scores))
    return max(means, key=means.__getitem__)


def missing(task: Task, arms: list[str], fits: list[dict[str, Any]]) -> Iterator[tuple[str, float, int, str]]:
    """The fits without a result, in their order. `fits` may grow while this goes on."""

    def done(arm: str, rate: float, seed: int, part: str) -> bool:
        wanted = {"arm": arm, "rate": rate, "seed": seed, "part": part}
        return any(wanted.items() <= each.items() for each in fits)

    for arm in arms:
        for seed in SWEEP_SEEDS:
            for rate in task.rates[ARMS[arm][1]]:
                if not done(arm, rate, seed, "validation"):
                    yield arm, rate, seed, "validation"
    for seed in SEEDS:
        for arm in arms:
            best = best_rate(task, arm, fits)
            if best is not None and not done(arm, best, seed, "test"):
                yield arm, best, seed, "test"


def read(task: Task) -> list[dict[str, Any]]:
    path = RESULTS / f"{task.name}.json"
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    if found["settings"] != task.settings():
        raise SystemExit(f"{path} is from other settings: {found['settings']}. Delete it to measure again.")
    fits: list[dict[str, Any]] = found["fits"]
    return fits


def write(task: Task, fits: list[dict[str, Any]]) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{task.name}.json"
    versions = {"keras": keras.__version__, "backend": keras.backend.backend()}
    rows = ",\n".join("  " + json.dumps(each) for each in fits)
    head = json.dumps({"settings": task.settings(), "versions": versions, "date": time.strftime("%Y-%m-%d")}, indent=1)
    aside = path.with_suffix(".part")
    aside.write_text(f'{head[:-2]},\n "fits": [\n{rows}\n ]\n}}\n')
    aside.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(TASKS), action="append", help="a task; all of them by default")
    parser.add_argument("--arms", choices=list(ARMS), nargs="+", default=list(ARMS), help="the arms; all by default")
    parser.add_argument("--most", type=int, default=10**6, help="stop after this many fits")
    arguments = parser.parse_args()
    for name in arguments.task or TASKS:
        task, fits, data = TASKS[name], read(TASKS[name]), None
        for arm, rate, seed, part in missing(task, arguments.arms, fits):
            if arguments.most <= 0:
                return
            arguments.most -= 1
            data = data or task.load()
            start = time.perf_counter()
            fits.append(fit(task, data, arm, rate, seed, part))
            write(task, fits)
            seconds = time.perf_counter() - start
            print(
                f"{name}, {arm}, rate {rate:g}, seed {seed}, {part}: {fits[-1]['score']:.2f} ({seconds:.0f} s)", flush=True
            )


if __name__ == "__main__":
    main()
