"""Measure every group on every backend, each in a fresh process, and write `benchmarks/results/<backend>.json`.

    python benchmarks/run.py [--backend torch] [--group dense --group hub] [--quick --results DIR]

With `--group`, only the records of those groups are replaced. A group that fails keeps its old records and is named at the
end, and the exit code is 1. `--quick` uses tiny sizes, to check that everything runs; its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import load_average
from page import bars_section
from ratios import show_ratios
from worker import GROUPS

HERE = Path(__file__).parent
BACKENDS = ("torch", "jax", "tensorflow")


def work(backend: str, groups: list[str], quick: bool) -> dict[str, Any] | None:
    """The results of a fresh process, or `None` if it died."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        command = [sys.executable, str(HERE / "worker.py"), "--json", str(path), *(["--quick"] if quick else [])]
        for group in groups:
            command += ["--group", group]
        environment = {**os.environ, "KERAS_BACKEND": backend}
        subprocess.run(command, env=environment, check=False)
        return json.loads(path.read_text()) if path.exists() else None


def run_backend(backend: str, groups: list[str], quick: bool, path: Path) -> list[str]:
    """Measure, and write the file; returns the groups that failed."""
    old = json.loads(path.read_text()) if path.exists() else {"records": [], "runs": {}}
    by_group = {group: [each for each in old["records"] if each["case"] == group] for group in GROUPS}
    runs = old["runs"]  # each group was measured at its own time
    failed = []
    # With tiny sizes, starting a process takes longer than measuring, so all groups share one.
    for together in [groups] if quick else [[group] for group in groups]:
        print(f"\n{backend}: {', '.join(together)}", flush=True)
        start, before = time.monotonic(), load_average()
        done = work(backend, together, quick)
        about = {
            "date": time.strftime("%Y-%m-%d"),
            "seconds": round(time.monotonic() - start),
            "load average before": before,
            "load average after": load_average(),
        }
        for group in together:
            if done is None or group in done["failed"]:
                failed.append(group)
                continue
            by_group[group] = [each for each in done["records"] if each["case"] == group]
            runs[group] = about
            show_ratios(by_group[group])
        if done is not None and len(failed) < len(groups):  # after each group: stopping loses nothing
            written = {
                "backend": backend,
                "versions": done["versions"],
                "machine": done["machine"],
                "date": about["date"],
                "seconds": sum(each["seconds"] for each in runs.values()),
                "quick": quick,
                "runs": {group: runs[group] for group in GROUPS if group in runs},
                "records": [each for group in by_group.values() for each in group],
            }
            write(path, json.dumps(written, indent=1) + "\n")
    if path.exists():
        print(bars_section({backend: json.loads(path.read_text())}))
    return failed


def write(path: Path, text: str) -> None:
    """Write a file completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(".tmp")
    half.write_text(text)
    os.replace(half, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", action="append", choices=BACKENDS, help="may be given several times; all by default")
    parser.add_argument("--group", action="append", choices=GROUPS, help="may be given several times; all by default")
    parser.add_argument("--quick", action="store_true", help="tiny sizes; needs --results")
    parser.add_argument("--results", type=Path, metavar="DIR", help="where to write; benchmarks/results by default")
    arguments = parser.parse_args()
    if arguments.quick and arguments.results is None:
        parser.error("--quick needs --results DIR, so that its meaningless numbers do not replace real ones.")
    folder = arguments.results or HERE / "results"
    failed = []
    for backend in arguments.backend or BACKENDS:
        own = run_backend(backend, arguments.group or list(GROUPS), arguments.quick, folder / f"{backend}.json")
        failed += [f"{backend} {group}" for group in own]
    if failed:
        sys.exit(f"FAILED: {', '.join(failed)}")


if __name__ == "__main__":
    main()
