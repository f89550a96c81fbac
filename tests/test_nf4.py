"""NF4: its numbers, a base that is stored in it, and models that are built in it."""

import keras
import keras_hub
import numpy as np
import pytest
from helpers import covering, difference, gradients, outputs, perturb, value
from keras import layers, ops
from make_nf4_codes import PATH, SHAPES, nf4_weights

import keras_lora
from keras_lora.compat import nf4
from keras_lora.linear_map import LinearMap
from keras_lora.swap.adapted import AdaptedLayer, maps_by_address

pytestmark = pytest.mark.torch_first
TOKENS = np.random.default_rng(0).integers(0, 40, (2, 6))


# The numbers.


def dequantized(codes, absmax, scale, mean, size):
    """The numbers in NumPy, one nibble at a time, as the paper says."""
    nibbles = np.stack([codes >> 4, codes & 15], axis=1).reshape(-1)[:size]
    sizes = nf4.ABSMAX_TABLE[absmax] * np.repeat(scale, nf4.GROUP)[: len(absmax)] + mean
    return nf4.TABLE[nibbles] * np.repeat(sizes, nf4.BLOCK)[:size]


@pytest.mark.parametrize("shape", covering(SHAPES, SHAPES[-1:]), ids=str)
def test_codes_are_those_of_bitsandbytes(shape):
    theirs, weights = np.load(PATH), nf4_weights(shape)
    packed = nf4.quantize(ops.convert_to_tensor(weights))
    expected = nf4.Packed(*(theirs[f"{shape[0]}x{shape[1]}.{name}"] for name in nf4.Packed._fields))
    assert [np.shape(each) for each in packed] == [tuple(each) for each in nf4.shapes(weights.size)]
    assert np.array_equal(value(packed.codes), expected.codes)
    assert np.allclose(value(packed.scale), expected.scale, rtol=1e-6)
    blocks = np.pad(weights.reshape(-1), (0, -weights.size % nf4.BLOCK)).reshape(-1, nf4.BLOCK)
    scale = np.repeat(expected.scale, nf4.GROUP)[: len(blocks)]
    part = (np.abs(blocks).max(axis=1) - expected.mean) / np.where(scale, scale, 1)
    ours, theirs = (np.abs(nf4.ABSMAX_TABLE[value(each)] - part) for each in (packed.absmax, expected.absmax))
    assert np.all(ours <= theirs + 1e-6)  # bitsandbytes is a little off where two codes are nearly as near
    assert np.mean(value(packed.absmax) != expected.absmax) < 0.05 or not expected.scale.any()
    given = [value(each) for each in packed]
    found = value(nf4.dequantize(packed, shape))
    assert np.allclose(found, dequantized(*given, weights.size).reshape(shape), rtol=1e-6, atol=1e-7)
    index = np.array([[0, shape[0] - 1]])
    rows = value(nf4.rows(packed, shape, ops.convert_to_tensor(index)))
    assert np.allclose(rows, found[index], rtol=1e-6, atol=1e-7)  # XLA rounds a product and a sum once


@pytest.mark.every_backend
def test_rows_of_as_many_ids_as_there_are_bytes_in_a_row():
    """Keras on TensorFlow would take the vector of places in a row for a bias of the axis of ids."""
    rng = np.random.default_rng(0)
    codes, absmax = (rng.integers(0, 256, size).astype("uint8") for size in (240, 8))
    scale, mean = np.full(1, 0.5, "float32"), np.float32(0.1)
    found = nf4.rows(nf4.Packed(*map(ops.convert_to_tensor, (codes, absmax, scale, mean))), (40, 12), TOKENS)
    assert np.allclose(value(found), dequantized(codes, absmax, scale, mean, 480).reshape(40, 12)[TOKENS], atol=1e-6)


def test_the_error_and_the_size_are_those_of_the_paper():
    weights = np.random.default_rng(0).normal(size=(512, 512)).astype("float32")
    packed = nf4.quantize(ops.convert_to_tensor(weights))
    error = value(nf4.dequantize(packed, weights.shape)) - weights
    assert 0.0915 < np.sqrt(np.mean(error**2)) < 0.0925
    assert sum(value(each).nbytes for each in packed) * 8 / weights.size == pytest.approx(4.127, abs=3e-3)


