"""Write the page `docs/benchmarks.md` and its plots in `docs/benchmarks/` from the results of `benchmarks/run.py`.

    python benchmarks/page.py         # needs matplotlib

It reads `benchmarks/results/{jax,tensorflow,torch}.json`, and `gpu.json` if that exists. `BARS` lists the limits that
keras_lora must meet. `text` needs no matplotlib, so `tests/test_benchmark_page.py` can compare the page with the results.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"
BACKENDS = {"jax": "JAX", "tensorflow": "TensorFlow", "torch": "PyTorch"}
FULL, FROZEN, BASE, LIMIT, OURS = "full", "frozen", "base", "limit", "keras_lora"
VARIANTS = [
    *(FULL, BASE, "base again", LIMIT, FROZEN, "enable_lora", OURS, f"{OURS} dropout", f"{OURS} DoRA", f"{OURS} merged"),
    *("PEFT", "PEFT DoRA", "loralib", f"{OURS} per example", "one by one", "PEFT mixed batch"),
]
# The quantities with their own sections; the others are in the chapter "Other measurements".
TIMES = ("step", "layers", "inference", "mixed batch", "method step", "trained by a method")
SIZES = {
    "peak bytes": "Peak memory of a separate process, beyond its imports",
    "temp bytes": "Temporary bytes of the gradient, counted by XLA",
    "saved bytes": "Bytes that torch keeps for the backward pass, without the weights",
    "optimizer bytes": "The optimizer's variables",
    "checkpoint bytes": "File size: only the adapters for `keras_lora`, all weights for the others",
    "trainable parameters": "Trainable parameters",
    "flops": "FLOPs of the gradient, counted by XLA",
}
# Headings in that chapter, if not the quantity itself.
HEADINGS = {"import beside Keras": "Import time, in addition to Keras", "product": "Products"}
SWEEPS = {"depth": "layers", "ranks": "rank", "adapters": "adapters", "inactive": "inactive"}  # the case and what it varies

INTRODUCTION = """# Benchmarks

`benchmarks/run.py` measures the results in `benchmarks/results/`, and `benchmarks/page.py` writes this page from them. No
number is entered by hand.

Times are CPU seconds on one pinned core. The variants in a row of a table ran in one run and took turns. Compare only
ratios: the absolute seconds of a shared machine mean little. Each ratio is a ratio of medians. † marks a noisy
measurement, for which the ratio of the minima differs by more than 10 %. Do not rely on it.

{gpu}{quick}

The variants:

- `full` trains every weight.
- `frozen` is the lower reference: the whole forward and backward pass, with almost nothing to train.
- `enable_lora` is Keras's own LoRA.
- `PEFT` and `loralib` have the same weights in torch, in a plain torch loop.
- `limit` was not run. It is the time that a step with adapters would take by its FLOPs, at the speed of `full`.
- `base` has no adapters. `base again` is a second copy of it, and shows how much two copies of one model differ.
"""
NO_GPU = "**No GPU figure has been measured.** Results on a CPU may not carry over to a GPU."
QUICK = " **A quick run with few repeats; do not rely on it: {names}.**"
INFERENCE_LIMIT = """
An adapted model also computes the base product. So with one row, `enable_lora` / `keras_lora` cannot be larger than
`enable_lora` / `base`: {limits}.
"""
OF_SERVING = """64 examples with 64 adapters in one batch. "tokens" is the number of rows in each example. The ratios are
to `base`, which is one batch without adapters. `one by one` runs each example separately through a model with one adapter,
and loads nothing in between. `PEFT mixed batch` is PEFT's `adapter_names`, which loops over the adapters in each layer."""
OF_BARS = """
## The bars

A bar is a limit that keras_lora must meet, in stacks of Dense layers of width 1,024 at rank 8. The ratio of the medians
decides. The ratio of the minima is in brackets.

{table}
"""


class Ratio(NamedTuple):
    """The ratio of two variants of one run."""

    median: float
    minimum: float

    @property
    def mark(self) -> str:
        """A dagger if the ratios of medians and minima differ by more than 10 %."""
        return "†" if abs(self.median / self.minimum - 1) > 0.1 else ""

    def __str__(self) -> str:
        return f"{self.median:.2f}{self.mark}"


