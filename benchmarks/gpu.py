"""What a GPU says of the ways to compute a layer with LoRA, and of whole training steps. One command, for an H100:

    python benchmarks/gpu.py                                  # all engines, about twelve minutes
    python benchmarks/gpu.py --engine jax-jit                 # one again; the records of the others stay
    python benchmarks/gpu.py --quick --json .cache/gpu.json  # tiny sizes, on a CPU too: shows that it runs

"layer" is forward and backward of one bfloat16 layer (A and B too, PEFT's as well) by each plan, with the gradient of `x`.
"stack" is `train_on_batch` of a Llama-3.2-1B in shape, of few layers, in mixed_bfloat16, each variant in a fresh process,
since JAX cannot reset its peak of memory. "crossover" is derived from "layer". No engine stops another: what failed, or had
no time left (`BUDGETS`), is in the file under "failed" and "left out", and printed at the end.
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
from measuring import Record, record
from run import write

HERE = Path(__file__).parent
ENGINES = {"torch-eager": "torch", "torch-compile": "torch", "jax-jit": "jax", "keras-torch": "torch", "keras-jax": "jax"}
BUDGETS = {"torch-eager": 80, "torch-compile": 170, "jax-jit": 200, "keras-torch": 60, "keras-jax": 60}  # seconds a process
GRACE = 120  # seconds beyond the budget until a process is killed
SAMPLE = 2e-3  # seconds a timed sample should take: a shorter call is repeated in it, as one would measure the waiting
SCALE = 2.0
TRAINED = {"frozen": "x", "full": "xw"}  # what has a gradient; in the other plans "xab"
TOLERANCE = 1e-4
H100_INTENSITY = 214  # FLOP that an H100 does, in bfloat16, in the time of moving one byte: what is achieved, not the peak
STACK = ("full", "enable_lora", "keras_lora", "keras_lora base bfloat16")
NO_GPU = "No GPU was found, and only a GPU's times mean anything here. `--quick --json FILE` shows on a CPU that it runs."

Inputs = dict[str, Any]  # x, w, a, b and dy
Plan = Callable[..., Any]  # from x, w, a and b to y
Step = Callable[[], tuple[Any, ...]]  # forward and backward: y, then the gradients of what trains


class Sizes(NamedTuple):
    """What is measured, the ranks that say most first, and how often."""

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
    """What a process found."""

    gpu: str | None = None
    records: list[Record] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


# The plans for one layer.


class Torch:
    """The plans on torch, eager or compiled."""

    def __init__(self, compiled: bool):
        import torch

        self.torch, self.compiled = torch, compiled
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.plans = torch_plans()

    def inputs(self, d: int, tokens: int, rank: int, dtype: str) -> Inputs:
        made = functools.partial(self.torch.randn, device=self.device, dtype=getattr(self.torch, dtype))
        return {name: made(shape) * scale for name, (shape, scale) in shapes(d, tokens, rank).items()}

    def steps(self, inputs: Inputs) -> dict[str, Step]:
        self.torch._dynamo.reset()  # else the ninth shape of a function would run uncompiled
        made = {name: self.step(name, plan, inputs) for name, plan in self.plans.items()}
        return {**made, "PEFT": self.peft_step(**inputs)} if importlib.util.find_spec("peft") else made

    def step(self, name: str, plan: Plan, inputs: Inputs) -> Step:
        trained, forward = TRAINED.get(name, "xab"), self.ready(plan)
        leaves = {each: inputs[each].detach().requires_grad_(each in trained) for each in "xwab"}
        wanted = [leaves[each] for each in trained]

        def call() -> tuple[Any, ...]:
            y = forward(**leaves)
            return y, *self.torch.autograd.grad(y, wanted, inputs["dy"])

        return call

    def peft_step(self, x: Any, w: Any, a: Any, b: Any, dy: Any) -> Step:
        from peft import LoraConfig, get_peft_model

        base = self.torch.nn.Sequential(self.torch.nn.Linear(*w.shape, bias=False, device=w.device, dtype=w.dtype))
        config = LoraConfig(r=a.shape[1], lora_alpha=int(SCALE * a.shape[1]), target_modules=["0"])
        layer = get_peft_model(base, config, autocast_adapter_dtype=False).base_model.model[0]
        factors = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        with self.torch.no_grad():
            for parameter, value in zip([layer.base_layer.weight, *factors], [w, a, b], strict=True):
                parameter.copy_(value.T)
        x, forward = x.detach().requires_grad_(), self.ready(layer)

        def call() -> tuple[Any, ...]:
            y = forward(x)
            dx, da, db = self.torch.autograd.grad(y, [x, *factors], dy)
            return y, dx, da.T, db.T

        return call

    def ready(self, plan: Plan) -> Plan:
        """The CPU does without a C++ compiler: there only the tracing is of interest."""
        backend = "inductor" if self.device == "cuda" else "aot_eager"
        return self.torch.compile(plan, dynamic=False, backend=backend) if self.compiled else plan

    def seconds(self, call: Callable[[], Any], times: int) -> float:
        if self.device == "cpu":
            return wall_seconds(call, times, lambda result: None)
        start, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / times

    def numbers(self, array: Any) -> np.ndarray:
        return array.detach().cpu().double().numpy()


def torch_plans() -> dict[str, Plan]:
    import torch

    from keras_lora.backend import low_rank_sum

    class Hybrid(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any, w: Any, a: Any, b: Any) -> Any:
            changed = torch.addmm(w, a, b, alpha=SCALE)
            ctx.save_for_backward(x, changed, a, b)
            return x @ changed

        @staticmethod
        def backward(ctx: Any, dy: Any) -> tuple[Any, ...]:
            x, changed, a, b = ctx.saved_tensors
            return dy @ changed.T, None, x.T @ (dy @ (SCALE * b).T), (SCALE * (x @ a)).T @ dy

    return {
        **shared_plans(),
        "addmm": lambda x, w, a, b: torch.addmm(x @ w, x @ a, b, alpha=SCALE),
        "keras_lora": lambda x, w, a, b: low_rank_sum(x, a, b, SCALE, kernel=w),
        "hybrid": lambda x, w, a, b: Hybrid.apply(x, w, a, b),
    }


class Jax:
    """The plans on JAX, under jit."""

    def __init__(self) -> None:
        import jax

        self.jax, self.plans = jax, jax_plans()
        self.jitted = functools.cache(self.jitted_step)

    def inputs(self, d: int, tokens: int, rank: int, dtype: str) -> Inputs:
        keys, normal = self.jax.random.split(self.jax.random.key(0), 5), self.jax.random.normal
        pairs = zip(keys, shapes(d, tokens, rank).items(), strict=True)
        return {name: normal(key, shape, dtype) * scale for key, (name, (shape, scale)) in pairs}

    def steps(self, inputs: Inputs) -> dict[str, Step]:
        return {name: self.step(name, plan, inputs) for name, plan in self.plans.items()}

    def step(self, name: str, plan: Plan, inputs: Inputs) -> Step:
        trained = TRAINED.get(name, "xab")
        used = {each: inputs[each] for each in ("xw" if name in TRAINED else "xwab")}  # else each rank compiles "full" anew
        return functools.partial(self.jitted(plan, trained), used, inputs["dy"])

    def jitted_step(self, plan: Plan, trained: str) -> Callable[..., Any]:
        def step(inputs: Inputs, dy: Any) -> tuple[Any, ...]:
            y, pull = self.jax.vjp(
                lambda *wanted: plan(**{"a": None, "b": None, **inputs, **dict(zip(trained, wanted, strict=True))}),
                *(inputs[each] for each in trained),
            )
            return y, *pull(dy)  # without y, XLA would leave the forward pass out

        return self.jax.jit(step)

    def seconds(self, call: Callable[[], Any], times: int) -> float:
        return wall_seconds(call, times, self.jax.block_until_ready)

    def numbers(self, array: Any) -> np.ndarray:
        return np.asarray(array, "float64")


def jax_plans() -> dict[str, Plan]:
    import jax

    from keras_lora.backend import low_rank_sum

    @jax.custom_vjp
    def hybrid(x: Any, w: Any, a: Any, b: Any) -> Any:
        return x @ (w + SCALE * (a @ b))

    def forward(x: Any, w: Any, a: Any, b: Any) -> tuple[Any, Any]:
        changed = w + SCALE * (a @ b)
        return x @ changed, (x, changed, a, b)

    def backward(saved: Any, dy: Any) -> tuple[Any, ...]:
        x, changed, a, b = saved
        return dy @ changed.T, None, x.T @ (dy @ (SCALE * b).T), (SCALE * (x @ a)).T @ dy

    hybrid.defvjp(forward, backward)
    return {
        **shared_plans(),
        "keras_lora": lambda x, w, a, b: low_rank_sum(x, a, b, SCALE, y=x @ w),
        "hybrid": lambda x, w, a, b: hybrid(x, w, a, b),
    }


def shared_plans() -> dict[str, Plan]:
    """What is written alike for torch and JAX."""
    return {
        "frozen": lambda x, w, a, b: x @ w,
        "full": lambda x, w, a, b: x @ w,
        "built-in": lambda x, w, a, b: x @ (w + SCALE * (a @ b)),
        "plain": lambda x, w, a, b: x @ w + SCALE * ((x @ a) @ b),
    }


def shapes(d: int, tokens: int, rank: int) -> dict[str, tuple[tuple[int, int], float]]:
    """The shapes of the inputs, and what their normal numbers are multiplied with."""
    few = {"a": ((d, rank), d**-0.5), "b": ((rank, d), rank**-0.5)}
    return {"x": ((tokens, d), 1.0), "w": ((d, d), d**-0.5), **few, "dy": ((tokens, d), 1.0)}


def wall_seconds(call: Callable[[], Any], times: int, wait: Callable[[Any], Any]) -> float:
    start = time.perf_counter()
    for _ in range(times):
        result = call()
    wait(result)
    return (time.perf_counter() - start) / times


def expected(plan: str, x: Any, w: Any, a: Any, b: Any, dy: Any) -> dict[str, np.ndarray]:
    """The output and the gradients of a plan, by the formulas."""
    changed = w if plan in TRAINED else w + SCALE * a @ b
    found = {"x": dy @ changed.T, "w": x.T @ dy, "a": SCALE * x.T @ (dy @ b.T), "b": SCALE * (x @ a).T @ dy}
    return {"y": x @ changed} | {each: found[each] for each in TRAINED.get(plan, "xab")}


def check(engine: Torch | Jax) -> None:
    """Raise unless every plan has the right output and gradients, in float32."""
    inputs = engine.inputs(16, 24, 4, "float32")
    numbers = {name: engine.numbers(each) for name, each in inputs.items()}
    for plan, step in engine.steps(inputs).items():
        for (what, right), found in zip(expected(plan, **numbers).items(), step(), strict=True):
            difference = np.abs(engine.numbers(found) - right).max() / np.abs(right).max()
            if not difference <= TOLERANCE:  # so written, NaN fails too
                raise AssertionError(f"The plan {plan!r} has a wrong {what}: {difference:.1e} off, relative.")


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
    """A setting written out, and what else is said of it."""
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
    """Float32 products in float32: JAX takes a GPU's shorter numbers for them unless told otherwise."""
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
        step = functools.partial(prepare(variant, case).train_on_batch, case.x, case.y)  # numbers come back: it waits
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
    """A Llama-3.2-1B of few layers with random weights and a small vocabulary, under a head of two classes."""
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
    """The most GPU memory that this process has had: the batches go from small to large."""
    if ENGINES[engine] == "torch":
        import torch

        return torch.cuda.max_memory_allocated()
    import jax

    return jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]


