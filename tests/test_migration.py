"""From Keras's own LoRA, and from KerasHub's `.lora.h5` files, to ours: the same outputs, and the same that trains."""

import shutil
import warnings

import h5py
import keras
import keras_hub
import numpy as np
import pytest
from helpers import covering, perturb, value, values
from keras import layers
from test_law import CASES, numbers, result

import keras_lora
from keras_lora.compat.keras_internals import own_variables
from keras_lora.interop import from_enable_lora, from_lora_h5
from keras_lora.swap.adapted import adapted_maps, named_adapters
from keras_lora.swap.addresses import walk

pytestmark = pytest.mark.torch_first

#: With those in `TRAINED` each class, and each way in which the last axis of a kernel lies in its matrix.
KINDS = [
    "dense",
    "registered_subclass_like_its_parent",
    "einsum_query",
    "einsum_gemma_query",
    "einsum_experts_inside",
    "einsum_per_head",
    "conv1d_causal_dilated",
    "conv1d_grouped",
    "conv2d_channels_first_grouped",
    "embedding",
    "reversible_embedding_capped_reverse",
    "reversible_embedding_untied_reverse",
]
TRAINED = [
    "dense",
    "einsum_query",
    "einsum_output",
    "einsum_experts",
    "conv1d_grouped",
    "conv2d_strided_same",
    "conv3d",
    "embedding",
    "reversible_embedding_untied",
]


def outputs(model, x):
    """What a call gives; nothing is compiled for it."""
    return [value(y) for y in keras.tree.flatten(model(keras.tree.map_structure(keras.ops.convert_to_tensor, x)))]


def apart(found, wanted):
    """The largest absolute difference, relative to the largest number."""
    return max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(found, wanted, strict=True))


def base_kernel(layer):
    return value(layer._embeddings if hasattr(layer, "_embeddings") else layer._kernel)


def keras_change(layer):
    """Keras's ΔW, in NumPy."""
    a, b = (value(v) for name in ("kernel", "embeddings") for v in lora_pair(layer, name))
    return layer.lora_alpha / layer.lora_rank * (a @ b)


def lora_pair(layer, name):
    return [getattr(layer, f"lora_{name}_{factor}") for factor in "ab"] if hasattr(layer, f"lora_{name}_a") else []


def with_keras_lora(layer, rank=2, alpha=5.0):
    layer.enable_lora(rank, lora_alpha=alpha, a_initializer="zeros")  # nothing random: that takes time to compile
    perturb(layer, size=0.3)
    return layer


def everything(model):
    """What a refusal must leave as it was."""
    return (
        {v.path: (value(v).tolist(), v.trainable) for v in model.weights},
        [(place.path, type(place.layer), place.layer.trainable) for place in walk(model)],
        [getattr(place.layer, "lora_enabled", None) for place in walk(model)],
    )


# Every layer.


@pytest.mark.parametrize("kind", covering(KINDS, KINDS[:2]))
def test_the_outputs_and_the_change_are_the_same(kind):
    case = CASES[kind]
    layer, kernel = case.built(), base_kernel(case.built())
    with_keras_lora(layer)
    change, before = keras_change(layer), result(layer, case)
    (row,) = from_enable_lora(layer)
    assert apart(result(layer, case), before) < 1e-5
    ((linear, adapter),) = adapted_maps(layer).values()
    found = value(linear.as_kernel(adapter.delta_kernel(linear.matrix)))
    assert np.linalg.norm(found - change) < 2e-6 * np.linalg.norm(change)
    assert np.array_equal(value(linear.kernel), kernel)
    assert row.error < 1e-6
    ranks = np.linalg.matrix_rank(value(adapter.delta_kernel(linear.matrix)), rtol=1e-5)
    assert row.rank == adapter.rank == ranks.max()
    assert (adapter.rank, adapter.alpha) == (2, 5) or adapter.scale == 1


@pytest.mark.parametrize("kind", TRAINED)
def test_a_change_of_zero_becomes_a_fresh_lora(kind):
    layer = CASES[kind].built()
    layer.enable_lora(3, lora_alpha=6)
    from_enable_lora(layer, rank=2)
    ((linear, adapter),) = adapted_maps(layer).values()
    assert (adapter.rank, adapter.scale) == (2, 2)
    a, b = value(adapter.lora_a), value(adapter.lora_b)
    assert a.any() != b.any()
    assert bool(a.any()) != linear.picks_rows


