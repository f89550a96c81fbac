"""Tables to print."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table


def text(table: Table) -> str:
    """A table as text, with a fixed width that does not depend on the terminal."""
    console = Console(width=160)
    with console.capture() as capture:
        console.print(table)
    return capture.get()
