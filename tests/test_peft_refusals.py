"""PEFT folders that are damaged, hostile, of another kind or for another model: an error, and nothing is changed."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import keras
import keras_hub
import numpy as np
import pytest
import safetensors.numpy
from helpers import once, perturb, values
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import keras_lora
from keras_lora.interop import from_peft, peft_folder, serving_rules, to_peft
from keras_lora.interop.checkpoints import CheckpointMap
from keras_lora.interop.ports import Port, as_it_is_now
from keras_lora.interop.problems import grouped
from keras_lora.swap.addresses import walk

pytestmark = once

CONFIG, TENSORS = peft_folder.CONFIG, peft_folder.TENSORS
SIZES = {"num_layers": 1, "num_query_heads": 2, "num_key_value_heads": 1, "hidden_dim": 8, "intermediate_dim": 8}
QUERY = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


def base():
    keras.utils.set_random_seed(0)
    return keras_hub.models.Llama3Backbone(vocabulary_size=9, **SIZES)


class Folder:
    """A good PEFT adapter, and one made of it that is to be refused by a model that must stay as it is."""

    def __init__(self, path):
        self.model, self.good, self.bad = base(), path / "good", path / "bad"
        adapted = keras_lora.apply_lora(base(), rank=2, train="sequence_output_layernorm")
        perturb(adapted)
        to_peft(adapted, self.good)
        self.config = json.loads((self.good / CONFIG).read_text())
        self.tensors = safetensors.numpy.load_file(self.good / TENSORS)
        self.before = self.state()

    def state(self):
        flags = [(place.path, type(place.layer), place.layer.trainable) for place in walk(self.model)]
        return {path: each.tolist() for path, each in values(self.model.weights).items()}, flags

    def write(self, config=None, tensors=None):
        shutil.rmtree(self.bad, ignore_errors=True)
        shutil.copytree(self.good, self.bad)
        if config is not None:
            text = config if isinstance(config, str) else json.dumps(config)
            (self.bad / CONFIG).write_text(text, encoding="utf-8", errors="surrogatepass")
        if isinstance(tensors, bytes):
            (self.bad / TENSORS).write_bytes(tensors)
        elif tensors is not None:
            safetensors.numpy.save_file(tensors, self.bad / TENSORS, {"format": "pt"})

    def refused(self, match, config=None, tensors=None):
        self.write(config, tensors)
        with pytest.raises(ValueError, match=match) as raised:
            from_peft(self.model, self.bad)
        assert self.state() == self.before
        assert len(str(raised.value)) < 20_000
        return str(raised.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return Folder(tmp_path_factory.mktemp("peft"))


def test_the_folder_itself_is_taken(folder):
    model = from_peft(base(), folder.good)
    assert len(model.trainable_variables) == 2 * 7 + 1


CONFIGS = {
    "another method": ({"peft_type": "VERA"}, "`peft_type` is 'VERA'"),
    "a method without its tensors": ({"peft_type": "LOHA"}, "tensors of another method than its `peft_type`"),
    "a start that moves the base": ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
    "biases of the change": ({"lora_bias": True}, "`lora_bias` is True"),
    "layers twice": ({"layer_replication": [[0, 1], [0, 1]]}, "layer_replication"),
    "parameters that are no names": (
        {"target_parameters": "experts.down_proj"},
        "`target_parameters` is 'experts.down_proj'",
    ),
    "a rank that is not that of the tensors": ({"r": 3}, r"down_proj' has rank 2, and the config says 3 .and so 6 more"),
    "no rank": ({"r": 0}, "`r` is 0"),
    "a rank that is true": ({"r": True}, "`r` is True"),
    "an alpha without end": ({"lora_alpha": float("inf")}, "`lora_alpha` is inf"),
    "an alpha in words": ({"lora_alpha": "16"}, "`lora_alpha` is '16'"),
    "DoRA without magnitudes": ({"use_dora": True}, "magnitude of shape None; expected are 8 numbers"),
    "a flag that is none": ({"use_rslora": "yes"}, "`use_rslora` is 'yes'"),
    "a pattern that hangs": ({"rank_pattern": {"(a|a)*" * 50 + "b": 2}}, "rank_pattern"),
    "a pattern of many wild cards": ({"rank_pattern": {".*" * 40 + "x": 2}}, "rank_pattern"),
    "a pattern that is no pattern": ({"alpha_pattern": {"(": 2}}, "alpha_pattern"),
    "a rank by pattern that is none": ({"rank_pattern": {"q_proj": -1}}, "rank_pattern"),
    "tokens that are none": ({"trainable_token_indices": [0, "x"]}, "trainable_token_indices"),
    "dropout of one": ({"lora_dropout": 1}, "lora_dropout"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_means_something_else_is_refused(folder, name):
    change, match = CONFIGS[name]
    folder.refused(match, {**folder.config, **change})


JUNK = [None, [], {}, "x", -1, True, 10**400, 1e308, [[]], {"class_name": "os.system"}, "\0", "a" * 10_000]


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(["r", "lora_alpha", "use_dora", "use_rslora", "rank_pattern", "alpha_pattern"]), st.sampled_from(JUNK)
)
def test_a_setting_replaced_by_anything_is_refused_or_has_its_default(folder, key, new):
    folder.write({**folder.config, key: new})
    model = base()
    try:
        from_peft(model, folder.bad)
    except ValueError:
        assert not [place for place in walk(model) if place.layer.name == "lora"]
    else:
        assert new is None or new == {} or new is folder.config[key] or (key, new) == ("use_rslora", True), (key, new)


TEXTS = {
    "no JSON": "import os",
    "a list": "[]",
    "deep lists": "[" * 100_000,
    "nothing": "",
    "five megabytes": '{"peft_type": "' + "x" * 5_000_000 + '"}',
    "not UTF-8": "\udcff{}",
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_config_that_is_no_config_is_refused(folder, name):
    folder.refused("is not a whole PEFT adapter", TEXTS[name])


def test_tensors_that_do_not_fit_are_all_listed(folder):
    a, b = QUERY.format("A"), QUERY.format("B")
    tensors = dict(folder.tensors)
    tensors[a.replace("q_proj", "x_proj")], tensors[b.replace("q_proj", "x_proj")] = tensors[a], tensors[b]
    tensors[b] = np.ones((5, 2), "float32")
    tensors[a.replace("q_proj", "k_proj")] = np.ones((2, 5), "float32")
    tensors["base_model.model.score.weight"] = np.ones((3, 8), "float32")
    message = folder.refused("does not fit 'llama3_backbone", tensors=tensors)
    assert "'model.layers.0.self_attn.x_proj' is no kernel of this model; the nearest that the model has are" in message
    assert "q_proj' has factors of shape (2, 8) and (5, 2)" in message
    assert "k_proj' has factors of shape (2, 5)" in message
    assert "'score.weight' of 'score' is no variable of this model" in message


TENSOR_CHANGES = {
    "half a pair": (lambda tensors: {k: v for k, v in tensors.items() if k != QUERY.format("B")}, "only one of its two"),
    "a bias of B": (lambda tensors: {**tensors, QUERY.format("B")[:-6] + "bias": np.ones(8, "float32")}, "lora_bias"),
    "a key twice": (lambda tensors: {**tensors, QUERY.format("A")[17:]: np.ones((2, 8), "float32")}, "there twice"),
    "a key of another library": (
        lambda tensors: {**tensors, "x.lora_up.weight": np.ones(3, "float32")},
        "none that a LoRA has",
    ),
    "nothing": (lambda tensors: {}, "none of its 0 tensors"),
    "another shape of as many numbers": (
        lambda tensors: {**tensors, "base_model.model.model.norm.weight": np.ones((2, 4), "float32")},
        r"has shape \(2, 4\); expected is \(8,\)",
    ),
    "factors without axes": (lambda tensors: {**tensors, QUERY.format("A"): np.ones((), "float32")}, "two axes or more"),
    "a base alone": (lambda tensors: {"model.norm.weight": np.ones(8, "float32")}, "none of its 1 tensors"),
    "not finite": (lambda tensors: {**tensors, QUERY.format("A"): np.full((2, 8), np.nan, "float32")}, "not finite"),
    "whole numbers": (lambda tensors: {**tensors, QUERY.format("A"): np.ones((2, 8), "int32")}, "none that PEFT writes"),
    "long whole numbers": (lambda tensors: {**tensors, QUERY.format("A"): np.ones((2, 8), "int64")}, "has whole numbers"),
    "too large for float32": (
        lambda tensors: {**tensors, QUERY.format("A"): np.full((2, 8), 1e300)},
        "not finite in float32",
    ),
    "an empty tensor": (lambda tensors: {**tensors, QUERY.format("A"): np.ones((0, 8), "float32")}, "none that PEFT writes"),
}


@pytest.mark.parametrize("name", TENSOR_CHANGES)
def test_tensors_that_are_no_adapter_are_refused(folder, name):
    change, match = TENSOR_CHANGES[name]
    folder.refused(match, tensors=change(folder.tensors))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_cut_and_flipped_bytes_are_refused_or_load(folder, data):
    whole = (folder.good / TENSORS).read_bytes()
    length = int.from_bytes(whole[:8], "little") + 8
    cut = data.draw(st.booleans())
    place = data.draw(st.integers(0, length - 1))
    flipped = bytearray(whole)
    flipped[place] ^= 1 << data.draw(st.integers(0, 7))
    folder.write(tensors=whole[:place] if cut else bytes(flipped))
    model = base()
    try:
        from_peft(model, folder.bad)
    except ValueError:
        assert not [each for each in walk(model) if each.layer.name == "lora"]
    else:
        assert not cut


HEADERS = {
    "a huge header": (2**40).to_bytes(8, "little") + b"{}",
    "a header past the end": (500).to_bytes(8, "little") + b"{}",
    "a pickle": b"\x80\x04cos\nsystem\n(S'touch ran'\ntR.",
    "a shape that overflows": None,
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_file_that_is_no_safetensors_file_is_refused(folder, name):
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 8]}}).encode()
    folder.refused(
        "not a whole PEFT adapter", tensors=HEADERS[name] or len(header).to_bytes(8, "little") + header + b"\0" * 8
    )


def test_a_name_of_a_module_is_only_looked_up(folder):
    for name in ("../../x", "/etc/passwd", "__class__", "model.layers.-1.self_attn.q_proj", "a\0b", "é", "x" * 5000):
        tensors = {key.replace("model.layers.0.self_attn.q_proj", name): each for key, each in folder.tensors.items()}
        folder.refused("is no kernel of this model|not one that keras_lora can read", tensors=tensors)


def test_what_is_not_there_is_said(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        from_peft(folder.model, tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=f"lacks {CONFIG} and {TENSORS}"):
        from_peft(folder.model, tmp_path)
    shutil.copy(folder.good / CONFIG, tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'touch ran'\ntR.")
    with pytest.raises(FileNotFoundError, match=r"lacks adapter_model.safetensors.*adapter_model.bin is not read"):
        from_peft(folder.model, tmp_path)


def test_bfloat16_and_float16_are_read_and_float32_is_kept(folder):
    bits = folder.tensors[QUERY.format("A")].view("uint32") >> 16 << 16
    rounded = bits.view("float32")
    data, entries, offset = b"", {}, 0
    for key, tensor in folder.tensors.items():
        kind, raw = "F32", tensor.tobytes()
        if key == QUERY.format("A"):
            kind, raw = "BF16", (bits >> 16).astype("<u2").tobytes()
        elif key == QUERY.format("B"):
            kind, raw = "F16", tensor.astype("float16").tobytes()
        entries[key] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [offset, offset + len(raw)]}
        data, offset = data + raw, offset + len(raw)
    header = json.dumps(entries).encode()
    folder.write(tensors=len(header).to_bytes(8, "little") + header + data)
    model = from_peft(base(), folder.bad)
    to_peft(model, folder.bad.parent / "again")
    again = safetensors.numpy.load_file(folder.bad.parent / "again" / TENSORS)
    assert np.array_equal(again[QUERY.format("A")], rounded)
    assert np.array_equal(again[QUERY.format("B")], folder.tensors[QUERY.format("B")].astype("float16").astype("float32"))


# Models that have no place there.


def test_what_has_no_place_in_peft_is_listed_and_nothing_is_written(tmp_path):
    recurrent = keras_lora.apply_lora(
        keras.Sequential([keras.Input((3, 4)), keras.layers.LSTM(4), keras.layers.Dense(2)]), rank=1
    )
    with pytest.raises(
        ValueError, match=r"(?s)layers/0/cell/kernel' has no place there: it is no layer of a KerasHub model"
    ):
        to_peft(recurrent, tmp_path / "a")
    mixed = keras_lora.apply_lora(base(), rank=1, adapter_pattern={"*query": keras_lora.DoRA(2)})
    with pytest.raises(ValueError, match="both LoRA and DoRA"):
        to_peft(mixed, tmp_path / "a")
    sizes = {"num_layers": 1, "num_heads": 2, "hidden_dim": 8, "intermediate_dim": 8, "max_sequence_length": 5}
    shared = keras_hub.models.BartBackbone(vocabulary_size=9, **sizes)
    keras_lora.apply_lora(shared, rank=1, targets="token_embedding", head=None)
    with pytest.raises(ValueError, match="used in more places than one"):
        to_peft(shared, tmp_path / "a")
    with pytest.raises(ValueError, match="found no adapter"):
        to_peft(base(), tmp_path / "a")
    with pytest.raises(ValueError, match=r"`names` must have.*'quer'.*query"):
        to_peft(keras_lora.apply_lora(base(), rank=1), tmp_path / "a", names={"quer": "x"})
    assert not list(tmp_path.iterdir())


def test_a_reason_that_many_layers_share_is_said_once(tmp_path):
    sizes = {"num_heads": 2, "hidden_dim": 8, "intermediate_dim": 8, "max_sequence_length": 5}
    model = keras_hub.models.OPTBackbone(vocabulary_size=9, num_layers=6, **sizes)
    with pytest.raises(
        ValueError, match=r"_query_dense' has no place .* OPTBackbone; .*and so 35 more: .*and 32 more"
    ) as one:
        to_peft(keras_lora.apply_lora(model, rank=1), tmp_path / "a")
    assert len(str(one.value)) < 1000
    problems = [f"the module 'layers.{i}' has rank {i % 2}, and '{i}' of {i // 20}" for i in range(800)]
    listed = grouped(problems)
    assert listed[0] == problems[0] + " (and so 9 more: 'layers.2', 'layers.4', 'layers.6' and 6 more)"
    assert (len(listed), listed[-1]) == (13, "and 68 more problems of other kinds")


def test_another_family_is_refused(folder):
    other = keras_hub.models.BertBackbone(
        vocabulary_size=9, num_layers=1, num_heads=2, hidden_dim=8, intermediate_dim=8, max_sequence_length=5
    )
    with pytest.raises(ValueError, match=r"down_proj' is no kernel of this model.*and so 6 more"):
        from_peft(other, folder.good)


# Killed while it writes.

SAVER = """
import itertools, os, pathlib, sys
import numpy as np
from keras_lora.interop import peft_folder
for _ in sys.stdin:
    if not (child := os.fork()):
        for number in itertools.count():
            peft_folder.write(pathlib.Path(sys.argv[1]), {"number": number}, {"a": np.full(300_000, number, "float32")})
    print(child, flush=True)
    os.waitpid(child, 0)
    print("dead", flush=True)
