"""Bases that are stored in fewer digits: what a training step keeps of them, and that the layers before them learn."""

import keras
import keras_hub
import numpy as np
import pytest
from helpers import difference, gradients, outputs, perturb, value
from keras import layers, ops
from keras.quantizers import Int4QuantizationConfig, Int8QuantizationConfig

import keras_lora
from keras_lora.compat import quantization
from keras_lora.swap.adapted import AdaptedLayer, maps_by_address, maps_of

BACKEND = keras.backend.backend()
TOKENS = np.random.default_rng(0).integers(0, 40, (8, 6))
REDUCED = ["bfloat16", "int8", "int4", "nf4"]
pytestmark = [pytest.mark.torch_first, pytest.mark.filterwarnings("ignore:The use of `x.T` on tensors:UserWarning")]


def reduced(model, kind, **apply):
    """`model`, adapted, its base stored as `kind`."""
    if kind in ("int8", "int4"):
        for layer in model.layers[1:]:
            layer.quantize(kind)
    return keras_lora.apply_lora(model, rank=2, head=None, base_dtype=None if kind.startswith("int") else kind, **apply)


# The gradient.


def language_model(tied):
    ids = keras.Input((6,), dtype="int32")
    embedding = layers.ReversibleEmbedding(40, 16, tie_weights=tied, name="words")
    h = embedding(ids)
    h = layers.add([h, layers.Dense(16, activation="tanh", name="dense")(h)])
    h = layers.add([h, layers.EinsumDense("abc,cd->abd", (None, 16), activation="tanh", name="einsum")(h)])
    return keras.Model(ids, embedding(h, reverse=True))


def gradient_of(model):
    def loss():
        logits = model(ops.convert_to_tensor(TOKENS))
        return ops.mean(keras.losses.sparse_categorical_crossentropy(np.roll(TOKENS, -1, 1), logits, from_logits=True))

    return np.concatenate([each.ravel() for each in gradients(loss, model.trainable_variables)])


#: Whether the embedding is tied, how the base is stored, and what is adapted besides the linear layers.
LANGUAGE_MODELS = [
    (tied, mode, adapted) for tied in (True, False) for mode in ("int8", "int4", "nf4") for adapted in ("", "words")
]
KEPT = {
    (True, "int8", ""): [],
    (False, "int8", "words"): [pytest.mark.full],
    (False, "int4", ""): [],
    (True, "nf4", ""): [pytest.mark.every_backend],
}


@pytest.mark.parametrize(
    ("tied", "mode", "adapted"),
    [pytest.param(*each, marks=KEPT.get(each, [pytest.mark.nightly])) for each in LANGUAGE_MODELS],
)
def test_a_quantised_language_model_has_the_gradient_of_its_float_copy(tmp_path, tied, mode, adapted):
    targets = list(filter(None, ["dense", "einsum", adapted]))
    model, copy = language_model(tied), language_model(tied)
    for name in ("dense", "einsum", "words") if mode != "nf4" else ():
        model.get_layer(name).quantize(mode)
    keras_lora.apply_lora(model, rank=2, targets=targets, base_dtype="nf4" if mode == "nf4" else None)
    perturb(model, size=0.1)
    found = maps_by_address(model)
    for address, linear in maps_by_address(copy).items():
        linear.kernel_variable.assign(value(found[address].kernel))
    keras_lora.apply_lora(copy, rank=2, targets=targets)
    for ours, theirs in zip(copy.trainable_variables, model.trainable_variables, strict=True):
        ours.assign(value(theirs))  # a copy: a step on JAX gives its buffers away
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert difference(outputs(loaded, TOKENS), outputs(model, TOKENS)) == 0
    expected = gradient_of(copy)
    for each in (model, loaded):
        gradient = gradient_of(each)
        assert gradient @ expected / np.linalg.norm(gradient) / np.linalg.norm(expected) > 0.99


@pytest.mark.every_backend
def test_a_plain_int8_embedding_lets_the_gradient_pass_and_is_plain_again_afterwards():
    model = language_model(tied=True)
    for name in ("dense", "words"):
        model.get_layer(name).quantize("int8")
    before = outputs(model, TOKENS)
    keras_lora.apply_lora(model, rank=2, targets="dense")
    assert isinstance(model.get_layer("words"), AdaptedLayer)
    assert difference(outputs(model, TOKENS), before) < 1e-6
    assert [row.layer for row in keras_lora.list_adapters(model)] == ["dense"]
    perturb(model, size=0.1)
    rounded, gradient = model.get_layer("words").inputs_quantizer, gradient_of(model)
    model.get_layer("words").inputs_quantizer = None
    exact = gradient_of(model)
    assert gradient @ exact / np.linalg.norm(gradient) / np.linalg.norm(exact) > 0.99
    model.get_layer("words").inputs_quantizer = rounded
    table = value(maps_of(model.get_layer("words"))[0].kernel)
    keras_lora.apply_lora(model, rank=2, targets="dense", name="second")
    keras_lora.delete_adapter(model, "second")
    assert isinstance(model.get_layer("words"), AdaptedLayer)
    keras_lora.remove_lora(model)
    assert type(model.get_layer("words")) is layers.ReversibleEmbedding
    assert np.array_equal(value(maps_of(model.get_layer("words"))[0].kernel), table)


WEIGHT_ONLY = [Int8QuantizationConfig(activation_quantizer=None), Int4QuantizationConfig(block_size=8), None]