@pytest.mark.parametrize(
    ("equation", "shape", "x", "rank"),
    [
        ("abcd,ecd->abe", (None, 5), (2, 3, 4, 6), 5),  # summed over last, and over another axis
        ("ac,ec->ae", 5, (2, 6), 2),  # summed over last, and over no other
        ("abc,dcb->adb", (7, 4), (2, 4, 6), 6),  # groups last
    ],
)
def test_any_equation(equation, shape, x, rank):
    layer, x = layers.EinsumDense(equation, shape), numbers(*x)
    layer.build(x.shape)
    with_keras_lora(layer)
    change, before = keras_change(layer), outputs(layer, x)
    (row,) = from_enable_lora(layer)
    assert row.rank == rank
    assert apart(outputs(layer, x), before) < 1e-5
    ((linear, adapter),) = adapted_maps(layer).values()
    assert apart([value(linear.as_kernel(adapter.delta_kernel(linear.matrix)))], [change]) < 1e-5


def model_of(kind):
    """A model of one layer, and its input."""
    case = CASES[kind]
    inputs = keras.Input(batch_shape=case.x.shape, dtype=case.x.dtype.name)
    model = keras.Sequential([inputs, case.cls.from_config(case.config)])
    perturb(model)
    return model, case.x


@pytest.mark.parametrize("kind", TRAINED)
def test_what_trained_still_does_and_the_model_is_one_like_any_other(kind, tmp_path):
    model, x = model_of(kind)
    kernel = base_kernel(model.layers[0])
    layer = with_keras_lora(model.layers[0])
    kept = {v.path: value(v) for v in model.weights if "lora_" not in v.name}
    trained = {v.path for v in model.trainable_variables if "lora_" not in v.name}
    before = outputs(model, x)
    from_enable_lora(model)
    assert apart(outputs(model, x), before) < 1e-5

    ours = {v.path for v in model.trainable_variables if v.name in ("lora_a", "lora_b")}
    assert len(ours) == 2
    assert {v.path for v in model.trainable_variables} == trained | ours
    now = values(model.weights)
    assert all(np.array_equal(now[path], each) for path, each in kept.items())
    assert len(now) == len(kept) + 3  # the factors and the strength
    assert not layer.lora_enabled
    assert not {"lora_rank", "lora_alpha"} & layer.get_config().keys()

    model.save(tmp_path / "model.keras")
    copies = [keras.models.load_model(tmp_path / "model.keras") for _ in range(2)]
    assert apart(outputs(copies[0], x), outputs(model, x)) < 1e-6
    assert len(copies[0].trainable_variables) == len(model.trainable_variables)
    assert apart(outputs(keras_lora.merge_lora(copies[0]), x), before) < 1e-5
    assert type(copies[0].layers[0]) is CASES[kind].cls
    keras_lora.remove_lora(copies[1])
    assert [value(v).tolist() for v in copies[1].weights] == [each.tolist() for each in kept.values()]
    assert np.array_equal(base_kernel(copies[1].layers[0]), kernel)
    assert len(copies[1].trainable_variables) == len(trained)

    target = before[0] + 1
    model.compile(keras.optimizers.SGD(0.02), "mse")
    model.fit(x, target, verbose=0, batch_size=len(x), shuffle=False)
    assert np.square(outputs(model, x)[0] - target).mean() < 1
    after = values(model.weights)
    unused = {path for path in trained if path.endswith("reverse_embeddings")}  # by this model
    assert {path for path in after if not np.array_equal(after[path], now[path])} == (trained | ours) - unused


@pytest.mark.parametrize("kind", ["dense", "einsum_query", "einsum_experts", "conv1d_grouped"])
def test_a_truncated_rank_is_numpys_and_so_is_its_error(kind):
    layer = with_keras_lora(CASES[kind].built(), rank=3)
    change = keras_change(layer)
    (row,) = from_enable_lora(layer, rank=np.int64(1))
    ((linear, adapter),) = adapted_maps(layer).values()
    whole = value(linear.as_matrix(keras.ops.convert_to_tensor(change.astype("float32"))))
    u, s, v = np.linalg.svd(whole, full_matrices=False)
    nearest = s[..., :1, None] * u[..., :, :1] * v[..., :1, :]
    assert np.abs(value(adapter.delta_kernel(linear.matrix)) - nearest).max() < 1e-5 * np.abs(nearest).max()
    assert row.rank == 1
    assert abs(row.error - np.linalg.norm(whole - nearest) / np.linalg.norm(whole)) < 1e-6


