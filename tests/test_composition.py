"""Named adapters: their sum, switching, training one of them, deleting, merging, files, and no stale graph."""

import gc
import json
import math
import re
import weakref
import zlib

import keras
import numpy as np
import pytest
import safetensors
from helpers import difference, outputs, perturb, value
from keras import layers
from test_apply import facts
from test_law import CASES, METHODS, Case, result
from zoo import BATCH, DIM, ZOO, numbers

import keras_lora
from keras_lora.adapters import strength_of, with_sublayers
from keras_lora.swap import slots
from keras_lora.swap.adapted import adapted_maps, maps_by_address, named_adapters

pytestmark = pytest.mark.torch_first

BACKEND = keras.backend.backend()
MIXED = {"a": 0.7, "b": -0.4}


def found_of(model, name):
    """The adapters of a name, by address."""
    return {address: adapter for address, (_, adapter) in named_adapters(model)[name].items()}


def move(model, name, size=0.3):
    """Give every weight of an adapter, frozen ones too, numbers that depend on the name, the place and the key alone."""
    for address, adapter in found_of(model, name).items():
        for key, v in adapter.saved_weights.items():
            rng = np.random.default_rng(zlib.crc32(f"{name}:{address}:{key}".encode()))
            start = value(v) if key == "magnitude" else 0.0  # that one stays near the norms of the kernel
            v.assign((start + size * rng.normal(size=tuple(v.shape))).astype("float32"))


def sum_into(plain, model, strengths):
    """Give the kernels of a plain model `W + Σ strength · ΔW`, by the definition of each ΔW."""
    maps = maps_by_address(plain)
    changed = {address: value(linear.matrix) for address, (linear, _) in adapted_maps(model).items()}
    for name, strength in strengths.items():
        for address, (linear, adapter) in named_adapters(model)[name].items():
            changed[address] = changed[address] + strength * value(adapter.delta_kernel(linear.matrix))
    for address, matrix in changed.items():
        kernel = maps[address].as_kernel(keras.ops.convert_to_tensor(matrix.astype("float32")))
        maps[address].kernel_variable.assign(value(kernel).astype("float32"))
    return plain


def arrays(variables):
    return [value(v).copy() for v in variables]


def same(left, right):
    return all(np.array_equal(a, b, equal_nan=True) for a, b in zip(left, right, strict=True))


def state(model):
    """All that a refusal must leave as it was."""
    strengths = {name: [strength_of(each) for each in found_of(model, name).values()] for name in named_adapters(model)}
    return facts(model), strengths, keras_lora.list_adapters(model).data()


# The sum, for every kind of layer.

CASES_HERE = {
    name: CASES[name]
    for name in (
        "dense",
        "registered_experts",
        "registered_subclass_by_its_kernel",
        "einsum_query",
        "einsum_experts",
        "conv2d_grouped",
        "conv2d_channels_first_grouped",
        "conv2d_transpose",
        "depthwise2d",
        "separable2d",
        "lstm",
        "embedding",
        "reversible_embedding",
        "reversible_embedding_reverse",
        "reversible_embedding_in_float32_reverse",
    )
}
BFLOAT16 = layers.Dense(5, activation="relu", dtype="mixed_bfloat16").get_config()
CASES_HERE["dense_mixed_bfloat16"] = Case(layers.Dense, BFLOAT16, numbers(3, 6))
#: Where a layer has several kernels, the second adapter changes only this one in the cases that say so.
ONE_KERNEL = {
    "registered_experts": "*/down",
    "separable2d": "*/depthwise_kernel",
    "lstm": "*/recurrent_kernel",
}
WAYS = {**METHODS, "lora_3": lambda: keras_lora.LoRA(rank=3, alpha=2, rank_stabilized=True)}
SUMS = [(name, "lora", "dora", None) for name in CASES_HERE]
SUMS += [(name, "dora", "dora", None) for name in ("dense", "embedding")]
SUMS += [(name, "lora", "lora_3", None) for name in ("dense", "registered_experts")]
SUMS += [(name, "dora", "lora", pattern) for name, pattern in ONE_KERNEL.items()]
SUMS += [("embedding", "trainable_tokens", "dora", None), ("reversible_embedding_reverse", "lora", "trainable_tokens", None)]


EVERYWHERE = pytest.mark.every_backend
#: A product, a sum with factors, a changed kernel, a lookup.
SUMS_EVERYWHERE = [(name, "lora", "dora", None) for name in ("dense", "einsum_query", "conv2d_grouped", "lstm", "embedding")]


def with_two(name, ways, pattern):
    """A case's layer with two moved adapters, in the order of `ways`."""
    case = CASES_HERE[name]
    layer = case.built()
    for own, way in ways.items():
        arguments = {"targets": pattern} if pattern and own == "b" else {}
        if case.unused:
            arguments = {"targets": "reverse_embeddings"} if case.call else {"exclude": "reverse_embeddings"}
        keras_lora.apply_lora(layer, WAYS[way](), name=own, **arguments)
        move(layer, own)
    return layer


