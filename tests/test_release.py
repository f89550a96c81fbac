"""What `make release` checks of the files: the versions agree, and PyPI's page has no link that leads nowhere."""

import re
import shutil
import sys
import tomllib
from pathlib import Path

import pytest
from helpers import once
from release import disagreements, relative_links

import keras_lora

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from hatch_build import Readme, absolute_links  # noqa: E402

pytestmark = once

FILES = ("keras_lora/__init__.py", "CHANGELOG.md", "CITATION.cff")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture
def copy(tmp_path):
    """A copy of the files that name the version."""
    (tmp_path / "keras_lora").mkdir()
    for file in FILES:
        shutil.copy(ROOT / file, tmp_path / file)
    return tmp_path


def change(copy, file, old, new):
    text = (copy / file).read_text()
    assert re.search(old, text, re.MULTILINE), old
    (copy / file).write_text(re.sub(old, new, text, count=1, flags=re.MULTILINE))


def test_the_version_is_the_same_in_all_files():
    assert disagreements(ROOT, released=False) == []
    assert "version" in PROJECT["dynamic"]


@pytest.mark.parametrize("file", FILES)
def test_another_version_in_one_file_is_noticed(copy, file):
    change(copy, file, re.escape(keras_lora.__version__), "9.9.9")
    problems = disagreements(copy, released=False)
    assert problems
    assert all("9.9.9" in problem for problem in problems)


def test_a_release_has_the_same_date_in_the_changelog_and_the_citation(copy):
    change(copy, "CHANGELOG.md", r"^(## \S+) \(.*\)$", r"\1 (unreleased)")
    change(copy, "CITATION.cff", r"\A((?:(?!date-released).*\n)*)(date-released.*\n)?", r"\1")
    assert disagreements(copy, released=False) == []
    assert disagreements(copy, released=True) == [f"CHANGELOG.md has no date for {keras_lora.__version__}"]
    change(copy, "CHANGELOG.md", "unreleased", "2027-01-31")
    assert "date-released" in disagreements(copy, released=True)[0]
    change(copy, "CITATION.cff", "^(version: .*)$", r"\1\ndate-released: 2027-01-31")
    assert disagreements(copy, released=True) == []


def test_the_citation_has_what_its_format_asks_for():
    keys = re.findall(r"^([a-z-]+):", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert {"cff-version", "message", "title", "authors"} <= set(keys)
    assert len(keys) == len(set(keys))
    text = (ROOT / "CITATION.cff").read_text()
    assert f"license: {PROJECT['license']}\n" in text
    assert f"repository-code: {PROJECT['urls']['Homepage']}\n" in text


def test_links_of_the_readme_lead_to_files_of_this_version():
    metadata = {"urls": PROJECT["urls"], "version": keras_lora.__version__}
    Readme(str(ROOT), {}).update(metadata)
    page, readme = metadata["readme"]["text"], (ROOT / "README.md").read_text()
    files = f"{PROJECT['urls']['Homepage']}/blob/v{keras_lora.__version__}/"
    targets = re.findall(rf"\]\({re.escape(files)}([^)#]+)", page)
    assert len(targets) == len([link for link in relative_links(readme) if "://" not in link]) > 5
    assert [target for target in targets if not (ROOT / target).is_file()] == []
    assert relative_links(page) == []
    assert page.replace(files, "") == readme  # nothing else is changed


def test_only_relative_links_are_changed():
    text = "[a](docs/a.md#b) [b](https://x.org) [c](#d) [d](mailto:a@b.c) ![e](e.png)"
    found = absolute_links(text, "https://x.org/y")
    assert found == (
        "[a](https://x.org/y/docs/a.md#b) [b](https://x.org) [c](#d) [d](mailto:a@b.c) ![e](https://x.org/y/e.png)"
    )
