"""The table of KerasHub families in the docs is the one that the code of today gives."""

import pytest
from peft_page import PAGE, page

pytestmark = [pytest.mark.nightly, pytest.mark.filterwarnings("ignore:Skipping :UserWarning")]


def test_the_table_is_written_from_what_the_converters_say():
    assert PAGE.read_text() == page(PAGE.read_text()), "run `python tests/peft_page.py`"