@pytest.mark.parametrize(
    ("name", "first", "second", "pattern"),
    [pytest.param(*each, marks=pytest.mark.every_backend) if each in SUMS_EVERYWHERE else each for each in SUMS],
)
def test_the_output_is_that_of_the_base_kernel_and_all_changes(name, first, second, pattern):
    case = CASES_HERE[name]
    layer = with_two(name, {"a": first, "b": second}, pattern)
    assert len(found_of(layer, "b")) < len(found_of(layer, "a")) if pattern else layer
    base, seen = result(case.built(), case), []
    for strengths in (MIXED, {"b": 1.0}, {"a": 1.0}):
        expected = result(sum_into(case.built(), layer, strengths), case)
        seen.append(result(keras_lora.activate_adapters(layer, strengths), case))
        assert difference(seen[-1], expected) < case.tolerance, strengths
        assert difference(expected, base) > 1e-2, "the change is too small to be seen"
    assert difference(seen[0], seen[1]) > 1e-2
    assert difference(seen[1], seen[2]) > 1e-2
    # W + 0 is W, but where that array lies in memory can change how torch sums.
    exact = BACKEND != "torch" or name != "lstm"
    assert difference(result(keras_lora.activate_adapters(layer, None), case), base) <= (0 if exact else 1e-7)


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [("dense", "dora", "dora"), ("einsum_query", "lora", "dora"), ("lstm", "lora", "dora"), ("embedding", "lora", "dora")],
)
def test_the_order_of_adding_does_not_matter(name, first, second):
    case = CASES_HERE[name]
    one, other = with_two(name, {"a": first, "b": second}, None), with_two(name, {"b": second, "a": first}, None)
    assert list(named_adapters(one)) == ["a", "b"]
    assert list(named_adapters(other)) == ["b", "a"]
    left, right = (result(keras_lora.activate_adapters(each, MIXED), case) for each in (one, other))
    assert difference(left, right) < case.tolerance


#: Whole models: the targets of a first adapter, and the others of a second one.
WHOLE = {
    "multi_head_attention": (["query", "value"], ["value", "attention_output", "head"]),
    "subclassed": (layers.Dense, [layers.EinsumDense, "head"]),
    "tied_embedding": (["tokens", layers.Dense], "tokens"),
    "hub_llama_causal_lm": (["query", "value"], ["query", "*feedforward*", "token_embedding"]),
    "mixed_bfloat16": (layers.Dense, "head"),
    "wrappers": (["*lstm*", "head"], "*forward*/recurrent_kernel"),
}
WHOLE_PAIRS = [(name, "lora", "dora") for name in WHOLE if name != "hub_llama_causal_lm"]  # that one generates, below
WHOLE_PAIRS += [("multi_head_attention", "dora", "dora"), ("multi_head_attention", "lora", "lora")]


def whole(name, first="lora", second="dora", **arguments):
    specimen = ZOO[name]()
    for own, method, rank, targets in (("a", first, 2, WHOLE[name][0]), ("b", second, 3, WHOLE[name][1])):
        keras_lora.apply_lora(specimen.model, method, rank=rank, alpha=3, targets=targets, name=own, **arguments)
        move(specimen.model, own)
    return specimen


@pytest.mark.parametrize(("name", "first", "second"), [each for each in WHOLE_PAIRS if each[0] != "subclassed"])
def test_a_whole_model_is_that_of_the_summed_kernels(name, first, second):
    specimen = whole(name, first, second)
    base = outputs(ZOO[name]().model, specimen.x)
    for strengths in (MIXED, {"a": 1.0}, {"b": 1.0}):
        expected = outputs(sum_into(ZOO[name]().model, specimen.model, strengths), specimen.x)
        keras_lora.activate_adapters(specimen.model, strengths)
        assert difference(outputs(specimen.model, specimen.x), expected) < specimen.tolerance, strengths
        assert difference(expected, base) > 1e-3, "the change is too small to be seen"
    assert difference(outputs(keras_lora.activate_adapters(specimen.model, None), specimen.x), base) == 0


@pytest.mark.parametrize("name", ["int8"])
def test_on_a_quantised_base_two_adapters_are_one_with_both_their_columns(name):
    two, one = ZOO[name]().model, ZOO[name]().model
    for own, rank in (("a", 2), ("b", 3)):
        keras_lora.apply_lora(two, rank=rank, alpha=rank * 0.5, name=own)
        move(two, own)
    keras_lora.activate_adapters(two, MIXED)
    keras_lora.apply_lora(one, rank=5, alpha=5)
    for address, adapter in found_of(one, "default").items():
        a, b = found_of(two, "a")[address], found_of(two, "b")[address]
        adapter.lora_a.assign(np.concatenate([value(a.lora_a), value(b.lora_a)], -1).astype("float32"))
        both = np.concatenate([0.5 * 0.7 * value(a.lora_b), 0.5 * -0.4 * value(b.lora_b)], -2)
        adapter.lora_b.assign(both.astype("float32"))
    specimen = ZOO[name]()
    left, base = outputs(two, specimen.x), outputs(specimen.model, specimen.x)
    assert difference(left, outputs(one, specimen.x)) < specimen.tolerance
    assert difference(left, base) > 1e-2
    assert difference(outputs(keras_lora.activate_adapters(two, None), specimen.x), base) == 0


def test_a_dozen_adapters_of_one_kernel_add_up():
    model = keras.Sequential([keras.Input((DIM,)), layers.Dense(5)])
    names = [f"n{index}" for index in range(12)]
    for name in names:
        keras_lora.apply_lora(model, rank=1, head=None, name=name)
        move(model, name)
    x, layer = numbers(BATCH, DIM), model.layers[0]
    w = value(layer.linear_map.kernel) + sum(value(each.delta_kernel(None)) for each in slots.adapters_in(layer))
    assert difference(outputs(keras_lora.activate_adapters(model, names), x), [x @ w + value(layer.bias)]) < 3e-6


# Switching.


def test_activating_by_name_names_mapping_or_none():
    model = whole("multi_head_attention").model
    assert keras_lora.active_adapters(model) == {"b": 1.0}
    for given, active in [
        ("a", {"a": 1.0}),
        (["a", "b"], {"a": 1.0, "b": 1.0}),
        ((name for name in ["b"]), {"b": 1.0}),
        ({"a": 2, "b": np.float32(-0.5)}, {"a": 2.0, "b": -0.5}),
        ({"a": 0, "b": 1}, {"b": 1.0}),
        ([], {}),
        ("b", {"b": 1.0}),
        (None, {}),
    ]:
        assert keras_lora.activate_adapters(model, given) is model
        assert keras_lora.active_adapters(model) == active