def crossover(records: list[Record]) -> Iterator[Record]:
    """Of each setting the fastest plan that trains, and the time of each over "frozen" beside what was predicted."""
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
            # k passes over the activations, of 2 bytes each (../shared/performance.md, 2.4)
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
    """What one process does. It writes as it goes, so that what is measured stays if it dies."""
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
    """Its processes one after another: one for each variant of a stack, but starting one takes longer than tiny sizes."""
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
                code = subprocess.run(command, env=environment, timeout=BUDGETS[engine] + GRACE, check=False).returncode
            except subprocess.TimeoutExpired:
                code = "out of time"
            outcome = Outcome(**json.loads(path.read_text())) if path.exists() else Outcome()
        if code != 0:
            outcome.failed.append(words(f"engine {engine}", ", ".join(variants) or "all plans", f"the process died: {code}"))
        found.append(outcome)
    return found


def result_of(outcomes: list[Outcome], quick: bool, path: Path, seconds: float) -> dict[str, Any]:
    """The file: what was measured now, and what the old one says of other engines where the machine is the same."""
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
        print(f"The records in {path} are of another machine or of other versions: they are replaced.")
    date = time.strftime("%Y-%m-%d")
    told = {"failed": failed, "left out": left_out}
    return {**about, "date": date, "seconds": round(seconds), "records": [*records, *crossover(records)], **told}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", action="append", choices=ENGINES, help="may be given several times; all by default")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write; benchmarks/results/gpu.json by default")
    parser.add_argument("--layers", type=int, default=4, help="of the stack")
    parser.add_argument("--quick", action="store_true", help="tiny sizes; needs --json")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--variant", action="append", default=[], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        return work(arguments.engine[0], arguments.variant, arguments.layers, arguments.quick, arguments.work)
    if arguments.quick and arguments.json is None:
        parser.error("--quick needs --json FILE: its numbers say nothing, and would replace those that do.")
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