def test_a_large_array_is_quantised_in_parts(monkeypatch):
    weights = ops.convert_to_tensor(nf4_weights((260, 64)))
    whole = nf4.quantize(weights)
    monkeypatch.setattr(nf4, "_AT_A_TIME", 64 * nf4.BLOCK)
    assert all(np.array_equal(value(a), value(b)) for a, b in zip(whole, nf4.quantize(weights), strict=True))


# A base.


def language_model(tied=True):
    ids = keras.Input((6,), dtype="int32")
    words = layers.ReversibleEmbedding(40, 20, tie_weights=tied, mask_zero=True, name="words")
    h = words(ids)
    h = layers.add([h, layers.Dense(20, activation="tanh", name="dense")(h)])
    h = layers.add([h, layers.MultiHeadAttention(2, 9, name="attention")(h, h)])
    return keras.Model(ids, words(h, reverse=True))


EVERYTHING = ["dense", "attention", "words"]


def dtypes(model):
    return {v.path: keras.backend.standardize_dtype(v.dtype) for v in model.weights}


def integers(model):
    return {v.path: value(v) for v in model.weights if v.dtype == "uint8"}


@pytest.mark.every_backend
@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.nightly)])
def test_a_base_in_nf4_trains_saves_merges_and_is_given_back(tmp_path, tied):
    model = language_model(tied)
    plain, paths, kernels = outputs(model, TOKENS), [v.path for v in model.weights], [value(v).copy() for v in model.weights]
    count = len(model.trainable_variables)
    keras_lora.apply_lora(
        model, rank=2, targets=[*EVERYTHING, *([] if tied else ["words/reverse_embeddings"])], base_dtype="nf4"
    )
    before, codes = outputs(model, TOKENS), integers(model)
    assert 0 < difference(before, plain) < 0.2
    assert type(model.get_layer("dense")).__name__ == "Dense"
    assert {v.dtype for v in model.trainable_variables} == {"float32"}
    model.trainable = False
    model.trainable = True  # integers never train
    model.compile(keras.optimizers.Adam(1e-2), "mse")
    model.fit(TOKENS, np.ones((2, 6, 40)), epochs=2, verbose=0)
    trained = outputs(model, TOKENS)
    assert difference(trained, before) > 1e-3
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    loaded.save_weights(tmp_path / "m.weights.h5")
    model.load_weights(tmp_path / "m.weights.h5")
    for each in (model, loaded):
        assert difference(outputs(each, TOKENS), trained) == 0
        found = integers(each)
        assert sorted(found) == sorted(codes)
        assert all(np.array_equal(found[path], codes[path]) for path in codes)
    keras_lora.merge_lora(loaded, keep=True)
    assert set(dtypes(loaded).values()) == {"float32"}
    assert difference(outputs(loaded, TOKENS), trained) < 1e-5
    keras_lora.unmerge_lora(loaded)
    assert difference(outputs(loaded, TOKENS), trained) == 0
    keras_lora.remove_lora(loaded)
    assert difference(outputs(loaded, TOKENS), before) < 1e-6
    assert [v.path for v in loaded.weights] == paths
    assert len(loaded.trainable_variables) == count
    errors = [
        np.sqrt(np.mean((value(v) - old) ** 2)) / (old.std() or 1) for v, old in zip(loaded.weights, kernels, strict=True)
    ]
    assert max(errors) < 0.13


def test_the_gradient_through_a_convolution_is_that_of_its_float_copy():
    found, kernels = [], {}
    for base_dtype in ("nf4", None):
        keras.utils.set_random_seed(5)
        convolution = layers.Conv1D(4, 3, groups=2, padding="same", data_format="channels_last")
        model = keras.Sequential([keras.Input((9, 4)), layers.Dense(4), convolution, layers.Flatten()])
        for address, linear in maps_by_address(model).items():
            if address in kernels:
                linear.kernel_variable.assign(kernels[address])
        keras_lora.apply_lora(model, rank=2, head=None, base_dtype=base_dtype)
        kernels = {address: value(linear.kernel) for address, linear in maps_by_address(model).items()}
        perturb(model, size=0.1)
        x = np.random.default_rng(2).normal(size=(3, 9, 4)).astype("float32")
        found.append(gradients(lambda model=model, x=x: ops.sum(ops.square(model(x))), model.trainable_variables))
    assert difference(*found) < 1e-4 * max(np.abs(each).max() for each in found[1])


