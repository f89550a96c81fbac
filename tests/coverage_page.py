"""Write the page `docs/coverage.md`: results for every layer type, and for every model of KerasHub and keras.applications.

    KERAS_BACKEND=jax python tests/coverage_page.py law                   # writes docs/coverage/law_jax.json
    KERAS_BACKEND=jax python tests/coverage_page.py law miss ia3          # these methods alone; the others stay
    KERAS_BACKEND=jax python tests/sweep.py --json docs/coverage/models_jax.json
    KERAS_OWN_TESTS_JSON=docs/coverage/keras_tests_jax.json ...           # see keras_own_tests.py
    REAL_FILES_JSON=docs/coverage/real_files_jax.json python -m pytest --speed=all tests/test_real_files.py
    python tests/coverage_page.py                                         # writes the page from these files

`test_coverage_page.py` compares the page with the files.
"""

from __future__ import annotations

import collections
import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
BACKENDS = {"jax": "JAX", "tensorflow": "TensorFlow", "torch": "PyTorch"}
METHODS = {"lora": "LoRA", "dora": "DoRA", "miss": "MiSS", "ia3": "IA3", "ia3_inputs": "IA3, inputs", "lokr": "LoKr"}
METHODS |= {"oft": "OFT", "loha": "LoHa", "vera": "VeRA", "trainable_tokens": "trainable tokens"}
INTRODUCTION = """# Coverage

This page shows test results of `apply_lora` for each layer type and each model. `tests/coverage_page.py` writes the tables
from the results of `tests/test_law.py`, `tests/keras_own_tests.py` and `tests/sweep.py`. No number is entered by hand.
"""
OF_LAYERS = """
## Layer types

An adapted layer must compute the same as a plain Keras layer with the kernel `W + ΔW`. `tests/test_law.py` checks this for
each layer type, in several cases: strides, padding, dilation, groups, data formats, masks, states, directions and dtypes, as
far as the layer has them. Each number is the largest difference over the cases and over {backends}. It is relative to the
largest output if that is greater than one. A dash means that the method does not apply: trainable
tokens need an embedding, and OFT does not rotate ids. LoRA, DoRA and trainable tokens were measured on every case; the
other methods on every case with PyTorch, and on the first case of each row with the other backends.

{table}

Dropout on the input of the adapter is refused if the kernel never gets that input alone. This is so for depthwise, separable
and recurrent kernels, embeddings, and registered kernels. In the bfloat16 rows, the two sides round differently.

Measured with {versions}.
"""
OF_KERAS_TESTS = """
## Keras's own tests

`tests/keras_own_tests.py` runs the tests that Keras {keras} has for these layers. Instead of Keras's layers it uses adapted
layers whose adapters add zero. No test that ran failed. The counts:

- "passed": all tests that passed, with the next two groups.
- "without an adapter": tests that need no adapter, for example tests of wrong arguments.
- "with the stored kernel": tests that assign `layer.kernel`, read its constraint or need a gradient with respect to it. They
  run with the frozen kernel instead of `W + ΔW`.
- "skipped": tests that Keras skips on a backend.
- "left out": tests that are not run; the reasons are below.

Each cell shows {order}.

{table}

These tests are left out. Each line starts with their number:

{reasons}
"""
OF_MODELS = """
## Models

Each model is built from a small config, gets random weights, is adapted with the default targets at rank 2, and goes through
the steps of a user:

- **share**: the share of the parameters that train. It is large because these models are tiny.
- **forward**: how much `apply_lora` changes the outputs. 0 means bit for bit the same.
- **training**: what one step of `fit` on meaningless targets changes. "yes" means more than half of the adapters'
  weights, and nothing else.
- **`.keras`**, **merge**: how much the outputs change by saving and loading, and by merging, once the adapters have moved.
  If the number for merging is above 1e-4, a change of the last bit of the input has about the same effect.

Each number is the largest one over the backends in the last column, relative to the largest number of an output.

Some steps do not work. The table then has "see" and the number of the reason:

{reasons}

{table}

The table has every backbone and task that KerasHub exports, except {not_here}.

Measured with {versions}.
"""
OF_REAL_FILES = """
## Real model files

`tests/test_real_files.py` takes these pretrained models from packages on PyPI; most were written by Keras 1 or 2. Each is
adapted with the default targets at rank 2, trained, saved, merged, and adapted again with DoRA. Only the adapters move.

- **forward**: how much `apply_lora` changes the outputs.
- **loss**: the loss after eight steps, as a share of the loss before them. The targets are what another adapter gives.
- **`.keras`**: how far the saved model is in a fresh process of the same backend.
- **adapter file**: how far the plain model with the adapter file is in a process of another backend: {elsewhere}.
- **merge**, **DoRA merge**: how much the outputs change by merging.

Each number is the largest one over {backends}, relative to the largest output if that is greater than one.

{table}

Measured with {versions}.
"""


