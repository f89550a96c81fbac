"""The law, for every layer type and every method: what runs equals the definition.

    adapted_output(x, apply(x, W)) == apply(x, W + delta_kernel(W))

The right side is computed with a plain Keras layer that holds the merged kernel, so that nothing of ours is on it but the
definition itself; `test_adapters.py` holds the definitions to NumPy.
"""

import keras
import numpy as np
import pytest
from helpers import difference, gradients, perturb, value
from keras import layers, ops

import keras_lora
from keras_lora.adapters import TABLE
from keras_lora.layers import TABLE as LAYERS

NUMBERS = np.random.default_rng(0)


def numbers(*shape):
    return NUMBERS.normal(size=shape).astype("float32")


def ids(*shape):
    return NUMBERS.integers(0, 11, size=shape).astype("int32")


def convolutions():
    """Every option of a convolution that the matrix must inherit."""
    first, last = {"data_format": "channels_first"}, {"data_format": "channels_last"}
    yield "conv1d", layers.Conv1D(6, 3, **last), numbers(2, 9, 4)
    yield "conv1d_causal_dilated", layers.Conv1D(6, 3, padding="causal", dilation_rate=2, **last), numbers(2, 9, 4)
    yield "conv1d_grouped", layers.Conv1D(6, 3, groups=2, activation="relu", **last), numbers(2, 9, 4)
    yield "conv2d", layers.Conv2D(6, 3, activation="relu", **last), numbers(2, 8, 7, 4)
    yield "conv2d_strided_same", layers.Conv2D(6, (3, 2), strides=(2, 1), padding="same", **last), numbers(2, 8, 7, 4)
    yield "conv2d_dilated", layers.Conv2D(6, 3, dilation_rate=(2, 1), padding="same", **last), numbers(2, 8, 7, 4)
    yield "conv2d_grouped", layers.Conv2D(6, 3, groups=2, **last), numbers(2, 8, 7, 4)
    yield "conv2d_one_by_one", layers.Conv2D(6, 1, use_bias=False, **last), numbers(2, 8, 7, 4)
    yield "conv3d", layers.Conv3D(4, 2, strides=2, padding="same", **last), numbers(2, 5, 4, 5, 2)
    yield "conv1d_channels_first", layers.Conv1D(6, 3, activation="relu", **first), numbers(2, 4, 9)
    yield "conv2d_channels_first", layers.Conv2D(6, 3, strides=2, padding="same", **first), numbers(2, 4, 8, 7)
    yield "conv2d_channels_first_grouped", layers.Conv2D(6, 3, groups=2, **first), numbers(2, 4, 8, 7)
    yield "conv3d_channels_first", layers.Conv3D(4, 2, **first), numbers(2, 2, 5, 4, 5)


def einsums():
    """The equations of Keras's and KerasHub's attention and feed-forward layers, experts, and odd orders of axes."""
    for name, equation, shape, x, bias in [
        ("query", "abc,cde->abde", (None, 3, 4), (2, 5, 6), "de"),
        ("output", "abcd,cde->abe", (None, 6), (2, 5, 3, 4), "e"),
        ("llama_query", "bqm,muh->bquh", (None, 3, 4), (2, 5, 6), None),
        ("llama_output", "bquh,uhm->bqm", (None, 6), (2, 5, 3, 4), None),
        ("gemma_query", "btd,ndh->btnh", (None, 3, 4), (2, 5, 6), None),
        ("gemma_output", "btnh,nhd->btd", (None, 6), (2, 5, 3, 4), None),
        ("feed_forward", "...x,xy->...y", (7,), (2, 5, 6), "y"),
        ("feed_forward_ellipsis_with_two_axes", "...x,xyz->...yz", (7, 3), (2, 4, 5, 6), "z"),
        ("output_axes_in_another_order", "abc,cde->adbe", (3, None, 4), (2, 5, 6), None),
        ("output_axes_exchanged", "abc,cde->aebd", (4, None, 3), (2, 5, 6), None),
        ("experts", "ebd,edh->ebh", (None, 7), (3, 5, 6), None),
        ("experts_inside", "bed,hed->bhe", (7, 3), (2, 3, 6), None),
        ("per_head", "btnh,nhk->btnk", (None, 3, 4), (2, 5, 3, 6), "nk"),
    ]:
        yield f"einsum_{name}", layers.EinsumDense(equation, shape, bias_axes=bias, activation="tanh"), numbers(*x)


