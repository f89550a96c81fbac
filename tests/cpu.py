"""CPU seconds of `make quick` and `make test`: measured, printed, and held against a budget.

    python tests/cpu.py run LABEL COMMAND ...    # runs one step; its seconds go to .cache/cpu/LABEL.json
    python tests/cpu.py report test              # what the steps of `make test` took, and which files grew
    python tests/cpu.py report test --write      # and writes that into CONTRIBUTING.md and tests/budget.json

The seconds are user and system time of all processes of a step: on a shared machine the clock says little. The budgets are
in `tests/budget.json`, with the seconds of each file of tests when they were last written. A run over its budget names the
files that grew. It fails nothing: another machine has other seconds.
"""

from __future__ import annotations

import json
import math
import os
import re
import resource
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[1]
SEEN = ROOT / ".cache" / "cpu"
BUDGET = ROOT / "tests" / "budget.json"
PAGE = ROOT / "CONTRIBUTING.md"
#: A file grew if it takes so many times as long as before, and so many seconds more.
GREW, AT_LEAST = 1.25, 3.0


def run(label: str, command: list[str]) -> int:
    """Run one step and write down what it took."""
    SEEN.mkdir(parents=True, exist_ok=True)
    files, start = SEEN / f"{label}.files", time.time()
    files.unlink(missing_ok=True)
    code = subprocess.run(command, env={**os.environ, "CPU_TIMES": str(files)}).returncode
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    seen = {"cpu": used.ru_utime + used.ru_stime, "start": start, "end": time.time()}
    seen["files"] = json.loads(files.read_text()) if files.exists() else {}
    files.unlink(missing_ok=True)
    (SEEN / f"{label}.json").write_text(json.dumps(seen))
    return code


def steps_of(speed: str) -> list[str]:
    """The steps of a speed: of `make quick` the lint and its newest suite, of the others what ran here."""
    seen = sorted(SEEN.glob("*.json"), key=lambda file: file.stat().st_mtime)
    suites = [file.stem for file in seen if file.stem.startswith("quick-")]
    if speed == "quick":
        return ["lint", *suites[-1:]]
    return [file.stem for file in seen if file.stem not in suites]


def report(speed: str, write: bool) -> str:
    """What the steps of a speed took, as a table, and what grew where it is over its budget."""
    budgets = json.loads(BUDGET.read_text())
    budgets.setdefault(speed, {"budget": math.inf, "files": {}})
    steps = {}
    for step in steps_of(speed):
        file = SEEN / f"{step}.json"
        if not file.exists():
            raise SystemExit(f"`make {speed}` did not run its step {step!r} here: there is no {file.relative_to(ROOT)}.")
        steps[step] = json.loads(file.read_text())
    total = sum(each["cpu"] for each in steps.values())
    wall = max(each["end"] for each in steps.values()) - min(each["start"] for each in steps.values())
    lines = ["| step | CPU s | wall s | tests |", "| --- | ---: | ---: | ---: |"]
    for step, each in steps.items():
        tests = sum(count for _, count in each["files"].values())
        lines.append(f"| {step} | {each['cpu']:.0f} | {each['end'] - each['start']:.0f} | {tests or '-'} |")
    tests = sum(count for each in steps.values() for _, count in each["files"].values())
    budget = budgets[speed]["budget"]
    lines.append(f"| **`make {speed}`** (budget {budget:,}) | **{total:,.0f}** | **{wall:,.0f}** | **{tests:,}** |")
    lines += ["", f"{os.cpu_count()} cores, {date.today()}."]
    files = {f"{step} {name}": seconds for step, each in steps.items() for name, (seconds, _) in each["files"].items()}
    grown = []
    for name, seconds in sorted(files.items(), key=lambda item: -item[1]):
        before = budgets[speed]["files"].get(name, 0.0)
        if seconds > GREW * before and seconds - before > AT_LEAST:
            grown.append(f"  {name}: {before:.0f} to {seconds:.0f} s")
    text = "\n".join(lines)
    if write:
        budgets[speed]["files"] = {name: round(seconds, 1) for name, seconds in sorted(files.items())}
        BUDGET.write_text(json.dumps(budgets, indent=1) + "\n")
        marks = f"<!-- cpu {speed} -->", f"<!-- /cpu {speed} -->"
        pattern = f"(?s){re.escape(marks[0])}.*{re.escape(marks[1])}"
        PAGE.write_text(re.sub(pattern, lambda _: f"{marks[0]}\n{text}\n{marks[1]}", PAGE.read_text()))
    if total <= budget:
        return f"{text}\n`make {speed}` took {total:,.0f} of {budget:,} CPU seconds."
    said = "\n".join(grown) or "  none: every file is slower alike, as on a busy or slower machine"
    return f"{text}\n`make {speed}` took {total:,.0f} CPU seconds, over its budget of {budget:,}. Files that grew:\n{said}"


def main(words: list[str]) -> int:
    if words[:1] == ["run"] and len(words) > 2:
        return run(words[1], words[2:])
    if words[:1] == ["report"] and words[1:2] in (["quick"], ["test"], ["all"]):
        print(report(words[1], "--write" in words))
        return 0
    print(__doc__)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
