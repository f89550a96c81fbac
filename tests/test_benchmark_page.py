"""The page of benchmarks says what the committed results say, and says so when a bar is missed."""

import importlib.util
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

PATH = Path(__file__).parents[1] / "benchmarks" / "page.py"
specification = importlib.util.spec_from_file_location("benchmark_page", PATH)
page = importlib.util.module_from_spec(specification)
sys.modules["benchmark_page"] = page
specification.loader.exec_module(page)

DENSE = {"d": 1024, "tokens": 256, "rank": 8, "layers": 4}
STEPS = {"full": 0.100, "frozen": 0.060, "enable_lora": 0.099, "keras_lora": 0.062, "keras_lora DoRA": 0.066}


def record(variant, median, minimum=None, quantity="step", setting=DENSE, case="dense", unit="s"):
    minimum = median if minimum is None else minimum
    found = {"case": case, "setting": setting, "quantity": quantity, "unit": unit, "variant": variant}
    return {**found, "median": median, "minimum": minimum, "repeats": 30}


def result(*records, backend="jax", **machine):
    about = {"versions": {"keras": "3.15.1"}, "machine": machine, "date": "2026-01-01", "seconds": 60.0, "quick": False}
    return {**about, "backend": backend, "records": list(records)}


def steps(**other):
    return [record(name, seconds) for name, seconds in {**STEPS, **other}.items()]


