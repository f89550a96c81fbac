"""`keras-lora convert`: from an adapter file to a PEFT folder and back, of every kind of base."""

import io
import json
import os
import sys
from pathlib import Path

import keras_hub
import numpy as np
import pytest
import safetensors.numpy
from helpers import once, perturb, value
from test_cli import base as of_dense
from test_cli import refused, run

import keras_lora
from keras_lora import cli
from keras_lora.files import tensor_file
from keras_lora.interop.peft import from_peft, to_peft

SIZES = {"num_layers": 1, "num_query_heads": 2, "num_key_value_heads": 1, "hidden_dim": 8, "intermediate_dim": 12}
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
pytestmark = once


def llama():
    return keras_hub.models.Llama3Backbone(vocabulary_size=20, **SIZES)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base as a `.keras` file and as the folder of a preset, and an adapter of it and one of its CausalLM."""
    folder = tmp_path_factory.mktemp("made")
    backbone = llama()
    backbone.save(folder / "net.keras")
    backbone.save_to_preset(str(folder / "preset"))
    for name, model in {
        "own": backbone,
        "task": keras_hub.models.Llama3CausalLM(backbone=llama(), preprocessor=None),
    }.items():
        perturb(keras_lora.apply_lora(model, rank=2, alpha=6, targets=["query", "value"]), size=1)
        keras_lora.save_adapter(model, folder / f"{name}.safetensors")
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """A folder with links to what was made."""
    monkeypatch.chdir(tmp_path)
    for each in made.iterdir():
        (tmp_path / each.name).symlink_to(each)
    return tmp_path


def convert(capsys, *arguments, to="peft"):
    code, out, err = run(capsys, "convert", "--to", to, *arguments)
    assert (code, err) == (0, ""), err
    return out


def tensors_of(path):
    return safetensors.numpy.load_file(path)


def same_file(path, other):
    (header, tensors), (wanted, numbers) = (tensor_file.read(Path(each)) for each in (path, other))
    assert header["adapters"].keys() == wanted["adapters"].keys()
    assert all(header["adapters"][key]["scale"] == wanted["adapters"][key]["scale"] for key in wanted["adapters"])
    assert tensors.keys() == numbers.keys()
    assert all(np.array_equal(tensors[key], numbers[key]) for key in numbers)


@pytest.mark.parametrize("base", ["net.keras", "preset"])
def test_to_peft_and_back(here, capsys, base):
    out = convert(capsys, "own.safetensors", "french", "--base", base)
    assert out == f"french: a PEFT adapter, 2 changed kernels, {Path('french', TENSORS).stat().st_size:,} bytes\n"
    names = {f"base_model.model.model.layers.0.self_attn.{x}_proj.lora_{y}.weight" for x in "qv" for y in "AB"}
    assert tensors_of(Path("french", TENSORS)).keys() == names
    to_peft(keras_lora.load_adapter(llama(), "own.safetensors"), "wanted")
    for name in (TENSORS, CONFIG):
        assert Path("french", name).read_bytes() == Path("wanted", name).read_bytes()
    out = convert(capsys, "french", "again.safetensors", "--base", base, to="keras")
    assert (
        out == f"again.safetensors: an adapter file, 2 changed kernels, {Path(out.split(':')[0]).stat().st_size:,} bytes\n"
    )
    same_file("again.safetensors", "own.safetensors")
    assert not [path for path in here.iterdir() if path.name.startswith(".")]


def test_of_a_causal_lm(here, capsys):
    """The adapter file of a task says so itself; a PEFT folder does not."""
    convert(capsys, "task.safetensors", "french", "--base", "preset", "--base-model", "owner/net")
    assert json.loads(Path("french", CONFIG).read_text())["base_model_name_or_path"] == "owner/net"
    convert(capsys, "french", "again.safetensors", "--base", "preset", "--causal-lm", to="keras")
    same_file("again.safetensors", "task.safetensors")
    convert(capsys, "french", "backbone.safetensors", "--base", "preset", to="keras")
    assert all(not key.startswith("_backbone/") for key in tensor_file.read(Path("backbone.safetensors"))[1])
    refused(
        capsys,
        *("convert", "--to", "peft", "own.safetensors", "other", "--base", "preset", "--causal-lm"),
        match="own.safetensors does not fit .*the model has no layer at",
    )


def test_the_names_are_those_of_transformers(here, capsys):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.ViTConfig(**sizes, image_size=8, patch_size=4)
    transformers.ViTForImageClassification(config).save_pretrained("checkpoint")
    model = keras_hub.models.ViTBackbone.from_preset("checkpoint")
    perturb(keras_lora.apply_lora(model, rank=2, targets="query"), size=1)
    keras_lora.save_adapter(model, "own.st.safetensors")
    convert(capsys, "own.st.safetensors", "french", "--base", "checkpoint")
    assert json.loads(Path("french", CONFIG).read_text())["target_modules"] == ["vit.layers.0.attention.q_proj"]
    convert(capsys, "french", "again.safetensors", "--base", "checkpoint", to="keras")
    same_file("again.safetensors", "own.st.safetensors")


def test_of_a_checkpoint_of_transformers(here, capsys):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=1)
    transformers.LlamaForCausalLM(config).save_pretrained("checkpoint")
    convert(capsys, "own.safetensors", "french", "--base", "checkpoint")
    convert(capsys, "french", "again.safetensors", "--base", "checkpoint", to="keras")
    same_file("again.safetensors", "own.safetensors")


def test_what_is_said_reaches_the_folder(here, capsys):
    convert(capsys, "own.safetensors", "french", "--base", "net.keras", "--prefix", "outer.", "--bake-scaling")
    assert all(key.startswith("base_model.model.outer.model.layers.0") for key in tensors_of(Path("french", TENSORS)))
    config = json.loads(Path("french", CONFIG).read_text())
    assert config["lora_alpha"] == config["r"] == 2  # the scale is in B
    loaded, wanted = from_peft(llama(), "french"), keras_lora.load_adapter(llama(), "own.safetensors")
    for one, other in zip(loaded.trainable_variables[1::2], wanted.trainable_variables[1::2], strict=True):
        assert np.allclose(value(one), 3 * value(other))


def test_inspect_of_what_was_converted(here, capsys):
    convert(capsys, "own.safetensors", "french", "--base", "net.keras")
    code, out, _ = run(capsys, "inspect", "french")
    assert code == 0
    assert "rank: 2" in out
    assert "q_proj.lora_A.weight" in out
    data = json.loads(run(capsys, "inspect", "french", "--json")[1])
    assert [(row["method"], row["rank"], row["scale"]) for row in data["adapters"]] == [("lora", 2, 3.0)] * 2


def test_an_old_folder_is_replaced_only_when_forced(here, capsys):
    convert(capsys, "own.safetensors", "french", "--base", "net.keras")
    Path("french", "notes.txt").write_text("mine")
    before = Path("french", CONFIG).read_bytes()
    arguments = ("own.safetensors", "french", "--base", "net.keras", "--base-model", "owner/net")
    refused(capsys, "convert", "--to", "peft", *arguments, match="french exists already.*give --force to replace")
    convert(capsys, *arguments, "--force")
    assert Path("french", CONFIG).read_bytes() != before
    assert Path("french", "notes.txt").read_text() == "mine"
    convert(capsys, "french", "new.safetensors", "--base", "net.keras", to="keras")
    back = ("french", "new.safetensors", "--base", "net.keras")
    refused(capsys, "convert", "--to", "keras", *back, match="new.safetensors exists already.*--force")
    convert(capsys, *back, "--force", to="keras")


def test_a_folder_that_cannot_be_written_is_as_it_was(here, capsys, monkeypatch):
    convert(capsys, "own.safetensors", "french", "--base", "net.keras")

    def fail(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "fsync", fail)
    for out in ("french", "new"):
        arguments = ("own.safetensors", out, "--base", "net.keras", "--force")
        refused(capsys, "convert", "--to", "peft", *arguments, match=f"{out} cannot be written: the disk is full")
    arguments = ("french", "new.safetensors", "--base", "net.keras")
    refused(capsys, "convert", "--to", "keras", *arguments, match=r"new.safetensors cannot be written: the disk is full")
    assert not [path for path in here.iterdir() if path.name.startswith((".", "new"))]


def test_what_convert_to_peft_refuses(here, capsys):
    of_dense().save("dense.keras")
    keras_lora.save_adapter(keras_lora.apply_lora(of_dense(), rank=1), "dense.safetensors")
    keras_lora.apply_lora(llama(), rank=1).save("adapted.keras")
    Path("empty").mkdir()
    Path("file").write_text("")
    own = ("own.safetensors", "out")
    for arguments, match in {
        own: "required: --base",
        (*own, "--base", "none.keras"): "no file none.keras",
        (*own, "--base", "none"): "ends in '.keras'. Received: 'none'",
        (*own, "--base", "empty"): "KerasHub cannot load empty as a Backbone .*Expected the folder of a KerasHub preset",
        (*own, "--base", "adapted.keras"): "adapted already",
        (*own, "--base", "dense.keras"): "own.safetensors does not fit 'net'",
        ("dense.safetensors", "out", "--base", "dense.keras"): "it is no layer of a KerasHub model",
        ("none.safetensors", "out", "--base", "net.keras"): "no file none.safetensors",
        ("preset", "out", "--base", "net.keras"): "ends in '.safetensors'. Received: 'preset'",
        ("own.safetensors", "none/out", "--base", "net.keras"): "no folder none to write OUT into",
        ("own.safetensors", "file", "--base", "net.keras", "--force"): "file exists already. Choose another OUT.$",
        ("own.safetensors", ".", "--base", "net.keras", "--force"): "exists already",
    }.items():
        refused(capsys, "convert", "--to", "peft", *arguments, match=match)
    refused(capsys, "convert", *own, "--base", "net.keras", match="required: --to")
    refused(capsys, "convert", "--to", "onnx", *own, "--base", "net.keras", match="invalid choice: 'onnx'")


def test_what_convert_to_keras_refuses(here, capsys):
    convert(capsys, "own.safetensors", "french", "--base", "net.keras")
    keras_hub.models.Llama3Backbone(vocabulary_size=20, **{**SIZES, "hidden_dim": 16}).save("wide.keras")
    Path("half").mkdir()
    Path("half", CONFIG).write_bytes(Path("french", CONFIG).read_bytes())
    Path("cut").mkdir()
    Path("cut", CONFIG).write_text("{")
    Path("cut", TENSORS).write_bytes(Path("french", TENSORS).read_bytes()[:100])
    net = ("out.safetensors", "--base", "net.keras")
    for arguments, match in {
        ("none", *net): "no folder none. Expected one that PEFT's `save_pretrained` wrote",
        ("own.safetensors", *net): "no folder own.safetensors",
        ("half", *net): f"half lacks {TENSORS}",
        ("cut", *net): "cut is not a whole PEFT adapter",
        ("french", "out", "--base", "net.keras"): "OUT must end in '.safetensors'",
        ("french", "out.safetensors", "--base", "wide.keras"): "french.* does not fit",
        ("french", *net, "--prefix", "x."): "Expected --prefix only with --to peft",
        ("french", *net, "--bake-scaling", "--base-model", "x"): "Expected --base-model and --bake-scaling only with",
    }.items():
        refused(capsys, "convert", "--to", "keras", *arguments, match=match)


def test_a_bar_is_shown_on_a_terminal_alone(here, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    convert = ["convert", "--force", "--base", "net.keras", "--to"]
    monkeypatch.setenv("TERM", "xterm")
    for kind in (Terminal, io.StringIO):
        for arguments in (["peft", "own.safetensors", "french"], ["keras", "french", "new.safetensors"]):
            monkeypatch.setattr(sys, "stderr", shown := kind())
            assert cli.main([*convert, *arguments]) == 0
            assert ("%" in shown.getvalue()) == (kind is Terminal)


def test_without_keras_hub_it_says_what_to_install(here, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "keras_hub", None)
    arguments = ("own.safetensors", "out", "--base", "net.keras")
    refused(capsys, "convert", "--to", "peft", *arguments, match=r"need KerasHub.*pip install keras_lora\[hub\]")
