"""What trains: the base does not move by a bit, whatever is switched on and off."""

import keras
import numpy as np
import pytest
from helpers import covering, outputs, perturb, value, values
from keras import layers
from zoo import BATCH, ZOO

import keras_lora

PLAIN = [name for name in ZOO if name != "made_by_hand"]


def train(specimen, epochs=3):
    specimen.model.compile(keras.optimizers.Adam(1e-2), **specimen.compile)
    specimen.model.fit(specimen.x, specimen.y, epochs=epochs, batch_size=BATCH, shuffle=False, verbose=0)


@pytest.mark.parametrize("name", covering(PLAIN, ["sequential", "subclassed", "multi_head_attention", "embedding"]))
def test_only_what_is_named_changes_and_all_of_it_does(name):
    specimen = ZOO[name]()
    keras_lora.apply_lora(specimen.model, **specimen.apply)
    before = values(specimen.model.variables)
    trainable = {v.path for v in specimen.model.trainable_variables}
    train(specimen)
    moved = {v.path for v in specimen.model.variables if not np.array_equal(value(v), before[v.path])}
    unseen = {path for path in trainable - moved if "pooled_dense" in path or ("key" in path and path.endswith("bias"))}
    # The bias of a key shifts all scores of a query alike: attention does not depend on it.
    assert trainable - moved <= unseen
    # `SpectralNormalization` around a head that trains follows its largest singular value.
    states = ("seed_generator", "head/vector_u")
    assert not [path for path in moved - trainable if not any(state in path for state in states)]


def normalised():
    stack = [
        keras.Input((8,)),
        layers.Dense(8, name="a"),
        layers.BatchNormalization(name="norm"),
        layers.Dense(2, name="head"),
    ]
    return keras.Sequential(stack)


def test_the_statistics_of_batch_normalization_stay_and_move_where_it_is_trained():
    for train_it in (False, True):
        model = keras_lora.apply_lora(normalised(), rank=2, train="norm" if train_it else None)
        statistics = [value(v) for v in model.get_layer("norm").non_trainable_variables if "moving" in v.path]
        model.compile("adam", "mse")
        model.fit(np.random.normal(size=(16, 8)) + 3, np.ones((16, 2)), verbose=0)
        now = [value(v) for v in model.get_layer("norm").variables if "moving" in v.path]
        assert len(now) == 2
        assert all(np.array_equal(*pair) for pair in zip(statistics, now, strict=False)) is not train_it


@pytest.mark.parametrize("name", ["sequential", "multi_head_attention", "nested", "subclassed", "hub_bert_classifier"])
def test_switching_a_model_off_and_on_leaves_the_base_frozen(name):
    specimen = ZOO[name]()
    keras_lora.apply_lora(specimen.model, **specimen.apply)
    planned = [v.trainable for v in specimen.model.variables]
    specimen.model.trainable = False
    assert not specimen.model.trainable_variables
    specimen.model.trainable = True
    assert [v.trainable for v in specimen.model.variables] == planned
    specimen.model.trainable = True
    assert [v.trainable for v in specimen.model.variables] == planned
    for layer in specimen.model._flatten_layers(include_self=False):
        if layer._layers and "adapter" not in dir(layer):
            layer.trainable = True
    assert [v.trainable for v in specimen.model.variables] == planned


def test_it_stays_so_in_a_larger_model_and_after_loading(tmp_path):
    inner = keras_lora.apply_lora(normalised(), rank=2)
    x = keras.Input((8,))
    outer = keras.Model(x, layers.Dense(1)(inner(x)))
    outer.trainable = False
    outer.trainable = True
    assert len(outer.trainable_variables) == 2 + 2
    outer.save(tmp_path / "outer.keras")
    outer = keras.saving.load_model(tmp_path / "outer.keras")
    outer.trainable = False
    outer.trainable = True
    assert len(outer.trainable_variables) == 2 + 2


def test_a_model_saved_while_switched_off_comes_back_off_and_can_be_switched_on(tmp_path):
    model = keras_lora.apply_lora(normalised(), rank=2, train="head")
    model.trainable = False
    model.save(tmp_path / "off.keras")
    model = keras.saving.load_model(tmp_path / "off.keras")
    assert not model.trainable_variables
    model.trainable = True
    assert [v.name for v in model.trainable_variables] == ["lora_a", "lora_b", "kernel", "bias"]


