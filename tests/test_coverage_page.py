"""The page of what was seen of layers and models says what the committed results say, and leaves nothing out."""

import inspect
from collections import Counter

import keras_hub
import pytest
from coverage_page import BACKENDS, DOCS, METHODS, page, results, row_of
from families import KINDS, MODELS, NOT_HERE
from keras_own_tests import FILES
from real_files import REAL_FILES
from sweep import problems
from test_law import CASES, FROZEN, PAIRS

pytestmark = pytest.mark.once


def test_the_page_is_written_from_the_results():
    assert (DOCS / "coverage.md").read_text() == page(), "run `python tests/coverage_page.py`"


def test_the_law_was_measured_of_every_layer_type_and_method_on_every_backend():
    measured = results("law")
    assert measured.keys() == BACKENDS.keys()
    for each in measured.values():
        assert each["cases"] == Counter(row_of(case) for case in CASES.values())
        assert {(name, method) for name, row in each["layers"].items() for method in row} == {
            (row_of(CASES[name]), method) for name, method in PAIRS if method not in FROZEN
        }
    assert METHODS.keys() == {method for _, method in PAIRS} - FROZEN


def test_every_model_was_measured_on_jax_and_on_torch_and_more_than_ten_families_on_tensorflow():
    measured = results("models")
    assert measured["jax"]["models"].keys() == MODELS.keys()
    assert measured["torch"]["models"].keys() == MODELS.keys()
    families = {name.split("/")[0] for name in measured["tensorflow"]["models"]}
    assert len(families) > 10
    assert len({KINDS[family] for family in families}) >= 9


def test_every_backbone_and_task_of_keras_hub_is_a_model_here_or_has_a_reason():
    kinds = (keras_hub.models.Backbone, keras_hub.models.Task)
    exported = {each for each in vars(keras_hub.models).values() if inspect.isclass(each) and issubclass(each, kinds)}
    abstract = {*kinds, *(each for each in exported if keras_hub.models.Task in each.__bases__)}
    names = {each.__name__ for each in exported - abstract}
    assert names - {name.split("/")[1] for name in MODELS} == set(NOT_HERE)


def test_what_does_not_hold_of_an_adapted_model_does_not_hold_of_the_plain_one_either():
    for backend, measured in results("models").items():
        not_built = {name for name, seen in measured["models"].items() if "error" in seen}
        assert not_built == ({"NASNetMobile/NASNetMobile"} if backend == "torch" else set())  # Keras refuses it on torch
        for name, seen in measured["models"].items():
            assert name in not_built or problems(seen) == [], name


def test_keras_own_tests_were_run_on_every_backend():
    measured = results("keras_tests")
    assert measured.keys() == BACKENDS.keys()
    names = {f"{name}_test" for each in FILES.values() for name in each}
    assert all(set(each["files"]) == names for each in measured.values())


def test_every_real_file_was_measured_where_any_was():
    measured = results("real_files")
    assert all(each["files"].keys() == REAL_FILES.keys() for each in measured.values())
