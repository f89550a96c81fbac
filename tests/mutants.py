"""Make each seeded fault of `faults.py` in a copy of the project, run the tests there, and write down which noticed it.

    python tests/mutants.py               # all of them: writes tests/seeded_faults.md, exit code 1 where the bar is missed
    python tests/mutants.py PEFT merge    # those with one of these words in their name: prints what was seen
    python tests/mutants.py --resume      # goes on with a run that was interrupted
    python tests/mutants.py --new         # those that the page does not have yet

A fault is first looked for by the test that noticed it last, then by the file of tests named beside it, on torch and on
the backend where it shows, then by the whole of `make quick`, then by the suites of `make test` on torch, JAX and
TensorFlow. The first test that fails ends it. The bar: `make test` notices every fault, and `make quick` nine in ten.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from faults import FAULTS, Fault

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "tests" / "seeded_faults.md"
COPIED = (
    "keras_lora",
    "keras_lora_command.py",
    "tests",
    "docs",
    "examples",
    "benchmarks",
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "Makefile",
)
COPIED += ("pyproject.toml", "mkdocs.yml", "requirements", ".ci", ".github", "CITATION.cff", "SECURITY.md", "hatch_build.py")
QUICK_SHARE = 0.9
#: What a run has seen so far.
SEEN = ROOT / ".cache" / "mutants.json"


def noticed(fault: Fault) -> tuple[str, str]:
    """Which speed notices a fault, and the first test that failed; `("none", "")` if no test did."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "keras_lora")
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            elif (ROOT / name).exists():
                copy.mkdir(exist_ok=True)
                shutil.copy(ROOT / name, copy / name)
        file = copy / "keras_lora" / fault.file
        text = file.read_text()
        assert text.count(fault.right) == 1, f"{fault.name}: its text stands {text.count(fault.right)} times in {fault.file}"
        file.write_text(text.replace(fault.right, fault.wrong))
        runs = last_time(fault)
        runs += [("quick", "torch", f"tests/{fault.near}.py")]
        runs += [("test", fault.backend, f"tests/{fault.near}.py")]
        runs += [("quick", "torch", "tests")]
        runs += [("test", backend, "tests") for backend in ("torch", "jax", "tensorflow")]
        for speed, backend, tests in runs:
            if failed := first_failure(copy, speed, backend, tests):
                return speed, failed if backend == "torch" else f"{failed} ({backend})"
    return "none", ""


def on_page() -> dict[str, tuple[str, str]]:
    """The speed and the test that noticed each fault when the page was written."""
    rows = re.findall(r"^\| (.+) \| `\S+` \| `make (\w+)` \| `(.+)` \|$", PAGE.read_text(), re.MULTILINE)
    return {name: (speed, test) for name, speed, test in rows}


def last_time(fault: Fault) -> list[tuple[str, str, str]]:
    """The run of one test that noticed a fault when the page was written."""
    if fault.name not in (seen := on_page()):
        return []
    speed, test = seen[fault.name]
    name, backend = re.fullmatch(r"(.+?)(?: \((\w+)\))?", test).groups()  # type: ignore[union-attr]
    return [(speed, backend or "torch", f"tests/{name}")]


def first_failure(copy: Path, speed: str, backend: str, tests: str) -> str | None:
    """The first test that fails in a copy, or `None`."""
    environment = {
        **os.environ,
        "KERAS_BACKEND": backend,
        "PYTHONPATH": str(copy),
        "OMP_NUM_THREADS": "1",
        "TF_ENABLE_ONEDNN_OPTS": "1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    # The list of faults fits the code as it should be: its own test does not count.
    command = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", f"--speed={speed}", tests]
    command += ["--ignore=tests/test_faults.py", "--no-header", "--tb=no"]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    if done.returncode == 0 or (done.returncode in (4, 5) and "::" in tests):  # that one test is not there any more
        return None
    found = re.search(r"^(?:FAILED|ERROR) tests/(.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if done.returncode != 1 or found is None:  # a fault must not break the run itself: that any test would notice
        raise RuntimeError(f"the tests did not run:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return found[1]


def page(seen: dict[str, tuple[str, str]]) -> str:
    """The table of all faults."""
    by_quick = sum(speed == "quick" for speed, _ in seen.values())
    by_test = by_quick + sum(speed == "test" for speed, _ in seen.values())
    lines = [
        "# Seeded faults",
        "",
        "Small mistakes, made one at a time in a copy of the project. Written by `make mutants` from `tests/faults.py`.",
        "",
        f"`make quick` notices {by_quick} of {len(seen)}, `make test` {by_test}.",
        "",
        "| fault | in | noticed by | first test that failed |",
        "| --- | --- | --- | --- |",
    ]
    files = {fault.name: fault.file for fault in FAULTS}
    for name, (speed, test) in seen.items():
        said = f"`make {speed}`" if speed != "none" else "**none**"
        lines.append(f"| {name} | `{files[name]}` | {said} | {f'`{test}`' if test else ''} |".replace("  |", " |"))
    return "\n".join([*lines, ""])


def main(words: list[str]) -> int:
    resume = "--resume" in words
    only_new = "--new" in words
    words = [word for word in words if word not in ("--resume", "--new")]
    chosen = [fault for fault in FAULTS if not words or any(word in fault.name for word in words)]
    seen = {key: each for key, each in on_page().items() if only_new and key in {fault.name for fault in chosen}}
    if resume and SEEN.exists():
        seen = {key: tuple(each) for key, each in json.loads(SEEN.read_text()).items() if each[0] != "none"}
    with concurrent.futures.ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        running = {pool.submit(noticed, fault): fault for fault in chosen if fault.name not in seen}
        for done in concurrent.futures.as_completed(running):
            name = running[done].name
            try:
                seen[name] = done.result()
            except RuntimeError as error:
                seen[name] = ("none", str(error)[:300])
            print(f"{name}: {seen[name][0]} {seen[name][1]}", flush=True)
            if not words:
                SEEN.parent.mkdir(exist_ok=True)
                SEEN.write_text(json.dumps(seen))
    seen = {fault.name: seen[fault.name] for fault in chosen}
    if not words:
        PAGE.write_text(page(seen))
    speeds = [speed for speed, _ in seen.values()]
    return int("none" in speeds or speeds.count("quick") < QUICK_SHARE * len(speeds))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
