"""A training that is killed and continued ends as one that was not: losses and bytes."""

import json
import os
import random
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import keras
import long_run
import numpy as np
import pytest
from helpers import once, value
from keras import layers
from long_run import EPOCHS, EVERY, STEPS, made, run, savers

import keras_lora
from keras_lora.swap import training_state

pytestmark = pytest.mark.torch_first


def adapter_bytes(model, folder):
    keras_lora.save_adapter(model, folder / "a.safetensors")
    return (folder / "a.safetensors").read_bytes()


def state_of(model):
    return [value(v) for v in [*model.variables, *model.optimizer.variables]]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    model = made()
    return run(model, []), adapter_bytes(model, tmp_path_factory.mktemp("whole"))


class Stop(keras.callbacks.Callback):
    """Ends a training as an error does."""

    def __init__(self, step):
        super().__init__()
        self.left = step

    def on_train_batch_begin(self, batch, logs=None):
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1


def saved_by(callbacks, folder, step):
    with pytest.raises(KeyboardInterrupt):
        run(made(), [*callbacks, Stop(step)])


def continued_from_backup(folder, whole):
    """Continue from the backup after the last epoch, and compare."""
    losses, expected = whole
    model = made()
    done = json.loads((folder / "backup_epoch" / "training_metadata.json").read_text())["epoch"]
    assert run(model, savers(folder)) == losses[done:]
    assert adapter_bytes(model, folder) == expected


def continued_from_batches(folder, whole):
    """Continue from the backup after some batches: the rest of that epoch, then the other epochs."""
    saved = json.loads((folder / f"backup_{EVERY}" / "training_metadata.json").read_text())
    model, epoch, first = made(), saved["epoch"], saved["batch"] + 1
    rest = [] if first == STEPS else run(model, savers(folder, EVERY), first, epochs=epoch + 1)
    if rest:
        assert int(model.optimizer.iterations) == (epoch + 1) * STEPS
    losses = run(model, [] if rest else savers(folder, EVERY), epochs=EPOCHS - 1)  # Keras starts at the epoch restored last
    assert losses == whole[0][epoch + 1 :]
    assert adapter_bytes(model, folder) == whole[1]


def continued_from_keras_file(folder, whole):
    """Load the whole model, which knows the step."""
    model = keras.saving.load_model(folder / "run.keras")
    done = int(model.optimizer.iterations)
    assert done % EVERY == 0
    epoch, first = divmod(done, STEPS)
    run(model, [], first, initial_epoch=epoch, epochs=epoch + 1)
    assert run(model, [], initial_epoch=epoch + 1) == whole[0][epoch + 1 :]
    assert adapter_bytes(model, folder) == whole[1]


@pytest.mark.nightly
def test_a_stopped_run_ends_as_if_it_was_not(tmp_path, uninterrupted):
    checkpoint = keras.callbacks.ModelCheckpoint(tmp_path / "run.keras", save_freq=EVERY)
    saved_by([*savers(tmp_path), checkpoint], tmp_path, 2 * STEPS + 3)
    continued_from_backup(tmp_path, uninterrupted)
    continued_from_keras_file(tmp_path, uninterrupted)


@pytest.mark.full
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system kills in another way")
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.nightly) for seed in range(1, 4))])
def test_a_run_killed_at_a_random_step_ends_as_if_it_was_not(tmp_path, uninterrupted, seed):
    step = random.Random(seed).randrange(STEPS, EPOCHS * STEPS)
    killed = subprocess.run(
        [sys.executable, long_run.__file__, tmp_path, str(step)], env={**os.environ, "PYTHONPATH": path_of()}
    )
    assert killed.returncode == -signal.SIGKILL
    continued_from_backup(tmp_path, uninterrupted)
    continued_from_batches(tmp_path, uninterrupted)
    continued_from_keras_file(tmp_path, uninterrupted)


def trained(optimizer, epochs=1, seed=7, adapter_seed=7, policy="float32"):
    """A small model with dropout after some steps; made the same way every time."""
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(policy)
    model = keras.Sequential(
        [keras.Input((8,)), layers.Dense(8, name="a"), layers.Dropout(0.5, seed=seed), layers.Dense(2, name="head")],
        name="net",
    )
    keras_lora.apply_lora(model, keras_lora.LoRA(rank=2, dropout=0.3, seed=adapter_seed), train="head")
    model.compile(optimizer(), "mse")
    if epochs:
        run(model, [], epochs=epochs)
    return model


