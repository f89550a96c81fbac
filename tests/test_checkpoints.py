"""Adapter files of every format version load: those under `checkpoints/` were written by the code of their time."""

import json
import shutil

import keras
import numpy as np
import pytest
import safetensors.numpy
from helpers import difference, header_of, outputs
from make_checkpoints import CASES, FOLDER, make

import keras_lora
from keras_lora.files import tensor_file

VERSIONS = range(1, tensor_file.VERSION + 1)
#: The same in every version.
KEYS = {
    "lora": [f"layers/{index}:lora_{side}" for index in (0, 2, 3) for side in "ab"],
    "dora": [f"layers/{index}:{name}" for index in (0, 1) for name in ("lora_a", "lora_b", "magnitude")],
    "tokens": ["layers/0:token_delta", "layers/1:lora_a", "layers/1:lora_b"],
    "head": [
        "layers/0:base.1.bias",
        "layers/0:lora_a",
        "layers/0:lora_b",
        "layers/1:base.0.gamma",
        "layers/1:base.1.beta",
        "layers/1:base.2.moving_mean",
        "layers/1:base.3.moving_variance",
        "layers/2:base.0.kernel",
        "layers/2:base.1.bias",
    ],
    "recurrent": [f"layers/0/cell/{name}:lora_{side}" for name in ("kernel", "recurrent_kernel") for side in "ab"],
}


def base_of(name, version):
    """The plain base of a checkpoint, with its input and the output it had once it was adapted."""
    with np.load(FOLDER / f"version_{version}" / f"{name}.npz") as numbers:
        model = CASES[name][0]()
        model.set_weights([numbers[f"weight_{index}"] for index in range(len(model.weights))])
        return model, numbers["x"], [numbers["y"]]


def test_there_are_checkpoints_of_every_version():
    assert {path.name for path in FOLDER.iterdir()} == {f"version_{version}" for version in VERSIONS}
    for version in VERSIONS:
        names = {path.name for path in (FOLDER / f"version_{version}").iterdir()}
        assert names == {f"{name}{ending}" for name in CASES for ending in (".safetensors", ".npz")}
        for name in CASES:
            assert header_of(FOLDER / f"version_{version}" / f"{name}.safetensors")["version"] == version


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("version", VERSIONS)
def test_a_checkpoint_has_its_keys_and_gives_the_outputs_it_gave(name, version):
    model, x, expected = base_of(name, version)
    path = FOLDER / f"version_{version}" / f"{name}.safetensors"
    assert sorted(safetensors.numpy.load_file(path)) == KEYS[name]
    assert difference(outputs(model, x), expected) > 1e-2
    keras_lora.load_adapter(model, path)
    assert difference(outputs(model, x), expected) < 1e-5


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("version", VERSIONS)
def test_a_checkpoint_loads_into_a_model_adapted_the_same_way(name, version):
    model, x, expected = base_of(name, version)
    keras_lora.apply_lora(model, **CASES[name][2])
    keras_lora.load_adapter(model, FOLDER / f"version_{version}" / f"{name}.safetensors")
    assert difference(outputs(model, x), expected) < 1e-5


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("version", VERSIONS)
def test_saved_again_it_is_the_file_of_today_bit_for_bit(tmp_path, name, version):
    model = base_of(name, version)[0]
    keras_lora.load_adapter(model, FOLDER / f"version_{version}" / f"{name}.safetensors")
    keras_lora.save_adapter(model, tmp_path / "again.safetensors")
    newest = FOLDER / f"version_{tensor_file.VERSION}" / f"{name}.safetensors"
    assert (tmp_path / "again.safetensors").read_bytes() == newest.read_bytes()


@pytest.mark.torch_first
def test_the_script_writes_the_header_of_the_committed_files(tmp_path):
    for name in CASES:
        make(name, tmp_path)
        assert header_of(tmp_path / f"{name}.safetensors") == header_of(
            FOLDER / f"version_{tensor_file.VERSION}" / f"{name}.safetensors"
        )


def test_a_file_that_only_claims_another_version_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    shutil.copy(FOLDER / "version_1" / "lora.safetensors", path)
    tensors, header = safetensors.numpy.load_file(path), header_of(path)
    for version, match in [(2, "not a whole adapter file"), (0, "format version 0"), (3, "newer keras_lora")]:
        metadata = {tensor_file.ENTRY: json.dumps({**header, "version": version})}
        safetensors.numpy.save_file(tensors, path, metadata)
        with pytest.raises(ValueError, match=match):
            keras_lora.load_adapter(keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)]), path)
