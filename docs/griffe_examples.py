"""Show the examples of docstrings as code on the site: without a fence, Markdown takes `>>>` for a quotation."""

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Put a fence around every run of lines that starts with `>>>`."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(
                r"^(>>> .*(?:\n.+)*)", r"```pycon\n\1\n```", obj.docstring.value, flags=re.MULTILINE
            )
