"""The groups that count bytes and FLOPs, which works on a busy machine too, and the peak of memory."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cases
import keras
import numpy as np
from cases import Case
from measuring import Record, cpu_seconds, record
from variants import ESSENTIAL, prepare

import keras_lora

WORKER = Path(__file__).with_name("worker.py")


def count(quick: bool) -> Iterator[Record]:
    """FLOPs and temporary bytes (JAX) or saved bytes (torch) of one training step, and bytes on disk."""
    size = {"d": 32, "rank": 2} if quick else {"d": 1024, "rank": 8}
    for tokens in (8,) if quick else (32, 256, 1024):
        case = cases.dense(tokens=tokens, name="bytes", **size)
        for variant in (*ESSENTIAL, "keras_lora DoRA"):
            model = prepare(variant, case)
            for (quantity, unit), value in {**step_costs(model, case), **kept_costs(model, variant)}.items():
                yield record(case.name, case.setting, quantity, unit, variant, [value])


def step_costs(model: keras.Model, case: Case) -> dict[tuple[str, str], int]:
    if keras.backend.backend() == "jax":
        return xla_costs(model, case)
    if keras.backend.backend() == "torch":
        return {("saved bytes", "bytes"): torch_saved_bytes(model, case)}
    return {}


def xla_costs(model: keras.Model, case: Case) -> dict[tuple[str, str], int]:
    """XLA's counts for the gradient of the loss with respect to what trains."""
    import jax

    def loss(trained: Any, frozen: Any, x: Any) -> Any:
        y, _ = model.stateless_call(trained, frozen, x, training=True)
        return keras.ops.mean(y * y)

    trained = [v.value for v in model.trainable_variables]
    frozen = [v.value for v in model.non_trainable_variables]
    compiled = jax.jit(jax.grad(loss)).lower(trained, frozen, case.x).compile()
    return {
        ("flops", "flops"): int(compiled.cost_analysis()["flops"]),
        ("temp bytes", "bytes"): compiled.memory_analysis().temp_size_in_bytes,
    }


def torch_saved_bytes(model: keras.Model, case: Case) -> int:
    """Bytes of the tensors kept for the backward pass, each storage once, without the weights."""
    import torch

    own = {v.value.untyped_storage().data_ptr() for v in model.variables}
    saved: dict[int, Any] = {}  # the storages are kept; otherwise an address could be used again

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(torch.from_numpy(case.x), training=True)
        (y * y).mean()
    return sum(storage.nbytes() for storage in saved.values())


def kept_costs(model: keras.Model, variant: str) -> dict[tuple[str, str], int]:
    """Bytes of what trains, of the optimizer's variables for it (without scalars), and of the file with the result."""
    model.optimizer.build(model.trainable_variables)
    moments = [v for v in model.optimizer.variables if len(v.shape) > 0]
    with tempfile.TemporaryDirectory() as folder:
        if variant.startswith("keras_lora"):
            path = Path(folder) / "adapter.safetensors"
            keras_lora.save_adapter(model, path)
        else:
            path = Path(folder) / "model.weights.h5"
            keras.Model(model.inputs, model.outputs).save_weights(path)  # the same layers, without the optimizer
        checkpoint = path.stat().st_size
    return {
        ("trainable parameters", "count"): sum(int(np.prod(v.shape)) for v in model.trainable_variables),
        ("optimizer bytes", "bytes"): sum(int(np.prod(v.shape)) * 4 for v in moments),
        ("checkpoint bytes", "bytes"): checkpoint,
    }


def memory(quick: bool) -> Iterator[Record]:
    """Peak memory and the seconds of the first step, each in a fresh process."""
    for name, case in isolated_cases(quick).items():
        for variant in ("full", "keras_lora") if quick else ESSENTIAL:
            command = [sys.executable, str(WORKER), "--isolated", name, variant, *(["--quick"] if quick else [])]
            environment = {**os.environ, "KERAS_BACKEND": keras.backend.backend()}
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            found = json.loads(done.stdout.splitlines()[-1])
            setting = {"model": name, **case.setting}
            yield record("memory", setting, "peak bytes", "bytes", variant, [found["peak bytes"]])
            yield record("memory", setting, "first step", "s", variant, [found["first step"]])


def isolated_cases(quick: bool) -> dict[str, Case]:
    if quick:
        return {"dense": cases.dense(32, 8, 2, depth=2)}
    return {"dense": cases.dense(1024, 256, 8, depth=16), "hub": cases.hub()}


def isolated(name: str, variant: str, quick: bool) -> None:
    """The work of the fresh process: build, compile, three steps."""
    case = isolated_cases(quick)[name]
    before = peak_bytes()
    with contextlib.redirect_stdout(sys.stderr):
        model = prepare(variant, case)
        first = cpu_seconds(lambda: model.train_on_batch(case.x, case.y))
        for _ in range(2):
            model.train_on_batch(case.x, case.y)
    print(json.dumps({"peak bytes": peak_bytes() - before, "first step": first}))


def peak_bytes() -> int:
    """The most memory this process has used. `ru_maxrss` would start at the size of the process that started it."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
