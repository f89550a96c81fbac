"""The same fine-tuning in less memory: a base stored in bfloat16, and LoRA-FA, which trains B alone.

    python examples/small_memory.py [--quick]       # after `make demo`, which installs what it needs

MiniLM on real film-review sentences, as in `movie_reviews.py`, for one epoch and with a fixed seed. "weights" are the bytes
of all variables of the model, "optimizer" those of AdamW. On a CPU without bfloat16 products it saves memory, but no time.
"""

import argparse
import math
import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np
from movie_reviews import TEST, TRAIN, build_classifier
from movie_reviews_data import load_sentences
from rich.console import Console
from rich.table import Table

import keras_lora

WAYS = {
    "LoRA": {},
    "LoRA, base in bfloat16": {"base_dtype": "bfloat16"},
    "LoRA-FA, base in bfloat16": {"adapter": keras_lora.LoRA(rank=8, freeze_a=True), "base_dtype": "bfloat16"},
}


def megabytes(variables) -> str:
    return f"{sum(math.prod(v.shape) * np.dtype(v.dtype).itemsize for v in variables) / 1e6:.2f}"


def fine_tune(train, test, way, blocks) -> list[str]:
    keras.utils.set_random_seed(0)
    model = build_classifier(blocks=blocks)
    arguments = {"rank": 8, **way} if "adapter" not in way else way
    keras_lora.apply_lora(model, train="head", **arguments)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(1e-3, weight_decay=0.0), loss, metrics=["accuracy"])
    model.fit(*train, batch_size=32, verbose=0)
    _, accuracy = model.evaluate(*test, batch_size=200, verbose=0)
    trained = sum(math.prod(v.shape) for v in model.trainable_variables)
    return [megabytes(model.variables), megabytes(model.optimizer.variables), f"{trained:,}", f"{accuracy:.3f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one block of six, few sentences: it runs, not how well")
    quick = parser.parse_args().quick
    x, y = load_sentences()
    train_at, test_at = (slice(0, 32), slice(8000, 8040)) if quick else (TRAIN, TEST)
    train, test = (({name: each[at] for name, each in x.items()}, y[at]) for at in (train_at, test_at))
    table = Table("", "weights MB", "optimizer MB", "trainable", "test accuracy")
    sizes = []
    for name, way in WAYS.items():
        row = fine_tune(train, test, way, blocks=1 if quick else 6)
        table.add_row(name, *row)
        sizes.append([float(size) for size in row[:2]])
    Console().print(table)
    weights, optimizer = np.array(sizes).T
    if not (weights[1] < weights[0] and optimizer[2] < optimizer[1]):
        raise SystemExit("A base in bfloat16 must be smaller, and so must the optimizer of LoRA-FA.")


if __name__ == "__main__":
    main()