class Bar(NamedTuple):
    """The smallest and the largest value allowed for a ratio of two variants, by backend."""

    over: str
    under: str
    case: str
    quantity: str
    setting: dict[str, int]  # a record may have more
    limits: dict[str, tuple[float, float]]


def at_least(*least: float) -> dict[str, tuple[float, float]]:
    """A lower limit for each backend."""
    return {backend: (each, math.inf) for backend, each in zip(BACKENDS, least, strict=True)}


def at_most(*most: float) -> dict[str, tuple[float, float]]:
    """An upper limit for each backend."""
    return {backend: (0.0, each) for backend, each in zip(BACKENDS, most, strict=True)}


LAYERS = {"d": 1024, "rank": 8}
TRAINING = {**LAYERS, "tokens": 256}
METHODS = {"d": 512, "rank": 8, "tokens": 256}
BARS = [
    Bar("enable_lora", OURS, "dense", "step", TRAINING, at_least(1.5, 1.3, 1.4)),
    Bar(OURS, FULL, "dense", "step", TRAINING, at_most(0.66, 0.78, 0.70)),
    Bar(OURS, FROZEN, "dense", "step", TRAINING, at_most(1.08, 1.12, 1.12)),
    Bar(OURS, "PEFT", "layers", "layers", TRAINING, {"torch": (0.0, 1.00)}),
    Bar(OURS, "PEFT", "dense", "step", TRAINING, {"torch": (0.0, 1.03)}),
    Bar(f"{OURS} DoRA", OURS, "dense", "step", TRAINING, at_most(1.10, 1.15, 1.15)),
    Bar(f"{OURS} MiSS", OURS, "methods", "method step", METHODS, at_most(1.0, 1.0, 1.0)),
    Bar(f"{OURS} IA3", OURS, "methods", "method step", METHODS, at_most(1.0, 1.0, 1.0)),
    Bar(f"{OURS} LoKr", OURS, "methods", "method step", METHODS, at_most(1.2, 1.2, 1.2)),
    Bar(f"{OURS} OFT", FULL, "methods", "method step", METHODS, at_most(1.0, 1.0, 1.0)),
    Bar("enable_lora", OURS, "inference", "inference", {**LAYERS, "tokens": 1}, at_least(2.5, 2.5, 2.5)),
    Bar(f"{OURS} per example", BASE, "serving", "mixed batch", {**LAYERS, "tokens": 4}, at_most(1.3, 1.3, 1.3)),
    Bar("one by one", f"{OURS} per example", "serving", "mixed batch", {**LAYERS, "tokens": 4}, at_least(4, 4, 4)),
    Bar(f"{OURS} merged", BASE, "inference", "inference", LAYERS, dict.fromkeys(BACKENDS, (0.97, 1.03))),
]

# The results.

Record = dict[str, Any]
Results = dict[str, dict[str, Any]]  # by the name of the file: a backend, or "gpu"
Groups = dict[str, dict[str, Record]]  # by case and setting, then by variant


def read() -> Results:
    """The results that exist."""
    paths = {name: RESULTS / f"{name}.json" for name in (*BACKENDS, "gpu")}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def shown(results: Results) -> Results:
    """The results, without a "gpu" file that was measured without a GPU."""
    return {
        name: each for name, each in results.items() if name != "gpu" or (each["records"] and each["machine"].get("gpu"))
    }


def title(name: str, result: dict[str, Any]) -> str:
    """The name of these results in a table."""
    return BACKENDS.get(result["backend"], "GPU") + (" on a GPU" if name == "gpu" else "")


def label(record: Record) -> str:
    """The case and the setting of a record."""
    return ", ".join([record["case"], *(f"{key} {value}" for key, value in record["setting"].items())])


def groups(result: dict[str, Any], quantity: str) -> Groups:
    """The records of a quantity that ran side by side."""
    found: Groups = {}
    for record in result["records"]:
        if record["quantity"] == quantity:
            variants = found.setdefault(label(record), {})
            if record["variant"] in variants:
                raise ValueError(f"{result['backend']} has {record['variant']!r} of {quantity!r} twice: {label(record)}.")
            variants[record["variant"]] = record
    return found


def ratio(variants: dict[str, Record], over: str, under: str) -> Ratio | None:
    """The ratio of two variants, or `None` if it was not measured."""
    if not {over, under} <= variants.keys() or variants[under]["minimum"] <= 0:
        return None
    found = (variants[over][each] / variants[under][each] for each in ("median", "minimum"))
    return Ratio(*found) if variants[over]["minimum"] > 0 else None