def test_switching_leaves_what_trains():
    model = whole("multi_head_attention").model
    before = [id(v) for v in model.trainable_variables]
    keras_lora.activate_adapters(model, "a")
    with keras_lora.disable_adapters(model):
        assert [id(v) for v in model.trainable_variables] == before
    assert [id(v) for v in model.trainable_variables] == before


def irregular():
    """Two adapters, of which one has another strength in one layer."""
    specimen = whole("multi_head_attention")
    keras_lora.activate_adapters(specimen.model, {"a": 0.5, "b": 0.25})
    next(iter(found_of(specimen.model, "a").values())).strength.assign(0.3)
    return specimen


@pytest.mark.every_backend
def test_disabled_is_the_base_and_restores_each_strength_however_it_is_left():
    specimen = irregular()
    model, x = specimen.model, specimen.x
    base, before, strengths = outputs(ZOO["multi_head_attention"]().model, x), outputs(model, x), state(model)[1]
    active = keras_lora.active_adapters(model)
    assert math.isnan(active["a"])
    assert active["b"] == 0.25
    assert keras_lora.list_adapters(model).adapters["a"]["strength"] == "irregular"
    with keras_lora.disable_adapters(model) as given:
        assert given is model
        assert keras_lora.active_adapters(model) == {}
        assert difference(outputs(model, x), base) == 0
        with keras_lora.disable_adapters(model):
            assert difference(outputs(model, x), base) == 0
        assert keras_lora.active_adapters(model) == {}
        assert difference(outputs(model, x), base) == 0
    assert state(model)[1] == strengths
    assert difference(outputs(model, x), before) == 0

    def left_by_an_exception():
        with keras_lora.disable_adapters(model):
            keras_lora.activate_adapters(model, {"a": 3})
            raise RuntimeError("left")

    with pytest.raises(RuntimeError, match="left"):
        left_by_an_exception()
    assert state(model)[1] == strengths
    assert difference(outputs(model, x), before) == 0


@pytest.mark.parametrize("arguments", [{"bias": "lora_only"}, {"bias": "all"}, {"train": "head"}])
def test_disabled_is_the_base_whatever_trains_beside(arguments):
    specimen = ZOO["multi_head_attention"]()
    before = outputs(specimen.model, specimen.x)
    keras_lora.apply_lora(specimen.model, rank=1, name="a", **arguments)
    perturb(specimen.model)
    assert difference(outputs(specimen.model, specimen.x), before) > 1e-3
    with keras_lora.disable_adapters(specimen.model):
        assert difference(outputs(specimen.model, specimen.x), before) == 0


# Names.


def two_named(name):
    """A model with an adapter "first" and one called `name`, which have the same numbers whatever that is."""
    keras.utils.clear_session()  # Keras counts names up
    specimen = ZOO["multi_head_attention"]()
    for own, seed in (("first", 1), (name, 2)):
        keras_lora.apply_lora(specimen.model, rank=2, targets=["query", "head"], name=own)
        perturb(specimen.model, seed=seed)
    return specimen


NAMES = ["dense", "query", "layers/0/_query_dense", "first/lora_a", ":base.0.", "a.b  c ünï-名", "adapter_2", "x" * 2000]


def test_a_name_is_in_no_number_and_no_key(tmp_path):
    usual = two_named("usual")
    paths = [v.path for v in usual.model.variables]
    keras_lora.activate_adapters(usual.model, {"first": 0.5, "usual": 2})
    expected = outputs(usual.model, usual.x)
    keras_lora.save_adapter(usual.model, tmp_path / "usual.safetensors", name="usual")
    for name in NAMES:
        model = two_named(name).model
        assert list(named_adapters(model)) == ["first", name]
        assert [v.path for v in model.variables] == paths
        keras_lora.activate_adapters(model, {"first": 0.5, name: 2})
        assert difference(outputs(model, usual.x), expected) == 0
        keras_lora.save_adapter(model, tmp_path / "named.safetensors", name=name)
        assert (tmp_path / "named.safetensors").read_bytes() == (tmp_path / "usual.safetensors").read_bytes()
        model.save(tmp_path / "m.keras")
        assert keras_lora.active_adapters(keras.saving.load_model(tmp_path / "m.keras")) == {"first": 0.5, name: 2.0}


@pytest.mark.every_backend
def test_every_variable_has_a_path_of_its_own():
    """Keras's `get_state_tree` asks for it, and its Orbax checkpoints are made of that."""
    model = whole("multi_head_attention", "lora", "lora").model
    paths = [v.path for v in model.variables]
    assert sorted(set(paths)) == sorted(paths)
    model.compile("adam", "mse")
    assert model.get_state_tree()