def adam(**options):
    return lambda: keras.optimizers.Adam(0.01, **options)


OPTIMIZERS = {
    "ema": adam(use_ema=True),
    "in_the_middle_of_an_accumulation": adam(gradient_accumulation_steps=3),  # 5 steps an epoch
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(adam()(), initial_scale=8.0, dynamic_growth_steps=3),
    "scheduled": lambda: keras.optimizers.Adam(keras.optimizers.schedules.ExponentialDecay(0.01, 3, 0.5)),
    "scaled_by_keras": adam(),
}


@pytest.mark.parametrize(
    "name",
    [
        *(pytest.param(name, marks=pytest.mark.full) for name in list(OPTIMIZERS)[:-1]),
        pytest.param("scaled_by_keras", marks=pytest.mark.every_backend),
    ],
)
def test_a_keras_file_has_the_state_of_every_optimizer(tmp_path, name):
    if name == "ema" and keras.backend.backend() == "jax":
        pytest.skip("the `fit` of plain Keras fails on JAX with EMA after a first one")
    model = trained(OPTIMIZERS[name], policy="mixed_float16" if name == "scaled_by_keras" else "float32")
    model.save(tmp_path / "m.keras")
    keras.config.set_dtype_policy("float32")  # as in a new process
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert type(loaded.optimizer) is type(model.optimizer)
    assert all(map(np.array_equal, state_of(loaded), state_of(model)))
    assert run(loaded, [], epochs=2) == run(model, [], epochs=2)
    assert all(map(np.array_equal, state_of(loaded), state_of(model)))


def test_a_weights_file_has_the_random_states_of_layers_in_layers(tmp_path):
    def built():
        x = keras.Input((5, 8))
        y = layers.MultiHeadAttention(2, 4, dropout=0.3, seed=1)(x, x)
        y = layers.Bidirectional(layers.LSTM(4, dropout=0.3, seed=2, return_sequences=True))(y)
        y = keras.Sequential([layers.GaussianNoise(0.1, seed=3), keras.Sequential([layers.Dropout(0.1, seed=4)])])(y)
        model = keras.Model(x, layers.Dense(2)(y))
        return keras_lora.apply_lora(model, keras_lora.DoRA(rank=1, dropout=0.1, seed=5), exclude="lstm_cell")

    states = lambda model: {v.path: v for v in model.variables if v.path.endswith("seed_generator_state")}  # noqa: E731
    model, other = built(), built()
    assert len(states(model)) > 6
    for number, variable in enumerate(states(model).values()):
        variable.assign([number, 100 + number])
    model.save_weights(tmp_path / "m.weights.h5")
    other.load_weights(tmp_path / "m.weights.h5")
    assert [value(v).tolist() for v in states(other).values()] == [value(v).tolist() for v in states(model).values()]


@once
def test_a_file_without_random_states_loads_and_leaves_them(tmp_path, monkeypatch):
    model = trained(adam())
    with monkeypatch.context() as patch:
        patch.setattr(training_state, "_generators_of", lambda container: [])  # as files were before
        model.save(tmp_path / "old.keras")
        model.save_weights(tmp_path / "old.weights.h5")
    loaded = keras.saving.load_model(tmp_path / "old.keras")
    assert value(loaded.layers[1].seed_generator.state).tolist() == [7, 0]
    before = value(model.layers[1].seed_generator.state).tolist()
    model.load_weights(tmp_path / "old.weights.h5")
    assert value(model.layers[1].seed_generator.state).tolist() == before


@once
@pytest.mark.parametrize(
    "stored",
    [
        np.zeros((3, 2), "int64"),
        np.zeros((1, 2), "float32"),
        np.zeros(2, "int64"),
        np.array([[b"a", b"b"]]),
        np.zeros((0, 2), int),
    ],
    ids=str,
)
def test_random_states_that_do_not_fit_are_named_and_change_nothing(stored):
    model = trained(adam(), epochs=0)
    before = state_of(model)
    with pytest.warns(UserWarning, match=r"random states in this file do not fit"):
        rest = training_state.load_from(model, {"other": 1, training_state._STORED: stored})
    assert rest == {"other": 1}
    assert all(map(np.array_equal, state_of(model), before))


