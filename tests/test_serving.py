"""An adapter for each example of a batch: equal to running each adapter alone, for every layer type that has examples."""

import functools

import keras
import numpy as np
import pytest
from helpers import covering, difference, outputs, value
from keras import layers, ops
from test_law import CASES, numbers, run
from zoo import ZOO

import keras_lora
from keras_lora.adapters import PerExample
from keras_lora.adapters.per_example import using
from keras_lora.layers.changed_kernel import ChangedKernelLayer
from keras_lora.swap.adapted import adapted_class, maps_by_address, named_adapters

BACKEND = keras.backend.backend()


def move(model, seed=0, size=0.3):
    rng = np.random.default_rng(seed)
    for found in named_adapters(model).values():
        for _, adapter in found.values():
            for v in adapter.saved_weights.values():
                v.assign((size * rng.normal(size=tuple(v.shape))).astype("float32"))


def kernels_used(case):
    """The kernels that the call of a case uses."""
    maps = maps_by_address(case.built()).values()
    return [linear for linear in maps if not case.unused or (linear.part == "reverse_embeddings") == bool(case.call)]


@functools.cache
def apart():
    """The cases in which each example can have an adapter; found by building every layer, which takes JAX a minute."""
    return [name for name, case in CASES.items() if any(linear.no_examples is None for linear in kernels_used(case))]


#: One of each kind of layer, and of each way that its axes can lie.
KINDS = [
    *("dense", "dense_with_a_layer_as_activation", "time_distributed", "registered_subclass_like_its_parent"),
    *("einsum_query", "einsum_output", "einsum_feed_forward_ellipsis_with_two_axes", "einsum_output_axes_exchanged"),
    *("einsum_experts_inside", "einsum_per_head", "conv1d_grouped", "conv2d", "conv2d_channels_first_grouped", "conv3d"),
    *("conv1d_transpose", "separable2d", "embedding_masked", "reversible_embedding", "reversible_embedding_capped_reverse"),
    *("reversible_embedding_untied_reverse", "reversible_embedding_in_float32_reverse"),
]


@pytest.mark.torch_first
def test_every_class_of_layers_with_examples_is_tried():
    assert {CASES[name].cls for name in KINDS} >= {CASES[name].cls for name in apart()} - ONE_OF_ANOTHER_SIZE
    assert set(KINDS) <= set(apart())


#: The same code as a layer that is tried, in another number of dimensions.
ONE_OF_ANOTHER_SIZE = {layers.Conv2DTranspose, layers.Conv3DTranspose, layers.SeparableConv1D}


@pytest.mark.parametrize("name", covering(KINDS, ["dense", "einsum_query", "conv1d_grouped", "embedding_masked"]))
def test_each_example_gets_what_its_own_adapter_gives(name):
    case = CASES[name]
    targets = [linear for linear in kernels_used(case) if linear.no_examples is None]
    parts = {linear.part for linear in targets}

    def adapted(adapter):
        layer = case.built()
        excluded = [linear.part for linear in kernels_used(case) if linear.part not in parts]
        if case.unused:
            excluded, chosen = ([], "reverse_embeddings") if case.call else (["reverse_embeddings"], lambda each: True)
        else:
            chosen = lambda each: True  # noqa: E731
        return keras_lora.apply_lora(layer, adapter, targets=chosen, exclude=excluded or None)

    base, expected = case.built(), []
    layer = adapted(PerExample(rank=3, capacity=2))
    places = {address: place for found in named_adapters(layer).values() for address, (_, place) in found.items()}
    for number, rank in ((1, 2), (2, 3)):
        alone = adapted(keras_lora.LoRA(rank, alpha=5))
        move(alone, seed=number)
        for found in named_adapters(alone).values():
            for address, (_, adapter) in found.items():
                held = {key: np.asarray(value(v), "float32") for key, v in adapter.saved_weights.items()}
                places[address].put(number, places[address].values_from(adapter, held))
        expected.append(value(run(lambda x, alone=alone: alone(x, **case.call), case)))
    plain = value(run(lambda x: base(x, **case.call), case))
    for index in ([0, 1], [2, 1], [1, 0]):
        index = (index * len(case.x))[: len(case.x)]

        def mixed(x, index=index):
            with using(ops.convert_to_tensor(np.array(index, "int32"))):
                return layer(x, **case.call)

        wanted = np.stack([(plain if i == 0 else expected[i - 1])[row] for row, i in enumerate(index)])
        assert difference(value(run(mixed, case)), wanted) < max(5e-6, case.tolerance)
    assert difference(value(run(lambda x: layer(x, **case.call), case)), plain) == 0
    assert all(difference(each, plain) > 1e-2 for each in expected)


@pytest.mark.torch_first
def test_a_layer_without_an_axis_of_examples_is_refused():
    for name in CASES.keys() - set(apart()):
        layer = CASES[name].built()
        with pytest.raises(ValueError, match="examples cannot use different adapters"):
            keras_lora.apply_lora(layer, PerExample(), targets=lambda each: True)
        assert not named_adapters(layer), name


