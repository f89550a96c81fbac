"""The promises about the code itself."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

import keras_lora

pytestmark = pytest.mark.once

PACKAGE = Path(keras_lora.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

#: Imports run one way: a file may import those below it. Files on one line do not import one another.
ORDER = [
    ["__main__"],
    ["cli"],
    ["__init__"],
    ["hub", "testing", "interop"],
    ["combining", "serving", "adapter_file"],
    ["registration", "merging", "contents", "composition", "inspection"],
    ["inject"],
    ["targets"],
    ["blocks", "presets"],
    ["patterns", "layers", "names", "fingerprint"],
    ["adapted"],
    ["slots"],
    ["training", "linear_map", "rebuilding"],
    ["structure", "quantization", "adapters"],
    ["keras_internals", "backend", "factors", "huggingface", "tensor_file", "tables"],
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}


def room(path):
    """The name in `ORDER` that stands for a file: its own, or its folder's."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_file_has_its_place():
    assert {room(path) for path in FILES} == set(LEVEL)


def test_imports_run_one_way():
    for path in FILES:
        for name in imported(path):
            parts = name.split(".")
            if parts[0] != "keras_lora" or len(parts) < 2 or parts[1] not in LEVEL:
                continue
            inside = parts[1] == room(path) and room(path) in ("adapters", "cli", "interop", "layers")
            assert inside or LEVEL[parts[1]] > LEVEL[room(path)], f"{path.name} imports {name}"


def test_layers_know_no_particular_method_and_methods_no_layer():
    for path in FILES:
        names = " ".join(imported(path))
        if room(path) == "layers" or path.stem in ("adapted", "linear_map"):
            assert not re.search(r"adapters\.(lora|dora|trainable_tokens|LoRA|DoRA|TrainableTokens)\b", names), path
        if room(path) == "adapters":
            assert "keras_lora.layers" not in names
            assert "linear_map" not in names


def test_one_file_imports_a_backend():
    for path in FILES:
        if path.stem == "backend":
            continue
        roots = {name.partition(".")[0] for name in imported(path)}
        assert not roots & {"tensorflow", "jax", "torch"}, path


def test_private_names_of_keras_are_used_in_one_file():
    for path in FILES:
        if path.stem != "keras_internals":
            assert "keras.src" not in path.read_text().replace('"keras.src.backend."', ""), path
    own = {"_name_", "__class__"}
    for path in FILES:
        if path.stem in ("keras_internals", "backend"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                defined = re.search(rf"\b(def|class)\s+{node.attr}\b|\bself\.{node.attr}\s*(:[^=\n]+)?=", path.read_text())
                assert defined or node.attr in own, f"{path.name} uses {node.attr}"


def test_one_file_assigns_a_class():
    assigning = [path.stem for path in FILES if re.search(r"\.__class__\s*=[^=]", path.read_text())]
    assert assigning == ["adapted"]


def test_one_file_names_a_quantisation_mode():
    naming = {path.stem for path in FILES if re.search(r"[\"']int[48][\"']", path.read_text())}
    assert naming == {"quantization"}


def test_the_public_names_are_sorted_and_complete():
    assert keras_lora.__all__ == sorted(keras_lora.__all__)
    public = {name for name, each in vars(keras_lora).items() if not name.startswith("_") and not inspect.ismodule(each)}
    assert public | {"interop", "testing"} == set(keras_lora.__all__)


def test_rooms_are_small():
    sizes = {path.name: len(path.read_text().splitlines()) for path in FILES}
    assert max(sizes.values()) <= 420, sizes


def test_the_parts_import_on_their_own():
    for path in FILES:
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        importlib.import_module(".".join(part for part in parts if part != "__init__"))