"""


@pytest.mark.full
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system starts and kills in another way")
def test_kills_leave_the_old_folder_or_the_new_one(tmp_path):
    rng, path = random.Random(0), tmp_path / "french"
    peft_folder.write(path, {"number": 0}, {"a": np.full(300_000, 0, "float32")})
    (path / "README.md").write_text("mine")
    # JAX is in no way of a fork: nothing is computed. Each child begins where the imports are done.
    command, piped = [sys.executable, "-c", SAVER, str(path)], subprocess.PIPE
    process = subprocess.Popen(command, stdin=piped, stdout=piped, env={**os.environ, "KERAS_BACKEND": "jax"}, text=True)
    for _ in range(6):
        process.stdin.write("go\n")
        process.stdin.flush()
        child = int(process.stdout.readline())
        time.sleep(rng.uniform(0, 0.3))
        os.kill(child, signal.SIGKILL)
        assert process.stdout.readline() == "dead\n"
        found = [each for each in (path, *tmp_path.glob(".french.*.old")) if (each / CONFIG).exists()]
        assert found
        number = json.loads((found[0] / CONFIG).read_text())["number"]
        assert (safetensors.numpy.load_file(found[0] / TENSORS)["a"] == number).all()
        assert (found[0] / "README.md").read_text() == "mine"
        if found[0] != path:
            os.rename(found[0], path)
    process.communicate()
    assert process.returncode == 0


def test_a_folder_called_old_is_whole_however_its_removal_ends(tmp_path, monkeypatch):
    def cut(path, **_):
        (path / TENSORS).unlink(missing_ok=True)
        raise KeyboardInterrupt

    path = tmp_path / "french"
    peft_folder.write(path, {"number": 0}, {"a": np.zeros(3, "float32")})
    with monkeypatch.context() as patch:
        patch.setattr(peft_folder.shutil, "rmtree", cut)
        with pytest.raises(KeyboardInterrupt):
            peft_folder.write(path, {"number": 1}, {"a": np.ones(3, "float32")})
    assert json.loads((path / CONFIG).read_text())["number"] == 1
    assert [each for each in tmp_path.iterdir() if each.suffix == ".unfinished"]
    assert not list(tmp_path.glob(".french.*.old"))


# What the converters are asked.


def test_a_hook_means_what_it_meant_when_the_converter_gave_it():
    hooks = []
    for number in range(3):
        hooks.append(as_it_is_now(lambda tensor, shape: tensor[number]))  # noqa: B023  # a converter may well do this
    assert [hook([4, 5, 6], None) for hook in hooks] == [4, 5, 6]
    ports = [Port(None, "kernel", "key", hook) for hook in (*hooks, hooks[1], None)]
    assert ports[1].meaning == ports[3].meaning
    assert len({port.meaning for port in ports}) == 4


def test_watching_a_converter_changes_nothing_and_gives_the_names_of_the_model_as_it_is_adapted():
    model = base()
    before = {path: each.tolist() for path, each in values(model.weights).items()}
    plain = {key: [port.attribute for port in ports] for key, ports in CheckpointMap(model).keys.items()}
    assert {path: each.tolist() for path, each in values(model.weights).items()} == before
    adapted = CheckpointMap(keras_lora.apply_lora(model, rank=1))
    assert {key: [port.attribute for port in ports] for key, ports in adapted.keys.items()} == plain
    assert adapted.source_of("transformer_layers/0/sublayers/0/_query_dense").module == "model.layers.0.self_attn.q_proj"


def test_a_folder_that_cannot_be_put_in_its_place_leaves_the_old_one(tmp_path, monkeypatch):
    path, rename = tmp_path / "french", os.rename
    peft_folder.write(path, {"number": 0}, {"a": np.zeros(3, "float32")})

    def fail_in_the_end(old, new):
        if str(old).endswith(".unfinished"):
            raise OSError("the disk is gone")
        rename(old, new)

    monkeypatch.setattr(os, "rename", fail_in_the_end)
    with pytest.raises(OSError, match="the disk is gone"):
        peft_folder.write(path, {"number": 1}, {"a": np.ones(3, "float32")})
    assert [each.name for each in tmp_path.iterdir()] == ["french"]
    assert json.loads((path / CONFIG).read_text()) == {"number": 0}


def test_the_folder_a_process_works_in_is_refused_and_links_stay_links(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (".", ".."):
        with pytest.raises(ValueError, match="works in, and cannot be replaced"):
            peft_folder.write(peft_folder.Path(name), {}, {"a": np.zeros(3, "float32")})
    assert not list(tmp_path.iterdir())
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "real" / "mine").symlink_to("nowhere")
    (tmp_path / "link").symlink_to("real")
    for number in (1, 2):
        peft_folder.write(tmp_path / "link", {"number": number}, {"a": np.zeros(3, "float32")})
    assert sorted(each.name for each in tmp_path.iterdir()) == ["link", "real"]
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "mine").is_symlink()
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o700
    assert json.loads((tmp_path / "real" / CONFIG).read_text()) == {"number": 2}


def test_patterns_match_as_peft_matches_them():
    names = ["model.layers.1.q_proj", "model.layers.11.q_proj", "q_proj", "model.q-proj", "a.b", "axb", "x.a.b"]
    dotted = ["q_proj", "layers.1.q_proj", "1.q_proj", "q.proj", ".*q_proj", "^q_proj", "a.b"]
    for pattern in (*dotted, r"model\.layers\.1\.q_proj", r"a\.b"):
        for name in names:
            wanted = re.match(rf"(.*\.)?({pattern})$", name) is not None
            assert peft_folder.Config(0, 1, False, False, 0, {pattern: 5}, {}, None).rank_of(name) == (5 if wanted else 0)


def test_the_folders_of_named_adapters_are_named(folder, tmp_path):
    shutil.copytree(folder.good, tmp_path / "french")
    with pytest.raises(FileNotFoundError, match=r"Its folders \['french'\] have one each"):
        from_peft(base(), tmp_path)


def test_many_tensors_with_one_problem_are_one_line(tmp_path):
    keys = [f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_A.weight" for i in range(30)]
    keys += [key.replace("lora_A", "lora_B") for key in keys]
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    tensors = {key: np.zeros((8, 8), "float32") for key in keys}
    safetensors.numpy.save_file(tensors, tmp_path / "adapter_model.safetensors")
    [problem] = serving_rules.serving_problems(tmp_path)["vllm"]
    start = f"the tensor '{keys[0]}' has not the rank 4 of the config, which gives the scale before version 0.32"
    assert problem.startswith(f"{start} (and so 59 more: ")
