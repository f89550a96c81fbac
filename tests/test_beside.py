"""What trains beside an adapter (a head, biases, a normalisation): each adapter has its own values of it."""

import keras
import numpy as np
import pytest
from helpers import covering, difference, outputs, perturb, value
from keras import layers, ops

import keras_lora

X = np.random.default_rng(0).normal(size=(12, 8)).astype("float32")
Y = np.random.default_rng(1).normal(size=(12, 3)).astype("float32")
ALL = {"train": ["norm", "out"], "bias": "all"}
BESIDE = covering([{"train": "out"}, {"bias": "lora_only"}, ALL], [ALL])


def net():
    keras.utils.set_random_seed(3)
    stack = [layers.Dense(6, activation="relu"), layers.BatchNormalization(name="norm"), layers.Dense(4)]
    return keras.Sequential([keras.Input((8,)), *stack, layers.Dense(3, name="out")])


def fitted(model, seed):
    """Train what trains now, towards targets of a seed."""
    model.compile(keras.optimizers.SGD(0.02), "mse")
    y = np.random.default_rng(seed).normal(size=Y.shape).astype("float32")
    model.fit(X, y, batch_size=6, epochs=2, shuffle=False, verbose=0)
    return outputs(model, X)


def two(arguments, second="lora"):
    """A model with two adapters that were trained one after the other, and the outputs of the base and of each."""
    model = net()
    seen = {None: outputs(model, X)}
    for seed, (name, method) in enumerate({"a": "lora", "b": second}.items(), start=5):
        keras_lora.apply_lora(model, method, rank=2, name=name, **arguments)
        assert difference(outputs(model, X), seen[None]) == 0, "a new adapter starts at the base"
        seen[name] = fitted(model, seed)
    assert min(difference(seen["a"], seen["b"]), difference(seen["a"], seen[None])) > 1e-3
    return model, seen


@pytest.mark.parametrize("arguments", BESIDE)
def test_each_adapter_gives_what_it_gave_when_it_was_trained(arguments, tmp_path):
    model, seen = two(arguments)
    for name in ("a", "b", "a", None, "b"):
        assert difference(outputs(keras_lora.activate_adapters(model, name), X), seen[name]) == 0
    with keras_lora.disable_adapters(model):
        assert difference(outputs(model, X), seen[None]) == 0
    assert difference(outputs(model, X), seen["b"]) == 0
    for name in ("a", "b"):  # whichever is active, a file has its own
        keras_lora.save_adapter(model, tmp_path / f"{name}.safetensors", name=name)
        assert difference(outputs(keras_lora.load_adapter(net(), tmp_path / f"{name}.safetensors"), X), seen[name]) < 1e-6
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for name in ("b", "a", None):
        assert difference(outputs(keras_lora.activate_adapters(loaded, name), X), seen[name]) == 0
    both = keras_lora.load_adapter(
        keras_lora.load_adapter(net(), tmp_path / "a.safetensors", name="a"), tmp_path / "b.safetensors", name="b"
    )
    for name in ("a", "b", None):
        assert difference(outputs(keras_lora.activate_adapters(both, name), X), seen[name]) < 1e-6
    keras_lora.load_adapter(both, tmp_path / "b.safetensors", name="a")
    assert difference(outputs(keras_lora.activate_adapters(both, "a"), X), seen["b"]) < 1e-6
    assert difference(outputs(keras_lora.remove_lora(model), X), seen[None]) == 0


def test_going_on_with_one_leaves_the_other():
    model, seen = two({"train": "out"}, "dora")
    keras_lora.train_adapters(keras_lora.activate_adapters(model, "a"), "a")
    assert [v.path.split("/")[-2:] for v in model.trainable_variables if "lora" not in v.path] == [
        ["out", "kernel"],
        ["out", "bias"],
    ]
    moved = fitted(model, 9)
    assert difference(moved, seen["a"]) > 1e-3
    assert difference(outputs(keras_lora.activate_adapters(model, "b"), X), seen["b"]) == 0
    assert difference(outputs(keras_lora.activate_adapters(model, "a"), X), moved) == 0


def heads(model):
    return [value(v) for v in model.get_layer("out").weights]


