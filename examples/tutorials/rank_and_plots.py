# %% [markdown]
# # Is my rank too high?
#
# You train an adapter of rank 16, watch how many directions its changes use, and cut it to lower ranks after training.
#
# The model and the sentences are those of [Classify text](text_classification.md), with fewer blocks of the encoder.
# `build_classifier` makes that model. The plots need `pip install matplotlib`.

# %%
import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # or "tensorflow", "torch"

import keras
import numpy as np
from tutorial_data import build_classifier, load_sentences

import keras_lora
from keras_lora import plots

x, y = load_sentences()
x = {name: each[:, :24] for name, each in x.items()}  # the first 24 tokens


def part(start, stop):
    return {name: each[start:stop] for name, each in x.items()}, y[start:stop]


train_size = 640  # quick: 8
test_size = 800  # quick: 8
train, validation = part(0, train_size), part(6000, 6000 + test_size // 2)
test = part(8000, 8000 + test_size)

# %% [markdown]
# ## Train, and log the ranks
#
# `LogAdapters` adds two numbers to the logs of each epoch: the effective rank of the adapter's changes and their size beside
# the kernels. `History` has them, and so have callbacks that come after it, such as `TensorBoard` or `CSVLogger`.

# %%
blocks = 2  # quick: 1
epochs = 2  # quick: 1
keras.utils.set_random_seed(0)
model = build_classifier(blocks=blocks, dropout=0.0)
keras_lora.apply_lora(model, rank=16, train="head")


def compile_model():
    model.compile(
        optimizer=keras.optimizers.Adam(2e-3),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )


def accuracy(data):
    return model.evaluate(*data, batch_size=100, verbose=0)[1]


compile_model()
before = accuracy(test)
callbacks = [plots.LogAdapters(), keras.callbacks.CSVLogger("log.csv")]
history = model.fit(
    *train, batch_size=32, epochs=epochs, verbose=0, callbacks=callbacks
).history
for epoch in range(epochs):
    print({name: round(values[epoch], 3) for name, values in history.items()})

# %% [markdown]
# ## Measure and plot
#
# The effective rank counts the directions of a change by their size; `compressed_rank` is the smallest rank that keeps 0.9
# of its energy, the sum of the squared singular values. [Plots](../plots.md) explains both, and shows such pictures.

# %%
rows = plots.measure_adapters(model)
for row in rows:
    print(
        f"effective {row.effective_rank:4.1f}, "
        f"compressed {row.compressed_rank:2}: {row.layer}"
    )
plots.plot_ranks(model).savefig("ranks.svg")
plots.plot_changes(model).savefig("changes.svg")

# %% [markdown]
# ## Cut the adapter
#
# `compress_adapter` replaces the adapter by its best approximation of a lower rank. It changes the outputs, so evaluate the
# model after it. Here the first cut keeps 0.9 of the energy of each change, and the second cut leaves rank 1.

# %%
accuracies: list = []
sizes: list = []


def measure(label):
    compile_model()
    keras_lora.save_adapter(model, f"{label}.safetensors")
    accuracies.append(accuracy(test))
    sizes.append(os.path.getsize(f"{label}.safetensors") / 1e6)
    print(
        f"{label}: validation accuracy {accuracy(validation):.3f}, "
        f"file {sizes[-1]:.2f} MB"
    )


measure("rank 16")
keras_lora.compress_adapter(model, energy=0.9)
measure("0.9 of the energy")
keras_lora.compress_adapter(model, rank=1)
measure("rank 1")

# %% [markdown]
# ## What was measured
#
# The cut adapters are nearly as accurate as the whole one, so rank 16 is more than this adapter needs. The effective rank
# alone does not show that: it is far above 1, and yet rank 1 is nearly enough. Evaluate a cut before you rely on it.

# %%
numbers = {
    "test accuracy before training": before,
    "test accuracy after, rank 16": accuracies[0],
    "test accuracy after, 0.9 of the energy": accuracies[1],
    "test accuracy after, cut to rank 1": accuracies[2],
    "effective rank, mean": float(np.mean([row.effective_rank for row in rows])),
    "rank that keeps 0.9, mean": float(
        np.mean([row.compressed_rank for row in rows])
    ),
    "relative change, mean": float(np.mean([row.relative_change for row in rows])),
    "file, rank 16, MB": sizes[0],
    "file, 0.9 of the energy, MB": sizes[1],
    "file, rank 1, MB": sizes[2],
}
assert sizes[0] > sizes[1] > sizes[2]
assert before + 0.1 < accuracies[0] < 0.90  # quick: skip
assert abs(accuracies[1] - accuracies[0]) < 0.05  # quick: skip
