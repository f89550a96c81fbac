"""One small model of every kind that `apply_lora` must serve, with data to train it on.

`ZOO[name]()` gives a `Specimen`. Building the same specimen twice gives the same numbers on the same backend.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
from keras import layers

BATCH, STEPS, DIM = 4, 5, 8


@dataclass
class Specimen:
    """A plain model, its inputs and targets, and how it is adapted and compiled."""

    model: Any
    x: Any
    y: Any
    apply: dict[str, Any] = field(default_factory=dict)
    compile: dict[str, Any] = field(default_factory=lambda: {"loss": "mse"})
    tolerance: float = 1e-5
    resumed_elsewhere: float = 2e-3  # how far the losses of two backends may come apart in two further epochs


class Zoo(dict[str, Callable[[], Specimen]]):
    """Specimens by name. One that needs KerasHub is missing if KerasHub is."""

    def __missing__(self, name: str) -> Callable[[], Specimen]:
        if name.startswith("hub_"):
            raise ModuleNotFoundError(f"the specimen {name!r} needs keras_hub", name="keras_hub")
        raise KeyError(name)


ZOO = Zoo()
#: Specimens that between them have what differs from backend to backend: JAX and TensorFlow take these in `make test`.
SLICE = ["sequential", "multi_head_attention", "block_built_in_build", "subclassed", "convolutions", "tied_embedding"]


def specimen(function: Callable[[], Specimen]) -> Callable[[], Specimen]:
    def build() -> Specimen:
        keras.utils.set_random_seed(7)
        return function()

    ZOO[function.__name__] = build
    return build


def specimen_of_keras_hub(function: Callable[[], Specimen]) -> Callable[[], Specimen]:
    """A specimen that is there if KerasHub is."""
    return specimen(function) if importlib.util.find_spec("keras_hub") else function


def numbers(*shape: int, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def ids(*shape: int, vocabulary: int = 11, seed: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, vocabulary, size=shape).astype("int32")


@specimen
def sequential() -> Specimen:
    stack = [
        keras.Input((DIM,)),
        layers.Dense(16, activation="relu"),
        layers.BatchNormalization(),
        layers.Dense(2, name="head"),
    ]
    return Specimen(keras.Sequential(stack), numbers(BATCH, DIM), numbers(BATCH, 2), {"rank": 2, "train": "head"})


@specimen
def functional_with_a_shared_layer() -> Specimen:
    left, right = keras.Input((DIM,), name="left"), keras.Input((DIM,), name="right")
    shared = layers.Dense(DIM, activation="tanh", name="shared")
    y = layers.Dense(3, name="head")(layers.LayerNormalization()(shared(shared(left)) + shared(right)))
    x = {"left": numbers(BATCH, DIM), "right": numbers(BATCH, DIM, seed=5)}
    return Specimen(keras.Model({"left": left, "right": right}, y), x, numbers(BATCH, 3), {"adapter": "dora", "rank": 2})


@specimen
def multi_head_attention() -> Specimen:
    x = keras.Input((STEPS, DIM))
    y = layers.MultiHeadAttention(2, 4, name="attention")(x, x)
    y = layers.Dense(3, name="head")(layers.LayerNormalization()(x + y))
    return Specimen(
        keras.Model(x, y), numbers(BATCH, STEPS, DIM), numbers(BATCH, STEPS, 3), {"rank": 2, "bias": "lora_only"}
    )


@specimen
def grouped_query_attention() -> Specimen:
    x = keras.Input((STEPS, DIM))
    y = layers.GroupQueryAttention(head_dim=4, num_query_heads=4, num_key_value_heads=2)(x, x)
    y = layers.Dense(3, name="head")(y)
    return Specimen(keras.Model(x, y), numbers(BATCH, STEPS, DIM), numbers(BATCH, STEPS, 3), {"adapter": "dora", "rank": 1})


@keras.saving.register_keras_serializable("zoo")
class Block(layers.Layer):
    """Makes its layers in `build`, keeps them in a list, and has a weight of its own."""

    def __init__(self, units: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.units = units

    def build(self, input_shape: Any) -> None:
        self.stack = [layers.Dense(self.units, activation="relu"), layers.Dense(input_shape[-1])]
        self.norm = layers.LayerNormalization()
        self.stack[0].build(input_shape)
        self.stack[1].build((*input_shape[:-1], self.units))
        self.norm.build(input_shape)
        self.gain = self.add_weight(shape=(), initializer="ones", name="gain")

    def call(self, x: Any) -> Any:
        y = x
        for layer in self.stack:
            y = layer(y)
        return self.norm(x + self.gain * y)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "units": self.units}


@specimen
def block_built_in_build() -> Specimen:
    x = keras.Input((DIM,))
    y = layers.Dense(2, name="head")(Block(6, name="second")(Block(5, name="first")(x)))
    apply = {"rank": 2, "train": [layers.LayerNormalization, "head"], "exclude": "second"}
    return Specimen(keras.Model(x, y), numbers(BATCH, DIM), numbers(BATCH, 2), apply)


@keras.saving.register_keras_serializable("zoo")
class Lazy(layers.Layer):
    """Has neither `build` nor `get_config`: Keras builds it by calling it and rebuilds it from its arguments."""

    def __init__(self, units: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.inner = layers.Dense(units, activation="gelu")
        self.outer = {"wide": layers.Dense(units), "narrow": layers.Dense(units)}

    def call(self, x: Any) -> Any:
        x = self.inner(x)
        return self.outer["wide"](x) + self.outer["narrow"](x)


@specimen
def lazy_layer() -> Specimen:
    x = keras.Input((DIM,))
    y = layers.Dense(2, name="head")(Lazy(6)(x))
    return Specimen(keras.Model(x, y), numbers(BATCH, DIM), numbers(BATCH, 2), {"adapter": "dora", "rank": 2})


@specimen
def nested() -> Specimen:
    inner_input = keras.Input((DIM,))
    inner = keras.Model(inner_input, Block(6)(layers.Dense(DIM)(inner_input)), name="inner")
    stack = keras.Sequential([keras.Input((DIM,)), layers.Dense(DIM, activation="relu"), layers.Dropout(0.0)], name="stack")
    x = keras.Input((DIM,))
    y = layers.Dense(2, name="head")(stack(inner(x)))
    return Specimen(keras.Model(x, y), numbers(BATCH, DIM), numbers(BATCH, 2), {"rank": 2, "train": "head"})


@specimen
def wrappers() -> Specimen:
    x = keras.Input((STEPS, DIM))
    y = layers.TimeDistributed(layers.Dense(DIM, activation="relu"))(x)
    y = layers.Bidirectional(layers.LSTM(4, return_sequences=True))(y)
    y = layers.Dense(3, name="head")(y)
    return Specimen(keras.Model(x, y), numbers(BATCH, STEPS, DIM), numbers(BATCH, STEPS, 3), {"rank": 2})


@keras.saving.register_keras_serializable("zoo")
class Subclassed(keras.Model):
    """A subclassed model with a list and a dict of layers."""

    def __init__(self, units: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.units = units
        self.blocks = [Block(units), layers.Dense(units, activation="relu")]
        self.branches = {"a": layers.Dense(units), "b": layers.Dense(units)}
        self.attention = layers.MultiHeadAttention(2, 3)
        self.head = layers.Dense(2, name="head")

    def call(self, x: Any) -> Any:
        for block in self.blocks:
            x = block(x)
        x = self.branches["a"](x) + self.branches["b"](x)
        return self.head(x + self.attention(x, x))

    def get_config(self) -> dict[str, Any]:
        return {"units": self.units, "name": self.name}


@specimen
def subclassed() -> Specimen:
    model, x = Subclassed(6), numbers(BATCH, STEPS, DIM)
    model(x)
    return Specimen(model, x, numbers(BATCH, STEPS, 2), {"rank": 2, "bias": "all"})


@keras.saving.register_keras_serializable("zoo")
class FunctionalSubclass(keras.Model):
    """A subclass that makes a functional graph in its constructor, as KerasHub's backbones do."""

    def __init__(self, units: int, **kwargs: Any):
        x = keras.Input((DIM,))
        hidden, out = [Block(units), layers.Dense(units, activation="relu")], layers.Dense(2)
        y = x
        for layer in hidden:
            y = layer(y)
        super().__init__(inputs=x, outputs=out(y), **kwargs)
        self.hidden, self.out = hidden, out
        self.units = units

    def get_config(self) -> dict[str, Any]:
        return {"units": self.units, "name": self.name}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        return cls(**config)


