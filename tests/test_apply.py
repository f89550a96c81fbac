"""`apply_lora` and `remove_lora`: what changes, what does not, and what is refused."""

import keras
import numpy as np
import pytest
from helpers import covering, difference, outputs, perturb, value, values
from keras import layers
from zoo import BATCH, DIM, SLICE, STEPS, ZOO, numbers

import keras_lora
from keras_lora.swap.addresses import walk

PLAIN = [name for name in ZOO if name != "made_by_hand"]


def attributes(layer):
    return sorted(vars(layer).keys() - {"_torch_params"})  # Keras makes this one when it is first asked for


def facts(model):
    """All that must be as found after a removal."""
    return [
        (place.address, place.layer, type(place.layer), place.layer.name, place.layer.trainable, attributes(place.layer))
        for place in walk(model)
    ], [(id(v), v.path, v.trainable) for v in model.variables]


@pytest.mark.parametrize("name", covering(PLAIN, SLICE[:4:3]))
def test_apply_keeps_objects_names_classes_and_outputs(name):
    specimen = ZOO[name]()
    model, before = specimen.model, outputs(specimen.model, specimen.x)
    layers_before = {id(place.layer): (place.layer, type(place.layer), place.path) for place in walk(model)}
    paths, numbers_before = [v.path for v in model.variables], values(model.variables)
    assert keras_lora.apply_lora(model, **specimen.apply) is model
    by_id = {id(place.layer): place for place in walk(model)}
    for key, (layer, cls, path) in layers_before.items():
        assert by_id[key].path == path
        assert isinstance(layer, cls)
        assert type(layer).__name__ == cls.__name__
    assert set(paths) <= {v.path for v in model.variables}
    for v in model.variables:
        if v.path in numbers_before:
            assert np.array_equal(value(v), numbers_before[v.path]), v.path
    # LoRA adds exact zeros. DoRA divides a norm by itself, and compiled code rounds that.
    exact = specimen.apply.get("adapter") != "dora" and specimen.tolerance <= 1e-4
    assert difference(outputs(model, specimen.x), before) <= (0 if exact else max(1e-6, specimen.tolerance / 10))


def test_a_layer_made_by_hand_is_copied_before_it_is_built():
    first = keras_lora.LoRADense(4, rank=1)
    second = type(first).from_config(first.get_config())
    third = type(second).from_config(second.get_config())
    for layer in (first, second, third):
        layer.build((None, 3))
        assert [v.name for v in layer.trainable_variables] == ["lora_a", "lora_b"]
        assert len(layer.variables) == 5  # the strength is one
        if keras.backend.backend() == "torch":
            assert len(list(layer.parameters())) == 5


def test_who_reads_the_kernel_of_an_adapted_layer_gets_the_changed_one():
    layer = layers.Dense(4)
    layer.build((None, 3))
    keras_lora.apply_lora(layer, rank=1)
    perturb(layer)
    merged = value(layer.linear_map.kernel) + value(layer.adapter.delta_kernel(layer.linear_map.matrix))
    assert difference(value(layer.kernel), merged) < 1e-6
    assert difference(value(layer.linear_map.kernel), merged) > 1e-3


def test_the_kernel_of_a_quantised_adapted_layer_is_the_stored_integers_as_in_keras():
    layer = layers.Dense(4)
    layer.build((None, 3))
    layer.quantize("int8")
    stored = value(layer.kernel)
    keras_lora.apply_lora(layer, rank=1)
    perturb(layer)
    assert np.array_equal(value(layer.kernel), stored)


@pytest.mark.parametrize("name", covering(PLAIN, SLICE[:4:3]))
def test_remove_restores_everything_as_found(name):
    specimen = ZOO[name]()
    model = specimen.model
    walk(model)[-1].layer.trainable = False  # a flag the user had set
    outputs(model, specimen.x)
    found, before, base = facts(model), outputs(model, specimen.x), values(model.variables)
    keras_lora.apply_lora(model, **{**specimen.apply, "train": None})
    perturb(model)
    assert keras_lora.remove_lora(model) is model
    assert facts(model) == found
    if specimen.apply.get("bias", "none") == "none":
        assert difference(outputs(model, specimen.x), before) == 0
        assert all(np.array_equal(now, base[path]) for path, now in values(model.variables).items())


