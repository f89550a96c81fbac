"""MiSS, IA3, LoKr, LoHa, OFT and VeRA: against NumPy written from the papers, and in everything that a method goes through.

`test_law.py` runs them on every layer type, and `test_peft_methods.py` against PEFT.
"""

import keras
import numpy as np
import pytest
from helpers import covering, difference, outputs, perturb, value
from keras import layers

import keras_lora
from keras_lora import adapters
from keras_lora.adapters import lokr, vera
from keras_lora.testing import check_adapter

EVERYWHERE = pytest.mark.every_backend
pytestmark = pytest.mark.torch_first

METHODS = {
    "miss": lambda **more: keras_lora.MiSS(3, **more),
    "ia3": lambda **more: keras_lora.IA3(**more),
    "ia3_inputs": lambda **more: keras_lora.IA3(side="inputs", **more),
    "lokr": lambda **more: keras_lora.LoKr(2, factor=2, alpha=6, **more),
    "oft": lambda **more: keras_lora.OFT(4, **more),
    "oft_series": lambda **more: keras_lora.OFT(4, terms=5, **more),
    "loha": lambda **more: keras_lora.LoHa(2, alpha=6, **more),
    "vera": lambda **more: keras_lora.VeRA(5, **more),
}
THIN = ["miss", "lokr", "loha", "vera"]
X = np.random.default_rng(0).normal(size=(4, 12)).astype("float32")


def stack(dtype=None):
    keras.utils.set_random_seed(1)
    hidden = layers.Dense(8, activation="tanh", name="hidden", dtype=dtype)
    return keras.Sequential([keras.Input((12,)), hidden, layers.Dense(6, name="last", dtype=dtype)])


def adapted(method, size=0.2, **more):
    model = keras_lora.apply_lora(stack(), METHODS[method](**more), head=None)
    perturb(model, size)
    return model


def paper_miss(w, weights):
    return w + np.stack([weights["miss_d"][i % 3] for i in range(12)])


def paper_lokr(w, weights):
    return w + 3 * np.kron(weights["lokr_c"], weights["lokr_a"] @ weights["lokr_b"])


def paper_loha(w, weights):
    one, two = weights["loha_a1"] @ weights["loha_b1"], weights["loha_a2"] @ weights["loha_b2"]
    return w + 3 * one * two


def skew(q):
    found = np.zeros((4, 4))
    found[np.triu_indices(4, 1)] = q
    return found - found.T


def rotated(w, blocks):
    return np.concatenate([block @ w[4 * n : 4 * n + 4] for n, block in enumerate(blocks)])


def paper_oft(w, weights):
    eye = np.eye(4)
    return rotated(w, [(eye + skew(q)) @ np.linalg.inv(eye - skew(q)) for q in weights["oft_q"]])


def paper_oft_series(w, weights):
    power = np.linalg.matrix_power
    eye, all_q = np.eye(4), [skew(q) for q in weights["oft_q"]]
    return rotated(w, [(eye + q) @ (eye + q + power(q, 2) + power(q, 3)) for q in all_q])


def paper_vera(w, weights):
    a, b = vera.drawn(0, (12, 5), np.sqrt(6 / 12)), vera.drawn(0, (5, 8), np.sqrt(6 / 5))
    return w + a @ np.diag(weights["vera_d"]) @ b @ np.diag(weights["vera_b"])


PAPERS = {
    "miss": paper_miss,
    "ia3": lambda w, weights: w @ np.diag(weights["ia3_gain"]),
    "ia3_inputs": lambda w, weights: np.diag(weights["ia3_gain"]) @ w,
    "lokr": paper_lokr,
    "oft": paper_oft,
    "oft_series": paper_oft_series,
    "loha": paper_loha,
    "vera": paper_vera,
}


@EVERYWHERE
@pytest.mark.parametrize("method", METHODS)
def test_the_kernel_is_that_of_the_paper(method):
    layer = adapted(method).get_layer("hidden")
    weights = {key: value(v) for key, v in layer.adapter.saved_weights.items()}
    matrix = layer.linear_map.matrix
    wanted = PAPERS[method](value(matrix), weights)
    changed = value(matrix) + value(layer.adapter.delta_kernel(matrix))
    np.testing.assert_allclose(changed, wanted, rtol=1e-5, atol=1e-6)
    assert np.abs(wanted - value(matrix)).max() > 1e-2
    plain = layer.linear_map.finish(keras.ops.matmul(X, keras.ops.convert_to_tensor(wanted.astype("float32"))))
    assert difference([value(layer(X))], [value(plain)]) < 1e-5


