"""Train four adapters on real sentences and draw the pictures of `docs/plots.md`.

    python docs/figures/plots.py        # after `make demo`, which installs what it needs; also needs matplotlib

The base is MiniLM with a new head, as in `examples/movie_reviews.py`. The adapters are trained one after the other in one
model, each from the same base: two on film reviews, of rank 8 and 1, one on tweets and one on product reviews. The script
writes `plots.json`, the four pictures, and the table of the page.
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import keras
import movie_reviews
import numpy as np
import printing
from movie_reviews_data import load_sentences

import keras_lora
from keras_lora import plots

SOURCES = {"films": "movieReviewSnippets", "tweets": "tweets", "products": "amazonReviewSnippets"}
ADAPTERS = {"films": ("films", 8), "films, rank 1": ("films", 1), "tweets": ("tweets", 8), "products": ("products", 8)}
TRAIN, VALIDATION = slice(0, 480), slice(1600, 1900)
BATCH, EPOCHS, LEARNING_RATE = 32, 3, 2e-3


def part(source: str, at: slice) -> Any:
    """Tokens and labels of some sentences of a source."""
    x, y = load_sentences(SOURCES[source])
    return {key: each[at] for key, each in x.items()}, y[at]


def train(model: keras.Model, name: str, source: str, rank: int) -> Any:
    """Add an adapter to the model and train it."""
    keras_lora.apply_lora(model, rank=rank, train="head", name=name)
    steps = EPOCHS * math.ceil(TRAIN.stop / BATCH)
    warmup = steps // 10
    schedule = keras.optimizers.schedules.CosineDecay(0.0, steps - warmup, warmup_target=LEARNING_RATE, warmup_steps=warmup)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(schedule, weight_decay=0.0), loss, metrics=["accuracy"])
    own = plots.LogAdapters(names=name)
    settings = {"batch_size": BATCH, "epochs": EPOCHS, "verbose": 2, "callbacks": [own]}
    return model.fit(*part(source, TRAIN), validation_data=part(source, VALIDATION), **settings)


def measure() -> dict[str, Any]:
    """Train, draw, and return the numbers."""
    keras.utils.set_random_seed(0)
    model = movie_reviews.build_classifier()
    runs = {name: train(model, name, *settings) for name, settings in ADAPTERS.items()}
    # All of them at full strength, for their sizes.
    keras_lora.activate_adapters(model, list(ADAPTERS))
    printing.save(plots.plot_ranks(model, names="films"), "ranks")
    printing.save(plots.plot_changes(model, names="films"), "changes")
    printing.save(plots.plot_overlaps(model), "overlaps")
    films = {f"rank {rank}": runs[name] for name, (source, rank) in ADAPTERS.items() if source == "films"}
    printing.save(plots.plot_curves(films, metrics=["loss", "accuracy"]), "curves")
    rows = plots.measure_adapters(model)
    found = {}
    for name, (_, rank) in ADAPTERS.items():
        own = [row for row in rows if row.name == name]
        keys = ("effective_rank", "compressed_rank", "relative_change")
        found[name] = {"rank": rank, **{key: float(np.mean([getattr(row, key) for row in own])) for key in keys}}
    overlaps = {measure: plots.measure_overlaps(model, measure=measure) for measure in ("subspace", "cosine")}
    return {
        "settings": {
            "train": TRAIN.stop,
            "validation": VALIDATION.stop - VALIDATION.start,
            "epochs": EPOCHS,
            "batch": BATCH,
            "learning rate": LEARNING_RATE,
        },
        "adapters": found,
        "overlaps": {measure: each.values for measure, each in overlaps.items()},
        "chance": overlaps["subspace"].chance,
        "curves": plots.read_curves(runs),
        "made": printing.made_with(),
    }


def text(results: dict[str, Any]) -> str:
    """The table of the page."""
    header = ["adapter", "rank", "effective rank", "rank that keeps 0.9", "relative change", "validation accuracy"]
    rows = []
    for name, each in results["adapters"].items():
        accuracy = results["curves"][name]["val_accuracy"][-1]
        numbers = [f"{each['effective_rank']:.2f}", f"{each['compressed_rank']:.2f}", f"{each['relative_change']:.3f}"]
        rows.append([name, str(each["rank"]), *numbers, f"{accuracy:.3f}"])
    settings = results["settings"]
    below = (
        f"{settings['train']} sentences each to train, {settings['validation']} to validate, {settings['epochs']} epochs;"
    )
    return f"{printing.table(header, rows)}\n\n{below} one seed. {printing.words_of(results['made'])}."


def main() -> None:
    """Train, draw and print."""
    printing.write("plots", measure())
    printing.put("plots.md", "plots", text(printing.read("plots")))


if __name__ == "__main__":
    main()
