"""`ScaledUpdates` against two optimizers with two learning rates, and with everything an optimizer can be asked for."""

import re

import keras
import numpy as np
import pytest
from helpers import covering, difference, value
from keras import layers, optimizers

import keras_lora
from keras_lora.optimizers import ScaledUpdates

X = np.random.default_rng(0).normal(size=(24, 6)).astype("float32")
Y = np.random.default_rng(1).normal(size=(24, 3)).astype("float32")
FACTORS = {"lora_b": 16, "head": 0.25}


def net(**arguments):
    keras.utils.set_random_seed(3)
    stack = [layers.Dense(5, activation="tanh", name="hidden"), layers.Dense(3, name="head")]
    model = keras.Sequential([keras.Input((6,)), *stack], name="net")
    return keras_lora.apply_lora(model, keras_lora.LoRA(rank=2, alpha=2, seed=1, **arguments), train="head")


def fitted(model, optimizer, epochs=2, **compile_arguments):
    model.compile(optimizer, "mse", **compile_arguments)
    model.fit(X, Y, batch_size=8, epochs=epochs, shuffle=False, verbose=0)
    return [value(v) for v in model.trainable_variables]


def in_several(make, **arguments):
    """An optimizer for each role, each with its own learning rate: what `ScaledUpdates` has to equal."""
    rates = {".*lora_b": 16, ".*head/.*": 0.25}

    def with_rate(factor):
        optimizer = make(**arguments)
        rate = optimizer.get_config()["learning_rate"]
        if isinstance(rate, dict):
            rate["config"]["initial_learning_rate"] *= factor
        else:
            rate *= factor
        return type(optimizer).from_config({**optimizer.get_config(), "learning_rate": rate})

    by_role = optimizers.OptimizerMap(with_rate(1), {pattern: with_rate(each) for pattern, each in rates.items()})
    return optimizers.MultiOptimizer(by_role)


MAKE = {
    "adam": lambda **more: optimizers.Adam(1e-3, **more),
    "adamw": lambda **more: optimizers.AdamW(1e-3, weight_decay=0.1, **more),
    "sgd": lambda **more: optimizers.SGD(1e-3, momentum=0.9, nesterov=True, **more),
    "lion": lambda **more: optimizers.Lion(1e-4, **more),
    "rmsprop": lambda **more: optimizers.RMSprop(1e-4, **more),
    "adafactor": lambda **more: optimizers.Adafactor(1e-3, **more),
    "muon": lambda **more: optimizers.Muon(1e-3, **more),
    "schedule": lambda **more: optimizers.Adam(optimizers.schedules.CosineDecay(1e-3, 5), **more),
}


@pytest.mark.parametrize("name", covering(MAKE, ["adamw"]))
def test_it_equals_an_optimizer_for_each_role(name):
    expected = fitted(net(), in_several(MAKE[name]))
    found = fitted(net(), ScaledUpdates(MAKE[name](), FACTORS))
    assert difference(found, expected) < 2e-6
    if keras.backend.backend() == "torch":
        assert difference(fitted(net(), MAKE[name]()), expected) > 1e-4


OPTIONS = {
    "accumulation": {"gradient_accumulation_steps": 2},
    "clipvalue": {"clipvalue": 0.01},
    "clipnorm": {"clipnorm": 0.01},
    "ema": {"use_ema": True, "ema_momentum": 0.8},
    "ema_overwrite": {"use_ema": True, "ema_momentum": 0.8, "ema_overwrite_frequency": 2},
    "loss_scale": {"loss_scale_factor": 8.0},
}


@pytest.mark.parametrize("name", covering(OPTIONS, []))
def test_the_options_of_the_inner_optimizer_keep_their_meaning(name):
    own = OPTIONS[name]
    if name == "loss_scale":  # `MultiOptimizer` takes this one itself
        expected = fitted(net(), in_several(MAKE["adamw"]))
    else:
        expected = fitted(net(), in_several(MAKE["adamw"], **own))
    optimizer = ScaledUpdates(MAKE["adamw"](**own), FACTORS)
    assert optimizer.loss_scale_factor == own.get("loss_scale_factor")
    assert difference(fitted(net(), optimizer), expected) < 2e-6