def test_remove_after_loading_restores_the_flags_found_before_saving(tmp_path):
    specimen = ZOO["multi_head_attention"]()
    specimen.model.layers[1].trainable = False
    flags = [v.trainable for v in specimen.model.variables]
    keras_lora.apply_lora(specimen.model, rank=2)
    specimen.model.save(tmp_path / "m.keras")
    loaded = keras_lora.remove_lora(keras.saving.load_model(tmp_path / "m.keras"))
    assert [v.trainable for v in loaded.variables] == flags
    assert not any(type(place.layer).__module__.startswith("keras_lora") for place in walk(loaded))


def test_only_the_adapters_train():
    model = ZOO["multi_head_attention"]().model
    keras_lora.apply_lora(model, rank=2)
    assert {v.path.rpartition("/")[2] for v in model.trainable_variables} == {"lora_a", "lora_b"}
    assert len(model.trainable_variables) == 2 * 4
    model.compile("adam", "mse")
    assert len(model.trainable_variables) == 2 * 4
    model.optimizer.build(model.trainable_variables)
    assert len(model.optimizer.variables) == 2 + 2 * 2 * 4


@pytest.mark.parametrize("name", covering(["multi_head_attention", "hub_llama_backbone", "subclassed"], ["subclassed"]))
def test_the_factors_of_attention_are_textbook_sized(name):
    """Keras's own `enable_lora` makes `A` `heads` times as large."""
    model = ZOO[name]().model
    keras_lora.apply_lora(model, rank=2)
    for place in walk(model):
        if isinstance(place.layer, keras.layers.EinsumDense):
            in_dim, out_dim = place.layer.linear_map.matrix_shape
            assert in_dim * out_dim == np.prod(place.layer.kernel.shape)
            assert tuple(place.layer.adapter.lora_a.shape) == (in_dim, 2)
            assert tuple(place.layer.adapter.lora_b.shape) == (2, out_dim)


def test_a_shared_layer_gets_one_adapter_and_is_right_in_both_places():
    specimen = ZOO["functional_with_a_shared_layer"]()
    model = keras_lora.apply_lora(specimen.model, rank=2)
    perturb(model)
    assert len(model.trainable_variables) == 2
    before = outputs(model, specimen.x)
    assert difference(outputs(keras_lora.merge_lora(model), specimen.x), before) < 1e-6


def test_a_single_layer_of_any_kind():
    attention = layers.MultiHeadAttention(2, 4)
    attention.build((None, STEPS, DIM), (None, STEPS, DIM))
    keras_lora.apply_lora(attention, rank=1)
    assert len(attention.trainable_variables) == 8
    dense = layers.Dense(3)
    dense.build((None, 4))
    assert keras_lora.apply_lora(dense) is dense
    assert repr(dense) == f"<LoRADense name={dense.name}, adapter=LoRA>"


def test_the_classes_are_the_public_ones():
    model = ZOO["convolutions"]().model
    keras_lora.apply_lora(model, rank=1)
    assert [type(layer) for layer in model.layers if isinstance(layer, layers.Conv2D)] == [keras_lora.layers.LoRAConv2D] * 2


def test_applying_twice_is_refused_and_changes_nothing():
    specimen = ZOO["multi_head_attention"]()
    keras_lora.apply_lora(specimen.model, rank=2)
    perturb(specimen.model)
    before = outputs(specimen.model, specimen.x)
    found = facts(specimen.model)
    with pytest.raises(ValueError, match="is adapted already"):
        keras_lora.apply_lora(specimen.model, rank=4)
    with pytest.raises(ValueError, match="is adapted already"):
        keras_lora.apply_lora(specimen.model.get_layer("attention"))
    assert facts(specimen.model) == found
    assert difference(outputs(specimen.model, specimen.x), before) == 0


def test_apply_remove_apply():
    specimen = ZOO["block_built_in_build"]()
    for rank in (1, 3):
        keras_lora.apply_lora(specimen.model, rank=rank)
        assert {v.shape[-1] for v in specimen.model.trainable_variables if v.name == "lora_a"} == {rank}
        keras_lora.remove_lora(specimen.model)


def test_adding_and_removing_leaks_no_variables():
    model = ZOO["multi_head_attention"]().model
    count = len(model.variables)
    for _ in range(5):
        keras_lora.remove_lora(keras_lora.apply_lora(model, "dora", rank=2))
    assert len(model.variables) == count
    if keras.backend.backend() == "torch":
        assert len(list(model.parameters())) == count