@pytest.mark.parametrize("reverse_dtype", [None, "float32"])
def test_under_mixed_precision_the_dtypes_are_those_of_the_float_layer(reverse_dtype):
    layer = layers.ReversibleEmbedding(11, 6, reverse_dtype=reverse_dtype, dtype="mixed_bfloat16")
    layer.build((None, 3))
    x, ids = np.ones((2, 3, 6), "float32"), np.ones((2, 3), "int32")
    before = [layer(ids), layer(x, reverse=True)]
    keras_lora.apply_lora(layer, rank=2, targets=lambda each: True, base_dtype="nf4")
    after = [layer(ids), layer(x, reverse=True)]
    assert [each.dtype for each in after] == [each.dtype for each in before]
    assert difference([value(each) for each in after], [value(each) for each in before]) < 0.1
    assert layer.embeddings_absmax_scale.dtype == "float32"


def test_float_weights_are_quantised_when_they_are_loaded_and_adapter_files_fit_both(tmp_path):
    plain, other = language_model(), language_model()
    plain.save_weights(tmp_path / "m.weights.h5")
    keras_lora.apply_lora(plain, rank=2, targets=EVERYTHING, base_dtype="nf4")
    keras_lora.apply_lora(other, rank=2, targets=EVERYTHING, base_dtype="nf4")
    other.load_weights(tmp_path / "m.weights.h5")
    assert difference(outputs(other, TOKENS), outputs(plain, TOKENS)) == 0
    perturb(plain, size=0.1)
    keras_lora.save_adapter(plain, tmp_path / "a.safetensors")
    fresh = language_model()
    keras_lora.load_adapter(fresh, tmp_path / "a.safetensors")
    assert set(dtypes(fresh).values()) == {"float32"}
    keras_lora.load_adapter(other, tmp_path / "a.safetensors", name="again")


def test_a_layer_without_nf4_refuses_a_file_that_has_it(tmp_path):
    model = keras.Sequential([keras.Input((8,)), layers.Dense(4)])
    keras_lora.apply_lora(model, rank=1, head=None, base_dtype="nf4").save_weights(tmp_path / "m.weights.h5")
    other = keras_lora.apply_lora(keras.Sequential([keras.Input((8,)), layers.Dense(4)]), rank=1, head=None)
    with pytest.raises(ValueError, match=r"stores in NF4 itself.*kernel_absmax"):
        other.load_weights(tmp_path / "m.weights.h5")


def test_a_layer_whose_code_reads_its_kernel_is_refused_and_nothing_changes():
    model = keras.Sequential([keras.Input((5, 4)), layers.LSTM(3), layers.Dense(2, name="out")])
    with pytest.raises(ValueError, match=r"base_dtype='nf4' cannot store the kernels at .*lstm.*`exclude`"):
        keras_lora.apply_lora(model, rank=1, head=None, base_dtype="nf4")
    assert type(model.get_layer("out")) is layers.Dense


def test_a_layer_that_trains_in_full_becomes_float():
    model = keras.Sequential([keras.Input((8,)), layers.Dense(8), layers.Dense(2, name="out")])
    keras_lora.apply_lora(model, rank=1, head=None, base_dtype="nf4")
    keras_lora.apply_lora(model, rank=1, targets="dense*", train="out", name="second")
    assert [v.path.split("/")[-2:] for v in model.trainable_variables if "lora" not in v.path] == [
        ["out", "kernel"],
        ["out", "bias"],
    ]
    assert model.get_layer("out").kernel.shape == (8, 2)


# Keras's own modes by the same word.


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_keras_quantises_before_the_layers_are_adapted(mode):
    model = language_model()
    keras_lora.apply_lora(model, rank=2, targets=EVERYTHING, base_dtype=mode)
    assert {model.get_layer(name).quantization_mode for name in ("dense", "words")} == {mode}
    if mode == "int4":
        assert model.get_layer("dense").quantization_config.block_size == 64
    model.compile("adam", "mse")
    model.fit(TOKENS, np.ones((2, 6, 40)), verbose=0)
    keras_lora.apply_lora(model, rank=1, targets="dense", base_dtype=mode, name="second")
    keras_lora.remove_lora(model)
    assert type(model.get_layer("dense")) is layers.Dense
    assert model.get_layer("dense").quantization_mode == mode


