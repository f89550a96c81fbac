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


@pytest.mark.every_backend
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
    killed = subprocess.run([sys.executable, long_run.__file__, tmp_path, str(step)], env={**os.environ, "PYTHONPATH": path_of()})
    assert killed.returncode == -signal.SIGKILL
    continued_from_backup(tmp_path, uninterrupted)
    continued_from_batches(tmp_path, uninterrupted)
    continued_from_keras_file(tmp_path, uninterrupted)


def path_of():
    return os.pathsep.join([str(Path(keras_lora.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
