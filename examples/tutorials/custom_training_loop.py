# %% [markdown]
# # Write your own training loop
#
# `apply_lora` decides which variables are trainable. A loop of your own that trains `model.trainable_variables` therefore
# trains the adapters and leaves the base as it is. This tutorial has the loop for each backend, and runs the one for yours.
#
# The model and the sentences are those of [Classify text](text_classification.md), with fewer blocks of the encoder.
# `build_classifier` makes that model.

# %%
import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # or "tensorflow", "torch"

import keras
import numpy as np
from tutorial_data import build_classifier, load_sentences

import keras_lora

x, y = load_sentences()
train_size = 1600  # quick: 64
test_size = 1000  # quick: 8
blocks = 2  # quick: 1


def part(start, stop):
    return {name: each[start:stop] for name, each in x.items()}, y[start:stop]


keras.utils.set_random_seed(0)
model = keras_lora.apply_lora(build_classifier(blocks=blocks), rank=8, train="head")
optimizer = keras.optimizers.Adam(2e-3)
optimizer.build(model.trainable_variables)
loss_function = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

# %% [markdown]
# ## One step
#
# Each backend has its own way to a gradient. `train_step` takes a batch, updates the adapters and returns the loss.
#
# - TensorFlow records the call on a tape.
# - PyTorch puts a gradient on each variable.
# - On JAX the step is a pure function of the variables. `state` has their values, and goes back into the model at the end.
#   Read the values right before the loop: `predict` and `fit` replace them.

# %%
if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    @tf.function
    def train_step(batch, labels):
        with tf.GradientTape() as tape:
            loss = loss_function(labels, model(batch, training=True))
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)
        return loss

elif keras.backend.backend() == "torch":
    import torch

    def train_step(batch, labels):
        model.zero_grad()
        loss = loss_function(labels, model(batch, training=True))
        loss.backward()
        gradients = [each.value.grad for each in model.trainable_variables]
        with torch.no_grad():
            optimizer.apply(gradients, model.trainable_variables)
        return loss.detach()

else:
    import jax

    groups = (
        model.trainable_variables,
        model.non_trainable_variables,
        optimizer.variables,
    )
    state: list = []

    def compute_loss(trainable, fixed, batch, labels):
        outputs, fixed = model.stateless_call(
            trainable, fixed, batch, training=True
        )
        return loss_function(labels, outputs), fixed

    @jax.jit
    def pure_step(trainable, fixed, slots, batch, labels):
        gradient = jax.value_and_grad(compute_loss, has_aux=True)
        (loss, fixed), gradients = gradient(trainable, fixed, batch, labels)
        trainable, slots = optimizer.stateless_apply(slots, gradients, trainable)
        return loss, [trainable, fixed, slots]

    def train_step(batch, labels):
        loss, state[:] = pure_step(*state, batch, labels)
        return loss


# %% [markdown]
# ## The loop


# %%
def accuracy(start, stop):
    inputs, labels = part(start, stop)
    predicted = model.predict(inputs, batch_size=100, verbose=0).argmax(axis=-1)
    return float((predicted == labels).mean())


def arrays():
    return {
        each.path: keras.ops.convert_to_numpy(each).copy() for each in model.weights
    }


before, weights_before = accuracy(8000, 8000 + test_size), arrays()
if keras.backend.backend() == "jax":
    state[:] = [[variable.value for variable in group] for group in groups]
batch_size, losses = 32, []
for start in range(0, train_size, batch_size):
    losses.append(float(train_step(*part(start, start + batch_size))))
    if len(losses) % 10 == 0:
        print(f"step {len(losses)}, mean loss {np.mean(losses[-10:]):.3f}")
if keras.backend.backend() == "jax":
    for group, values in zip(groups, state, strict=True):
        for variable, value in zip(group, values, strict=True):
            variable.assign(value)
after = accuracy(8000, 8000 + test_size)
print(f"test accuracy: {before:.3f} before, {after:.3f} after")

# %% [markdown]
# ## Only the adapters and the head changed
#
# The weights are compared bit for bit with those from before the loop.

# %%
trainable = {each.path for each in model.trainable_weights}
weights_after = arrays()
changed = {
    path
    for path, value in weights_before.items()
    if not np.array_equal(value, weights_after[path])
}
numbers = {
    "test accuracy before": before,
    "test accuracy after": after,
    "trainable weights": len(trainable),
    "trainable weights that changed": len(trainable & changed),
    "frozen weights": len(weights_before) - len(trainable),
    "frozen weights that changed": len(changed - trainable),
}
print(numbers)
assert changed <= trainable
assert 0.70 < after < 0.90  # quick: skip
