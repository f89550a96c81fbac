"""Shared by the commands: refusing bad input, reading and printing."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from keras_lora import checks, factors, reports
from keras_lora.factors import Factors
from keras_lora.files import tensor_file


class Refused(Exception):
    """Bad input. The message is shown to the user."""


@contextlib.contextmanager
def refusing(*kinds: type[Exception], before: str = "") -> Iterator[None]:
    """Turn these errors into `Refused`. Their message tells the user what is wrong with the input."""
    try:
        yield
    except kinds as error:
        raise Refused(f"{before}{error}") from error


def one_line(text: str) -> str:
    """`text` on one line, without terminal control characters; a list is cut to its first three entries."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    listed = [line for line in lines if line.startswith("- ")]
    if listed:
        first = lines.index(listed[0])
        more = [f"and {len(listed) - 3} more"] if len(listed) > 3 else []
        words = "; ".join([*(line.removeprefix("- ") for line in listed[:3]), *more])
        lines = [*lines[:first], f"{words}.", *(line for line in lines[first:] if line not in listed)]
    return reports.printable(" ".join(lines))


# Files.


def old_file(path: str, ending: str) -> Path:
    """`path`, if it is a file with that ending."""
    if Path(path).suffix != ending:
        raise Refused(f"Expected a file whose name ends in '{ending}'. Received: {path!r}.")
    if not Path(path).is_file():
        raise Refused(f"There is no file {path}. Check the path.")
    return Path(path)


def new_file(path: str, ending: str, force: bool) -> Path:
    """`path`, if a file may be written there."""
    out = Path(path)
    if out.suffix != ending:
        raise Refused(f"The name of OUT must end in '{ending}'. Received: {path!r}.")
    if not out.parent.is_dir():
        raise Refused(f"There is no folder {out.parent} to write OUT into. Make it first.")
    if out.is_dir() or (out.exists() and not force):
        do = "Choose another OUT" if out.is_dir() else "Choose another OUT, or give --force to replace it"
        raise Refused(f"{out} exists already. {do}.")
    return out


def new_folder(path: str, force: bool) -> Path:
    """`path`, if a folder may be written there."""
    out = Path(path)
    if not out.parent.is_dir():
        raise Refused(f"There is no folder {out.parent} to write OUT into. Make it first.")
    if out.exists() and not (force and out.is_dir() and out.name):
        do = "Choose another OUT, or give --force to replace its adapter" if out.is_dir() else "Choose another OUT"
        raise Refused(f"{out} exists already. {do}.")
    return out


@dataclass
class Entry:
    """One adapter, or one layer that was trained with it, in an adapter file: its part of the header, and its tensors."""

    said: dict[str, Any]
    tensors: dict[str, np.ndarray]


@dataclass
class AdapterFile:
    """An adapter file as plain data, read without Keras. `keras_lora.files.adapter_state` is for models."""

    header: dict[str, Any]
    adapters: dict[str, Entry]
    trained: dict[str, Entry]
    unplaced: dict[str, np.ndarray]

    @property
    def tensors(self) -> dict[str, np.ndarray]:
        """All tensors by their keys in the file."""
        found = {f"{at}:{name}": each for at, entry in self.adapters.items() for name, each in entry.tensors.items()}
        for at, entry in self.trained.items():
            found |= {f"{at}{tensor_file.BASE}{name}": each for name, each in entry.tensors.items()}
        return {**found, **self.unplaced}

    def write(self, path: Path) -> None:
        """Write it as an adapter file."""
        parts = {"adapters": self.adapters, "trained": self.trained}
        said = {part: {at: entry.said for at, entry in entries.items()} for part, entries in parts.items()}
        tensor_file.write(path, {**self.header, **said}, self.tensors)


def read_adapter(path: str) -> AdapterFile:
    """The contents of an adapter file."""
    with refusing(ValueError, OSError):
        header, tensors = tensor_file.read(old_file(path, ".safetensors"))
    found = tensor_file.by_place(header, tensors)
    parts = {part: {at: Entry(header[part][at], found[part][at]) for at in header[part]} for part in ("adapters", "trained")}
    return AdapterFile(header, parts["adapters"], parts["trained"], found["unplaced"])


