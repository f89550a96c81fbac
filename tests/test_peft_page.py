"""The table of KerasHub families in the docs is the one that the code of today gives."""

import keras
import pytest
from peft_page import PAGE, page


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="the same table; JAX takes minutes to make these models")
def test_the_table_is_written_from_what_the_converters_say():
    assert PAGE.read_text() == page(PAGE.read_text()), "run `python tests/peft_page.py`"
