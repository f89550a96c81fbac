"""Adapters made of adapters: each way against NumPy on the whole ΔW, for every layer type."""

import json

import keras
import numpy as np
import pytest
from helpers import difference, outputs, value, values
from keras import layers
from test_law import CASES, numbers

import keras_lora
from keras_lora import factors
from keras_lora.swap.adapted import named_adapters
from keras_lora.swap.addresses import walk

pytestmark = pytest.mark.torch_first

#: A layer of each kind of matrix: flat, several axes, groups, transposed, picked rows, two kernels, experts.
KINDS = [
    "dense",
    "einsum_query",
    "einsum_experts",
    "conv2d_grouped",
    "conv1d_transpose",
    "depthwise2d",
    "separable1d",
    "embedding",
    "reversible_embedding_reverse",
    "lstm",
    "registered_experts",
]
SECOND = {"lora": keras_lora.LoRA(3, alpha=5, rank_stabilized=True), "dora": keras_lora.DoRA(2)}


def move(model, size=0.3):
    rng = np.random.default_rng(3)
    for found in named_adapters(model).values():
        for _, adapter in found.values():
            for v in adapter.saved_weights.values():
                v.assign((value(v) + size * rng.normal(size=tuple(v.shape))).astype("float32"))


def two(kind, second="lora"):
    """A layer with the adapters "a" (LoRA of rank 2) and "b", moved."""
    layer = CASES[kind].built()
    for name, adapter in {"a": keras_lora.LoRA(2), "b": SECOND[second]}.items():
        keras_lora.apply_lora(layer, adapter, targets=lambda each: True, name=name)
    move(layer)
    return layer


def deltas(layer, name):
    return {key: value(each.delta_kernel(linear.matrix)) for key, (linear, each) in named_adapters(layer)[name].items()}


def apart(found, wanted):
    assert found.keys() == wanted.keys()
    return max(difference([found[key]], [wanted[key]]) for key in wanted)


def truncated(matrix, rank):
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]


@pytest.mark.parametrize("kind", KINDS)
def test_the_concatenation_is_the_sum(kind):
    layer = two(kind)
    a, b = deltas(layer, "a"), deltas(layer, "b")
    report = keras_lora.combine_adapters(layer, {"a": 0.7, "b": -0.4}, name="sum")
    assert apart(deltas(layer, "sum"), {key: 0.7 * a[key] - 0.4 * b[key] for key in a}) < 1e-6
    assert {row.rank for row in report} == {5}
    assert report.error == 0
    assert keras_lora.active_adapters(layer) == {"sum": 1.0}


@pytest.mark.parametrize("second", SECOND)
@pytest.mark.parametrize("kind", KINDS)
def test_the_truncation_is_numpys_of_the_sum(kind, second):
    layer = two(kind, second)
    a, b = deltas(layer, "a"), deltas(layer, "b")
    whole = {key: 0.7 * a[key] - 0.4 * b[key] for key in a}
    report = keras_lora.combine_adapters(layer, {"a": 0.7, "b": -0.4}, name="sum", method="svd", rank=2)
    wanted = {key: truncated(matrix, 2) for key, matrix in whole.items()}
    assert apart(deltas(layer, "sum"), wanted) < 2e-6
    errors = [np.linalg.norm(wanted[key] - whole[key]) / np.linalg.norm(whole[key]) for key in whole]
    assert np.allclose([row.error for row in report], errors, atol=1e-6)


@pytest.mark.parametrize("adapter", [keras_lora.LoRA(3), SECOND["lora"], keras_lora.LoRA(2, alpha=7)])
@pytest.mark.parametrize("method", ["cat", "svd", "linear"])
def test_the_combination_of_one_is_that_one(method, adapter):
    model = keras.Sequential([keras.Input((6,)), layers.Dense(8, name="first"), layers.Dense(7), layers.Dense(2)])
    keras_lora.apply_lora(model, adapter, rank_pattern={"first": 4}, alpha_pattern={"first": 9}, name="a")
    move(model)
    x = numbers(3, 6)
    before = outputs(model, x)
    keras_lora.combine_adapters(model, "a", name="same", method=method, **({"energy": 1.0} if method == "svd" else {}))
    assert difference(outputs(model, x), before) < 2e-6
    keras_lora.activate_adapters(model, {"same": 1, "a": -1})
    assert difference(outputs(model, x), outputs(keras_lora.activate_adapters(model, None), x)) < 2e-6


