"""`train="norms"`: scales and offsets of every normalization train, their statistics stay."""

import keras
import numpy as np
import pytest
from helpers import difference, outputs, value
from keras import layers

import keras_lora

X = np.random.default_rng(0).normal(size=(16, 8)).astype("float32") + 1
Y = np.random.default_rng(1).normal(size=(16, 3)).astype("float32")


def net():
    keras.utils.set_random_seed(3)
    norms = [
        layers.BatchNormalization(name="batch"),
        layers.LayerNormalization(name="layer"),
        layers.RMSNormalization(name="rms"),
    ]
    stack = [layers.Dense(6, activation="tanh"), *norms, layers.Normalization(name="inputs", mean=0.0, variance=1.0)]
    return keras.Sequential([keras.Input((8,)), *stack, layers.Dense(3, name="out")])


def fitted(model):
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.fit(X, Y, batch_size=8, epochs=2, verbose=0)
    return outputs(model, X)


def statistics(model):
    return [value(v) for v in model.get_layer("batch").variables if "moving" in v.path]


def trained_names(model):
    return {"/".join(v.path.split("/")[-2:]) for v in model.trainable_variables if "lora" not in v.path}


NAMES = {"batch/gamma", "batch/beta", "layer/gamma", "layer/beta", "rms/scale"}


@pytest.mark.torch_first
def test_scales_and_offsets_train_and_statistics_stay(tmp_path):
    model = keras_lora.apply_lora(net(), rank=2, train="norms")
    before, start, found = outputs(model, X), statistics(model), [value(v) for v in model.trainable_variables]
    assert trained_names(model) == NAMES
    seen = fitted(model)
    assert difference(statistics(model), start) == 0
    assert all(np.abs(value(v) - old).max() > 0 for v, old in zip(model.trainable_variables, found, strict=True))
    keras_lora.save_adapter(model, tmp_path / "norms.safetensors")
    model.save(tmp_path / "model.keras")
    for loaded in (
        keras_lora.load_adapter(net(), tmp_path / "norms.safetensors"),
        keras.saving.load_model(tmp_path / "model.keras"),
    ):
        assert difference(outputs(loaded, X), seen) < 1e-6
        assert trained_names(loaded) == NAMES
        fitted(loaded)
        assert difference(statistics(loaded), start) == 0
        keras_lora.save_adapter(loaded, tmp_path / "again.safetensors")
        assert difference(outputs(keras_lora.remove_lora(loaded), X), before) < 1e-6
    assert "moving" not in str(keras_lora.files.tensor_file.read(tmp_path / "again.safetensors")[1].keys())


@pytest.mark.torch_first
def test_switching_keeps_the_statistics():
    model = keras_lora.apply_lora(net(), rank=2, train="norms", name="a")
    seen, start = fitted(model), statistics(model)
    keras_lora.apply_lora(model, rank=2, name="b", train="batch")
    assert trained_names(model) == {"batch/gamma", "batch/beta"}
    fitted(model)
    assert difference(statistics(model), start) > 1e-3, "a layer named in `train` trains in full"
    keras_lora.train_adapters(keras_lora.activate_adapters(model, "a"), "a")
    assert difference(outputs(model, X), seen) == 0
    assert trained_names(model) == NAMES
    fitted(model)
    assert difference(statistics(model), start) == 0
    keras_lora.train_adapters(keras_lora.activate_adapters(model, "b"), "b")
    now = statistics(model)
    fitted(model)
    assert difference(statistics(model), now) > 1e-4
    keras_lora.activate_adapters(keras_lora.delete_adapter(model, "b"), "a")
    assert difference(statistics(model), start) == 0


@pytest.mark.once
def test_the_word_beside_others_and_a_layer_of_that_name():
    model = keras_lora.apply_lora(net(), rank=2, train=["norms", "head"], bias="lora_only")
    assert trained_names(model) == NAMES | {"out/kernel", "out/bias", "dense/bias"} or len(trained_names(model)) == 8
    rows = {row.path: row for row in keras_lora.list_targets(net(), rank=2, train="norms")}
    assert (rows["batch"].action, rows["batch"].why, rows["batch"].trainable) == ("train", "normalization", 12)
    plain = keras.Sequential([keras.Input((8,)), layers.Dense(4), layers.Dense(3)])
    with pytest.raises(ValueError, match="train='norms' matches no layer"):
        keras_lora.apply_lora(plain, train="norms")
    named = keras.Sequential([keras.Input((8,)), layers.Dense(4), layers.Dense(4, name="norms"), layers.Dense(3)])
    assert trained_names(keras_lora.apply_lora(named, rank=1, train="norms")) == {"norms/kernel", "norms/bias"}


@pytest.mark.once
def test_norms_of_keras_hub():
    import keras_hub

    bert = keras_hub.models.BertBackbone(50, 1, 2, 8, 16, max_sequence_length=6)
    keras_lora.apply_lora(bert, rank=1, train="norms")
    assert {name.split("/")[-1] for name in trained_names(bert)} == {"gamma", "beta"}
    assert len(trained_names(bert)) == 6
    gemma = keras_hub.models.GemmaBackbone(50, 1, 2, 1, 8, 16, 4)
    keras_lora.apply_lora(gemma, rank=1, train="norms")
    assert {name.split("/")[-1] for name in trained_names(gemma)} == {"scale"}
    assert len(trained_names(gemma)) == 3


def test_a_normalization_without_scale_and_offset_in_train_updates_its_statistics():
    norm = layers.BatchNormalization(center=False, scale=False, name="batch")
    model = keras.Sequential([keras.Input((8,)), layers.Dense(6), norm, layers.Dense(3, name="out")])
    keras_lora.apply_lora(model, rank=2, train="batch")
    before = statistics(model)
    fitted(model)
    assert difference(statistics(model), before) > 0.01
