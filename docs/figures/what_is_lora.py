"""Print the tables of `docs/what_is_lora.md` from committed results.

    python docs/figures/what_is_lora.py

It reads `benchmarks/results/*.json`, `docs/figures/full_update.json`, the table of `examples/movie_reviews.py` in the README
and the table of `tests/coverage_page.py` in `docs/coverage.md`. `tests/test_what_is_lora.py` compares the page with them.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import printing

ROOT = Path(__file__).parents[2]
#: Kinds in `docs/coverage.md` that read or write text alone.
OF_TEXT = ("text encoder", "decoder", "encoder-decoder", "mixture of experts")
DENSE = {"d": 1024, "tokens": 256, "rank": 8}


def benchmarks() -> Any:
    """The module that reads the results of the benchmarks."""
    specification = importlib.util.spec_from_file_location("benchmark_page", ROOT / "benchmarks" / "page.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules.setdefault("benchmark_page", module)
    specification.loader.exec_module(module)
    return module


def ratios(page: Any, quantity: str, case: str, setting: dict[str, Any]) -> str:
    """keras_lora divided by full fine-tuning, on each backend."""
    results, cells = page.read(), []
    for backend, title in page.BACKENDS.items():
        for variants in page.groups(results.get(backend, {"records": []}), quantity).values():
            record = page.first(variants)
            found = page.ratio(variants, page.OURS, page.FULL)
            if record["case"] == case and setting.items() <= record["setting"].items() and found is not None:
                cells.append(f"{title} {found}")
    return ", ".join(cells)


def machine(page: Any) -> str:
    """The machine of the benchmarks, and the peak memory of a fine-tuning there."""
    results = page.read()
    peaks = []
    for backend, title in page.BACKENDS.items():
        for variants in page.groups(results.get(backend, {"records": []}), "peak bytes").values():
            if page.first(variants)["setting"].get("model") == "hub" and page.OURS in variants:
                peaks.append(f"{title} {page.amount(variants[page.OURS])}")
    if not peaks:
        return ""
    machines = {
        (each["machine"]["cpu"], each["machine"]["cores"]) for name, each in results.items() if name in page.BACKENDS
    }
    where = " and ".join(f"{cores} cores of a CPU ({cpu})" for cpu, cores in sorted(machines))
    return f"peak memory on {where}, without a GPU: {', '.join(peaks)}"


def accuracies() -> dict[str, str]:
    """The test accuracy of each way to fine-tune, from the README."""
    readme = (ROOT / "README.md").read_text()
    return dict(re.findall(r"^\| (frozen|LoRA rank \d+|full) \| (\d\.\d+)(?: \(.*?\))? \|", readme, re.MULTILINE))


def accuracy_row(*ways: str) -> str:
    """The test accuracy of some ways to fine-tune."""
    found = accuracies()
    return ", ".join(f"{way} {found[way]}" for way in ways) if set(ways) <= set(found) else ""


def standard_error() -> str:
    """The largest standard error of these accuracies, from the README."""
    found = re.search(r"standard error of one accuracy\b.* is at most (\d\.\d+)", (ROOT / "README.md").read_text())
    return f"test accuracy; the standard error is at most {found[1]}" if found else "test accuracy"


def other_domains() -> str:
    """How many models of other domains a test adapts and trains."""
    coverage = (ROOT / "docs" / "coverage.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in coverage.splitlines() if line.startswith("| ")]
    (header,) = [row for row in rows if {"model", "kind", "training"} <= set(row)]
    first = rows.index(header) + 2  # after the line of dashes
    table = [dict(zip(header, row, strict=True)) for row in rows[first:] if len(row) == len(header)]
    others = [row for row in table if row["kind"] not in OF_TEXT]
    trained = [row for row in others if row["training"] == "yes"]
    kinds = sorted({row["kind"] for row in others})
    if not others:
        return ""
    return f"{len(trained)} of {len(others)} models adapt and train: {'; '.join(kinds)}"


#: The claim, the setting, the function that reads the number, and the script that made it.
CLAIMS: list[tuple[str, str, Callable[[Any], str], str]] = [
    (
        "Training needs less memory",
        "peak memory, LoRA / full; 16 Dense layers of width 1,024, 256 rows, rank 8",
        lambda page: ratios(page, "peak bytes", "memory", {**DENSE, "model": "dense"}),
        "benchmarks/run.py",
    ),
    (
        "",
        "the same for a BERT in the shape of MiniLM-L12, 1,280 tokens, rank 8",
        lambda page: ratios(page, "peak bytes", "memory", {"model": "hub"}),
        "benchmarks/run.py",
    ),
    (
        "",
        "the optimizer's variables, LoRA / full; 4 Dense layers of width 1,024, rank 8",
        lambda page: short(ratios(page, "optimizer bytes", "bytes", DENSE)),
        "benchmarks/run.py",
    ),
    (
        "What you save and share is small",
        "file size, adapter / all weights; 4 Dense layers of width 1,024, rank 8",
        lambda page: short(ratios(page, "checkpoint bytes", "bytes", DENSE)),
        "benchmarks/run.py",
    ),
    (
        "Training steps are faster",
        "CPU time, LoRA / full; 4 Dense layers of width 1,024, 256 rows, rank 8",
        lambda page: ratios(page, "step", "dense", DENSE),
        "benchmarks/run.py",
    ),
    (
        "",
        "the same for a BERT in the shape of MiniLM-L12, 1,280 tokens, rank 8",
        lambda page: ratios(page, "step", "hub", {"rank": 8}),
        "benchmarks/run.py",
    ),
    (
        "A merged model runs as fast as the base",
        "CPU time, merged / base; 6 Dense layers of width 1,024, 256 rows",
        lambda page: merged(page),
        "benchmarks/run.py",
    ),
    (
        "Modest hardware is enough",
        "LoRA on a BERT in the shape of MiniLM-L12, 1,280 tokens, rank 8",
        machine,
        "benchmarks/run.py",
    ),
    ("Larger models fit on the same machine", "a model that full fine-tuning cannot hold in memory", lambda page: "", ""),
    (
        "A rank as low as 1 already learns the task",
        f"MiniLM on film reviews; {standard_error()}",
        lambda page: accuracy_row("frozen", "LoRA rank 1", "full"),
        "examples/movie_reviews.py",
    ),
    (
        "The quality is close to that of full fine-tuning",
        f"MiniLM on film reviews; {standard_error()}",
        lambda page: accuracy_row("LoRA rank 8", "full"),
        "examples/movie_reviews.py",
    ),
    (
        "It works in other domains than text",
        "models from small random configs in [Coverage](coverage.md); this does not show quality",
        lambda page: other_domains(),
        "tests/sweep.py",
    ),
    (
        "The quality is close in other domains",
        "a network of DNA finds splice junctions; test accuracy, one run on each backend; standard error 0.007",
        lambda page: tutorial_row("dna", "test accuracy after, LoRA and head", "test accuracy after full fine-tuning"),
        "examples/tutorials/dna.py",
    ),
    (
        "",
        "a model of flights adapts to another season; mean error in minutes, one run on each backend",
        lambda page: tutorial_row(
            "tabular", "error in July and August after LoRA", "error in July and August after full fine-tuning"
        ),
        "examples/tutorials/tabular.py",
    ),
    ("", "a real task on audio", lambda page: "", ""),
]


def tutorial_row(name: str, lora: str, full: str) -> str:
    """What a tutorial measured with LoRA and in full, on each backend."""
    results = json.loads((ROOT / "docs" / "tutorials" / "results" / f"{name}.json").read_text())
    names = {"jax": "JAX", "tensorflow": "TensorFlow", "torch": "PyTorch"}
    numbers = {names[backend]: result["numbers"] for backend, result in results.items()}
    cells = [f"{backend} LoRA {each[lora]:.3g}, full {each[full]:.3g}" for backend, each in numbers.items()]
    return "; ".join(cells)


def short(cells: str) -> str:
    """One number if all backends have the same."""
    numbers = {cell.rpartition(" ")[2] for cell in cells.split(", ")}
    return f"{numbers.pop()} on each backend" if len(numbers) == 1 and cells else cells


def merged(page: Any) -> str:
    """A merged model divided by its base, on each backend."""
    cells = []
    for backend, title in page.BACKENDS.items():
        for variants in page.groups(page.read().get(backend, {"records": []}), "inference").values():
            record, found = page.first(variants), page.ratio(variants, f"{page.OURS} merged", page.BASE)
            if record["case"] == "inference" and DENSE.items() <= record["setting"].items() and found is not None:
                cells.append(f"{title} {found}")
    return ", ".join(cells)


def claims() -> str:
    """The table of claims. A claim without a number says so."""
    page, rows = benchmarks(), []
    for claim, setting, number, script in CLAIMS:
        found = number(page)
        rows.append(
            [claim, setting, found or "**not measured, so not claimed**", f"`{script}`" if script and found else "-"]
        )
    return printing.table(["claim", "what was measured", "result", "script"], rows, left=4)


def full_update() -> str:
    """The table of what a rank catches of a full update."""
    results = printing.read("full_update")
    rows = []
    for rank, accuracy in results["accuracy of a cut update"].items():
        shares = [each["kept"].get(rank, 0.0) for each in results["kernels"]]
        mean = sum(shares) / len(shares)
        shown = [f"{each:.3f}" for each in (mean, min(shares), max(shares), accuracy)]
        rows.append([rank, *shown])
    rows.append(["all", *["1.000"] * 3, f"{results['accuracy']:.3f}"])
    header = ["rank", "share of ‖ΔW‖², mean", "least", "most", "test accuracy"]
    settings, made = results["settings"], printing.words_of(results["made"])
    below = f"{settings['train']:,} sentences to train, {settings['test']:,} to test, {len(results['kernels'])} kernels;"
    return f"{printing.table(header, rows, left=0)}\n\n{below} one seed. {made}."


def main() -> None:
    """Print both tables into the page."""
    printing.put("what_is_lora.md", "claims", claims())
    printing.put("what_is_lora.md", "full update", full_update())


if __name__ == "__main__":
    main()
