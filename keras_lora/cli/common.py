"""What the commands share: refusing, reading, printing and showing progress."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from keras_lora import adapters
from keras_lora.files.adapter_state import AdapterState


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
    return _printable(" ".join(lines))


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
        raise Refused(f"{out} is there already. {do}.")
    return out


def new_folder(path: str, force: bool) -> Path:
    """`path`, if a folder may be written there."""
    out = Path(path)
    if not out.parent.is_dir():
        raise Refused(f"There is no folder {out.parent} to write OUT into. Make it first.")
    if out.exists() and not (force and out.is_dir() and out.name):
        do = "Choose another OUT, or give --force to replace its adapter" if out.is_dir() else "Choose another OUT"
        raise Refused(f"{out} is there already. {do}.")
    return out


def read_adapter(path: str) -> AdapterState:
    """The contents of an adapter file."""
    with refusing(ValueError, OSError):
        return AdapterState.read(old_file(path, ".safetensors"))


def scale_of(config: dict[str, Any]) -> float | None:
    """The number that multiplies `A B` in an adapter with this config, or `None` if it has no such product."""
    size = {key: config[key] for key in ("rank", "alpha", "rank_stabilized") if key in config}
    return adapters.LoRA(**size).scale if "alpha" in size else None


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
    return _printable(str(tuple(value) if isinstance(value, list) else value))


def _printable(text: str) -> str:
    return "".join(each if each.isprintable() else "?" for each in text)


@contextlib.contextmanager
def progress(steps: int) -> Iterator[Callable[[str], None]]:
    """A progress bar on stderr, if that is a terminal. Call the yielded function with the name of each step as it begins."""
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as bar:
        task, done = bar.add_task("", total=steps), itertools.count()
        yield lambda name: bar.update(task, description=escape(name), completed=next(done))
