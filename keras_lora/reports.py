"""Tables that print as wide as the terminal, with equal blocks folded, and as HTML in notebooks; progress of long work."""

from __future__ import annotations

import contextlib
import html
import itertools
import re
import shutil
import sys
import textwrap
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

if TYPE_CHECKING:
    from rich.progress import Progress

_Row = TypeVar("_Row")
#: The names that lead to a layer, and the other cells of its row.
_Branch = tuple[list[str], tuple[str, ...]]
#: Names are joined on one line of a tree up to this length.
_JOINED = 24
#: Progress of work that takes fewer seconds is not shown.
LONG = 2.0
#: The progress bar that is open, if any.
_OPEN: list[Progress] = []


class Printed:
    """Mixin for a list that prints as a table with lines below it, in a notebook too."""

    def table(self, width: float) -> Table:
        """The table, for this many columns of text."""
        raise NotImplementedError

    def lines(self) -> list[str]:
        """The lines below the table."""
        raise NotImplementedError

    def __str__(self) -> str:
        width = terminal_width()
        return text(self.table(width)) + "\n".join(textwrap.fill(line, width) for line in self.lines())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        below = "<br>".join(html.escape(line) for line in self.lines())
        return f"{as_html(self.table(float('inf')))}<p>{below}</p>"


def terminal_width() -> int:
    """The number of columns of the terminal; 80 in a pipe."""
    return shutil.get_terminal_size((80, 24)).columns


