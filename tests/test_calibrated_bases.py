"""Bases that Keras has quantised with data (GPTQ, AWQ)."""

import keras
import numpy as np
import pytest
from helpers import difference, outputs, value
from keras import layers

import keras_lora
from keras_lora.swap.adapted import maps_by_address

pytestmark = [
    pytest.mark.torch_first,
    pytest.mark.filterwarnings("ignore:Invalid quantization mode:UserWarning"),
    pytest.mark.filterwarnings("ignore:The use of `x.T` on tensors:UserWarning"),
]
TOKENS = np.random.default_rng(0).integers(0, 20, (8, 6))
CONFIGS = {"gptq": keras.quantizers.GPTQConfig, "awq": keras.quantizers.AWQConfig}


@keras.saving.register_keras_serializable("calibrated")
class Block(layers.Layer):
    """A block with the layers that Keras calibrates; rebuilt from its config, its layers are float."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.split = layers.EinsumDense("abc,cde->abde", (None, 2, 4), bias_axes="de", activation="tanh", name="split")
        self.join = layers.EinsumDense("abde,dec->abc", (None, 8), name="join")
        self.dense = layers.Dense(8, activation="tanh", name="dense")

    def build(self, shape):
        self.split.build(shape)
        self.join.build((None, None, 2, 4))
        self.dense.build(shape)

    def call(self, x):
        return self.dense(x + self.join(self.split(x)))


def model_of_blocks(kind, **config):
    """A model with a block, calibrated by Keras; its head is outside the block."""
    ids = keras.Input((6,), dtype="int32")
    embedding, block = layers.Embedding(20, 8, name="embedding"), Block(name="block")
    model = keras.Model(ids, layers.Dense(3, name="head")(block(embedding(ids))))
    structure = {"pre_block_layers": [embedding], "sequential_blocks": [block]}
    model.get_quantization_layer_structure = lambda mode: structure
    if kind:
        data = {"dataset": list(TOKENS), "tokenizer": lambda tokens: tokens, "num_samples": 2, "sequence_length": 6}
        model.quantize(kind, config=CONFIGS[kind](**data, **config))
    return model


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("gptq", {"group_size": 8}),
        pytest.param("gptq", {"group_size": -1, "weight_bits": 8}, marks=pytest.mark.nightly),
        pytest.param("awq", {"group_size": 8}, marks=pytest.mark.full),
    ],
)
def test_a_calibrated_base_stays_frozen_trains_and_comes_back(tmp_path, kind, config):
    model, copy = model_of_blocks(kind, **config), model_of_blocks(None)
    found = outputs(model, TOKENS)
    assert len(keras_lora.list_targets(model).of("adapt")) == 3
    keras_lora.apply_lora(model, rank=2)
    assert difference(outputs(model, TOKENS), found) == 0
    maps = maps_by_address(model)
    for address, linear in maps_by_address(copy).items():  # the dequantised kernels, in a float model
        assert linear.kernel_shape == maps[address].kernel_shape
        linear.kernel_variable.assign(value(maps[address].kernel))
    assert difference(outputs(copy, TOKENS), found) < 1e-5

    codes = [value(v).copy() for v in model.non_trainable_variables]
    model.compile(keras.optimizers.Adam(1e-2), "mse")
    losses = model.fit(TOKENS, np.ones((8, 6, 3)), epochs=4, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    assert all(np.array_equal(value(v), old) for v, old in zip(model.non_trainable_variables, codes, strict=True))
    trained = outputs(model, TOKENS)
    keras_lora.save_adapter(model, tmp_path / "a.safetensors")
    assert difference(outputs(keras_lora.load_adapter(copy, tmp_path / "a.safetensors"), TOKENS), trained) < 1e-5

    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    loaded.save(tmp_path / "again.keras")
    loaded.save_weights(tmp_path / "m.weights.h5")
    loaded.load_weights(tmp_path / "m.weights.h5")
    for each in (loaded, keras.saving.load_model(tmp_path / "again.keras")):
        assert difference(outputs(each, TOKENS), trained) == 0
        assert each.get_layer("block").dense.quantization_mode == kind
        assert not any("float" in str(v.dtype) and v.path.endswith("dense/kernel") for v in each.weights)
    with pytest.raises(ValueError, match=r"quantised with data cannot be merged into.*'layers/1/dense'.*load_adapter"):
        keras_lora.merge_lora(model, requantize=True)
    keras_lora.remove_lora(model)
    assert difference(outputs(model, TOKENS), found) == 0
    assert type(model.get_layer("block").dense) is layers.Dense


@pytest.mark.full
def test_a_layer_that_waits_for_its_codes_is_refused_by_name_and_trains_in_full():
    model = model_of_blocks("awq", group_size=8)
    with pytest.raises(ValueError, match=r"'head' waits for its codes in awq; calibrate the model"):
        keras_lora.apply_lora(model, rank=1, targets="head", head=None)
    keras_lora.apply_lora(model, rank=1, train="head")
    kernel = next(v for v in model.trainable_variables if v.path == "head/kernel")
    before = value(kernel).copy()
    model.compile(keras.optimizers.Adam(1e-2), "mse")
    model.fit(TOKENS, np.ones((8, 6, 3)), verbose=0)
    assert difference(value(kernel), before) > 1e-3


def test_a_mode_without_codes_is_refused():
    model = keras.Sequential([keras.Input((8,)), layers.Dense(4)])
    model.quantize("float8")
    with pytest.raises(ValueError, match=r"is quantised as float8; int8, int4, gptq and awq are supported"):
        keras_lora.apply_lora(model, head=None)
