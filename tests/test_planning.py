"""`plan`: its bytes are those of the step that Keras compiles, and no array is made for it."""

import json

import keras
import numpy as np
import pytest
from keras import layers
from test_rematerializing import Block

import keras_lora
from keras_lora import cli, memory
from keras_lora.compat import training_internals
from keras_lora.memory import planning

BACKEND = keras.backend.backend()
only_jax = pytest.mark.skipif(BACKEND != "jax", reason="XLA counts the bytes through JAX")
CROSSENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


@pytest.fixture(autouse=True)
def _compiled_as_for_a_user():
    """The tests may run with less of XLA's work; here it is what is counted."""
    if BACKEND != "jax":
        yield
        return
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def mlp():
    return keras.Sequential([keras.Input((32,)), layers.Dense(64, "relu", name="first"), layers.Dense(5, name="head")])


def convolution():
    inside = layers.Conv2D(8, 3, activation="relu"), layers.BatchNormalization(), layers.GlobalAveragePooling2D()
    return keras.Sequential([keras.Input((8, 8, 3)), *inside, layers.Dense(5)])


def encoder():
    inputs = keras.Input((None, 16))
    x = inputs
    for index in range(2):
        x = Block(name=f"block_{index}")(x)
    return keras.Model(inputs, layers.Dense(5)(x))


def decoder():
    import keras_hub

    sizes = {"num_query_heads": 4, "num_key_value_heads": 2, "hidden_dim": 32, "intermediate_dim": 48, "num_layers": 2}
    backbone = keras_hub.models.Llama3Backbone(vocabulary_size=200, **sizes)
    return keras_hub.models.Llama3CausalLM(backbone=backbone, preprocessor=None)


BATCHES = {
    mlp: (np.ones((16, 32), "float32"), np.ones(16, "int32")),
    convolution: (np.ones((4, 8, 8, 3), "float32"), np.ones(4, "int32")),
    encoder: (np.ones((4, 10, 16), "float32"), np.ones((4, 10), "int32")),
    decoder: ({name: np.ones((4, 10), "int32") for name in ("token_ids", "padding_mask")}, np.ones((4, 10), "int32")),
}


def measured(model, x, y):
    """The bytes of Keras's own training step, by XLA."""
    import jax

    model.compile(
        optimizer="adam", loss=CROSSENTROPY, metrics=[], **({"sampler": "greedy"} if "Hub" in repr(type(model)) else {})
    )
    model._symbolic_build(data_batch=(x, y))
    names = ("trainable_variables", "non_trainable_variables", "optimizer_variables", "metrics_variables")
    state = model._get_jax_state(**dict.fromkeys(names, True))
    found = jax.jit(model.train_step, donate_argnums=0).lower(state, (x, y)).compile().memory_analysis()
    more = found.output_size_in_bytes - found.alias_size_in_bytes
    return found.argument_size_in_bytes + found.temp_size_in_bytes + more


@only_jax
@pytest.mark.parametrize(
    ("made", "rank"),
    [
        pytest.param(made, rank, marks=() if made is mlp and rank else pytest.mark.nightly, id=f"{made.__name__}-{rank}")
        for made in BATCHES
        for rank in (None, 2)
    ],
)
def test_the_peak_is_that_of_the_step_that_keras_compiles(made, rank):
    x, y = BATCHES[made]
    model = made()
    found = keras_lora.plan(model, batch_size=len(y), sequence_length=10, loss=CROSSENTROPY, rank=rank)
    if rank:
        keras_lora.apply_lora(model, rank=rank)
    assert found.peak == pytest.approx(measured(model, x, y), rel=0.1)
    assert found.bytes["kept"] > 0
    assert found.parameters[1] == sum(int(np.prod(v.shape)) for v in model.trainable_variables)


@only_jax
def test_nothing_is_allocated_and_the_model_is_left_alone():
    with training_internals.unallocated():
        model = mlp()
    found = keras_lora.plan(model, batch_size=16, rank=2, base_dtype="bfloat16")
    assert not any(training_internals.has_value(v) for v in model.weights)
    assert len(model.trainable_variables) == 4
    assert found.weights["bfloat16"] == 2 * 32 * 64
    assert found.bytes["frozen"] == 2 * 32 * 64 + 4 * (64 + 64 * 5 + 5) + 4  # the strength