REFUSALS = {
    "duplicate": (lambda m, f: keras_lora.apply_lora(m, name="a"), "has an adapter 'a' already"),
    "no name": (lambda m, f: keras_lora.apply_lora(m), "is adapted already"),
    "empty name": (lambda m, f: keras_lora.apply_lora(m, name=""), "`name` must be a word"),
    "number as name": (lambda m, f: keras_lora.apply_lora(m, name=3), "`name` must be a word"),
    "no such target": (lambda m, f: keras_lora.apply_lora(m, name="c", targets="qery"), "qery"),
    "activate unknown": (lambda m, f: keras_lora.activate_adapters(m, "c"), r"has no adapter \['c'\]"),
    "activate part of a name": (lambda m, f: keras_lora.activate_adapters(m, ["a", ""]), r"has no adapter \[''\]"),
    "activate known and unknown": (
        lambda m, f: keras_lora.activate_adapters(m, {"a": 0.1, "c": 1}),
        r"has no adapter \['c'\]",
    ),
    "nan": (lambda m, f: keras_lora.activate_adapters(m, {"a": math.nan}), "must be a finite number"),
    "infinite": (lambda m, f: keras_lora.activate_adapters(m, {"a": 1, "b": -math.inf}), "must be a finite number"),
    "bool": (lambda m, f: keras_lora.activate_adapters(m, {"a": True}), "must be a finite number"),
    "word as strength": (lambda m, f: keras_lora.activate_adapters(m, {"a": "1"}), "must be a finite number"),
    "train unknown": (lambda m, f: keras_lora.train_adapters(m, ["a", "c"]), r"has no adapter \['c'\]"),
    "delete unknown": (lambda m, f: keras_lora.delete_adapter(m, "c"), r"has no adapter \['c'\]"),
    "save none of several": (lambda m, f: keras_lora.save_adapter(m, f / "new.safetensors"), "has several adapters"),
    "save unknown": (lambda m, f: keras_lora.save_adapter(m, f / "new.safetensors", name="c"), "has no adapter 'c'"),
    "load into none of several": (lambda m, f: keras_lora.load_adapter(m, f / "a.safetensors"), "has several adapters"),
    "load into another": (lambda m, f: keras_lora.load_adapter(m, f / "a.safetensors", name="b"), "does not fit"),
    "load as empty": (lambda m, f: keras_lora.load_adapter(m, f / "a.safetensors", name=""), "`name` must be a word"),
    "unmerge": (lambda m, f: keras_lora.unmerge_lora(m), "nothing to unmerge"),
}


@pytest.fixture(scope="module")
def refusing():
    """One model for all refusals: they change nothing."""
    specimen = irregular()
    specimen.model.compile("sgd", "mse")
    return specimen


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_refusal_changes_nothing(refusal, refusing, tmp_path):
    specimen, model = refusing, refusing.model
    keras_lora.save_adapter(model, tmp_path / "a.safetensors", name="a")
    before, numbers_before = outputs(model, specimen.x), arrays(model.variables)
    found, compiled, do = state(model), model.predict_function, REFUSALS[refusal]
    with pytest.raises(ValueError, match=do[1]):
        do[0](model, tmp_path)
    assert repr(state(model)) == repr(found)  # as text: there is a NaN in it
    assert same(arrays(model.variables), numbers_before)
    assert model.compiled
    assert model.predict_function is compiled
    assert difference(outputs(model, specimen.x), before) == 0
    assert not (tmp_path / "new.safetensors").exists()


@pytest.mark.parametrize(
    "function",
    [
        lambda model: keras_lora.activate_adapters(model, "a"),
        keras_lora.active_adapters,
        lambda model: keras_lora.disable_adapters(model).__enter__(),
        lambda model: keras_lora.train_adapters(model, "a"),
        lambda model: keras_lora.delete_adapter(model, "a"),
    ],
)
def test_a_plain_model_is_refused(function):
    model = ZOO["sequential"]().model
    found = facts(model)
    with pytest.raises(ValueError, match=r"\(\)` found no adapter in"):
        function(model)
    assert facts(model) == found


# Training one of several.


def trained_ids(model):
    return [id(v) for v in model.trainable_variables]


def planned(model, *names):
    """The variables of these adapters that are to train."""
    found = [adapter for name in names for adapter in found_of(model, name).values()]
    return {id(v) for adapter in found for v in adapter.saved_weights.values()}


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [each for each in WHOLE_PAIRS if each[0] not in ("wrappers", "subclassed", "mixed_bfloat16")],
)
def test_training_one_of_several_moves_that_one_alone(name, first, second):
    specimen = whole(name, first, second)
    model = specimen.model
    assert set(trained_ids(model)) == planned(model, "b")
    assert keras_lora.train_adapters(model, "a") is model
    keras_lora.activate_adapters(model, MIXED)
    model.compile(keras.optimizers.SGD(0.1), **(specimen.compile or {"loss": losses(model)}))
    assert set(trained_ids(model)) == planned(model, "a")
    before = arrays(model.weights)
    model.fit(specimen.x, specimen.y, epochs=3, shuffle=False, verbose=0)
    moved = {id(v) for v, was in zip(model.weights, before, strict=True) if not np.array_equal(value(v), was)}
    assert moved == planned(model, "a")
    assert keras_lora.active_adapters(model) == {name: float(np.float32(each)) for name, each in MIXED.items()}


def losses(model):
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def test_training_beside_an_adapter_that_is_off_is_training_alone():
    """Some steps: on torch, a gradient that is not reset between them adds up."""
    beside, alone = ZOO["multi_head_attention"](), ZOO["multi_head_attention"]()
    histories = []
    for specimen in (beside, alone):
        keras_lora.apply_lora(specimen.model, rank=2, targets="query", name="a")
        if specimen is beside:
            keras_lora.apply_lora(specimen.model, rank=2, targets="query", name="b")
            keras_lora.activate_adapters(keras_lora.train_adapters(specimen.model, "a"), "a")
        move(specimen.model, "a")
        specimen.model.compile(keras.optimizers.SGD(0.1), "mse")
        histories.append(specimen.model.fit(specimen.x, specimen.y, epochs=5, shuffle=False, verbose=0).history["loss"])
    assert histories[0] == pytest.approx(histories[1], rel=1e-5)
    assert histories[0][-1] < histories[0][0]


