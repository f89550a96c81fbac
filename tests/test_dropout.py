"""Dropout on the way to A: one random byte for each entry, drawn again for the gradient."""

import keras
import numpy as np
import pytest
from helpers import covering, gradients, perturb, value
from keras import layers, ops

import keras_lora
from keras_lora import backend

EVERYWHERE = pytest.mark.every_backend
BACKEND = keras.backend.backend()


def drop(rate, seed=3, count=0):
    generator = keras.random.SeedGenerator(seed)
    generator.state.assign([seed, count])
    return backend.Drop(rate, generator.next())


def stays(shape, rate=0.1, **state):
    return value(backend.dropped(ops.ones(shape), drop(rate, **state))) == 1


@EVERYWHERE
def test_every_entry_is_dropped_with_the_exact_probability():
    """0.3 / 256 would be 0 or 1 of 256 in every call; over calls it is 0.3 of 1."""
    few = np.mean([stays((4096,), 0.3 / 256, count=count) for count in range(40)])
    assert 256 * (1 - few) == pytest.approx(0.3, abs=0.06)
    many = stays((4000, 24), 0.1)
    assert 1 - many.mean() == pytest.approx(0.1, abs=1 / 256 + 0.004)
    # No lane of the words differs from the others.
    assert (np.abs(many.mean(0) - many.mean()) < 5 * np.sqrt(0.09 / 4000)).all()
    assert np.abs(np.corrcoef(many.T.astype(float)) - np.eye(24)).max() < 0.09


@EVERYWHERE
def test_the_numbers_follow_from_the_state_of_the_generator():
    shape = (37, 11)  # no multiple of a word
    assert (stays(shape, 0.5) == stays(shape, 0.5)).all()
    for other in ({"seed": 4}, {"count": 1}, {"seed": 2, "count": 1}):  # Keras's on torch depend on the sum of the two
        assert 0.3 < (stays(shape, 0.5) == stays(shape, 0.5, **other)).mean() < 0.7
    assert {bool(each) for each in (stays((3,), 0.5, count=count)[0] for count in range(20))} == {True, False}


def built(layer, shape, dtype=None, **arguments):
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input(shape), layer])
    keras_lora.apply_lora(model, keras_lora.LoRA(2, alpha=6, seed=5, **arguments), head=None)
    perturb(model)
    return model, layer.adapter


LAYERS = {
    "dense": (lambda: layers.Dense(5, activation="tanh"), (9,)),
    "dense on tokens": (lambda: layers.Dense(5, use_bias=False), (3, 9)),
    "einsum": (lambda: layers.EinsumDense("abc,cde->abde", (None, 2, 3)), (3, 9)),
    "convolution": (lambda: layers.Conv2D(5, 2, data_format="channels_last"), (4, 4, 3)),
    "no product": (lambda: layers.EinsumDense("abc,cd->adb", (5, None)), (3, 9)),
}


@pytest.mark.parametrize("name", covering(LAYERS, ["dense on tokens", "convolution"]))
def test_output_and_gradients_are_those_of_the_mask(name):
    make, shape = LAYERS[name]
    model, adapter = built(make(), shape, dropout=0.3)
    layer, linear = model.layers[0], model.layers[0].linear_map
    x = np.random.default_rng(0).normal(size=(4, *shape)).astype("float32")

    state = value(adapter.seed_generator.state)
    rows = (12, 9) if linear.is_matmul and len(shape) == 2 else x.shape
    mask = backend.dropped(ops.ones(rows), drop(0.3, *map(int, state)))
    mask = (value(mask).reshape(x.shape) / 0.7).astype("float32")

    def expected(x):
        a, b = adapter.current_pair()
        y = ops.add(linear.base_output(x), linear.apply_product(ops.multiply(x, mask), a, ops.multiply(3.0, b)))
        return linear.finish(y)

    def run(x):
        adapter.seed_generator.state.assign(state)
        return layer(x, training=True)

    np.testing.assert_allclose(value(run(x)), value(expected(x)), rtol=1e-5, atol=1e-5)
    x = keras.Variable(x)
    variables = [x, *adapter.trainable_variables]
    found, wanted = (gradients(lambda f=f: ops.sum(ops.square(f(x.value))), variables) for f in (run, expected))
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.torch_first
def test_in_bfloat16_the_mask_is_the_same():
    x = np.random.default_rng(0).normal(size=(6, 16)).astype("float32")
    layer = layers.Dense(4, dtype="mixed_bfloat16")
    model, adapter = built(layer, (16,), dropout=0.5)
    found = model(x, training=True)
    assert keras.backend.standardize_dtype(found.dtype) == "bfloat16"
    plain, other = built(layers.Dense(4), (16,), dropout=0.5)
    plain.set_weights([v.astype("float32") for v in model.get_weights()])
    other.seed_generator.state.assign([*value(adapter.seed_generator.state)[:1], 0])
    np.testing.assert_allclose(value(ops.cast(found, "float32")), value(plain(x, training=True)), rtol=0.05, atol=0.05)


@EVERYWHERE
def test_one_byte_is_drawn_for_an_entry():
    rows, width = 32, 48
    model, _ = built(layers.Dense(8), (width,), dropout=0.1)
    x = np.ones((rows, width), "float32")
    if BACKEND == "torch":
        import torch

        drawn = []
        whole = torch.Tensor.random_
        try:
            torch.Tensor.random_ = lambda words, *a, **k: drawn.append(words.nbytes) or whole(words, *a, **k)
            gradients(lambda: ops.sum(model(x, training=True)), model.trainable_variables)
        finally:
            torch.Tensor.random_ = whole
        assert drawn == [rows * width] * 2  # once more for the gradient
    elif BACKEND == "tensorflow":
        import tensorflow as tf

        def step(x):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(model(x, training=True))
            return tape.gradient(loss, [v.value for v in model.trainable_variables])

        graph = tf.function(step).get_concrete_function(tf.constant(x)).graph
        drawn = [op.outputs[0] for op in graph.get_operations() if op.type.startswith("StatelessRandomUniform")]
        assert [each.dtype.size * each.shape.num_elements() for each in drawn] == [rows * width]  # and kept as booleans
    else:
        import jax

        values = [[v.value for v in group] for group in (model.trainable_variables, model.non_trainable_variables)]
        traced = str(jax.make_jaxpr(lambda x: model.stateless_call(*values, x, training=True))(x))
        assert traced.count("threefry2x32") == 1
        assert f"u32[{rows},{width // 8}]" in traced.split("threefry2x32")[0].splitlines()[-1]  # 2 words for 8 entries