@pytest.mark.torch_first
def test_clipping_by_the_global_norm_sees_all_roles():
    """Two optimizers would each clip their own part."""
    model = net()
    optimizer = ScaledUpdates(optimizers.SGD(1.0, global_clipnorm=1e-3), FACTORS)
    before = [value(v) for v in model.trainable_variables]
    model.compile(optimizer, "mse")
    model.train_on_batch(X, Y)
    steps = [(value(v) - old) / optimizer.factor_of(v) for v, old in zip(model.trainable_variables, before, strict=True)]
    assert np.sqrt(sum((step**2).sum() for step in steps)) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.torch_first
def test_a_constraint_is_for_the_scaled_value():
    def constrained(optimizer):
        keras.utils.set_random_seed(0)
        dense = layers.Dense(3, name="head", use_bias=False, kernel_constraint=keras.constraints.NonNeg())
        model = keras.Sequential([keras.Input((6,)), dense])
        dense.kernel.assign(np.abs(dense.kernel))
        return fitted(model, optimizer, epochs=1)

    expected = constrained(optimizers.SGD(0.5))
    assert (expected[0] == 0).any()
    assert difference(constrained(ScaledUpdates(optimizers.SGD(5.0), {"head": 0.1})), expected) < 1e-6


@pytest.mark.torch_first
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_lora_plus_is_a_larger_alpha(optimizer):
    """With Adam `alpha · λ`, with SGD `alpha · sqrt(λ)`, if B starts at zero."""

    def trained(alpha, factors):
        keras.utils.set_random_seed(3)
        model = keras.Sequential([keras.Input((6,)), layers.Dense(3, name="out")])
        keras_lora.apply_lora(model, keras_lora.LoRA(rank=2, alpha=alpha, seed=1), head=None)
        inner = optimizers.Adam(1e-3, epsilon=1e-30) if optimizer == "adam" else optimizers.SGD(0.01)
        fitted(model, ScaledUpdates(inner, factors), epochs=3)
        layer = model.get_layer("out")
        return value(layer.adapter.delta_kernel(layer.linear_map.matrix))

    plus, larger = trained(2, {"lora_b": 16}), trained(2 * (16 if optimizer == "adam" else 4), {"lora_b": 1})
    assert np.abs(plus).max() > 1e-3
    assert np.abs(plus - larger).max() / np.abs(plus).max() < 1e-4
    assert np.abs(trained(2, {"lora_b": 1}) - plus).max() / np.abs(plus).max() > 0.3


@pytest.mark.torch_first
@pytest.mark.parametrize("jit_compile", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_a_saved_model_resumes(jit_compile, tmp_path):
    if jit_compile and keras.backend.backend() == "torch":
        pytest.skip("torch.compile of a whole step takes minutes here")
    optimizer = ScaledUpdates(optimizers.Adam(1e-2, use_ema=True), {re.compile(".*/lora_b"): 16, "head": 0.25})
    model = net()
    model.compile(ScaledUpdates.from_config(optimizer.get_config()), "mse", jit_compile=jit_compile)
    for epoch in range(2):
        model.fit(X, Y, batch_size=8, epochs=1, shuffle=False, verbose=0)
        if epoch == 0:  # the average is written into the variables at the end of a fit
            model.save(tmp_path / "model.keras")
            first = [value(v) for v in model.optimizer.variables]
            model = keras.saving.load_model(tmp_path / "model.keras")
            assert difference([value(v) for v in model.optimizer.variables], first) == 0
            assert model.optimizer.use_ema
    factors = [model.optimizer.factor_of(v) for v in model.trainable_variables]
    assert factors == [1, 16, 0.25, 0.25]
    twice = net()
    twice.compile(ScaledUpdates.from_config(optimizer.get_config()), "mse")
    for _ in range(2):
        twice.fit(X, Y, batch_size=8, epochs=1, shuffle=False, verbose=0)
    assert difference([value(v) for v in model.trainable_variables], [value(v) for v in twice.trainable_variables]) < 1e-6


@pytest.mark.full
@pytest.mark.torch_first
def test_backup_and_restore_goes_on(tmp_path):
    def fit(model, epochs, stop=None):
        model.compile(ScaledUpdates(optimizers.Adam(1e-2), FACTORS), "mse")
        stopping = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: 1 / (epoch != stop))
        backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
        try:
            model.fit(X, Y, batch_size=8, epochs=epochs, shuffle=False, verbose=0, callbacks=[backup, stopping])
        except ZeroDivisionError:
            return None
        return [value(v) for v in model.trainable_variables]

    expected = fitted(net(), ScaledUpdates(optimizers.Adam(1e-2), FACTORS), epochs=4)
    assert fit(net(), 4, stop=2) is None
    assert difference(fit(net(), 4), expected) < 1e-6


