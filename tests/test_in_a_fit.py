"""What users do inside a `fit` or beside one: the base as a reference, a switch between batches, models compiled before."""

import keras
import numpy as np
import pytest
from helpers import difference, outputs, perturb, value
from keras import layers, ops

import keras_lora

X = np.random.default_rng(0).normal(size=(12, 8)).astype("float32")
Y = np.random.default_rng(1).normal(size=(12, 3)).astype("float32")
BACKEND = keras.backend.backend()


def net(method=None):
    keras.utils.set_random_seed(3)
    model = keras.Sequential([keras.Input((8,)), layers.Dense(6, activation="relu"), layers.Dense(3), layers.Dense(3)])
    if method is not None:
        keras_lora.apply_lora(model, method, rank=2)
    return model


class Policy(keras.Model):
    """A model that also learns to stay close to a reference, as in DPO, GRPO or a KL penalty."""

    def __init__(self, net, reference):
        super().__init__()
        self.net, self.reference = net, reference

    def call(self, x):
        return self.net(x)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return ops.mean(ops.square(y_pred - y)) + ops.mean(ops.square(y_pred - self.reference(x)))


@pytest.mark.parametrize(
    "how", [{}, pytest.param({"run_eagerly": True}, marks=pytest.mark.torch_first)], ids=["compiled", "eagerly"]
)
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_base_as_a_reference_inside_a_step_is_a_copy_of_the_base(method, how):
    def disabled(x):
        with keras_lora.disable_adapters(model):
            with keras_lora.disable_adapters(model):
                pass
            reference = model(x)
        assert not any(layer.adapter.off for layer in model.layers[:2])
        return reference

    base, model = net(), net(method)
    alone = outputs(base, X)
    base.trainable = False
    fits = []
    for each, reference in ((model, disabled), (net(method), base)):
        policy = Policy(each, reference)
        policy.build(X.shape)
        policy.compile(keras.optimizers.SGD(0.005), **how)
        fits.append((policy.fit(X, Y, batch_size=4, epochs=2, shuffle=False, verbose=0).history["loss"], outputs(each, X)))
    np.testing.assert_allclose(*(losses for losses, _ in fits), rtol=1e-5)
    (_, after), (_, expected) = fits
    assert difference(after, expected) < 1e-5
    assert difference(after, alone) > 1e-3, "nothing was trained"
    with keras_lora.disable_adapters(model):
        assert keras_lora.active_adapters(model) == {}
        assert difference(outputs(model, X), alone) == 0
    assert difference(outputs(model, X), after) == 0


def test_an_error_inside_a_step_switches_the_adapters_on_again():
    model = net("lora")
    with pytest.raises(RuntimeError, match="mine"), keras_lora.disable_adapters(model):
        raise RuntimeError("mine")
    assert keras_lora.active_adapters(model) == {"default": 1.0}