def test_a_rank_above_the_true_one_adds_nothing():
    layer = with_keras_lora(CASES["einsum_query"].built())
    layer.lora_kernel_a.assign(np.repeat(value(layer.lora_kernel_a)[:, :1], 3, axis=1).astype("float32"))
    layer.lora_kernel_b.assign(value(layer.lora_kernel_b).astype("float32"))
    (row,) = from_enable_lora(layer, rank=20)
    assert row.rank == 2  # the heads are equal


@pytest.mark.parametrize("alpha", [-3.0, 0.0])
def test_a_scale_that_a_lora_cannot_have_goes_into_its_factors(alpha):
    layer = with_keras_lora(CASES["dense"].built(), alpha=alpha)
    before = result(layer, CASES["dense"])
    from_enable_lora(layer)
    assert apart(result(layer, CASES["dense"]), before) < 1e-5


@pytest.mark.parametrize(
    "each", ["dense int8", "einsum_query int8", "einsum_output int4", "reversible_embedding_untied int8"]
)
def test_quantised_layers_keep_their_outputs_and_their_integers(each):
    kind, mode = each.split()
    layer = CASES[kind].built()
    layer.quantize(mode)
    with_keras_lora(layer)
    kernel, before = base_kernel(layer), result(layer, CASES[kind])
    from_enable_lora(layer)
    assert apart(result(layer, CASES[kind]), before) < 1e-5
    assert np.array_equal(base_kernel(layer), kernel)


def test_under_mixed_precision_the_outputs_are_as_near_as_bfloat16_is():
    keras.config.set_dtype_policy("mixed_bfloat16")
    layer, x = layers.Dense(8), numbers(4, 6)
    layer.build(x.shape)
    with_keras_lora(layer)
    before = outputs(layer, x)
    from_enable_lora(layer)
    assert apart(outputs(layer, x), before) < 2e-2


def test_a_compiled_model_runs_what_it_is_now():
    model, x = keras.Sequential([keras.Input((6,)), layers.Dense(4), layers.Dense(3)]), numbers(4, 6)
    with_keras_lora(model.layers[0])
    model.compile("sgd", "mse")
    before = model.predict(x, verbose=0)
    from_enable_lora(model)
    assert apart([model.predict(x, verbose=0)], [before]) < 1e-5
    perturb(model)
    assert apart([model.predict(x, verbose=0)], outputs(model, x)) < 1e-5


# Models.


def attention_model():
    x = keras.Input((5, 12))
    normed = layers.BatchNormalization()(layers.Dense(12, name="first")(x))
    mixed = layers.MultiHeadAttention(3, 4, name="mixing")(normed, normed)
    return keras.Model(x, layers.Dense(2, name="head")(mixed))


def attention_with_lora():
    model = attention_model()
    perturb(model)
    inner = model.get_layer("mixing")
    for layer in (inner.query_dense, inner.value_dense, inner.output_dense):
        with_keras_lora(layer)
    model.get_layer("first").trainable = False
    return model


def test_attention_inside_a_model(tmp_path):
    model, x = attention_with_lora(), numbers(2, 5, 12)
    before = outputs(model, x)
    trained = {v.path for v in model.trainable_variables if "lora_" not in v.name}
    report = from_enable_lora(model, name="french")
    assert {row.layer.split("/")[-1]: row.rank for row in report} == {"query": 6, "value": 6, "attention_output": 2}
    assert list(named_adapters(model)) == ["french"]
    assert apart(outputs(model, x), before) < 1e-5
    assert {v.path for v in model.trainable_variables if v.name not in ("lora_a", "lora_b")} == trained
    model.trainable = False
    model.trainable = True
    assert {v.path for v in model.trainable_variables if v.name not in ("lora_a", "lora_b")} == trained
    if keras.backend.backend() == "torch":
        assert len(list(model.parameters())) == len(model.variables)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert apart(outputs(again, x), before) < 1e-5
    assert len(again.trainable_variables) == len(model.trainable_variables)
    keras_lora.save_adapter(model, tmp_path / "french.safetensors")
    assert apart(outputs(keras_lora.merge_lora(again), x), before) < 1e-5


