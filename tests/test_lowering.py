"""A whole training step lowers for TPU and for CUDA, on a CPU: no operation lacks a translation, and nothing is float64."""

import re

import keras
import numpy as np
import pytest
from keras import layers

import keras_lora
from keras_lora import adapters

pytestmark = pytest.mark.skipif(keras.backend.backend() != "jax", reason="JAX lowers for devices that are not there")

TOKENS, WORDS, WIDTH = 12, 32, 16
#: Methods of the table that do not start from a rank.
STARTED = {"trainable_tokens": lambda: keras_lora.TrainableTokens([1, 5])}
#: Every method of the table, and dropout.
METHODS = {name: STARTED.get(name, lambda name=name: adapters.get(name, rank=2)) for name in adapters.TABLE}
METHODS["dropout"] = lambda: keras_lora.LoRA(2, dropout=0.1, seed=0)
#: How the base is reduced: arguments of `apply_lora`, or the mode of Keras's `quantize`.
BASES = {"float32": {}, "bfloat16": {"base_dtype": "bfloat16"}, "int8": "int8", "int4": "int4"}
QUICK = {("lora", "float32"), ("dora", "bfloat16"), ("dropout", "int4")}


def language_model():
    x = inputs = keras.Input((TOKENS,), dtype="int32")
    table = layers.ReversibleEmbedding(WORDS, WIDTH, name="table")
    x = table(x)
    x = layers.MultiHeadAttention(2, 8, name="attention")(x, x, use_causal_mask=True)
    x = layers.Conv1D(WIDTH, 3, padding="causal", name="conv")(x)
    x = layers.Dense(WIDTH, activation="gelu", name="dense")(x)
    return keras.Model(inputs, table(x, reverse=True))


def traced_step(method, base):
    """A traced step of training: forward, backward and Adam."""
    import jax

    model = language_model()
    if isinstance(base, str):
        model.quantize(base)
    kinds = (
        [layers.ReversibleEmbedding] if method == "trainable_tokens" else [layers.Dense, layers.EinsumDense, layers.Conv1D]
    )
    if isinstance(base, str):
        kinds = [kind for kind in kinds if kind is not layers.Conv1D]
    reduced = {} if isinstance(base, str) else base
    keras_lora.apply_lora(model, METHODS[method](), targets=kinds, head=None, **reduced)
    optimizer = keras.optimizers.Adam(1e-3)
    optimizer.build(model.trainable_variables)

    def step(trained, frozen, optimizer_state, x, y):
        def loss(trained):
            out, after = model.stateless_call(trained, frozen, x, training=True)
            return keras.ops.mean(keras.losses.sparse_categorical_crossentropy(y, out, from_logits=True)), after

        (value, after), gradients = jax.value_and_grad(loss, has_aux=True)(trained)
        trained, optimizer_state = optimizer.stateless_apply(optimizer_state, gradients, trained)
        return value, trained, after, optimizer_state

    groups = model.trainable_variables, model.non_trainable_variables, optimizer.variables
    tokens = np.ones((2, TOKENS), "int32")
    return jax.jit(step).trace(*([v.value for v in group] for group in groups), tokens, tokens)


def cases():
    for method in METHODS:
        for base in BASES:
            marks = () if (method, base) in QUICK else pytest.mark.nightly
            yield pytest.param(method, BASES[base], id=f"{method}-{base}", marks=marks)


@pytest.mark.full
@pytest.mark.parametrize(("method", "base"), [*cases()])
def test_a_training_step_lowers_for_tpu_and_cuda_without_float64(method, base):
    traced = traced_step(method, base)
    for platform in ("tpu", "cuda"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert "stablehlo.dot_general" in text
        assert not re.search(r"\bf64|xf64", text)


def test_float64_would_be_seen():
    import jax

    with jax.enable_x64(True):
        text = jax.jit(lambda x: x * 2).trace(np.ones(2)).lower(lowering_platforms=("tpu",)).as_text()
    assert re.search(r"\bf64|xf64", text)
