"""Long random sequences of all that can be done with named adapters, against a reference in NumPy float64."""

import tempfile
from pathlib import Path

import keras
import numpy as np
import pytest
from helpers import difference, outputs, value
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from keras import layers
from zoo import ids, numbers

import keras_lora
from keras_lora.adapters import Adapter
from keras_lora.swap.adapted import named_adapters
from keras_lora.swap.addresses import walk

pytestmark = [
    pytest.mark.torch_first,
    pytest.mark.full,
    # What any sequence of steps may cause on purpose.
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

IDS, TARGET = ids(4, 3, vocabulary=7), numbers(4, 3, 2)
NAMES = ["dense", "mix", "layers/1", "c d"]
STRENGTHS = st.sampled_from([-1.0, -0.4, 0.0, 0.7, 1.0, 1.5])
#: The method, rank, alpha, rank_stabilized, layers and numbers of a new adapter.
NEW = st.tuples(
    st.sampled_from([keras_lora.LoRA, keras_lora.DoRA]),
    st.integers(1, 3),
    st.sampled_from([1, 2.5, 4]),
    st.booleans(),
    st.sets(st.sampled_from(["tokens", "mix", "hidden", "head"]), min_size=1).map(sorted),
    st.integers(0, 99),
)
#: The weights of one adapter of one kernel, the strength among them.
WEIGHTS = {"LoRA": 3, "DoRA": 5}
FACTORS = {"LoRA": ["lora_a", "lora_b"], "DoRA": ["lora_a", "lora_b", "magnitude"]}


def fresh():
    x = keras.Input((3,), dtype="int32")
    y = layers.Embedding(7, 4, name="tokens")(x)
    y = layers.EinsumDense("abc,cd->abd", (None, 5), bias_axes="d", activation="tanh", name="mix")(y)
    y = layers.Dense(6, activation="tanh", name="hidden")(y)
    model = keras.Model(x, layers.Dense(2, name="head")(y))
    rng = np.random.default_rng(2)
    for v in model.variables:
        v.assign(rng.normal(size=v.shape).astype("float32") * 0.7)
    return model


def arrays(variables):
    """In order: two adapters of a kernel may have variables of one path."""
    return [value(v).copy() for v in variables]


def change(method, config, factors, w):
    """ΔW as the papers define it."""
    scale = config["alpha"] / (np.sqrt(config["rank"]) if config["rank_stabilized"] else config["rank"])
    product = scale * factors["lora_a"] @ factors["lora_b"]
    if method == "LoRA":
        return product
    return factors["magnitude"] * (w + product) / np.linalg.norm(w + product, axis=0) - w


class Adapters(RuleBasedStateMachine):
    """The reference: `kernels` and `biases` by layer, `adapters` by name and layer, `strengths`, and who `trains`."""

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name)
        self.files = {}

    def teardown(self):
        self.folder.cleanup()

    @initialize(new=NEW)
    def build(self, new):
        keras.utils.set_random_seed(0)
        self.model = fresh()
        self.kernels = {each.name: value(each.weights[0]) for each in self.model.layers[1:]}
        self.biases = {each.name: value(each.weights[1]) for each in self.model.layers[2:]}
        self.adapters, self.strengths, self.trains = {}, {}, None
        self.steps = 0

    # The reference.

    def changed(self):
        """The kernels with all changes, each weighted by its strength."""
        kernels = {}
        for layer, w in self.kernels.items():
            found = [(self.strengths[name], each[layer]) for name, each in self.adapters.items() if layer in each]
            kernels[layer] = w + sum((strength * change(*each, w) for strength, each in found), start=np.zeros_like(w))
        return kernels

    def expected(self):
        kernels = self.changed()
        y = kernels["tokens"][IDS]
        for layer, after in (("mix", np.tanh), ("hidden", np.tanh), ("head", lambda y: y)):
            y = after(y @ kernels[layer] + self.biases[layer])
        return y

    def read(self, name):
        """Enter into the reference what the model's adapter holds."""
        self.adapters[name] = {}
        for linear, adapter in named_adapters(self.model)[name].values():
            held = {v.name: value(v).copy() for v in adapter.weights}
            method = type(adapter).__name__
            config = {key: adapter.get_config()[key] for key in ("rank", "alpha", "rank_stabilized")}
            self.adapters[name][linear.layer.name] = (method, config, {key: held[key] for key in FACTORS[method]})

    def enter(self, name):
        """A new adapter is the only one that is active and that trains."""
        self.read(name)
        self.strengths = {**dict.fromkeys(self.strengths, 0.0), name: 1.0}
        self.trains = name

    @property
    def free(self):
        return next((name for name in NAMES if name not in self.adapters), None)

    # What can be done.

    @precondition(lambda self: self.free)
    @rule(new=NEW)
    def add(self, new):
        method, rank, alpha, rank_stabilized, where, seed = new
        name, rng = self.free, np.random.default_rng(seed)
        adapter = method(rank=rank, alpha=alpha, rank_stabilized=rank_stabilized)
        keras_lora.apply_lora(self.model, adapter, targets=where, name=name)
        for v in self.model.trainable_variables:
            v.assign(value(v).astype("float32") * (v.name == "magnitude") + 0.3 * rng.normal(size=v.shape).astype("float32"))
        self.enter(name)
        assert sorted(self.adapters[name]) == where

    @precondition(lambda self: self.adapters)
    @rule(data=st.data())
    def activate(self, data):
        chosen = data.draw(st.dictionaries(st.sampled_from(sorted(self.adapters)), STRENGTHS))
        before = self.model.predict_function
        keras_lora.activate_adapters(self.model, chosen)
        self.strengths = {name: chosen.get(name, 0.0) for name in self.adapters}
        assert self.model.predict_function is before

    @precondition(lambda self: self.adapters)
    @rule(data=st.data(), strength=STRENGTHS)
    def scale_one(self, data, strength):
        name = data.draw(st.sampled_from(sorted(self.adapters)))
        keras_lora.activate_adapters(self.model, {**keras_lora.active_adapters(self.model), name: strength})
        self.strengths[name] = strength

    @precondition(lambda self: self.adapters)
    @rule(data=st.data())
    def train(self, data):
        name = data.draw(st.sampled_from(sorted(self.adapters)))
        self.strengths[name] = self.strengths[name] or 1.0
        keras_lora.train_adapters(self.model, name)
        keras_lora.activate_adapters(self.model, self.strengths)
        self.trains = name
        chosen = {id(v) for v in self.model.trainable_variables}
        still = [v for v in self.model.weights if id(v) not in chosen]
        found, before = arrays(still), self.adapters[name]
        self.model.compile(keras.optimizers.SGD(0.02), "mse")
        self.model.fit(IDS, TARGET, epochs=3, verbose=0)
        assert all(np.array_equal(now, each) for now, each in zip(arrays(still), found, strict=True))
        self.read(name)
        assert any(
            not np.array_equal(self.adapters[name][layer][2][key], old)
            for layer, (_, _, factors) in before.items()
            for key, old in factors.items()
        )

    @precondition(lambda self: self.adapters)
    @rule()
    def merge_and_unmerge(self):
        order, before = [id(v) for v in self.model.weights], arrays(self.model.weights)
        keras_lora.merge_lora(self.model, keep=True)
        assert difference(value(self.model(IDS)), self.expected()) < 1e-4
        keras_lora.unmerge_lora(self.model)
        assert [id(v) for v in self.model.weights] == order
        assert all(np.array_equal(now, each) for now, each in zip(arrays(self.model.weights), before, strict=True))

    @precondition(lambda self: len(self.adapters) > 1)
    @rule(new=NEW)
    def merge_and_go_on(self, new):
        self.kernels = self.changed()
        for name in self.adapters:
            if not self.strengths.get(name):  # merging would lose it
                keras_lora.delete_adapter(self.model, name)
        if any(self.strengths.get(name) for name in self.adapters):  # deleting the last is removing
            keras_lora.merge_lora(self.model)
        self.adapters, self.strengths, self.trains = {}, {}, None
        self.outputs_are_those_of_the_reference()
        self.add(new)

    @precondition(lambda self: self.adapters)
    @rule(data=st.data())
    def save(self, data):
        name = data.draw(st.sampled_from(sorted(self.adapters)))
        path = self.path / f"{len(self.files)}.safetensors"
        keras_lora.save_adapter(self.model, path, name=name)
        self.files[path] = self.adapters[name]

    @precondition(lambda self: self.files and self.free)
    @rule(data=st.data())
    def load(self, data):
        path, name = data.draw(st.sampled_from(sorted(self.files))), self.free
        keras_lora.load_adapter(self.model, path, name=name)
        self.enter(name)
        for layer, (method, config, factors) in self.files[path].items():
            assert self.adapters[name][layer][:2] == (method, config)
            assert all(np.array_equal(self.adapters[name][layer][2][key], each) for key, each in factors.items())

    @precondition(lambda self: self.adapters)
    @rule()
    def save_and_load_the_model(self):
        names, order = list(named_adapters(self.model)), [tuple(v.shape) for v in self.model.trainable_variables]
        self.model.save(self.path / "model.keras")
        self.model = keras.saving.load_model(self.path / "model.keras")
        assert list(named_adapters(self.model)) == names
        assert [tuple(v.shape) for v in self.model.trainable_variables] == order

    @precondition(lambda self: self.adapters)
    @rule(data=st.data())
    def delete(self, data):
        name = data.draw(st.sampled_from(sorted(self.adapters)))
        keras_lora.delete_adapter(self.model, name)
        del self.adapters[name], self.strengths[name]
        self.trains = None if self.trains == name else self.trains

    # What holds after each.

    @invariant()
    def outputs_are_those_of_the_reference(self):
        """By a `predict` compiled before the step where there is one; it is compiled anew after every third step only."""
        self.steps += 1
        compiled = self.model.predict_function is not None or self.steps % 3 == 0
        found = outputs(self.model, IDS) if compiled else value(self.model(IDS))
        assert difference(found, self.expected()) < 1e-4

    @invariant()
    def nothing_is_left_over(self):
        each = [method for adapters in self.adapters.values() for method, _, _ in adapters.values()]
        places = [place.layer for place in walk(self.model)]
        assert len([place for place in places if isinstance(place, Adapter)]) == sum(1 + (m == "DoRA") for m in each)
        assert len(self.model.weights) == 7 + sum(WEIGHTS[method] for method in each)
        if keras.backend.backend() == "torch":
            assert len({id(p) for p in self.model.parameters()}) == len(self.model.weights)

    @invariant()
    def what_is_told_is_so(self):
        strengths = {name: float(np.float32(each)) for name, each in self.strengths.items()}
        trained = self.model.trainable_variables
        if self.adapters:
            assert keras_lora.active_adapters(self.model) == {name: each for name, each in strengths.items() if each}
            assert len(trained) == sum(len(factors) for _, _, factors in self.adapters.get(self.trains, {}).values())
            own = [adapter for _, adapter in named_adapters(self.model).get(self.trains, {}).values()]
            assert {id(v) for v in trained} <= {id(v) for adapter in own for v in adapter.weights}
        else:
            assert len(trained) == 7
        rows = {
            (row.layer.split("/")[-1], row.name, row.method, row.rank, row.strength)
            for row in keras_lora.list_adapters(self.model)
            if row.name is not None
        }
        assert rows == {
            (layer, name, method, config["rank"], strengths[name])
            for name, adapters in self.adapters.items()
            for layer, (method, config, _) in adapters.items()
        }


Adapters.TestCase.settings = settings(
    max_examples=5,
    stateful_step_count=15,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],  # shrinking a failure would take many minutes
    suppress_health_check=list(HealthCheck),
)
test_any_sequence = Adapters.TestCase