def first(variants: dict[str, Record]) -> Record:
    """One of the records that ran side by side, for the values that they share."""
    return next(iter(variants.values()))


def ratios(result: dict[str, Any], quantity: str, to: str) -> list[tuple[dict[str, Record], dict[str, Ratio]]]:
    """The records that ran side by side, and the ratio of each variant to one of them."""
    found = []
    for variants in groups(result, quantity).values():
        of = {each: ratio(variants, each, to) for each in variants}
        found.append((variants, {each: one for each, one in of.items() if one}))
    return found


# Formatting.


def scaled(value: float, units: dict[float, str]) -> str:
    """A number in the largest unit that leaves a digit before the point."""
    size = next((each for each in units if value >= each), min(units))
    number = value / size
    return f"{number:,.{0 if number >= 100 or number == int(number) else 1 if number >= 10 else 2}f} {units[size]}".strip()


UNITS: dict[str, dict[float, str]] = {
    "s": {1: "s", 1e-3: "ms", 1e-6: "µs"},
    "bytes": {1e9: "GB", 1e6: "MB", 1e3: "kB", 1: "B"},
    "flops": {1e9: "GFLOP", 1e6: "MFLOP", 1: "FLOP"},
    "count": {1: ""},
}


def amount(record: Record) -> str:
    """The median of a record with its unit."""
    return scaled(record["median"], UNITS[record["unit"]])


def table(header: list[str], rows: list[list[str]], left: int = 2) -> str:
    """A Markdown table; the columns after the first `left` are aligned to the right."""
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *rows])


def ordered(variants: Iterable[str]) -> list[str]:
    """Variants in the order of `VARIANTS`, and unknown ones after them."""
    return sorted(set(variants), key=lambda each: (VARIANTS.index(each) if each in VARIANTS else len(VARIANTS), each))


# The sections of the page.


def limits(least: float, most: float) -> str:
    """A bar as text."""
    if most == math.inf:
        return f"≥ {least:.2f}"
    return f"≤ {most:.2f}" if least == 0 else f"{least:.2f} to {most:.2f}"


def at_the_bar(bar: Bar, result: dict[str, Any]) -> list[tuple[str, Ratio]]:
    """The ratios that a bar is about, as text and as numbers."""
    found = []
    for variants in groups(result, bar.quantity).values():
        case, setting = first(variants)["case"], first(variants)["setting"]
        measured = ratio(variants, bar.over, bar.under)
        if measured and case == bar.case and bar.setting.items() <= setting.items():
            tokens = "" if "tokens" in bar.setting else f", tokens {setting['tokens']}"
            found.append((f"{measured.median:.3f}{measured.mark} ({measured.minimum:.3f}){tokens}", measured))
    return found


def bars_section(results: Results) -> str:
    """The table of bars, with the measured ratios and whether each bar is met."""
    rows = []
    for bar in BARS:
        what = f"{bar.quantity}, tokens {bar.setting.get('tokens', 'any')}"
        for backend, (least, most) in bar.limits.items():
            found = at_the_bar(bar, results[backend]) if backend in results else []
            met = all(least <= each.median <= most for _, each in found)
            verdict = ("met" if met else "**not met**") if found else "not measured"
            measured = "<br>".join(written for written, _ in found) or "-"
            rows.append([what, f"`{bar.over}` / `{bar.under}`", BACKENDS[backend], limits(least, most), measured, verdict])
    return OF_BARS.format(table=table(["case", "ratio", "backend", "bar", "measured", ""], rows, left=3)) + inference_limit(
        results
    )


def inference_limit(results: Results) -> str:
    """The sentence about the limit that no adapter can exceed, because an adapted model runs the base too."""
    bar = Bar("enable_lora", BASE, "inference", "inference", {**LAYERS, "tokens": 1}, {})
    found = {name: at_the_bar(bar, results[name]) for name in BACKENDS if name in results}
    limits = ", ".join(f"{BACKENDS[name]} {each[0][1].median:.3f}" for name, each in found.items() if each)
    return INFERENCE_LIMIT.format(limits=limits) if limits else ""


