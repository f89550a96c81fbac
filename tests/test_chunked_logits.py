"""`chunk_logits`: losses, gradients and metrics of chunks are those of the whole batch, and its logits never exist."""

import keras
import numpy as np
import pytest
from helpers import covering, difference, once, value
from keras import layers

import keras_lora
from keras_lora import backend
from keras_lora.compat import call_internals

WORDS = 31
RNG = np.random.default_rng(0)
IDS = RNG.integers(1, WORDS, (3, 7)).astype("int32")
IDS[:, -1] = 0
LABELS = RNG.integers(0, WORDS, (3, 7)).astype("int32")
WEIGHTS = RNG.random((3, 7)).astype("float32")


def model(kind="tied", cap=None, mask=False, **kwargs):
    keras.utils.set_random_seed(0)
    embedding = layers.ReversibleEmbedding(WORDS, 8, tie_weights=kind != "untied", mask_zero=mask, name="table", **kwargs)
    ids = keras.Input((7,), dtype="int32")
    x = layers.Dense(8, activation="tanh", name="inner", **kwargs)(embedding(ids))
    if kind == "dense":
        return keras.Model(ids, layers.Dense(WORDS, name="head", **kwargs)(x))
    if kind == "einsum":
        return keras.Model(ids, layers.EinsumDense("abc,cd->abd", (7, WORDS), bias_axes="d", name="head", **kwargs)(x))
    y = embedding(x, reverse=True)
    return keras.Model(ids, y if cap is None else keras.ops.tanh(y / cap) * cap)


def trained(built, tokens, loss=None, weights=WEIGHTS, metrics=True, x=IDS, **kwargs):
    """What one step of plain gradient descent changes, its logs, and what `evaluate` gives."""
    if tokens is not None:
        keras_lora.chunk_logits(built, tokens=tokens)
    loss = loss or keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    metrics = {"metrics": ["accuracy"], "weighted_metrics": ["sparse_top_k_categorical_accuracy"]} if metrics else {}
    built.compile(keras.optimizers.SGD(1.0), loss, **metrics, **kwargs)
    before = [value(v).copy() for v in built.trainable_variables]
    logs = built.fit(x, LABELS, sample_weight=weights, batch_size=3, verbose=0, shuffle=False).history
    steps = [value(v) - old for v, old in zip(built.trainable_variables, before, strict=True)]
    found = built.evaluate(x, LABELS, sample_weight=weights, batch_size=3, verbose=0, return_dict=True)
    return steps, {key: each[0] for key, each in logs.items()}, found


def compare(make, tokens=4, within=1e-5, **kwargs):
    (dense, logs, found), (chunked, our_logs, ours) = trained(make(), None, **kwargs), trained(make(), tokens, **kwargs)
    largest = max(float(np.abs(each).max()) for each in dense)
    assert largest > 1e-3
    assert max(float(np.abs(a - b).max()) for a, b in zip(dense, chunked, strict=True)) < within * largest
    assert our_logs == pytest.approx(logs, rel=max(within, 1e-5))
    assert ours == pytest.approx(found, rel=max(10 * within, 1e-5))


def adapted(kind="tied", adapter="lora", base=None, **kwargs):
    built = model(kind, **kwargs)
    if base is not None and base.startswith("int"):
        built.quantize(base)
    head = {"tied": "table", "untied": ["table", "table:reverse_embeddings"]}.get(kind, "head")
    targets = ["inner", *([head] if isinstance(head, str) else ["table"])]
    keras_lora.apply_lora(built, adapter, rank=2, targets=targets, **({"base_dtype": base} if base == "bfloat16" else {}))
    for number, v in enumerate(built.trainable_variables):
        v.assign(np.random.default_rng(number).normal(size=v.shape) * 0.3)
    return built


@pytest.mark.torch_first
def test_a_whole_model_has_the_gradients_of_the_dense_loss():
    compare(lambda: model(cap=0.5))


@pytest.mark.every_backend
def test_an_adapted_tied_table_has_the_gradients_of_the_dense_loss():
    compare(lambda: adapted(cap=0.5), metrics=keras.backend.backend() == "torch")  # JAX compiles them for seconds


@pytest.mark.torch_first
@pytest.mark.full
@pytest.mark.parametrize("kind", ["untied", "dense", "einsum"])
@pytest.mark.parametrize("make", [pytest.param(model, marks=pytest.mark.nightly), adapted], ids=["whole", "adapted"])
def test_each_kind_of_head(kind, make):
    compare(lambda: make(kind))


@pytest.mark.parametrize("tokens", covering([1, 7, 21, 100], [], pytest.mark.nightly, quick=[7, 100]))
@pytest.mark.full
def test_each_size_of_a_chunk(tokens):
    compare(model, tokens)


@pytest.mark.torch_first
@pytest.mark.full
def test_a_dora_on_the_head():
    compare(lambda: adapted("dense", "dora"))