def test_what_the_user_freezes_or_thaws_afterwards_is_saved(tmp_path):
    x = keras.Input((5, 8))
    attention = layers.MultiHeadAttention(2, 4, name="attention")
    model = keras.Model(x, layers.Dense(2, name="head")(layers.LayerNormalization(name="norm")(attention(x, x))))
    keras_lora.apply_lora(model, rank=2)
    attention.query_dense.trainable = False  # one adapter
    model.get_layer("norm").trainable = True  # one frozen layer
    expected = [v.trainable for v in model.variables]
    assert sum(expected) == 6 + 2
    model.save(tmp_path / "m.keras")
    assert [v.trainable for v in keras.saving.load_model(tmp_path / "m.keras").variables] == expected


@pytest.mark.parametrize(("bias", "biases"), [("none", 0), ("lora_only", 1), ("all", 2)])
def test_biases_train_as_the_option_says(bias, biases):
    model = keras_lora.apply_lora(normalised(), rank=2, bias=bias)
    assert len([v for v in model.trainable_variables if v.name == "bias"]) == biases
    assert len(model.trainable_variables) == 2 + biases


def test_an_unknown_bias_option_is_refused():
    with pytest.raises(ValueError, match=r"`bias` must be one of \('none', 'all', 'lora_only'\). Received: bias='some'"):
        keras_lora.apply_lora(normalised(), bias="some")


def test_a_model_frozen_before_still_trains_its_adapters():
    model = normalised()
    model.trainable = False
    keras_lora.apply_lora(model, rank=2, train="head")
    assert [v.name for v in model.trainable_variables] == ["lora_a", "lora_b", "kernel", "bias"]
    keras_lora.remove_lora(model)
    assert not model.trainable_variables


def test_rematerialised_gradients_are_the_same():
    if keras.backend.backend() == "tensorflow":
        pytest.skip("Keras's RematScope fails in compiled training on TensorFlow, for a plain Dense too")

    def gradients_with(scope):
        keras.utils.set_random_seed(1)
        with scope:
            x = keras.Input((8,))
            model = keras.Model(x, layers.Dense(2)(layers.Dense(8, activation="gelu", name="a")(x)))
        keras_lora.apply_lora(model, rank=2)
        perturb(model)
        model.compile(keras.optimizers.SGD(0.1), "mse")
        model.fit(np.ones((4, 8)), np.ones((4, 2)), epochs=2, verbose=0)
        return [value(v) for v in model.trainable_variables]

    import contextlib

    plain, saved = gradients_with(contextlib.nullcontext()), gradients_with(keras.RematScope("full"))
    for left, right in zip(plain, saved, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-7)


def test_a_regularizer_of_the_frozen_kernel_adds_nothing_to_the_loss():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(4, kernel_regularizer="l2"), layers.Dense(2)])
    keras_lora.apply_lora(model, rank=1)
    assert not model.losses


@pytest.mark.torch_first
@pytest.mark.nightly
def test_the_first_step_lowers_the_loss_alike_for_every_rank():
    """So one learning rate serves every rank: the scale `alpha / rank` is there for that (docs/rates.md)."""
    rng, falls = np.random.default_rng(0), {}
    model = keras.Sequential([keras.Input((128,)), layers.Dense(96, activation="tanh"), layers.Dense(64)])
    x, y = rng.normal(size=(64, 128)).astype("float32"), rng.normal(size=(64, 64)).astype("float32")

    def loss():
        return float(np.mean((outputs(model, x)[0] - y) ** 2))

    before = loss()
    for rank, seeds in {1: 64, 8: 32, 64: 8}.items():  # the fewer terms, the more a start differs from others
        found = []
        for seed in range(seeds):
            keras.utils.set_random_seed(seed)
            keras_lora.apply_lora(model, rank=rank, head=None)
            model.compile(keras.optimizers.Adam(3e-5), "mse")
            model.train_on_batch(x, y)
            found.append(before - loss())
            keras_lora.remove_lora(model)
        falls[rank] = np.mean(found)
    assert min(falls.values()) > 0
    assert max(falls.values()) / min(falls.values()) < 1.05
