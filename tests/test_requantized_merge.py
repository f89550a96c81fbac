"""Merging into a base that stays quantised: what is stored, what is lost, and that it is said."""

import keras
import keras_hub
import numpy as np
import pytest
from helpers import difference, outputs, perturb, value
from keras import layers
from keras.quantizers import Int4QuantizationConfig

import keras_lora
from keras_lora.swap.adapted import AdaptedContainer, adapted_maps, maps_by_address

pytestmark = [pytest.mark.torch_first, pytest.mark.filterwarnings("ignore:The use of `x.T` on tensors:UserWarning")]
TOKENS = np.random.default_rng(0).integers(0, 40, (2, 6))
KINDS = {"int8": None, "int4": Int4QuantizationConfig(block_size=-1), "int4 blocks": Int4QuantizationConfig(block_size=8)}
TARGETS = ["words", "table", "dense", "einsum", "words/reverse_embeddings"]


def quantised(kind, extra=lambda h: h):
    """A model with every layer type that Keras quantises, stored as `kind` and adapted."""
    ids = keras.Input((6,), dtype="int32")
    words = layers.ReversibleEmbedding(40, 12, tie_weights=False, name="words")
    h = layers.add([words(ids), layers.Embedding(40, 12, name="table")(ids)])
    h = layers.Dense(11, activation="tanh", name="dense")(h)
    h = layers.EinsumDense("abc,cde->abde", (None, 3, 4), activation="tanh", name="einsum")(h)
    model = keras.Model(ids, words(extra(layers.Reshape((6, 12))(h)), reverse=True))
    for name in ("words", "table", "dense", "einsum") if kind in KINDS else ():
        model.get_layer(name).quantize(kind.split()[0], config=KINDS[kind])
    base_dtype = None if kind in KINDS else kind
    keras_lora.apply_lora(model, keras_lora.LoRA(2, seed=0), targets=TARGETS, base_dtype=base_dtype)
    return model


def kernels(model):
    return {address: value(linear.kernel) for address, linear in maps_by_address(model).items()}


def bits(model):
    return {v.path: value(v).copy() for v in model.weights}


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("int8", marks=pytest.mark.nightly),
        pytest.param("int4", marks=pytest.mark.full),
        "int4 blocks",
        "nf4",
        pytest.param("bfloat16", marks=pytest.mark.full),
    ],
)
def test_a_base_stays_as_it_is_stored_and_the_change_is_in_it(tmp_path, capsys, kind):
    model = quantised(kind)
    perturb(model, size=0.1)
    adapted, before, found = outputs(model, TOKENS), bits(model), kernels(model)
    changed = {address: value(linear.changed_kernel(change)) for address, (linear, change) in adapted_maps(model).items()}
    losses = keras_lora.list_merge_losses(model)
    assert all(np.array_equal(each, before[path]) for path, each in bits(model).items())
    assert [row.layer for row in losses] == ["words", "words/reverse_embeddings", "table", "dense", "einsum"]
    assert {row.stored_as for row in losses} == {kind.split()[0]}

    keras_lora.merge_lora(model, keep=True, requantize=True)
    assert str(losses) in capsys.readouterr().out
    now = kernels(model)
    for row, address in zip(losses, changed, strict=True):
        wanted = changed[address]
        lost = np.linalg.norm(now[address] - wanted) / np.linalg.norm(wanted - found[address])
        assert row.lost == pytest.approx(lost, rel=1e-3)
        assert 0 < row.lost < 0.3
    merged, stored = outputs(model, TOKENS), bits(model)
    assert set(stored) == {path for path in before if "lora" not in path and "strength" not in path}
    assert all(each.dtype == before[path].dtype for path, each in stored.items())
    assert 0 < difference(merged, adapted) < 0.6
    assert not any("lora" in v.path for v in model.trainable_variables)

    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert difference(outputs(loaded, TOKENS), merged) == 0
    assert len(loaded.trainable_variables) == len(model.trainable_variables)
    keras_lora.unmerge_lora(model)
    assert all(np.array_equal(each, before[path]) for path, each in bits(model).items())
    assert difference(outputs(model, TOKENS), adapted) == 0
    keras_lora.remove_lora(keras_lora.apply_lora(loaded, rank=1, targets="dense"))
    assert difference(outputs(loaded, TOKENS), merged) == 0
    assert type(loaded.get_layer("table")) is layers.Embedding or kind in ("nf4", "bfloat16")


