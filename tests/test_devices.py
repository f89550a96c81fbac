"""More than one device: layouts, losses and files on eight simulated devices, and what is refused on each engine."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers

import keras_lora

BACKEND = keras.backend.backend()
ROOT = Path(__file__).parents[1]
needs_jax = pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="needs jax")
needs_hub = pytest.mark.skipif(importlib.util.find_spec("keras_hub") is None, reason="needs keras_hub")


def run(*command):
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=environment())
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def environment():
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}


@functools.cache
def on_eight_devices(which):
    return json.loads(run("tests/devices_on_jax.py", which))


# JAX, in one process of its own: it reads the number of simulated devices when it starts.


@pytest.fixture(scope="module")
def small():
    return on_eight_devices("small")


eight = [pytest.mark.once, pytest.mark.full, needs_jax]
LAYOUTS = {
    "embedding": ("model", "batch"),
    "up": ("batch", "model"),
    "first_out": ("batch", "model"),
    "first_in": ("model", "batch"),
    "second_out": (None, None),
    "second_in": (None, None),
    "head": (None, None),
}


class TestOnEightDevices:
    pytestmark = eight

    @pytest.mark.parametrize("case", ["lora", "loaded", "filled"])
    def test_factors_are_laid_out_like_the_kernel(self, small, case):
        for name, (of_a, of_b) in LAYOUTS.items():
            assert small[case][f"{name}/lora/lora_a"] == [of_a, None]
            assert small[case][f"{name}/lora/lora_b"] == [None, of_b]

    def test_dora_s_magnitude_and_norms_follow_the_outputs(self, small):
        for name, (_, of_b) in LAYOUTS.items():
            for each in ("magnitude", "kernel_norm_squared"):
                assert small["dora"]["layouts"][f"{name}/dora/{each}"] == [of_b]

    def test_a_layout_of_the_user_wins(self, small):
        expected = small["lora"] | {"up/lora/lora_b": [None, "batch"]}
        assert small["own"] == expected

    def test_losses_equal_those_of_one_device_and_the_base_keeps_its_bytes(self, small):
        np.testing.assert_allclose(small["dora"]["many"], small["dora"]["one"], rtol=0, atol=1e-5)
        assert small["dora"]["one"][-1] < small["dora"]["one"][0]
        assert small["dora"]["base_unchanged"]

    def test_no_kernel_is_gathered_that_the_plain_model_does_not_gather(self, small):
        assert small["dora"]["gathers"] == small["plain"]["gathers"]

    def test_a_device_has_less_of_the_factors(self, small):
        whole, on_each = small["dora"]["bytes"]
        assert on_each < 0.7 * whole

    def test_files_and_merging_work(self, small):
        assert small["loaded_equal"]
        assert small["merged"] == ["batch", "model"]

    @pytest.mark.parametrize(
        ("when", "received"),
        [
            ("before_apply", "created with no distribution, and <DeviceMesh"),
            ("before_fit", "created with no distribution, and <DeviceMesh"),
            ("gone", "axis_names=('batch', 'model')>, and no distribution now"),
        ],
    )
    def test_a_distribution_set_at_the_wrong_time_is_an_error(self, small, when, received):
        assert received in small["late"][when]
        assert "Call `keras.distribution.set_distribution(...)` first" in small["late"][when]
        assert small["late"]["class"] == "keras.src.layers.core.dense"


@pytest.mark.nightly
@pytest.mark.once
@needs_jax
@needs_hub
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_kerashub_s_layout_maps(family):
    found = on_eight_devices(family)
    for method in ("lora", "dora", "data"):
        np.testing.assert_allclose(found[method]["many"], found[method]["one"], rtol=0, atol=1e-5)
        assert found[method]["base_unchanged"]
    for method in ("lora", "dora"):
        assert found[method]["gathers"] == found["plain"]["gathers"]
        whole, on_each = found[method]["bytes"]
        assert on_each < 0.5 * whole
    assert not found["data"]["gathers"]


SCRIPTS = ["devices_jax", "devices_jax_processes", "devices_jax_processes --mesh 1 4", "devices_tensorflow", "devices_torch"]


@pytest.mark.nightly
@pytest.mark.once
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_script_of_each_engine_has_the_losses_of_one_device(script):
    name, *arguments = script.split()
    engine = {"jax": "jax", "tensorflow": "tensorflow", "torch": "torch"}[name.split("_")[1]]
    if importlib.util.find_spec(engine) is None:
        pytest.skip(f"needs {engine}")
    assert "are equal." in run(f"examples/{name}.py", *arguments)


# What is refused, on the backend that runs.


def model():
    return keras.Sequential([keras.Input((8,)), layers.Dense(8), layers.Dense(2)])


@pytest.fixture
def distribution():
    mesh = keras.distribution.DeviceMesh((1,), ("batch",), devices=["cpu:0"])
    keras.distribution.set_distribution(keras.distribution.DataParallel(device_mesh=mesh))
    yield
    keras.distribution.set_distribution(None)


@pytest.mark.every_backend
def test_keras_distribution_is_refused_where_it_does_nothing(distribution):
    plain = model()
    if BACKEND == "jax":  # one device is the device of a model built before
        assert keras_lora.apply_lora(plain).trainable_variables
        return
    with pytest.raises(ValueError, match=f"does nothing on the backend '{BACKEND}'"):
        keras_lora.apply_lora(plain)
    assert type(plain.layers[0]) is layers.Dense
    keras.distribution.set_distribution(None)
    adapted = keras_lora.apply_lora(plain)
    adapted.compile("sgd", "mse")
    keras.distribution.set_distribution(keras.distribution.DataParallel(devices=["cpu:0"]))
    with pytest.raises(ValueError, match="would run on one device"):
        adapted.fit(np.ones((2, 8)), np.ones((2, 2)), verbose=0)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="tf.distribute")
@pytest.mark.parametrize("built_inside", [True, False])
def test_a_mirrored_strategy_s_scope_left_out_is_an_error(built_inside):
    import contextlib

    import tensorflow as tf

    scope = tf.distribute.MirroredStrategy(["CPU:0"]).scope()
    with scope if built_inside else contextlib.nullcontext():
        plain = model()
    with contextlib.nullcontext() if built_inside else scope, pytest.raises(ValueError, match="one `with strategy"):
        keras_lora.apply_lora(plain)
    assert type(plain.layers[0]) is layers.Dense


@pytest.mark.full
@pytest.mark.skipif(BACKEND != "torch", reason="FSDP2")
def test_fsdp2_is_refused(tmp_path):
    import torch

    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        from torch.distributed.fsdp import fully_shard

        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        plain = fully_shard(model(), mesh=mesh)
        with pytest.raises(ValueError, match="wrapped by `fully_shard`"):
            keras_lora.apply_lora(plain)
        assert type(plain.layers[0]) is layers.Dense
        with pytest.raises(ValueError, match="doesn't support scalar parameters"):
            fully_shard(keras_lora.apply_lora(model()), mesh=mesh)
    finally:
        torch.distributed.destroy_process_group()