def test_an_unbuilt_model_is_built_from_a_shape_or_refused():
    def model():
        return keras.Sequential([layers.Dense(4, name="first"), layers.Dense(2)], name="unbuilt")

    with pytest.raises(ValueError, match=r"'unbuilt' is not built: .*input_shape="):
        keras_lora.apply_lora(model())
    assert len(keras_lora.apply_lora(model(), input_shape=(None, 3), rank=1).trainable_variables) == 2


def test_what_cannot_be_adapted_is_refused_by_name():
    constrained = layers.Dense(4, kernel_constraint="non_neg", name="constrained")
    builtin = layers.Dense(4, name="builtin")
    model = keras.Sequential([keras.Input((4,)), constrained, builtin, layers.Dense(4), layers.Dense(2)])
    builtin.enable_lora(1)
    with pytest.raises(ValueError, match="'constrained' has a kernel constraint") as error:
        keras_lora.apply_lora(model)
    assert "'builtin' has Keras's own `enable_lora` on" in str(error.value)
    assert len(keras_lora.apply_lora(model, exclude=["constrained", "builtin"]).trainable_variables) == 2


def test_something_that_is_no_layer_is_refused():
    with pytest.raises(TypeError, match=r"must be a Keras model or layer\. Received: 'model'"):
        keras_lora.apply_lora("model")
    with pytest.raises(ValueError, match=r"`remove_lora\(\)` found no adapter in"):
        keras_lora.remove_lora(ZOO["sequential"]().model)


def test_a_failure_while_the_weights_are_made_changes_nothing(monkeypatch):
    specimen = ZOO["multi_head_attention"]()
    found, real, calls = facts(specimen.model), keras_lora.LoRA.build_for, []

    def build_for(self, linear):
        calls.append(self)
        if len(calls) == 3:
            raise MemoryError
        real(self, linear)

    monkeypatch.setattr(keras_lora.LoRA, "build_for", build_for)
    with pytest.raises(MemoryError):
        keras_lora.apply_lora(specimen.model)
    assert facts(specimen.model) == found


def test_a_compiled_and_run_model_never_runs_a_stale_graph():
    specimen = ZOO["multi_head_attention"]()
    model, x, y = specimen.model, specimen.x, specimen.y
    model.compile(keras.optimizers.Adam(1e-2), "mse")
    model.fit(x, y, verbose=0)
    base = outputs(model, x)
    model.evaluate(x, y, verbose=0)
    keras_lora.apply_lora(model, rank=2)
    with pytest.raises(ValueError, match="compile"):
        model.fit(x, y, verbose=0)
    assert difference(outputs(model, x), base) == 0
    perturb(model)
    changed = outputs(model, x)
    assert difference(changed, base) > 1e-3
    assert difference([value(model(x))], changed) < 1e-5
    kernels = {path: array for path, array in values(model.variables).items() if path.endswith("kernel")}
    model.compile(keras.optimizers.Adam(1e-2), "mse")
    model.fit(x, y, verbose=0)
    assert all(np.array_equal(kernels[v.path], value(v)) for v in model.variables if v.path in kernels)
    trained = outputs(model, x)
    assert difference(trained, changed) > 1e-4
    keras_lora.merge_lora(model, keep=True)
    with pytest.raises(ValueError, match="compile"):
        model.fit(x, y, verbose=0)
    assert difference(outputs(model, x), trained) < 1e-5
    keras_lora.unmerge_lora(model)
    assert difference(outputs(model, x), trained) == 0
    keras_lora.remove_lora(model)
    assert difference(outputs(model, x), base) == 0


def test_generate_runs_adapted_merged_and_never_stale():
    specimen = ZOO["hub_llama_causal_lm"]()
    model, prompt = specimen.model, {key: array[:, :2].copy() for key, array in specimen.x.items()}
    padded = {
        "token_ids": np.pad(prompt["token_ids"], ((0, 0), (0, 6))),
        "padding_mask": np.pad(prompt["padding_mask"], ((0, 0), (0, 6))),
    }
    model.compile(sampler="greedy")

    def tokens():
        model.compile(sampler="greedy") if not model.compiled else None
        return model.generate(padded, stop_token_ids=None)["token_ids"].tolist()

    base = tokens()
    keras_lora.apply_lora(model, rank=2)
    assert tokens() == base
    perturb(model, size=1.0)
    adapted = tokens()
    assert adapted != base
    keras_lora.merge_lora(model)
    assert tokens() == adapted