def rows(text, *starts):
    """The cells of the rows of the page that start with these cells."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]
    return [row[len(starts) :] for row in cells if row[: len(starts)] == list(starts)]


def bar(text, over, under, quantity="step", backend="JAX"):
    """The measured ratio and the verdict of a bar."""
    tokens = {"step": 256, "layers": 256, "inference": 1}[quantity] if over != "keras_lora merged" else "any"
    [[_, measured, verdict]] = rows(text, f"{quantity}, tokens {tokens}", f"`{over}` / `{under}`", backend)
    return measured, verdict


# The page and the committed results.


def test_the_page_is_written_from_the_results():
    results, path = page.read(), page.DOCS / "benchmarks.md"
    assert set(results) >= {"jax", "tensorflow", "torch"}
    assert path.read_text() == page.text(results), "run `python benchmarks/page.py`"
    plots = {each.name: each.read_text() for each in (page.DOCS / "benchmarks").glob("*.svg")}
    figures, ends = page.figures(page.shown(results)), [end for end, _ in page.LOOKS.values()]
    assert plots.keys() == {f"{each.name}{end}.svg" for each in figures for end in ends}
    assert not any("fill: #ffffff" in plot for plot in plots.values())  # they show the page behind them
    assert not re.search(r"^\|[^|]+\|[^|]+\|( - \|)+$", path.read_text(), re.MULTILINE)  # no row without a number


def test_the_readme_has_the_summary_of_the_results():
    results = page.read()
    assert set(results) >= {"jax", "tensorflow", "torch"}
    assert page.summary(results) in (PATH.parents[1] / "README.md").read_text(), page.summary(results)


def test_the_bars_are_those_that_keras_lora_is_held_to():
    def of(over, under, case="dense", quantity="step", **setting):
        setting = {"d": 1024, "rank": 8, **setting}
        [found] = [each.limits for each in page.BARS if each[:5] == (over, under, case, quantity, setting)]
        return list(found.items())

    backends, ours, infinite, short = ("jax", "tensorflow", "torch"), "keras_lora", math.inf, {"tokens": 256}
    at_least = [(1.5, infinite), (1.3, infinite), (1.4, infinite)]
    assert of("enable_lora", ours, **short) == list(zip(backends, at_least, strict=True))
    assert of(ours, "full", **short) == list(zip(backends, [(0, 0.66), (0, 0.78), (0, 0.70)], strict=True))
    assert of(ours, "frozen", **short) == list(zip(backends, [(0, 1.08), (0, 1.12), (0, 1.12)], strict=True))
    assert of(ours, "PEFT", "layers", "layers", **short) == [("torch", (0, 1.00))]
    assert of(ours, "PEFT", **short) == [("torch", (0, 1.03))]
    assert of("keras_lora DoRA", ours, **short) == list(zip(backends, [(0, 1.10), (0, 1.15), (0, 1.15)], strict=True))
    assert of("enable_lora", ours, "inference", "inference", tokens=1) == [(each, (2.5, infinite)) for each in backends]
    assert of("keras_lora merged", "base", "inference", "inference") == [(each, (0.97, 1.03)) for each in backends]
    mixed = {"case": "serving", "quantity": "mixed batch", "tokens": 4}
    assert of("keras_lora per example", "base", **mixed) == [(each, (0, 1.3)) for each in backends]
    assert of("one by one", "keras_lora per example", **mixed) == [(each, (4, infinite)) for each in backends]
    of_methods = {"case": "methods", "quantity": "method step", "d": 512, "tokens": 256}
    assert of("keras_lora MiSS", ours, **of_methods) == [(each, (0, 1)) for each in backends]
    assert of("keras_lora IA3", ours, **of_methods) == [(each, (0, 1)) for each in backends]
    assert of("keras_lora LoKr", ours, **of_methods) == [(each, (0, 1.2)) for each in backends]
    assert of("keras_lora OFT", "full", **of_methods) == [(each, (0, 1)) for each in backends]
    assert len(page.BARS) == 14


# Made-up results.


def test_a_bar_is_met_by_the_ratio_of_medians():
    text = page.text({"jax": result(*steps())})
    assert bar(text, "enable_lora", "keras_lora") == ("1.597 (1.597)", "met")
    assert bar(text, "keras_lora", "full") == ("0.620 (0.620)", "met")
    assert bar(text, "keras_lora", "frozen") == ("1.033 (1.033)", "met")
    assert bar(text, "keras_lora DoRA", "keras_lora") == ("1.065 (1.065)", "met")


def test_a_missed_bar_is_not_met():
    text = page.text({"jax": result(*steps(keras_lora=0.0661))})
    assert bar(text, "enable_lora", "keras_lora") == ("1.498 (1.498)", "**not met**")
    assert bar(text, "keras_lora", "full") == ("0.661 (0.661)", "**not met**")
    assert bar(text, "keras_lora", "frozen") == ("1.102 (1.102)", "**not met**")


def test_a_minimum_meets_no_bar():
    slow = [record("full", 0.100), record("keras_lora", 0.067, minimum=0.065)]
    assert bar(page.text({"jax": result(*slow)}), "keras_lora", "full") == ("0.670 (0.650)", "**not met**")


def test_each_backend_has_its_own_bar():
    slow = steps(keras_lora=0.0661)
    text = page.text({"jax": result(*slow), "tensorflow": result(*slow, backend="tensorflow")})
    assert bar(text, "keras_lora", "full")[1] == "**not met**"
    assert bar(text, "keras_lora", "full", backend="TensorFlow")[1] == "met"


def test_what_has_no_records_is_not_measured():
    text = page.text({"jax": result(*steps())})
    assert bar(text, "keras_lora", "full", backend="TensorFlow") == ("-", "not measured")
    assert bar(text, "enable_lora", "keras_lora", "inference") == ("-", "not measured")
    assert bar(text, "keras_lora", "PEFT", "layers", "PyTorch") == ("-", "not measured")
    assert page.text({}).count("| not measured |") == sum(len(each.limits) for each in page.BARS)


@pytest.mark.parametrize("other", [{"d": 512}, {"tokens": 32}, {"rank": 64}])
def test_a_bar_is_only_about_its_own_setting(other):
    elsewhere = [record(name, seconds, setting={**DENSE, **other}) for name, seconds in STEPS.items()]
    assert bar(page.text({"jax": result(*elsewhere)}), "keras_lora", "full") == ("-", "not measured")


def test_the_merged_model_is_held_to_its_bar_at_every_batch():
    def found(merged):
        records = [
            record(variant, each, quantity="inference", setting={**DENSE, "tokens": tokens}, case="inference")
            for tokens, seconds in merged.items()
            for variant, each in {"base": 0.010, "keras_lora merged": seconds}.items()
        ]
        return bar(page.text({"jax": result(*records)}), "keras_lora merged", "base", "inference")

    assert found({1: 0.0098, 32: 0.0102}) == ("0.980 (0.980), tokens 1<br>1.020 (1.020), tokens 32", "met")
    assert found({1: 0.0098, 32: 0.0104})[1] == "**not met**"
    assert found({1: 0.0096, 32: 0.0102})[1] == "**not met**"


def test_peft_has_a_bar_for_the_layers_alone():
    setting = dict(quantity="layers", case="layers")
    text = page.text(
        {"torch": result(record("PEFT", 0.1, **setting), record("keras_lora", 0.101, **setting), backend="torch")}
    )
    assert bar(text, "keras_lora", "PEFT", "layers", "PyTorch") == ("1.010 (1.010)", "**not met**")
    assert bar(text, "keras_lora", "PEFT", "step", "PyTorch") == ("-", "not measured")


def test_a_median_and_a_minimum_that_differ_by_more_than_a_tenth_have_a_dagger():
    noisy = [record("full", 0.100), record("keras_lora", 0.060, minimum=0.050), record("frozen", 0.055, minimum=0.051)]
    text = page.text({"jax": result(*noisy)})
    assert bar(text, "keras_lora", "full") == ("0.600† (0.500)", "met")
    [cells] = rows(text, "dense, d 1024, tokens 256, rank 8, layers 4", "JAX")
    assert cells == ["100 ms", "0.55", "0.60†"]


def test_the_training_table_has_each_variant_and_the_limit():
    text = page.text({"jax": result(*steps(limit=0.065))})
    [cells] = rows(text, "dense, d 1024, tokens 256, rank 8, layers 4", "JAX")
    assert cells == ["100 ms", "0.65", "0.60", "0.99", "0.62", "0.66"]


def test_bytes_have_a_unit_and_a_ratio():
    stored = [
        record(name, number, quantity="checkpoint bytes", unit="bytes") for name, number in (("full", 16.8e6), ("PEFT", 0))
    ]
    stored += [record("keras_lora", 262144, quantity="checkpoint bytes", unit="bytes")]
    [cells] = rows(page.text({"torch": result(*stored, backend="torch")}), page.label(stored[0]), "PyTorch")
    assert cells == ["16.8 MB", "262 kB (0.0156)", "0 B"]


def test_a_sweep_has_a_column_for_each_point():
    swept = [
        record("keras_lora", seconds, quantity="apply_lora", setting={"layers": layers}, case="depth")
        for layers, seconds in {4: 0.002, 64: 0.03, 256: 1.5}.items()
    ]
    text = page.text({"jax": result(*swept)})
    assert rows(text, "quantity", "variant", "backend") == [["layers 4", "layers 64", "layers 256"]]
    assert rows(text, "apply_lora", "`keras_lora`", "JAX") == [["2 ms", "30 ms", "1.50 s"]]
    assert "](benchmarks/depth.svg#gh-light-mode-only)" in text
    assert "](benchmarks/depth_dark.svg#gh-dark-mode-only)" in text
    assert text.index("benchmarks/depth.svg") < text.index("| quantity | variant |")


def test_the_same_record_twice_raises():
    with pytest.raises(ValueError, match="twice"):
        page.text({"jax": result(*steps(), record("full", 0.1))})


def test_every_record_is_on_the_page():
    odd = [
        record("keras_lora", 12.3, quantity=each, case="hub", setting={"model": each}) for each in ("apply", "unheard of")
    ]
    odd += [
        record("another", 45.6, quantity="step", case="convolution", setting={}),
        record("full", 4.0, case="convolution"),
    ]
    text = page.text({"jax": result(*odd)})
    assert text.count("12.3 s") == 2
    assert "`another`" in text


def test_no_gpu_figure_is_claimed_unless_there_was_a_gpu():
    without = page.text({"jax": result(*steps())})
    assert "**No GPU figure has been measured.**" in without
    assert page.text({"jax": result(*steps()), "gpu": result(*steps())}) == without
    assert page.text({"jax": result(*steps()), "gpu": result(gpu="NVIDIA H100")}) == without
    with_one = page.text({"gpu": result(*steps(), gpu="NVIDIA H100")})
    assert "No GPU" not in with_one
    assert rows(with_one, "dense, d 1024, tokens 256, rank 8, layers 4", "JAX on a GPU")
    assert bar(with_one, "keras_lora", "full") == ("-", "not measured")


def test_a_quick_run_is_called_one():
    assert "**A quick run with few repeats; do not rely on it: JAX.**" in page.text(
        {"jax": {**result(*steps()), "quick": True}}
    )
    assert "A quick run" not in page.text({"jax": result(*steps())})


def test_two_folders_of_results_are_compared_by_ratios(tmp_path):
    again = [
        {**each, "median": 2 * each["median"]} for each in steps(keras_lora=0.031)
    ]  # half the ratio, on a slower machine
    for folder, records in (("before", steps()), ("after", again)):
        start = record("keras_lora", 1.0 if folder == "before" else 3.0, quantity="apply_lora", case="startup", setting={})
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "jax.json").write_text(json.dumps(result(*records, start)))
    command = [sys.executable, str(PATH.with_name("compare.py")), str(tmp_path / "before"), str(tmp_path / "after")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = [line.split() for line in printed.splitlines()]
    assert ["dense", "keras_lora", "yes", *["0.500"] * 3] in lines
    assert ["dense", "enable_lora", *["1.000"] * 3] in lines
    assert ["startup", "apply_lora", "keras_lora", "yes", *["3.000"] * 3] in lines
    assert "full" not in printed
