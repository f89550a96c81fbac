"""`rematerialize`: the same outputs, gradients and states as without it, and fewer bytes kept."""

import keras
import numpy as np
import pytest
from helpers import perturb
from keras import layers, ops

import keras_lora

BACKEND = keras.backend.backend()
WIDTH, TOKENS, WORDS = 16, 12, 30


@keras.saving.register_keras_serializable("tests")
class Block(layers.Layer):
    """A transformer block with dropout, a mask, a loss of its own and a state that training writes."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.attention = layers.MultiHeadAttention(2, WIDTH // 2, dropout=0.2, seed=1)
        self.first, self.second = layers.Dense(4 * WIDTH, "gelu"), layers.Dense(WIDTH)
        self.norm, self.dropout = layers.BatchNormalization(), layers.Dropout(0.3, seed=2)
        self.supports_masking = True

    def build(self, shape):
        self.attention.build(shape, shape)
        self.first.build(shape)
        self.second.build((*shape[:-1], 4 * WIDTH))
        self.norm.build(shape)

    def call(self, x):
        x = x + self.attention(x, x)
        y = self.second(self.dropout(self.first(x)))
        self.add_loss(0.01 * ops.mean(ops.square(y)))
        return self.norm(x + y)


def built(dtype=None, blocks=3):
    keras.utils.set_random_seed(0)
    with keras.name_scope("rematerializing"):
        ids = keras.Input((TOKENS,), dtype="int32")
        x = layers.Embedding(WORDS, WIDTH, mask_zero=True, dtype=dtype)(ids)
        for index in range(blocks):
            x = Block(name=f"block_{index}", dtype=dtype)(x)
        return keras.Model(ids, layers.Dense(1, dtype=dtype, name="head")(layers.GlobalAveragePooling1D(dtype=dtype)(x)))


def batch():
    rng = np.random.default_rng(0)
    return rng.integers(0, WORDS, (4, TOKENS)).astype("int32"), rng.normal(size=(4, 1)).astype("float32")


def trained(change, *, steps=2, eager=False, xla=False, dtype=None, adapter=None, blocks=3):
    """The losses of some steps, and every variable after them."""
    model = built(dtype, blocks)
    if adapter is not None:
        keras_lora.apply_lora(model, adapter, train="head")
        perturb(model, 0.1)
    change(model)
    options = {"run_eagerly": True} if eager else {"jit_compile": xla} if BACKEND == "tensorflow" else {}
    model.compile(keras.optimizers.SGD(0.01), "mse", **options)
    x, y = batch()
    losses = [float(model.train_on_batch(x, y)) for _ in range(steps)]
    return losses, [ops.convert_to_numpy(v) for v in model.variables]


ADAPTERS = {"full": None, "lora": keras_lora.LoRA(4, dropout=0.1, seed=3), "dora": keras_lora.DoRA(4)}


def everything(model):
    return keras_lora.rematerialize(model, [each for each in model.layers if isinstance(each, Block)])


def compare(**options):
    losses, values = trained(lambda model: None, **options)
    again_losses, again = trained(everything, **options)
    assert losses[0] != losses[1]
    assert again_losses == pytest.approx(losses, rel=1e-5)
    for new, old in zip(again, values, strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-5, atol=1e-5)


def test_training_is_the_same():
    compare(adapter=keras_lora.LoRA(4), blocks=1, eager=BACKEND == "tensorflow")  # it compiles for long


@pytest.mark.nightly
@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize(
    "how",
    [
        "compiled",
        "eager",
        pytest.param("xla", marks=pytest.mark.skipif(BACKEND != "tensorflow", reason="the others compile in one way")),
    ],
)
def test_training_of_every_kind_is_the_same(name, how):
    compare(adapter=ADAPTERS[name], eager=how == "eager", xla=how == "xla")


@pytest.mark.parametrize("dtype", [pytest.param("mixed_bfloat16", marks=pytest.mark.nightly)])
def test_training_in_mixed_precision_is_the_same(dtype):
    losses, _ = trained(lambda model: None, dtype=dtype, adapter="lora", steps=2)
    again, _ = trained(keras_lora.rematerialize, dtype=dtype, adapter="lora", steps=2)
    assert again == pytest.approx(losses, rel=1e-2)


def kept(model):
    """The bytes that a step keeps for the backward pass, or in all on JAX."""
    x, _ = batch()
    if BACKEND == "torch":
        import torch

        found = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: found.update({t.data_ptr(): t.nbytes}) or t, lambda t: t):
            model(x, training=True).sum()
        return sum(found.values())
    import jax

    trained, fixed = ([v.value for v in group] for group in (model.trainable_variables, model.non_trainable_variables))

    def loss(trained, fixed, x):
        return ops.sum(model.stateless_call(trained, fixed, x, training=True)[0])

    before = jax.config.read("jax_disable_most_optimizations")  # the tests may run with less of XLA's work
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        return jax.jit(jax.grad(loss)).lower(trained, fixed, x).compile().memory_analysis().temp_size_in_bytes
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


@pytest.mark.torch_first
@pytest.mark.skipif(BACKEND == "tensorflow", reason="TensorFlow does not say what it keeps")
def test_fewer_bytes_are_kept_and_undoing_it_keeps_them_again():
    model = keras_lora.apply_lora(built(), rank=2)
    before = kept(model)
    keras_lora.rematerialize(model)
    assert kept(model) < 0.6 * before
    keras_lora.rematerialize(model, undo=True)
    assert keras_lora.memory.rematerialized(model) == []
    assert kept(model) == before


@pytest.mark.once
def test_blocks_are_chosen_as_for_apply_lora_or_given():
    model = built()
    keras_lora.rematerialize(model, slice(-1, None))
    assert keras_lora.memory.rematerialized(model) == ["block_2"]
    keras_lora.rematerialize(model, [model.get_layer("block_0")])
    assert keras_lora.memory.rematerialized(model) == ["block_0", "block_2"]
    keras_lora.rematerialize(model, undo=True)
    with pytest.raises(ValueError, match=r"cannot choose blocks: blocks=7 names no block at \[7\]"):
        keras_lora.rematerialize(model, 7)
    with pytest.raises(ValueError, match="must be layers of"):
        keras_lora.rematerialize(model, [layers.Dense(1, name="stranger")])
    with pytest.raises(ValueError, match="found no repeated blocks"):
        keras_lora.rematerialize(keras.Sequential([keras.Input((4,)), layers.Dense(2)]))
    assert keras_lora.memory.rematerialized(model) == []


@pytest.mark.once
def test_a_block_that_writes_what_it_does_not_own_is_refused():
    outside = keras.Variable(0.0, trainable=False)

    class Writer(layers.Layer):
        def call(self, x):
            outside.assign_add(1.0)
            return x

    model = keras.Sequential([keras.Input((4,)), Writer()])
    keras_lora.rematerialize(model, model.layers)
    with pytest.raises(ValueError, match="writes a variable that belongs to another"):
        model(np.ones((1, 4), "float32"))