def test_a_part_of_a_model_is_converted_alone():
    model, x = attention_with_lora(), numbers(2, 5, 12)
    model.layers[-1].enable_lora(1)
    before = outputs(model, x)
    assert len(from_enable_lora(model.get_layer("mixing"))) == 3
    assert model.layers[-1].lora_enabled
    assert apart(outputs(model, x), before) < 1e-5


def test_a_frozen_lora_stays_frozen_until_it_is_chosen():
    model = keras.Sequential([keras.Input((6,)), layers.Dense(8), layers.Dense(3)])
    for layer in model.layers:
        with_keras_lora(layer)
    model.layers[0].trainable = False
    model.layers[1].lora_kernel_a.trainable = False
    from_enable_lora(model)
    assert [v.name for v in model.trainable_variables] == ["bias", "lora_b"]
    keras_lora.train_adapters(model, "default")
    assert sorted(v.name for v in model.trainable_variables) == ["bias", "lora_a", "lora_a", "lora_b", "lora_b"]


def test_a_regularizer_that_acts_no_longer_is_said():
    model = keras.Sequential([keras.Input((6,)), layers.Dense(8, kernel_regularizer="l2", name="firm")])
    with_keras_lora(model.layers[0])
    with pytest.warns(UserWarning, match=r"regularizers.*firm"):
        from_enable_lora(model)


def by_place(model):
    """The variables of a model, by what is the same in another one like it."""
    return {(place.address, v.name): v for place in walk(model) for v in own_variables(place.layer)}


def tiny(name):
    keras.utils.set_random_seed(3)
    sizes = {"vocabulary_size": 11, "num_layers": 2, "hidden_dim": 8, "intermediate_dim": 12}
    if name == "bert":
        return keras_hub.models.BertBackbone(**sizes, num_heads=2, max_sequence_length=6)
    return keras_hub.models.GemmaBackbone(**sizes, num_query_heads=2, num_key_value_heads=1, head_dim=4)


def tokens(name):
    x = {"token_ids": np.array([[1, 2, 3, 4], [5, 6, 7, 8]]), "padding_mask": np.array([[1, 1, 1, 1], [1, 1, 1, 0]])}
    return x | ({"segment_ids": np.zeros((2, 4), int)} if name == "bert" else {})


def tuned(name, rank=2, targets=None):
    """A backbone with the weights of `tiny`, KerasHub's LoRA on it and its factors moved, and no bias."""
    model = tiny(name)
    model.enable_lora(rank, target_layer_names=targets)
    rng = np.random.default_rng(1)
    for v in model.trainable_variables:
        if "lora_" in v.name:
            v.assign(rng.normal(size=tuple(v.shape)).astype("float32"))
    return model


@pytest.mark.parametrize("name", ["bert", "gemma"])
def test_backbones_of_keras_hub(name, tmp_path):
    model, x = tuned(name), tokens(name)
    before = outputs(model, x)
    assert apart(outputs(tiny(name), x), before) > 1e-2
    trained = {v.path for v in model.trainable_variables if "lora_" not in v.name}
    report = from_enable_lora(model)
    assert len(report) == 4
    assert apart(outputs(model, x), before) < 1e-5
    assert {v.path for v in model.trainable_variables if v.name not in ("lora_a", "lora_b")} == trained
    with pytest.raises(ValueError, match="no lora-enabled layers"):
        model.save_lora_weights(str(tmp_path / "model.lora.h5"))
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert apart(outputs(again, x), before) < 1e-5
    assert len(again.trainable_variables) == len(model.trainable_variables)


# Files of KerasHub.