@pytest.mark.every_backend
def test_what_trains_at_every_step_of_a_life(tmp_path):
    model = ZOO["multi_head_attention"]().model
    factors = {}
    for name, rank, targets in (("a", 2, ["query", "value"]), ("b", 3, ["value", "head"]), ("c", 1, "key")):
        keras_lora.apply_lora(model, rank=rank, targets=targets, name=name)
        factors[name] = planned(model, name)
        assert set(trained_ids(model)) == factors[name]
    for names in ("a", ["a", "c"], ["b"], ["a", "b", "c"], []):
        keras_lora.train_adapters(model, names)
        expected = planned(model, *([names] if isinstance(names, str) else names))
        assert set(trained_ids(model)) == expected
        model.compile("adam", "mse")
        assert set(trained_ids(model)) == expected
        model.trainable = False
        assert trained_ids(model) == []
        model.trainable = True
        assert set(trained_ids(model)) == expected
        model.save(tmp_path / "m.keras")
        loaded = keras.saving.load_model(tmp_path / "m.keras")
        assert len(loaded.trainable_variables) == len(expected)
        assert [v.path for v in loaded.trainable_variables] == [v.path for v in model.trainable_variables]
        if expected:
            loaded.trainable = False
            assert trained_ids(loaded) == []
            loaded.trainable = True
            assert len(loaded.trainable_variables) == len(expected)


def test_a_head_and_biases_train_with_their_adapter():
    model = ZOO["multi_head_attention"]().model
    keras_lora.apply_lora(model, rank=1, name="a", train="head", bias="lora_only")
    beside = set(trained_ids(model)) - planned(model, "a")
    assert len(beside) == 2 + 4
    keras_lora.apply_lora(model, rank=1, targets="query", name="b")
    assert set(trained_ids(model)) == planned(model, "b")
    keras_lora.train_adapters(model, "a")
    assert set(trained_ids(model)) == beside | planned(model, "a")
    keras_lora.train_adapters(model, ["a", "b"])
    assert set(trained_ids(model)) == beside | planned(model, "a") | planned(model, "b")
    keras_lora.delete_adapter(model, "a")
    assert set(trained_ids(model)) == planned(model, "b")


# Deleting.


@pytest.mark.parametrize("name", ["multi_head_attention", "subclassed", "tied_embedding", "wrappers"])
def test_deleting_the_last_is_removing(name):
    plain = ZOO[name]()
    base, found = outputs(plain.model, plain.x), facts(plain.model)
    keras_lora.apply_lora(plain.model, rank=2, targets=WHOLE[name][0], name="a")
    keras_lora.apply_lora(plain.model, "dora", rank=3, targets=WHOLE[name][1], name="b")
    for own in ("a", "b"):
        move(plain.model, own)
    keras_lora.delete_adapter(plain.model, "a")
    assert list(named_adapters(plain.model)) == ["b"]
    assert keras_lora.delete_adapter(plain.model, "b") is plain.model
    assert facts(plain.model) == found
    assert difference(outputs(plain.model, plain.x), base) == 0


@pytest.mark.parametrize("deleted", ["a", "b"])
@pytest.mark.parametrize("name", ["multi_head_attention", "subclassed", "wrappers"])
def test_what_is_left_is_as_if_the_other_had_never_been(name, deleted):
    specimen = whole(name)
    left = {"a": "b", "b": "a"}[deleted]
    keras_lora.activate_adapters(specimen.model, {left: 0.6})
    before = outputs(specimen.model, specimen.x)
    keras_lora.delete_adapter(specimen.model, deleted)
    assert keras_lora.active_adapters(specimen.model) == {left: float(np.float32(0.6))}
    assert difference(outputs(specimen.model, specimen.x), before) < specimen.tolerance / 2
    only, (method, rank, index) = ZOO[name]().model, {"a": ("lora", 2, 0), "b": ("dora", 3, 1)}[left]
    keras_lora.apply_lora(only, method, rank=rank, targets=WHOLE[name][index])
    assert [(v.name, v.shape) for v in specimen.model.weights] == [(v.name, v.shape) for v in only.weights]


def slots_of(model):
    """By name and address, the attribute that holds an adapter."""
    return {
        (name, address): slots.slot_of(linear.layer, adapter)
        for name, each in named_adapters(model).items()
        for address, (linear, adapter) in each.items()
    }


@pytest.mark.parametrize("name", ["wrappers"])
def test_a_slot_is_used_again_and_the_whole_model_goes_on_after_a_file(name, tmp_path):
    specimen = whole(name)
    model = specimen.model
    keras_lora.apply_lora(model, rank=1, targets=WHOLE[name][0], name="c")
    freed = {slot for (own, _), slot in slots_of(model).items() if own == "a"}
    keras_lora.delete_adapter(model, "a")
    keras_lora.apply_lora(model, "dora", rank=2, targets=WHOLE[name][0], name="d")
    move(model, "c")
    move(model, "d")
    assert {slot for (own, _), slot in slots_of(model).items() if own == "d"} == freed
    keras_lora.train_adapters(model, ["b", "d"])
    keras_lora.activate_adapters(model, {"b": 0.5, "c": -0.25, "d": 1})
    model.compile(keras.optimizers.Adam(1e-2), **(specimen.compile or {"loss": losses(model)}))
    model.fit(specimen.x, specimen.y, epochs=2, shuffle=False, verbose=0)
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert list(named_adapters(loaded)) == list(named_adapters(model))
    assert slots_of(loaded) == slots_of(model)
    assert keras_lora.active_adapters(loaded) == keras_lora.active_adapters(model)
    assert [v.name for v in loaded.trainable_variables] == [v.name for v in model.trainable_variables]
    assert same(arrays(loaded.trainable_variables), arrays(model.trainable_variables))
    assert same(arrays(loaded.optimizer.variables), arrays(model.optimizer.variables))
    assert difference(outputs(loaded, specimen.x), outputs(model, specimen.x)) < 1e-6
    resumed, uninterrupted = (
        each.fit(specimen.x, specimen.y, epochs=2, shuffle=False, verbose=0).history["loss"] for each in (loaded, model)
    )
    assert resumed == pytest.approx(uninterrupted, rel=1e-5)