def test_several_at_once_add_up_what_each_changed():
    model, _ = two({"train": "out"})
    each = {name: heads(keras_lora.activate_adapters(model, name)) for name in (None, "a", "b")}
    keras_lora.activate_adapters(model, {"a": 0.5, "b": -2})
    expected = [found + 0.5 * (a - found) - 2 * (b - found) for found, a, b in zip(*each.values(), strict=True)]
    assert difference(heads(model), expected) < 1e-6
    for v in model.get_layer("out").weights:
        v.assign(value(v) + 1)  # what both learn together they share, and nothing is lost
    together = heads(model)
    keras_lora.activate_adapters(keras_lora.activate_adapters(model, None), {"a": 0.5, "b": -2})
    assert difference(heads(model), together) < 1e-6
    assert difference(heads(keras_lora.activate_adapters(model, None)), each[None]) == 0
    keras_lora.combine_adapters(keras_lora.activate_adapters(model, "a"), {"a": 0.5, "b": -2}, name="both")
    assert difference(heads(model), together) < 1e-6


@pytest.mark.torch_first
def test_an_adapter_without_a_head_has_the_head_of_the_base():
    model = keras_lora.apply_lora(net(), rank=2, name="a", train="out")
    found = heads(model)
    fitted(model, 5)
    keras_lora.apply_lora(model, rank=2, name="b")
    assert difference(heads(model), found) == 0
    assert not model.get_layer("out").trainable_variables
    assert difference(heads(keras_lora.activate_adapters(model, "a")), found) > 1e-3


@pytest.mark.torch_first
@pytest.mark.parametrize("keep", [True, False])
def test_merging_and_deleting(keep):
    model, seen = two({"train": "out"})
    keras_lora.activate_adapters(model, "a")
    if not keep:
        keras_lora.delete_adapter(model, "b")
    assert difference(outputs(keras_lora.merge_lora(model, keep=keep), X), seen["a"]) < 1e-6
    if keep:
        keras_lora.unmerge_lora(model)
        for name in ("b", "a", None):
            assert difference(outputs(keras_lora.activate_adapters(model, name), X), seen[name]) == 0
        keras_lora.delete_adapter(keras_lora.delete_adapter(model, "a"), "b")
        assert difference(outputs(model, X), seen[None]) == 0


@pytest.mark.torch_first
def test_deleting_the_active_one_leaves_the_others():
    model, seen = two({"train": "out"})
    keras_lora.delete_adapter(model, "b")
    assert difference(outputs(model, X), seen[None]) == 0
    assert difference(outputs(keras_lora.activate_adapters(model, "a"), X), seen["a"]) == 0


@pytest.mark.torch_first
def test_weights_of_the_base_loaded_later_are_the_base(tmp_path):
    plain = net()
    perturb(plain)
    plain.save_weights(tmp_path / "base.weights.h5")
    model = keras_lora.apply_lora(net(), rank=2, train="out", name="a")
    model.load_weights(tmp_path / "base.weights.h5")
    assert difference(outputs(model, X), outputs(plain, X)) == 0
    fitted(model, 5)
    with keras_lora.disable_adapters(model):
        assert difference(outputs(model, X), outputs(plain, X)) == 0


@pytest.mark.torch_first
def test_what_was_thawed_by_hand_is_saved_with_the_adapter(tmp_path):
    model = keras_lora.apply_lora(net(), rank=2)
    model.get_layer("out").trainable = True
    expected = fitted(model, 5)
    keras_lora.save_adapter(model, tmp_path / "a.safetensors")
    assert difference(outputs(keras_lora.load_adapter(net(), tmp_path / "a.safetensors"), X), expected) < 1e-6


@pytest.mark.torch_first
def test_weights_saved_with_one_adapter_are_loaded_with_another(tmp_path):
    model, seen = two({"train": "out"})
    model.save_weights(tmp_path / "both.weights.h5")  # "b" is active
    other = net()
    for name in ("a", "b"):
        keras_lora.apply_lora(other, rank=2, name=name, train="out")
    keras_lora.activate_adapters(other, "a")
    other.load_weights(tmp_path / "both.weights.h5")
    for name in ("a", "b", None, "a"):
        assert difference(outputs(keras_lora.activate_adapters(other, name), X), seen[name]) < 1e-6


def test_the_base_inside_a_step_has_its_own_head():
    class Policy(keras.Model):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def call(self, x):
            return self.net(x)

        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            with keras_lora.disable_adapters(self.net):
                reference = ops.stop_gradient(self.net(x))
            return ops.mean(ops.square(y_pred - reference))

    model, seen = two({"train": "out"})
    policy = Policy(model)
    policy.build(X.shape)
    policy.compile(keras.optimizers.SGD(0.05))
    losses = policy.fit(X, Y, batch_size=12, epochs=3, verbose=0).history["loss"]
    assert losses[0] == pytest.approx(np.mean((seen["b"][0] - seen[None][0]) ** 2), rel=1e-5)
    assert losses[-1] < losses[0]
    assert difference(outputs(keras_lora.activate_adapters(model, None), X), seen[None]) == 0
