"""Print the tables of `docs/learning.md` from the fits of `benchmarks/learning.py`.

python docs/figures/learning.py
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import printing

RESULTS = printing.DOCS.parent / "benchmarks" / "results" / "learning"
TASKS = ("text", "images", "table")
FULL = "full"
#: Student's t for a 95 % interval, by the number of seeds.
T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def read(task: str) -> dict[str, Any]:
    """The fits of one task, or none."""
    path = RESULTS / f"{task}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"fits": []}
    return found


def arms_of(results: dict[str, Any]) -> list[str]:
    """The arms with results on the test part at their best rates, fewest trained numbers first."""
    trained = {each["arm"]: each["trained"] for each in results["fits"] if each["part"] == "test"}
    return [arm for arm in sorted(trained, key=trained.__getitem__) if tested(results, arm)]


def swept(results: dict[str, Any], arm: str) -> dict[float, float]:
    """The mean score on the validation part of each rate of an arm."""
    fits = [each for each in results["fits"] if (each["arm"], each["part"]) == (arm, "validation")]
    rates = sorted({each["rate"] for each in fits})
    return {rate: float(np.mean([each["score"] for each in fits if each["rate"] == rate])) for rate in rates}


def tested(results: dict[str, Any], arm: str) -> dict[int, dict[str, Any]]:
    """The fits of an arm on the test part at its best rate, by seed."""
    means = swept(results, arm)
    wanted = {"arm": arm, "part": "test", "rate": max(means, key=means.__getitem__)}
    return {each["seed"]: each for each in results["fits"] if wanted.items() <= each.items()}


def interval(values: list[float]) -> tuple[float, float]:
    """The mean and half of its 95 % interval."""
    half = T[len(values)] * float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(np.mean(values)), half


def difference(results: dict[str, Any], arm: str, key: str = "score") -> tuple[float, float] | None:
    """An arm minus full fine-tuning, paired by seed: the mean and half of its 95 % interval."""
    ours, full = tested(results, arm), tested(results, FULL)
    both = sorted(set(ours) & set(full))
    return interval([ours[seed][key] - full[seed][key] for seed in both]) if len(both) > 1 and arm != FULL else None


def row(results: dict[str, Any], arm: str) -> list[str]:
    """A row of the table of a task."""
    fits = list(tested(results, arm).values())
    found, scores = difference(results, arm), [each["score"] for each in fits]
    ratio = fits[0]["rate"] / next(iter(tested(results, FULL).values()))["rate"]
    cells = [arm, f"{fits[0]['rate']:g}", f"{ratio:.3g}", f"{np.mean(scores):.2f}"]
    cells.append(f"{found[0]:+.2f} ± {found[1]:.2f}" if found else "-")
    cells += [
        f"{fits[0]['trained']:,}",
        f"{fits[0]['bytes'] / 1e6:.3f}",
        f"{np.median([each['cpu s/step'] for each in fits]):.3f}",
    ]
    if "before" in fits[0]:
        cells.append(f"{np.mean([each['before'] for each in fits]):.2f}")
    return cells


def table(task: str) -> str:
    """The arms of one task at their best rates."""
    results = read(task)
    arms = arms_of(results)
    if FULL not in arms:
        return "**Not measured yet.**"
    header = ["", "rate", "of full's", "score", "minus full, 95 %", "trained numbers", "file, MB", "CPU s/step"]
    header += ["score in winter"] if "before" in tested(results, FULL)[min(tested(results, FULL))] else []
    settings, versions = results["settings"], results["versions"]
    seeds = {len(tested(results, arm)) for arm in arms}
    words = f"{min(seeds)}" if len(seeds) == 1 else f"{min(seeds)} to {max(seeds)}"
    about = f"{settings['about'][0].upper()}{settings['about'][1:]}."
    about += f" {settings['epochs']} epochs, batches of {settings['batch']}."
    below = f"Score: {settings['unit']}. {words} seeds. {versions['backend']}, Keras {versions['keras']}; {results['date']}."
    return f"{about}\n\n{printing.table(header, [row(results, arm) for arm in arms])}\n\n{below}"


def rates(task: str) -> str:
    """The sweep of one task: the mean score on the validation part, by arm and rate."""
    rows, results = [], read(task)
    for arm in dict.fromkeys(each["arm"] for each in results["fits"]):
        means = swept(results, arm)
        best = max(means, key=means.__getitem__)
        shown = [f"**{rate:g}: {mean:.2f}**" if rate == best else f"{rate:g}: {mean:.2f}" for rate, mean in means.items()]
        edge = "yes" if best in (min(means), max(means)) else ""
        rows.append([arm, ", ".join(shown), edge])
    return (
        printing.table(["", "rate: mean score of two seeds", "best at an edge"], rows, left=3)
        if rows
        else "**Not measured yet.**"
    )


def verdicts() -> str:
    """What the intervals say, task by task."""
    lines = []
    for task in TASKS:
        results = read(task)
        for arm in arms_of(results):
            found = difference(results, arm)
            if found is None:
                continue
            mean, half = found
            if abs(mean) + half <= 1:
                words = "within one point of full fine-tuning"
            elif mean + half < 0:
                words = "below full fine-tuning"
            elif mean - half > 0:
                words = "above full fine-tuning"
            else:
                words = "not told apart from full fine-tuning by these seeds"
            lines.append([task, arm, f"{mean - half:+.2f} to {mean + half:+.2f}", words])
    return printing.table(["task", "arm", "95 % interval of the difference", "so it is"], lines, left=2) if lines else ""


def blocks() -> dict[str, str]:
    """Every generated part of the page, by its name."""
    found = {"verdicts": verdicts() or "**Not measured yet.**"}
    for task in TASKS:
        found |= {f"{task} table": table(task), f"{task} rates": rates(task)}
    return found


def main() -> None:
    """Print the parts into the page."""
    for name, text in blocks().items():
        printing.put("learning.md", name, text)


if __name__ == "__main__":
    main()