def live_variables():
    gc.collect()
    return sum(issubclass(type(each), keras.Variable) for each in gc.get_objects())


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.full
def test_deleting_frees_the_memory(beside):
    specimen = ZOO["multi_head_attention"]()
    model = specimen.model
    if beside:
        keras_lora.apply_lora(model, rank=1, name="a")

    def cycle():
        # TensorFlow keeps gradients that are written by hand, as that of dropout is, in a registry for good.
        method = keras_lora.DoRA(2, dropout=0.0 if BACKEND == "tensorflow" else 0.1)
        keras_lora.apply_lora(model, method, targets=["query", "value", "head"], name="b")
        model.compile("adam", "mse")
        model.fit(specimen.x, specimen.y, verbose=0)
        model.evaluate(specimen.x, specimen.y, verbose=0)
        model.predict(specimen.x, verbose=0)
        found = [layer for adapter in found_of(model, "b").values() for layer in with_sublayers(adapter)]
        kept = [weakref.ref(each) for layer in found for each in (layer, *layer.variables)]
        kept += [weakref.ref(v) for v in model.optimizer.variables if v.shape]
        keras_lora.delete_adapter(model, "b")
        return kept

    kept = cycle()
    gc.collect()
    assert sum(each() is not None for each in kept) == 0
    count, own = live_variables(), len(model.variables)
    for _ in range(2):
        cycle()
    assert live_variables() == count
    assert len(model.variables) == own
    if BACKEND == "torch":
        assert len(list(model.parameters())) == own
    if beside:
        assert list(named_adapters(model)) == ["a"]


@pytest.mark.full
def test_cycles_of_adding_and_deleting_leave_no_variable():
    """Without `compile`, so that only the model itself can hold them."""
    model = ZOO["multi_head_attention"]().model
    keras_lora.apply_lora(model, rank=1, name="a")
    counts = set()
    for _ in range(5):
        keras_lora.apply_lora(model, keras_lora.DoRA(2, dropout=0.1), targets=["query", "head"], name="b")
        keras_lora.delete_adapter(model, "b")
        counts.add((live_variables(), len(model.variables), len(list(named_adapters(model)["a"]))))
    assert len(counts) == 1


# Merging several.


@pytest.mark.parametrize(("name", "first", "second"), WHOLE_PAIRS)
def test_the_active_sum_is_merged_and_comes_apart_again_bit_for_bit(name, first, second):
    specimen = whole(name, first, second)
    model = specimen.model
    keras_lora.activate_adapters(model, MIXED)
    before, numbers_before = outputs(model, specimen.x), arrays(model.variables)
    held, order = slots_of(model), list(named_adapters(model))
    keras_lora.merge_lora(model, keep=True)
    outputs(model, specimen.x)  # a plain recurrent cell gets attributes when it first runs
    found = state(keras_lora.unmerge_lora(model))
    keras_lora.merge_lora(model, keep=True)
    assert adapted_maps(model) == {}
    assert difference(outputs(model, specimen.x), before) < max(5e-6, specimen.tolerance)
    keras_lora.unmerge_lora(model)
    assert list(named_adapters(model)) == order
    assert slots_of(model) == held
    assert state(model) == found
    assert same(arrays(model.variables), numbers_before)
    assert difference(outputs(model, specimen.x), before) == 0


def test_merging_refuses_to_lose_an_adapter_that_is_not_active():
    specimen = whole("multi_head_attention")
    before = outputs(keras_lora.activate_adapters(specimen.model, "a"), specimen.x)
    keras_lora.merge_lora(specimen.model, keep=True)  # nothing is lost
    keras_lora.unmerge_lora(specimen.model)
    with pytest.raises(ValueError, match=r"would lose the adapters \['b'\], which are not active"):
        keras_lora.merge_lora(specimen.model)
    assert difference(outputs(specimen.model, specimen.x), before) == 0
    keras_lora.merge_lora(keras_lora.delete_adapter(specimen.model, "b"))
    assert difference(outputs(specimen.model, specimen.x), before) < 5e-6


@pytest.mark.parametrize("name", ["multi_head_attention", "tied_embedding"])
def test_merging_one_after_the_other_is_merging_both(name, tmp_path):
    both, one = whole(name, "lora", "lora"), ZOO[name]()
    for own in ("a", "b"):
        keras_lora.save_adapter(both.model, tmp_path / f"{own}.safetensors", name=own)
        keras_lora.load_adapter(one.model, tmp_path / f"{own}.safetensors", name=own)
        keras_lora.merge_lora(one.model)
    keras_lora.merge_lora(keras_lora.activate_adapters(both.model, ["b", "a"]))
    assert difference(arrays(one.model.variables), arrays(both.model.variables)) < 1e-6
    assert difference(outputs(one.model, one.x), outputs(both.model, both.x)) < 5e-6


@pytest.mark.parametrize("keep", [True, False])
def test_one_adapter_that_is_not_finite_refuses_the_merge_of_all(keep):
    specimen = whole("multi_head_attention", "lora", "lora")
    model = specimen.model
    keras_lora.activate_adapters(model, MIXED)
    broken = next(iter(found_of(model, "b").values())).lora_b
    broken.assign(np.full(tuple(broken.shape), np.nan, "float32"))
    found, before = state(model), arrays(model.variables)
    with pytest.raises(ValueError, match="not finite"):
        keras_lora.merge_lora(model, keep=keep)
    assert state(model) == found
    assert same(arrays(model.variables), before)


# Files.


def test_an_adapter_is_saved_alone_and_loaded_under_another_name(tmp_path):
    specimen = whole("multi_head_attention")
    keras_lora.save_adapter(specimen.model, tmp_path / "b.safetensors", name="b")
    with safetensors.safe_open(tmp_path / "b.safetensors", framework="numpy") as file:
        addresses = {key.rpartition(":")[0] for key in file.keys()}  # noqa: SIM118
        assert set(json.loads(file.metadata()["keras_lora"])["adapters"]) == addresses == set(found_of(specimen.model, "b"))
    other = keras_lora.load_adapter(ZOO["multi_head_attention"]().model, tmp_path / "b.safetensors", name="x/y")
    assert keras_lora.active_adapters(other) == {"x/y": 1.0}
    left = outputs(keras_lora.activate_adapters(specimen.model, "b"), specimen.x)
    assert difference(outputs(other, specimen.x), left) < 1e-6