def say(found: float) -> str:
    """A difference in a table."""
    return "0" if found == 0 else f"{found:.0e}".replace("e-0", "e-")


def quoted(message: str) -> str:
    """A message of an error as code: its `<...>` is no HTML."""
    text = message.strip().rstrip(":").replace("`", "'")
    return f"`{text}`"


def table(header: list[str], rows: list[list[str]], left: int = 1) -> str:
    """A Markdown table; the columns after the first `left` are aligned to the right."""
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *rows])


def results(kind: str) -> dict[str, dict[str, Any]]:
    """The results by backend."""
    paths = {backend: DOCS / "coverage" / f"{kind}_{backend}.json" for backend in BACKENDS}
    return {backend: json.loads(path.read_text()) for backend, path in paths.items() if path.exists()}


def versions(measured: dict[str, dict[str, Any]]) -> str:
    """The packages that these results were measured with."""
    return ", ".join(sorted({f"{name} {each}" for found in measured.values() for name, each in found["versions"].items()}))


# Layer types.


def measure_law(methods: list[str]) -> None:
    """Run the cases of the law test on this backend, of all methods or of some, and write its file."""
    from test_law import CASES, FROZEN, LIGHT, PAIRS, law

    backend = os.environ["KERAS_BACKEND"]
    path = DOCS / "coverage" / f"law_{backend}.json"
    rows: dict[str, dict[str, float]] = collections.defaultdict(dict)
    if methods:
        for name, row in json.loads(path.read_text())["layers"].items():
            rows[name] = {method: each for method, each in row.items() if method not in methods}
    counts = collections.Counter(row_of(case) for case in CASES.values())
    for name, method in PAIRS:
        row = rows[row_of(CASES[name])]
        few = method in LIGHT and backend != "torch" and method in row  # the first case of a row
        if method in FROZEN or few or (methods and method not in methods):
            continue
        apart, _ = law(name, method)
        assert apart < CASES[name].tolerance, name
        row[method] = max(row.get(method, 0.0), apart)
    package = {"jax": "jax", "tensorflow": "tensorflow-cpu", "torch": "torch"}[backend]
    found = {"layers": rows, "cases": counts, "versions": {name: version(name) for name in ("keras", package)}}
    path.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


def row_of(case: Any) -> str:
    """The row of the table that a case belongs to."""
    registered = " (registered)" if case.cls.__module__ == "test_law" else ""
    return case.cls.__name__ + registered + (" (bfloat16)" if case.tolerance > 1e-3 else "")


def layers_section() -> str:
    """The section on layer types."""
    measured = results("law")
    rows = []
    for name in sorted(next(iter(measured.values()))["layers"]):
        cells = [[each["layers"][name].get(method) for each in measured.values()] for method in METHODS]
        shown = [say(max(found)) if None not in found else "-" for found in cells]
        layer, mark, rest = name.partition(" ")
        rows.append([f"`{layer}`{mark}{rest}", str(next(iter(measured.values()))["cases"][name]), *shown])
    backends = ", ".join(BACKENDS[each] for each in measured)
    shown = table(["layer", "cases", *METHODS.values()], rows)
    return OF_LAYERS.format(backends=backends, table=shown, versions=versions(measured))


# Keras's own tests.


def keras_tests_section() -> str:
    """The section on Keras's own tests."""
    measured = results("keras_tests")
    kinds = ["passed", "without an adapter", "with the stored kernel", "skipped", "left out"]
    rows = []
    for file in sorted(set().union(*(each["files"] for each in measured.values()))):
        counts = [each["files"].get(file, {}) for each in measured.values()]
        assert not any(count.get("failed") for count in counts), f"tests of {file} failed"
        rows.append([f"`{file}`", *(" · ".join(str(count.get(kind, 0)) for kind in kinds) for count in counts)])
    left_out = next(iter(measured.values()))["left out"]
    reasons = "\n".join(f"- {count}: {reason}." for reason, count in sorted(left_out.items(), key=lambda each: -each[1]))
    keras_version = next(iter(measured.values()))["versions"]["keras"]
    order = "passed · of these without an adapter · of these with the stored kernel · skipped · left out"
    shown = table(["file", *(BACKENDS[each] for each in measured)], rows)
    return OF_KERAS_TESTS.format(keras=keras_version, table=shown, reasons=reasons, order=order)


# Models.