class Do(keras.callbacks.Callback):
    """Calls a function after the first batch of the first epoch."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def on_train_batch_end(self, batch, logs=None):
        if self.function is not None:
            self.function()
            self.function = None


def two_adapters():
    model = net()
    for seed, name in enumerate(("a", "b")):
        keras_lora.apply_lora(model, rank=1, name=name)
        perturb(model, seed=seed)
    model.compile(keras.optimizers.SGD(0.0), "mse")  # nothing moves, so the second batch shows what is active
    return model


@pytest.mark.parametrize("what", ["activate", "load"])
def test_a_switch_between_two_batches_of_a_fit_acts_on_the_next(what, tmp_path):
    model = two_adapters()
    keras_lora.save_adapter(keras_lora.activate_adapters(model, "a"), tmp_path / "a.safetensors", name="a")
    of_a = model.evaluate(X, Y, verbose=0)
    of_b = keras_lora.activate_adapters(model, "b").evaluate(X, Y, verbose=0)

    def switch():
        if what == "activate":
            keras_lora.activate_adapters(model, "a")
        else:
            keras_lora.load_adapter(model, tmp_path / "a.safetensors", name="b")

    x, y = np.concatenate([X, X]), np.concatenate([Y, Y])
    history = model.fit(x, y, batch_size=12, shuffle=False, verbose=0, callbacks=[Do(switch)]).history["loss"]
    assert of_a != pytest.approx(of_b, rel=1e-2)
    assert history[0] == pytest.approx((of_a + of_b) / 2, rel=1e-5)
    assert model.evaluate(X, Y, verbose=0) == pytest.approx(of_a, rel=1e-5)


def test_an_adapter_saved_between_two_batches_has_the_numbers_of_then(tmp_path):
    model = two_adapters()
    model.compile(keras.optimizers.SGD(0.1), "mse")
    before = value(model.layers[0].adapter_2.lora_a)
    save = Do(lambda: keras_lora.save_adapter(model, tmp_path / "b.safetensors", name="b"))
    model.fit(X, Y, batch_size=6, verbose=0, callbacks=[save])
    now = value(keras_lora.load_adapter(net(), tmp_path / "b.safetensors").layers[0].adapter.lora_a)
    assert np.abs(now - before).max() > 0
    assert np.abs(now - value(model.layers[0].adapter_2.lora_a)).max() > 0


@pytest.mark.skipif(BACKEND != "jax", reason="the others write to the variables of a part at once")
def test_a_part_of_the_model_that_trains_is_refused_on_jax():
    model = two_adapters()
    outer = keras.Sequential([keras.Input((8,)), model])
    outer.compile("sgd", "mse")
    part = Do(lambda: keras_lora.activate_adapters(model, "a"))
    with pytest.raises(ValueError, match="in use by the `fit` of a model around it"):
        outer.fit(X, Y, verbose=0, callbacks=[part])


@pytest.mark.parametrize("change", ["apply", "load", "merge", "remove"])
def test_a_model_compiled_before_asks_for_compile(change, tmp_path):
    model = net()
    if change != "apply":
        keras_lora.save_adapter(keras_lora.apply_lora(model, rank=1), tmp_path / "a.safetensors")
    if change == "load":
        keras_lora.remove_lora(model)
    model.compile("sgd", "mse", metrics=["mae"])
    model.evaluate(X, Y, verbose=0)
    {
        "apply": keras_lora.apply_lora,
        "load": lambda model: keras_lora.load_adapter(model, tmp_path / "a.safetensors"),
        "merge": keras_lora.merge_lora,
        "remove": keras_lora.remove_lora,
    }[change](model)
    for call in (model.fit, model.evaluate, model.train_on_batch, model.test_on_batch):
        with pytest.raises(ValueError, match=r"[Cc]all `compile\(\)`"):
            call(X, Y)
    model.compile("sgd", "mse", metrics=["mae"])
    assert len(model.evaluate(X, Y, verbose=0)) == 2


@pytest.mark.parametrize("change", [keras_lora.merge_lora, keras_lora.remove_lora])
def test_a_model_outside_that_was_compiled_before_is_right_after_it(change):
    model = net("dora")
    perturb(model)
    outer = keras.Sequential([keras.Input((8,)), model])
    merged = change is keras_lora.merge_lora
    expected = outputs(outer, X) if merged else outputs(net(), X)
    outputs(outer, X)  # traces it
    change(model)
    assert difference(outputs(outer, X), expected) < 1e-5


@pytest.mark.skipif(BACKEND != "torch", reason="JAX draws the same numbers again; on TensorFlow Keras's RematScope fails")
def test_dropout_in_a_remat_scope_is_warned_of_on_torch():
    with keras.RematScope("full"):
        model = keras_lora.apply_lora(net(), keras_lora.LoRA(2, dropout=0.5))
    model.compile("sgd", "mse")
    with pytest.warns(UserWarning, match="Dropout inside a `RematScope` gives wrong gradients on PyTorch"):
        model.fit(X, Y, verbose=0)
    model.predict(X, verbose=0)
