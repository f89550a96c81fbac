"""The tables that are printed: every time as a ratio to full fine-tuning."""

from __future__ import annotations

import json

import rich.box
from measuring import Record
from rich.console import Console
from rich.table import Table

REFERENCES = ("full", "base", "frozen", "keras_lora")


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
    """The medians of a group, and their ratios to full fine-tuning, or to the nearest variant that was measured."""
    if not records:
        return
    shown = table(records[0]["case"], "setting", "quantity", "variant", "median", "ratio", "ratio to", "repeats")
    for (quantity, setting), variants in groups_of(records).items():
        reference = next((name for name in REFERENCES if name in variants), next(iter(variants)))
        words = ", ".join(f"{key} {value}" for key, value in json.loads(setting).items())
        for name, each in variants.items():
            below = variants[reference]["median"]
            ratio = f"{each['median'] / below:.3f}" if below else "-"
            median = f"{each['median'] * 1000:.3f} ms" if each["unit"] == "s" else f"{each['median']:,.0f}"
            shown.add_row(words, quantity, name, median, ratio, reference, str(each["repeats"]))
            words = ""
    Console(width=150).print(shown)
