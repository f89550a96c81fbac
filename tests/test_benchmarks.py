"""The benchmarks run, in tiny sizes, and write down everything they should. Their times are not looked at."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest

pytestmark = [pytest.mark.torch_first, pytest.mark.full]

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
BACKEND = keras.backend.backend()
TRAINING = {"full", "frozen", "enable_lora", "keras_lora", "keras_lora dropout", "keras_lora DoRA"}
WIDTH, RANK, DEPTH = 32, 2, 4  # of the tiny stack


@pytest.fixture(scope="module")
def measuring():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import measuring
    finally:
        sys.path.remove(str(BENCHMARKS))
    return measuring


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmarks") / "result.json"
    command = [sys.executable, str(BENCHMARKS / "worker.py"), "--quick", "--json", str(path)]
    for group in ("dense", "layers", "embedding", "adapters", "serving", "inactive", "bytes"):
        command += ["--group", group]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "KERAS_BACKEND": BACKEND})
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(path.read_text())["records"]


def by_variant(records, case, quantity):
    return {each["variant"]: each for each in records if (each["case"], each["quantity"]) == (case, quantity)}


def peers():
    if BACKEND != "torch":
        return set()
    pytest.importorskip("peft")
    pytest.importorskip("loralib")
    return {"PEFT", "PEFT DoRA", "loralib"}


def test_every_record_has_the_one_format(records, measuring):
    for each in records:
        assert set(each) == set(measuring.Record.__annotations__)
        assert each["unit"] in ("s", "bytes", "flops", "count")
        assert all(math.isfinite(each[key]) for key in ("median", "minimum"))
        assert each["median"] >= each["minimum"]
        assert each["minimum"] > 0 or each["quantity"] in ("traces", "temp bytes")
        assert each["repeats"] > 0 or each["variant"] == "limit"
    keys = [json.dumps([each[key] for key in ("case", "setting", "quantity", "variant")]) for each in records]
    assert len(keys) == len(set(keys))


def test_every_variant_has_a_training_step(records):
    assert TRAINING | {"limit"} <= set(by_variant(records, "dense", "step"))
    assert set(by_variant(records, "embedding", "step")) == TRAINING - {"keras_lora dropout"}


def test_the_peers_are_measured_where_they_are_installed(records):
    expected = peers()
    assert expected <= set(by_variant(records, "dense", "step"))
    assert set(by_variant(records, "layers", "layers")) == (
        {"frozen", "keras_lora", "keras_lora DoRA", *expected} if expected else set()
    )


def test_what_trains_the_optimizer_and_the_file_are_of_the_size_of_the_factors(records):
    factors = DEPTH * RANK * (WIDTH + WIDTH)
    trainable, optimizer, checkpoint = (
        {name: each["median"] for name, each in by_variant(records, "bytes", quantity).items()}
        for quantity in ("trainable parameters", "optimizer bytes", "checkpoint bytes")
    )
    assert trainable["keras_lora"] == trainable["enable_lora"] == factors
    assert trainable["full"] == DEPTH * (WIDTH * WIDTH + WIDTH)
    assert trainable["frozen"] == WIDTH
    assert trainable["keras_lora DoRA"] == factors + DEPTH * WIDTH
    assert all(optimizer[name] == 2 * 4 * trainable[name] for name in trainable)
    assert 4 * factors < checkpoint["keras_lora"] < 4 * factors + DEPTH * 2048
    assert checkpoint["full"] > 4 * trainable["full"]


def test_loading_other_adapters_traces_nothing_again(records):
    assert by_variant(records, "adapters", "load and step")
    if BACKEND != "torch":
        assert by_variant(records, "adapters", "traces")["keras_lora"]["median"] == 0


def test_calls_take_turns_after_three_turns_of_warm_up(measuring):
    order = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    times = measuring.interleaved(calls, seconds=60, rounds=8, at_least=1)
    turns = ["".join(order[at : at + 2]) for at in range(0, len(order), 2)]
    assert turns[:3] == ["ab"] * 3
    assert len(turns) == 3 + 8
    assert set(turns[3:]) == {"ab", "ba"}  # each once in a turn, in an order that is drawn
    assert {name: len(values) for name, values in times.items()} == {"a": 8, "b": 8}


def test_turns_end_with_the_seconds_but_not_before_the_least(measuring):
    assert len(measuring.interleaved({"a": lambda: None}, seconds=0, rounds=50, at_least=7)["a"]) == 7


def test_the_garbage_collector_is_off_while_a_call_is_timed_and_on_again_after_an_error(measuring):
    import gc

    seen = []
    measuring.interleaved({"a": lambda: seen.append(gc.isenabled())}, seconds=0, rounds=1, at_least=1)
    assert seen == [True] * measuring.WARM_UP + [False]

    def fail_when_timed():
        if not gc.isenabled():
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        measuring.interleaved({"a": fail_when_timed}, seconds=0, rounds=1)
    assert gc.isenabled()


def test_a_record_has_the_median_and_the_minimum(measuring):
    made = measuring.record("dense", {"d": 2}, "step", "s", "full", [3.0, 1.0, 2.5])
    assert (made["median"], made["minimum"], made["repeats"]) == (2.5, 1.0, 3)