def test_several_files_into_one_model_and_one_into_a_deleted_name(tmp_path):
    specimen, model = whole("multi_head_attention"), ZOO["multi_head_attention"]().model
    for own, new in (("a", "one"), ("b", "two"), ("a", "three")):
        keras_lora.save_adapter(specimen.model, tmp_path / f"{own}.safetensors", name=own)
        keras_lora.load_adapter(model, tmp_path / f"{own}.safetensors", name=new)
        assert keras_lora.active_adapters(model) == {new: 1.0}
        assert set(trained_ids(model)) == planned(model, new)
    keras_lora.activate_adapters(specimen.model, MIXED)
    keras_lora.activate_adapters(model, {"one": 0.5, "two": -0.4, "three": 0.2})
    assert difference(outputs(model, specimen.x), outputs(specimen.model, specimen.x)) < 3e-6
    keras_lora.delete_adapter(model, "one")
    keras_lora.load_adapter(model, tmp_path / "b.safetensors", name="one")  # of another method and other layers
    keras_lora.activate_adapters(specimen.model, {"a": 0.5, "b": 2})
    keras_lora.activate_adapters(model, {"one": 1, "two": 1, "three": 0.5})
    assert difference(outputs(model, specimen.x), outputs(specimen.model, specimen.x)) < 3e-6


@pytest.mark.parametrize(
    ("name", "method"),
    [("multi_head_attention", keras_lora.DoRA), ("tied_embedding", keras_lora.LoRA)],
)
def test_a_larger_adapter_with_another_scale_takes_the_file(name, method, tmp_path):
    specimen, model = ZOO[name](), ZOO[name]().model
    targets = specimen.apply.get("targets") or {"tied_embedding": ["tokens", layers.Dense]}.get(name)
    keras_lora.apply_lora(specimen.model, method(2, alpha=3, rank_stabilized=True), targets=targets, name="small")
    move(specimen.model, "small")
    keras_lora.save_adapter(specimen.model, tmp_path / "small.safetensors")
    keras_lora.apply_lora(model, rank=1, targets=targets, name="other")
    keras_lora.apply_lora(model, method(5, alpha=11), targets=targets, name="large")
    move(model, "large")
    keras_lora.activate_adapters(model, {"large": 1})
    order = [id(v) for v in model.variables]
    keras_lora.load_adapter(model, tmp_path / "small.safetensors", name="large")
    assert [id(v) for v in model.variables] == order
    assert difference(outputs(model, specimen.x), outputs(specimen.model, specimen.x)) < 1e-6


@pytest.mark.parametrize(
    ("of_the_file", "of_the_model"),
    [
        (keras_lora.LoRA(3), keras_lora.LoRA(2)),
        (keras_lora.DoRA(3), keras_lora.DoRA(2)),
        (keras_lora.LoRA(2), keras_lora.DoRA(2)),
        (keras_lora.DoRA(2), keras_lora.LoRA(2)),
    ],
)
def test_an_adapter_that_cannot_hold_the_file_refuses_it(of_the_file, of_the_model, tmp_path):
    specimen, model = ZOO["multi_head_attention"](), ZOO["multi_head_attention"]().model
    keras_lora.save_adapter(keras_lora.apply_lora(specimen.model, of_the_file), tmp_path / "f.safetensors")
    keras_lora.apply_lora(model, rank=1, name="beside")
    keras_lora.apply_lora(model, of_the_model, name="mine")
    found, before = state(model), arrays(model.variables)
    with pytest.raises(ValueError, match=re.escape("cannot take that of the file: this one is")):
        keras_lora.load_adapter(model, tmp_path / "f.safetensors", name="mine")
    assert state(model) == found
    assert same(arrays(model.variables), before)


# No stale graph, and nothing traced again.


@pytest.mark.every_backend
def test_what_was_compiled_before_a_switch_is_right_after_it_and_not_traced_again(tmp_path):
    traces = []

    def counted(y):
        traces.append(y.shape)
        return keras.ops.tanh(y)

    model = keras.Sequential([keras.Input((6,)), layers.Dense(5, activation=counted), layers.Dense(2)])
    for name, method, rank in (("a", "lora", 2), ("b", "dora", 3)):
        keras_lora.apply_lora(model, method, rank=rank, alpha=rank, head=None, name=name)
        move(model, name)
        keras_lora.save_adapter(model, tmp_path / f"{name}.safetensors", name=name)
        move(model, name, size=0.4)
    keras_lora.train_adapters(model, ["a", "b"])
    x, y = numbers(BATCH, 6), numbers(BATCH, 2, seed=8)

    def by_hand():
        """The outputs in NumPy, from the definition and the strengths that are told."""
        h = x.astype("float64")
        for layer, after in zip(model.layers, (np.tanh, lambda h: h), strict=True):
            w = value(layer.linear_map.matrix)
            active = keras_lora.active_adapters(model)
            changes = [
                active.get(n.adapter_name, 0) * value(n.delta_kernel(layer.linear_map.matrix))
                for n in slots.adapters_in(layer)
            ]
            h = after(h @ (w + sum(changes)) + value(layer.bias))
        return h

    def check(active, fits=True):
        assert keras_lora.active_adapters(model) == {name: float(np.float32(each)) for name, each in active.items()}
        expected = by_hand()
        assert difference(outputs(model, x), [expected]) < 3e-6
        assert model.evaluate(x, y, verbose=0) == pytest.approx(np.mean((expected - y) ** 2), rel=1e-5)
        if not fits:
            return
        before = {name: [arrays(each.weights) for each in found_of(model, name).values()] for name in ("a", "b")}
        loss = model.fit(x, y, batch_size=BATCH, verbose=0).history["loss"][0]
        assert loss == pytest.approx(np.mean((expected - y) ** 2), rel=1e-5)
        for name, was in before.items():  # no gradient flows through what is off
            moved = [
                not same(arrays(each.weights), old) for each, old in zip(found_of(model, name).values(), was, strict=True)
            ]
            assert moved == [name in active] * 2
        assert difference(outputs(model, x), [by_hand()]) < 3e-6
        seen.append(expected)

    seen = []
    model.compile(keras.optimizers.SGD(0.05), "mse")
    check({"b": 1})
    functions, traced = (model.train_function, model.test_function, model.predict_function), len(traces)
    assert traced > 0
    for strengths in ({"a": 1}, {"a": 0.5, "b": -0.25}, {"a": 2, "b": 0.1}, {"b": 1.5}):
        keras_lora.activate_adapters(model, strengths)
        check(strengths)
    for name in ("a", "b"):
        keras_lora.load_adapter(model, tmp_path / f"{name}.safetensors", name=name)
        check({"b": 1.5})
    with keras_lora.disable_adapters(model):
        check({}, fits=BACKEND != "torch")  # torch refuses a loss on which nothing that trains has an effect
    check({"b": 1.5})
    keras_lora.activate_adapters(model, None)
    check({})
    assert (model.train_function, model.test_function, model.predict_function) == functions
    assert len({each.tobytes() for each in seen}) >= 8
    if BACKEND != "torch":  # torch runs eagerly: there is no trace
        assert len(traces) == traced


