"""`make docs` fails on what a reader would stumble over."""

import ast
import doctest
import sys
from pathlib import Path

import pytest
from conftest import missing

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))
from build import problems_of

pytestmark = [
    pytest.mark.once,
    pytest.mark.full,
    pytest.mark.skipif(bool(missing("zensical", "mkdocstrings")), reason="what builds the site is not installed"),
]
PAGE = "# A page\n\n## A part\n\n[here](index.md#a-part) and [there][package.function]\n\n::: package.function\n"
PACKAGE = '''"""A package."""


def function(x: int) -> int:
    """Double.

    Args:
        x: A number.
    """
    return 2 * x
'''
CONFIG = """site_name: test
nav: [Page: index.md]
plugins:
  - mkdocstrings:
      handlers: {python: {paths: [.], options: {docstring_style: google}}}
"""
BROKEN = {
    "a page that is not there": (PAGE + "\n[x](nowhere.md)\n", PACKAGE, "page does not exist"),
    "an anchor that is not there": (PAGE + "\n[x](index.md#nowhere)\n", PACKAGE, "anchor does not exist"),
    "an API name in a link": (PAGE + "\n[x][package.nothing]\n", PACKAGE, "unresolved autoref"),
    "a picture": (PAGE + "\n![x](nowhere.svg)\n", PACKAGE, "no picture nowhere.svg"),
    "a docstring": (PAGE, PACKAGE.replace("x: A number.", "x, y,\n            z: Numbers."), "griffe: "),
}


def site(folder, page, package):
    (folder / "docs").mkdir()
    (folder / "docs" / "index.md").write_text(page)
    (folder / "package").mkdir()
    (folder / "package" / "__init__.py").write_text(package)
    (folder / "mkdocs.yml").write_text(CONFIG)
    return problems_of(folder)


def test_a_whole_site_passes_and_has_an_index_for_language_models(tmp_path):
    assert site(tmp_path, PAGE, PACKAGE) == []
    assert "- [Page](./): here and there\n" in (tmp_path / "site" / "llms.txt").read_text()


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_site_fails(what, tmp_path):
    page, package, said = BROKEN[what]
    found = site(tmp_path, page, package)
    assert any(said in each for each in found), found


def test_a_page_is_checked_again_and_what_else_is_in_the_cache_stays(tmp_path):
    assert site(tmp_path, PAGE, PACKAGE) == []
    kept = tmp_path / ".cache" / "jax" / "0123"
    kept.parent.mkdir(parents=True)
    kept.write_text("compiled")
    (tmp_path / "docs" / "other.md").write_text("# Another page\n")
    (tmp_path / "docs" / "index.md").write_text(PAGE + "\n[x](nowhere.md)\n")
    for _ in range(2):
        found = problems_of(tmp_path)
        assert any("page does not exist" in each for each in found)
        assert "docs/other.md: the navigation does not list it" in found
    assert kept.read_text() == "compiled"


def test_long_lines_of_examples_are_broken_and_mean_the_same():
    from griffe_examples import WIDTH, narrow

    text = ">>> x = 1\n>>> print(" + ", ".join(["(x, 'a string')"] * 9) + ")  # nine\n(1, 'a string') and so on\n>>> x\n1"
    found = narrow(text)
    assert max(map(len, found.splitlines())) <= WIDTH < max(map(len, text.splitlines()))
    before, after = (doctest.DocTestParser().get_examples(each) for each in (text, found))
    assert [each.want for each in before] == [each.want for each in after]
    for one, other in zip(before, after, strict=True):
        assert ast.dump(ast.parse(one.source)) == ast.dump(ast.parse(other.source))
    assert narrow(">>> 1\n1") == ">>> 1\n1"
