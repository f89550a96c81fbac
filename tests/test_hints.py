"""Words that people bring from PEFT and Keras, mistyped keywords and misplaced arguments: the error has the right word."""

import json
import zipfile

import h5py
import keras
import numpy as np
import pytest
import safetensors.numpy
from keras import layers

import keras_lora
from keras_lora.interop import from_peft

pytestmark = pytest.mark.torch_first


@pytest.fixture
def model():
    x = keras.Input((5, 8))
    return keras.Model(x, layers.Dense(2)(layers.MultiHeadAttention(2, 4)(x, x)))


WORDS = {
    "r": ({"r": 8}, "no argument `r`. Use `rank`"),
    "lora_rank": ({"lora_rank": 8}, "Use `rank`"),
    "lora_alpha": ({"lora_alpha": 8}, "Use `alpha`"),
    "target_modules": ({"target_modules": ["query"]}, "Use `targets`"),
    "lora_dropout": ({"lora_dropout": 0.1}, r"keras_lora.LoRA\(dropout=...\)"),
    "modules_to_save": ({"modules_to_save": ["head"]}, "Use `train`"),
    "use_dora": ({"use_dora": True}, 'adapter="dora"'),
    "mistyped": ({"target": "query"}, "no argument `target`. Use `targets`"),
    "far from all": ({"zzz": 1}, "It takes `model`, `adapter`"),
}


@pytest.mark.parametrize("word", WORDS)
def test_a_word_of_another_library_gets_ours(model, word):
    arguments, said = WORDS[word]
    before = [type(layer) for layer in model.layers]
    for function in (keras_lora.apply_lora, keras_lora.list_targets):
        with pytest.raises(TypeError, match=said):
            function(model, **arguments)
    assert [type(layer) for layer in model.layers] == before


def test_a_method_knows_the_words_too():
    with pytest.raises(TypeError, match=r"`LoRA\(\)` has no argument `r`. Use `rank`"):
        keras_lora.LoRA(r=4)
    with pytest.raises(TypeError, match=r"`DoRA\(\)` has no argument `lora_alpha`. Use `alpha`"):
        keras_lora.DoRA(lora_alpha=4)
    with pytest.raises(TypeError, match=r"`TrainableTokens\(\)` has no argument `rank`"):
        keras_lora.apply_lora(keras.Sequential([layers.Dense(2)]), "trainable_tokens", rank=4)
    with pytest.raises(ValueError, match=r"has arguments without a default. Expected an instance: TrainableTokens\(tokens"):
        keras_lora.apply_lora(keras.Sequential([layers.Dense(2)]), "trainable_tokens")


def test_a_method_without_a_rank_says_so():
    model = keras.Sequential([keras.Input((3,)), layers.Dense(4), layers.Dense(2)])
    for function in (keras_lora.apply_lora, keras_lora.list_targets):
        with pytest.raises(TypeError, match=r"`TrainableTokens\(\)` has no argument `rank`: this method takes `tokens`\."):
            function(model, "trainable_tokens", rank=4)
        with pytest.raises(TypeError, match=r"has no argument `alpha`.* Received: alpha=2\. Leave it out"):
            function(model, keras_lora.TrainableTokens([1]), alpha=2)


def test_what_is_no_model_is_said_in_a_few_words(model):
    heavy = [keras.Variable(np.ones((100, 100))), keras.Variable(np.ones(3))]
    for function in (keras_lora.apply_lora, keras_lora.list_targets, keras_lora.list_adapters):
        with pytest.raises(TypeError, match="`model` must be a Keras model or layer") as error:
            function(heavy)
        assert str(error.value).endswith(f"Received: a list of length 2, the first of type {type(heavy[0]).__name__}.")
        with pytest.raises(TypeError, match=r"Received: None of type NoneType\."):
            function(None)
        with pytest.raises(TypeError, match=r"Received: an object of type ndarray\."):
            function(np.ones(9))


def test_swapped_arguments_are_noticed(model):
    for function in (keras_lora.apply_lora, keras_lora.list_targets):
        for method, shown in [("lora", "'lora' of type str"), (keras_lora.LoRA(rank=2), "an object of type LoRA")]:
            with pytest.raises(TypeError, match=rf"Received: {shown}\. Expected the model first: swap the two\."):
                function(method, model)
    with pytest.raises(TypeError, match=r"must be a name.*of type Functional"):
        keras_lora.apply_lora(model, model)


