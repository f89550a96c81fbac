"""Check everything about a release except its upload: `python tests/release.py [--draft]`.

It compares the versions in the files, builds the wheel and the sdist in `dist/`, checks them, runs some tests inside the
sdist, and installs the wheel with each backend alone (`tests/smoke.py`). With `--draft` the version may still be unreleased,
and the tree may have changes.
"""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from smoke import BACKENDS

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"


def disagreements(root: Path, released: bool) -> list[str]:
    """What the files that name the version disagree about. If `released`, they must have a date too."""
    version = re.findall(r'^__version__ = "(.+)"$', (root / "keras_lora" / "__init__.py").read_text(), re.MULTILINE)[0]
    number, date = re.findall(r"^## (\S+) \((.+)\)$", (root / "CHANGELOG.md").read_text(), re.MULTILINE)[0]
    citation = dict(re.findall(r"^([a-z-]+): (.+)$", (root / "CITATION.cff").read_text(), re.MULTILINE))
    problems = []
    for file, named in {"CHANGELOG.md": number, "CITATION.cff": citation["version"]}.items():
        if named != version:
            problems.append(f"{file} has version {named}, and keras_lora/__init__.py has {version}")
    if citation.get("date-released", "unreleased") != date:
        problems.append(f"CHANGELOG.md says {date}, and date-released in CITATION.cff {citation.get('date-released')}")
    if released and not re.fullmatch(r"\d{4}-\d\d-\d\d", date):
        problems.append(f"CHANGELOG.md has no date for {version}")
    return problems


def relative_links(markdown: str) -> list[str]:
    """The links that work only beside the other files."""
    return [link for link in re.findall(r"\]\(([^)]+)\)", markdown) if not link.startswith(("https://", "#"))]


def tree_problems(version: str) -> list[str]:
    """What is wrong with the state of the repository."""
    problems = []
    if changes := output("git", "status", "--porcelain"):
        problems.append(f"the tree has changes that are not committed:\n{changes}")
    tags = [tag for tag in output("git", "tag", "--points-at", "HEAD").split() if tag.startswith("v")]
    if tags and f"v{version}" not in tags:
        problems.append(f"this commit has the tag {tags[0]}, and the version is {version}")
    return problems


def wheel_problems(wheel: Path) -> list[str]:
    """What is wrong with the files of a wheel, and with the page that PyPI makes of it."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = email.message_from_bytes(archive.read(next(name for name in names if name.endswith("/METADATA"))))
    own = re.compile(r"keras_lora/.*\.py|keras_lora/py\.typed|keras_lora_command\.py|keras_lora-[^/]+\.dist-info/.+")
    problems = [f"the wheel has the file {name}" for name in names if not own.fullmatch(name)]
    problems += [f"the wheel lacks {name}" for name in ("keras_lora/py.typed", "keras_lora_command.py") if name not in names]
    page = metadata.get_payload()
    problems += [f"the page on PyPI has the link {link}" for link in relative_links(page)]
    if "# keras_lora" not in page:
        problems.append("the page on PyPI has no README")
    return problems


def run(*words: str | Path, **kwargs: object) -> None:
    """Run a command, and exit if it fails."""
    print("+", *words, flush=True)
    if subprocess.run(words, **kwargs).returncode:
        sys.exit(f"This failed: {' '.join(map(str, words))}")


def output(*words: str) -> str:
    """What a command prints."""
    return subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def try_the_sdist(sdist: Path) -> None:
    """Run some of its tests from inside it."""
    with tempfile.TemporaryDirectory() as folder, tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
        inside = Path(folder, sdist.name.removesuffix(".tar.gz"))
        kept = {"cwd": inside, "env": {**os.environ, "PYTHONPATH": str(inside), "KERAS_BACKEND": "torch"}}
        pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        run(*pytest, "tests/test_apply.py", "-k", "shared", **kept)
        run(*pytest, "tests/test_architecture.py", "tests/test_release.py", **kept)
        run(sys.executable, "tests/import_graph.py", **kept)


def stop_if(problems: list[str]) -> None:
    """Exit if there are problems."""
    if problems:
        sys.exit("\n".join(problems))


def main(draft: bool) -> None:
    problems = disagreements(ROOT, released=not draft)
    version = re.findall(r'"(.+)"', (ROOT / "keras_lora" / "__init__.py").read_text().partition("__version__ = ")[2])[0]
    stop_if(problems if draft else problems + tree_problems(version))
    shutil.rmtree(DIST, ignore_errors=True)
    run(sys.executable, "-m", "build", "--outdir", DIST, ROOT)
    wheel, sdist = DIST / f"keras_lora-{version}-py3-none-any.whl", DIST / f"keras_lora-{version}.tar.gz"
    run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist)
    stop_if(wheel_problems(wheel))
    try_the_sdist(sdist)
    for backend in BACKENDS:
        run(sys.executable, ROOT / "tests" / "smoke.py", wheel, backend)
    print(f"keras_lora {version} can be released: {wheel.name} and {sdist.name} are in dist/")


if __name__ == "__main__":
    main("--draft" in sys.argv[1:])
