# %% [markdown]
# # Merge and export
#
# `merge_lora` adds each change to its kernel. The model is then a plain Keras model: others load it without `keras_lora`,
# and it exports to formats that need no Keras. You tune a network, merge it, write a `.keras` file, export it,
# and compare the outputs with those from before merging.
#
# The network and the images are those of [Give an image model a new task](image_classification.md). `build_digits` makes
# that model. On JAX and TensorFlow you write a SavedModel, which needs TensorFlow. On PyTorch you write a file of
# `torch.export`.

# %%
import os
import subprocess
import sys

os.environ.setdefault("KERAS_BACKEND", "jax")  # or "tensorflow", "torch"

import keras
import numpy as np
from tutorial_data import build_digits, load_digits

import keras_lora

x, y = load_digits()
train_size = 640  # quick: 16
test_size = 1000  # quick: 8
test = x[4000 : 4000 + test_size], y[4000 : 4000 + test_size]

# %% [markdown]
# ## Tune

# %%
keras.utils.set_random_seed(0)
model = build_digits()
plain_parameters = model.count_params()
keras_lora.apply_lora(model, rank=4, train="head")
model.compile(
    optimizer=keras.optimizers.Adam(0.01),
    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
)
epochs = 3  # quick: 1
model.fit(x[:train_size], y[:train_size], batch_size=32, epochs=epochs, verbose=2)


def accuracy(outputs):
    return float((outputs.argmax(axis=-1) == test[1]).mean())


adapted = model.predict(test[0], batch_size=100, verbose=0)
adapted_parameters = model.count_params()

# %% [markdown]
# ## Merge
#
# `merge_lora` changes the model in place. Save the adapter first if you want to keep it apart.

# %%
keras_lora.save_adapter(model, "digits.safetensors")
keras_lora.merge_lora(model)
merged = model.predict(test[0], batch_size=100, verbose=0)
print(
    f"{adapted_parameters:,} parameters with adapters, {model.count_params():,} merged"
)
print(
    f"test accuracy: {accuracy(adapted):.3f} before merging, "
    f"{accuracy(merged):.3f} after"
)

# %% [markdown]
# ## A `.keras` file
#
# A new process loads the file, and does not import `keras_lora`.

# %%
model.save("digits.keras")
np.save("x.npy", test[0])
load_elsewhere = """
import keras, numpy, sys
model = keras.saving.load_model("digits.keras")
numpy.save("y.npy", model.predict(numpy.load("x.npy"), batch_size=100, verbose=0))
assert "keras_lora" not in sys.modules
"""
subprocess.run([sys.executable, "-c", load_elsewhere], check=True)
loaded = np.load("y.npy")

# %% [markdown]
# ## An exported model
#
# The exported model runs without Keras. With `dynamic_shapes`, PyTorch leaves the number of images open.
# [Exporting](../exporting.md) lists the formats of each backend.

# %%
if keras.backend.backend() == "torch":
    import torch

    batch = torch.export.Dim("batch", min=1, max=1024)
    model.export(
        "exported.pt2", format="torch", dynamic_shapes={0: batch}, verbose=False
    )
    module = torch.export.load("exported.pt2").module()
    exported = module(torch.from_numpy(test[0])).detach().numpy()
else:
    import tensorflow as tf

    model.export("exported", format="tf_saved_model", verbose=False)
    module = tf.saved_model.load("exported")
    exported = module.serve(test[0]).numpy()

# %% [markdown]
# ## What was measured
#
# The merged kernel and the two products that it replaces are sums in another order, so outputs differ by rounding.

# %%
numbers = {
    "test accuracy before merging": accuracy(adapted),
    "test accuracy after merging": accuracy(merged),
    "test accuracy after exporting": accuracy(exported),
    "parameters before adapting": plain_parameters,
    "parameters with adapters": adapted_parameters,
    "parameters after merging": model.count_params(),
    "largest output": float(np.abs(adapted).max()),
}
for label, outputs in {
    "merged": merged,
    "loaded": loaded,
    "exported": exported,
}.items():
    numbers[f"largest difference, {label}"] = float(np.abs(outputs - adapted).max())
    assert (
        numbers[f"largest difference, {label}"] < 1e-4 * numbers["largest output"]
    )
for file in ("digits.safetensors", "digits.keras"):
    numbers[f"{file}, MB"] = os.path.getsize(file) / 1e6
assert accuracy(merged) == accuracy(exported) == accuracy(adapted)  # quick: skip
assert 0.85 < accuracy(merged) < 0.98  # quick: skip