def test_a_rank_for_some_layers_is_refused_by_a_method_that_has_none():
    ids = keras.Input((3,), dtype="int32")
    model = keras.Model(ids, layers.Dense(2)(layers.Embedding(9, 4, name="tokens")(ids)))
    with pytest.raises(ValueError, match=r"TrainableTokens has no argument \['rank'\]"):
        keras_lora.apply_lora(model, keras_lora.TrainableTokens([1]), targets="tokens", rank_pattern={"tokens": 2})


def test_a_rank_in_the_place_of_the_adapter(model):
    with pytest.raises(TypeError, match="A rank is given by name: rank=8"):
        keras_lora.apply_lora(model, 8)


def test_a_name_in_the_place_of_another_argument(model, tmp_path):
    keras_lora.apply_lora(model, rank=1)
    with pytest.raises(TypeError, match=r"takes 2 arguments by position \(model, path\).*Received by position: 'french'"):
        keras_lora.save_adapter(model, tmp_path / "a.safetensors", "french")
    assert not (tmp_path / "a.safetensors").exists()
    with pytest.raises(TypeError, match=r"takes 2 arguments by position.*Write for example `name=...`"):
        keras_lora.load_adapter(model, tmp_path / "a.safetensors", "french")
    with pytest.raises(TypeError, match=r"takes 2 arguments by position.*Received by position: 'svd'"):
        keras_lora.combine_adapters(model, "default", "svd")


@pytest.mark.parametrize(("word", "ours"), [("q_proj", "query"), ("v_proj", "value"), ("o_proj", "attention_output")])
def test_a_name_of_transformers_gets_that_of_keras(model, word, ours):
    with pytest.raises(ValueError, match=rf"targets='{word}' matches no layer; the nearest names are \['{ours}'"):
        keras_lora.apply_lora(model, targets=word)


def test_numbers_of_numpy_are_numbers(model):
    method = keras_lora.LoRA(rank=np.int64(4), alpha=np.float32(8), dropout=np.float64(0.5))
    assert (method.rank, method.alpha, method.dropout) == (4, 8.0, 0.5)
    assert {type(each) for each in (method.rank, method.alpha, method.dropout)} == {int, float}
    rows = keras_lora.list_targets(
        model, rank=np.int32(4), alpha=np.int64(8), rank_pattern={"query": np.int64(2)}, alpha_pattern={"key": np.float32(3)}
    )
    assert [(row.rank, row.adapter.alpha) for row in rows.of("adapt")] == [(2, 8), (4, 3.0), (4, 8), (4, 8)]
    for wrong in ({"rank": True}, {"rank": 2.0}, {"rank": 0}, {"alpha": np.nan}, {"alpha": "8"}, {"dropout": 1}):
        with pytest.raises(ValueError, match="must be a"):
            keras_lora.LoRA(**wrong)


@pytest.mark.parametrize("method", [keras_lora.LoRA, keras_lora.DoRA])
def test_bools_and_seeds_of_numpy_are_saved(method, tmp_path):
    layer = keras.layers.Dense(2)
    layer.build((None, 3))
    given = {"rank_stabilized": np.True_, "freeze_a": np.False_, "seed": np.int64(3), "dropout": 0.1}
    keras_lora.apply_lora(layer, method(rank=1, **given))
    keras_lora.save_adapter(layer, tmp_path / "a.safetensors")
    config = layer.adapter.get_config()
    assert json.loads(json.dumps(config)) == config
    assert (config["rank_stabilized"], config["freeze_a"]) == (True, False)
    for wrong in ({"rank_stabilized": "no"}, {"freeze_a": 2}, {"seed": "3"}, {"seed": True}):
        with pytest.raises(ValueError, match=rf"`{next(iter(wrong))}` must be"):
            method(**wrong)


@pytest.mark.parametrize("given", [{"adapter": ...}, {"rank": ...}])
def test_a_list_of_variables_in_a_wrong_place_prints_no_numbers(model, given):
    with pytest.raises((TypeError, ValueError), match="must be") as error:
        keras_lora.apply_lora(model, **dict.fromkeys(given, model.weights))
    assert len(str(error.value)) < 300


