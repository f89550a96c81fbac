"""The tables that are printed: every time as a ratio to full fine-tuning, and the ratios the project is held to."""

from __future__ import annotations

import json

import rich.box
from measuring import Record
from rich.console import Console
from rich.table import Table

REFERENCES = ("full", "base", "frozen", "keras_lora")
HEADLINE = {"d": 1024, "tokens": 256, "rank": 8}

#: What is divided by what: case, quantity, variants, and the settings it is taken from.
BARS = [
    ("dense", "step", "enable_lora", "keras_lora", HEADLINE),
    ("dense", "step", "keras_lora", "full", HEADLINE),
    ("dense", "step", "keras_lora", "frozen", HEADLINE),
    ("dense", "step", "keras_lora", "PEFT", HEADLINE),
    ("dense", "step", "keras_lora DoRA", "keras_lora", HEADLINE),
    ("layers", "layers", "keras_lora", "PEFT", HEADLINE),
    ("layers", "layers", "keras_lora", "loralib", HEADLINE),
    ("layers", "layers", "keras_lora", "frozen", HEADLINE),
    ("layers", "layers", "keras_lora DoRA", "PEFT DoRA", HEADLINE),
    ("inference", "inference", "enable_lora", "keras_lora", {"tokens": 1}),
    ("inference", "inference", "keras_lora", "base", {"tokens": 1}),
    ("inference", "inference", "keras_lora merged", "base", {"tokens": 1}),
    ("inference", "inference", "keras_lora merged", "base", {"tokens": 256}),
    ("embedding", "step", "enable_lora", "keras_lora", {}),
    ("hub", "step", "keras_lora", "full", {}),
    ("hub", "step", "keras_lora", "enable_lora", {}),
]


def groups_of(records: list[Record]) -> dict[tuple[str, str], dict[str, Record]]:
    """The variants that were measured together: by quantity and setting, then by variant."""
    found: dict[tuple[str, str], dict[str, Record]] = {}
    for each in records:
        key = each["quantity"], json.dumps(each["setting"])
        found.setdefault(key, {})[each["variant"]] = each
    return found


def table(title: str, *columns: str) -> Table:
    made = Table(title=title, box=rich.box.SIMPLE_HEAD, title_justify="left")
    for column in columns:
        made.add_column(column, justify="right" if column.startswith(("ratio", "median", "repeats")) else "left")
    return made


def show_ratios(records: list[Record]) -> None:
    """The medians of a group, and their ratios to full fine-tuning or what comes nearest to it there."""
    if not records:
        return
    shown = table(records[0]["case"], "setting", "quantity", "variant", "median", "ratio", "ratio to", "repeats")
    for (quantity, setting), variants in groups_of(records).items():
        reference = next(name for name in REFERENCES if name in variants)
        words = ", ".join(f"{key} {value}" for key, value in json.loads(setting).items())
        for name, each in variants.items():
            below = variants[reference]["median"]
            ratio = f"{each['median'] / below:.3f}" if below else "-"
            median = f"{each['median'] * 1000:.3f} ms" if each["unit"] == "s" else f"{each['median']:,.0f}"
            shown.add_row(words, quantity, name, median, ratio, reference, str(each["repeats"]))
            words = ""
    Console(width=150).print(shown)


def show_bars(backend: str, records: list[Record]) -> None:
    """The ratios of medians and of minima; two that differ by more than a tenth ask for another run."""
    shown = table(f"{backend}: bars", "case", "quantity", "what", "ratio of medians", "ratio of minima", "")
    for case, quantity, above, below, part in BARS:
        ours = [each for each in records if each["case"] == case and each["quantity"] == quantity]
        for variants in groups_of([each for each in ours if part.items() <= each["setting"].items()]).values():
            if above not in variants or below not in variants:
                continue
            medians = variants[above]["median"] / variants[below]["median"]
            minima = variants[above]["minimum"] / variants[below]["minimum"]
            noisy = "noisy" if abs(medians / minima - 1) > 0.1 else ""
            shown.add_row(case, quantity, f"{above} / {below}", f"{medians:.3f}", f"{minima:.3f}", noisy)
    Console(width=150).print(shown)
