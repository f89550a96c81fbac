"""What serving many adapters costs: one row per request, a load test, and text of a language model.

    python benchmarks/served.py run PART [BACKEND ...]  # measures, and adds to results/served.json
    python benchmarks/served.py page                    # writes the tables in docs/serving.md from that file

A part is "one row", "load", "tiny" or "SmolLM2".
`one_row.py`, `load_test.py` and `generation.py` say what is measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import generation
import load_test
import measuring
import one_row

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks/results/served.json", ROOT / "docs/serving.md"
PARTS = ("one row", "load", "tiny", "SmolLM2")


def measure(part: str) -> dict[str, Any]:
    if part == "one row":
        return one_row.measure()
    if part == "load":
        return load_test.measure()
    return generation.measure(generation.tiny) if part == "tiny" else generation.measure(generation.smollm2, rounds=3)


def run(part: str, backends: list[str]) -> None:
    for backend in backends or one_row.BACKENDS:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, __file__, "measure", part, backend]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        found = json.loads(done.stdout.splitlines()[-1])
        results.setdefault(part, {})[backend] = {**found, "load average": measuring.load_average()}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        print(part, backend, json.dumps(found, indent=1), flush=True)


def tables() -> dict[str, str]:
    """The tables by the name of their place in the page."""
    results = json.loads(RESULTS.read_text())
    without = {part: {backend: dict(found) for backend, found in each.items()} for part, each in results.items()}
    for each in without.values():
        for found in each.values():
            del found["load average"]
    text = {f"{backend} {part}": found for part in PARTS[2:] for backend, found in without.get(part, {}).items()}
    return {
        "one row": one_row.table(without["one row"]),
        "load": load_test.table(without["load"]),
        "text": generation.table(text),
    }


def page() -> str:
    """The page with the tables of the committed results."""
    text = PAGE.read_text()
    for name, table in tables().items():
        before, rest = text.split(f"<!-- {name} -->\n")
        text = f"{before}<!-- {name} -->\n{table}<!-- /{name} -->\n{rest.split(f'<!-- /{name} -->' + chr(10))[1]}"
    return text


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        measuring.pin(sys.argv[3])
        print(json.dumps(measure(sys.argv[2])))
    elif sys.argv[1:] == ["page"]:
        PAGE.write_text(page())
    elif sys.argv[1:2] == ["run"] and sys.argv[2:3] and sys.argv[2] in PARTS:
        run(sys.argv[2], sys.argv[3:])
    else:
        sys.exit(__doc__)
