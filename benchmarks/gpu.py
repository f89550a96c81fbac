"""Measure on a GPU the ways to compute a layer with LoRA, and whole training steps. One command, for an H100:

    python benchmarks/gpu.py                                  # all engines; about twelve minutes, estimated
    python benchmarks/gpu.py --engine jax-jit                 # one again; the records of the others are kept
    python benchmarks/gpu.py --quick --json .cache/gpu.json   # tiny sizes, also on a CPU, to check that it runs

"layer" is the forward and backward pass of one bfloat16 layer by each plan, with the gradient of `x`. A and B are bfloat16
too, also in PEFT. "stack" is `train_on_batch` of a model in the shape of Llama-3.2-1B, with few layers, in mixed_bfloat16.
Each of its variants runs in a fresh process, because JAX cannot reset its peak of memory. "crossover" is derived from
"layer". If one engine fails, the others still run. What failed, or had no time left (`BUDGETS`), is in the file under
"failed" and "left out", and is printed at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import measuring
import numpy as np
from gpu_plans import Jax, Torch, check, wall_seconds
from measuring import Record, record
from run import write

HERE = Path(__file__).parent
ENGINES = {"torch-eager": "torch", "torch-compile": "torch", "jax-jit": "jax", "keras-torch": "torch", "keras-jax": "jax"}
BUDGETS = {"torch-eager": 80, "torch-compile": 170, "jax-jit": 200, "keras-torch": 60, "keras-jax": 60}  # seconds each
GRACE = 120  # seconds beyond the budget until a process is killed
SAMPLE = 2e-3  # seconds that a timed sample should take; shorter calls are repeated, else it would measure the waiting
H100_INTENSITY = 214  # bfloat16 FLOP that an H100 does in the time it moves one byte: as achieved, not the peak
STACK = ("full", "enable_lora", "keras_lora", "keras_lora base bfloat16")
NO_GPU = "No GPU was found, and times on a CPU mean nothing here. `--quick --json FILE` checks on a CPU that it runs."


class Sizes(NamedTuple):
    """What is measured, and how often. The most informative ranks come first."""

    ranks: tuple[int, ...] = (16, 64, 8, 256)
    widths: tuple[int, ...] = (1024, 2048, 4096, 8192)
    tokens: tuple[int, ...] = (2048, 8192, 16384)
    batches: tuple[tuple[int, int], ...] = ((4, 256), (8, 1024))  # of the stack, the smaller first
    llama: tuple[int, int, int, int] = (2048, 8192, 32, 8)  # width, width of the MLP, heads, heads of keys and values
    warm_up: int = 20
    repeats: int = 50
    seconds: float = 8.0  # after which a setting has no more than `LEAST` repeats
    least: int = 5


QUICK = Sizes((2,), (16, 32), (8,), ((2, 4),), (16, 32, 4, 2), warm_up=1, repeats=2, least=2)
QUICK_ENVIRONMENT = {**dict.fromkeys(measuring.THREADS, "1"), "XLA_FLAGS": "--xla_backend_optimization_level=0"}


@dataclass
class Outcome:
    """The results of one process."""

    gpu: str | None = None
    records: list[Record] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


# Measuring.


def take_turns(
    calls: dict[str, Callable[[], Any]],
    seconds: Callable[..., float],
    sizes: Sizes,
    failed: Callable[[str, Exception], None],
) -> dict[str, list[float]]:
    """The seconds of each call, by name. They take turns, every other turn backwards. One that fails first is left out."""
    times: dict[str, list[float]] = {}
    repeated = {}
    for name, call in calls.items():
        try:
            seconds(call, 1)  # compiles
            repeated[name] = min(50, max(1, round(SAMPLE / seconds(call, 1))))
            times[name] = []
        except Exception as error:
            failed(name, error)
    end = time.monotonic() + sizes.seconds
    for turn in range(sizes.warm_up + sizes.repeats):
        if turn >= sizes.warm_up + sizes.least and time.monotonic() > end:
            break
        for name in times if turn % 2 == 0 else reversed(times):
            times[name].append(seconds(calls[name], repeated[name]))
    return {name: each[sizes.warm_up :] for name, each in times.items()}


def words(*what: Any) -> str:
    """A setting as text, followed by other words."""
    written = (
        ", ".join(f"{key} {value}" for key, value in each.items()) if isinstance(each, dict) else each for each in what
    )
    return ": ".join(map(str, written))


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def measure_layers(name: str, sizes: Sizes, outcome: Outcome, save: Callable[[], None]) -> None:
    """Forward and backward of one layer by each plan."""
    engine = Jax() if name == "jax-jit" else Torch(compiled=name == "torch-compile")
    with exact_products(name):
        check(engine)
    if ENGINES[name] == "torch" and importlib.util.find_spec("peft") is None:
        outcome.left_out.append(f"engine {name}: PEFT: not installed")
    end = time.monotonic() + BUDGETS[name]
    for rank, d, tokens in ((r, d, n) for r in sizes.ranks for d in sizes.widths for n in sizes.tokens):
        setting = {"engine": name, "d": d, "tokens": tokens, "rank": rank}
        if time.monotonic() > end:
            outcome.left_out.append(words(setting, "no time left"))
            continue
        measure_layer(engine, setting, sizes, outcome)
        save()


def measure_layer(engine: Torch | Jax, setting: dict[str, Any], sizes: Sizes, outcome: Outcome) -> None:
    def failed(plan: str, error: Exception) -> None:
        outcome.failed.append(words(setting, plan, reason(error)))

    try:
        steps = engine.steps(engine.inputs(setting["d"], setting["tokens"], setting["rank"], "bfloat16"))
        times = take_turns(steps, engine.seconds, sizes, failed)
    except Exception as error:
        failed("all plans", error)
        return
    made = [record("layer", setting, "layers", "s", plan, each) for plan, each in times.items()]
    outcome.records += made
    print(words(setting, ", ".join(f"{each['variant']} {each['median'] * 1000:.3f} ms" for each in made)), flush=True)


def exact_products(engine: str) -> Any:
    """Compute float32 products in float32: on a GPU, JAX uses shorter numbers for them by default."""
    if ENGINES[engine] == "torch":
        return contextlib.nullcontext()
    import jax

    return jax.default_matmul_precision("highest")


def measure_stack(name: str, variants: list[str], layers: int, sizes: Sizes, outcome: Outcome) -> None:
    """Seconds and peak of memory of a training step."""
    if importlib.util.find_spec("keras_hub") is None:
        outcome.left_out.append(f"engine {name}: keras_hub is not installed")
        return
    import keras

    keras.config.set_dtype_policy("mixed_bfloat16")
    for variant, (batch, length) in ((v, b) for v in variants for b in sizes.batches):
        gc.collect()  # the model before
        measure_step(name, variant, llama(name, layers, batch, length, sizes), sizes, outcome)


def measure_step(name: str, variant: str, case: Any, sizes: Sizes, outcome: Outcome) -> None:
    def failed(_: str, error: Exception) -> None:
        outcome.failed.append(words(case.setting, variant, reason(error)))

    try:
        step = functools.partial(prepare(variant, case).train_on_batch, case.x, case.y)  # it returns numbers, so it waits
        times = take_turns({variant: step}, lambda call, n: wall_seconds(call, n, lambda _: None), sizes, failed)
        peak = peak_bytes(name) if outcome.gpu else None
    except Exception as error:
        failed(variant, error)
        return
    for seconds in times.values():
        outcome.records.append(record("stack", case.setting, "step", "s", variant, seconds))
        if peak:
            outcome.records.append(record("stack", case.setting, "peak bytes", "bytes", variant, [peak]))


def llama(engine: str, layers: int, batch: int, length: int, sizes: Sizes) -> Any:
    """A model in the shape of Llama-3.2-1B: few layers, random weights, a small vocabulary, a head of two classes."""
    import keras
    import keras_hub
    from cases import Case

    width, inner, heads, key_value_heads = sizes.llama

    def build() -> keras.Model:
        backbone = keras_hub.models.LlamaBackbone(1024, layers, heads, width, inner, key_value_heads, 500000)
        mean = keras.layers.GlobalAveragePooling1D()(backbone.output)
        return keras.Model(backbone.input, keras.layers.Dense(2, name="head", dtype="float32")(mean))

    rng = np.random.default_rng(0)
    ids = rng.integers(0, 1024, (batch, length), dtype="int32")
    setting = {"engine": engine, "layers": layers, "width": width, "batch": batch, "length": length, "rank": sizes.ranks[0]}
    x = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    return Case("stack", setting, build, x, rng.normal(size=(batch, 2)).astype("float32"), train="head")


def prepare(variant: str, case: Any) -> Any:
    import keras
    import variants

    import keras_lora

    model = case.build()
    if variant in variants.VARIANTS:
        variants.VARIANTS[variant](model, case)
    else:
        keras_lora.apply_lora(model, rank=case.rank, train=case.train, head=case.train, base_dtype="bfloat16")
    model.compile(keras.optimizers.Adam(1e-4), "mse")
    return model


def peak_bytes(engine: str) -> int:
    """The most GPU memory that this process has used so far. It is right because batches go from small to large."""
    if ENGINES[engine] == "torch":
        import torch

        return torch.cuda.max_memory_allocated()
    import jax

    return jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]


def crossover(records: list[Record]) -> Iterator[Record]:
    """For each setting the fastest plan that trains, and the overhead of each plan over "frozen", measured and predicted."""
    settings: dict[str, dict[str, Record]] = {}
    for each in records:
        if each["case"] == "layer":
            settings.setdefault(json.dumps(each["setting"]), {})[each["variant"]] = each
    for plans in settings.values():
        frozen, setting = plans.pop("frozen", None), next(iter(plans.values()))["setting"]
        if plans:
            fastest = min(plans.values(), key=lambda each: each["median"])
            yield {**fastest, "case": "crossover", "quantity": "fastest plan"}
        if frozen:
            shares = {plan: each["median"] / frozen["median"] - 1 for plan, each in plans.items()}
            # k passes over the activations, of 2 bytes each
            shares |= {f"predicted, k = {k}": k * 2 * H100_INTENSITY / (4 * setting["d"]) for k in (16, 8, 3)}
            for plan, share in shares.items():
                yield record("crossover", setting, "overhead over frozen", "count", plan, [share])


# The processes.


def gpu_of(engine: str) -> str | None:
    """The GPU that the backend of an engine sees."""
    if ENGINES[engine] == "torch":
        import torch  # before TensorFlow, which KerasHub imports: the other order crashes in one process

        return torch.cuda.get_device_name() if torch.cuda.is_available() else None
    import jax

    return jax.devices()[0].device_kind if jax.default_backend() == "gpu" else None


def work(engine: str, variants: list[str], layers: int, quick: bool, path: Path) -> None:
    """The work of one process. It writes results as it goes, so that they are kept if it dies."""
    outcome, sizes = Outcome(gpu=gpu_of(engine)), QUICK if quick else Sizes()

    def save() -> None:
        write(path, json.dumps(asdict(outcome)))

    try:
        if not outcome.gpu and not quick:
            raise RuntimeError(f"{ENGINES[engine]} sees no GPU")
        if variants:
            measure_stack(engine, variants, layers, sizes, outcome)
        else:
            measure_layers(engine, sizes, outcome, save)
    except Exception as error:
        traceback.print_exc()
        outcome.failed.append(words(f"engine {engine}", reason(error)))
    save()


def run_engine(engine: str, layers: int, quick: bool) -> list[Outcome]:
    """Run the processes of an engine, one for each variant of a stack. A quick run has one, since starting takes long."""
    stacks = [list(STACK)] if quick else [[each] for each in STACK]
    found = []
    for variants in stacks if engine.startswith("keras") else [[]]:
        print(f"\n{engine} {', '.join(variants)}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "outcome.json"
            command = [sys.executable, __file__, "--work", str(path), "--engine", engine, "--layers", str(layers)]
            command += [*(["--quick"] if quick else []), *(f"--variant={each}" for each in variants)]
            environment = {**os.environ, "KERAS_BACKEND": ENGINES[engine], "TF_CPP_MIN_LOG_LEVEL": "3"}
            environment |= QUICK_ENVIRONMENT if quick else {}
            try:
                code: int | str = subprocess.run(
                    command, env=environment, timeout=BUDGETS[engine] + GRACE, check=False
                ).returncode
            except subprocess.TimeoutExpired:
                code = "out of time"
            outcome = Outcome(**json.loads(path.read_text())) if path.exists() else Outcome()
        if code != 0:
            outcome.failed.append(words(f"engine {engine}", ", ".join(variants) or "all plans", f"the process died: {code}"))
        found.append(outcome)
    return found


def result_of(outcomes: list[Outcome], quick: bool, path: Path, seconds: float) -> dict[str, Any]:
    """The new contents of the file: these results, and the old ones of other engines if they are of the same machine."""
    failed = [each for outcome in outcomes for each in outcome.failed]
    left_out = [each for outcome in outcomes for each in outcome.left_out]
    records = [each for outcome in outcomes for each in outcome.records]
    gpus = {outcome.gpu for outcome in outcomes if outcome.records}
    machine = {key: each for key, each in measuring.machine().items() if key != "pinned core"}
    about = {
        "backend": "gpu",
        "versions": measuring.versions(),
        "machine": {"gpu": gpus.pop() if len(gpus) == 1 else None, **machine},
        "quick": quick,
    }
    old = json.loads(path.read_text()) if path.exists() else {"records": []}
    if all(old.get(key) == each for key, each in about.items()):
        new = {each["setting"]["engine"] for each in records}
        kept = [each for each in old["records"] if each["setting"]["engine"] not in new and each["case"] != "crossover"]
        records, seconds = kept + records, seconds + (old["seconds"] if kept else 0)
        others = {f"engine {each['setting']['engine']}" for each in kept}
        failed = [each for each in old["failed"] if re.split("[,:]", each)[0] in others] + failed
        left_out = [each for each in old["left out"] if re.split("[,:]", each)[0] in others] + left_out
    elif old["records"]:
        print(f"The records in {path} are of another machine or of other versions, so they are replaced.")
    date = time.strftime("%Y-%m-%d")
    told = {"failed": failed, "left out": left_out}
    return {**about, "date": date, "seconds": round(seconds), "records": [*records, *crossover(records)], **told}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", action="append", choices=ENGINES, help="may be given several times; all by default")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write; benchmarks/results/gpu.json by default")
    parser.add_argument("--layers", type=int, default=4, help="number of layers of the stack")
    parser.add_argument("--quick", action="store_true", help="tiny sizes; needs --json")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--variant", action="append", default=[], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        return work(arguments.engine[0], arguments.variant, arguments.layers, arguments.quick, arguments.work)
    if arguments.quick and arguments.json is None:
        parser.error("--quick needs --json FILE, so that its meaningless numbers do not replace real ones.")
    if not arguments.quick and not any(Path("/dev").glob("nvidia*")) and shutil.which("nvidia-smi") is None:
        sys.exit(NO_GPU)
    start, path = time.monotonic(), arguments.json or HERE / "results" / "gpu.json"
    engines = arguments.engine or ENGINES
    outcomes = [each for engine in engines for each in run_engine(engine, arguments.layers, arguments.quick)]
    failed = [each for outcome in outcomes for each in outcome.failed]
    left_out = [each for outcome in outcomes for each in outcome.left_out]
    if any(outcome.records for outcome in outcomes):
        result = result_of(outcomes, arguments.quick, path, time.monotonic() - start)
        write(path, json.dumps(result, indent=1) + "\n")
    for each in left_out:
        print(f"LEFT OUT: {each}")
    if failed:
        sys.exit("\n".join(f"FAILED: {each}" for each in failed))


if __name__ == "__main__":
    main()