@pytest.mark.every_backend
def test_the_codes_and_the_loss_in_int8_are_those_of_numpy(capsys):
    layer = layers.Dense(5, use_bias=False)
    model = keras.Sequential([keras.Input((7,)), layer])
    layer.quantize("int8")
    start = value(layer.kernel) / value(layer.kernel_scale)
    keras_lora.apply_lora(model, rank=2, head=None)
    perturb(model, size=0.01)
    wanted = start + 8 * value(layer.adapter.lora_a) @ value(layer.adapter.lora_b)
    keras_lora.merge_lora(model, requantize=True)
    assert type(layer) is layers.Dense
    scale = 127 / np.abs(wanted).max(axis=0)
    assert np.allclose(value(layer.kernel_scale), scale, rtol=1e-5)
    assert np.abs(value(layer.kernel) - np.round(wanted * scale)).max() <= 1  # a half may be rounded either way
    lost = np.linalg.norm(value(layer.kernel) / value(layer.kernel_scale) - wanted) / np.linalg.norm(wanted - start)
    assert f"{100 * lost:.3g} %" in capsys.readouterr().out


@pytest.mark.every_backend
def test_a_change_that_is_smaller_than_a_step_is_lost_and_no_change_loses_nothing():
    model = keras.Sequential([keras.Input((16,)), layers.Dense(16, name="one"), layers.Dense(16, name="two")])
    model.quantize("int4", config=KINDS["int4"])
    keras_lora.apply_lora(model, rank=1, head=None)
    model.get_layer("one").adapter.lora_b.assign(np.full((1, 16), 1e-4))
    before = bits(model)
    losses = {row.layer: row.lost for row in keras_lora.list_merge_losses(model)}
    assert losses["one"] > 0.8
    assert losses["two"] == 0
    keras_lora.merge_lora(model, requantize=True)
    assert all(np.array_equal(each, before[path]) for path, each in bits(model).items() if path.startswith("two"))
    with pytest.raises(ValueError, match=r"`list_merge_losses\(\)` found no adapter"):
        keras_lora.list_merge_losses(model)


def test_without_the_word_a_quantised_base_is_refused_and_named():
    model = quantised("int8")
    with pytest.raises(ValueError, match=r"mostly rounded away.*requantize=True.*list_merge_losses"):
        keras_lora.merge_lora(model)


@pytest.mark.parametrize("kind", [pytest.param("int8", marks=pytest.mark.full), "nf4"])
def test_what_keras_would_forget_in_a_file_comes_back(tmp_path, kind):
    """Keras rebuilds a MultiHeadAttention without what is quantised in it."""
    i = keras.Input((6, 8))
    model = keras.Model(i, layers.MultiHeadAttention(2, 4, name="attention")(i, i))
    model.quantize("int8") if kind == "int8" else None
    keras_lora.apply_lora(model, rank=2, base_dtype=None if kind == "int8" else "nf4")
    perturb(model)
    keras_lora.merge_lora(model, requantize=True)
    x = np.random.default_rng(0).normal(size=(2, 6, 8)).astype("float32")
    expected = outputs(model, x)
    for _ in range(2):
        model.save(tmp_path / "m.keras")
        model = keras.saving.load_model(tmp_path / "m.keras")
        assert difference(outputs(model, x), expected) == 0
    keras_lora.apply_lora(model, rank=2)
    if kind == "nf4":
        keras_lora.merge_lora(model)
        assert not any(isinstance(each, AdaptedContainer) for each in model._flatten_layers())
    else:
        keras_lora.remove_lora(model)
    assert difference(outputs(model, x), expected) < 1e-5


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["int8", "int4", "nf4"])
def test_a_merged_kerashub_model_comes_back(tmp_path, kind):
    sizes = {"num_query_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "hidden_dim": 16, "intermediate_dim": 32}
    backbone = keras_hub.models.GemmaBackbone(vocabulary_size=40, num_layers=1, **sizes)
    model = keras_hub.models.GemmaCausalLM(backbone=backbone, preprocessor=None)
    if kind != "nf4":
        with pytest.warns(UserWarning, match="does not have a `quantize` method"):
            model.quantize(kind)
    keras_lora.apply_lora(model, rank=2, base_dtype="nf4" if kind == "nf4" else None)
    perturb(model, size=0.1)
    x = {"token_ids": TOKENS, "padding_mask": np.ones_like(TOKENS)}
    adapted = outputs(model, x)
    keras_lora.merge_lora(model, requantize=True)
    merged = outputs(model, x)
    assert 0 < difference(merged, adapted) < 0.6
    model.save(tmp_path / "m.keras")
    assert difference(outputs(keras.saving.load_model(tmp_path / "m.keras"), x), merged) == 0
    if kind == "nf4":
        with pytest.raises(ValueError, match=r"`save_to_preset` would not know how the kernels .* are stored.*merge_lora"):
            model.backbone.save_to_preset(tmp_path / "preset")
    else:
        model.backbone.save_to_preset(tmp_path / "preset")
