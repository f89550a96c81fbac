"""The table of the page on methods is what its script writes."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "docs"))

import methods_table

from keras_lora.adapters import TABLE

pytestmark = [pytest.mark.once, pytest.mark.nightly]


def test_the_table_says_what_the_classes_say_and_has_every_method():
    assert methods_table.PAGE.read_text() == methods_table.page(), "run `python docs/methods_table.py`"
    assert {type(make()) for make in methods_table.METHODS.values()} == set(TABLE.values())