@pytest.mark.torch_first
def test_all_layers_with_a_whole_changed_kernel_are_refused():
    effective = {
        name for name, case in CASES.items() if (cls := adapted_class(case.cls)) and issubclass(cls, ChangedKernelLayer)
    }
    whole = CASES.keys() - set(apart())
    assert effective <= whole
    assert {"einsum_experts", "registered_experts", "lstm"} <= whole


class Counter(layers.Layer):
    """Counts how often it is traced, or run."""

    def __init__(self):
        super().__init__()
        self.count = [0]

    def call(self, x):
        self.count[0] += 1
        return x


def base(counter=None):
    keras.utils.set_random_seed(7)
    x = keras.Input((5, 8))
    y = layers.MultiHeadAttention(2, 4, name="attention")(x, x)
    y = layers.Dense(16, activation="relu", name="up")(y)
    y = y if counter is None else counter(y)
    return keras.Model(x, layers.Dense(3, name="head")(layers.GlobalAveragePooling1D()(y)))


def files(tmp_path, count=3, ranks=(1, 2, 4)):
    paths = {}
    for number in range(count):
        model = keras_lora.apply_lora(base(), rank=ranks[number % len(ranks)])
        move(model, seed=number)
        paths[f"task {number}"] = tmp_path / f"{number}.safetensors"
        keras_lora.save_adapter(model, paths[f"task {number}"])
    return paths


def alone(path, x):
    return outputs(keras_lora.load_adapter(base(), path), x)[0]


def test_a_mixed_batch_equals_each_adapter_alone_and_nothing_is_traced_again(tmp_path):
    counter = Counter()
    paths = files(tmp_path)
    served = keras_lora.MultiAdapterModel(base(counter), capacity=3, rank=4)
    x = numbers(6, 5, 8)
    wanted = {None: outputs(base(), x)[0], **{name: alone(path, x) for name, path in paths.items()}}

    def check(names):
        found = served.predict({"inputs": x, "adapter_index": served.index_of(names)}, verbose=0, batch_size=6)
        assert difference(found, np.stack([wanted[name][row] for row, name in enumerate(names)])) < 5e-6

    check([None] * 6)
    traced = counter.count[0]
    for name, path in paths.items():
        served.load(path, name)
    check(["task 0", "task 1", None, "task 2", "task 1", "task 0"])
    check(["task 2", "task 1", "task 0", "task 2", None, None])
    served.delete("task 1")
    assert served.load(paths["task 1"], "again") == 2
    wanted["again"] = wanted["task 1"]
    check(["again", "task 0", "again", None, "task 2", "again"])
    served.load(paths["task 0"], "task 2")  # other weights under a name
    wanted["task 2"] = wanted["task 0"]
    check(["task 2", "again"] * 3)
    if BACKEND != "torch":  # torch runs without tracing
        assert counter.count[0] == traced


def test_an_index_that_is_stale_gets_the_base(tmp_path):
    served = keras_lora.MultiAdapterModel(base(), capacity=2, rank=4)
    index = served.load(files(tmp_path, 1)["task 0"], "a")
    served.delete("a")
    x = numbers(2, 5, 8)
    found = served.predict({"inputs": x, "adapter_index": np.full(2, index, "int32")}, verbose=0)
    assert difference(found, outputs(base(), x)) == 0


def test_a_served_model_goes_through_a_keras_file(tmp_path):
    served = keras_lora.MultiAdapterModel(base(), capacity=2, rank=2)
    served.load(files(tmp_path, 2)["task 1"], "one")
    batch = {"inputs": numbers(2, 5, 8), "adapter_index": served.index_of(["one", None])}
    served.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert loaded.names == {"one": 1}
    assert difference(loaded.predict(batch, verbose=0), served.predict(batch, verbose=0)) == 0
    loaded.load(files(tmp_path, 1)["task 0"], "two")
    assert loaded.names == {"one": 1, "two": 2}