def test_the_torch_module_lists_the_adapters():
    if keras.backend.backend() != "torch":
        pytest.skip("`parameters()` is a method of torch modules")
    model = ZOO["hub_bert_backbone"]().model
    keras_lora.apply_lora(model, rank=2)
    assert len([p for p in model.parameters() if p.requires_grad]) == len(model.trainable_variables)
    assert len(list(model.parameters())) == len(model.variables)
    assert len([key for key in model.state_dict() if "lora_a" in key]) >= 12


def test_layers_made_by_hand_work_in_a_new_model_like_any_layer():
    model = keras.Sequential([keras.Input((BATCH,)), keras_lora.LoRADense(8, rank=2, alpha=4, activation="relu")])
    layer = model.layers[0]
    assert layer.adapter.scale == 2
    assert [v.name for v in layer.trainable_variables] == ["lora_a", "lora_b"]
    assert isinstance(layer, layers.Dense)
    twin = type(layer).from_config(layer.get_config())
    assert type(twin) is keras_lora.LoRADense
    with pytest.raises(ValueError, match="already has its arguments"):
        keras_lora.LoRADense(8, rank=2, adapter=keras_lora.LoRA(rank=3))
    plain = keras_lora.merge_lora(model)
    assert type(plain.layers[0]) is layers.Dense


#: Keras makes the cell of its ConvLSTM layers itself, and exports no class for it.
BY_HAND = [cls for cls in keras_lora.layers.TABLE if cls.__name__ != "ConvLSTMCell"]


@pytest.mark.parametrize("cls", BY_HAND, ids=lambda cls: f"LoRA{cls.__name__}")
def test_every_layer_can_be_made_by_hand(cls):
    arguments, shape = {
        "Dense": ((4,), (2, 3)),
        "EinsumDense": (("abc,cd->abd", (None, 4)), (2, 5, 3)),
        "Embedding": ((9, 4), (2, 5)),
        "Conv1D": ((4, 2), (2, 5, 3)),
        "Conv2D": ((4, 2), (2, 5, 5, 3)),
        "Conv3D": ((4, 2), (2, 5, 5, 5, 3)),
        "Conv1DTranspose": ((4, 2), (2, 5, 3)),
        "Conv2DTranspose": ((4, 2), (2, 5, 5, 3)),
        "Conv3DTranspose": ((4, 2), (2, 3, 3, 3, 3)),
        "ReversibleEmbedding": ((9, 4), (2, 5)),
        "DepthwiseConv1D": ((2,), (2, 5, 3)),
        "DepthwiseConv2D": ((2,), (2, 5, 5, 3)),
        "SeparableConv1D": ((4, 2), (2, 5, 3)),
        "SeparableConv2D": ((4, 2), (2, 5, 5, 3)),
        "SimpleRNNCell": ((4,), (2, 5, 3)),
        "LSTMCell": ((4,), (2, 5, 3)),
        "GRUCell": ((4,), (2, 5, 3)),
    }[cls.__name__]
    rows = {"Embedding", "ReversibleEmbedding"}
    layer = cls(*arguments, rank=2)
    x = np.ones(shape, "int32") if cls.__name__ in rows else numbers(*shape)
    if cls.__name__.endswith("Cell"):
        layer = layers.RNN(layer)
    before = value(layer(x))
    assert {v.name for v in layer.trainable_variables} == {"lora_a", "lora_b"}
    perturb(layer)
    assert difference(value(layer(x)), before) > 1e-3


@pytest.mark.parametrize("name", ["enable_lora", "quantize"])
def test_keras_own_lora_and_quantising_come_before_and_are_refused_after(name):
    arguments = {"enable_lora": (2,), "quantize": ("int8",)}[name]
    model = keras_lora.apply_lora(ZOO["sequential"]().model, rank=1)
    before = [v.path for v in model.variables]
    owners = [model.layers[0], model] if name == "quantize" else [model.layers[0]]
    for owner in owners:
        with pytest.raises(ValueError, match=f"`{name}` would .* Expected a plain"):
            getattr(owner, name)(*arguments)
    assert [v.path for v in model.variables] == before
    plain = keras_lora.remove_lora(model)
    getattr(plain.layers[0], name)(*arguments)


