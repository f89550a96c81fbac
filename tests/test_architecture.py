"""The promises about the code itself."""

import ast
import importlib
import inspect
import re
import sys
from pathlib import Path

import pytest
from conftest import NEEDS

import keras_lora

pytestmark = pytest.mark.once

PACKAGE = Path(keras_lora.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

#: Modules at the top of the package, and its folders. Imports run downwards; those on one line do not import one another.
ORDER = [
    ["__main__"],
    ["cli"],
    ["__init__"],
    ["callbacks", "interop", "memory", "optimizers", "plots", "serving", "starts", "testing"],
    ["combining", "files", "inspecting", "loading", "merging"],
    ["switching"],
    ["applying"],
    ["logits", "targets"],
    ["layers"],
    ["swap"],
    ["linear_map"],
    ["adapters"],
    ["compat"],
    ["backend"],
    ["checks", "factors", "reports"],
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
FOLDERS = {path.parent.name for path in FILES} - {PACKAGE.name}
#: The top of the package has the public face and `linear_map`; everything else is in a folder.
MOST_AT_THE_TOP = 14


def place(path):
    """The name in `ORDER` that stands for a file: its own, or its folder's."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path):
    """What a file imports when it runs; what only types need does not count."""
    tree = ast.parse(path.read_text())
    for_types = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    left_out = {id(inside) for node in for_types for inside in ast.walk(node)}
    yield from imports_of(node for node in ast.walk(tree) if id(node) not in left_out)


def imports_of(nodes):
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_file_has_its_place():
    assert {place(path) for path in FILES} == set(LEVEL)
    assert sum(path.parent == PACKAGE for path in FILES) <= MOST_AT_THE_TOP
    assert all(ast.get_docstring(ast.parse((PACKAGE / folder / "__init__.py").read_text())) for folder in FOLDERS)


def test_imports_run_one_way():
    for path in FILES:
        for name in imported(path):
            parts = name.split(".")
            if parts[0] != "keras_lora" or len(parts) < 2 or parts[1] not in LEVEL:
                continue
            inside = parts[1] == place(path) and place(path) in FOLDERS
            assert inside or LEVEL[parts[1]] > LEVEL[place(path)], f"{path.name} imports {name}"


def test_the_modules_of_a_folder_do_not_import_in_a_circle():
    names = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in FILES}
    arrows = {name: {each for each in imported(path) if each in names} - {name} for name, path in names.items()}
    while arrows:
        free = [name for name, to in arrows.items() if not to & arrows.keys()]
        assert free, f"a circle among {sorted(arrows)}"
        arrows = {name: to for name, to in arrows.items() if name not in free}


def test_layers_know_no_particular_method_and_methods_no_layer():
    for path in FILES:
        names = " ".join(imported(path))
        if place(path) == "layers" or path.stem in ("adapted", "linear_map"):
            assert not re.search(r"adapters\.(lora|dora|trainable_tokens|LoRA|DoRA|TrainableTokens)\b", names), path
        if place(path) == "adapters":
            assert "keras_lora.layers" not in names
            assert "linear_map" not in names


def test_one_folder_imports_a_backend():
    for path in FILES:
        if place(path) == "backend":
            continue
        roots = {name.partition(".")[0] for name in imported(path)}
        assert not roots & {"tensorflow", "jax", "torch"}, path


#: The files with private names of Keras: about layers and files, calls, and compiling and training.
PRIVATE = ("keras_internals", "call_internals", "training_internals")


def test_private_names_of_keras_are_used_in_three_files():
    for path in FILES:
        if path.stem not in PRIVATE:
            assert "keras.src" not in path.read_text().replace('"keras.src.backend."', ""), path
    own = {"_name_", "__class__"}
    for path in FILES:
        if path.stem in PRIVATE or place(path) == "backend":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                defined = re.search(rf"\b(def|class)\s+{node.attr}\b|\bself\.{node.attr}\s*(:[^=\n]+)?=", path.read_text())
                assert defined or node.attr in own, f"{path.name} uses {node.attr}"


#: Besides the private names of Keras, the files that know KerasHub's attributes.
DOORS = {*PRIVATE, "keras_hub"}


def test_private_names_in_strings_are_behind_the_same_doors():
    for path in FILES:
        if path.stem in DOORS or {"keras_hub", "backend"} & set(path.parts):
            continue
        text = path.read_text()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"_[a-z]\w+_\w+", node.value):
                own = node.value.startswith("_keras_lora") or re.search(rf'vars\(self\)\["{node.value}"\] =', text)
                assert own, f"{path.name} names {node.value} in a string"


def test_every_door_to_a_private_name_has_a_test_by_its_name():
    tested = (Path(__file__).with_name("test_keras_internals.py")).read_text()
    texts = [(PACKAGE / "compat" / f"{name}.py").read_text() for name in PRIVATE]
    doors = re.findall(r"^def (\w+)", "\n".join(texts), re.MULTILINE)
    assert [door for door in doors if not re.search(rf"\b{door}\b", tested)] == []


def test_the_map_in_contributing_names_every_module():
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text()
    modules = {path.name for path in FILES if path.stem not in ("__init__", "__main__")}
    assert [name for name in sorted(modules) if f"`{name}`" not in text] == []


#: Messages of Keras, torch and PEFT in that table.
OF_OTHERS = [
    "You must call `compile()`",
    "Could not locate class",
    "expected 2 variables",
    "Target modules",
    "Layer LoRA does",
    "fully_shard doesn",
]
OF_OTHERS += ["Unknown variable", "must be a list of tensors"]


def test_every_message_quoted_in_troubleshooting_is_in_the_source():
    page = (PACKAGE.parent / "docs" / "troubleshooting.md").read_text()
    source = re.sub(r'"\s*f?"', "", " ".join(path.read_text() for path in FILES))
    source = re.sub(r"\s+", " ", re.sub(r"\{[^{}]*\}", "…", source))
    quoted = [text for row in re.findall(r"^\|([^|]+)\|", page, re.MULTILINE) for text in re.findall(r'"([^"]+)"', row)]
    assert len(quoted) > 15
    for text in quoted:
        pieces = [piece.strip() for piece in re.split(r"\.\.\.|…|'[^']*'|\bfloat8\b", text) if len(piece.strip()) > 3]
        known = all(piece in source for piece in pieces) or any(text.startswith(each) for each in OF_OTHERS)
        assert known, text


def test_one_file_assigns_a_class():
    assigning = [path.stem for path in FILES if re.search(r"\.__class__\s*=[^=]", path.read_text())]
    assert assigning == ["adapted"]


def test_one_file_names_a_quantisation_mode():
    naming = {path.stem for path in FILES if re.search(r"[\"']int[48][\"']", path.read_text())}
    assert naming == {"quantization"}


def test_the_public_names_are_sorted_and_complete():
    assert keras_lora.__all__ == sorted(keras_lora.__all__)
    public = {name for name, each in vars(keras_lora).items() if not name.startswith("_") and not inspect.ismodule(each)}
    modules = {"callbacks", "interop", "layers", "memory", "optimizers", "plots", "testing"}
    assert public | modules == set(keras_lora.__all__)
    assert set(dir(keras_lora)) == {*keras_lora.__all__, "__version__"}


def test_modules_are_small():
    sizes = {path.name: len(path.read_text().splitlines()) for path in FILES}
    assert max(sizes.values()) <= 420, sizes


def test_the_parts_import_on_their_own():
    for path in FILES:
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        importlib.import_module(".".join(part for part in parts if part != "__init__"))


#: What is there beside a backend where only `keras_lora` and what its tests need was installed (`make test-one-backend`).
INSTALLED = {"keras", "h5py", "numpy", "rich", "safetensors", "pytest", "hypothesis"}


@pytest.mark.parametrize("path", sorted(Path(__file__).parent.glob("test_*.py")), ids=lambda path: path.stem)
def test_a_file_of_tests_is_left_out_without_the_packages_it_imports(path):
    root = Path(__file__).parents[1]
    folders = ("", "tests", "docs", "docs/figures", "examples", "benchmarks")
    own = {"families"} | {file.stem for folder in folders for file in (root / folder).glob("*.py")}
    known = own | INSTALLED | set(sys.stdlib_module_names) | {"keras_lora"}
    wanted = {name.partition(".")[0] for name in imports_of(ast.parse(path.read_text()).body)} - known
    assert wanted <= set(NEEDS.get(path.name, ()))
