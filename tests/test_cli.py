"""The command line: every command, every way in which it refuses, its exit codes and its help."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest
import safetensors.numpy
from helpers import difference, once, outputs, value
from keras import layers

import keras_lora
from keras_lora import adapters, cli, swap
from keras_lora.files import tensor_file
from keras_lora.swap.adapted import named_adapters

pytestmark = once

ROOT = Path(__file__).parents[1]


def base():
    keras.utils.set_random_seed(3)
    stack = [layers.Dense(12, name="first"), layers.Dense(10, name="second"), layers.Dense(2, name="head")]
    return keras.Sequential([keras.Input((8,)), *stack], name="net")


def moved(model, seed=5):
    """Every factor with other numbers, the same on every backend."""
    rng = np.random.default_rng(seed)
    for variable in model.trainable_variables:
        variable.assign(rng.normal(size=tuple(variable.shape)).astype("float32"))
    return model


def saved(path, seed=5, adapter="lora", **arguments):
    model = moved(keras_lora.apply_lora(base(), adapter, **{"rank": 4, **arguments}), seed)
    keras_lora.save_adapter(model, path)
    return model


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with the adapter files `a` (LoRA and a head), `dora` and the base."""
    monkeypatch.chdir(tmp_path)
    saved("a.safetensors", train="head")
    saved("dora.safetensors", adapter="dora")
    base().save("base.keras")
    return tmp_path