def test_keras_own_lora_on_a_plain_layer_of_an_adapted_model_is_named_by_what_comes_next(tmp_path):
    model = keras_lora.apply_lora(keras.Sequential([keras.Input((4,)), layers.Dense(4), layers.Dense(2, name="out")]))
    model.layers[-1].enable_lora(2)
    for call in (
        lambda: model.save(tmp_path / "m.keras"),
        lambda: keras_lora.save_adapter(model, tmp_path / "a.safetensors"),
        lambda: keras_lora.merge_lora(model),
        lambda: keras_lora.remove_lora(model),
    ):
        with pytest.raises(ValueError, match=r"'out' has 4 trainable variables.* had 2.*enable_lora"):
            call()
    assert not list(tmp_path.iterdir())


def test_models_that_share_a_layer_are_not_adapted_one_after_the_other():
    shared, x = layers.Dense(4, name="shared"), np.ones((2, 4), "float32")
    a, b = (keras.Sequential([keras.Input((4,)), shared, layers.Dense(2)], name=name) for name in ("a", "b"))
    with pytest.warns(
        UserWarning, match="'b' has 1 of the layers of 'a' too: shared. They will be frozen and adapted in both"
    ):
        keras_lora.apply_lora(a, rank=1)
    perturb(a)
    before = outputs(a, x), outputs(b, x)
    for arguments in ({}, {"name": "other"}):
        with pytest.raises(ValueError, match="'b' shares layers with 'a', which is adapted: shared"):
            keras_lora.apply_lora(b, **arguments)
    assert difference([outputs(a, x), outputs(b, x)], before) == 0
    around = keras.Model(a.inputs, layers.Dense(3)(a.outputs[0]))  # has all layers of "a", and not "a" itself
    keras_lora.apply_lora(around, rank=1, name="around")
    keras_lora.delete_adapter(around, "around")
    keras_lora.activate_adapters(a, "default")
    whole = keras.Sequential([keras.Input((4,)), a])
    keras_lora.apply_lora(whole, rank=1, name="other")  # a model around it is no other model
    keras_lora.apply_lora(a, rank=1, name="third")
    assert difference(outputs(keras_lora.activate_adapters(whole, "default"), x), before[0]) < 1e-6
    keras_lora.remove_lora(whole)
    del around, whole
    with pytest.warns(UserWarning, match="'a' has 1 of the layers of 'b' too"):
        keras_lora.apply_lora(b, rank=1)


def test_a_model_that_shares_layers_computes_what_they_are_now():
    shared, x = layers.Dense(4, name="shared"), np.ones((2, 4), "float32")
    inputs = keras.Input((4,))
    features = keras.Model(inputs, shared(inputs))
    a, b = (keras.Model(inputs, layers.Dense(2)(features.output), name=name) for name in ("a", "b"))
    predict = {model: lambda model=model: model.predict(x, verbose=0) for model in (a, b, features)}
    before = {model: predict[model]() for model in predict}  # on TensorFlow, each model keeps a trace
    with pytest.warns(UserWarning, match="'b' has 1 of the layers of 'a' too") as said:
        keras_lora.apply_lora(a, rank=1)
    assert len(said) == 1  # "features" is a part of "a"
    perturb(a, 1.0)
    changed = {model: predict[model]() for model in predict}
    assert [difference(changed[model], before[model]) > 0.01 for model in predict] == [True] * 3
    assert all(difference(changed[model], outputs(model, x)) < 1e-6 for model in predict)
    keras_lora.merge_lora(a)
    assert all(difference(predict[model](), changed[model]) < 1e-6 for model in predict)


def broken():
    class Broken(keras.Model):
        def __init__(self):
            raise RuntimeError("before anything else")

    return Broken()


def without_its_backbone():
    return pytest.importorskip("keras_hub").models.LlamaCausalLM(backbone=None)


@pytest.mark.parametrize("make", [broken, without_its_backbone])
def test_a_model_that_could_not_be_made_is_in_nobodys_way(make):
    shared = layers.Dense(4, name="shared")
    a, _b = (keras.Sequential([keras.Input((4,)), shared, layers.Dense(2)], name=name) for name in ("a", "b"))
    with pytest.raises((RuntimeError, AttributeError)) as kept:  # its traceback keeps the model alive
        make()
    with pytest.warns(UserWarning, match="'b' has 1 of the layers of 'a' too"):
        keras_lora.apply_lora(a, rank=1)
    assert kept.traceback


def test_a_deleted_model_shares_nothing():
    shared = layers.Dense(4, name="shared")
    a, b = (keras.Sequential([keras.Input((4,)), shared, layers.Dense(2)], name=name) for name in ("a", "b"))
    del b
    keras_lora.apply_lora(a, rank=1)  # a warning is an error here