# Files and paths.


def write_peft(path):
    path.mkdir()
    (path / "adapter_config.json").write_text("{}")


def write_torch(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"")


def write_h5(path):
    h5py.File(path, "w").close()


def write_tensors(*names):
    return lambda path: safetensors.numpy.save_file({name: np.ones((2, 2)) for name in names}, path)


KINDS = {
    "french": (write_peft, r"the folder of a PEFT adapter, which `keras_lora.interop.from_peft\(model, folder\)` reads"),
    "french.safetensors": (write_peft, "folder of a PEFT adapter"),
    "peft.safetensors": (
        write_tensors("base_model.model.q.lora_A.weight"),
        r"the tensors of a PEFT adapter. `keras_lora.interop.from_peft\(model, folder\)` reads the folder it lies in",
    ),
    "other.safetensors": (write_tensors("a", "b"), "a safetensors file of another kind, with 2 tensors such as a, b"),
    "net.keras": (write_torch, r"a whole Keras model, which `keras.saving.load_model\(path\)` reads"),
    "net.h5": (write_h5, r"`keras_lora.interop.from_lora_h5\(backbone, path\)`.*`keras.saving.load_model\(path\)` an `.h5`"),
    "h5.safetensors": (write_h5, "an HDF5 file"),
    "net.pt": (write_torch, "a pickle, such as `torch.save` writes, or another archive. keras_lora never opens pickles"),
    "torch.safetensors": (write_torch, "a pickle, such as `torch.save` writes"),
    "pickle.safetensors": (lambda path: path.write_bytes(b"\x80\x04N."), "a pickle"),
    "stuff": (lambda path: (path / "x").mkdir(parents=True), "a folder, with x in it. Expected one file"),
    "cut.safetensors": (lambda path: path.write_bytes(b"\x20"), "It may be cut off or damaged"),
}


@pytest.mark.once
@pytest.mark.parametrize("name", KINDS)
def test_a_file_of_another_kind_is_named_with_what_reads_it(model, tmp_path, name):
    write, said = KINDS[name]
    write(tmp_path / name)
    with pytest.raises(ValueError, match=said):
        keras_lora.load_adapter(model, tmp_path / name)


@pytest.mark.once
def test_arguments_that_are_swapped_are_named(model, tmp_path):
    path = str(tmp_path / "a.safetensors")
    for function in (keras_lora.load_adapter, keras_lora.save_adapter):
        with pytest.raises(
            TypeError, match=r"takes the model first, and then the path. Received: .*a.safetensors', and then a"
        ):
            function(path, model)
    with pytest.raises(TypeError, match="takes the model first, and then the folder"):
        from_peft(tmp_path, model)
    with pytest.raises(TypeError, match=r"`model` must be a Keras model or layer. Received: 'net'"):
        keras_lora.load_adapter("net", path)


@pytest.mark.once
def test_a_folder_that_is_missing_or_closed_is_named_as_it_was_given(model, tmp_path, monkeypatch):
    keras_lora.apply_lora(model, rank=1)
    path = tmp_path / "none" / "a.safetensors"
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*none to write a.safetensors into. Make it first"):
        keras_lora.save_adapter(model, path)

    def closed(*_, **__):
        raise PermissionError(13, "Permission denied", "/tmp/.a.safetensors.x.unfinished")

    monkeypatch.setattr("pathlib.Path.write_bytes", closed)
    with pytest.raises(PermissionError, match=r"Permission denied, so it cannot be written: '.*/a.safetensors'"):
        keras_lora.save_adapter(model, tmp_path / "a.safetensors")


@pytest.mark.once
def test_the_file_of_an_adapted_model_names_the_package(model, tmp_path):
    keras_lora.apply_lora(model, rank=1)
    model.save(tmp_path / "net.keras")
    with zipfile.ZipFile(tmp_path / "net.keras") as archive:
        config = json.loads(archive.read("config.json"))
    assert config["module"].startswith("keras_lora")  # Keras prints it where the package was not imported
    assert config["registered_name"] == "keras_lora>Adapted"
