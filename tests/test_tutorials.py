"""The tutorials' pages and notebooks are what their scripts and results make, and what the runner does with a script."""

import json
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))
import make_tutorials
from make_tutorials import ROOT

pytestmark = pytest.mark.once
FILES = make_tutorials.written()
SCRIPT = """# %% [markdown]
# # Title

# %%
epochs = 3  # quick: 1
print(epochs)
assert epochs == 3  # quick: skip
assert (
    epochs == 3
)  # quick: skip

# %%
numbers = {"method": "lora", "epochs": epochs, "accuracy before": 0.5, "accuracy after": 0.75}
"""


@pytest.fixture
def tutorial(tmp_path, monkeypatch):
    for name in ("SCRIPTS", "PAGES", "RESULTS"):
        monkeypatch.setattr(make_tutorials, name, tmp_path)
    script = tmp_path / "small.py"
    script.write_text(SCRIPT)
    return script


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_page_or_notebook_is_what_its_script_makes(path):
    assert path.read_text(encoding="utf-8") == FILES[path], "run `python docs/make_tutorials.py write`"


def test_every_script_is_a_tutorial_of_the_runner_the_navigation_and_make():
    helpers = {"package_files", "tutorial_data"}
    scripts = {file.stem for file in (ROOT / "examples" / "tutorials").glob("*.py")} - helpers
    assert scripts == set(make_tutorials.NAMES)
    makefile = (ROOT / "Makefile").read_text()
    [left_out] = re.findall(r"^TUTORIAL_NAMES := \$\(filter-out (.+?),.+examples/tutorials/\*\.py", makefile, re.MULTILINE)
    assert set(left_out.split()) == helpers
    in_make = {name for names in re.findall(r"^TUTORIALS_\w+ :=(.*)$", makefile, re.MULTILINE) for name in names.split()}
    assert in_make
    assert in_make < scripts
    assert set(re.findall(r"tutorials/(\w+)\.md", (ROOT / "mkdocs.yml").read_text())) == scripts


@pytest.mark.parametrize("name", make_tutorials.NAMES)
def test_a_tutorial_measured_a_before_and_an_after_on_jax(name):
    labels = " ".join(make_tutorials.results_of(name)["jax"]["numbers"])
    assert "before" in labels
    assert "after" in labels


def test_the_quick_form_has_other_values_and_leaves_lines_out(tutorial):
    assert make_tutorials.run("small", quick=True)["numbers"]["epochs"] == 1
    full = make_tutorials.run("small", quick=False)
    assert full["numbers"]["epochs"] == 3
    assert full["printed"] == ["3\n", ""]


def test_a_page_has_text_code_output_and_numbers(tutorial):
    make_tutorials.record("small", make_tutorials.run("small", quick=False))
    page = make_tutorials.page_of("small")
    assert page.startswith("# Title\n")
    assert (
        "```python\nepochs = 3\nprint(epochs)\nassert epochs == 3\nassert (\n    epochs == 3\n)\n```\n\n```text\n3\n```"
        in page
    )
    assert "| accuracy after | 0.75 |" in page
    assert "| method | lora |" in page
    sources = [cell["source"] for cell in json.loads(make_tutorials.notebook_text("small"))["cells"]]
    assert sources[1] == ["epochs = 3\n", "print(epochs)\n", "assert epochs == 3\n", "assert (\n", "    epochs == 3\n", ")"]


def test_results_of_other_code_are_refused(tutorial):
    make_tutorials.record("small", make_tutorials.run("small", quick=False))
    tutorial.write_text(SCRIPT.replace("Title", "Other title"))
    assert make_tutorials.results_of("small")
    tutorial.write_text(SCRIPT.replace("epochs = 3", "epochs = 4"))
    with pytest.raises(SystemExit, match="the code changed since it ran on torch"):
        make_tutorials.results_of("small")


def test_times_are_left_out():
    line = "50/50 - 175s - 4s/step - accuracy: 0.7350 - loss: 0.5322"
    assert make_tutorials.without_times(line) == "50/50 - accuracy: 0.7350 - loss: 0.5322"