def test_generate_compiled_before_a_switch_gives_the_tokens_of_after_it(monkeypatch):
    specimen = whole("hub_llama_causal_lm", "lora", "dora")
    model = specimen.model
    for name in ("a", "b"):
        move(model, name, size=2.0)
    given = {key: np.array(each) for key, each in specimen.x.items()}
    for each in given.values():
        each[:, -3:] = 0

    def tokens(model):
        return np.asarray(model.generate(given, stop_token_ids=None)["token_ids"]).tolist()

    calls, plain = [], keras_lora.LoRA.add_product
    monkeypatch.setattr(keras_lora.LoRA, "add_product", lambda *args, **kwargs: calls.append(1) or plain(*args, **kwargs))
    model.compile(sampler="greedy")
    keras_lora.activate_adapters(model, None)
    found = {"none": tokens(model)}
    compiled, traced = model.generate_function, len(calls)
    choices = {"a": "a", "b": "b", "both": MIXED, "other": {"a": -1, "b": 2}}
    for name, strengths in choices.items():
        found[name] = tokens(keras_lora.activate_adapters(model, strengths))
        with keras_lora.disable_adapters(model):
            assert tokens(model) == found["none"]
    assert model.generate_function is compiled
    if BACKEND != "torch":
        assert len(calls) == traced > 0
    assert len({str(each) for each in found.values()}) >= 3
    model.generate_function = None
    assert tokens(keras_lora.activate_adapters(model, MIXED)) == found["both"]
    merged = sum_into(ZOO["hub_llama_causal_lm"]().model, model, MIXED)
    merged.compile(sampler="greedy")
    assert tokens(merged) == found["both"]


# What adapters share.


def small():
    keras.utils.set_random_seed(0)
    hidden, head = layers.Dense(5, name="hidden"), layers.Dense(3, name="head")
    return keras.Sequential([keras.Input((6,)), hidden, head])


@pytest.fixture
def with_head(tmp_path):
    """A file of an adapter and of a head that moved."""
    model = keras_lora.apply_lora(small(), rank=2, targets="hidden", train="head")
    perturb(model, size=1.0)
    keras_lora.save_adapter(model, tmp_path / "head.safetensors")
    return tmp_path / "head.safetensors"


def test_a_head_is_not_loaded_into_a_model_that_does_not_train_it(with_head):
    model = keras_lora.apply_lora(small(), rank=2, targets="hidden", name="a")
    before = arrays(model.variables)
    with pytest.raises(ValueError, match="the file has trained variables of 'layers/1'; the model does not train them"):
        keras_lora.load_adapter(model, with_head, name="a")
    assert same(arrays(model.variables), before)


def test_what_dora_computed_from_a_kernel_follows_a_head_that_is_loaded(with_head):
    model = keras_lora.apply_lora(small(), "dora", rank=2, head=None, name="a")
    keras_lora.load_adapter(model, with_head, name="b")
    x = numbers(4, 6)
    before = outputs(keras_lora.activate_adapters(model, "a"), x)
    keras_lora.merge_lora(keras_lora.delete_adapter(model, "b"))
    assert difference(outputs(model, x), before) < 3e-6


def test_a_kernel_that_dora_measured_does_not_train_in_full():
    model = keras_lora.apply_lora(small(), "dora", rank=2, head=None, name="a")
    with pytest.raises(ValueError, match=r"'head' cannot train in full: its adapters \['a'\]"):
        keras_lora.apply_lora(model, rank=2, targets="hidden", train="head", name="b")
    model = keras_lora.apply_lora(small(), rank=2, targets="hidden", train="head", name="a")
    with pytest.raises(ValueError, match="'head' trains in full, but a DoRA reads the kernel only once"):
        keras_lora.apply_lora(model, "dora", rank=2, head=None, name="b")


def test_a_head_that_was_loaded_frozen_stays_so_when_an_adapter_is_added(with_head):
    model = keras_lora.load_adapter(small(), with_head, trainable=False, name="a")
    keras_lora.apply_lora(model, rank=1, targets="hidden", name="b")
    assert {v.name for v in model.trainable_variables} == {"lora_a", "lora_b"}