@once
def test_dropout_without_a_seed_is_named_once_if_other_dropout_has_one(tmp_path):
    model = trained(adam(), epochs=0, seed=None)
    with pytest.warns(UserWarning, match=r"random state of 1 layers without a seed, such as 'dropout.*torch's own"):
        model.save(tmp_path / "m.keras")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.save(tmp_path / "m.keras")
        trained(adam(), epochs=0).save_weights(tmp_path / "m.weights.h5")
        trained(adam(), epochs=0, seed=None, adapter_seed=None).save(tmp_path / "m.keras")


@once
@pytest.mark.parametrize("name", ["m.keras", "m.weights.h5", "m.h5"])
def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch, name):
    model = trained(adam(), epochs=0)
    save = model.save_weights if "weights" in name else model.save
    save(tmp_path / name)
    old = (tmp_path / name).read_bytes()

    def fail(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=r"disk is full"):
        save(tmp_path / name)
    assert [each.name for each in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() == old


@once
def test_a_state_that_lacks_variables_is_refused_and_a_head_in_it_stays(tmp_path):
    keras.utils.clear_session()
    model = trained(adam())
    tree = model.get_state_tree(value_format="numpy_array")
    tree = {kind: tree[kind] for kind in ("trainable_variables", "non_trainable_variables")}
    for key in [key for key in tree["non_trainable_variables"] if key.startswith("seed_generator")]:
        tree["non_trainable_variables"][f"{key}0"] = tree["non_trainable_variables"].pop(key)
    keras.utils.clear_session()  # the names of a new process
    other = trained(adam(), epochs=0)
    with pytest.warns(UserWarning, match=r"random states of 2 layers"):
        other.set_state_tree(tree)
    keras_lora.save_adapter(other, tmp_path / "a.safetensors")  # which shows and stores what trains beside the adapter
    expected = [value(v) for v in model.trainable_variables]
    assert all(map(np.array_equal, [value(v) for v in other.trainable_variables], expected))
    del tree["trainable_variables"]["net"]["head"]
    with pytest.raises(ValueError, match=r"lacks 2 of its variables.* 'net/head/bias', 'net/head/kernel'. .*`load_weights`"):
        other.set_state_tree(tree)


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore:Sharding info not provided")  # Orbax, whenever Keras restores
def test_an_orbax_checkpoint_restores_a_training(tmp_path, uninterrupted):
    pytest.importorskip("orbax.checkpoint")
    checkpoints = keras.callbacks.OrbaxCheckpoint(str(tmp_path / "orbax"), save_on_background=False)
    keras.utils.clear_session()
    with pytest.raises(KeyboardInterrupt):
        run(made(), [checkpoints, Stop(2 * STEPS + 3)])
    keras.utils.clear_session()  # the names of a new process
    model = made()
    model.load_weights(str(tmp_path / "orbax"))
    assert run(model, [], initial_epoch=2) == uninterrupted[0][2:]
    assert adapter_bytes(model, tmp_path) == uninterrupted[1]
    with pytest.raises(ValueError, match=r"lacks .* of its variables.*'b/kernel'.*and call `load_weights`"):
        keras.saving.load_model(str(tmp_path / "orbax"))  # plain Keras leaves the inner model at its start


@pytest.mark.nightly
@pytest.mark.skipif(keras.backend.backend() != "jax", reason="only JAX has the mesh")
def test_a_run_killed_on_a_mesh_ends_as_if_it_was_not(tmp_path):
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "PYTHONPATH": path_of()}
    for name, step in {"whole": -1, "killed": 2 * STEPS + 3, "resumed": -1}.items():
        folder = tmp_path / ("whole" if name == "whole" else "killed")
        folder.mkdir(exist_ok=True)
        command = [sys.executable, long_run.__file__, folder, str(step), "mesh"]
        code = subprocess.run(command, env={**os.environ, **flags}).returncode
        assert code == (-signal.SIGKILL if name == "killed" else 0)
    files = [(tmp_path / folder / "final.safetensors").read_bytes() for folder in ("whole", "killed")]
    assert files[0] == files[1]
    losses = [json.loads((tmp_path / folder / "losses.json").read_text()) for folder in ("whole", "killed")]
    assert len(losses[1]) == EPOCHS - 2
    assert losses[1] == losses[0][2:]


def path_of():
    return os.pathsep.join([str(Path(keras_lora.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
