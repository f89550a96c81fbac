"""Layers of every kind in one model: separable convolutions, a recurrent layer in both directions, and one of your own.

    KERAS_BACKEND=jax python examples/every_layer.py      # jax (the default), torch or tensorflow; a minute

A small network learns scikit-learn's 8 × 8 images of handwritten digits, and is then adapted to a few digits turned on
their side. "as it was" is not trained again, "head" trains only the head, LoRA trains the head and a low-rank change of
every kernel that `list_targets` lists, "full" trains everything. The adapted model is saved to a `.keras` file, loaded, and
merged into a plain Keras model. Neither may change its predictions.
"""

import argparse
import os
import tempfile
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np
from keras import layers, ops
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

import keras_lora

METHODS = {"as it was": 0.0, "head": 1e-2, "LoRA rank 1": 1e-2, "LoRA rank 4": 1e-2, "full": 3e-3}


@keras_lora.register_layer(kernels={"scores": "io"})
@keras.saving.register_keras_serializable("every_layer")
class Pooling(layers.Layer):
    """The mean of a sequence, weighted by scores that a kernel computes. It stands for a layer that you wrote."""

    def build(self, shape):
        self.scores = self.add_weight(shape=(shape[-1], 4), name="scores")

    def call(self, x):
        weights = ops.softmax(ops.matmul(x, self.scores), axis=1)
        y = ops.einsum("btd,bth->bhd", x, weights)
        return ops.reshape(y, (-1, y.shape[1] * y.shape[2]))


def network() -> keras.Model:
    x = image = keras.Input((8, 8, 1))
    x = layers.Conv2D(16, 3, padding="same", activation="relu")(x)
    x = layers.SeparableConv2D(32, 3, padding="same")(x)
    x = layers.Activation("relu")(layers.BatchNormalization()(x))
    x = layers.Reshape((8, 8 * 32))(x)  # the rows of the image, one after the other
    x = layers.Bidirectional(layers.GRU(32, return_sequences=True))(x)
    return keras.Model(image, layers.Dense(10, name="head")(Pooling()(x)), name="digits")


def fit(model: keras.Model, x: np.ndarray, y: np.ndarray, learning_rate: float, epochs: int) -> None:
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(learning_rate), loss)
    model.fit(x, y, batch_size=32, epochs=epochs, verbose=0)


def prepare(model: keras.Model, method: str) -> None:
    """Choose what trains."""
    if method.startswith("LoRA"):
        keras_lora.apply_lora(model, rank=int(method[-1]), train="head")
    elif method == "head":
        for layer in model.layers[:-1]:
            layer.trainable = False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one epoch of each, to see that it runs")
    quick = parser.parse_args().quick
    digits = load_digits()
    images, labels = (digits.images / 16).astype("float32")[..., None], digits.target
    on_their_side = np.rot90(images, axes=(1, 2)).copy()
    few, test = slice(1000, 1200), slice(1200, None)

    keras.utils.set_random_seed(0)
    pretrained = network()
    fit(pretrained, images[:1000], labels[:1000], 3e-3, 1 if quick else 10)
    table = Table("", "accuracy", "trained")
    console = Console()
    for method, learning_rate in METHODS.items():
        keras.utils.set_random_seed(1)
        model = keras.models.clone_model(pretrained)
        model.set_weights(pretrained.get_weights())
        prepare(model, method)
        if method == "LoRA rank 1":
            console.print(keras_lora.list_targets(network(), rank=1, train="head"))
        if learning_rate:
            fit(model, on_their_side[few], labels[few], learning_rate, 1 if quick else 20)
        logits = model.predict(on_their_side[test], verbose=0)
        trained = sum(int(np.prod(v.shape)) for v in model.trainable_variables) if learning_rate else 0
        table.add_row(method, f"{np.mean(logits.argmax(-1) == labels[test]):.3f}", f"{trained:,}")
        if method.startswith("LoRA"):
            check_files_and_merging(model, on_their_side[test], logits)
    console.print(table)
    console.print(f"{len(images[few])} digits on their side to train, {len(images[test])} to test; one seed.")


def check_files_and_merging(model: keras.Model, x: np.ndarray, logits: np.ndarray) -> None:
    """Check that a loaded file and a merged model give the same predictions."""
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder) / "digits.keras")
        loaded = keras.saving.load_model(Path(folder) / "digits.keras")
    assert np.allclose(loaded.predict(x, verbose=0), logits, atol=1e-4)
    merged = keras_lora.merge_lora(loaded)
    assert not any(type(layer).__module__.startswith("keras_lora") for layer in merged.layers)
    assert np.allclose(merged.predict(x, verbose=0), logits, atol=1e-3)


if __name__ == "__main__":
    main()