#: The method names of an adapter file by class, as in `keras_lora.adapters.TABLE`.
METHODS = {
    "AdaLoRA": "adalora",
    "DoRA": "dora",
    "IA3": "ia3",
    "LoHa": "loha",
    "LoKr": "lokr",
    "LoRA": "lora",
    "MiSS": "miss",
    "OFT": "oft",
    "TrainableTokens": "trainable_tokens",
    "VeRA": "vera",
}
#: The config of a LoRA of rank 1 with the scale 1, as in an adapter file.
LORA = {"alpha": 1, "dropout": 0.0, "freeze_a": False, "rank": 1, "rank_stabilized": False}


def scale_of(config: dict[str, Any]) -> float | None:
    """The number that multiplies `A B` in an adapter with this config, or `None` if it has no such product."""
    if "alpha" not in config:
        return None
    rank = checks.positive_integer("rank", config.get("rank"))
    alpha, stabilized = checks.positive_number("alpha", config["alpha"]), config.get("rank_stabilized", False)
    if not isinstance(stabilized, bool) or rank > 2**63:
        raise ValueError(f"its config has a wrong {'rank' if rank > 2**63 else 'rank_stabilized'}")
    return factors.scale(rank, alpha, stabilized)


def lora_factors(entry: Entry) -> Factors | None:
    """The change as an exact product, scale included, if the adapter is a LoRA. Raises an error if it is damaged."""
    if entry.said["method"] != "lora":
        return None
    config, scale = entry.said["config"], scale_of(entry.said["config"])
    known = {*config} - {"kept"}
    wrong = sorted(known ^ {*LORA} if "scale" in entry.said else known - {*LORA})
    if wrong or scale is None:
        raise ValueError(f"its config has a wrong {', '.join(wrong) or 'alpha'}")
    if not math.isclose(said := entry.said.get("scale", scale), scale, rel_tol=1e-6):
        raise ValueError(f"its scale is {scale} by its config, and {said} by the file")
    a, b = _factors(entry, "lora", "rank")
    if "kept" in config:  # a frozen pair without a scale
        checks.positive_integer("kept", config["kept"])
        kept_a, kept_b = _factors(entry, "kept", "kept")
        return np.concatenate([a, kept_a], axis=-1), np.concatenate([scale * b, kept_b], axis=-2)
    return a, scale * b


def _factors(entry: Entry, name: str, rank: str) -> Factors:
    if missing := [f"{name}_{end}" for end in "ab" if f"{name}_{end}" not in entry.tensors]:
        raise ValueError(f"the file lacks {' and '.join(missing)}")
    a, b = (np.asarray(entry.tensors[f"{name}_{end}"], "float64") for end in "ab")
    if a.ndim < 2 or a.shape[-1] != entry.said["config"][rank]:
        raise ValueError(f"the file says {rank} {entry.said['config'][rank]}, and {name}_a has shape {a.shape}")
    return a, b


# Printing.


def show(*parts: Table | str) -> None:
    """Print tables and lines, as wide as the terminal. Without a terminal the width is fixed."""
    console = Console(width=None if sys.stdout.isatty() else 160, markup=False, emoji=False, highlight=False)
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str))


def table(rows: list[dict[str, Any]], numbers: tuple[str, ...], total: dict[str, Any] | None = None) -> Table:
    """A table with a column for each key of the first row; the columns in `numbers` are aligned to the right."""
    made = Table()
    columns = list(rows[0]) if rows else []
    for column in columns:
        right = column in numbers
        made.add_column(column, justify="right" if right else "left", overflow="fold", no_wrap=right)
    for row in rows:
        made.add_row(*(_cell(row[column]) for column in columns))
    if total is not None:
        made.add_section()
        made.add_row(*(_cell(total.get(column)) for column in columns))
    return made


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, int):
        return f"{value:,}"
    return reports.printable(str(tuple(value) if isinstance(value, list) else value))
