"""`SpectralNormalization` around an adapted or frozen layer: as at inference, and Keras's own behaviour where it trains."""

import keras
import numpy as np
import pytest
from helpers import covering, difference, outputs, perturb, value
from keras import layers

import keras_lora


@keras.saving.register_keras_serializable("spectral")
class Doubled(layers.SpectralNormalization):
    """A subclass of the wrapper."""

    def call(self, inputs, training=False):
        return 2 * super().call(inputs, training=training)


def dense():
    return layers.SpectralNormalization(layers.Dense(4, name="inside"), power_iterations=2, name="wrapper"), (4,)


def subclassed():
    return Doubled(layers.Dense(4, name="inside"), name="wrapper"), (4,)


def convolution():
    return layers.SpectralNormalization(layers.Conv2D(3, 2, name="inside"), name="wrapper"), (3, 3, 2)


def embedding():
    # Keras casts the output to the dtype of the input, so that integer ids would give integers.
    return layers.SpectralNormalization(layers.Embedding(5, 3, name="inside"), name="wrapper"), (4,)


def over_time():
    inside = layers.SpectralNormalization(layers.Dense(3, name="inside"), name="wrapper")
    return layers.TimeDistributed(inside), (2, 4)


def wrapped_twice():
    inside = layers.SpectralNormalization(layers.Dense(3, name="inside"), name="wrapper")
    return layers.SpectralNormalization(inside, name="outer"), (4,)


KINDS = {each.__name__: each for each in (dense, subclassed, convolution, embedding, over_time, wrapped_twice)}


def made(kind, **arguments):
    """A model, its wrapper, and data; the largest singular value of the kernel is not 1."""
    layer, shape = KINDS[kind]()
    model = keras.Sequential([keras.Input(shape), layer, layers.Flatten(), layers.Dense(2, name="head")])
    wrapper = getattr(layer, "layer", layer) if kind in ("over_time", "wrapped_twice") else layer
    rng = np.random.default_rng(0)
    wrapper.kernel.assign(rng.normal(size=wrapper.kernel.shape))
    x = rng.normal(size=(4, *shape)) if kind != "embedding" else rng.integers(0, 5, size=(4, *shape)).astype("float32")
    if arguments:
        keras_lora.apply_lora(model, **arguments)
        model.compile(keras.optimizers.SGD(0.02), "mse")
    return model, wrapper, x.astype("float32")


def trained(model, x):
    model.fit(x, np.ones((len(x), 2)), batch_size=2, shuffle=False, verbose=0)
    return model


def numbers(wrapper):
    return value(wrapper.kernel), value(wrapper.vector_u)


ADAPTED = [*(f"{kind} lora" for kind in KINDS), "dense dora", "convolution dora"]


@pytest.mark.parametrize("name", covering(ADAPTED, ["subclassed lora"]))
def test_the_layer_inside_is_adapted_trained_saved_and_merged(name, tmp_path):
    kind, adapter = name.split()
    model, wrapper, x = made(kind)
    before, found = outputs(model, x), numbers(wrapper)
    keras_lora.apply_lora(model, adapter, rank=1, alpha=1, targets="inside")
    assert difference(outputs(model, x), before) < 1e-6
    model.compile(keras.optimizers.SGD(0.02), "mse")
    y = model(x, training=True)  # the wrapper does not run as in training
    assert difference([value(y)], before) < 1e-6
    trained(model, x)
    after = outputs(model, x)
    assert difference(after, before) > 1e-4
    assert all(np.array_equal(*each) for each in zip(numbers(wrapper), found, strict=True))

    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    keras_lora.save_adapter(model, tmp_path / "adapter.safetensors")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert difference(outputs(loaded, x), after) == 0
    assert [v.name for v in loaded.trainable_variables] == [v.name for v in model.trainable_variables]
    trained(loaded, x)
    assert difference(outputs(trained(model, x), x), outputs(loaded, x)) < 1e-6
    model.load_weights(tmp_path / "model.weights.h5")
    assert difference(outputs(model, x), after) == 0
    assert difference(outputs(keras_lora.merge_lora(model, keep=True), x), after) < 1e-5
    assert isinstance(wrapper.kernel, keras.Variable)
    assert wrapper.kernel is getattr(wrapper.layer, "kernel", None) or wrapper.kernel is wrapper.layer.embeddings
    keras_lora.remove_lora(keras_lora.unmerge_lora(model))
    assert difference(outputs(model, x), before) == 0
    assert difference(outputs(keras_lora.load_adapter(model, tmp_path / "adapter.safetensors"), x), after) < 1e-6


@pytest.mark.torch_first
def test_without_adapters_it_is_keras_again():
    (model, wrapper, x), (plain, other, _) = made("dense"), made("dense")
    other.vector_u.assign(value(wrapper.vector_u))
    plain.set_weights(model.get_weights())
    flags = [v.trainable for v in model.variables]
    keras_lora.remove_lora(keras_lora.apply_lora(model, rank=1, train="head"))
    assert type(wrapper) is layers.SpectralNormalization
    assert [v.trainable for v in model.variables] == flags
    for each in (model, plain):
        each.compile(keras.optimizers.SGD(0.02), "mse")
        trained(each, x)
    assert not np.array_equal(numbers(wrapper)[0], numbers(made("dense")[1])[0])
    assert all(difference([left], [right]) < 1e-6 for left, right in zip(numbers(wrapper), numbers(other), strict=True))


@pytest.mark.parametrize("train", covering(["wrapper", "inside"], ["wrapper"]))
def test_where_it_trains_in_full_keras_normalises_it(train, tmp_path):
    (model, wrapper, x), (plain, other, _) = made("dense"), made("dense")
    plain.set_weights(model.get_weights())
    before = outputs(model, x)
    keras_lora.apply_lora(model, rank=1, targets="head", train=train, head=None)
    for each in (model, plain):
        each(x, training=True)
    assert all(difference([left], [right]) < 1e-6 for left, right in zip(numbers(wrapper), numbers(other), strict=True))
    model.compile(keras.optimizers.SGD(0.02), "mse")
    trained(model, x)
    after = outputs(model, x)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert difference(outputs(loaded, x), after) == 0
    assert [v.name for v in loaded.trainable_variables] == [v.name for v in model.trainable_variables]
    with keras_lora.disable_adapters(model):
        assert difference(outputs(model, x), before) == 0
    model.trainable = False
    kernel = numbers(wrapper)[0]
    model(x, training=True)
    assert np.array_equal(numbers(wrapper)[0], kernel)
    assert difference(outputs(keras_lora.remove_lora(model), x), before) == 0


@pytest.mark.once
def test_a_kernel_is_counted_once():
    model, _, _ = made("dense")
    rows = keras_lora.list_targets(model, targets="head", train="wrapper", head=None, rank=1)
    assert [(row.path, row.action, row.parameters, row.trainable) for row in rows] == [
        ("wrapper", "train", 4, 0),
        ("wrapper/inside", "train", 20, 20),
        ("head", "adapt", 10, 6),
    ]
    keras_lora.apply_lora(model, targets="head", train="wrapper", head=None, rank=1)
    found = keras_lora.list_adapters(model)
    assert (found.trainable, found.parameters) == (26, 20 + 4 + 10 + 6 + 1)
    assert sum(row.trainable for row in found) == 26


@pytest.mark.once
def test_the_head_is_found_inside():
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dense(4), layers.SpectralNormalization(layers.Dense(1, name="head"))]
    )
    keras_lora.apply_lora(model, rank=1, train="head")
    perturb(model)
    assert [v.name for v in model.trainable_variables] == ["lora_a", "lora_b", "kernel", "bias"]