@only_jax
@pytest.mark.parametrize(
    ("base_dtype", "adapter"),
    [("nf4", "lora"), *(pytest.param(*each, marks=pytest.mark.nightly) for each in (("nf4", "dora"), ("int8", "lora")))],
)
def test_the_plan_of_a_quantised_base_is_that_of_the_model_itself(base_dtype, adapter):
    with training_internals.unallocated():
        model = mlp()
    found = keras_lora.plan(model, batch_size=16, rank=2, base_dtype=base_dtype, adapter=adapter)
    real = keras_lora.apply_lora(mlp(), adapter, rank=2, base_dtype=base_dtype)
    weights = {}
    for v in real.weights:
        weights[v.dtype] = weights.get(v.dtype, 0) + v.value.nbytes
    assert found.weights == weights
    assert found.bytes["frozen"] + found.bytes["trained"] == sum(weights.values())


@only_jax
def test_the_parts_of_a_plan_add_up_and_print():
    found = keras_lora.plan(mlp(), batch_size=16, rank=2)
    assert found.peak == sum(found.bytes[key] for key in ("frozen", "trained", "optimizer", "batch", "temporary"))
    assert found.bytes["gradients"] == found.bytes["trained"] == 4 * 2 * (32 + 64)
    assert found.bytes["logits"] == 4 * 16 * 5
    assert 0 <= found.bytes["optimizer"] - 2 * found.bytes["trained"] < 64  # Adam, and its counters
    assert found.data()["bytes"]["peak"] == found.peak
    assert "peak of a step" in str(found)
    assert "100 %" in str(found)


@only_jax
@pytest.mark.nightly
@pytest.mark.parametrize("optimizer", ["sgd", "adam", keras.optimizers.Adam(gradient_accumulation_steps=4, use_ema=True)])
def test_the_slots_of_an_optimizer_are_counted(optimizer):
    slots = 4 if not isinstance(optimizer, str) else {"sgd": 0, "adam": 2}[optimizer]
    found = keras_lora.plan(mlp(), batch_size=16, optimizer=optimizer)
    assert 0 <= found.bytes["optimizer"] - slots * found.bytes["trained"] < 64  # and its counters


@only_jax
def test_a_mesh_splits_the_batch_and_what_the_map_splits():
    split = keras_lora.plan(
        mlp(), batch_size=16, mesh={"batch": 2, "model": 4}, layout_map={"first/kernel": (None, "model")}
    )
    trained = 4 * (32 * 64 // 4 + 64 + 64 * 5 + 5)
    assert split.bytes["batch"] == 8 * 4 * (32 + 1)
    assert split.bytes["trained"] == trained
    assert 0 <= split.bytes["optimizer"] - 2 * trained < 64  # Adam, and its counters
    with pytest.raises(ValueError, match=r"names axes \['rows'\] that `mesh` does not have"):
        keras_lora.plan(mlp(), batch_size=16, mesh={"batch": 2}, layout_map={"kernel": (None, "rows")})
    with pytest.raises(ValueError, match="must be a multiple of the 2 devices"):
        keras_lora.plan(mlp(), batch_size=15, mesh={"batch": 2})


@only_jax
def test_an_open_size_is_asked_for():
    with pytest.raises(ValueError, match=r"with an open size\. Pass `sequence_length`"):
        keras_lora.plan(encoder(), batch_size=4)


@pytest.mark.skipif(BACKEND == "jax", reason="JAX can")
def test_other_backends_are_told_to_plan_on_jax():
    with pytest.raises(NotImplementedError, match="KERAS_BACKEND=jax"):
        keras_lora.plan(mlp())


@only_jax
@pytest.mark.nightly
def test_the_command_reads_no_weights(tmp_path, capsys):
    mlp().save(tmp_path / "net.keras")
    words = [str(tmp_path / "net.keras"), "--batch-size", "16", "--rank", "2", "--json"]
    assert cli.main(["plan", *words]) == 0
    full, lora = json.loads(capsys.readouterr().out)
    assert full["bytes"] == memory.plan(mlp(), batch_size=16).bytes
    assert lora["bytes"] == memory.plan(mlp(), batch_size=16, rank=2).bytes
    assert cli.main(["plan", *words[:-1], "--mesh", "batch"]) == 2
    assert "Expected --mesh as names and sizes" in capsys.readouterr().err


@pytest.mark.once
def test_bytes_are_readable():
    assert [planning.readable(each) for each in (512, 5_240_000, 9_720_000_000)] == ["512 B", "5.24 MB", "9.72 GB"]
