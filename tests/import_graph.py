"""The import graph of the package: modules at the top, imports between its parts, levels, circles.

python tests/import_graph.py            # of this checkout
python tests/import_graph.py REVISION   # of another commit
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def sources(revision: str | None) -> dict[str, str]:
    """The text of each file of the package, by its path in it."""
    if revision is None:
        return {str(p.relative_to(ROOT / "keras_lora")): p.read_text() for p in (ROOT / "keras_lora").rglob("*.py")}
    listed = ["git", "-C", str(ROOT), "ls-tree", "-r", "--name-only", revision, "keras_lora"]
    names = [name for name in subprocess.check_output(listed, text=True).split() if name.endswith(".py")]
    shown = ["git", "-C", str(ROOT), "show"]
    texts = {name: subprocess.check_output([*shown, f"{revision}:{name}"], text=True) for name in names}
    return {name.removeprefix("keras_lora/"): text for name, text in texts.items()}


def arrows(files: dict[str, str]) -> dict[str, set[str]]:
    """For each part (a module at the top, or a folder) the parts that it imports when it runs."""
    parts = {name.removesuffix(".py").split("/")[0] for name in files}
    found: dict[str, set[str]] = {part: set() for part in parts}
    for name, text in files.items():
        own, tree = name.removesuffix(".py").split("/")[0], ast.parse(text)
        for_types = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
        left_out = {id(inside) for node in for_types for inside in ast.walk(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and id(node) not in left_out:
                words = node.module.split(".")
                if words[0] == "keras_lora":
                    to = [words[1]] if len(words) > 1 else [alias.name for alias in node.names]
                    found[own] |= {each for each in to if each in parts} - {own}
    return found


def floors(found: dict[str, set[str]]) -> list[list[str]]:
    """The parts by floor: each imports only from floors below it. Raises if there is a circle."""
    left, levels = dict(found), []
    while left:
        free = sorted(part for part, to in left.items() if not to & left.keys())
        if not free:
            raise SystemExit(f"a circle among {sorted(left)}")
        levels.append(free)
        left = {part: to for part, to in left.items() if part not in free}
    return levels


def main(revision: str | None) -> None:
    files = sources(revision)
    found = arrows(files)
    levels = floors(found)
    top = sum("/" not in name for name in files)
    print(f"{top} modules at the top, {len(found)} parts, {sum(map(len, found.values()))} arrows, {len(levels)} floors")
    for number, parts in reversed(list(enumerate(levels))):
        print(f"  {number}: {', '.join(parts)}")


if __name__ == "__main__":
    main(sys.argv[1] if sys.argv[1:] else None)