def summary(results: Results) -> str:
    """The ratios of the first two bars in words, for the README."""
    against_keras, against_full = BARS[:2]

    def words(bar: Bar) -> str:
        found = {name: at_the_bar(bar, results[name])[0][1] for name in BACKENDS}
        *most, last = (f"{each.median:.2f}{each.mark} ({BACKENDS[name]})" for name, each in found.items())
        return f"{', '.join(most)} and {last}"

    return (
        f"A training step takes {words(against_full)}\nof the time that full fine-tuning takes. With Keras's own "
        f"`enable_lora` it takes\n{words(against_keras)} times as long as with keras_lora."
    )


def training_section(results: Results) -> str:
    """Every training step, as ratios to `full`, and the layers alone, as ratios to `frozen`."""
    whole = section(
        "A whole training step: ratios to `full`",
        compared(results, "step", FULL),
        pictures(results, "training_step", "tokens"),
    )
    layers = section("Forward and backward of the layers alone: ratios to `frozen`", compared(results, "layers", FROZEN))
    return chapter("Training", "The column of the variant that the ratios refer to shows its median.", [whole, layers])


def inference_section(results: Results) -> str:
    """Every forward pass, as ratios to the base."""
    found = table_of(compared(results, "inference", BASE))
    return chapter(
        "Inference",
        "Ratios to `base`. The column of `base` shows its median.",
        [*pictures(results, "inference"), found] if found else [],
    )


def serving_section(results: Results) -> str:
    """An adapter for each example of a batch, as ratios to the base."""
    return chapter("An adapter for each example", OF_SERVING, [table_of(compared(results, "mixed batch", BASE))])


def methods_section(results: Results) -> str:
    """A step of every method, as ratios to LoRA and to full fine-tuning."""
    rows: dict[str, list[str]] = {}
    header = ["method", "trainable parameters"]
    for name, result in results.items():
        for label_of, variants in groups(result, "method step").items():
            trained = groups(result, "trained by a method")[label_of]
            header += [f"{title(name, result)} / LoRA", f"{title(name, result)} / full"]
            for variant in ordered(variants):
                row = rows.setdefault(variant, [f"`{variant}`", f"{trained[variant]['median']:,.0f}"])
                row += [str(ratio(variants, variant, under)) for under in (OURS, FULL)]
    about = "A training step of four Dense layers of 512 units, 256 rows. Methods with a rank like LoRA's have rank 8."
    return chapter("Methods", about, [table(header, list(rows.values()))] if rows else [])


Rows = list[tuple[str, str, dict[str, str]]]  # a backend, a case with its setting, and the cells by variant


def chapter(heading: str, about: str, parts: list[str]) -> str:
    """A chapter of the page, or `""` if nothing was measured."""
    return "\n" + "\n\n".join([f"## {heading}", about, *filter(None, parts)]) + "\n" if any(parts) else ""


def section(heading: str, rows: Rows, plots: Iterable[str] = ()) -> str:
    """A heading, plots and a table, or `""` if there are no rows."""
    return "\n\n".join([f"### {heading}", *plots, table_of(rows)]) if rows else ""


def table_of(rows: Rows) -> str:
    """A table with a column for each variant, or `""` if there are no rows."""
    columns = ordered(variant for _, _, cells in rows for variant in cells)
    lines = [[case, backend, *(cells.get(each, "-") for each in columns)] for backend, case, cells in rows]
    return table(["case", "backend", *(f"`{each}`" for each in columns)], lines) if rows else ""


def compared(results: Results, quantity: str, to: str) -> Rows:
    """The rows of a quantity as ratios to a variant. The cell of that variant shows its median."""
    rows = []
    for name, result in results.items():
        for variants, found in ratios(result, quantity, to):
            cells = {each: str(found.get(each, "-")) for each in variants.keys() | found.keys()}
            cells |= {to: amount(variants[to])} if to in variants else {}
            if set(cells.values()) == {"-"} and first(variants)["case"] in SWEEPS:
                continue  # its medians are in the chapter on sweeps
            rows.append((title(name, result), label(first(variants)), cells))
    return rows


def amounts(results: Results, quantity: str) -> Rows:
    """The rows of a quantity: the medians, with the ratio to `full` in brackets."""
    rows = []
    for name, result in results.items():
        for case, variants in groups(result, quantity).items():
            cells = {each: amount(record) for each, record in variants.items()}
            for each in variants.keys() - {FULL}:
                if found := ratio(variants, each, FULL):
                    cells[each] += f" ({found.median:.3g}{found.mark})"
            rows.append((title(name, result), case, cells))
    return rows


