"""The tables of "What is LoRA?" and of the plots agree with the committed results."""

import importlib.util
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs" / "figures"))
import printing  # noqa: E402
import what_is_lora  # noqa: E402


def shown(page, name):
    [found] = printing.place(name).findall((ROOT / "docs" / page).read_text())
    return found


def test_the_claims_are_printed_from_the_results():
    assert shown("what_is_lora.md", "claims") == what_is_lora.claims(), "run `python docs/figures/what_is_lora.py`"


def test_the_full_update_is_printed_from_its_results():
    assert shown("what_is_lora.md", "full update") == what_is_lora.full_update(), "run `python docs/figures/what_is_lora.py`"


def test_each_claim_with_a_number_has_its_script_and_each_other_says_that_it_has_none():
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in what_is_lora.claims().splitlines()[2:]]
    assert len(rows) == len(what_is_lora.CLAIMS)
    for row, (_, _, _, script) in zip(rows, what_is_lora.CLAIMS, strict=True):
        if script:
            assert any(character.isdigit() for character in row[2]), row
            assert (ROOT / script).exists()
            assert row[3] == f"`{script}`"
        else:
            assert row[2:] == ["**not measured, so not claimed**", "-"]


def test_a_claim_whose_results_are_gone_is_not_made(monkeypatch):
    page = what_is_lora.benchmarks()
    monkeypatch.setattr(page, "read", dict)
    monkeypatch.setattr(what_is_lora, "benchmarks", lambda: page)
    monkeypatch.setattr(what_is_lora, "accuracies", dict)
    text = what_is_lora.claims()
    kept = 3  # the page of coverage and the results of two tutorials are there
    assert text.count("**not measured, so not claimed**") == len(what_is_lora.CLAIMS) - kept
    assert "benchmarks/run.py" not in text


def test_the_figures_are_there_and_the_shares_are_those_of_singular_values():
    results = printing.read("full_update")
    assert len(results["kernels"]) == 36
    for each in results["kernels"]:
        shares = list(each["kept"].values())
        assert 0 < shares[0] <= shares[-1] <= 1
        assert shares == sorted(shares)


def test_the_table_of_the_plots_is_printed_from_its_results(monkeypatch):
    for name in ("movie_reviews", "movie_reviews_data"):  # they need packages of the examples, and the table does not
        monkeypatch.setitem(sys.modules, name, type(sys)(name))
    monkeypatch.setattr(sys.modules["movie_reviews_data"], "load_sentences", None, raising=False)
    pictures = importlib.util.spec_from_file_location("pictures", ROOT / "docs" / "figures" / "plots.py")
    module = importlib.util.module_from_spec(pictures)
    pictures.loader.exec_module(module)
    assert shown("plots.md", "plots") == module.text(printing.read("plots")), "run `python docs/figures/plots.py`"


def test_what_the_pages_say_about_the_results_is_so():
    results = printing.read("full_update")
    cut, whole = results["accuracy of a cut update"], results["accuracy"]
    kept = [each["kept"]["8"] for each in results["kernels"]]
    assert sum(kept) / len(kept) < 0.5, "more than half of the squared norm is missing at rank 8"
    assert cut["8"] - cut["0"] > 0.95 * (whole - cut["0"]), "a few directions give nearly all"
    results = printing.read("plots")
    [eight, one] = [results["curves"][name]["val_accuracy"][-1] for name in ("films", "films, rank 1")]
    assert abs(eight - one) < (eight * (1 - eight) / results["settings"]["validation"]) ** 0.5, "nearly the same accuracy"
    assert results["adapters"]["films"]["effective_rank"] > 6, "it uses most of its directions"
    pairs = {(i, j): results["overlaps"]["subspace"][i][j] for i in range(4) for j in range(i)}
    assert max(pairs, key=pairs.get) == (1, 0), "the two of the films overlap more than any other pair"
    assert results["chance"] < pairs[1, 0] < 2 * results["chance"], "a little more than chance"
