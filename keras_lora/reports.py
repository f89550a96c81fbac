"""Tables to print."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table


def text(table: Table) -> str:
    """A table as text, of a width that does not depend on where it is printed."""
    console = Console(width=160)
    with console.capture() as capture:
        console.print(table)
    return capture.get()