def test_what_does_not_fit_is_refused_and_nothing_changes(tmp_path):
    served = keras_lora.MultiAdapterModel(base(), capacity=1, rank=2)
    good = files(tmp_path)
    served.load(good["task 1"], "good")
    before = [value(v) for v in served.weights]

    def refused(path, message, name="new"):
        with pytest.raises(ValueError, match=message):
            served.load(path, name)
        assert served.names == {"good": 1}
        assert all(np.array_equal(value(v), old) for v, old in zip(served.weights, before, strict=True))

    refused(good["task 0"], "All 1 places of")
    refused(good["task 2"], "a place takes ranks up to 2, and this has rank 4", "good")
    keras_lora.save_adapter(keras_lora.apply_lora(base(), "dora", rank=2), tmp_path / "dora.safetensors")
    refused(tmp_path / "dora.safetensors", "a place takes only a LoRA, and this is a DoRA", "good")
    keras_lora.save_adapter(keras_lora.apply_lora(base(), rank=1, train="head"), tmp_path / "head.safetensors")
    refused(tmp_path / "head.safetensors", "has trained variables of 'layers/3'", "good")
    keras_lora.save_adapter(keras_lora.apply_lora(base(), rank=1, head=None), tmp_path / "more.safetensors")
    refused(tmp_path / "more.safetensors", "the model has none", "good")
    with pytest.raises(FileNotFoundError):
        served.load(tmp_path / "none.safetensors", "good")
    with pytest.raises(ValueError, match=r"has no adapter \['x'\]"):
        served.index_of(["good", "x", None])
    with pytest.raises(ValueError, match="has no adapter"):
        served.delete("x")
    with pytest.raises(ValueError, match="with the key 'adapter_index'"):
        served(numbers(2, 5, 8))
    with pytest.raises(ValueError, match="does not generate"):
        served.generate(["a"], ["good"])
    with pytest.raises(ValueError, match="no single kernel"):
        keras_lora.merge_lora(served.model)
    with pytest.raises(ValueError, match="is called on 4 rows for 2 examples"):
        served({"inputs": numbers(4, 5, 8), "adapter_index": np.array([1, 0], "int32")})


def test_an_adapter_of_fewer_layers_leaves_the_others_alone(tmp_path):
    model = keras_lora.apply_lora(base(), rank=2, targets="up")
    move(model)
    keras_lora.save_adapter(model, tmp_path / "up.safetensors")
    served = keras_lora.MultiAdapterModel(base(), capacity=1, rank=2)
    served.load(files(tmp_path, 2)["task 1"], "a")
    served.delete("a")
    served.load(tmp_path / "up.safetensors", "up")
    x = numbers(2, 5, 8)
    found = served.predict({"inputs": x, "adapter_index": served.index_of(["up", "up"])}, verbose=0)
    assert difference(found, outputs(model, x)) < 5e-6


@pytest.mark.full
@pytest.mark.torch_first
def test_sixty_four_adapters_in_one_batch(tmp_path):
    paths = files(tmp_path, 64)
    served = keras_lora.MultiAdapterModel(base(), capacity=64, rank=4)
    for name, path in paths.items():
        served.load(path, name)
    x = numbers(64, 5, 8)
    found = served.predict({"inputs": x, "adapter_index": served.index_of(paths)}, verbose=0, batch_size=64)
    for row in (0, 17, 63):
        assert difference(found[row], alone(paths[f"task {row}"], x[row : row + 1])[0]) < 5e-6


def language_model():
    keras.utils.set_random_seed(7)
    model = ZOO["hub_llama_causal_lm"]().model
    rng = np.random.default_rng(5)
    for v in model.trainable_variables:
        v.assign((0.5 * rng.normal(size=tuple(v.shape))).astype("float32"))
    model.compile(sampler="greedy")
    return model


@pytest.mark.torch_first
def test_prompts_with_an_adapter_each_generate_what_they_do_alone(tmp_path):
    tokens = np.array([[3, 4, 0, 0, 0], [3, 4, 0, 0, 0], [5, 6, 0, 0, 0]], "int32")
    batch = {"token_ids": tokens, "padding_mask": (tokens > 0).astype("int32")}
    wanted = {None: language_model().generate(batch, stop_token_ids=None)["token_ids"]}
    paths = {}
    for number in (1, 2):
        model = keras_lora.apply_lora(language_model(), rank=2)
        move(model, seed=number, size=1.0)
        paths[f"{number}"] = tmp_path / f"{number}.safetensors"
        keras_lora.save_adapter(model, paths[f"{number}"])
        model.compile(sampler="greedy")
        wanted[f"{number}"] = model.generate(batch, stop_token_ids=None)["token_ids"]
    assert not np.array_equal(wanted["1"], wanted[None])
    served = keras_lora.MultiAdapterModel(language_model(), capacity=2, rank=2)
    served.model.compile(sampler="greedy")
    for name, path in paths.items():
        served.load(path, name)
    for names in (["1", None, "2"], [None, "2", "1"], ["2", "1", None]):
        found = served.generate(batch, names, stop_token_ids=None)["token_ids"]
        assert np.array_equal(found, np.stack([wanted[name][row] for row, name in enumerate(names)]))
    if BACKEND == "jax":
        assert served.model.generate_function.__closure__ is not None
    assert np.array_equal(served.model.generate(batch, stop_token_ids=None)["token_ids"], wanted[None])


def test_a_model_is_served_by_one_only():
    served = keras_lora.MultiAdapterModel(base(), capacity=2, rank=2)
    with pytest.raises(ValueError, match="has places for adapters already"):
        keras_lora.MultiAdapterModel(served.model, capacity=4, rank=4)
