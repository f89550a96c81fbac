"""Write the adapter files of the format version of today, to be committed: files of every version stay loadable.

Run once for each version, `KERAS_BACKEND=jax python tests/make_checkpoints.py`. Beside each file is an `.npz` with
the weights of the base, an input and the output of the adapted model: no test depends on random numbers of a backend.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import layers

import keras_lora
from keras_lora.files import tensor_file

FOLDER = Path(__file__).parent / "checkpoints"


def dense_and_einsum() -> keras.Model:
    x = keras.Input((3, 4))
    y = layers.EinsumDense("abc,cde->abde", output_shape=(None, 2, 3), bias_axes="de")(x)
    y = layers.Reshape((3, 6))(y)
    return keras.Model(x, layers.Dense(2)(layers.Dense(5, activation="tanh")(y)))


def two_dense() -> keras.Model:
    return keras.Sequential([keras.Input((6,)), layers.Dense(5, activation="tanh"), layers.Dense(3)])


def embedding() -> keras.Model:
    x = keras.Input((4,), dtype="int32")
    return keras.Model(x, layers.Dense(2)(layers.Dense(3, activation="tanh")(layers.Embedding(9, 5, name="tokens")(x))))


def normalized() -> keras.Model:
    stack = [layers.Dense(5, activation="relu"), layers.BatchNormalization(), layers.Dense(2, name="head")]
    return keras.Sequential([keras.Input((6,)), *stack])


def recurrent() -> keras.Model:
    return keras.Sequential([keras.Input((4, 3)), layers.LSTM(5), layers.Dense(2)])


#: By name: the base, an input and how it is adapted.
CASES: dict[str, tuple[Callable[[], keras.Model], Any, dict[str, Any]]] = {
    "lora": (dense_and_einsum, (2, 3, 4), {"rank": 2, "alpha": 3.0, "head": None}),
    "dora": (two_dense, (2, 6), {"adapter": keras_lora.DoRA(2, rank_stabilized=True), "head": None}),
    "tokens": (
        embedding,
        [[0, 3, 7, 8], [7, 7, 1, 2]],
        {"rank": 1, "adapter_pattern": {"tokens": keras_lora.TrainableTokens([7, 3])}},
    ),
    "head": (normalized, (3, 6), {"rank": 2, "train": ["head", layers.BatchNormalization], "bias": "all"}),
    "recurrent": (recurrent, (2, 4, 3), {"rank": 2}),
}


def make(name: str, folder: Path) -> None:
    keras.utils.set_random_seed(5)
    base, x, apply = CASES[name]
    model, rng = base(), np.random.default_rng(5)
    x = rng.normal(size=x).astype("float32") if isinstance(x, tuple) else np.array(x, "int32")
    weights = [_numbers(rng, v, 0.5) for v in model.weights]
    model.set_weights(weights)
    keras_lora.apply_lora(model, **apply)
    for variable in model.variables:
        if variable.trainable or variable.name.startswith("moving_"):
            value = keras.ops.convert_to_numpy(variable.value)
            variable.assign(value + _numbers(rng, variable, 0.3))
    keras_lora.save_adapter(model, folder / f"{name}.safetensors")
    numbers = {f"weight_{index}": weight for index, weight in enumerate(weights)}
    np.savez(folder / f"{name}.npz", x=x, y=model.predict(x, verbose=0), **numbers)


def _numbers(rng: np.random.Generator, variable: keras.Variable, size: float) -> np.ndarray:
    drawn = (size * rng.normal(size=tuple(variable.shape))).astype("float32")
    return np.abs(drawn) + 0.5 if variable.name == "moving_variance" else drawn


if __name__ == "__main__":
    folder = FOLDER / f"version_{tensor_file.VERSION}"
    folder.mkdir(parents=True)  # what is there already is never written again
    for name in CASES:
        make(name, folder)