def sizes_section(results: Results) -> str:
    """Memory, files and FLOPs."""
    tables = [section(heading, amounts(results, quantity)) for quantity, heading in SIZES.items()]
    return chapter("Memory, files and FLOPs", "The ratio to `full` is in brackets.", tables)


def once_section(results: Results) -> str:
    """The other quantities, without the sweeps."""
    plain = {
        name: {**each, "records": [one for one in each["records"] if one["case"] not in SWEEPS]}
        for name, each in results.items()
    }
    quantities = dict.fromkeys(one["quantity"] for each in plain.values() for one in each["records"])  # in their order
    others = [each for each in quantities if each not in {*TIMES, *SIZES}]
    return chapter(
        "Other measurements",
        "The ratio to `full` is in brackets.",
        [section(heading_of(each), amounts(plain, each)) for each in others],
    )


def heading_of(quantity: str) -> str:
    """The heading of a quantity; the name of a function stays as it is."""
    return HEADINGS.get(quantity, f"`{quantity}`" if "_" in quantity else quantity.capitalize())


def sweep(result: dict[str, Any], case: str) -> dict[tuple[str, str], dict[float, Record]]:
    """The records of a sweep: by quantity and variant, then by the value that varies."""
    found: dict[tuple[str, str], dict[float, Record]] = {}
    for record in result["records"]:
        if record["case"] == case:
            line = found.setdefault((record["quantity"], record["variant"]), {})
            at = record["setting"][SWEEPS[case]]
            if at in line:
                raise ValueError(f"{result['backend']} has {record['quantity']!r} at {SWEEPS[case]} {at} twice in a sweep.")
            line[at] = record
    return found


def sweeps_section(results: Results) -> str:
    """The tables of the sweeps."""
    parts = []
    for case, varied in SWEEPS.items():
        lines = {
            (title(name, result), *key): line
            for name, result in results.items()
            for key, line in sweep(result, case).items()
        }
        ats = sorted({at for line in lines.values() for at in line})
        rows = [
            [quantity, f"`{variant}`", backend, *(amount(line[at]) if at in line else "-" for at in ats)]
            for (backend, quantity, variant), line in lines.items()
        ]
        if rows:
            header = ["quantity", "variant", "backend", *(f"{varied} {at}" for at in ats)]
            parts += [f"### Over {case}", *pictures(results, case), table(header, rows, left=3)]
    return chapter("Sweeps", "The median of each quantity for different sizes.", parts)


def machine_section(results: Results) -> str:
    """The machine and the package versions of each run."""
    parts = []
    for name, result in results.items():
        facts = {"date": result["date"], "seconds": f"{result['seconds']:.0f}", "records": len(result["records"])}
        rows = [[key, str(value)] for key, value in {**facts, **result["machine"], **result["versions"]}.items()]
        parts.append(f"### {title(name, result)}\n\n{table(['', ''], rows)}")
        if runs := result.get("runs"):  # a GPU run has none
            columns = list(next(iter(runs.values())))
            parts.append(table(["group", *columns], [[group, *map(str, each.values())] for group, each in runs.items()]))
    about = "The machine and the packages of each run, and how busy the machine was before and after each group."
    return chapter("Machine and versions", about, parts)


def text(results: Results) -> str:
    """The whole page."""
    results = shown(results)
    gpu = f"The GPU results were measured on {results['gpu']['machine']['gpu']}." if "gpu" in results else NO_GPU
    hasty = ", ".join(title(name, each) for name, each in results.items() if each["quick"])
    quick = QUICK.format(names=hasty) if hasty else ""
    sections = [
        training_section,
        inference_section,
        methods_section,
        serving_section,
        sizes_section,
        once_section,
        sweeps_section,
        machine_section,
    ]
    return INTRODUCTION.format(gpu=gpu, quick=quick) + bars_section(results) + "".join(each(results) for each in sections)


# The plots.


class Figure(NamedTuple):
    """The data of a plot: in each panel the lines by name, each a mapping from x to y."""

    name: str
    title: str
    caption: str
    x: str
    y: str
    panels: dict[str, dict[str, dict[Any, float]]]
    scale: str = "linear"


