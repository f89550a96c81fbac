"""Merging: the same outputs from a plain Keras model, and back bit for bit."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from helpers import covering, difference, outputs, perturb, value, values
from keras import layers
from zoo import SLICE, ZOO

import keras_lora
from keras_lora.swap.addresses import walk

FLOAT = [name for name in ZOO if not name.startswith("int")]


def adapted(name, **changes):
    specimen = ZOO[name]()
    if specimen.apply.get("adapter", "lora") is not None:
        keras_lora.apply_lora(specimen.model, **{**specimen.apply, **changes})
    perturb(specimen.model)
    return specimen


@pytest.mark.parametrize("name", covering(FLOAT, SLICE[1:4]))
def test_merged_outputs_equal_adapted_outputs_from_plain_layers(name):
    specimen = adapted(name)
    before = outputs(specimen.model, specimen.x)
    assert keras_lora.merge_lora(specimen.model) is specimen.model
    assert difference(outputs(specimen.model, specimen.x), before) < max(5e-6, specimen.tolerance)
    assert not any(type(place.layer).__module__.startswith("keras_lora") for place in walk(specimen.model))
    assert not any("keras_lora" in attribute for place in walk(specimen.model) for attribute in vars(place.layer))


@pytest.mark.parametrize("name", covering(FLOAT, SLICE[1:4]))
def test_unmerging_restores_kernels_bit_for_bit_and_the_same_adapters(name):
    specimen = adapted(name)
    model = specimen.model
    before, numbers = outputs(model, specimen.x), values(model.variables)
    flags, order = [v.trainable for v in model.variables], [v.path for v in model.variables]
    keras_lora.merge_lora(model, keep=True)
    assert keras_lora.unmerge_lora(model) is model
    assert [v.path for v in model.variables] == order
    assert [v.trainable for v in model.variables] == flags
    assert all(np.array_equal(now, numbers[path]) for path, now in values(model.variables).items())
    assert difference(outputs(model, specimen.x), before) == 0


def test_unmerging_what_was_not_kept_is_refused():
    specimen = adapted("sequential")
    with pytest.raises(ValueError, match="nothing to unmerge"):
        keras_lora.unmerge_lora(specimen.model)
    keras_lora.merge_lora(specimen.model)
    with pytest.raises(ValueError, match="nothing to unmerge"):
        keras_lora.unmerge_lora(specimen.model)
    with pytest.raises(ValueError, match=r"`merge_lora\(\)` found no adapter"):
        keras_lora.merge_lora(specimen.model)


def test_unmerging_a_model_adapted_again_is_refused_and_changes_nothing():
    specimen = adapted("sequential")
    keras_lora.merge_lora(specimen.model, keep=True)
    keras_lora.apply_lora(specimen.model, rank=1)
    perturb(specimen.model)
    before = outputs(specimen.model, specimen.x)
    with pytest.raises(ValueError, match="not adapted again since"):
        keras_lora.unmerge_lora(specimen.model)
    assert difference(outputs(specimen.model, specimen.x), before) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_refuse_the_merge_and_change_nothing(bad):
    specimen = adapted("multi_head_attention")
    factor = next(v for v in specimen.model.trainable_variables if v.name == "lora_b")
    broken = value(factor)
    broken[0, 0] = bad
    factor.assign(broken.astype("float32"))
    before, order = values(specimen.model.variables), [v.path for v in specimen.model.variables]
    with pytest.raises(ValueError, match=r"not finite, .* at \['layers/0/_query_dense'\]"):
        keras_lora.merge_lora(specimen.model)
    assert [v.path for v in specimen.model.variables] == order
    after = values(specimen.model.variables)
    assert all(np.array_equal(after[path], before[path], equal_nan=True) for path in before)


def test_a_bfloat16_kernel_is_rounded_once():
    layer = layers.Dense(64, dtype="bfloat16")
    layer.build((None, 64))
    keras_lora.apply_lora(layer, rank=4)
    perturb(layer, size=0.02)
    exact = value(layer.linear_map.kernel) + layer.adapter.scale * value(layer.adapter.lora_a) @ value(layer.adapter.lora_b)
    keras_lora.merge_lora(layer)
    rounded = value(keras.ops.cast(keras.ops.convert_to_tensor(exact.astype("float32")), "bfloat16"))
    # float32 holds the sum to 2^-24, so at most a tie falls the other way.
    assert (value(layer.kernel) == rounded).mean() > 0.999
    assert np.abs(value(layer.kernel) - exact).max() <= np.abs(exact).max() * 2.0**-8


@pytest.mark.parametrize("name", ["int4", pytest.param("int8", marks=[pytest.mark.torch_first, pytest.mark.full])])
def test_merging_into_a_quantised_base_is_refused(name):
    specimen = adapted(name)
    before = outputs(specimen.model, specimen.x)
    with pytest.raises(ValueError, match="quantised kernel"):
        keras_lora.merge_lora(specimen.model)
    assert difference(outputs(specimen.model, specimen.x), before) == 0


@pytest.mark.full
def test_a_merged_file_loads_where_keras_lora_is_not_installed(tmp_path):
    expected = {}
    for name in ("multi_head_attention", "functional_with_a_shared_layer", "convolutions", "embedding"):
        specimen = adapted(name)
        keras_lora.merge_lora(specimen.model)
        specimen.model.save(tmp_path / f"{name}.keras")
        inputs = specimen.x if isinstance(specimen.x, dict) else {"x": specimen.x}
        np.savez(tmp_path / f"{name}.npz", **inputs)
        expected[name] = outputs(specimen.model, specimen.x)[0]
    script = f"""
import sys
sys.modules["keras_lora"] = None  # an import of it raises
import keras, numpy as np, pathlib
for path in pathlib.Path({str(tmp_path)!r}).glob("*.keras"):
    file = dict(np.load(path.with_suffix(".npz")))
    model = keras.saving.load_model(path)
    np.save(path.with_suffix(".npy"), model.predict(file["x"] if set(file) == {{"x"}} else file, verbose=0))
"""
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"})
    for name, before in expected.items():
        assert difference([np.load(tmp_path / f"{name}.npy").astype("float64")], [before]) == 0


def test_a_merged_kerashub_backbone_round_trips_through_a_preset(tmp_path):
    import keras_hub

    specimen = adapted("hub_bert_backbone")
    keras_lora.merge_lora(specimen.model)
    specimen.model.save_to_preset(tmp_path / "preset")
    loaded = keras_hub.models.BertBackbone.from_preset(str(tmp_path / "preset"))
    assert difference(outputs(loaded, specimen.x), outputs(specimen.model, specimen.x)) == 0
