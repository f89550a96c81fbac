# %% [markdown]
# # Tune on preferences
#
# You have pairs of texts, and in each pair one that you prefer. Direct preference optimization
# ([DPO](https://arxiv.org/abs/2305.18290)) trains a language model to make the preferred texts likelier, compared with the
# others. It needs two models: the *policy*, which trains, and the *reference*, from which it started. With LoRA these are
# one model, with its adapter on and off.
#
# Install what [Tune a language model](language_model.md) needs. `PreferenceModel` is in `examples/preference_tuning.py`,
# which tunes on more pairs.

# %%
import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # or "tensorflow", "torch"

import keras
import numpy as np
from tutorial_data import (
    BETA,
    PreferenceModel,
    load_smollm2,
    load_texts,
    tokenize_pairs,
)

import keras_lora

# %% [markdown]
# ## The pairs
#
# You prefer sentences of customers about products to sentences of a newspaper's editorials. A pair is one of each, taken
# at random.

# %%
customers, _ = load_texts("amazonReviewSnippets")
editorials, _ = load_texts("nytEditorialSnippets")
prompt = "My comment:"
length = 16  # quick: 6


def pairs(start, stop):
    return tokenize_pairs(
        customers[start:stop], editorials[start:stop], prompt, length
    )


train_size = 32  # quick: 4
test_size = 32  # quick: 4
train, test = pairs(0, train_size), pairs(2000, 2000 + test_size)
for preferred, other in zip(customers[:2], editorials[:2], strict=True):
    print(f"preferred: {preferred}\nother:     {other}")
print({name: each.shape for name, each in train.items()})

# %% [markdown]
# `ids` has the tokens of both texts, after a prompt. `counted` is 1 for the tokens of the text and 0 for the prompt and for
# padding.
#
# ## The policy
#
# `PreferenceModel` wraps a language model. Its outputs are the log-probabilities of the two texts of each pair.

# %%
blocks = 30  # quick: 1
keras.utils.set_random_seed(0)
policy = keras_lora.apply_lora(load_smollm2(blocks), rank=8)
model = PreferenceModel(policy)
model.compile(keras.optimizers.Adam(5e-4))

before = model.predict(test, batch_size=4, verbose=0)
print(before.shape)
print(
    f"the preferred text is likelier "
    f"in {np.mean(before[:, 0] > before[:, 1]):.3f} of the test pairs"
)

# %% [markdown]
# ## The loss
#
# The *reward* of a text is `BETA` times what the adapter adds to its log-probability. The loss is small if the preferred
# text of each pair has the higher reward, and a pair is won if it has. One factor of a new adapter is zero, so `before`
# is what the reference computes. All rewards are 0 then: the loss is the logarithm of 2, and no pair is won.


# %%
def loss_and_share_won(log_probabilities, reference):
    rewards = BETA * (log_probabilities - reference)
    margin = rewards[:, 0] - rewards[:, 1]
    return float(np.log1p(np.exp(-margin)).mean()), float((margin > 0).mean())


loss_before, won_before = loss_and_share_won(before, before)
print(f"test loss {loss_before:.3f}, {won_before:.3f} of the pairs won")

# %% [markdown]
# ## Fit
#
# `PreferenceModel.compute_loss` does this in each step. It runs the reference in `with
# keras_lora.disable_adapters(policy)`, so there is no second copy of the weights. `rewarded` is the share of the pairs
# that are won, `likelier` the share where the preferred text is likelier, and `reference` the mean log-probability of a
# text under the reference. All are means over the epoch, while the policy changes.

# %%
model.fit(train, batch_size=4, epochs=1, verbose=2)

# %% [markdown]
# ## After
#
# The reference is what it was: training has changed the adapter only.

# %%
after = model.predict(test, batch_size=4, verbose=0)
with keras_lora.disable_adapters(policy):
    reference = model.predict(test, batch_size=4, verbose=0)
reference_moved = float(np.abs(reference - before).max())
print(
    f"largest change of the reference: {reference_moved:.1e}, "
    f"of the policy: {np.abs(after - before).max():.1e}"
)

loss_after, won_after = loss_and_share_won(after, reference)
print(f"test loss {loss_after:.3f}, {won_after:.3f} of the pairs won")

# %% [markdown]
# ## What was measured
#
# The learning rate and `BETA` are those of `examples/preference_tuning.py`. No other values were compared here.
# Customers and editorials write differently, so few pairs are enough. Positive and negative sentences about films are
# harder to tell apart: [Switching](../many_adapters.md#switching) has the result of the example.

# %%
numbers = {
    "test loss before": loss_before,
    "test loss after": loss_after,
    "test pairs won before": won_before,
    "test pairs won after": won_after,
    "test pairs where the preferred text is likelier, before": float(
        (before[:, 0] > before[:, 1]).mean()
    ),
    "test pairs where the preferred text is likelier, after": float(
        (after[:, 0] > after[:, 1]).mean()
    ),
    "largest change of the reference": reference_moved,
}
assert reference_moved < 1e-3
assert 0.7 < won_after <= 1.0  # quick: skip
