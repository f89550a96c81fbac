# %% [markdown]
# # An adapter for each request
#
# You train three adapters of one MiniLM, each for another task. You then answer a batch in which each request uses the
# adapter of its task.
#
# The sentences are those of [Classify text](text_classification.md), and others about products. `build_classifier` makes
# the model of that tutorial, here with fewer blocks of the encoder.

# %%
import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # or "tensorflow", "torch"

import keras
import numpy as np
from tutorial_data import build_classifier, load_sentences, load_texts

import keras_lora

# %% [markdown]
# ## Three tasks
#
# "films" and "products" ask whether a sentence is negative (0) or positive (1). "topic" asks whether it is about a film (0)
# or a product (1).

# %%
films, products = load_sentences(), load_sentences("amazonReviewSnippets")


def part(source, start, stop):
    x, y = source
    return {name: each[start:stop] for name, each in x.items()}, y[start:stop]


def joined(parts):
    return {
        name: np.concatenate([each[name] for each in parts]) for name in parts[0]
    }


def tasks(start, size):
    halves = [part(each, start, start + size // 2)[0] for each in (films, products)]
    return {
        "films": part(films, start, start + size),
        "products": part(products, start, start + size),
        "topic": (joined(halves), np.repeat([0, 1], size // 2)),
    }


train_size = 640  # quick: 8
test_size = 400  # quick: 8
train, test = tasks(0, train_size), tasks(2400, test_size)
validation = tasks(1600, test_size // 2)

# %% [markdown]
# ## Train an adapter for each task
#
# Each call of `apply_lora` adds an adapter by its name. The new one trains, and the others are off and frozen. With
# `head=None` the head is adapted like any other layer, so each task gets its own head. `train="head"`, as in Classify
# text, would not do here: `MultiAdapterModel`, below, takes factors only. The file of an adapter does not have the base in
# it. The learning rate was chosen on the validation part, from 2e-3 and 5e-3.

# %%
blocks = 2  # quick: 1


def build_base():
    keras.utils.set_random_seed(0)
    return build_classifier(blocks=blocks)


model = build_base()
for name, (x, y) in train.items():
    keras_lora.apply_lora(model, rank=8, head=None, name=name)
    model.compile(
        optimizer=keras.optimizers.Adam(5e-3),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    print(name)
    model.fit(
        x, y, batch_size=32, epochs=1, validation_data=validation[name], verbose=2
    )
    keras_lora.save_adapter(model, f"{name}.safetensors", name=name)
    print(f"{os.path.getsize(f'{name}.safetensors') / 1e6:.1f} MB")

# %% [markdown]
# ## One adapter at a time
#
# `activate_adapters` switches, and nothing is compiled again. Without adapters the head is untrained, so the model
# guesses.


# %%
def accuracy(outputs, labels):
    return float((outputs.argmax(axis=-1) == labels).mean())


alone, numbers = {}, {}
for name, (x, y) in test.items():
    with keras_lora.disable_adapters(model):
        numbers[f"{name}, test accuracy before"] = accuracy(
            model.predict(x, batch_size=100, verbose=0), y
        )
    keras_lora.activate_adapters(model, name)
    alone[name] = model.predict(x, batch_size=100, verbose=0)
    print(f"{name}: {accuracy(alone[name], y):.3f}")

# %% [markdown]
# ## All adapters in one batch
#
# `MultiAdapterModel` holds the factors of all loaded adapters. It reads the adapter of each example from one more input,
# `adapter_index`. `capacity` is how many adapters it can hold. Here one sentence is asked about twice, and a third
# time without an adapter, where the base guesses.

# %%
served = keras_lora.MultiAdapterModel(build_base(), capacity=4, rank=8, head=None)
for name in test:
    served.load(f"{name}.safetensors", name)

print(load_texts("amazonReviewSnippets")[0][2400])
sentence = part(products, 2400, 2401)[0]
requests = ["products", "topic", None]  # None is the base
outputs = served.predict(
    {**joined([sentence] * 3), "adapter_index": served.index_of(requests)},
    verbose=0,
)
for name, answer in zip(requests, outputs.argmax(axis=-1), strict=True):
    print(f"{name}: {answer}")

# %% [markdown]
# Now the test sentences of all tasks, in a random order, each with the name of its task.

# %%
x, y = (
    joined([x for x, _ in test.values()]),
    np.concatenate([y for _, y in test.values()]),
)
names = np.repeat(list(test), test_size)
order = np.random.default_rng(0).permutation(len(names))
mixed = {name: each[order] for name, each in x.items()}
mixed["adapter_index"] = served.index_of(names[order].tolist())
answers = np.empty((len(names), 2), "float32")
answers[order] = served.predict(mixed, batch_size=100, verbose=0)

# %% [markdown]
# ## What was measured
#
# "After" is with an adapter for each request. The difference is to the answers with one adapter at a time.

# %%
for name in test:
    numbers[f"{name}, test accuracy after"] = accuracy(
        answers[names == name], y[names == name]
    )
difference = float(np.abs(answers - np.concatenate(list(alone.values()))).max())
numbers["largest difference of an output"] = difference
print(numbers)
assert difference < 1e-4
assert all(
    0.65 < numbers[f"{name}, test accuracy after"] <= 1.0 for name in test
)  # quick: skip
