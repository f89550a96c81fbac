"""The models that are measured, each with one batch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import layers

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@dataclass
class Case:
    """How to build a model, the batch it is trained on, and what is adapted in it."""

    name: str
    setting: dict[str, Any]
    build: Callable[[], keras.Model]
    x: Any
    y: np.ndarray
    targets: Any = None
    train: str | None = None  # a layer that trains in full with the adapters
    dropout: bool = True  # whether the adapted layers can have dropout

    @property
    def rank(self) -> int:
        return self.setting["rank"]


def dense(d: int, tokens: int, rank: int, depth: int = 4, name: str = "dense") -> Case:
    """A stack of Dense layers."""

    def build() -> keras.Model:
        return keras.Sequential([keras.Input((d,)), *(layers.Dense(d, activation="relu") for _ in range(depth))])

    setting = {"d": d, "tokens": tokens, "rank": rank, "layers": depth}
    return Case(name, setting, build, normal(tokens, d), normal(tokens, d, seed=1))


def block(targets: str, width: int = 256, length: int = 64, batch: int = 8, depth: int = 4, rank: int = 8) -> Case:
    """A small transformer."""

    def build() -> keras.Model:
        x = inputs = keras.Input((length, width))
        for _ in range(depth):
            attended = layers.MultiHeadAttention(num_heads=4, key_dim=width // 4)(x, x)
            x = layers.LayerNormalization()(layers.add([x, attended]))
            fed = layers.Dense(width)(layers.Dense(4 * width, activation="relu")(x))
            x = layers.LayerNormalization()(layers.add([x, fed]))
        return keras.Model(inputs, x)

    setting = {"targets": targets, "width": width, "tokens": batch * length, "rank": rank, "layers": depth}
    names = targets if targets == "all-linear" else targets.split(", ")
    return Case("block", setting, build, normal(batch, length, width), normal(batch, length, width, seed=1), names)


def convolution(channels: int = 128, size: int = 16, batch: int = 8, rank: int = 8) -> Case:
    def build() -> keras.Model:
        stack = [layers.Conv2D(channels, 3, padding="same", activation="relu") for _ in range(3)]
        return keras.Sequential([keras.Input((size, size, channels)), *stack])

    shape = (batch, size, size, channels)
    setting = {"channels": channels, "pixels": batch * size * size, "rank": rank, "layers": 3}
    return Case("convolution", setting, build, normal(*shape), normal(*shape, seed=1))


def embedding(vocabulary: int = 32000, width: int = 256, batch: int = 8, length: int = 128, rank: int = 8) -> Case:
    """An embedding is adapted only if it is named, and token ids have no dropout."""

    def build() -> keras.Model:
        ids = keras.Input((length,), dtype="int32")
        mean = layers.GlobalAveragePooling1D()(layers.Embedding(vocabulary, width, name="tokens")(ids))
        return keras.Model(ids, layers.Dense(2, name="head")(mean))

    ids = np.random.default_rng(0).integers(0, vocabulary, (batch, length), dtype="int32")
    setting = {"vocabulary": vocabulary, "width": width, "tokens": batch * length, "rank": rank}
    return Case("embedding", setting, build, ids, normal(batch, 2, seed=1), "tokens", dropout=False)


def hub(depth: int = 12, width: int = 384, batch: int = 32, rank: int = 8) -> Case:
    """A BERT in the shape of MiniLM-L12 with random weights, on real sentences about films."""
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))
    import keras_hub
    from movie_reviews_data import load_sentences

    def build() -> keras.Model:
        encoder = keras_hub.models.BertBackbone(
            vocabulary_size=30522, num_layers=depth, num_heads=12, hidden_dim=width, intermediate_dim=4 * width
        )
        tokens = encoder.output["sequence_output"]
        mean = layers.GlobalAveragePooling1D()(tokens, mask=encoder.input["padding_mask"])
        return keras.Model(encoder.input, layers.Dense(2, name="head")(mean))

    x, y = load_sentences()
    x = {name: each[:batch] for name, each in x.items()}
    setting = {"width": width, "tokens": x["token_ids"].size, "rank": rank, "layers": depth}
    return Case("hub", setting, build, x, np.eye(2, dtype="float32")[y[:batch]], train="head")


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype("float32")
