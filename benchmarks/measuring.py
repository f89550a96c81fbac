"""How time is measured, and the record of a measurement."""

from __future__ import annotations

import gc
import importlib.metadata
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

WARM_UP = 3
PACKAGES = ("keras", "jax", "tensorflow-cpu", "tensorflow", "torch", "keras-hub", "keras_lora", "numpy", "peft", "loralib")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS")


class Budget(NamedTuple):
    """How long the variants of one setting take turns."""

    seconds: float
    rounds: int = 60
    at_least: int = 5
    times: int = 1  # calls in one turn, because one call of a millisecond is too short to measure


class Record(TypedDict):
    """One measurement. `case` is the name of the group that made it."""

    case: str
    setting: dict[str, Any]
    quantity: str
    unit: str  # "s", "bytes", "flops" or "count"
    variant: str
    median: float
    minimum: float
    repeats: int


def record(case: str, setting: dict[str, Any], quantity: str, unit: str, variant: str, values: list[float]) -> Record:
    return {
        "case": case,
        "setting": setting,
        "quantity": quantity,
        "unit": unit,
        "variant": variant,
        "median": statistics.median(values),
        "minimum": min(values),
        "repeats": len(values),
    }


def pin(backend: str) -> None:
    """Limit this process to one core and one thread. Call it before a backend is imported."""
    os.environ["KERAS_BACKEND"] = backend
    os.environ.update(dict.fromkeys(THREADS, "1"))
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false".strip()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    core = int(os.environ.get("BENCH_CORE", max(os.sched_getaffinity(0))))
    os.sched_setaffinity(0, {core})
    if backend == "torch":
        import torch  # before TensorFlow, which KerasHub imports: the other order crashes in one process

        torch.set_num_threads(1)
    elif backend == "tensorflow":
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.threading.set_inter_op_parallelism_threads(1)


def interleaved(
    calls: Mapping[str, Callable[[], Any]], seconds: float, rounds: int, at_least: int = 5, times: int = 1
) -> dict[str, list[float]]:
    """The CPU seconds of each call, by name. The calls take turns, so that a busy machine slows all of them alike.

    After the warm-up there are up to `rounds` turns: as many as begin within `seconds`, but at least `at_least`. The order
    is random in each turn, because what ran before has an effect. Garbage is collected only between turns.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    draw = random.Random(0)
    for _ in range(WARM_UP):
        for call in calls.values():
            call()
    gc.collect()
    gc.freeze()  # otherwise every collection walks through the backend
    gc.disable()
    try:
        end, turn = time.monotonic() + seconds, 0
        while turn < at_least or (turn < rounds and time.monotonic() < end):
            for name in draw.sample(list(calls), len(calls)):
                found[name].append(cpu_seconds(calls[name], times))
            gc.collect()
            turn += 1
    finally:
        gc.enable()
        gc.unfreeze()
    return found


def cpu_seconds(call: Callable[[], Any], times: int = 1) -> float:
    """The CPU time of this process that one call takes, on all its threads: the mean of `times` calls."""
    start = time.process_time()
    for _ in range(times):
        call()
    return (time.process_time() - start) / times


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """The machine as this process sees it; call it after `pin`."""
    cpu = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return {
        "cpu": cpu[0] if cpu else platform.processor(),
        "cores": os.cpu_count(),
        "pinned core": sorted(os.sched_getaffinity(0)),
        "memory GiB": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
    }


def load_average() -> float:
    return round(os.getloadavg()[0], 2)