class Reasons:
    """The reasons for steps that do not work. Each is listed once, and the table shows its number."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def number(self, text: str) -> str:
        """The text of a cell with this reason."""
        if text not in self.texts:
            self.texts.append(text)
        return f"see {self.texts.index(text) + 1}"

    def __str__(self) -> str:
        return "\n".join(f"{number}. {text}" for number, text in enumerate(self.texts, 1))


def models_section() -> str:
    """The section on models."""
    from families import KINDS, NOT_HERE, applications, multimodal, text, vision  # noqa: F401  # they enter their models

    measured, reasons, rows = results("models"), Reasons(), []
    for name in sorted(set().union(*(each["models"] for each in measured.values())), key=str.lower):
        family, model = name.split("/")
        seen = {backend: each["models"][name] for backend, each in measured.items() if name in each["models"]}
        kind = KINDS[family]
        rows.append([f"`{model}`", family if family != model else "-", kind, *cells(seen, reasons)])
    header = ["model", "family", "kind", "adapted", "share", "forward", "training", "`.keras`", "merge", "seen on"]
    not_here = ", ".join(f"`{name}` ({why})" for name, why in NOT_HERE.items())
    shown = table(header, rows, left=3)
    return OF_MODELS.format(reasons=reasons, table=shown, not_here=not_here, versions=versions(measured))


def cells(seen: dict[str, dict[str, Any]], reasons: Reasons) -> list[str]:
    """The cells of a model, from its results by backend."""
    built = {backend: each for backend, each in seen.items() if "error" not in each}
    on = [BACKENDS[backend] for backend in built]
    for backend in seen:
        if backend not in built:
            on.append(reasons.number(f"On {BACKENDS[backend]}: {quoted(seen[backend]['error'])}"))
    if not built:
        return [*["-"] * 6, ", ".join(on)]
    first = next(iter(built.values()))
    assert len({(each["adapted"], each["trainable"]) for each in built.values()}) == 1, seen
    share = f"{100 * first['trainable'] / first['parameters']:.1f} %"
    of = {key: number(key, built, reasons) for key in ("apply", "round_trip", "merge")}
    trains = training(built, reasons)
    return [str(first["adapted"]), share, of["apply"], trains, of["round_trip"], of["merge"], ", ".join(on)]


def number(key: str, built: dict[str, dict[str, Any]], reasons: Reasons) -> str:
    """The cell of a difference."""
    failing = {backend: each[f"plain_{key}"] for backend, each in built.items() if f"plain_{key}" in each}
    if failing:
        plain, on = next(iter(failing.values())), ", ".join(BACKENDS[each] for each in failing)
        if isinstance(plain, str):
            return reasons.number(f"On {on}, the plain model fails too. {quoted(plain)}")
        return reasons.number(f"On {on}, the plain model also comes back different, by {say(plain)}.")
    return say(max(each[key] for each in built.values()))


def training(built: dict[str, dict[str, Any]], reasons: Reasons) -> str:
    """The cell of a step of training."""
    for backend, each in built.items():
        if each["moved"] and each["moved"] != each["plain_moved"]:
            return reasons.number(f"{BACKENDS[backend]}: {quoted(str(each['moved']))}")
        if isinstance(each["moved"], str):
            return reasons.number(f"The frozen plain model cannot be trained this way either. {quoted(each['moved'])}")
        if each["moved"]:
            inside = ", ".join(sorted({path.split("/")[-1] for path in each["moved"]}))
            return reasons.number(f"Training changes these in the frozen plain model too: {inside}.")
    return "yes"


# Real model files.


def real_files_section() -> str:
    """The section on real model files."""
    from real_files import REAL_FILES

    measured, rows = results("real_files"), []
    if not measured:
        return ""
    for name, file in REAL_FILES.items():
        seen = [each["files"][name] for each in measured.values()]
        counts = [f"{seen[0][key]:,}" for key in ("parameters", "adapted", "trainable")]
        worst = {key: max(each[key] for each in seen) for key in ("forward", "loss", "keras", "adapter", "merge", "dora")}
        rows.append([name, file.kind, f"`{file.requirement}`", *counts, *(say(each) for each in worst.values())])
        rows[-1][7] = f"{worst['loss']:.2f}"
    header = ["file", "kind", "package", "parameters", "adapted", "trainable", "forward", "loss"]
    shown = table([*header, "`.keras`", "adapter file", "merge", "DoRA merge"], rows, left=3)
    elsewhere = ", ".join(f"{BACKENDS[here]} to {BACKENDS[each['elsewhere']]}" for here, each in measured.items())
    backends = ", ".join(BACKENDS[each] for each in measured)
    return OF_REAL_FILES.format(table=shown, elsewhere=elsewhere, backends=backends, versions=versions(measured))


def page() -> str:
    """The whole page."""
    return INTRODUCTION + layers_section() + keras_tests_section() + models_section() + real_files_section()


if __name__ == "__main__":
    if sys.argv[1:2] == ["law"]:
        if os.environ["KERAS_BACKEND"] == "torch":
            import torch  # noqa: F401  # before TensorFlow
        measure_law(sys.argv[2:])
    else:
        (DOCS / "coverage.md").write_text(page())
