# %% [markdown]
# # Classify text
#
# You fine-tune MiniLM, a pretrained encoder, to tell whether a sentence praises a film. You then save the adapter alone
# and load it into a fresh copy of the model.
#
# `examples/requirements.txt` lists what to install. Run the script or the notebook in its folder, `examples/tutorials`.

# %%
import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # or "tensorflow", "torch"

import keras
import numpy as np
from tutorial_data import load_minilm, load_sentences

import keras_lora

# %% [markdown]
# ## The sentences
#
# The sentences come from film reviews. Twenty people rated each one. `x` has the tokens that MiniLM expects, and `y` is 1
# for praise. Choose settings on the validation part: the test part only measures the result.

# %%
x, y = load_sentences()


def part(start, stop):
    return {name: each[start:stop] for name, each in x.items()}, y[start:stop]


train_size = 1600  # quick: 32
test_size = 1000  # quick: 8
train, validation = part(0, train_size), part(6000, 6000 + test_size // 2)
test = part(8000, 8000 + test_size)
print(
    f"{len(train[1]):,} sentences to train, "
    f"{len(validation[1])} to validate, {len(test[1]):,} to test"
)

# %% [markdown]
# ## The model
#
# The classifier averages the encoder's outputs over the tokens and adds a new head.

# %%
blocks = 6  # quick: 1


def build_model():
    encoder = load_minilm(blocks)
    tokens = encoder.output["sequence_output"]
    mask = encoder.input["padding_mask"]
    mean = keras.layers.GlobalAveragePooling1D()(tokens, mask=mask)
    outputs = keras.layers.Dense(2, name="head")(mean)
    return keras.Model(encoder.input, outputs, name="film_reviews")


keras.utils.set_random_seed(0)
model = build_model()
parameters = model.count_params()

# %% [markdown]
# ## Apply LoRA
#
# Each linear layer of the encoder gets two thin factors of rank 8, and its kernel is frozen. The head is new and has
# nothing to keep, so `train="head"` trains it in full.

# %%
keras_lora.apply_lora(model, rank=8, train="head")
model.compile(
    optimizer=keras.optimizers.AdamW(2e-3),
    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
)
trainable = sum(int(np.prod(each.shape)) for each in model.trainable_variables)
print(f"{parameters:,} parameters in the model; {trainable:,} train with LoRA")

# %% [markdown]
# ## Fit
#
# `fit` and `evaluate` work as on any Keras model. With a new head the model guesses, which is the accuracy before.

# %%
_, before = model.evaluate(*test, batch_size=100, verbose=0)
model.fit(*train, batch_size=32, epochs=1, validation_data=validation, verbose=2)
_, after = model.evaluate(*test, batch_size=100, verbose=0)
print(f"test accuracy: {before:.3f} before, {after:.3f} after")

# %% [markdown]
# ## Save the adapter, load it into a fresh model
#
# The file has the factors and the head. The frozen encoder is not in it.

# %%
keras_lora.save_adapter(model, "film_reviews.safetensors")
size = os.path.getsize("film_reviews.safetensors")
print(
    f"{size / 1e6:.1f} MB; the model without adapters has {4 * parameters / 1e6:.1f} MB"
)

fresh = build_model()
keras_lora.load_adapter(fresh, "film_reviews.safetensors")
expected = model.predict(test[0], batch_size=100, verbose=0)
difference = float(
    np.abs(fresh.predict(test[0], batch_size=100, verbose=0) - expected).max()
)
print(f"largest difference of an output: {difference:.1e}")

# %% [markdown]
# ## What was measured

# %%
numbers = {
    "test accuracy before": before,
    "test accuracy after": after,
    "trainable parameters": trainable,
    "file size, MB": size / 1e6,
    "largest difference after loading": difference,
}
assert difference < 1e-4
assert 0.75 < after < 0.90  # quick: skip
