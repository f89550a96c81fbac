"""Used by the build: links in README.md that are relative become absolute, because PyPI shows the page alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


def absolute_links(text: str, files: str) -> str:
    """Markdown with each relative link pointing to a file at the URL `files`."""
    return re.sub(r"\]\((?![a-z][a-z+.-]*:|#)([^)\s]+)\)", rf"]({files}/\1)", text)


class Readme(MetadataHookInterface):
    """Sets the project's description to README.md, with links to the files of this version."""

    def update(self, metadata: dict[str, Any]) -> None:
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        files = f"{metadata['urls']['Homepage']}/blob/v{metadata['version']}"
        metadata["readme"] = {"content-type": "text/markdown", "text": absolute_links(text, files)}