def by_hand():
    """One kernel of 2 × 2, and the changes [[4, -1], [2, 3]] and [[-2, -3], [1, 0.5]]."""
    model = keras.Sequential([keras.Input((2,)), layers.Dense(2, use_bias=False)])
    for name, matrix in {"a": [[4, -1], [2, 3]], "b": [[-2, -3], [1, 0.5]]}.items():
        keras_lora.apply_lora(model, keras_lora.LoRA(2, alpha=2), head=None, name=name)
        ((_, adapter),) = named_adapters(model)[name].values()
        adapter.lora_a.assign(np.eye(2, dtype="float32"))
        adapter.lora_b.assign(np.array(matrix, "float32"))
    return model


@pytest.mark.parametrize(
    ("method", "wanted"),
    [
        # The larger half of each: [[4, 0], [0, 3]] and [[-2, -3], [0, 0]].
        ("magnitude_prune", [[4 - 2 * 2, -2 * 3], [0, 3]]),
        # Weighted: [[4, 0], [0, 3]] and [[-4, -6], [0, 0]]; the sum elects no sign at (0, 0).
        ("ties", [[0, -6], [0, 3]]),
    ],
)
def test_pruned_sums_by_hand(method, wanted):
    model = by_hand()
    report = keras_lora.combine_adapters(model, {"a": 1, "b": 2}, name="new", method=method, density=0.5, rank=2)
    ((_, found),) = deltas(model, "new").items()
    assert np.allclose(found, wanted, atol=1e-6)
    assert report.error < 1e-12


@pytest.mark.parametrize("ties", [False, True])
def test_dropping_at_random_is_the_same_for_the_same_seed_and_what_factors_says(ties):
    method = "dare_ties" if ties else "dare_linear"
    found = []
    for seed in (4, 4, 5):
        model = by_hand()
        keras_lora.combine_adapters(model, {"a": 1, "b": 2}, name="new", method=method, density=0.5, energy=1.0, seed=seed)
        found += deltas(model, "new").values()
    assert np.array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])
    terms = [(1.0, deltas(by_hand(), "a")["layers/0"]), (2.0, deltas(by_hand(), "b")["layers/0"])]
    assert np.allclose(found[0], factors.dare(terms, 0.5, np.random.default_rng(4), ties=ties), atol=1e-6)


def test_adding_factors_is_not_adding_changes_and_the_error_says_so():
    model = by_hand()
    a, b = deltas(model, "a")["layers/0"], deltas(model, "b")["layers/0"]
    report = keras_lora.combine_adapters(model, ["a", "b"], name="new", method="linear")
    found = deltas(model, "new")["layers/0"]
    assert np.allclose(found, 2 * (a + b), atol=1e-6)  # both have the factor A = 1
    assert np.isclose(report.error, 1.0)
    assert "1" in str(report)


@pytest.mark.parametrize("kind", KINDS)
def test_a_compressed_adapter_is_the_nearest_of_its_rank(kind):
    layer = two(kind, "dora")
    keras_lora.train_adapters(layer, "a")
    wanted = {key: truncated(matrix, 1) for key, matrix in deltas(layer, "b").items()}
    keras_lora.activate_adapters(layer, {"a": 0.5, "b": 0.25})
    report = keras_lora.compress_adapter(layer, name="b", rank=1)
    assert apart(deltas(layer, "b"), wanted) < 2e-6
    assert {row.rank for row in report} == {1}
    assert keras_lora.active_adapters(layer) == {"a": 0.5, "b": 0.25}
    trained = {id(v) for v in layer.trainable_variables}
    of = {name: [v for _, each in found.values() for v in each.saved_weights.values()] for name, found in named(layer)}
    assert {id(v) for v in of["a"]} == trained
    assert all(len(found) == len(wanted) for _, found in named(layer))


def named(layer):
    return named_adapters(layer).items()


def test_all_the_energy_loses_nothing_and_drops_what_is_not_used():
    model = keras.Sequential([keras.Input((6,)), layers.Dense(8), layers.Dense(2)])
    keras_lora.apply_lora(model, rank=1, name="a")
    move(model)
    keras_lora.combine_adapters(model, {"a": 0.5}, name="b")
    keras_lora.combine_adapters(model, ["a", "b"], name="both")
    before = outputs(model, x := numbers(3, 6))
    (row,) = keras_lora.compress_adapter(model, name="both", energy=1.0)
    assert row.rank == 1  # of 2: both are the same change
    assert difference(outputs(model, x), before) < 2e-6


def test_trained_tokens_become_an_exact_lora():
    layer = CASES["embedding"].built()
    keras_lora.apply_lora(layer, keras_lora.TrainableTokens([1, 4, 7]), targets=lambda each: True)
    move(layer)
    wanted = deltas(layer, "default")
    report = keras_lora.compress_adapter(layer, name="default", energy=1.0)
    assert apart(deltas(layer, "default"), wanted) < 1e-6
    assert [row.rank for row in report] == [3]
    assert report.error < 1e-7