def rest():
    yield "dense", layers.Dense(5, activation="relu"), numbers(3, 6)
    yield "dense_without_bias", layers.Dense(5, use_bias=False), numbers(3, 6)
    yield "dense_with_a_layer_as_activation", layers.Dense(5, activation=layers.LeakyReLU(0.3)), numbers(3, 4, 6)
    yield "embedding", layers.Embedding(11, 6), ids(2, 5)
    yield "embedding_masked", layers.Embedding(11, 6, mask_zero=True), ids(2, 5)


CASES = {name: (layer.get_config(), type(layer), x) for name, layer, x in [*rest(), *einsums(), *convolutions()]}


def run(function, x, layer):
    """`function(x)`. TensorFlow has channels-first convolutions on a CPU only through XLA, so there it is compiled."""
    first = getattr(layer, "data_format", None) == "channels_first"
    if first and keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.function(function, jit_compile=True)(tf.convert_to_tensor(x))
    return function(ops.convert_to_tensor(x))


def plain_layer(name):
    config, cls, x = CASES[name]
    layer = cls.from_config(config)
    layer.build(x.shape)
    return layer, x


@pytest.fixture(params=CASES)
def case(request):
    return plain_layer(request.param)


@pytest.fixture(params=sorted(TABLE))
def method(request):
    return request.param


def test_every_layer_type_has_a_case():
    covered = {cls for _, cls, _ in CASES.values()}
    assert covered == {adapted.linear_map_class.layer_class for adapted in LAYERS}


def test_what_runs_equals_a_plain_layer_with_the_changed_kernel(case, method):
    layer, x = case
    plain = type(layer).from_config(layer.get_config())
    plain.build(x.shape)
    plain.set_weights(layer.get_weights())
    keras_lora.apply_lora(layer, method, rank=2)
    perturb(layer)
    linear = layer.linear_map
    changed = value(linear.matrix) + value(layer.adapter.delta_kernel(linear.matrix))
    getattr(plain, linear.kernel_name).assign(value(linear.as_kernel(ops.convert_to_tensor(changed.astype("float32")))))
    expected = value(run(plain, x, layer))
    assert difference(value(run(layer, x, layer)), expected) < 2e-6
    keras_lora.remove_lora(layer)
    assert difference(value(run(layer, x, layer)), expected) > 1e-2, "the change is too small to be seen"


def test_the_fast_path_equals_the_default(case, method):
    layer, x = case
    keras_lora.apply_lora(layer, method, rank=2)
    perturb(layer)
    linear = layer.linear_map
    fast = run(lambda x: layer.adapter.adapted_output(x, linear.base_output(x), linear), x, layer)
    slow = run(lambda x: keras_lora.Adapter.adapted_output(layer.adapter, x, linear.base_output(x), linear), x, layer)
    assert difference(value(fast), value(slow)) < 2e-6


def test_a_fresh_adapter_changes_nothing(case, method):
    layer, x = case
    before = value(run(layer, x, layer))
    keras_lora.apply_lora(layer, method, rank=2)
    # LoRA adds exact zeros; DoRA divides a norm by itself.
    assert difference(value(run(layer, x, layer)), before) <= (0 if method == "lora" else 5e-7)


def test_matrix_and_kernel_are_inverse(case):
    layer, _ = case
    keras_lora.apply_lora(layer, rank=1)
    linear = layer.linear_map
    assert tuple(linear.matrix.shape) == linear.matrix_shape
    assert np.array_equal(value(linear.as_kernel(linear.matrix)), value(linear.kernel))


def test_apply_with_its_own_matrix_is_the_base_output(case):
    layer, x = case
    keras_lora.apply_lora(layer, rank=1)
    linear = layer.linear_map
    with_its_own = run(lambda x: linear.apply(x, linear.matrix), x, layer)
    assert difference(value(with_its_own), value(run(linear.base_output, x, layer))) == 0


def test_the_gradients_of_the_fast_path_are_those_of_the_definition(case, method):
    layer, x = case
    keras_lora.apply_lora(layer, method, rank=2)
    perturb(layer)
    linear = layer.linear_map
    weight = numbers(*run(layer, x, layer).shape)

    def loss(path):
        y = run(lambda x: path(layer.adapter, x, linear.base_output(x), linear), x, layer)
        return ops.sum(ops.multiply(y, weight))

    factors = layer.trainable_variables
    fast = gradients(lambda: loss(type(layer.adapter).adapted_output), factors)
    slow = gradients(lambda: loss(keras_lora.Adapter.adapted_output), factors)
    assert len(fast) == len(factors)
    for name, left, right in zip((v.name for v in factors), fast, slow, strict=True):
        assert difference(left, right) < 1e-5, name
        assert np.abs(right).max() > 1e-3, name
