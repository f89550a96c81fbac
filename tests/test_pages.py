"""The pages of the site: one for each public name, every word of PEFT in the glossary, and earlier links that still work."""

import html
import re
import sys
from pathlib import Path

import keras
import pytest
import yaml
from conftest import missing

import keras_lora
from keras_lora import adapters
from keras_lora.checks import WORDS

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))
import build
import look
import reference

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import to_vllm

pytestmark = [pytest.mark.once, pytest.mark.full]

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
#: The headings of the reference when it was one page: links from outside use them.
EARLIER = ["applying", "methods", "layers", "inspecting", "files", "merging", "many-adapters"]
EARLIER += ["other-libraries", "your-own-layers", "your-own-methods"]


def test_the_reference_is_what_the_script_writes():
    for path, text in reference.pages().items():
        assert (DOCS / path).read_text() == text, "run `python docs/reference.py`"
    assert {f"api/{path.name}" for path in (DOCS / "api").iterdir()} == reference.pages().keys() - {"api.md"}
    config = (ROOT / "mkdocs.yml").read_text()
    assert config == reference.with_navigation(config), "run `python docs/reference.py`"
    assert f"{reference.BEGIN}  - Reference:" in config


@pytest.mark.parametrize(
    "module", [keras_lora, keras_lora.callbacks, keras_lora.interop, keras_lora.layers, keras_lora.plots, keras_lora.testing]
)
def test_every_public_name_has_a_page(module):
    names = getattr(module, "__all__", None) or ["check_layer", "check_adapter"]
    pages = {name for group in reference.GROUPS for name in group.names} | set(reference.ALIASES.values())
    missing = [each for each in names if f"{module.__name__}.{each}" not in pages]
    assert missing == [], "add them to GROUPS in docs/reference.py, and run it"
    assert all((DOCS / "api" / f"{name}.md").exists() for name in names)


def test_earlier_links_to_the_reference_still_lead_somewhere():
    page = (DOCS / "api.md").read_text()
    anchors = set(re.findall(r'<span id="([^"]+)">', page))
    anchors |= {title.lower().replace(" ", "-") for title in re.findall(r"^## (.+)$", page, re.MULTILINE)}
    assert [each for each in EARLIER if each not in anchors] == []
    assert {f"keras_lora.{name}" for name in keras_lora.__all__} <= anchors
    assert {"keras_lora.layers.LoRADense", "keras_lora.MultiAdapterModel.load", "keras_lora.interop.to_peft"} <= anchors


def test_the_glossary_has_every_word_that_the_errors_translate():
    page = (DOCS / "glossary.md").read_text()
    assert [word for word in WORDS if not re.search(rf"`{word}\b", page)] == []


@pytest.mark.parametrize("method", adapters.TABLE)
def test_the_page_of_the_file_format_has_the_weights_of_every_method(method):
    page = (DOCS / "adapter_file.md").read_text()
    [row] = re.findall(rf"^ *\| `{method}` \|.*$", page, re.MULTILINE)
    tokens = method == "trainable_tokens"
    layer = keras.layers.Embedding(8, 8) if tokens else keras.layers.Dense(8)
    layer.build((None,) if tokens else (None, 8))
    adapter = keras_lora.TrainableTokens([1]) if tokens else method
    weights = keras_lora.apply_lora(layer, adapter).adapter.saved_weights
    keys = {"lora_a", "lora_b", *weights} if "the same" in row else set(weights)
    assert [key for key in keys if f"`{key}" not in row and key not in ("lora_a", "lora_b")] == []


def test_the_navigation_lists_every_page_once():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    listed = [path for _, _, path in build.entries(nav)]
    assert sorted(listed) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def test_every_page_has_a_description_in_llms_txt():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    lines = [line for line in build.llms_txt(DOCS, config).splitlines() if line.startswith("- ")]
    assert len(lines) > 60
    assert [line for line in lines if "): " not in line] == []
    assert any(line.startswith("- [Quickstart](./): ") for line in lines)


def test_what_the_browser_measured_is_judged():
    measured = {"page": "/", "sideways": 0, "cut": [], "wide": []}
    narrow, wide = ({**measured, "width": width} for width in look.WIDTHS)
    assert look.problems_of([narrow, wide, {**wide, "sideways": 9}, {**narrow, "cut": ["x"]}]) == []
    [scrolls] = look.problems_of([{**narrow, "sideways": 9}])
    assert "scrolls sideways at 400" in scrolls
    [cut] = look.problems_of([{**wide, "cut": ["import keras"]}])
    assert "cuts a block of code at 1280" in cut


def test_the_table_of_vllm_is_printed_from_its_results():
    page = (DOCS / "peft.md").read_text()
    assert f"<!-- vllm -->\n{to_vllm.table()}\n<!-- /vllm -->" in page, "run `python examples/to_vllm.py page .`"


def test_code_fits_its_column():
    pages = [*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    blocks = {page.name: re.findall(r"^```py.*?$(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE) for page in pages}
    assert sum(map(len, blocks.values())) > 60
    wide = [
        (name, line) for name, found in blocks.items() for block in found for line in block.splitlines() if len(line) > 85
    ]
    assert wide == [], "the site shows 85 columns of code at 1280 pixels"


@pytest.mark.nightly
@pytest.mark.skipif(look.browser() is None, reason="there is no browser (apt-get install chromium)")
def test_no_page_scrolls_sideways_and_no_code_is_cut():
    assert build.problems_of(ROOT) == []
    assert look.look(look.pages_of(look.SITE)) == []


@pytest.mark.nightly
@pytest.mark.skipif(bool(missing("zensical", "mkdocstrings")), reason="what builds the site is not installed")
def test_the_search_has_every_message_of_troubleshooting():
    assert build.problems_of(ROOT) == []
    index = html.unescape((look.SITE / "search.json").read_text())
    messages = re.findall(r'^\| "([^"`.]+)"', (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(messages) > 15
    assert [message for message in messages if message not in index] == []
