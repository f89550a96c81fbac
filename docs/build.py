"""Build the site with strict checks: `python docs/build.py [FOLDER]`, where the folder has `mkdocs.yml`.

It fails on broken links and anchors, unknown API names, missing pictures, and docstrings with a part that cannot be read.
Zensical does not count the last two as issues.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path


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
    for page in sorted((folder / "docs").rglob("*.md")):
        for picture in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if "://" not in picture and not (page.parent / picture).exists():
                problems.append(f"{page.relative_to(folder)}: there is no picture {picture}")
    return problems


if __name__ == "__main__":
    found = problems_of(Path(sys.argv[1] if sys.argv[1:] else "."))
    print("\n".join(found) or "The site has no problems.")
    sys.exit(bool(found))
