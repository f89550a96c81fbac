"""The table of KerasHub families in the docs is the one that the code of today gives."""

import pytest
from families import MODELS
from peft_page import PAGE, converted, page

from keras_lora.interop.checkpoints import CheckpointMap

pytestmark = [pytest.mark.nightly, pytest.mark.filterwarnings("ignore:Skipping :UserWarning")]


def test_the_table_is_written_from_what_the_converters_say():
    assert PAGE.read_text() == page(PAGE.read_text()), "run `python tests/peft_page.py`"


@pytest.mark.every_backend
@pytest.mark.parametrize("name", [name for name in MODELS if name.split("/")[1] in converted()])
def test_the_converter_of_each_family_is_followed_on_each_backend(name):
    checkpoint = CheckpointMap(MODELS[name]()[0])
    assert checkpoint.reason == ""
    assert checkpoint.modules
