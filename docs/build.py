"""Build the site with strict checks: `python docs/build.py [FOLDER]`, where the folder has `mkdocs.yml`.

It fails on broken links and anchors, unknown API names, missing pictures, pages that the navigation leaves out, and
docstrings with a part that cannot be read. Zensical does not count the last three as issues. It also writes `llms.txt`, an
index of the pages for language models, at the root of the site.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml


def problems_of(folder: Path) -> list[str]:
    """Build the site in a folder, and return what is wrong with it."""
    # A page in the cache is not checked again. `--clean` would empty the folder, and with it what the tests keep there.
    for page in (folder / ".cache").glob("[0-9]*"):
        page.unlink()
    command = [str(Path(sys.executable).with_name("zensical")), "build", "--strict"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    said = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr)
    problems = [line for line in said.splitlines() if line.startswith(("griffe:", "WARNING", "ERROR"))]
    if done.returncode:
        problems.append(said.partition("Traceback")[0].strip())
    config = yaml.safe_load((folder / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = {path for _, _, path in entries(config["nav"])}
    problems += [
        f"docs/{path}: the navigation lists it, and it does not exist"
        for path in sorted(listed)
        if not (folder / "docs" / path).exists()
    ]
    for page in sorted((folder / "docs").rglob("*.md")):
        path = page.relative_to(folder / "docs").as_posix()
        if path not in listed:
            problems.append(f"docs/{path}: the navigation does not list it")
        for picture in re.findall(r"!\[[^\]]*\]\(([^)\s#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if "://" not in picture and not (page.parent / picture).exists():
                problems.append(f"docs/{path}: there is no picture {picture}")
    if not problems:
        index = folder / config.get("site_dir", "site") / "llms.txt"
        index.write_text(llms_txt(folder / "docs", config), encoding="utf-8")
    return problems


def entries(nav: list[Any], group: str = "") -> Iterator[tuple[str, str, str]]:
    """The pages of a navigation in their order: the group at the top, the title and the path."""
    for item in nav:
        [(title, inside)] = item.items()
        if isinstance(inside, str):
            yield group, title, inside
        else:
            yield from entries(inside, group or title)


def llms_txt(docs: Path, config: dict[str, Any]) -> str:
    """The index of all pages as Markdown, see https://llmstxt.org."""
    lines, last = [f"# {config['site_name']}", "", f"> {config.get('site_description', '')}"], ""
    for group, title, path in entries(config["nav"]):
        if group != last:
            lines += ["", f"## {group}", ""]
        last = group
        about = description((docs / path).read_text(encoding="utf-8"))
        lines.append(f"- [{title}]({address(path)})" + (f": {about}" if about else ""))
    return "\n".join(lines) + "\n"


def address(path: str) -> str:
    """The address of a page, relative to the root of the site."""
    place = path.removesuffix(".md")
    return "./" if place == "index" else f"{place.removesuffix('/index')}/"


def description(text: str) -> str:
    """What a page is about: the description in its head, or else its first sentence."""
    if head := re.match(r'---\n.*?^description: "(.*?)"$', text, re.DOTALL | re.MULTILINE):
        return head[1]
    paragraphs = (
        each.strip() for each in re.sub(r"\A---\n.*?^---\n", "", text, flags=re.DOTALL | re.MULTILINE).split("\n\n")
    )
    first = next((each for each in paragraphs if re.match(r"[\w`*\[]", each)), "")
    sentence = re.split(r"(?<=[.:])\s", " ".join(first.split()))[0].rstrip(":")
    return re.sub(r"\[([^\]]*)\](?:\([^)]*\)|\[[^\]]*\])", r"\1", sentence)


if __name__ == "__main__":
    found = problems_of(Path(sys.argv[1] if sys.argv[1:] else "."))
    print("\n".join(found) or "The site has no problems.")
    sys.exit(bool(found))