@pytest.mark.full
@pytest.mark.parametrize("config", WEIGHT_ONLY, ids=["int8 weights", "int4 weights", "int4"])
def test_a_kerashub_model_comes_back_with_the_quantisers_it_had(tmp_path, config):
    sizes = {"num_query_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "hidden_dim": 16, "intermediate_dim": 32}
    backbone = keras_hub.models.GemmaBackbone(vocabulary_size=40, num_layers=1, **sizes)
    model = keras_hub.models.GemmaCausalLM(backbone=backbone, preprocessor=None)
    with pytest.warns(UserWarning, match="does not have a `quantize` method"):
        model.quantize(getattr(config, "mode", "int4"), config=config)
    keras_lora.apply_lora(model, rank=2)
    perturb(model, size=0.1)
    x = {"token_ids": TOKENS, "padding_mask": np.ones_like(TOKENS)}
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    loaded.save(tmp_path / "again.keras")
    for each in (loaded, keras.saving.load_model(tmp_path / "again.keras")):
        assert difference(outputs(each, x), outputs(model, x)) == 0


def test_a_file_whose_quantiser_is_something_else_is_refused_and_the_layer_stays():
    layer = layers.Dense(3)
    layer.build((None, 4))
    layer.quantize("int8")
    found = layer.inputs_quantizer
    description = {**quantization.describe(layer), "inputs": keras.saving.serialize_keras_object(layers.Dense(2))}
    with pytest.raises(ValueError, match=r"The quantiser of the inputs of 'dense.*' in this file is none"):
        quantization.quantize_again(layer, description)
    assert layer.inputs_quantizer is found


@pytest.mark.every_backend
@pytest.mark.parametrize("kind", REDUCED)
def test_nan_and_infinity_in_a_row_stay_in_that_row(kind):
    model = reduced(keras.Sequential([keras.Input((4,)), layers.Dense(3)]), kind)
    x = np.random.default_rng(1).normal(size=(3, 4)).astype("float32")
    expected = value(model(x))
    for wrong in (np.nan, np.inf, -np.inf):
        first = x.copy()
        first[0] = wrong
        assert np.array_equal(value(model(first))[1:], expected[1:])
    assert value(model.layers[0].linear_map.base_output(x[:0])).shape == (0, 3)


CONVOLUTIONS = [
    lambda: layers.Conv1D(3, 2, strides=2, data_format="channels_last"),
    lambda: layers.Conv1D(4, 3, groups=2, padding="same", data_format="channels_last"),
    lambda: layers.SeparableConv1D(5, 3, data_format="channels_last"),
]


@pytest.mark.every_backend
@pytest.mark.parametrize("make", CONVOLUTIONS, ids=["strides", "groups", "separable"])
def test_the_gradient_through_a_convolution_in_bfloat16_is_that_of_its_float_copy(make):
    found = []
    for base_dtype in ("bfloat16", None):
        keras.utils.set_random_seed(5)
        model = keras.Sequential([keras.Input((9, 4)), layers.Dense(4, name="before"), make(), layers.Flatten()])
        for linear in maps_by_address(model).values():  # numbers that bfloat16 has
            linear.kernel_variable.assign(value(ops.cast(ops.cast(linear.kernel, "bfloat16"), "float32")))
        keras_lora.apply_lora(model, rank=2, head=None, targets=[layers.Dense, type(model.layers[1])], base_dtype=base_dtype)
        perturb(model, size=0.1)
        x = np.random.default_rng(2).normal(size=(3, 9, 4)).astype("float32")
        found.append(gradients(lambda model=model, x=x: ops.sum(ops.square(model(x))), model.trainable_variables))
    assert difference(*found) < 0.03 * max(np.abs(each).max() for each in found[1])


# What a step keeps.


@pytest.mark.every_backend
@pytest.mark.skipif(BACKEND != "jax", reason="XLA's counters are read through JAX")
@pytest.mark.parametrize("kind", [*REDUCED, "convolution"])
def test_a_step_of_xla_forms_a_kernel_or_two_at_a_time(kind):
    """In float kernels; without care, there would be one for each of the 8 layers."""
    import jax

    width = 256
    if kind == "convolution":
        hidden = [layers.Conv1D(width, 1, activation="relu", data_format="channels_last") for _ in range(8)]
        model = reduced(keras.Sequential([keras.Input((4, width)), *hidden]), "bfloat16")
    else:
        hidden = [layers.Dense(width, activation="relu") for _ in range(8)]
        model = reduced(keras.Sequential([keras.Input((width,)), *hidden]), kind)

    def loss(trained, frozen, x):
        return ops.sum(ops.square(model.stateless_call(trained, frozen, x, training=True)[0]))

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        arrays = [[v.value for v in each] for each in (model.trainable_variables, model.non_trainable_variables)]
        step = jax.jit(jax.grad(loss)).lower(*arrays, np.ones((4, *model.input_shape[1:]), "float32")).compile()
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
    kernel = 4 * width * width
    assert 0 < step.memory_analysis().temp_size_in_bytes < 3 * kernel


@pytest.mark.skipif(BACKEND != "torch", reason="only torch shows what it keeps for the backward pass")
@pytest.mark.parametrize("kind", REDUCED)
def test_torch_keeps_no_float_kernel(kind):
    import torch

    model = reduced(keras.Sequential([keras.Input((64,)), *(layers.Dense(64, activation="relu") for _ in range(4))]), kind)
    stored = {v.value.untyped_storage().data_ptr() for v in model.variables}
    kept = []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in stored:
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        held = model(torch.ones((2, 64)), training=True)
    assert kept
    assert max(each.numel() for each in kept) < 64 * 64
    del held
