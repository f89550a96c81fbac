"""`.keras` files: every kind of model, loaded in a fresh process on each backend, is the same model and goes on learning.

`make quick` loads in its own process: another one imports Keras and KerasHub, which takes longer than the tests.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import keras
import load_zoo
import numpy as np
import pytest
from conftest import missing
from helpers import covering, difference, outputs, value
from zoo import BATCH, SLICE, ZOO

import keras_lora
from keras_lora.swap.addresses import walk

BACKENDS = [each for each in ("jax", "tensorflow", "torch") if not missing(each)]
HERE = keras.backend.backend()
#: Who trains on in a process of another backend; with `--speed=all` a third of all. In a process of the same backend all do.
TRAINED_ELSEWHERE = ["subclassed", "tied_embedding"]


def pairs():
    """Which backend loads which file here, and at which speed.

    Torch compiles nothing, so `make test` saves all of them there; JAX and TensorFlow load half of a slice each. What they
    save themselves are a few, which they load again.
    """
    full, elsewhere = [pytest.mark.full], [pytest.mark.nightly]
    for backend in BACKENDS:
        for number, name in enumerate(ZOO):
            if backend == HERE:
                kept = SLICE if HERE == "torch" else ["sequential", "subclassed"]
                marks = [] if name in kept else full if HERE == "torch" else elsewhere
            elif HERE == "torch":
                here = name in SLICE and number % 2 == (backend == "jax")
                marks = full if here else elsewhere
            else:
                marks = elsewhere
            yield pytest.param(backend, name, marks=marks)


def adapted(name):
    """A specimen, adapted and compiled."""
    specimen = ZOO[name]()
    if specimen.apply.get("adapter", "lora") is not None:
        keras_lora.apply_lora(specimen.model, **specimen.apply)
    specimen.model.compile(keras.optimizers.Adam(1e-2), **specimen.compile)
    return specimen


def fit(specimen, epochs):
    history = specimen.model.fit(specimen.x, specimen.y, epochs=epochs, batch_size=BATCH, shuffle=False, verbose=0)
    return history.history["loss"]


def named(prefix, data):
    data = data if isinstance(data, dict) else {"only": data}
    arrays = {f"{prefix}/{key}": np.asarray(array) for key, array in data.items()}
    return {key: a.astype("float32") if a.dtype.name == "bfloat16" else a for key, a in arrays.items()}


def chosen(request):
    """The names by backend that the tests of this run ask for."""
    names: dict[str, list[str]] = {}
    for item in request.session.items:
        if item.path == Path(__file__) and "backend" in getattr(item, "callspec", SimpleNamespace(params={})).params:
            names.setdefault(item.callspec.params["backend"], []).append(item.callspec.params["name"])
    return names


@pytest.fixture(scope="module")
def saved(tmp_path_factory, request):
    """Every specimen that is asked for, trained and saved here, and what uninterrupted training does next."""
    folder, seen = tmp_path_factory.mktemp("zoo"), {}
    for name in dict.fromkeys(name for names in chosen(request).values() for name in names):
        specimen = adapted(name)
        first = fit(specimen, 3)
        predicted = specimen.model.predict(specimen.x, verbose=0)
        specimen.model.save(folder / f"{name}.keras")
        arrays = {**named("x", specimen.x), **named("y", specimen.y), **named("out", predicted)}
        np.savez(folder / f"{name}.npz", **arrays)
        model = specimen.model
        seen[name] = {
            "first": first,
            "tolerance": specimen.tolerance,
            "resumed_within": max(specimen.tolerance, specimen.resumed_elsewhere),
            "classes": [[place.address, type(place.layer).__name__] for place in walk(model)],
            "trainable": [list(v.shape) for v in model.trainable_variables],
            "flags": [place.layer.trainable for place in walk(model)],
            "iterations": int(model.optimizer.iterations),
            "optimizer": [list(v.shape) for v in model.optimizer.variables],
            "resumed": fit(specimen, 2),
        }
    return folder, seen


@pytest.fixture(scope="module")
def loaded(request, saved):
    """What a fresh process of a backend saw in those files: it is started when its first test asks."""
    folder, _ = saved
    reports = {}

    def on(backend, name):
        if request.config.getoption("speed") == "quick":
            return json.loads(json.dumps(load_zoo.look(folder, name, train=True, again=True)))
        if backend not in reports:
            names = chosen(request)[backend]
            environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
            command = [sys.executable, load_zoo.__file__, folder, backend, ",".join(names)]
            trained = [each for each in names if each in trained_on(backend, request)]
            subprocess.run([*command, ",".join(trained)], check=True, env=environment)
            reports[backend] = {each: json.loads((folder / f"{each}.{backend}.json").read_text()) for each in names}
        return reports[backend][name]

    return on


def trained_on(backend, request):
    if backend == HERE:
        return list(ZOO)
    every = request.config.getoption("speed") == "all"
    return list(ZOO)[BACKENDS.index(HERE) :: 3] if every else TRAINED_ELSEWHERE


@pytest.mark.parametrize(("backend", "name"), list(pairs()))
def test_a_fresh_process_loads_the_same_model_and_goes_on_learning(backend, name, saved, loaded, request):
    before, after = saved[1][name], loaded(backend, name)
    if name == "made_by_hand" and HERE == "torch" and backend != "torch":
        pytest.skip("saved on torch, a plain Keras model names torch's optimizer class, which no other backend can run")
    assert "error" not in after, after["error"]
    tolerance = before["tolerance"]
    assert after["difference"] <= (0 if backend == HERE and tolerance < 1e-4 else tolerance)
    for fact in ("classes", "trainable", "flags", "iterations", "optimizer"):
        assert after[fact] == before[fact], fact
    if name not in trained_on(backend, request):
        return
    assert after["moved"] == []
    assert after["resumed"] == pytest.approx(
        before["resumed"], rel=max(tolerance, 1e-5) if backend == HERE else before["resumed_within"]
    )
    assert after["resumed"][-1] < before["first"][0], "the loss fell"
    if backend == HERE:
        assert after["fresh"][-1] < after["fresh"][0], "the loss falls with a fresh optimizer"


def test_keras_own_lora_never_trains_again_after_loading(tmp_path):
    """A claim of the README, kept true: Keras saves its own adapter merged away and loads both factors as zeros."""
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(6), keras.layers.Dense(2)])
    model.layers[0].enable_lora(2)
    x, y = np.ones((4, 8), "float32"), np.ones((4, 2), "float32")
    model.compile(keras.optimizers.Adam(1e-2), "mse")
    model.fit(x, y, epochs=2, verbose=0)
    assert np.abs(value(model.layers[0].lora_kernel_b)).max() > 0
    model.save(tmp_path / "builtin.keras")
    model = keras.saving.load_model(tmp_path / "builtin.keras")
    model.compile(keras.optimizers.Adam(1e-2), "mse")
    model.fit(x, y, epochs=5, verbose=0)
    assert np.abs(value(model.layers[0].lora_kernel_a)).max() == 0
    assert np.abs(value(model.layers[0].lora_kernel_b)).max() == 0


def test_keras_own_lora_thaws_attention_on_loading(tmp_path):
    """The other half of that claim: inside MultiHeadAttention the adapters vanish and the frozen kernels train."""
    x = keras.Input((5, 8))
    model = keras.Model(x, keras.layers.MultiHeadAttention(2, 4)(x, x))
    for layer in model.layers[-1]._flatten_layers(include_self=False):
        if isinstance(layer, keras.layers.EinsumDense):
            layer.enable_lora(2)
    kernels = {v.path for v in model.non_trainable_variables if v.path.endswith("kernel")}
    assert len(kernels) == 4
    model.save(tmp_path / "builtin.keras")
    model = keras.saving.load_model(tmp_path / "builtin.keras")
    assert not model.non_trainable_variables
    assert len([v for v in model.trainable_variables if v.path.endswith("kernel")]) == 4


@pytest.mark.parametrize("name", covering(["block_built_in_build", "multi_head_attention", "subclassed"], ["subclassed"]))
def test_saving_twice_and_loading_twice_changes_nothing(tmp_path, name):
    specimen = adapted(name)
    fit(specimen, 2)
    expected = outputs(specimen.model, specimen.x)
    model = specimen.model
    for turn in range(2):
        model.save(tmp_path / f"{turn}.keras")
        model = keras.saving.load_model(tmp_path / f"{turn}.keras")
        assert difference(outputs(model, specimen.x), expected) == 0
