"""A training that can be killed and continued: for `test_resume.py`, which also starts it as a process.

python tests/long_run.py FOLDER STEP     # kills itself at this step
"""

from __future__ import annotations

import json
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


def made() -> keras.Model:
    """The model as each process makes it, with everything that has a state."""
    keras.utils.set_random_seed(0)
    x = keras.Input((8,))
    y = layers.Dropout(0.3, seed=1)(layers.Dense(16, activation="gelu", name="a")(x))
    y = keras.Sequential([layers.Dense(16, name="b"), layers.Dropout(0.2, seed=2)], name="inner")(y)
    model = keras.Model(x, layers.Dense(2, name="head")(y), name="long_run")
    keras_lora.apply_lora(model, keras_lora.LoRA(rank=2, dropout=0.2, seed=3), train="head")
    adam = keras.optimizers.Adam(0.01)
    model.compile(keras.optimizers.LossScaleOptimizer(adam, initial_scale=8.0, dynamic_growth_steps=3), "mse")
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
    if (losses := next((each for each in callbacks if isinstance(each, Losses)), None)) is None:
        callbacks = [*callbacks, losses := Losses()]
    data = X[first * BATCH :], Y[first * BATCH :]
    model.fit(*data, batch_size=BATCH, shuffle=False, verbose=0, callbacks=callbacks, **{"epochs": EPOCHS, **options})
    return losses.losses


def savers(folder: Path, every: int | str = "epoch") -> list[keras.callbacks.Callback]:
    """What saves a training, after each epoch or every so many batches."""
    return [keras.callbacks.BackupAndRestore(folder / f"backup_{every}", save_freq=every, delete_checkpoint=False)]


def main(folder: Path, step: int, where: str = "") -> None:
    """Train until the end, or until the process kills itself. With `where="mesh"`, on all simulated devices."""
    if where == "mesh":
        devices = keras.distribution.list_devices()
        mesh = keras.distribution.DeviceMesh((2, len(devices) // 2), ["batch", "model"], devices)
        layout = keras.distribution.LayoutMap(mesh)
        layout[".*(a|b)/kernel"] = (None, "model")
        keras.distribution.set_distribution(keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch"))
    checkpoint = keras.callbacks.ModelCheckpoint(folder / "run.keras", save_freq=EVERY)
    model = made()
    losses = run(model, [*savers(folder), *([] if where else [*savers(folder, EVERY), checkpoint]), Losses(step)])
    keras_lora.save_adapter(model, folder / "final.safetensors")
    (folder / "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    with keras_internals.without_tensorflow():  # Keras imports it to write a config, which takes seconds
        main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