def test_what_keras_cannot_quantise_is_refused_and_nothing_changes():
    model = keras.Sequential([keras.Input((9, 4)), layers.Dense(4, name="first"), layers.Conv1D(3, 2, name="second")])
    with pytest.raises(ValueError, match=r"base_dtype='int8' needs layers that Keras can quantise.*\['second'\]"):
        keras_lora.apply_lora(model, rank=1, head=None, base_dtype="int8")
    keras_lora.apply_lora(model, rank=1, head=None, targets="first")
    with pytest.raises(ValueError, match=r"quantises layers before they are adapted.*\['first'\].*remove_lora"):
        keras_lora.apply_lora(model, rank=1, head=None, targets="first", base_dtype="int8", name="b")
    assert model.get_layer("first").quantization_mode is None


@pytest.mark.every_backend
def test_a_layer_that_keras_refuses_is_found_before_another_is_quantised():
    model = keras.Sequential(
        [keras.Input((8,)), layers.Dense(8, name="first"), layers.Dense(4, dtype="float16", name="half")]
    )
    with pytest.raises(ValueError, match=r"Keras could not quantise 'half' in int8.*Quantised already: \[\]"):
        keras_lora.apply_lora(model, rank=1, head=None, base_dtype="int8")
    assert model.get_layer("first").quantization_mode is None
    assert type(model.get_layer("first")) is layers.Dense


# Built in fewer digits.

SIZES = {"num_layers": 1, "num_query_heads": 2, "hidden_dim": 16, "intermediate_dim": 32, "num_key_value_heads": 1}
EVERY_KERNEL = (layers.Dense, layers.EinsumDense, layers.ReversibleEmbedding)


def llama():
    backbone = keras_hub.models.LlamaBackbone(vocabulary_size=40, **SIZES)
    return keras_hub.models.LlamaCausalLM(backbone=backbone, preprocessor=None)


def test_a_model_is_quantised_while_it_is_built_and_loaded(tmp_path, monkeypatch):
    x = {"token_ids": TOKENS, "padding_mask": np.ones_like(TOKENS)}
    plain = llama()
    plain.save_weights(tmp_path / "m.weights.h5")
    plain.backbone.save_to_preset(tmp_path / "preset")
    keras_lora.apply_lora(plain, rank=2, targets=list(EVERY_KERNEL), head=None, base_dtype="nf4")
    floats, whole = {}, LinearMap.store_kernel

    def counted(self, dtype, found=False):
        whole(self, dtype, found)
        floats[id(self.kernel_variable)] = self.stored is None
        most.append(sum(floats.values()))

    most = []
    monkeypatch.setattr(LinearMap, "store_kernel", counted)
    with keras_lora.reduced_base("nf4", layers=EVERY_KERNEL):
        model = llama()
        again = keras_hub.models.LlamaBackbone.from_preset(str(tmp_path / "preset"))
    model.load_weights(tmp_path / "m.weights.h5")
    monkeypatch.undo()
    assert len(floats) > 10
    assert max(most) <= 2  # an untied embedding has two kernels
    assert difference(outputs(model, x), outputs(plain, x)) == 0
    assert difference(outputs(again, x), outputs(plain.backbone, x)) == 0
    before = outputs(model, x)
    keras_lora.apply_lora(model, rank=2)
    perturb(model, size=0.1)
    model.save(tmp_path / "m.keras")
    with keras_lora.reduced_base("nf4", layers=EVERY_KERNEL):
        loaded = keras.saving.load_model(tmp_path / "m.keras")
    tuned = outputs(model, x)
    for each in (loaded, keras.saving.load_model(tmp_path / "m.keras")):
        assert difference(outputs(each, x), tuned) == 0
    keras_lora.remove_lora(model)
    assert difference(outputs(model, x), before) == 0
    assert isinstance(model.backbone.token_embedding, AdaptedLayer)
    keras_lora.merge_lora(loaded)
    assert set(dtypes(loaded).values()) == {"float32"}
    assert len(loaded.trainable_variables) == len(llama().trainable_variables)
    assert difference(outputs(loaded, x), tuned) < 1e-5


def test_reduced_base_refuses_what_no_float_file_can_be_loaded_into():
    with (
        pytest.raises(ValueError, match=r"`base_dtype` must be one of \('nf4', 'bfloat16'\) here"),
        keras_lora.reduced_base("int8"),
    ):
        pass
    with pytest.raises(ValueError, match="`layers` must be layer classes"), keras_lora.reduced_base(layers=("dense",)):
        pass
    layer = layers.Dense(2)
    layer.build((None, 3))
    assert type(layer) is layers.Dense
