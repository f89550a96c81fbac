"""The page about serving has the committed results, and its benchmarks run."""

import importlib
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def served():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("served")
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_the_tables_are_those_of_the_results(served):
    assert served.page() == served.PAGE.read_text()
    assert set(served.tables()) == {"load", "text", "one row"}


def test_every_answer_of_the_load_test_was_that_of_its_adapter_alone(served):
    results = served.load_test.measure(requests=3, width=8, adapters=6, clients=4)
    assert len(results) == 4
    for each in results.values():
        assert each["error"] < 1e-4
        assert each["p99"] >= each["p50"] > 0
    assert results["uniform, one at a time"]["batches"] == 4
    with pytest.raises(AssertionError):
        served.load_test.check({"x": {"error": 1e-3}})


def test_every_part_of_one_row_is_measured(served):
    found = served.one_row.measure(seconds=0, width=8)
    assert found["ratios"].keys() == served.one_row.ROWS.keys() | {"base"}
    assert found["ratios"]["base"] == 1
