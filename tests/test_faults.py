"""The list of seeded faults fits the code, and its table is that of the list. `make mutants` runs them."""

import re
from pathlib import Path

import pytest
from faults import FAULTS

import keras_lora

PACKAGE = Path(keras_lora.__file__).parent
TESTS = Path(__file__).parent

pytestmark = pytest.mark.once


def test_every_fault_changes_one_place():
    for fault in FAULTS:
        assert (PACKAGE / fault.file).read_text().count(fault.right) == 1, fault.name
        assert fault.right != fault.wrong
        assert (TESTS / f"{fault.near}.py").exists(), fault.near


def test_there_are_enough_of_them_and_no_two_have_one_name():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 40


def test_the_table_has_every_fault_and_all_were_noticed():
    text = (TESTS / "seeded_faults.md").read_text()
    rows = re.findall(r"^\| (.+?) \| `(.+?)` \| `make (quick|test)` \| `.+` \|$", text, re.MULTILINE)
    assert [row[:2] for row in rows] == [(fault.name, fault.file) for fault in FAULTS]
    assert sum(row[2] == "quick" for row in rows) >= 0.9 * len(FAULTS)
