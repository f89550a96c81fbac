"""The GPU benchmark runs, in tiny sizes on a CPU, and writes down everything it should. Its times are not looked at."""

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest

pytestmark = pytest.mark.nightly

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPT = BENCHMARKS / "gpu.py"
BACKEND = keras.backend.backend()
ENGINES = {"jax": ("jax-jit", "keras-jax"), "torch": ("torch-eager", "torch-compile", "keras-torch")}
SHARED = {"frozen", "full", "built-in", "plain", "keras_lora", "hybrid"}
STACK = {"full", "enable_lora", "keras_lora", "keras_lora base bfloat16"}
PREDICTED = {"predicted, k = 16", "predicted, k = 8", "predicted, k = 3"}

if BACKEND not in ENGINES:
    pytest.skip("The GPU benchmark has no engine for TensorFlow.", allow_module_level=True)


def imported(name):
    """A module of the benchmarks, which are no package."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))


gpu = imported("gpu")
page = imported("page")


def run(*arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "KERAS_BACKEND": BACKEND})


def plans():
    if BACKEND == "jax":
        return SHARED
    return SHARED | {"addmm"} | ({"PEFT"} if importlib.util.find_spec("peft") else set())


def on_a_gpu():
    return gpu.gpu_of(ENGINES[BACKEND][0]) is not None


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmarks") / "gpu.json"
    done = run("--quick", "--layers", 1, "--json", path, *(f"--engine={each}" for each in ENGINES[BACKEND]))
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(path.read_text())


def of(result, case, quantity, engine):
    """The variants by setting."""
    found = {}
    for each in result["records"]:
        if (each["case"], each["quantity"], each["setting"]["engine"]) == (case, quantity, engine):
            found.setdefault(json.dumps(each["setting"]), set()).add(each["variant"])
    return found


def made_up(engine="jax-jit", **seconds):
    setting = {"engine": engine, "d": 1024, "tokens": 2048, "rank": 16}
    return [gpu.record("layer", setting, "layers", "s", plan, [each]) for plan, each in seconds.items()]


def outcome(records, name="NVIDIA H100", failed=()):
    return gpu.Outcome(gpu=name, records=records, failed=list(failed))


# The file.


@pytest.mark.nightly
def test_the_file_is_like_those_of_the_backends(result):
    assert result["backend"] == "gpu"
    assert {"versions", "machine", "date", "seconds", "quick", "records"} <= set(result)
    assert result["quick"]
    assert result["failed"] == []
    keys = [json.dumps([each[key] for key in ("case", "setting", "quantity", "variant")]) for each in result["records"]]
    assert len(keys) == len(set(keys))


def test_every_record_has_the_one_format_and_every_measurement_is_positive(result):
    for each in result["records"]:
        assert set(each) == set(gpu.Record.__annotations__)
        assert each["unit"] in ("s", "bytes", "count")
        assert math.isfinite(each["median"])
        assert each["median"] >= each["minimum"]
        assert each["minimum"] > 0 or each["quantity"] == "overhead over frozen"
        assert each["repeats"] == 2 or each["unit"] != "s"


@pytest.mark.parametrize("engine", [each for each in ENGINES[BACKEND] if not each.startswith("keras")])
def test_every_plan_is_measured_at_every_size(result, engine):
    layers = of(result, "layer", "layers", engine)
    assert {json.loads(each)["d"] for each in layers} == {16, 32}
    assert all(each == plans() for each in layers.values())
    assert set(of(result, "crossover", "fastest plan", engine)) == set(layers)
    overheads = of(result, "crossover", "overhead over frozen", engine)
    assert all(overheads[each] == plans() - {"frozen"} | PREDICTED for each in layers)


def test_every_variant_of_the_stack_has_a_step(result):
    pytest.importorskip("keras_hub")
    [variants] = of(result, "stack", "step", ENGINES[BACKEND][-1]).values()
    assert variants == STACK


def test_on_a_cpu_no_gpu_is_claimed_and_the_page_shows_nothing_of_it(result):
    if on_a_gpu():
        pytest.skip("There is a GPU.")
    assert result["machine"]["gpu"] is None
    assert page.shown({"gpu": result}) == {}


def test_without_a_gpu_only_a_quick_run_is_made(tmp_path):
    if on_a_gpu():
        pytest.skip("There is a GPU.")
    path = tmp_path / "gpu.json"
    done = run("--json", path, f"--engine={ENGINES[BACKEND][0]}")
    assert done.returncode != 0
    assert "GPU" in done.stderr
    assert not path.exists()


def test_a_quick_run_must_be_told_where_to_write():
    done = run("--quick")
    assert done.returncode != 0
    assert "--quick needs --json" in done.stderr


# The parts.


@pytest.mark.parametrize("plan", ["plain", "hybrid", "frozen"])
def test_a_wrong_plan_is_not_timed(plan):
    engine = gpu.Jax() if BACKEND == "jax" else gpu.Torch(compiled=False)
    gpu.check(engine)
    engine.plans[plan] = lambda x, w, a, b: x @ w + (x @ x.T) @ x + (0 if plan == "frozen" else (x @ a) @ b)
    with pytest.raises(AssertionError, match=f"'{plan}' has a wrong y"):
        gpu.check(engine)


@pytest.mark.parametrize("wrong", ["x", "a", "b"])
def test_a_plan_with_the_right_output_and_a_wrong_gradient_is_found_out(wrong):
    engine = gpu.Jax() if BACKEND == "jax" else gpu.Torch(compiled=False)
    right = engine.plans["plain"]

    def plan(**inputs):
        return right(**{**inputs, wrong: keras.ops.stop_gradient(inputs[wrong]) + 0 * inputs[wrong]})

    engine.plans["plain"] = plan
    with pytest.raises(AssertionError, match=f"'plain' has a wrong {wrong}"):
        gpu.check(engine)


def test_a_call_that_fails_is_named_and_the_others_take_turns():
    def broken():
        raise MemoryError("out of memory")

    failures = []
    calls = {"a": lambda: None, "broken": broken, "b": lambda: None}
    times = gpu.take_turns(
        calls,
        lambda call, times: call() or 1.0,
        gpu.Sizes(warm_up=3, repeats=4),
        lambda name, error: failures.append((name, gpu.reason(error))),
    )
    assert times == {"a": [1.0] * 4, "b": [1.0] * 4}
    assert failures == [("broken", "MemoryError: out of memory")]


def test_a_setting_out_of_time_has_the_least_number_of_repeats():
    sizes = gpu.Sizes(warm_up=2, repeats=50, seconds=-1.0, least=5)
    assert len(gpu.take_turns({"a": lambda: None}, lambda call, times: 1.0, sizes, None)["a"]) == 5


def test_the_crossover_is_what_was_measured_beside_what_was_predicted():
    found = {
        (each["quantity"], each["variant"]): each["median"]
        for each in gpu.crossover(made_up(frozen=2.0, full=3.0, plain=3.5, hybrid=2.5))
    }
    assert found.pop(("fastest plan", "hybrid")) == 2.5
    assert found == pytest.approx(
        {
            ("overhead over frozen", plan): share
            for plan, share in {
                **{"full": 0.5, "plain": 0.75, "hybrid": 0.25},
                **{"predicted, k = 16": 1.67, "predicted, k = 8": 0.84, "predicted, k = 3": 0.31},
            }.items()
        },
        abs=0.005,
    )


def test_another_engine_is_added_to_the_file_and_the_same_one_replaced(tmp_path):
    path = tmp_path / "gpu.json"
    for engine, seconds in [("jax-jit", 1.0), ("torch-eager", 2.0), ("jax-jit", 3.0)]:
        failed = [f"engine {engine}, d 1024: full: {seconds}"]
        result = gpu.result_of([outcome(made_up(engine, plain=seconds), failed=failed)], False, path, 60)
        path.write_text(json.dumps(result))
    layers = {each["setting"]["engine"]: each["median"] for each in result["records"] if each["case"] == "layer"}
    assert layers == {"jax-jit": 3.0, "torch-eager": 2.0}
    assert len(result["records"]) == 4  # and the fastest plan of each
    assert result["failed"] == ["engine torch-eager, d 1024: full: 2.0", "engine jax-jit, d 1024: full: 3.0"]
    assert page.shown({"gpu": result})


def test_records_of_another_machine_are_not_mixed_in(tmp_path):
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(gpu.result_of([outcome(made_up("jax-jit", plain=1.0))], False, path, 60)))
    other = gpu.result_of([outcome(made_up("torch-eager", plain=2.0), "NVIDIA H200")], False, path, 60)
    assert {each["setting"]["engine"] for each in other["records"]} == {"torch-eager"}
    assert other["machine"]["gpu"] == "NVIDIA H200"