def table_of(words: Iterable[str], numbers: Iterable[str]) -> Table:
    """An empty table: columns of words, which break where the line is short, then columns of numbers, which do not."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in words:
        table.add_column(name, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def is_wider(table: Table, width: float) -> bool:
    """Whether a table needs more than `width` columns of text to print without breaking a cell."""
    console = Console(width=1000)
    return Measurement.get(console, console.options, table).maximum > width


def text(table: Table) -> str:
    """A table as text, as wide as the terminal at most."""
    console = Console(width=terminal_width(), color_system=None, force_terminal=False, force_jupyter=False)
    with console.capture() as capture:
        console.print(table)
    return "".join(f"{line.rstrip()}\n" for line in capture.get().splitlines() if line.strip())


def as_html(table: Table) -> str:
    """A table as HTML."""

    def row(tag: str, cells: Iterable[Any]) -> str:
        styles = [f"text-align:{column.justify};white-space:pre" for column in table.columns]
        pairs = zip(styles, cells, strict=True)
        return "".join(f'<{tag} style="{style}">{html.escape(str(cell))}</{tag}>' for style, cell in pairs)

    head = row("th", (column.header for column in table.columns))
    rows = "".join(f"<tr>{row('td', cells)}</tr>" for cells in zip(*(column.cells for column in table.columns), strict=True))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def add_branches(table: Table, rows: Iterable[_Branch], indent: str = "") -> None:
    """Add rows as a tree: a parent of several layers has a separate row, with their rows below it."""
    for name, group in itertools.groupby(rows, key=lambda row: row[0][0]):
        inside = [(names[1:], cells) for names, cells in group]
        while len({tuple(names[:1]) for names, _ in inside}) == 1 and inside[0][0]:  # a single child
            if len(joined := f"{name}/{inside[0][0][0]}") > _JOINED:
                break
            name = joined
            inside = [(names[1:], cells) for names, cells in inside]
        own = [cells for names, cells in inside if not names]
        for cells in own or [()]:
            table.add_row(f"{indent}{name}{'' if own else '/'}", *cells)
        add_branches(table, (row for row in inside if row[0]), f"{indent}  ")


def total(trainable: int, parameters: int) -> str:
    """One line that shows how much of a model trains."""
    return f"trainable: {trainable:,} of {parameters:,} ({100 * trainable / max(parameters, 1):.3g} %)"


def short(number: float) -> str:
    """A number in at most six characters: "9,216", "147k", "28.3M"."""
    if number < 10_000:
        return f"{number:,}"
    for unit in "kMGT":
        number /= 1000
        if number < 999.5 or unit == "T":
            break
    return f"{number:.3g}{unit}"


def folded(rows: Sequence[_Row], key: Callable[[_Row], Any]) -> list[list[_Row]]:
    """Group rows that repeat one after the other, alone or as a series of rows: one group for each row of the series."""
    keys, groups, start = [key(row) for row in rows], [], 0
    while start < len(keys):
        period, times = _repetition(keys, start)
        end = start + period * times
        groups += [list(rows[start + offset : end : period]) for offset in range(period)]
        start = end
    return groups


def _repetition(keys: list[Any], start: int) -> tuple[int, int]:
    """The length of the series at `start` and how often it repeats, chosen to cover the most rows."""
    best = (1, 1)
    for period in range(1, (len(keys) - start) // 2 + 1):
        if keys[start + period] != keys[start]:
            continue
        series, times = keys[start : start + period], 1
        while keys[start + period * times : start + period * (times + 1)] == series:
            times += 1
        if times > 1 and period * times > best[0] * best[1]:
            best = (period, times)
    return best


def stem(path: str) -> str:
    """A path without its numbers, so that it is the same for the layers of equal blocks."""
    return re.sub(r"_?\d+", "", path)


def span(paths: Sequence[str]) -> list[str]:
    """The names of the paths of equal blocks as one path, such as "block_0…11 (× 12)", "query"."""
    pairs = zip(paths[0].split("/"), paths[-1].split("/"), strict=True)
    return [first if first == last else f"{_span(first, last)} (× {len(paths)})" for first, last in pairs]


def _span(first: str, last: str) -> str:
    a, b = (re.split(r"(\d+)", name) for name in (first, last))
    if a[::2] != b[::2]:
        return f"{first} … {last}"
    return "".join(left if left == right else f"{left}…{right}" for left, right in zip(a, b, strict=True))


def printable(text: str) -> str:
    """`text` without terminal control characters."""
    return "".join(each if each.isprintable() else "?" for each in text)


# Progress.


def is_silent() -> bool:
    """Whether progress was switched off, by `keras.config.disable_interactive_logging()`."""
    config = getattr(sys.modules.get("keras"), "config", None)  # the command line may run without Keras
    return config is not None and not config.is_interactive_logging_enabled()


def _is_terminal() -> bool:
    """Whether stderr is a terminal on which a bar can move, and no other display of rich is there."""
    console = Console(stderr=True)
    free = not hasattr(sys.stderr, "rich_proxied_file")
    return free and console.is_interactive and console.file.isatty()  # with FORCE_COLOR, a pipe is interactive too


@contextlib.contextmanager
def progress(steps: int, *, after: float | None = None) -> Iterator[Callable[[str], None]]:
    """Context manager that shows a progress bar on stderr, if that is a terminal, and removes it at the end.

    `keras.config.disable_interactive_logging()` switches it off. Inside another `progress`, it is a line below that bar.

    Args:
        steps: The number of steps.
        after: The seconds before the bar appears, `LONG` by default.

    Returns:
        A function to call with the name of each step as it begins.

    Example:

    >>> from keras_lora import reports
    >>> with reports.progress(2) as step:
    ...     for name in ("first", "second"):
    ...         step(name)
    """
    inside = _OPEN[:1]
    if not inside and (is_silent() or not _is_terminal()):
        yield lambda name: None
        return
    with contextlib.nullcontext(inside[0]) if inside else _bar(LONG if after is None else after) as bar:
        task, done = bar.add_task("", total=steps), itertools.count()
        try:
            yield lambda name: bar.update(task, description=escape(printable(name)), completed=next(done))
        finally:
            if inside:
                bar.remove_task(task)


@contextlib.contextmanager
def _bar(after: float) -> Iterator[Progress]:
    from rich.progress import Progress  # only a terminal needs it

    # What is printed to stdout may go to a file, so rich must not redirect it to the terminal.
    bar = Progress(console=Console(stderr=True), transient=True, redirect_stdout=False)
    timer = threading.Timer(after, bar.start)
    timer.daemon = True
    _OPEN.append(bar)
    try:
        if after:
            timer.start()
        else:
            bar.start()
        yield bar
    finally:
        _OPEN.remove(bar)
        timer.cancel()
        if after:
            timer.join()
        with contextlib.suppress(OSError):  # the terminal may be gone, which must not stop the work
            bar.stop()