def figures(results: Results) -> list[Figure]:
    """The plots that can be drawn from these results."""
    full, base = "time / full", "time / base"
    wide = f"Dense layers of width {LAYERS['d']:,}"
    step = f"{wide} at rank {LAYERS['rank']}: the time of a training step, divided by that of full fine-tuning"
    limit = f"The dashed line is `{LIMIT}`."
    once = f"The seconds of `{OURS}` for what is done once, by the number of layers. Both axes are logarithmic."
    rows = f"{wide}: the time of a forward pass, divided by that of the base, by the rows of a batch."
    drawn = [
        Figure(
            *("training_step", "A training step", f"{step}, with {TRAINING['tokens']} tokens. {limit}", "", full),
            dense_steps(results),
        ),
        Figure(
            *("tokens", "A training step by tokens", f"{step}, by tokens in a batch. {limit}", "tokens", full),
            panels(results, over_tokens),
        ),
        Figure(
            *("ranks", "A training step by rank", f"The time of a training step, divided by `full`, by rank. {limit}"),
            *("rank", full),
            panels(results, over_ranks),
        ),
        Figure("depth", "One-time work by layers", once, "layers", "seconds", panels(results, over_layers), "log"),
        Figure("inference", "Inference by rows of a batch", rows, "rows", base, panels(results, over_batches)),
    ]
    return [each for each in drawn if each.panels]


def panels(results: Results, lines: Callable[[dict[str, Any]], dict[str, dict[Any, float]]]) -> dict[str, Any]:
    """A panel for each backend that has lines of at least two points."""
    found = {}
    for name, result in results.items():
        measured = lines(result)
        kept = {each: dict(sorted(measured[each].items())) for each in ordered(measured) if len(measured[each]) > 1}
        if kept:
            found[title(name, result)] = kept
    return found


#: The two looks of a plot: its file's ending, and the part of its address that shows it on light or on dark pages.
LOOKS = {"light": ("", "#gh-light-mode-only"), "dark": ("_dark", "#gh-dark-mode-only")}
INK = {"light": "#1f2328", "dark": "#d5d9e0"}
#: The colours of the variants, in their order.
CYCLES = {
    "light": ("#1f6fb4", "#d9730d", "#2b8a3e", "#c92a2a", "#7048c6", "#8c564b", "#c2539d", "#5f6b7a", "#8f8a12", "#0f8fa3"),
    "dark": ("#6cb2f7", "#ffa94d", "#69db7c", "#ff8787", "#b197fc", "#d0a79b", "#f3a6d8", "#b6bfca", "#d8d26a", "#66d9e8"),
}


def pictures(results: Results, *names: str) -> list[str]:
    """The plots of these names that can be drawn, as Markdown: each with its look for light and for dark pages."""
    found = []
    for figure in figures(results):
        if figure.name in names:
            images = [f"![{figure.title}](benchmarks/{figure.name}{end}.svg{shown})" for end, shown in LOOKS.values()]
            caption = figure.caption.replace("`", "")
            found.append(
                "\n".join(['<figure markdown="span">', *images, f"<figcaption>{caption}</figcaption>", "</figure>"])
            )
    return found


def dense_steps(results: Results) -> dict[str, Any]:
    """The one panel of bars: by backend, then by variant, at the setting of the bars."""
    found = {}
    for name, result in results.items():
        for variants, measured in ratios(result, "step", FULL):
            if first(variants)["case"] == "dense" and TRAINING.items() <= first(variants)["setting"].items():
                found[title(name, result)] = {each: measured[each].median for each in ordered(measured)}
    return {"": found} if found else {}


def over_tokens(result: dict[str, Any]) -> dict[str, dict[Any, float]]:
    """The step ratios of the dense case, by tokens."""
    return over(ratios(result, "step", FULL), "dense", LAYERS, "tokens")


def over_ranks(result: dict[str, Any]) -> dict[str, dict[Any, float]]:
    """The step ratios of the sweep over ranks."""
    return over(ratios(result, "step", FULL), "ranks", {}, "rank")


def over_batches(result: dict[str, Any]) -> dict[str, dict[Any, float]]:
    """The inference ratios by rows of a batch."""
    return over(ratios(result, "inference", BASE), "inference", LAYERS, "tokens")


def over(
    measured: list[tuple[dict[str, Record], dict[str, Ratio]]], case: str, setting: dict[str, int], varied: str
) -> dict[str, dict[Any, float]]:
    """The ratios of each variant in a case, by the value that varies, with the other settings fixed."""
    found: dict[str, dict[Any, float]] = {}
    for variants, found_ratios in measured:
        record = first(variants)
        if record["case"] == case and setting.items() <= record["setting"].items() and varied in record["setting"]:
            for variant, each in found_ratios.items():
                found.setdefault(variant, {})[record["setting"][varied]] = each.median
    return found


