"""Show the examples of docstrings as code on the site: without a fence, Markdown takes `>>>` for a quotation."""

import doctest
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import griffe

#: The columns that fit beside both sidebars.
WIDTH = 80
#: Stands between the examples while ruff formats them.
BETWEEN = "# the next example"


class Examples(griffe.Extension):
    """Put a fence around every run of lines that starts with `>>>`, and break long lines."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            text = obj.docstring.value
            obj.docstring.value = re.sub(r"^(>>> .*(?:\n.+)*)", fenced, text, flags=re.MULTILINE)


def fenced(run: re.Match[str]) -> str:
    """A run of examples as a block of code."""
    return f"```pycon\n{narrow(run[1])}\n```"


def narrow(text: str) -> str:
    """The same examples, with their long lines broken by ruff where it is installed."""
    beside = Path(sys.executable).with_name("ruff")
    ruff = str(beside) if beside.exists() else shutil.which("ruff")
    if ruff is None or max(map(len, text.splitlines())) <= WIDTH:
        return text
    examples = doctest.DocTestParser().get_examples(text)
    source = f"\n{BETWEEN}\n".join(each.source.strip() for each in examples)
    command = [ruff, "format", "--isolated", "--line-length", str(WIDTH - 4), "--stdin-filename", "example.py", "-"]
    formatted = subprocess.run(command, input=source, capture_output=True, text=True, check=True).stdout
    parts = []
    for example, code in zip(examples, formatted.split(BETWEEN), strict=True):
        first, *rest = code.strip().splitlines()
        parts += [f">>> {first}", *(f"... {line}".rstrip() for line in rest), *example.want.splitlines()]
    return "\n".join(parts)
