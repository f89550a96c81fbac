# %% [markdown]
# # Callbacks, and going on after an interruption
#
# `fit` takes Keras's callbacks on an adapted model as on any other. You stop early, keep the best model, save the adapter
# after each epoch, log to TensorBoard, and resume a `fit` that was interrupted. The resumed `fit` ends where an
# uninterrupted one does.
#
# The model and the sentences are those of [Classify text](text_classification.md), with fewer blocks of the encoder.
# `build_classifier` makes that model.

# %%
import os
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")  # or "tensorflow", "torch"

import keras
import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tutorial_data import build_classifier, load_sentences

import keras_lora

x, y = load_sentences()


def part(start, stop):
    return {name: each[start:stop] for name, each in x.items()}, y[start:stop]


train_size = 640  # quick: 8
test_size = 800  # quick: 8
train, validation = part(0, train_size), part(6000, 6000 + test_size // 2)
test = part(8000, 8000 + test_size)
blocks = 2  # quick: 1


def build_model():
    keras.utils.set_random_seed(0)
    return build_classifier(blocks=blocks, dropout=0.0)


def build_adapted():
    model = build_model()
    keras_lora.apply_lora(model, rank=8, train="head")
    model.compile(
        optimizer=keras.optimizers.Adam(2e-3),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


# %% [markdown]
# ## Fit with callbacks
#
# - `ModelCheckpoint` writes the whole model, and `keras_lora.callbacks.SaveAdapter` the adapter alone. They have the same
#   arguments.
# - `EarlyStopping` with `restore_best_weights=True` puts the weights of the best epoch back at the end.
# - `keras_lora.plots.LogAdapters` adds two numbers about the adapter to the logs of each epoch: how much of its rank it
#   uses, and how large its change is. Callbacks after it in the list get them too.
# - `CSVLogger` and `TensorBoard` write the logs. On every backend, Keras's `TensorBoard` needs TensorFlow and
#   `pip install tensorboard`. Without them, leave it out: the CSV file has the same numbers for each epoch.

# %%
model = build_adapted()
_, before = model.evaluate(*test, batch_size=100, verbose=0)
stop = keras.callbacks.EarlyStopping(
    "val_loss", patience=1, restore_best_weights=True
)
callbacks = [
    stop,
    keras.callbacks.ModelCheckpoint(
        "best.keras", monitor="val_loss", save_best_only=True
    ),
    keras_lora.callbacks.SaveAdapter("epoch_{epoch}.safetensors"),
    keras_lora.plots.LogAdapters(),
    keras.callbacks.CSVLogger("log.csv"),
    keras.callbacks.TensorBoard("logs"),
]
epochs = 5  # quick: 1
model.fit(
    *train,
    validation_data=validation,
    batch_size=32,
    epochs=epochs,
    verbose=2,
    callbacks=callbacks,
)
_, after = model.evaluate(*test, batch_size=100, verbose=0)
print(f"test accuracy: {before:.3f} before, {after:.3f} after")

# %% [markdown]
# `tensorboard --logdir logs` shows the curves in a browser. Here you read what both files have.

# %%
print(Path("log.csv").read_text().splitlines()[0])
events = EventAccumulator("logs/train").Reload()
print(sorted(events.Tags()["tensors"]))

# %% [markdown]
# The checkpoint loads as it is. An adapter loads into a fresh base. Both give the best epoch's outputs.

# %%
best = stop.best_epoch + 1
checkpoint, adapter = "best.keras", f"epoch_{best}.safetensors"
print(f"epoch {best} was best")
for path in (checkpoint, adapter):
    print(f"{path}: {os.path.getsize(path) / 1e6:.1f} MB")

expected = model.predict(test[0], batch_size=100, verbose=0)
whole = keras.saving.load_model(checkpoint)
fresh = build_model()
keras_lora.load_adapter(fresh, adapter)
from_files = [
    each.predict(test[0], batch_size=100, verbose=0) for each in (whole, fresh)
]
difference = max(float(np.abs(each - expected).max()) for each in from_files)
print(f"largest difference of an output: {difference:.1e}")

# %% [markdown]
# ## Interrupt and resume
#
# `BackupAndRestore` keeps the weights, the optimizer and the epoch. Here a callback interrupts the third epoch, as a
# machine that stops would. A new model with the same `fit` starts at that epoch.
#
# `shuffle=False` gives both runs the sentences in the same order. The encoder has no dropout here. With dropout, give each
# layer a seed: [Long runs](../long_runs.md) explains why.


# %%
class Interrupt(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == interrupted_epoch:
            raise KeyboardInterrupt


interrupted_epoch = 2  # quick: 1
few_epochs = 3  # quick: 2


def fit(model, *callbacks):
    return model.fit(
        *train,
        batch_size=32,
        epochs=few_epochs,
        shuffle=False,
        verbose=2,
        callbacks=callbacks,
    )


print("uninterrupted")
uninterrupted = build_adapted()
fit(uninterrupted)

print("interrupted")
try:
    fit(build_adapted(), keras.callbacks.BackupAndRestore("backup"), Interrupt())
except KeyboardInterrupt:
    print("resumed")
resumed = build_adapted()
history = fit(resumed, keras.callbacks.BackupAndRestore("backup"))

# %% [markdown]
# ## What was measured
#
# The largest difference is over all weights of the two models, the adapters and the head among them.

# %%
pairs = zip(uninterrupted.weights, resumed.weights, strict=True)
resumed_difference = max(
    float(
        np.abs(keras.ops.convert_to_numpy(a) - keras.ops.convert_to_numpy(b)).max()
    )
    for a, b in pairs
)
numbers = {
    "test accuracy before": before,
    "test accuracy after": after,
    "best epoch": best,
    "checkpoint, MB": os.path.getsize(checkpoint) / 1e6,
    "adapter, MB": os.path.getsize(adapter) / 1e6,
    "largest difference from files": difference,
    "epochs after the interruption": len(history.epoch),
    "largest difference after resuming": resumed_difference,
}
assert difference < 1e-4
assert history.epoch == [interrupted_epoch]
assert resumed_difference < 1e-5
assert 0.70 < after < 0.90  # quick: skip
