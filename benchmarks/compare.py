"""Compare the results of two trees: what changed, beside what did not.

    git worktree add .cache/old COMMIT
    PYTHONPATH=.cache/old python .cache/old/benchmarks/run.py --group dense --results .cache/before
    python benchmarks/run.py --group dense --results .cache/after
    python benchmarks/compare.py .cache/before .cache/after

Each time is taken as a ratio to "full" or "base" of the same turns, and the ratios after and before are divided. The
geometric mean over the settings of a group is printed, with the lowest and the highest. Variants that run none of our code
show how far two runs of the same code differ: a change that is not larger than theirs is noise. `startup` has no such
reference.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from ratios import groups_of, table
from rich.console import Console

OURS = "keras_lora"


def changes(before: list[Any], after: list[Any]) -> dict[tuple[str, str], list[float]]:
    """The ratio after/before of each setting, by group and variant."""
    found: dict[tuple[str, str], list[float]] = {}
    olds, news = groups_of(before), groups_of(after)
    for key in olds.keys() & news.keys():
        reference = next((name for name in ("full", "base") if name in olds[key] and name in news[key]), None)
        for name in olds[key].keys() & news[key].keys() - {reference, "limit"}:
            old, new = (each[key][name]["median"] for each in (olds, news))
            if reference is not None:
                old, new = old / olds[key][reference]["median"], new / news[key][reference]["median"]
            if old:
                quantity = key[0] if reference is None else ""
                found.setdefault((f"{olds[key][name]['case']} {quantity}".rstrip(), name), []).append(new / old)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    arguments = parser.parse_args()
    for path in sorted(arguments.before.glob("*.json")):
        both = [json.loads((folder / path.name).read_text())["records"] for folder in (arguments.before, arguments.after)]
        shown = table(
            f"{path.stem}: after / before", "group", "variant", "our code", "ratio", "ratio, lowest", "ratio, highest"
        )
        for (group, name), each in sorted(changes(*both).items()):
            numbers = (statistics.geometric_mean(each), min(each), max(each))
            shown.add_row(group, name, "yes" if name.startswith(OURS) else "", *(f"{number:.3f}" for number in numbers))
        Console(width=110).print(shown)


if __name__ == "__main__":
    main()