def over_layers(result: dict[str, Any]) -> dict[str, dict[Any, float]]:
    """The seconds of the one-time work of keras_lora, by layers."""
    return {
        quantity: {at: record["median"] for at, record in line.items() if record["median"] > 0}
        for (quantity, variant), line in sweep(result, "depth").items()
        if variant == OURS and line[min(line)]["unit"] == "s"
    }


def draw(figure: Figure, path: Path, look: str = "light") -> None:
    """Draw a plot on no background, for light or dark pages. The same data always gives the same bytes."""
    import matplotlib

    matplotlib.use("Agg")
    from cycler import cycler
    from matplotlib import pyplot

    style: Any = {"svg.hashsalt": "keras_lora", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False}
    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    style |= dict.fromkeys(inked, INK[look]) | {"axes.prop_cycle": cycler(color=CYCLES[look]), "savefig.transparent": True}
    with matplotlib.rc_context({**style, "axes.spines.right": False}):
        width = 8 if "" in figure.panels else 1 + 3.2 * len(figure.panels)
        drawing, axes = pyplot.subplots(1, len(figure.panels), squeeze=False, sharey=True, figsize=(width, 3.6))
        for ax, (name, lines) in zip(axes[0], figure.panels.items(), strict=True):
            (draw_lines if name else draw_bars)(ax, lines, figure)
            ax.set(title=name, xlabel=figure.x)
        axes[0][0].set(ylabel=figure.y, **({"ylim": (0, None)} if figure.scale == "linear" else {}))
        entries = {each: handle for ax in axes[0] for handle, each in zip(*ax.get_legend_handles_labels(), strict=True)}
        drawing.legend(entries.values(), entries, loc="outside lower center", ncols=5, frameon=False)
        drawing.suptitle(figure.title)
        drawing.set_layout_engine("constrained")
        drawing.savefig(path, metadata={"Date": None, "Creator": None})
        pyplot.close(drawing)


def draw_lines(ax: Any, lines: dict[str, dict[Any, float]], figure: Figure) -> None:
    """Lines over a logarithmic axis, with a colour for each name."""
    names = ordered({name for each in figure.panels.values() for name in each})
    for name, line in lines.items():
        look = (
            {"color": ax.xaxis.label.get_color(), "linestyle": "--"}
            if name == LIMIT
            else {"color": f"C{names.index(name)}", "marker": "o"}
        )
        ax.plot(list(line), list(line.values()), label=name, markersize=3, **look)
    ax.set(xscale="log", yscale=figure.scale)
    ats = sorted({at for line in lines.values() for at in line})
    ax.set_xticks(ats, [str(at) for at in ats])
    ax.minorticks_off()


def draw_bars(ax: Any, lines: dict[str, dict[Any, float]], figure: Figure) -> None:
    """A bar for each variant and backend, and a line at the limit."""
    variants = ordered({variant for line in lines.values() for variant in line} - {LIMIT})
    width = 0.8 / len(lines)
    for shift, (name, line) in enumerate(lines.items()):
        ats = [variants.index(variant) + shift * width - 0.4 + width / 2 for variant in line if variant != LIMIT]
        ax.bar(ats, [value for variant, value in line.items() if variant != LIMIT], width, label=name)
    for limit in sorted({line[LIMIT] for line in lines.values() if LIMIT in line}):
        ax.axhline(limit, color=ax.xaxis.label.get_color(), linestyle="--", linewidth=1, label=LIMIT)
    ax.set_xticks(range(len(variants)), [each.replace(" ", "\n") for each in variants])


def write() -> None:
    """Write the page and its plots, and remove old plots."""
    results = read()
    (DOCS / "benchmarks.md").write_text(text(results))
    (DOCS / "benchmarks").mkdir(exist_ok=True)
    for old in (DOCS / "benchmarks").glob("*.svg"):
        old.unlink()
    for figure in figures(shown(results)):
        for look, (end, _) in LOOKS.items():
            draw(figure, DOCS / "benchmarks" / f"{figure.name}{end}.svg", look)


if __name__ == "__main__":
    write()