@pytest.mark.full
@pytest.mark.torch_first
def test_dynamic_loss_scaling_is_outside():
    optimizer = optimizers.LossScaleOptimizer(ScaledUpdates(optimizers.Adam(1e-3), FACTORS), initial_scale=2.0**10)
    expected = fitted(net(), in_several(MAKE["adam"]))
    assert difference(fitted(net(), optimizer), expected) < 2e-6
    keras.config.set_dtype_policy("mixed_float16")
    model = net()
    model.compile(ScaledUpdates(optimizers.Adam(1e-3), FACTORS), "mse")
    assert isinstance(model.optimizer, optimizers.LossScaleOptimizer)
    before = [value(v) for v in model.trainable_variables]
    model.fit(X, Y, batch_size=8, verbose=0)
    assert all(np.abs(value(v) - old).max() > 0 for v, old in zip(model.trainable_variables, before, strict=True))
    with pytest.raises(ValueError, match="which has to be outside"):
        ScaledUpdates(optimizers.LossScaleOptimizer(optimizers.Adam()), FACTORS)


@pytest.mark.torch_first
def test_callbacks_read_and_write_the_learning_rate():
    optimizer = ScaledUpdates(optimizers.Adam(1e-3), FACTORS)
    model = net()
    model.compile(optimizer, "mse")
    scheduler = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2)
    model.fit(X, Y, verbose=0, callbacks=[scheduler, keras.callbacks.SwapEMAWeights()] if optimizer.use_ema else [scheduler])
    assert float(optimizer.inner.learning_rate) == pytest.approx(5e-4)
    assert int(optimizer.iterations) == 1
    averaged = ScaledUpdates(optimizers.Adam(1e-3, use_ema=True), FACTORS)
    model.compile(averaged, "mse")
    model.fit(X, Y, verbose=0, callbacks=[keras.callbacks.SwapEMAWeights()], validation_data=(X, Y))


@pytest.mark.once
def test_patterns_that_match_nothing_are_refused():
    model = net()
    with pytest.raises(ValueError, match=r"factors='lora_bb' matches no variable.*\['lora_b'"):
        ScaledUpdates("adam", {"lora_bb": 16}, model=model)
    model.compile(ScaledUpdates("adam", {"lora_b": 16, "heads": 2, re.compile("bias"): 3}), "mse")
    with pytest.raises(ValueError, match=r"(?s)'heads' matches.*'head'.*'bias' matches no"):
        model.fit(X, Y, verbose=0)
    for wrong in (0, -1, float("nan"), "2"):
        with pytest.raises(ValueError, match="positive finite number"):
            ScaledUpdates("adam", {"lora_b": wrong})
    with pytest.raises(TypeError, match="must be a name, a path"):
        ScaledUpdates("adam", {layers.Dense: 2})


@pytest.mark.once
def test_the_first_pattern_wins_and_head_is_a_word():
    keras.utils.set_random_seed(3)
    stack = [layers.Dense(5, name="hidden"), layers.LayerNormalization(), layers.Dense(3, name="predictions")]
    model = keras_lora.apply_lora(keras.Sequential([keras.Input((6,)), *stack]), rank=2, train="head", bias="all")
    optimizer = ScaledUpdates("adam", {"head": 4, "hidden/*/lora_b": 8, "bias": 2, "lora_b": 3}, model=model)
    seen = {v.path.split("/", 1)[-1]: optimizer.factor_of(v) for v in model.trainable_variables}
    assert seen == {"bias": 4, "kernel": 4, "lora/lora_a": 1, "lora/lora_b": 8} or set(seen.values()) == {4, 8, 1, 2}
    model.compile(optimizer, "mse")
    model.fit(X, Y, verbose=0)
    again = ScaledUpdates.from_config(optimizer.get_config())
    again.build(model.trainable_variables)
    assert [again.factor_of(v) for v in model.trainable_variables] == [
        optimizer.factor_of(v) for v in model.trainable_variables
    ]
