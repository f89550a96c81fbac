"""What the scripts of the figures share: tables, a place in a page between two comments, and figures as SVG files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

FIGURES = Path(__file__).parent
DOCS = FIGURES.parent


def table(header: list[str], rows: list[list[str]], left: int = 1) -> str:
    """A Markdown table; the columns after the first `left` are aligned to the right."""
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *rows])


def place(name: str) -> re.Pattern[str]:
    """What finds the text between the two comments with a name."""
    return re.compile(rf"(?<=<!-- {name} -->\n).*?(?=\n<!-- /{name} -->)", re.DOTALL)


def put(page: str, name: str, text: str) -> None:
    """Put a text into a page, between the two comments with its name."""
    path = DOCS / page
    old = path.read_text()
    if not place(name).search(old):
        raise SystemExit(f"{path} has no <!-- {name} --> and <!-- /{name} -->.")
    path.write_text(place(name).sub(lambda match: text, old))


def read(name: str) -> dict[str, Any]:
    """The results of a script."""
    found: dict[str, Any] = json.loads((FIGURES / f"{name}.json").read_text())
    return found


def write(name: str, results: dict[str, Any]) -> None:
    """Write the results of a script, with numbers of six digits."""

    def short(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: short(each) for key, each in value.items()}
        if isinstance(value, (list, tuple)):
            return [short(each) for each in value]
        return float(f"{value:.6g}") if isinstance(value, float) else value

    (FIGURES / f"{name}.json").write_text(json.dumps(short(results), indent=1) + "\n")


def save(figure: Any, name: str) -> None:
    """Save a figure. The same data always gives the same bytes."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "keras_lora", "svg.fonttype": "none"}):
        figure.savefig(FIGURES / f"{name}.svg", metadata={"Date": None, "Creator": None})


def made_with() -> dict[str, Any]:
    """The versions, the date and the machine of this run."""
    import importlib
    import os
    import time

    import keras

    import keras_lora

    backend = importlib.import_module(keras.backend.backend())
    versions = {"keras": keras.__version__, backend.__name__: backend.__version__, "keras_lora": keras_lora.__version__}
    return {"versions": versions, "date": time.strftime("%Y-%m-%d"), "cpu cores": os.cpu_count()}


def words_of(made: dict[str, Any]) -> str:
    """The versions, the date and the machine of a run in words."""
    versions = ", ".join(f"{name} {each}" for name, each in made["versions"].items())
    return f"{versions}; {made['cpu cores']} CPU cores; {made['date']}"