@specimen
def functional_subclass() -> Specimen:
    return Specimen(FunctionalSubclass(6), numbers(BATCH, DIM), numbers(BATCH, 2), {"adapter": "dora", "rank": 2})


@keras.saving.register_keras_serializable("zoo")
class Holder(keras.Model):
    """A subclassed model that is given a model and writes that into its config."""

    def __init__(self, encoder: Any, **kwargs: Any):
        super().__init__(**kwargs)
        self.encoder = encoder
        self.head = layers.Dense(2, name="head")

    def build(self, input_shape: Any) -> None:
        self.head.build(self.encoder.compute_output_shape(input_shape))

    def call(self, x: Any) -> Any:
        return self.head(self.encoder(x))

    def get_config(self) -> dict[str, Any]:
        return {"name": self.name, "encoder": keras.saving.serialize_keras_object(self.encoder)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        return cls(keras.saving.deserialize_keras_object(config["encoder"]), name=config["name"])


@specimen
def model_that_serialises_a_model() -> Specimen:
    x = keras.Input((DIM,))
    model = Holder(keras.Model(x, Block(6)(layers.Dense(DIM)(x)), name="encoder"))
    model.build((None, DIM))
    return Specimen(model, numbers(BATCH, DIM), numbers(BATCH, 2), {"rank": 2, "train": "head"})


@specimen
def convolutions() -> Specimen:
    x = keras.Input((8, 8, 4))
    y = layers.Conv2D(6, 3, strides=2, padding="same", activation="relu")(x)
    y = layers.BatchNormalization()(y)
    y = layers.Conv2D(6, 3, dilation_rate=2, padding="same")(y)
    y = layers.Dense(2, name="head")(layers.GlobalAveragePooling2D()(layers.DepthwiseConv2D(3)(y)))
    return Specimen(keras.Model(x, y), numbers(BATCH, 8, 8, 4), numbers(BATCH, 2), {"adapter": "dora", "rank": 2})


@specimen
def embedding() -> Specimen:
    x = keras.Input((STEPS,), dtype="int32")
    y = layers.Embedding(11, DIM, mask_zero=True, name="tokens")(x)
    y = layers.Dense(2, name="head")(layers.GlobalAveragePooling1D()(layers.Dense(DIM, name="dense")(y)))
    apply = {"rank": 2, "targets": ["tokens", "dense"]}
    # TensorFlow's gradient of a gather is sparse, and Adam treats the rows it lacks in a way of its own.
    return Specimen(keras.Model(x, y), ids(BATCH, STEPS), numbers(BATCH, 2), apply, resumed_elsewhere=2e-2)


@specimen
def tied_embedding() -> Specimen:
    x = keras.Input((STEPS,), dtype="int32")
    tokens = layers.ReversibleEmbedding(11, DIM, name="tokens")
    y = tokens(Block(6)(tokens(x)), reverse=True)
    return Specimen(keras.Model(x, y), ids(BATCH, STEPS), numbers(BATCH, STEPS, 11), {"rank": 2})


@specimen
def made_by_hand() -> Specimen:
    import keras_lora

    x = keras.Input((8, 8, 4))
    y = keras_lora.layers.LoRAConv2D(6, 3, rank=2)(x)
    y = keras_lora.LoRADense(5, adapter="dora", rank=1, activation="relu")(layers.Flatten()(y))
    return Specimen(keras.Model(x, layers.Dense(2)(y)), numbers(BATCH, 8, 8, 4), numbers(BATCH, 2), {"adapter": None})


@specimen
def mixed_bfloat16() -> Specimen:
    x = keras.Input((DIM,))
    y = layers.Dense(16, activation="relu", dtype="mixed_bfloat16")(x)
    y = layers.Dense(2, name="head", dtype="mixed_bfloat16")(y)
    return Specimen(keras.Model(x, y), numbers(BATCH, DIM), numbers(BATCH, 2), {"rank": 2}, tolerance=2e-2)


def _quantized(mode: str, attention: bool) -> Specimen:
    x = keras.Input((STEPS, DIM))
    y = layers.MultiHeadAttention(2, 4)(x, x) if attention else layers.EinsumDense("abc,cd->abd", (None, DIM))(x)
    y = layers.Dense(2, name="head")(layers.Dense(DIM, activation="relu")(y))
    model = keras.Model(x, y)
    model.quantize(mode)
    return Specimen(model, numbers(BATCH, STEPS, DIM), numbers(BATCH, STEPS, 2), {"rank": 2}, tolerance=1e-4)


@specimen
def int8() -> Specimen:
    return _quantized("int8", attention=False)


@specimen
def int4() -> Specimen:
    return _quantized("int4", attention=False)


@specimen
def int8_attention() -> Specimen:
    return _quantized("int8", attention=True)


@specimen
def discriminator() -> Specimen:
    normalized = layers.SpectralNormalization
    stack = [
        keras.Input((4, 4, 2)),
        normalized(layers.Conv2D(3, 2, activation="leaky_relu"), name="first"),
        layers.Flatten(),
        normalized(layers.Dense(DIM), name="second"),
        normalized(layers.Dense(1), name="head"),
    ]
    apply = {"rank": 2, "train": "head"}
    return Specimen(keras.Sequential(stack), numbers(BATCH, 4, 4, 2), numbers(BATCH, 1), apply)


if importlib.util.find_spec("keras_hub"):
    SLICE.append("hub_bert_classifier")


def _bert() -> Any:
    import keras_hub

    return keras_hub.models.BertBackbone(
        vocabulary_size=11,
        num_layers=2,
        num_heads=2,
        hidden_dim=DIM,
        intermediate_dim=16,
        max_sequence_length=STEPS,
        dropout=0,
    )


def _bert_inputs() -> dict[str, np.ndarray]:
    ones = np.ones((BATCH, STEPS), "int32")
    return {"token_ids": ids(BATCH, STEPS), "segment_ids": 0 * ones, "padding_mask": ones}


@specimen_of_keras_hub
def hub_bert_backbone() -> Specimen:
    y = {"sequence_output": numbers(BATCH, STEPS, DIM), "pooled_output": numbers(BATCH, DIM)}
    return Specimen(_bert(), _bert_inputs(), y, {"rank": 2})


@specimen_of_keras_hub
def hub_bert_classifier() -> Specimen:
    import keras_hub

    model = keras_hub.models.BertTextClassifier(_bert(), num_classes=2, preprocessor=None, dropout=0.0)
    apply = {"adapter": "dora", "rank": 2, "train": ["logits", "pooled_dense"]}
    return Specimen(model, _bert_inputs(), ids(BATCH, vocabulary=3) - 1, apply, {})


def _llama() -> Any:
    import keras_hub

    return keras_hub.models.LlamaBackbone(
        vocabulary_size=11, num_layers=2, num_query_heads=2, num_key_value_heads=1, hidden_dim=DIM, intermediate_dim=16
    )


def _llama_inputs() -> dict[str, np.ndarray]:
    return {"token_ids": ids(BATCH, STEPS), "padding_mask": np.ones((BATCH, STEPS), "int32")}


@specimen_of_keras_hub
def hub_llama_backbone() -> Specimen:
    return Specimen(_llama(), _llama_inputs(), numbers(BATCH, STEPS, DIM), {"rank": 2})


@specimen_of_keras_hub
def hub_llama_causal_lm() -> Specimen:
    import keras_hub

    model = keras_hub.models.LlamaCausalLM(_llama(), preprocessor=None)
    apply = {"rank": 2, "targets": ["query", "value"]}
    return Specimen(model, _llama_inputs(), ids(BATCH, STEPS), apply, {})