@pytest.mark.parametrize("name", ["bert", "gemma"])
def test_a_file_gives_what_keras_hub_makes_of_it(name, tmp_path):
    path, x = str(tmp_path / "french.lora.h5"), tokens(name)
    tuned(name).save_lora_weights(path)
    theirs, ours = tiny(name), tiny(name)
    theirs.load_lora_weights(path)
    report = from_lora_h5(ours, path, name="french")
    assert apart(outputs(ours, x), outputs(theirs, x)) < 1e-5
    assert len(report) == 4
    biases = {key for key, v in by_place(theirs).items() if v.trainable and "lora_" not in v.name}
    assert {key for key, v in by_place(ours).items() if v.trainable and "lora_" not in v.name} == biases
    assert len(biases) == (4 if name == "bert" else 0)
    assert not any(getattr(place.layer, "lora_enabled", False) for place in walk(ours))
    assert apart(outputs(keras_lora.merge_lora(ours), x), outputs(theirs, x)) < 1e-5


def test_a_file_for_other_targets_which_keras_hub_cannot_read(tmp_path):
    path, x = str(tmp_path / "french.lora.h5"), tokens("bert")
    model = tuned("bert", targets=["key", "attention_output"])
    model.save_lora_weights(path)
    with pytest.raises(KeyError):
        tiny("bert").load_lora_weights(path)
    ours = tiny("bert")
    from_lora_h5(ours, path)
    assert apart(outputs(ours, x), outputs(model, x)) < 1e-5


def test_the_scale_of_a_file_is_said_and_a_rank_cuts(tmp_path):
    path, x = str(tmp_path / "french.lora.h5"), tokens("bert")
    model = tuned("bert")
    model.save_lora_weights(path)
    for place in walk(model):
        if getattr(place.layer, "lora_enabled", False):
            place.layer.lora_alpha = 6
    ours = tiny("bert")
    from_lora_h5(ours, path, alpha=6)
    assert apart(outputs(ours, x), outputs(model, x)) < 1e-5
    cut = from_lora_h5(tiny("bert"), path, alpha=np.float32(6), rank=1)
    assert {row.rank for row in cut} == {1}
    assert sorted(row.error for row in cut) == sorted(row.error for row in from_enable_lora(model, rank=1))
    assert cut.error > 0.1


def test_trained_biases_are_not_in_a_file(tmp_path):
    path, x = str(tmp_path / "french.lora.h5"), tokens("bert")
    model = tuned("bert")
    perturb(model)
    model.save_lora_weights(path)
    ours = tiny("bert")
    from_lora_h5(ours, path)
    assert apart(outputs(ours, x), outputs(model, x)) > 1e-3
    theirs = by_place(model)
    for key, v in by_place(ours).items():
        if v.name == "bias":
            v.assign(value(theirs[key]).astype("float32"))
    assert apart(outputs(ours, x), outputs(model, x)) < 1e-5


def drop(key):
    return lambda file: file.__delitem__(key)


def put(key, array):
    def change(file):
        if key in file:
            del file[key]
        file[key] = array

    return change


DAMAGES = {
    "no rank": (drop("lora/vars/rank"), "no rank"),
    "rank of zero": (put("lora/vars/rank", 0), "no rank"),
    "half a pair": (drop("lora/11/vars/lora_kernel_b"), "lacks 'lora/11/vars/lora_kernel_b'"),
    "another shape": (
        put("lora/11/vars/lora_kernel_a", np.ones((8, 3, 2))),
        r"'lora/11/vars/lora_kernel_a' has shape \(8, 3, 2\)",
    ),
    "another rank": (put("lora/vars/rank", 3), r"expects \(3, 4\)"),
    "not finite": (put("lora/11/vars/lora_kernel_b", np.full((2, 4), np.nan)), "not finite"),
    "a place too many": (put("lora/99/vars/lora_kernel_a", np.ones((8, 2, 2))), "'lora/99'"),
    "a layer with no kernel": (put("lora/0/vars/lora_kernel_a", np.ones((8, 2, 2))), "'lora/0'"),
    "words": (put("lora/vars/words", "French"), "'lora/vars/words'"),
    "a rank in words": (put("lora/vars/rank", "two"), "no rank"),
    "something else": (put("optimizer/vars/0", np.ones(3)), "'optimizer/vars/0'"),
    "integers": (put("lora/11/vars/lora_kernel_b", np.ones((2, 4), int)), "fits nothing"),
    "nothing": (drop("lora"), "no layer with LoRA"),
}


