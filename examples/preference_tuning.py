"""Preference tuning (DPO) of SmolLM2: one model is the policy and, with its adapters off, the reference.

    python examples/preference_tuning.py [--quick]       # after `make .venv/tests`, which installs what it needs

Direct preference optimization (Rafailov et al., 2023, https://arxiv.org/abs/2305.18290) needs the log-probabilities of the
model that trains and those of the model it started from. The second is the first without its adapters, so `compute_loss`
runs it in `with keras_lora.disable_adapters(policy)`, and no second copy of the weights is needed.

A pair is two real sentences from film reviews that twenty people rated: the preferred one is positive, the other negative.
They are paired at random, so the sentences of a pair are about different films. The reward that the policy gives a
sentence is beta times what the adapters add to its log-probability. Learning rate and beta were not searched for; the
number of pairs was raised once, from 96, after the share of the held-out pairs was 0.594 there.
"""

import argparse
import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np
import smollm2
from keras import ops
from movie_reviews_data import load_texts
from rich.console import Console
from rich.table import Table

import keras_lora

PROMPT = "My review of this film:"
RANK, BATCH, LEARNING_RATE, BETA = 8, 4, 5e-4, 0.1
TOLERANCE = 1e-4  # of log-probabilities, as a share of the largest


class PreferenceModel(keras.Model):
    """A policy that learns to prefer the first of two texts to the second. Its outputs are their log-probabilities."""

    def __init__(self, policy: keras.Model):
        super().__init__()
        self.policy = policy
        self.rewarded = keras.metrics.Mean(name="rewarded")
        self.likelier = keras.metrics.Mean(name="likelier")
        self.reference = keras.metrics.Mean(name="reference")

    def call(self, pairs: dict) -> keras.KerasTensor:
        ids, mask, counted = (ops.reshape(pairs[each], (-1, pairs[each].shape[-1])) for each in ("ids", "mask", "counted"))
        logits = self.policy({"token_ids": ids[:, :-1], "padding_mask": mask[:, :-1]})
        surprise = keras.losses.sparse_categorical_crossentropy(ids[:, 1:], logits, from_logits=True)
        return ops.reshape(-ops.sum(surprise * counted[:, 1:], axis=-1), (-1, 2))

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        with keras_lora.disable_adapters(self.policy):
            reference = self(x)
        rewards = BETA * (y_pred - reference)
        margin = rewards[:, 0] - rewards[:, 1]
        self.rewarded.update_state(ops.cast(margin > 0, "float32"))
        self.likelier.update_state(ops.cast(y_pred[:, 0] > y_pred[:, 1], "float32"))
        self.reference.update_state(reference)
        return ops.mean(ops.softplus(-margin))  # -log sigmoid(margin)


def load_pairs(at: slice, length: int) -> dict[str, np.ndarray]:
    """Pairs of a positive and a negative sentence, as `tokenize_pairs` returns them."""
    texts, positive = load_texts()
    rated = list(zip(texts, positive, strict=True))
    preferred, others = ([text for text, rating in rated if rating == side][at] for side in (1, 0))
    return tokenize_pairs(preferred, others, PROMPT, length)


def tokenize_pairs(preferred: list[str], others: list[str], prompt: str, length: int) -> dict[str, np.ndarray]:
    """Tokens of the pairs, `(pairs, 2, length)`, and 1 where a token is no padding, and where it belongs to the sentence."""
    tokenizer = smollm2.load_tokenizer()
    start = len(tokenizer.encode(prompt).ids)
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    encoded = [tokenizer.encode_batch([f"{prompt} {text}" for text in side]) for side in (preferred, others)]
    ids, mask = (
        np.array([[getattr(each, name) for each in side] for side in encoded], "int32").swapaxes(0, 1)
        for name in ("ids", "attention_mask")
    )
    return {"ids": ids, "mask": mask, "counted": (mask * (np.arange(length) >= start)).astype("float32")}


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two blocks of thirty, tested on what was trained: it runs")
    quick = parser.parse_args().quick
    blocks, length, pairs, epochs = (2, 16, 8, 4) if quick else (smollm2.BLOCKS, 32, 256, 1)
    train = load_pairs(slice(0, pairs), length)
    test = train if quick else load_pairs(slice(-64, None), length)
    few = {name: each[: 2 * BATCH] for name, each in test.items()}

    keras.utils.set_random_seed(0)
    policy = smollm2.load_keras(blocks)
    model = PreferenceModel(policy)
    untouched = model.predict(few, batch_size=BATCH, verbose=0)
    keras_lora.apply_lora(policy, rank=RANK)
    print(keras_lora.list_adapters(policy).total, flush=True)
    model.compile(keras.optimizers.AdamW(LEARNING_RATE, weight_decay=0.0))
    before = model.evaluate(test, batch_size=BATCH, verbose=0, return_dict=True)
    model.fit(train, batch_size=BATCH, epochs=epochs)
    after = model.evaluate(test, batch_size=BATCH, verbose=0, return_dict=True)

    table = Table(f"{len(test['ids'])} {'pairs that were trained' if quick else 'held-out pairs'}", "before", "after")
    rows = {
        "loss": "DPO loss",
        "rewarded": "share where the positive sentence has the higher reward",
        "likelier": "share where it is more likely",
        "reference": "mean log-probability under the reference",
    }
    for name, what in rows.items():
        table.add_row(what, f"{before[name]:.3f}", f"{after[name]:.3f}")
    Console().print(table)

    tuned = model.predict(few, batch_size=BATCH, verbose=0)
    with keras_lora.disable_adapters(policy):
        reference = model.predict(few, batch_size=BATCH, verbose=0)
    in_steps = model.evaluate(few, batch_size=BATCH, verbose=0, return_dict=True)["reference"]
    differences = [difference(reference, untouched), difference(np.array(in_steps), untouched.mean())]
    print(f"{len(untouched)} pairs: the reference differs from the base before `apply_lora` by {differences[0]:.1e},")
    print(
        f"its mean inside `compute_loss` by {differences[1]:.1e}; the policy differs by {difference(tuned, untouched):.1e}"
    )
    if not max(differences) <= TOLERANCE < difference(tuned, untouched):  # so written, NaN fails too
        raise SystemExit(f"The reference must be the base, to {TOLERANCE:.0e}, and the policy must not.")
    if not (after["loss"] < before["loss"] and after["rewarded"] > 0.5):
        raise SystemExit("The loss must fall, and most positive sentences must have the higher reward.")


if __name__ == "__main__":
    main()
