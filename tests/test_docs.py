"""Every example in a docstring, in the README and in the docs runs on every backend."""

import contextlib
import doctest
import importlib
import io
import pkgutil
import re
from pathlib import Path

import keras
import pytest
from helpers import covering

import keras_lora
from keras_lora import adapters
from keras_lora.swap import adapted

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = ["keras_lora", *(each.name for each in pkgutil.walk_packages(keras_lora.__path__, "keras_lora."))]


@pytest.fixture(autouse=True)
def _what_examples_register_goes_again():
    """Examples register layers and methods; other tests look at the tables of all there are."""
    tables = (adapters.TABLE, adapted.ADAPTED_CLASSES)
    before = [dict(table) for table in tables]
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


@pytest.mark.parametrize("name", covering(MODULES, ["keras_lora.applying", "keras_lora.layers.dense"]))
def test_the_examples_of_docstrings(name, tmp_path, monkeypatch):
    if name == "keras_lora.plots.drawing":
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    examples = doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name), name)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE, verbose=False)
    for example in examples:
        example.globs = {}
        # torch prints a shape as torch.Size([2, 64]).
        for line in example.examples:
            if keras.backend.backend() == "torch" and line.source.strip().endswith(".shape"):
                line.source = f"tuple({line.source.strip()})\n"
        runner.run(example)
    assert runner.failures == 0


@pytest.mark.parametrize("name", keras_lora.__all__)
def test_every_public_name_has_a_docstring(name):
    assert getattr(keras_lora, name).__doc__


@pytest.mark.parametrize("page", covering(PAGES, PAGES[:1]), ids=lambda page: page.name)
def test_the_python_blocks_of_a_page(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")  # tables are as wide as the terminal
    names, text = {"__name__": "__main__"}, page.read_text()
    for block in re.finditer(r"^```python\n(.*?)^```\n", text, re.DOTALL | re.MULTILINE):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block[1], str(page), "exec"), names)
        if shown := re.match(r"\n```text\n(.*?)\n```", text[block.end() :], re.DOTALL):
            assert shown[1].split() == printed.getvalue().split()
    assert page.name not in ("README.md", "index.md") or "keras_lora" in names