@pytest.mark.full
@pytest.mark.parametrize("base", covering(["int8", "int4", "bfloat16"], [], pytest.mark.nightly, quick=["int8"]))
def test_reduced_bases(base):
    # Keras rounds the input of a quantised layer, and bfloat16 the logits: a sum of them in another order is another number.
    compare(lambda: adapted(base=base), within=1e-2 if base == "bfloat16" else 1e-4)


@pytest.mark.full
@pytest.mark.parametrize(
    "policy", covering(["mixed_bfloat16", "mixed_float16"], [], pytest.mark.nightly, quick=["mixed_float16"])
)
def test_mixed_precision(policy):
    # Without metrics: on TensorFlow, Keras's top k takes float32 alone.
    compare(lambda: adapted("dense", dtype=policy), within=3e-2, metrics=False)


@pytest.mark.torch_first
@pytest.mark.parametrize(
    ("reduction", "weights", "mask"),
    [
        pytest.param("sum_over_batch_size", WEIGHTS, True, id="mean"),
        pytest.param("mean_with_sample_weight", WEIGHTS, True, id="weighted mean", marks=pytest.mark.full),
        pytest.param("sum", None, False, id="sum", marks=pytest.mark.full),
    ],
)
def test_reductions_weights_and_masks(reduction, weights, mask):
    reductions(reduction, weights, mask)


@pytest.mark.nightly
@pytest.mark.parametrize("reduction", ["sum", "sum_over_batch_size", "mean_with_sample_weight"])
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "weights"])
@pytest.mark.parametrize("mask", [False, True], ids=["all", "masked"])
def test_all_reductions_weights_and_masks(reduction, weights, mask):
    reductions(reduction, weights, mask)


def reductions(reduction, weights, mask):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction, ignore_class=int(LABELS[0, 0]))
    # Without metrics: on torch, Keras's dense loss multiplies the sample weights that its metrics see by the mask.
    compare(lambda: model("dense", mask=mask), loss=loss, weights=weights, metrics=False)


@pytest.mark.torch_first
def test_regularizers_and_loss_weights_count_too():
    def make():
        built = model("dense")
        built.get_layer("inner").kernel.regularizer = keras.regularizers.L2(0.1)
        return built

    compare(make, loss_weights=[0.5])


@pytest.mark.torch_first
@pytest.mark.full
def test_eagerly_and_with_gradient_accumulation():
    compare(model, run_eagerly=True)
    found = []
    for tokens in (None, 4):
        built = model()
        if tokens:
            keras_lora.chunk_logits(built, tokens=tokens)
        built.compile(keras.optimizers.SGD(1.0, gradient_accumulation_steps=3), "sparse_categorical_crossentropy")
        built.fit(IDS, LABELS, batch_size=1, verbose=0, shuffle=False)
        found.append([value(v) for v in built.weights])
    assert difference(*found) < 1e-5


@pytest.mark.nightly  # TensorFlow differs: JAX always compiles so, torch needs a C++ compiler for it
@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="`jit_compile` is tested on TensorFlow")
def test_compiled_by_xla():
    compare(adapted, jit_compile=True)


@pytest.mark.torch_first
def test_dropout_on_the_head_draws_anew_for_each_chunk():
    built = keras_lora.apply_lora(model("dense"), keras_lora.LoRA(rank=2, dropout=0.5, seed=1), targets=["head"])
    keras_lora.chunk_logits(built, tokens=4)
    built.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    built.fit(IDS, LABELS, batch_size=3, verbose=0)
    (state,) = call_internals.seed_states(built.get_layer("head"))
    draws = value(state)[1]
    built.fit(IDS, LABELS, batch_size=3, verbose=0)
    assert value(state)[1] - draws == 6  # 21 tokens, 4 at a time


@pytest.mark.every_backend
def test_no_step_sees_the_logits_of_the_batch_or_a_gradient_of_a_frozen_table(monkeypatch):
    built = keras_lora.chunk_logits(adapted("dense"), tokens=4)
    built.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), weighted_metrics=["accuracy"])
    rows = []
    head = built.get_layer("head")
    call = type(head).call

    def watched(self, x, **kwargs):
        if self is head:
            rows.append(tuple(x.shape[:-1]))
        return call(self, x, **kwargs)

    trained, plain = [], backend.sum_of_chunks

    def sum_of_chunks(chunk, size, tensors, *args, **kwargs):
        trained.extend(tuple(each.shape) for each in tensors)
        return plain(chunk, size, tensors, *args, **kwargs)

    monkeypatch.setattr(type(head), "call", watched)
    monkeypatch.setattr(backend, "sum_of_chunks", sum_of_chunks)
    built.fit(IDS, LABELS, batch_size=3, verbose=0)
    built.evaluate(IDS, LABELS, batch_size=3, verbose=0)
    whole = [shape for shape in rows if shape not in ((1, 4), (1, 1), (1, None))]
    assert len(rows) > len(whole)
    assert whole in ([], [(3, 7)])  # Keras asks once for the shape of the output, without numbers
    assert set(trained) == {(8, 2), (2, WORDS)}  # the two factors, but not the frozen kernel