@pytest.mark.full
@pytest.mark.parametrize("method", covering(METHODS, [], pytest.mark.nightly, quick=["miss", "oft"]))
def test_every_kind_of_layer_files_sums_merging_and_counts(method):
    seen = check_adapter(METHODS[method]())
    embeddings = {"embedding", "tied_embedding"}
    assert set(seen) == {"dense", "einsum", "experts", "conv", "depthwise", *embeddings} - (
        embeddings if method.startswith("oft") else set()
    )


@EVERYWHERE
@pytest.mark.parametrize("method", ["miss", "ia3_inputs", "lokr", "oft", "vera"])
def test_it_trains_and_comes_back_from_both_kinds_of_file(method, tmp_path):
    more = {"dropout": 0.2, "seed": 3} if method == "lokr" else {}
    model = keras_lora.apply_lora(stack(), METHODS[method](**more), head=None)
    base = value(model.get_layer("hidden").linear_map.kernel)
    model.compile(keras.optimizers.Adam(0.05), "mse")
    losses = model.fit(X, np.ones((4, 6)), epochs=4, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    assert np.array_equal(value(model.get_layer("hidden").linear_map.kernel), base)
    wanted = outputs(model, X)
    model.save(tmp_path / "m.keras")
    assert difference(outputs(keras.saving.load_model(tmp_path / "m.keras"), X), wanted) < 1e-6
    keras_lora.save_adapter(model, tmp_path / "a.safetensors")
    assert difference(outputs(keras_lora.load_adapter(stack(), tmp_path / "a.safetensors"), X), wanted) < 1e-6


@pytest.mark.parametrize("mode", ["int8", "int4", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
def test_a_base_in_fewer_digits(method, mode):
    model = stack()
    if mode != "bfloat16":
        model.quantize(mode)
    base_dtype = "bfloat16" if mode == "bfloat16" else None
    keras_lora.apply_lora(model, METHODS[method](), head=None, base_dtype=base_dtype)
    perturb(model, 0.2)
    layer = model.get_layer("hidden")
    matrix = value(layer.linear_map.matrix)
    wanted = np.tanh(X @ (matrix + value(layer.adapter.delta_kernel(layer.linear_map.matrix))))
    assert difference([value(layer(X))], [wanted]) < 0.02
    kernel = value(layer.linear_map.kernel)
    model.compile("adam", "mse")
    before = {v.path: value(v).copy() for v in model.trainable_variables}
    model.fit(X, np.ones((4, 6)), verbose=0)
    assert all(np.abs(value(v) - before[v.path]).max() > 0 for v in model.trainable_variables)
    assert np.array_equal(value(layer.linear_map.kernel), kernel)


@pytest.mark.parametrize("method", METHODS)
def test_mixed_precision_follows_the_policy(method):
    model = keras_lora.apply_lora(stack("mixed_bfloat16"), METHODS[method](), head=None)
    layer = model.get_layer("hidden")
    perturb(model, 0.3)
    assert all(v.dtype == "float32" for v in model.trainable_variables)
    assert keras.backend.standardize_dtype(layer(X).dtype) == "bfloat16"
    matrix = layer.linear_map.matrix
    wanted = np.tanh(X @ (value(matrix) + value(layer.adapter.delta_kernel(matrix))))
    assert difference([value(layer(X))], [wanted]) < 0.04


@pytest.mark.parametrize("method", THIN)
def test_a_thin_product_is_served_for_each_example_and_compressed_exactly(method, tmp_path):
    model = adapted(method)
    wanted = outputs(model, X)
    keras_lora.save_adapter(model, tmp_path / "a.safetensors")
    served = keras_lora.MultiAdapterModel(stack(), capacity=2, rank=8, head=None)
    served.load(tmp_path / "a.safetensors", "own")
    index = served.index_of(["own", None, "own", "own"])
    found = served.predict({"inputs": X, "adapter_index": index}, verbose=0)
    keep = [0, 2, 3]
    assert difference([found[keep]], [wanted[0][keep]]) < 1e-5
    assert difference([found[1:2]], [outputs(stack(), X)[0][1:2]]) < 1e-6
    assert keras_lora.compress_adapter(model, energy=1).error < 1e-6
    assert difference(outputs(model, X), wanted) < 1e-5
    if method != "miss":
        small = keras_lora.MultiAdapterModel(stack(), rank=3, head=None)
        with pytest.raises(ValueError, match=r"takes ranks up to 3, and this has rank [45]"):
            small.load(tmp_path / "a.safetensors", "own")


@pytest.mark.parametrize("method", ["ia3", "oft"])
def test_another_change_is_refused_there_and_compressed_with_its_error(method, tmp_path):
    model = adapted(method)
    keras_lora.save_adapter(model, tmp_path / "a.safetensors")
    served = keras_lora.MultiAdapterModel(stack(), head=None)
    with pytest.raises(ValueError, match=r"`keras_lora\.compress_adapter` turns it into a LoRA"):
        served.load(tmp_path / "a.safetensors", "own")
    wanted = outputs(model, X)
    assert 0 < keras_lora.compress_adapter(model, rank=4).error < 1
    assert difference(outputs(model, X), wanted) < 1
    assert keras_lora.list_adapters(model)[0].method == "LoRA"


@pytest.mark.parametrize("method", METHODS)
def test_counts_lists_and_plots(method):
    rows = keras_lora.list_targets(stack(), METHODS[method](), head=None)
    model = adapted(method)
    assert rows.total == keras_lora.list_adapters(model).total
    rows = keras_lora.plots.measure_adapters(model)
    assert [row.method for row in rows] == [type(METHODS[method]()).__name__] * 2
    assert all(row.relative_change > 0 for row in rows)


@pytest.mark.parametrize("method", THIN)
def test_dropout_acts_in_training_alone(method):
    model = adapted(method, dropout=0.5)
    layer = model.get_layer("hidden")
    assert np.array_equal(value(layer(X)), value(layer(X)))
    assert np.abs(value(layer(X, training=True)) - value(layer(X))).max() > 1e-3
    matrix = layer.linear_map.matrix
    wanted = np.tanh(X @ (value(matrix) + value(layer.adapter.delta_kernel(matrix))))
    assert difference([value(layer(X))], [wanted]) < 1e-5


WRONG = [
    (keras_lora.MiSS, {"rank": 0}, "`rank` must be a positive integer"),
    (keras_lora.MiSS, {"dropout": 1}, "`dropout` must be"),
    (keras_lora.IA3, {"side": "both"}, r"`side` must be one of \('outputs', 'inputs'\)"),
    (keras_lora.LoKr, {"factor": 0}, "`factor` must be a positive integer"),
    (keras_lora.LoKr, {"factor": -2}, "`factor` must be a positive integer"),
    (keras_lora.OFT, {"block_size": 1}, "`block_size` must be an integer of at least 2"),
    (keras_lora.OFT, {"terms": 3}, "`terms` must be an integer of at least 4"),
    (keras_lora.OFT, {"terms": 10**9}, "`terms` must be at most 50"),
    (keras_lora.LoHa, {"alpha": -1}, "`alpha` must be"),
    (keras_lora.VeRA, {"projection_seed": -1}, "`projection_seed` must be"),
    (keras_lora.VeRA, {"d_initial": 0}, "`d_initial` must be"),
]


@pytest.mark.parametrize(("cls", "given", "said"), WRONG, ids=str)
def test_arguments_out_of_range_are_refused(cls, given, said):
    with pytest.raises(ValueError, match=said):
        cls(**given)


# OFT.


def test_a_rotation_keeps_lengths_and_angles_for_any_q():
    layer = adapted("oft", size=3).get_layer("hidden")
    turn = value(layer.adapter.turn()) + np.eye(4)
    np.testing.assert_allclose(turn @ turn.swapaxes(-1, -2), np.broadcast_to(np.eye(4), turn.shape), atol=1e-5)
    w = value(layer.linear_map.matrix)
    changed = w + value(layer.adapter.delta_kernel(layer.linear_map.matrix))
    np.testing.assert_allclose(changed.T @ changed, w.T @ w, atol=1e-5)


def test_blocks_are_the_largest_divisor_and_what_has_none_is_refused():
    oft = keras_lora.OFT(8)
    assert [oft.block_of((size, 3)) for size in (64, 12, 9, 5, 8)] == [8, 6, 3, 5, 8]
    model = keras.Sequential([keras.Input((11,)), layers.Dense(4, name="narrow"), layers.Dense(3)])
    with pytest.raises(ValueError, match="no block of 2 to 8 inputs divides its 11 inputs"):
        keras_lora.apply_lora(model, keras_lora.OFT(8))
    table = layers.Embedding(9, 4)
    table.build()
    with pytest.raises(ValueError, match="`OFT` rotates the input, and that of an embedding is token ids"):
        keras_lora.apply_lora(table, "oft", targets=layers.Embedding)
    assert type(table) is layers.Embedding


# LoKr.


def test_sizes_are_split_as_in_peft():
    peft = pytest.importorskip("peft.tuners.lokr.layer")
    for size in [*range(1, 130), 512, 768, 2048, 4096, 11008]:
        for factor in (-1, 1, 2, 3, 4, 8, 16, 64):
            assert sorted(lokr.split(size, factor)) == sorted(peft.factorization(size, factor)), (size, factor)


@EVERYWHERE
@pytest.mark.skipif(keras.backend.backend() != "jax", reason="JAX lists all arrays of a computation")
def test_lokr_forms_nothing_of_the_size_of_a_kernel():
    import jax

    layer = layers.Dense(256)
    layer.build((None, 256))
    keras_lora.apply_lora(layer, keras_lora.LoKr(4, factor=8))
    names = ("lokr_c", "lokr_a", "lokr_b")
    variables = [layer.adapter.saved_weights[name] for name in names]

    def loss(factors, x, y):
        with keras.StatelessScope(state_mapping=list(zip(variables, factors, strict=True))):
            return keras.ops.sum(layer.adapter.adapted_output(x, y, layer.linear_map))

    jaxpr = jax.make_jaxpr(jax.grad(loss))([v.value for v in variables], np.ones((8, 256)), np.ones((8, 256)))
    sizes = [int(np.prod(each.aval.shape)) for line in jaxpr.eqns for each in line.outvars]
    assert max(sizes) < 256 * 256 / 4


# VeRA.


@EVERYWHERE
def test_frozen_factors_are_the_same_numbers_everywhere_and_for_good():
    found = vera.drawn(7, (3, 2), 1.0)
    assert found.dtype == "float32"
    np.testing.assert_array_equal(found, FROZEN)
    many = vera.drawn(0, (100, 100), 2.0)
    assert abs(many.mean()) < 0.05
    assert many.std() == pytest.approx(2 / np.sqrt(3), rel=0.02)
    assert np.abs(many).max() <= 2


#: The first numbers of one seed and shape, of the raw words of the generator. If they change, files lose their meaning.
FROZEN = np.array(
    [
        [0.4099099636077881, 0.10989117622375488],
        [-0.0934293270111084, -0.14715468883514404],
        [-0.7563921213150024, 0.8895313739776611],
    ],
    "float32",
)


@EVERYWHERE
def test_layers_of_one_shape_share_their_frozen_factors_and_files_are_tiny(tmp_path):
    def deep():
        keras.utils.set_random_seed(1)
        return keras.Sequential([keras.Input((64,)), *(layers.Dense(64, activation="tanh") for _ in range(3))])

    model = keras_lora.apply_lora(deep(), keras_lora.VeRA(128), head=None)
    first, second, third = (layer.adapter for layer in model.layers)
    assert first.vera_frozen_a is second.vera_frozen_a is third.vera_frozen_a
    frozen = sum(int(np.prod(v.shape)) for v in model.variables if "vera_frozen" in v.path)
    assert frozen == 2 * 64 * 128
    perturb(model)
    keras_lora.save_adapter(model, tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").stat().st_size < 3 * (64 + 128) * 4 + 3000
    x = np.random.default_rng(0).normal(size=(2, 64)).astype("float32")
    wanted = outputs(model, x)
    keras_lora.remove_lora(model)
    del first, second, third
    assert difference(outputs(keras_lora.load_adapter(deep(), tmp_path / "a.safetensors"), x), wanted) < 1e-6


def test_another_projection_does_not_fit_and_another_start_does(tmp_path):
    keras_lora.save_adapter(adapted("vera"), tmp_path / "a.safetensors")
    other = keras_lora.apply_lora(stack(), keras_lora.VeRA(5, projection_seed=1), head=None)
    with pytest.raises(ValueError, match="projection_seed=1"):
        keras_lora.load_adapter(other, tmp_path / "a.safetensors")
    same = keras_lora.apply_lora(stack(), keras_lora.VeRA(5, d_initial=0.5), head=None)
    assert (
        difference(outputs(keras_lora.load_adapter(same, tmp_path / "a.safetensors"), X), outputs(adapted("vera"), X)) < 1e-6
    )


def test_a_rank_that_would_draw_too_many_numbers_is_refused():
    model = stack()
    with pytest.raises(ValueError, match="at most 1048576 are drawn for a kernel of this size"):
        keras_lora.apply_lora(model, keras_lora.VeRA(10**9), head=None)
    assert len(model.trainable_variables) == 4


def test_every_new_method_is_in_the_table():
    assert {type(make()) for make in METHODS.values()} < set(adapters.TABLE.values())
