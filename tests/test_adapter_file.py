"""The adapter file: what it holds, and every way in which it may not fit."""

import json
import os

import keras
import numpy as np
import pytest
import safetensors.numpy
from helpers import covering, difference, header_of, outputs, perturb, value, values
from zoo import ZOO, numbers

import keras_lora
from keras_lora.files import fingerprint
from keras_lora.swap.addresses import walk

pytestmark = pytest.mark.torch_first

PLAIN = [name for name in ZOO if name != "made_by_hand"]


def adapted(name):
    specimen = ZOO[name]()
    keras_lora.apply_lora(specimen.model, **specimen.apply)
    perturb(specimen.model)
    return specimen


@pytest.mark.parametrize("name", covering(PLAIN, ["subclassed"]))
def test_a_plain_base_and_the_file_give_the_adapted_model(tmp_path, name):
    specimen, fresh = adapted(name), ZOO[name]()
    keras_lora.save_adapter(specimen.model, tmp_path / "a.safetensors")
    assert keras_lora.load_adapter(fresh.model, tmp_path / "a.safetensors") is fresh.model
    assert difference(outputs(fresh.model, fresh.x), outputs(specimen.model, specimen.x)) == 0
    assert [v.trainable for v in fresh.model.variables] == [v.trainable for v in specimen.model.variables]
    again = tmp_path / "b.safetensors"
    keras_lora.save_adapter(fresh.model, again)
    assert again.read_bytes() == (tmp_path / "a.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["sequential", "multi_head_attention", "subclassed"])
def test_a_model_adapted_the_same_way_gets_the_values(tmp_path, name):
    specimen, other = adapted(name), ZOO[name]()
    keras_lora.apply_lora(other.model, **other.apply)
    other.model.compile("sgd", "mse")
    keras_lora.save_adapter(specimen.model, tmp_path / "a.safetensors")
    keras_lora.load_adapter(other.model, tmp_path / "a.safetensors")
    assert difference(outputs(other.model, other.x), outputs(specimen.model, specimen.x)) == 0
    assert other.model.compiled


def test_a_file_holds_the_factors_and_little_else(tmp_path):
    specimen = ZOO["multi_head_attention"]()
    keras_lora.apply_lora(specimen.model, rank=2)
    path = tmp_path / "a.safetensors"
    keras_lora.save_adapter(specimen.model, path)
    factors = sum(4 * int(np.prod(v.shape)) for v in specimen.model.trainable_variables)
    assert path.stat().st_size <= factors + 1024 * 4  # four layers
    tensors = safetensors.numpy.load_file(path)
    assert set(tensors) == {
        f"layers/0/_{name}_dense:lora_{side}" for name in ("query", "key", "value", "output") for side in "ab"
    }


def test_a_new_head_with_its_statistics_and_biases_travel_along(tmp_path):
    specimen, fresh = ZOO["sequential"](), ZOO["sequential"]()
    keras_lora.apply_lora(specimen.model, rank=2, train=["head", keras.layers.BatchNormalization], bias="all")
    specimen.model.compile(keras.optimizers.Adam(1e-2), "mse")
    specimen.model.fit(specimen.x, specimen.y, epochs=3, verbose=0)
    keras_lora.save_adapter(specimen.model, tmp_path / "a.safetensors")
    assert {key for key in safetensors.numpy.load_file(tmp_path / "a.safetensors") if "base" in key} == {
        "layers/0:base.1.bias",
        "layers/1:base.0.gamma",
        "layers/1:base.1.beta",
        "layers/1:base.2.moving_mean",
        "layers/1:base.3.moving_variance",
        "layers/2:base.0.kernel",
        "layers/2:base.1.bias",
    }
    keras_lora.load_adapter(fresh.model, tmp_path / "a.safetensors")
    assert difference(outputs(fresh.model, fresh.x), outputs(specimen.model, specimen.x)) == 0
    assert len(fresh.model.trainable_variables) == len(specimen.model.trainable_variables)


def test_a_loaded_adapter_can_be_kept_from_training(tmp_path):
    specimen, fresh = adapted("sequential"), ZOO["sequential"]()
    keras_lora.save_adapter(specimen.model, tmp_path / "a.safetensors")
    keras_lora.load_adapter(fresh.model, tmp_path / "a.safetensors", trainable=False)
    assert not fresh.model.trainable_variables


def test_an_adapter_of_a_part_goes_into_the_same_part_of_another_model(tmp_path):
    first, second = ZOO["hub_bert_classifier"](), ZOO["hub_bert_backbone"]()
    keras_lora.apply_lora(first.model.backbone, rank=2)
    perturb(first.model.backbone)
    keras_lora.save_adapter(first.model.backbone, tmp_path / "a.safetensors")
    keras_lora.load_adapter(second.model, tmp_path / "a.safetensors")
    left, right = (values(m.trainable_variables) for m in (first.model.backbone, second.model))
    assert all(np.array_equal(a, b) for a, b in zip(left.values(), right.values(), strict=True))


def test_a_bfloat16_head_survives_exactly(tmp_path):
    specimen, fresh = ZOO["mixed_bfloat16"](), ZOO["mixed_bfloat16"]()
    for each in (specimen, fresh):
        x = keras.Input((4,), dtype="bfloat16")
        y = keras.layers.Dense(4, dtype="bfloat16")(x)
        each.model = keras.Model(x, keras.layers.Dense(2, dtype="bfloat16", name="head")(y))
    keras_lora.apply_lora(specimen.model, rank=1, train="head")
    keras_lora.save_adapter(specimen.model, tmp_path / "a.safetensors")
    keras_lora.load_adapter(fresh.model, tmp_path / "a.safetensors")
    for left, right in zip(specimen.model.trainable_variables, fresh.model.trainable_variables, strict=True):
        assert left.dtype == right.dtype
        assert np.array_equal(value(left), value(right))


# What does not fit.


@pytest.fixture
def file(tmp_path):
    keras_lora.save_adapter(adapted("multi_head_attention").model, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def rewritten(path, tensors=lambda tensors: tensors, header=lambda header: header):
    """The file with something changed in it."""
    content = tensors(safetensors.numpy.load_file(path))
    with safetensors.safe_open(path, framework="numpy") as file:
        metadata = json.loads(file.metadata()["keras_lora"])
    safetensors.numpy.save_file(content, path, {"keras_lora": json.dumps(header(metadata))})


def refused(model, path, match):
    state = [(place.address, type(place.layer), place.layer.trainable) for place in walk(model)], values(model.variables)
    with pytest.raises(ValueError, match=match) as error:
        keras_lora.load_adapter(model, path)
    now = [(place.address, type(place.layer), place.layer.trainable) for place in walk(model)], values(model.variables)
    assert now[0] == state[0]
    assert now[1].keys() == state[1].keys()
    assert all(np.array_equal(now[1][key], state[1][key]) for key in state[1])
    return str(error.value)


@pytest.fixture(params=["plain", "adapted"])
def model(request):
    return (adapted if request.param == "adapted" else lambda name: ZOO[name]())("multi_head_attention").model


KEY = "layers/0/_query_dense:lora_a"
OTHER_KEY = "layers/0/_value_dense:lora_b"


def test_missing_and_unexpected_tensors_are_all_listed(file, model):
    def change(tensors):
        tensors["layers/0/_query_dense:lora_c"] = tensors.pop(KEY)
        del tensors["layers/0/_key_dense:lora_b"]
        tensors[OTHER_KEY] = tensors[OTHER_KEY][None].copy()
        return tensors

    rewritten(file, change)
    message = refused(model, file, "does not fit")
    assert f"the file lacks the tensor '{KEY}'" in message
    assert "the file lacks the tensor 'layers/0/_key_dense:lora_b'" in message
    assert "has a tensor 'layers/0/_query_dense:lora_c' that fits nothing" in message
    assert f"the tensor '{OTHER_KEY}' has shape (1, 2, 8); expected is (2, 8)" in message


def test_a_tensor_of_another_shape(file, model):
    rewritten(file, lambda tensors: {**tensors, KEY: tensors[KEY][:, :1].copy()})
    refused(model, file, r"the tensor 'layers/0/_query_dense:lora_a' has shape \(8, 1\); expected is \(8, 2\)")


def test_an_unknown_method(file, model):
    def change(header):
        header["adapters"]["layers/0/_query_dense"]["method"] = "magic"
        return header

    rewritten(file, header=change)
    refused(model, file, r"has the method 'magic'; known are .*'dora'")


def test_another_version(file, model):
    rewritten(file, header=lambda header: {**header, "version": 99})
    refused(model, file, "format version 99. Expected at most 2")


def test_a_key_that_is_there_twice_is_refused(file, model):
    with safetensors.safe_open(file, framework="numpy") as opened:
        header = opened.metadata()["keras_lora"]
    safetensors.numpy.save_file(safetensors.numpy.load_file(file), file, {"keras_lora": '{"version": 2, ' + header[1:]})
    refused(model, file, "a key appears twice")


def test_a_header_with_the_wrong_parts(file, model):
    for change in (
        lambda header: {"version": 1},
        lambda header: {**header, "adapters": []},
        lambda header: {**header, "adapters": {"layers/0/_query_dense": {"method": "lora"}}},
        lambda header: {
            **header,
            "trained": {"layers/2": {"class": "Dense", "plan": [True, [True]], "shapes": [[8, 3], [3]]}},
        },
    ):
        original = file.read_bytes()
        rewritten(file, header=change)
        refused(model, file, "keras_lora|does not fit")
        file.write_bytes(original)


def test_a_config_that_asks_for_all_memory_or_for_nonsense(file):
    def with_config(config):
        def change(header):
            header["adapters"]["layers/0/_query_dense"] |= {"config": config, "scale": 16 / 10**12}
            return header

        return change

    original = file.read_bytes()
    for config, match in [
        ({"rank": 10**12}, r"would have \d+ numbers and more. Expected at most 10000. The file has 32"),
        ({"rank": "two"}, "cannot be made: `rank` must be"),
        ({"ranks": 2}, "cannot be made"),
        ({"rank": 2}, "its scale is 8.0 by its config, and 1.6e-11 by the file"),
    ]:
        rewritten(file, header=with_config(config))
        refused(ZOO["multi_head_attention"]().model, file, match)
        file.write_bytes(original)


def test_another_base_model(file):
    message = refused(ZOO["sequential"]().model, file, "does not fit")
    assert "no layer at 'layers/0/_query_dense'; the file has a EinsumDense there" in message


def test_a_base_of_another_size(file):
    x = keras.Input((5, 8))
    attention = keras.layers.MultiHeadAttention(2, 5, name="attention")(x, x)
    model = keras.Model(x, keras.layers.Dense(3)(keras.layers.LayerNormalization()(x + attention)))
    assert "has shape [8, 2, 5]; in the file it has [8, 2, 4]" in refused(model, file, "does not fit")


def test_a_model_adapted_in_another_way(file):
    specimen = ZOO["multi_head_attention"]()
    keras_lora.apply_lora(specimen.model, rank=2, targets=["query", "key"], rank_pattern={"key": 1}, train="head")
    message = refused(specimen.model, file, "does not fit")
    assert "has an adapter at 'layers/0/_value_dense'; the model has none" in message
    assert "the adapter at 'layers/0/_key_dense' cannot take that of the file: this one is LoRA(rank=1" in message
    assert "the model trains variables of 'layers/2'" in message or "the model trains variables of 'layers/3'" in message


@pytest.mark.parametrize("kept", [0, 4, 8, 100, 0.5, 0.99])
def test_a_file_that_is_cut_off(file, model, kept):
    content = file.read_bytes()
    file.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    refused(model, file, "is not a whole adapter file of keras_lora")


def test_files_of_another_kind(tmp_path, model):
    (tmp_path / "text.safetensors").write_text("no tensors here")
    refused(model, tmp_path / "text.safetensors", "is not a whole adapter file")
    safetensors.numpy.save_file({"a": numbers(2, 2)}, tmp_path / "other.safetensors")
    refused(model, tmp_path / "other.safetensors", "is not a whole adapter file")
    with pytest.raises(FileNotFoundError, match="no adapter file at"):
        keras_lora.load_adapter(model, tmp_path / "none.safetensors")
    refused(model, tmp_path / "a.h5", r"must end in '.safetensors'. Received: '.*a.h5'")


def test_saving_is_refused_without_adapters_or_with_another_ending(tmp_path):
    with pytest.raises(ValueError, match="found no adapter"):
        keras_lora.save_adapter(ZOO["sequential"]().model, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="must end in"):
        keras_lora.save_adapter(adapted("sequential").model, tmp_path / "a.bin")
    assert not list(tmp_path.iterdir())


def test_a_method_without_a_name_is_refused_and_one_entered_in_the_table_travels(tmp_path, monkeypatch):
    class Renamed(keras_lora.LoRA):
        pass

    specimen, path = ZOO["sequential"](), tmp_path / "a.safetensors"
    keras_lora.apply_lora(specimen.model, Renamed(rank=2))
    with pytest.raises(ValueError, match="Renamed has no name"):
        keras_lora.save_adapter(specimen.model, path)
    assert not path.exists()
    monkeypatch.setitem(keras_lora.adapters.TABLE, "renamed", Renamed)
    keras_lora.save_adapter(specimen.model, path)
    loaded = keras_lora.load_adapter(ZOO["sequential"]().model, path)
    assert type(loaded.layers[0].adapter) is Renamed


def test_a_layer_thawed_afterwards_travels_along(tmp_path):
    specimen, fresh = ZOO["multi_head_attention"](), ZOO["multi_head_attention"]()
    keras_lora.apply_lora(specimen.model, rank=2)
    next(layer for layer in specimen.model.layers if isinstance(layer, keras.layers.LayerNormalization)).trainable = True
    perturb(specimen.model)
    keras_lora.save_adapter(specimen.model, tmp_path / "a.safetensors")
    keras_lora.load_adapter(fresh.model, tmp_path / "a.safetensors")
    assert difference(outputs(fresh.model, fresh.x), outputs(specimen.model, specimen.x)) == 0


def test_an_interrupted_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    specimen, path = adapted("sequential"), tmp_path / "a.safetensors"
    keras_lora.save_adapter(specimen.model, path)
    old = path.read_bytes()
    perturb(specimen.model)
    for broken in ("fsync", "replace"):
        with monkeypatch.context() as patch:

            def fail(*_, **__):
                raise OSError("the disk is full")

            patch.setattr(os, broken, fail)
            with pytest.raises(OSError, match="disk is full"):
                keras_lora.save_adapter(specimen.model, path)
        assert [each.name for each in tmp_path.iterdir()] == ["a.safetensors"]
        assert path.read_bytes() == old


def test_a_new_file_has_the_usual_permissions(tmp_path):
    keras_lora.save_adapter(adapted("sequential").model, tmp_path / "a.safetensors")
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_file_from_before_an_argument_was_there_still_loads(tmp_path):
    def base():
        return keras.Sequential([keras.Input((6,)), keras.layers.Dense(5)])

    path = tmp_path / "old.safetensors"
    model = keras_lora.apply_lora(base(), rank=2, head=None)
    perturb(model)
    keras_lora.save_adapter(model, path)

    def without_it(header):
        for entry in header["adapters"].values():
            del entry["config"]["freeze_a"]
        return header

    rewritten(path, header=without_it)
    for other in (base(), keras_lora.apply_lora(base(), rank=2, head=None)):
        keras_lora.load_adapter(other, path)
        assert np.array_equal(value(other.layers[0].adapter.lora_b), value(model.layers[0].adapter.lora_b))


# What a file says of its base.


def saved_header(model, path, **arguments):
    keras_lora.save_adapter(model, path, **arguments)
    return header_of(path)


def test_the_scale_is_said_apart_from_the_method(tmp_path):
    for method, scale in [
        (keras_lora.LoRA(4, alpha=2), 0.5),
        (keras_lora.DoRA(4, alpha=2, rank_stabilized=True), 1.0),
        (keras_lora.TrainableTokens([1]), 1.0),
    ]:
        x = keras.Input((3,), dtype="int32")
        model = keras.Model(x, keras.layers.Dense(4)(keras.layers.Embedding(5, 4, name="tokens")(x)))
        keras_lora.apply_lora(model, method, targets="tokens")
        assert saved_header(model, tmp_path / "a.safetensors")["adapters"]["layers/0"]["scale"] == scale


@pytest.mark.parametrize("name", ["sequential", "multi_head_attention", "subclassed", "hub_bert_backbone"])
def test_the_fingerprint_of_the_structure_is_that_of_the_plain_base(tmp_path, name):
    specimen, other = adapted(name), ZOO[name]()
    plain = fingerprint.structure(other.model)
    assert saved_header(specimen.model, tmp_path / "a.safetensors")["base_structure"] == plain
    keras_lora.apply_lora(other.model, **{**other.apply, "adapter": "dora", "rank": 3})
    keras_lora.apply_lora(specimen.model, "dora", rank=1, name="another")
    assert fingerprint.structure(other.model) == fingerprint.structure(specimen.model) == plain
    keras_lora.remove_lora(specimen.model)
    assert fingerprint.structure(specimen.model) == plain


def a_block(policy="float32", units=5):
    keras.config.set_dtype_policy(policy)
    x = keras.Input((3,), dtype="int32")
    y = keras.layers.Dense(units)(keras.layers.Dropout(0.1)(keras.layers.Embedding(6, 4)(x)))
    y = keras.layers.BatchNormalization()(keras.layers.EinsumDense("abc,cd->abd", (None, 4), bias_axes="d")(y))
    model = keras.Model(x, keras.layers.LSTM(4, recurrent_initializer="zeros")(y))
    keras.config.set_dtype_policy("float32")
    rng = np.random.default_rng(1)
    for v in model.weights:
        v.assign(rng.normal(size=tuple(v.shape)).astype("float32"))
    return model


#: The same on every backend.
STRUCTURE = "fded03a63bf6f3c310532a56c8e4160628152eca079ab586ed43665141758c58"
WEIGHTS = "cff68e6304126ef202d05213e248fb216a6e4fd01e4024901af68268f86560a2"


def test_the_fingerprint_of_the_structure_is_one_on_every_backend_and_in_every_dtype():
    for policy in ("float32", "mixed_bfloat16", "bfloat16", "float16"):
        assert fingerprint.structure(a_block(policy)) == STRUCTURE
    assert fingerprint.structure(a_block(units=6)) != STRUCTURE
    for mode in ("int8", "int4"):
        model = a_block()
        model.quantize(mode)
        assert fingerprint.structure(model) == STRUCTURE


def test_the_fingerprint_of_the_weights_is_one_on_every_backend_and_no_matter_what_was_trained(tmp_path):
    for method in ("lora", "dora"):
        model = keras_lora.apply_lora(
            a_block(), method, rank=2, head=None, bias="all", train=keras.layers.BatchNormalization
        )
        assert "base_weights" not in saved_header(model, tmp_path / "a.safetensors")
        assert saved_header(model, tmp_path / "a.safetensors", fingerprint_weights=True)["base_weights"] == WEIGHTS
        perturb(model)
        assert saved_header(model, tmp_path / "a.safetensors", fingerprint_weights=True)["base_weights"] == WEIGHTS


def test_a_base_with_other_weights_gives_a_warning_and_one_with_the_same_none(tmp_path, recwarn):
    path = tmp_path / "a.safetensors"
    model = keras_lora.apply_lora(a_block(), rank=2, head=None)
    model.layers[3].linear_map.kernel_variable.trainable = True  # trained as well: the file brings its value
    perturb(model)
    keras_lora.save_adapter(model, path, fingerprint_weights=True)
    keras_lora.load_adapter(a_block(), path)
    keras_lora.load_adapter(model, path)
    assert not [each for each in recwarn if "other weights" in str(each.message)]
    other = a_block()
    other.layers[-1].cell.kernel.assign(value(other.layers[-1].cell.kernel) * 1.001)
    with pytest.warns(UserWarning, match="was made from other weights than 'functional.* It fits, and is loaded") as caught:
        keras_lora.load_adapter(other, path)
    assert [each.filename for each in caught if "other weights" in str(each.message)] == [__file__]
    assert np.array_equal(
        value(other.layers[-1].cell.kernel_adapter.lora_b), value(model.layers[-1].cell.kernel_adapter.lora_b)
    )
    with pytest.warns(UserWarning, match="was made from other weights"):
        keras_lora.load_adapter(a_block("bfloat16"), path)


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_the_weights_of_a_quantised_base_have_a_fingerprint(tmp_path, recwarn, mode):
    def base(quantized=True):
        model = a_block()
        if quantized:
            model.quantize(mode)
        return model

    keras_lora.save_adapter(keras_lora.apply_lora(base(), rank=2), tmp_path / "a.safetensors", fingerprint_weights=True)
    keras_lora.load_adapter(base(), tmp_path / "a.safetensors")
    assert not [each for each in recwarn if "other weights" in str(each.message)]
    with pytest.warns(UserWarning, match="or from the same ones in another dtype"):
        keras_lora.load_adapter(base(quantized=False), tmp_path / "a.safetensors")


def test_a_refusal_says_where_the_structure_is_another(file):
    other = "made from a base of another structure"
    assert other in refused(ZOO["sequential"]().model, file, "does not fit")
    rewritten(file, lambda tensors: {key: tensors[key] for key in tensors if key != KEY})
    assert other not in refused(ZOO["multi_head_attention"]().model, file, "does not fit")


def test_a_base_of_another_structure_that_fits_is_taken(tmp_path, recwarn):
    def base(classes):
        return keras.Sequential([keras.Input((6,)), keras.layers.Dense(5), keras.layers.Dense(classes)])

    keras_lora.save_adapter(keras_lora.apply_lora(base(3), rank=1), tmp_path / "a.safetensors")
    keras_lora.load_adapter(base(4), tmp_path / "a.safetensors")
    assert not [each for each in recwarn if "structure" in str(each.message)]


def test_what_an_adapter_trains_with_and_kernels_it_does_not_change_may_differ(tmp_path):
    def net(**arguments):
        keras.utils.set_random_seed(3)
        stack = [keras.layers.Dense(5, activation="relu", name="first"), keras.layers.Dense(4), keras.layers.Dense(2)]
        model = keras.Sequential([keras.Input((6,)), *stack])
        if arguments:
            perturb(keras_lora.apply_lora(model, **arguments))
        return model

    x = np.random.default_rng(0).normal(size=(4, 6)).astype("float32")
    for method in (keras_lora.LoRA(2, dropout=0.1), keras_lora.DoRA(2, dropout=0.1)):
        other = type(method)(4 if isinstance(method, keras_lora.LoRA) else 2, freeze_a=True)
        small = net(adapter=method, targets="first")
        keras_lora.save_adapter(small, tmp_path / "small.safetensors")
        large = keras_lora.load_adapter(net(adapter=other), tmp_path / "small.safetensors")
        assert difference(outputs(large, x), outputs(small, x)) < 1e-6
        assert difference(outputs(large, x), outputs(net(), x)) > 1e-3