@pytest.mark.every_backend
def test_predict_calls_files_and_the_undo(tmp_path):
    built = adapted("dense")
    before = built.predict(IDS, verbose=0)
    keras_lora.chunk_logits(built, tokens=4)
    built.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    built.evaluate(IDS, LABELS, verbose=0)
    assert (built.predict(IDS, verbose=0) == before).all()
    assert built(IDS).shape == (3, 7, WORDS)
    built.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert difference(loaded.predict(IDS, verbose=0), before) < 1e-6
    assert not {"call", "train_step", "compute_loss"} & set(vars(loaded))
    keras_lora.chunk_logits(built, tokens=None)
    assert not {"call", "train_step", "compute_loss"} & set(vars(built))
    built.evaluate(IDS, LABELS, verbose=0)


@pytest.mark.torch_first
@pytest.mark.full
def test_gpt2_trains_and_generates():
    def make():
        keras.utils.set_random_seed(0)
        sizes = {"num_layers": 1, "num_heads": 2, "hidden_dim": 8, "intermediate_dim": 16, "max_sequence_length": 7}
        backbone = keras_hub.models.GPT2Backbone(vocabulary_size=WORDS, dropout=0.0, **sizes)
        built = keras_hub.models.GPT2CausalLM(backbone, preprocessor=None)
        keras_lora.apply_lora(built, rank=2)
        for number, v in enumerate(built.trainable_variables):
            v.assign(np.random.default_rng(number).normal(size=v.shape) * 0.3)
        return built

    keras_hub = pytest.importorskip("keras_hub")
    prompts = {"token_ids": IDS * (np.arange(7) < 3), "padding_mask": np.tile(np.arange(7) < 3, (3, 1)).astype("int32")}
    compare(make, x={"token_ids": IDS, "padding_mask": np.ones_like(IDS)})
    built, found = make(), []
    for tokens in (None, 4):
        keras_lora.chunk_logits(built, tokens=tokens)
        built.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), sampler="greedy")
        found.append(np.asarray(built.generate(prompts, stop_token_ids=None)["token_ids"]))
    assert (found[0][:, 3:] != 0).any()
    assert (found[0] == found[1]).all()


@pytest.mark.torch_first
@pytest.mark.full
def test_before_apply_lora_and_after_remove_lora():
    def make(tokens=None):
        built = model("dense")
        if tokens:
            keras_lora.chunk_logits(built, tokens=tokens)
        return keras_lora.remove_lora(keras_lora.apply_lora(built, rank=2, targets=["head"]))

    (dense, *_), (chunked, *_) = trained(make(), None), trained(make(4), None)
    assert difference(chunked, dense) < 1e-5


@once
def test_models_and_losses_that_cannot_be_split_are_refused():
    ids = keras.Input((7,), dtype="int32")
    x = layers.Embedding(WORDS, 8)(ids)
    for refused, words in [
        (keras.Model(ids, layers.LayerNormalization()(x)), "a LayerNormalization called"),
        (keras.Model(ids, layers.Dense(5)(x)[:, 2:, :]), "mix or select positions"),
        (keras.Model(ids, layers.Dense(5)(x)[:, 3:, :]), "mix or select positions"),
        (keras.Model(ids, keras.ops.cumsum(layers.Dense(5)(x), axis=1)), "mix or select positions"),
        (keras.Model(ids, [layers.Dense(5)(x), layers.Dense(5)(x)]), "with 2 outputs"),
        (keras.Model(ids, layers.Dense(5)(x) + layers.Dense(5)(x)), "with 2 inputs"),
        (keras.Model(ids, layers.Dense(5, activity_regularizer="l2")(x)), "activity_regularizer"),
    ]:
        with pytest.raises(ValueError, match=words):
            keras_lora.chunk_logits(refused)
        assert "call" not in vars(refused)

    class Own(keras.Model):
        def train_step(self, *args):
            return super().train_step(*args)

    with pytest.raises(ValueError, match="`train_step`"):
        keras_lora.chunk_logits(Own(ids, layers.Dense(5)(x)))
    with pytest.raises(ValueError, match="tokens"):
        keras_lora.chunk_logits(model(), tokens=0)
    for loss in (None, keras.losses.SparseCategoricalCrossentropy(reduction="none")):
        built = keras_lora.chunk_logits(model())
        built.compile("sgd", loss)
        with pytest.raises(ValueError, match="needs one loss"):
            built.fit(IDS, LABELS, verbose=0)
    built = keras_lora.chunk_logits(model())
    built.compile("sgd", "sparse_categorical_crossentropy")
    with pytest.raises(ValueError, match="an entry for each position"):
        built.fit(IDS, LABELS, sample_weight=np.ones((3, 1)), verbose=0)