def run(capsys, *arguments):
    """The exit code, and what was printed on either side."""
    capsys.readouterr()
    try:
        code = cli.main([str(each) for each in arguments])
    except SystemExit as error:
        code = error.code
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def refused(capsys, *arguments, match):
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1, err
    assert re.search(match, err), err
    assert before == {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def rewritten(path, out, header=lambda header: header, tensors=lambda tensors: tensors):
    found = tensor_file.read(Path(path))
    tensor_file.write(Path(out), header(found[0]), tensors(found[1]))


# inspect


def test_inspect_of_an_adapter_file(here, capsys):
    code, out, err = run(capsys, "inspect", "a.safetensors")
    assert (code, err) == (0, "")
    for word in (
        "layers/0",
        "layers/1",
        "layers/2",
        "(8, 12)",
        "trained itself: kernel, bias",
        "2 adapters",
        "Dense",
        "version",
    ):
        assert word in out
    data = json.loads(run(capsys, "inspect", "a.safetensors", "--json")[1])
    assert data["kind"] == "adapter"
    first, second = data["adapters"]
    assert first | {"layer": "", "scale": 4} == {
        "layer": "",
        "class": "Dense",
        "kernel": [8, 12],
        "method": "lora",
        "rank": 4,
        "scale": 4,
        "parameters": 80,
        "bytes": 320,
    }
    assert second["scale"] == 16 / 4
    assert data["trained"] == [
        {"layer": "layers/2", "class": "Dense", "variables": ["kernel", "bias"], "parameters": 22, "bytes": 88}
    ]
    assert data["total"] == {"parameters": 190, "bytes": 760, "file": Path("a.safetensors").stat().st_size}


def test_inspect_knows_every_method(here, capsys):
    assert "dora" in run(capsys, "inspect", "dora.safetensors")[1]
    ids = keras.Input((5,), dtype="int32")
    model = keras.Model(ids, layers.Dense(2)(layers.Embedding(20, 4, name="tokens")(ids)))
    keras_lora.apply_lora(model, keras_lora.TrainableTokens([3, 4]), targets="tokens")
    keras_lora.save_adapter(model, "tokens.safetensors")
    (row,) = json.loads(run(capsys, "inspect", "tokens.safetensors", "--json")[1])["adapters"]
    assert (row["method"], row["rank"], row["scale"], row["parameters"]) == ("trainable_tokens", None, None, 8)


def test_inspect_of_a_keras_file(here, capsys, monkeypatch):
    monkeypatch.setattr(keras.saving, "load_model", None)  # it builds nothing
    code, out, _ = run(capsys, "inspect", "base.keras")
    assert code == 0
    assert "a plain model" in out
    keras_lora.apply_lora(keras_lora.apply_lora(base(), rank=4, name="x"), "dora", rank=2, name="y").save("adapted.keras")
    code, out, _ = run(capsys, "inspect", "adapted.keras")
    assert code == 0
    assert "dora" in out
    data = json.loads(run(capsys, "inspect", "adapted.keras", "--json")[1])
    assert (data["class"], data["name"], data["keras"]) == ("Sequential", "net", keras.__version__)
    rows = [
        (row["layer"], row["adapter"], row["method"], row["rank"], row["scale"], row["strength"]) for row in data["adapters"]
    ]
    assert sorted(rows) == [
        ("layers/0", "x", "lora", 4, 4.0, 0.0),
        ("layers/0", "y", "dora", 2, 8.0, 1.0),
        ("layers/1", "x", "lora", 4, 4.0, 0.0),
        ("layers/1", "y", "dora", 2, 8.0, 1.0),
    ]
    assert data["total"]["file"] > data["total"]["weights"] > 0


def test_inspect_of_a_keras_file_of_which_a_part_is_adapted(here, capsys):
    inner = base()
    x = keras.Input((8,))
    keras_lora.apply_lora(inner, rank=2)
    keras.Model(x, layers.Dense(1)(inner(x)), name="outer").save("outer.keras")
    data = json.loads(run(capsys, "inspect", "outer.keras", "--json")[1])
    assert [(row["in"], row["layer"]) for row in data["adapters"]] == [("net", "layers/0"), ("net", "layers/1")]


@pytest.fixture
def peft(tmp_path):
    folder = tmp_path / "peft"
    folder.mkdir()
    name = "base_model.model.q_proj.lora_{}.weight"
    tensors = {name.format("A"): np.zeros((4, 16), "float32"), name.format("B"): np.zeros((32, 4), "float16")}
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "base_model_name_or_path": "some/base"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_inspect_of_a_peft_adapter(peft, capsys):
    for path in (peft, peft / "adapter_model.safetensors"):
        code, out, _ = run(capsys, "inspect", path)
        assert code == 0
        for word in (
            "rank: 4",
            "alpha: 8",
            "['q_proj']",
            "some/base",
            "q_proj.lora_A.weight",
            "(32, 4)",
            "F16",
            "2 tensors",
        ):
            assert word in out
    assert json.loads(run(capsys, "inspect", peft, "--json")[1])["total"]["parameters"] == 4 * 48
    (peft / "adapter_config.json").unlink()
    out = run(capsys, "inspect", peft / "adapter_model.safetensors")[1]
    assert "rank: 4" in out
    assert "alpha: not given" in out


def test_every_kind_of_file_says_the_same_words_in_json(here, peft, capsys):
    keras_lora.apply_lora(base(), "dora", rank=4).save("adapted.keras")
    for path, method in {"a.safetensors": "lora", "dora.safetensors": "dora", "adapted.keras": "dora", peft: "lora"}.items():
        data = json.loads(run(capsys, "inspect", path, "--json")[1])
        assert data["kind"] in ("adapter", "keras", "peft")
        assert data["total"]["file"] > 0
        for row in data["adapters"]:
            assert (row["layer"] != "", row["method"], row["rank"]) == (True, method, 4)
            assert row["scale"] == (2 if path == peft else 4)
        assert data["adapters"]


def test_inspect_of_a_peft_adapter_with_patterns(peft, capsys):
    config = json.loads((peft / "adapter_config.json").read_text())
    for change, scale in ({"use_rslora": True}, 4.0), ({"alpha_pattern": {"q_proj": 3}}, None), ({"lora_alpha": None}, None):
        (peft / "adapter_config.json").write_text(json.dumps({**config, **change}))
        data = json.loads(run(capsys, "inspect", peft, "--json")[1])
        module = {"layer": "base_model.model.q_proj", "method": "lora", "rank": 4, "scale": scale}
        assert data["adapters"] == [{**module, "parameters": 4 * 48, "bytes": 4 * (16 * 4 + 32 * 2)}]
        assert data["total"]["bytes"] == 4 * (16 * 4 + 32 * 2)


def test_what_inspect_refuses(here, peft, capsys):
    Path("text.keras").write_text("no model")
    with zipfile.ZipFile("zip.keras", "w") as archive:
        archive.writestr("metadata.json", "{}")
        archive.writestr("config.json", "[]")
    Path("cut.safetensors").write_bytes(Path("a.safetensors").read_bytes()[:200])
    safetensors.numpy.save_file({"x": np.ones(3)}, "other.safetensors")
    for file, match in {
        "none.safetensors": "no file none.safetensors",
        "none.keras": "no file none.keras",
        "none": "is not there. Expected an adapter file",
        "text.keras": "text.keras is not a whole .keras file",
        "zip.keras": "zip.keras is not a whole .keras file",
        "cut.safetensors": "is not a whole safetensors file",
        "other.safetensors": "1 tensors, none of an adapter",
        ".": "lacks adapter_config.json and adapter_model.safetensors",
    }.items():
        refused(capsys, "inspect", file, match=match)
    (peft / "adapter_config.json").write_text("{")
    refused(capsys, "inspect", peft, match="adapter_config.json is not whole")
    (peft / "adapter_config.json").write_text("[]")
    refused(capsys, "inspect", peft, match="contains a list")


def test_what_a_file_says_does_not_reach_the_terminal_as_a_command(here, capsys):
    def change(header):
        return {**header, "adapters": {"\x1b[31m[red]:smile:": next(iter(header["adapters"].values()))}}

    rewritten("a.safetensors", "b.safetensors", change)
    out = run(capsys, "inspect", "b.safetensors")[1]
    assert "?[31m[red]:smile:" in out
    assert "\x1b" not in out


# merge


def test_merge(here, capsys):
    x = np.random.default_rng(0).normal(size=(4, 8)).astype("float32")
    code, out, err = run(capsys, "merge", "base.keras", "a.safetensors", "out.keras")
    assert (code, err) == (0, "")
    assert "2 changed kernels" in out
    merged = keras.saving.load_model("out.keras")
    assert type(merged.layers[0]) is layers.Dense
    wanted = keras_lora.load_adapter(base(), "a.safetensors")
    assert difference(outputs(merged, x), outputs(wanted, x)) < 1e-5
    assert difference(outputs(merged, x), outputs(base(), x)) > 0.1
    assert not [path for path in here.iterdir() if path.name.startswith(".")]
    refused(capsys, "merge", "base.keras", "dora.safetensors", "out.keras", match="out.keras exists already.*--force")
    assert run(capsys, "merge", "base.keras", "dora.safetensors", "out.keras", "--force")[0] == 0
    wanted = keras_lora.load_adapter(base(), "dora.safetensors")
    assert difference(outputs(keras.saving.load_model("out.keras"), x), outputs(wanted, x)) < 1e-5


class Unknown(layers.Dense):
    pass


def test_what_merge_refuses(here, capsys, monkeypatch):
    keras_lora.apply_lora(base(), rank=1).save("adapted.keras")
    keras.Sequential([keras.Input((3,)), layers.Dense(3), layers.Dense(2)]).save("small.keras")
    monkeypatch.setattr(Unknown, "__module__", "not_here")
    keras.Sequential([keras.Input((8,)), Unknown(3)]).save("unknown.keras")
    Path("folder.keras").mkdir()
    for arguments, match in {
        ("base.keras", "a.safetensors", "out.h5"): "OUT must end in '.keras'. Received: 'out.h5'",
        ("base.keras", "a.safetensors", "none/out.keras"): "no folder none",
        ("base.keras", "a.safetensors", "folder.keras", "--force"): "exists already. Choose another OUT.$",
        ("base.h5", "a.safetensors", "out.keras"): "ends in '.keras'. Received: 'base.h5'",
        ("none.keras", "a.safetensors", "out.keras"): "no file none.keras",
        ("base.keras", "none.safetensors", "out.keras"): "no file none.safetensors",
        ("base.keras", "base.keras", "out.keras"): "ends in '.safetensors'. Received: 'base.keras'",
        ("adapted.keras", "a.safetensors", "out.keras"): "adapted already",
        ("small.keras", "a.safetensors", "out.keras"): "does not fit.*has shape",
        ("unknown.keras", "a.safetensors", "out.keras"): "Keras cannot load unknown.keras.*PYTHONPATH",
    }.items():
        refused(capsys, "merge", *arguments, match=match)


def test_a_merge_that_cannot_be_written_leaves_the_old_file(here, capsys, monkeypatch):
    def fail(*_):
        raise OSError("the disk is full")

    Path("out.keras").write_text("old")
    monkeypatch.setattr(os, "replace", fail)
    refused(
        capsys, "merge", "base.keras", "a.safetensors", "out.keras", "--force", match="cannot be written: the disk is full"
    )
    refused(capsys, "compress", "a.safetensors", "b.safetensors", "--rank", 1, match="cannot be written: the disk is full")


# compress


@pytest.mark.parametrize("size", [{"rank": 2}, {"energy": 0.8}, {"rank": 99}])
def test_compress_is_what_compress_of_a_model_does(here, capsys, size):
    model = keras_lora.load_adapter(base(), "a.safetensors")
    report = keras_lora.compress_adapter(model, name="default", **size)
    ((key, number),) = size.items()
    code, out, err = run(capsys, "compress", "a.safetensors", "small.safetensors", f"--{key}", number)
    assert (code, err) == (0, "")
    assert "largest error" in out
    assert f"{report[0].error:.3g}" in out
    loaded = keras_lora.load_adapter(base(), "small.safetensors")
    for (_, found), (_, wanted) in zip(adapters_of(loaded), adapters_of(model), strict=True):
        assert found.get_config() == wanted.get_config()
        assert difference([value(found.delta_kernel(None))], [value(wanted.delta_kernel(None))]) < 1e-6
    assert np.array_equal(value(loaded.layers[2].kernel), value(model.layers[2].kernel))  # the head is copied
    keras_lora.save_adapter(model, "own.safetensors")
    assert (
        run(capsys, "inspect", "own.safetensors")[1].splitlines()[1:]
        == (run(capsys, "inspect", "small.safetensors")[1].splitlines()[1:])
    )


def adapters_of(model):
    return list(named_adapters(model)["default"].values())


def test_what_compress_refuses(here, capsys):
    def infinite(tensors):
        return {**tensors, "layers/0:lora_a": np.full((8, 4), np.inf, "float32")}

    def longer(tensors):
        return {**tensors, "layers/0:lora_a": np.ones((8, 5), "float32")}

    rewritten("a.safetensors", "infinite.safetensors", tensors=infinite)
    rewritten("a.safetensors", "longer.safetensors", tensors=longer)
    rewritten("a.safetensors", "less.safetensors", tensors=lambda all: {k: v for k, v in all.items() if k[-6:] != "lora_b"})
    for arguments, match in {
        ("a.safetensors", "b.safetensors"): "one of the arguments --rank --energy is required",
        ("a.safetensors", "b.safetensors", "--rank", "1", "--energy", "1"): "not allowed with",
        ("a.safetensors", "b.safetensors", "--rank", "0"): "--rank: expected a positive integer, received '0'",
        ("a.safetensors", "b.safetensors", "--rank", "two"): "--rank: expected a positive integer",
        ("a.safetensors", "b.safetensors", "--energy", "1.5"): r"--energy: expected a number in \(0, 1\], received '1.5'",
        ("a.safetensors", "b.safetensors", "--energy", "much"): "--energy: expected a number",
        (
            "dora.safetensors",
            "b.safetensors",
            "--rank",
            "1",
        ): "the method dora. Expected only lora.*compress_adapter",
        ("a.safetensors", "a.safetensors", "--rank", "1"): "exists already.*--force",
        ("a.safetensors", "b.bin", "--rank", "1"): "must end in '.safetensors'",
        ("none.safetensors", "b.safetensors", "--rank", "1"): "no file",
        ("infinite.safetensors", "b.safetensors", "--rank", "1"): "'layers/0' of infinite.safetensors is damaged.*finite",
        ("longer.safetensors", "b.safetensors", "--rank", "1"): r"says rank 4, and lora_a has shape \(8, 5\)",
        ("less.safetensors", "b.safetensors", "--rank", "1"): "lacks lora_b",
    }.items():
        refused(capsys, "compress", *arguments, match=match)
    assert run(capsys, "compress", "a.safetensors", "a.safetensors", "--rank", 1, "--force")[0] == 0


# diff


def test_diff_of_the_same(here, capsys):
    saved("again.safetensors", train="head")
    code, out, err = run(capsys, "diff", "a.safetensors", "again.safetensors")
    assert (code, err) == (0, "")
    assert "have the same contents: 3 adapters or trained layers" in out


def test_diff_of_lora_says_how_far_the_changes_are_apart(here, capsys):
    a = keras_lora.load_adapter(base(), "a.safetensors")
    b = saved("b.safetensors", seed=6, train="head", rank=3, alpha=5)
    code, out, _ = run(capsys, "diff", "a.safetensors", "b.safetensors")
    assert code == 1
    assert "alpha: 16.0 / 5, rank: 4 / 3" in out  # in the order of the file, which sorts them
    for (_, one), (_, other) in zip(adapters_of(a), adapters_of(b), strict=True):
        one, other = (value(each.delta_kernel(None)) for each in (one, other))
        assert f"{np.linalg.norm(one - other) / np.linalg.norm(one):.3g}" in out
    head = [value(model.layers[2].kernel) for model in (a, b)]
    assert (
        f"{max(np.abs(head[0] - head[1]).max(), np.abs(value(a.layers[2].bias) - value(b.layers[2].bias)).max()):.3g}" in out
    )
    assert "differ at 3 of 3" in out


def test_diff_of_other_factors_of_one_change(here, capsys):
    def other(tensors):
        return {
            key: value * {"a": 2, "b": 0.5}.get(key[-1], 1) if "lora" in key else value for key, value in tensors.items()
        }

    rewritten("a.safetensors", "b.safetensors", tensors=other)
    code, out, _ = run(capsys, "diff", "a.safetensors", "b.safetensors")
    assert code == 1
    assert [line.split()[-2] for line in out.splitlines() if "layers/" in line] == ["0", "0"] or re.findall(r"\b0\b", out)


def test_diff_of_other_methods_layers_and_shapes(here, capsys):
    saved("one.safetensors", targets="first")
    out = run(capsys, "diff", "a.safetensors", "one.safetensors")[1]
    assert out.count("only in A") == 2  # the second layer, and the head
    assert run(capsys, "diff", "one.safetensors", "a.safetensors")[1].count("only in B") == 2
    code, out, _ = run(capsys, "diff", "a.safetensors", "dora.safetensors")
    assert code == 1
    assert "method: lora / dora" in out
    assert "magnitude: none / (12,)" in out
    saved("dora2.safetensors", seed=8, adapter="dora")
    files = [tensor_file.read(Path(name))[1] for name in ("dora.safetensors", "dora2.safetensors")]
    apart = max(np.abs(files[0][key] - files[1][key]).max() for key in files[0] if key.startswith("layers/0:"))
    out = run(capsys, "diff", "dora.safetensors", "dora2.safetensors")[1]
    assert f"{apart:.3g}" in out


def test_diff_of_numbers_that_are_not_finite_and_of_missing_tensors(here, capsys):
    rewritten(
        "a.safetensors", "b.safetensors", tensors=lambda all: {**all, "layers/0:lora_a": np.full((8, 4), np.nan, "float32")}
    )
    code, out, _ = run(capsys, "diff", "a.safetensors", "b.safetensors")
    assert code == 1
    assert "nan" in out
    assert run(capsys, "diff", "b.safetensors", "b.safetensors")[0] == 0
    rewritten("a.safetensors", "c.safetensors", tensors=lambda all: {k: v for k, v in all.items() if k[-6:] != "lora_b"})
    out = run(capsys, "diff", "a.safetensors", "c.safetensors")[1]
    assert "lora_b: (4, 12) / none" in out


def test_a_change_that_is_zero_is_infinitely_far_from_one_that_is_not(here, capsys):
    keras_lora.save_adapter(keras_lora.apply_lora(base(), rank=4, train="head"), "zero.safetensors")
    assert "inf" in run(capsys, "diff", "zero.safetensors", "a.safetensors")[1]


def test_what_diff_refuses(here, capsys):
    refused(capsys, "diff", "a.safetensors", "none.safetensors", match="no file none.safetensors")
    refused(capsys, "diff", "a.safetensors", "base.keras", match="ends in '.safetensors'. Received: 'base.keras'")


# The whole.


def test_help_names_every_argument(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert "exit codes" in out
    words = {
        "inspect": ["FILE", "--json"],
        "merge": ["BASE", "ADAPTER", "OUT", "--force"],
        "compress": ["FILE", "OUT", "--rank N", "--energy E", "--force"],
        "convert": ["ADAPTER", "OUT", "--base BASE", "--causal-lm", "--prefix P", "--base-model NAME", "--bake-scaling"],
        "diff": ["A", "B"],
        "plan": [
            "MODEL",
            "--batch-size N",
            "--sequence-length N",
            "--causal-lm",
            "--rank N",
            "--base-dtype DTYPE",
            "--remat",
        ],
    }
    assert len(words) == len(cli.COMMANDS)
    for command, arguments in words.items():
        assert command in out
        code, page, _ = run(capsys, command, "--help")
        assert code == 0
        assert f"example: keras-lora {command}" in page
        for argument in arguments:
            assert re.search(rf"^  {argument}\b.*", page, re.MULTILINE), (command, argument)


def test_arguments_that_are_wrong_are_one_line(here, capsys):
    assert run(capsys, "--version")[:2] == (0, f"keras_lora {keras_lora.__version__}\n")
    refused(capsys, match="required: COMMAND. See `keras-lora --help`")
    refused(capsys, "explain", match="invalid choice: 'explain'")
    refused(capsys, "inspect", match="required: FILE. See `keras-lora inspect --help`")


def test_an_error_of_ours_shows_its_traceback_and_has_a_code_of_its_own(here, capsys, monkeypatch):
    monkeypatch.setattr(cli.diff, "_parts", lambda *_: 1 / 0)
    code, _, err = run(capsys, "diff", "a.safetensors", "a.safetensors")
    assert code == 3
    assert "Traceback" in err
    assert "ZeroDivisionError" in err


def test_a_long_list_of_problems_is_cut():
    listed = "".join(f"\n  - problem {number}" for number in range(9))
    line = cli.one_line(f"It does not fit:{listed}\nLoad another.")
    assert line == "It does not fit: problem 0; problem 1; problem 2; and 6 more. Load another."


@pytest.mark.parametrize(
    "arguments", [("compress", "a.safetensors", "b.safetensors", "--rank", "1"), ("merge", "base.keras")]
)
def test_a_bar_is_shown_on_a_terminal_alone(here, monkeypatch, arguments):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    arguments = [*arguments, *(["a.safetensors", "out.keras"] if arguments[0] == "merge" else [])]
    monkeypatch.setenv("TERM", "xterm")
    for kind in (Terminal, io.StringIO):
        monkeypatch.setattr(sys, "stderr", shown := kind())
        assert cli.main([*arguments, "--force"]) == 0
        assert ("%" in shown.getvalue()) == (kind is Terminal)


@pytest.mark.full
def test_the_installed_command(here):
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"] == {
        "keras-lora": "keras_lora_command:main"
    }
    command = [sys.executable, "-m", "keras_lora", "diff", "a.safetensors", "dora.safetensors"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "KERAS_BACKEND": "jax"}  # the one that is quickest to import
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1, done.stderr
    assert "method: lora / dora" in done.stdout


def in_a_fresh_process(here, *arguments, **environment):
    """The exit code, what was printed on both sides, and the packages that `keras-lora` has imported."""
    script = """
import sys
from keras_lora_command import main
try:
    code = main(sys.argv[1:])
except SystemExit as error:
    code = error.code
print(code, *(each for each in ("keras", "jax", "tensorflow", "torch") if each in sys.modules))
"""
    command = [sys.executable, "-c", script, *arguments]
    environment = {**os.environ, "PYTHONPATH": f"{here}:{ROOT}", **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=here)
    *printed, last = done.stdout.splitlines()
    code, *packages = last.split()
    return int(code), "\n".join(printed) + done.stderr, packages


@pytest.mark.full
def test_what_needs_no_model_does_not_import_keras(here):
    compress = ["compress", "a.safetensors", "b.safetensors", "--rank=1"]
    for arguments in (["--help"], ["inspect", "a.safetensors"], ["inspect", "base.keras"], compress):
        code, printed, packages = in_a_fresh_process(here, *arguments)
        assert (code, packages) == (0, []), printed
    assert in_a_fresh_process(here, "diff", "a.safetensors", "b.safetensors")[::2] == (1, [])


@pytest.mark.full
def test_what_needs_a_model_has_the_whole_package_and_says_what_keras_lacks(here):
    code, printed, packages = in_a_fresh_process(
        here, "merge", "base.keras", "a.safetensors", "out.keras", KERAS_BACKEND="jax"
    )
    assert (code, "keras" in packages) == (0, True), printed
    (here / "tensorflow.py").write_text("raise ModuleNotFoundError(\"No module named 'tensorflow'\")\n")
    code, printed, _ = in_a_fresh_process(
        here, "merge", "base.keras", "a.safetensors", "new.keras", KERAS_BACKEND="tensorflow"
    )
    assert code == 2
    assert "No module named 'tensorflow'. Keras needs the package of its backend, and KERAS_BACKEND to name it" in printed
    assert "Traceback" not in printed


def test_the_words_of_the_command_line_are_those_of_the_package():
    assert {cls.__name__: name for name, cls in adapters.TABLE.items()} == cli.common.METHODS
    assert adapters.method_of(keras_lora.LoRA(1, 1)) == cli.common.LORA
    assert cli.inspect_file.KEY == swap.adapted.KEY
    for name, words in cli.COMMANDS.items():
        if isinstance(words, str):
            assert re.search(rf"^ +{name} +{words[:40]}", cli.parser(name).format_help(), re.MULTILINE), name


def test_the_commands_of_the_page(here, capsys):
    """Each `$ keras-lora ...` is run, and prints what the page says but for sizes of files, versions and dates."""
    page = (ROOT / "docs" / "command_line.md").read_text()
    varying = r"\d+\.\d+\.\d+|\d{4}-\d\d-\d\d@\d\d:\d\d:\d\d|[\d,]+ bytes|base_structure: \w+"
    shown, names = 0, {"__name__": "__main__"}
    for kind, block in re.findall(r"^```(python|console)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE):
        if kind == "python":
            exec(compile(block, "command_line.md", "exec"), names)
            continue
        for command, wanted in re.findall(r"^\$ keras-lora (.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE):
            code, out, err = run(capsys, *shlex.split(command))
            assert code in (0, 1), err
            assert re.sub(varying, "…", out).split() == re.sub(varying, "…", wanted).split(), command
            shown += 1
    assert shown >= len(cli.COMMANDS)
