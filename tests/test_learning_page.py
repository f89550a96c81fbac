"""The page of learning says what the committed fits say, and the statistics on it are right."""

import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs" / "figures"))
import learning  # noqa: E402
import printing  # noqa: E402


@pytest.mark.parametrize("name", learning.blocks())
def test_each_part_is_printed_from_the_fits(name):
    [shown] = printing.place(name).findall((ROOT / "docs" / "learning.md").read_text())
    assert shown == learning.blocks()[name], "run `python docs/figures/learning.py`"


def of(arm, part, rate, scores):
    return [{"arm": arm, "part": part, "rate": rate, "seed": seed, "score": score} for seed, score in enumerate(scores)]


def test_a_difference_is_paired_by_seed_at_the_best_rate_of_each_arm():
    fits = (
        of("full", "validation", 0.1, [1, 1]) + of("lora", "validation", 1.0, [1, 2]) + of("lora", "validation", 2.0, [0, 2])
    )
    fits += (
        of("full", "test", 0.1, [10, 20, 30]) + of("lora", "test", 1.0, [11, 22, 33]) + of("lora", "test", 2.0, [0, 0, 0])
    )
    mean, half = learning.difference({"fits": fits}, "lora")
    assert mean == 2
    assert half == pytest.approx(4.303 / 3**0.5)  # Student's t of three differences 1, 2, 3, whose deviation is 1
    assert learning.difference({"fits": fits}, "full") is None