def test_different_targets_are_added_where_they_are():
    model = keras.Sequential([keras.Input((6,)), layers.Dense(8, name="first"), layers.Dense(7, name="second")])
    for name, target in {"a": "first", "b": "second", "c": ["first", "second"]}.items():
        keras_lora.apply_lora(model, rank=2, targets=target, name=name)
    move(model)
    x = numbers(3, 6)
    before = outputs(keras_lora.activate_adapters(model, {"a": 1, "b": 2, "c": 0.5}), x)
    report = keras_lora.combine_adapters(model, {"a": 1, "b": 2, "c": 0.5}, name="all")
    assert {row.layer: row.rank for row in report} == {"first": 4, "second": 4}
    assert difference(outputs(model, x), before) < 2e-6
    assert difference(outputs(keras_lora.activate_adapters(model, "c"), x), before) > 1e-2


def test_a_combination_trains_further_and_goes_through_a_keras_file(tmp_path):
    model = keras.Sequential([keras.Input((6,)), layers.Dense(8), layers.Dense(2)])
    keras_lora.apply_lora(model, rank=1, name="a")
    keras_lora.apply_lora(model, rank=2, name="b")
    move(model)
    keras_lora.combine_adapters(model, ["a", "b"], name="c", method="svd", rank=2)
    model.compile("adam", "mse")
    x = numbers(8, 6)
    losses = model.fit(x, numbers(8, 2), epochs=3, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert difference(outputs(loaded, x), outputs(model, x)) == 0
    assert keras_lora.active_adapters(loaded) == {"c": 1.0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": ["a", "x"]}, "has no adapter \\['x'\\]"),
        ({"names": []}, "at least one adapter"),
        ({"names": ["a"], "name": "b"}, "has an adapter 'b' already"),
        ({"names": ["a", "b"], "method": "mean"}, "`method` must be one of"),
        ({"names": ["a", "b"], "method": "svd"}, "needs `rank` or `energy`"),
        ({"names": ["a", "b"], "method": "svd", "rank": 1, "energy": 0.5}, "one of `rank` and `energy`"),
        ({"names": ["a", "b"], "method": "svd", "rank": 0}, "must be a positive integer"),
        ({"names": ["a", "b"], "method": "svd", "energy": 1.5}, "must be a number in \\(0, 1\\]"),
        ({"names": ["a", "b"], "method": "linear", "rank": 2}, "keeps the rank"),
        ({"names": ["a", "b"], "method": "ties", "rank": 2}, "needs `density`"),
        ({"names": ["a", "b"], "density": 0.5}, "does not use `density`"),
        ({"names": ["a", "b"], "method": "ties", "rank": 2, "density": 2}, "`density` must be a number"),
        ({"names": ["a", "b"], "method": "linear"}, "all of one shape"),
        ({"names": {"a": float("nan")}}, "must be a finite number"),
        ({"names": ["a", "dora"]}, "has no factors to add"),
    ],
)
def test_what_cannot_be_combined_is_refused_and_nothing_changes(arguments, message):
    layer = two("dense")
    keras_lora.apply_lora(layer, "dora", name="dora", rank=2)
    keras_lora.activate_adapters(layer, {"a": 0.5})
    before = (values(layer.variables), json.dumps(keras_lora.list_adapters(layer).data()), len(walk(layer)))
    with pytest.raises(ValueError, match=message):
        keras_lora.combine_adapters(layer, **{"name": "new", **arguments})
    after = (values(layer.variables), json.dumps(keras_lora.list_adapters(layer).data()), len(walk(layer)))
    assert before[1:] == after[1:]
    assert all(np.array_equal(before[0][path], after[0][path]) for path in before[0])


def test_compressing_a_model_that_is_switched_off_keeps_the_plan():
    model = keras_lora.apply_lora(keras.Sequential([keras.Input((6,)), layers.Dense(8), layers.Dense(2)]), rank=2)
    model.trainable = False
    keras_lora.compress_adapter(model, name="default", rank=1)
    assert not model.trainable_variables
    model.trainable = True
    assert [tuple(v.shape) for v in model.trainable_variables] == [(6, 1), (1, 8)]


def test_numbers_of_numpy_are_numbers():
    layer = two("dense")
    weights = {"a": np.float32(0.5), "b": np.int64(2)}
    report = keras_lora.combine_adapters(layer, weights, name="new", method="svd", rank=np.int64(1))
    assert [row.rank for row in report] == [1]
    arguments = {"method": "ties", "energy": np.float32(0.9), "density": np.float16(0.5)}
    keras_lora.combine_adapters(layer, weights, name="newer", **arguments)
    assert [row.rank for row in keras_lora.compress_adapter(layer, name="b", rank=np.uint8(1))] == [1]
