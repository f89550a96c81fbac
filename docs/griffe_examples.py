"""Let the site show the examples of a docstring as code: they are not indented, and Markdown takes `>>>` for a quotation."""

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
