"""A training that can be killed and continued: for `test_resume.py`, which also starts it as a process.

    python tests/long_run.py FOLDER STEP     # kills itself at this step
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import keras
import numpy as np
from keras import layers

import keras_lora
from keras_lora.compat import keras_internals

EPOCHS, STEPS, BATCH, EVERY = 4, 5, 4, 2
_rng = np.random.default_rng(0)
X, Y = (_rng.normal(size=(STEPS * BATCH, n)).astype("float32") for n in (8, 2))


def made(mesh: bool = False) -> keras.Model:
    """The model as each process makes it, with everything that has a state."""
    keras.utils.set_random_seed(0)
    x = keras.Input((8,))
    y = layers.Dropout(0.3, seed=1)(layers.Dense(16, activation="gelu", name="a")(x))
    y = keras.Sequential([layers.Dense(16, name="b"), layers.Dropout(0.2, seed=2)], name="inner")(y)
    model = keras.Model(x, layers.Dense(2, name="head")(y), name="long_run")
    keras_lora.apply_lora(model, keras_lora.LoRA(rank=2, dropout=0.2, seed=3), train="head")
    adam = keras.optimizers.Adam(0.01)
    scaled = keras.optimizers.LossScaleOptimizer(adam, initial_scale=8.0, dynamic_growth_steps=3)
    model.compile(adam if mesh else scaled, "mse")
    return model


class Losses(keras.callbacks.Callback):
    """The loss of each epoch, and the death of the process at a step."""

    def __init__(self, killed_at: int | None = None):
        super().__init__()
        self.losses: list[float] = []
        self.killed_at, self.step = killed_at, 0

    def on_train_batch_begin(self, batch, logs=None):
        if self.step == self.killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.step += 1

    def on_epoch_end(self, epoch, logs=None):
        self.losses.append(logs["loss"])


def run(model: keras.Model, callbacks: list[keras.callbacks.Callback], first: int = 0, **options: int) -> list[float]:
    """Train from the batch `first` of an epoch on. Returns the losses of the epochs."""
    losses = next((each for each in callbacks if isinstance(each, Losses)), Losses())
    data = X[first * BATCH :], Y[first * BATCH :]
    model.fit(*data, batch_size=BATCH, shuffle=False, verbose=0, callbacks=[*callbacks, losses], **{"epochs": EPOCHS, **options})
    return losses.losses


def savers(folder: Path, every: int | str = "epoch") -> list[keras.callbacks.Callback]:
    """What saves a training, after each epoch or every so many batches."""
    return [keras.callbacks.BackupAndRestore(folder / f"backup_{every}", save_freq=every, delete_checkpoint=False)]


if __name__ == "__main__":
    folder, step = Path(sys.argv[1]), int(sys.argv[2])
    checkpoint = keras.callbacks.ModelCheckpoint(folder / "run.keras", save_freq=EVERY)
    with keras_internals.without_tensorflow():  # Keras imports it to write a config, which takes seconds
        run(made(), [*savers(folder), *savers(folder, EVERY), checkpoint, Losses(step)])
