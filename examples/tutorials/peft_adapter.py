# %% [markdown]
# # Bring a PEFT adapter to Keras, and back
#
# [PEFT](https://huggingface.co/docs/peft) is the library of Hugging Face for adapters of PyTorch models. You load an adapter
# that it wrote into a Keras model, train it further, and write it for PEFT again. Then you check whether vLLM would read
# it correctly.
#
# The model and the sentences are those of [Tune a language model](language_model.md). PEFT needs PyTorch, whatever your
# backend is: `pip install torch==2.13.0 peft==0.21.2 transformers==5.24.0 accelerate==1.15.0`. `from_peft` and `to_peft`
# need neither PEFT nor PyTorch.

# %%
import os

import peft
import torch  # before TensorFlow, which KerasHub imports if it is there

os.environ.setdefault("KERAS_BACKEND", "jax")  # or "tensorflow", "torch"

import keras
import keras_hub
import numpy as np
from tutorial_data import (
    load_smollm2,
    load_smollm2_tokenizer,
    load_smollm2_torch,
    load_texts,
)

import keras_lora
from keras_lora.interop import from_peft, serving_problems, to_peft

texts, _ = load_texts()
length = 16  # quick: 6
tokenizer = load_smollm2_tokenizer()
tokenizer.enable_truncation(length + 1)
tokenizer.enable_padding(length=length + 1)


def tokens(start, stop):
    encoded = tokenizer.encode_batch(texts[start:stop])
    return (
        np.array([getattr(each, name) for each in encoded])
        for name in ("ids", "attention_mask")
    )


# %% [markdown]
# ## An adapter from PEFT
#
# Here PEFT trains for a few steps. A folder that somebody else trained and published does as well, if it is of the same
# model: it has an `adapter_config.json` and an `adapter_model.safetensors`. `r` is PEFT's word for the rank;
# [From other libraries](../glossary.md) has more of them.

# %%
blocks = 30  # quick: 1
train_size = 64  # quick: 8
torch.manual_seed(0)
config = peft.LoraConfig(
    r=8,
    lora_alpha=8,
    use_rslora=True,
    target_modules=["q_proj", "v_proj"],
    task_type="CAUSAL_LM",
)
peft_model = peft.get_peft_model(load_smollm2_torch(blocks), config)
optimizer = torch.optim.Adam(
    [each for each in peft_model.parameters() if each.requires_grad], 1e-3
)
for start in range(0, train_size, 8):
    ids, mask = (torch.tensor(each) for each in tokens(start, start + 8))
    labels = ids.masked_fill(mask == 0, -100)  # padding counts for nothing
    peft_model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
peft_model.save_pretrained("from_peft")
print(*sorted(os.listdir("from_peft")))

# %% [markdown]
# ## Load it into Keras
#
# `from_peft` finds each layer by its name in KerasHub's converter for checkpoints of Hugging Face. The base must be the one
# that the adapter was trained on: the file cannot tell.

# %%
model = load_smollm2(blocks)
from_peft(model, "from_peft")
print(keras_lora.list_adapters(model).total)


def logits_in_keras(ids, mask):
    logits = model({"token_ids": ids, "padding_mask": mask}, training=False)
    return keras.ops.convert_to_numpy(logits)[mask == 1]


def logits_in_peft(ids, mask):
    with torch.no_grad():
        logits = peft_model(
            input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)
        ).logits
    return logits.numpy()[mask == 1]


def difference():  # as a share of the largest logit
    few = tuple(tokens(8000, 8004))
    expected = logits_in_peft(*few)
    return float(
        np.abs(logits_in_keras(*few) - expected).max() / np.abs(expected).max()
    )


peft_model.eval()
imported = difference()
print(f"largest difference of the logits to PEFT's: {imported:.1e}")

# %% [markdown]
# ## Train it further
#
# The adapter trains as any other: compile after `from_peft`, then fit. `disable_adapters` measures the model without it.
# The learning rate is the one that was chosen in [Tune a language model](language_model.md).

# %%
model.compile(
    optimizer=keras.optimizers.Adam(1e-3),
    loss=keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, reduction="mean_with_sample_weight"
    ),
    weighted_metrics=[
        keras_hub.metrics.Perplexity(from_logits=True, name="perplexity")
    ],
)


def data(start, stop):  # each token is predicted from those before it
    ids, mask = tokens(start, stop)
    inputs = {"token_ids": ids[:, :-1], "padding_mask": mask[:, :-1]}
    return {"x": inputs, "y": ids[:, 1:], "sample_weight": mask[:, 1:]}


test_size = 48  # quick: 4


def perplexity():
    return model.evaluate(
        **data(8000, 8000 + test_size), batch_size=8, verbose=0, return_dict=True
    )["perplexity"]


with keras_lora.disable_adapters(model):
    before = perplexity()
as_imported = perplexity()
model.fit(
    **data(train_size, 2 * train_size), batch_size=8, shuffle=False, verbose=2
)
after = perplexity()
print(
    f"test perplexity: {before:.1f} without adapter, {as_imported:.1f} as imported, "
    f"{after:.1f} trained further"
)

# %% [markdown]
# ## Write it for PEFT
#
# PEFT loads the folder like any other, and computes the same.

# %%
name_of_base = "HuggingFaceTB/SmolLM2-135M-Instruct"
to_peft(model, "to_peft", base_model=name_of_base)
peft_model.load_adapter("to_peft", "trained_further")
peft_model.set_adapter("trained_further")
exported = difference()
print(f"largest difference of the logits to PEFT's: {exported:.1e}")

# %% [markdown]
# ## What vLLM wants
#
# Programs that serve a model read only a part of `adapter_config.json`, and ignore the rest without an error.
# `serving_problems` checks a folder against the rules in the source code of vLLM, llama.cpp and Ollama. It runs none of
# them, and this tutorial does not either.
#
# This adapter has `use_rslora`, another scale, which vLLM reads and the others ignore. With `bake_scaling=True` the scale is
# in the factors, so all three read it. PEFT does too.

# %%
for reader, problems in serving_problems("to_peft").items():
    print(f"{reader}: {problems}")
to_peft(model, "served", base_model=name_of_base, bake_scaling=True)
print("baked:", serving_problems("served"))
peft_model.load_adapter("served", "served")
peft_model.set_adapter("served")
baked = difference()

# %% [markdown]
# DoRA, biases, heads and trained tokens do not fit in that form, and are refused with the reason.
# [PEFT, vLLM, llama.cpp](../peft.md#serving) has the rules.
#
# ## What was measured

# %%
numbers = {
    "test perplexity before, without adapter": before,
    "test perplexity as imported": as_imported,
    "test perplexity after training further": after,
    "largest difference of the logits, imported": imported,
    "largest difference of the logits, exported": exported,
    "largest difference of the logits, exported with bake_scaling": baked,
}
assert max(imported, exported, baked) < 1e-4
assert not any(serving_problems("served").values())
assert after < as_imported < before  # quick: skip