@pytest.fixture(scope="module")
def file_of_bert(tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "french.lora.h5"
    tuned("bert").save_lora_weights(str(path))
    return path


def test_a_file_that_does_not_fit_is_refused_with_all_that_is_wrong_and_changes_nothing(file_of_bert, tmp_path):
    model = tiny("bert")
    before = everything(model)
    for name, (damage, message) in DAMAGES.items():
        path = tmp_path / f"{name}.lora.h5"
        shutil.copy(file_of_bert, path)
        with h5py.File(path, "a") as file:
            damage(file)
        with pytest.raises(ValueError, match=message):
            from_lora_h5(model, path)
        assert everything(model) == before, name
    with h5py.File(path, "w") as file:
        for damage, _ in [DAMAGES["a place too many"], DAMAGES["something else"]]:
            damage(file)
    with pytest.raises(ValueError, match=r"(?s)no rank.*optimizer.*lora/99") as raised:
        from_lora_h5(model, path)
    assert "lacks 'lora/99/vars/lora_kernel_b'" in str(raised.value)
    path.write_bytes(b"no HDF5")
    with pytest.raises(ValueError, match="HDF5"):
        from_lora_h5(model, path)
    with pytest.raises(FileNotFoundError):
        from_lora_h5(model, tmp_path / "none.lora.h5")
    with pytest.raises(ValueError, match="alpha"):
        from_lora_h5(model, file_of_bert, alpha=0)
    assert everything(model) == before


def test_a_file_for_another_backbone_is_refused(file_of_bert):
    for model in (tiny("gemma"), tuned("bert"), keras_lora.apply_lora(tiny("bert"))):
        before = everything(model)
        with pytest.raises(ValueError, match=r"from_lora_h5|does not fit"):
            from_lora_h5(model, file_of_bert)
        assert everything(model) == before


# Refusals.


class OddDense(layers.Dense):
    """A class that we do not know, and whose call may be anything."""


def with_odd_layer():
    model = keras.Sequential([keras.Input((6,)), layers.Dense(4), OddDense(4, name="odd")])
    for layer in model.layers:
        with_keras_lora(layer)
    return model


def with_nan():
    model = keras.Sequential([keras.Input((6,)), layers.Dense(4, name="ill"), layers.Dense(4)])
    for layer in model.layers:
        with_keras_lora(layer)
    model.layers[0].lora_kernel_b.assign(np.full((2, 4), np.nan, "float32"))
    return model


def with_quantised_tied_embedding():
    layer = CASES["reversible_embedding"].built()
    layer.quantize("int8")
    model = keras.Sequential([keras.Input((5,), dtype="int32"), layer])
    with_keras_lora(layer)
    return model


def adapted_already():
    model = keras.Sequential([keras.Input((6,)), layers.Dense(4), layers.Dense(4)])
    with_keras_lora(model.layers[0])
    return keras_lora.apply_lora(model, targets=lambda layer: layer is model.layers[1])


REFUSED = {
    "plain": (lambda: keras.Sequential([keras.Input((6,)), layers.Dense(4)]), {}, "no layer with Keras's LoRA"),
    "odd": (with_odd_layer, {}, r"(?s)odd'.*OddDense"),
    "nan": (with_nan, {}, "'.*ill'.*not finite"),
    "tied": (with_quantised_tied_embedding, {}, "quantised .'int8'. and tied"),
    "adapted": (adapted_already, {"name": "second"}, "without keras_lora adapters"),
    "rank": (attention_with_lora, {"rank": 0}, "rank=0"),
    "rank of another type": (attention_with_lora, {"rank": True}, "rank=True"),
    "name": (attention_with_lora, {"name": ""}, "name=''"),
}


@pytest.mark.parametrize(("build", "arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_a_refusal_says_why_and_changes_nothing(build, arguments, message):
    model = build()
    x = model.input_shape[1:]
    x = np.ones((2, *x), "int32" if model.inputs[0].dtype == "int32" else "float32")
    before, of_model = outputs(model, x), everything(model)
    with pytest.raises(ValueError, match=message):
        from_enable_lora(model, **arguments)
    assert str(everything(model)) == str(of_model)  # NaN equals itself there
    assert np.array_equal(outputs(model, x), before, equal_nan=True)


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match="`model` must be"):
        from_enable_lora("bert")


def test_no_warning_without_reason():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        from_enable_lora(attention_with_lora())
