"""Layers of one's own: registered, judged by the contract test, never guessed."""

import keras
import numpy as np
import pytest
from helpers import difference, perturb, value
from keras import layers, ops
from zoo import numbers

import keras_lora
from keras_lora.layers.factored import AdaptedKernel
from keras_lora.swap.adapted import adapted_maps
from keras_lora.testing import check_layer

pytestmark = pytest.mark.torch_first


@keras.saving.register_keras_serializable("registration")
@keras_lora.register_layer(kernels={"w": "io"})
class Scores(layers.Layer):
    """A layer with a raw weight and a layer inside."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.inner = layers.Dense(units)

    def build(self, shape):
        self.w = self.add_weight(shape=(shape[-1], self.units), name="w")
        self.inner.build((*shape[:-1], self.units))

    def call(self, x):
        return self.inner(ops.tanh(ops.matmul(x, self.w)))

    def get_config(self):
        return {**super().get_config(), "units": self.units}


@keras.saving.register_keras_serializable("registration")
@keras_lora.register_layer(kernels={"up": "gio", "down": "gio"}, factored=True, by_default=False)
class Experts(layers.Layer):
    """Experts whose call mixes plain einsums, a cast, an einsum in another direction, and an op that is no sum."""

    def build(self, shape):
        self.up = self.add_weight(shape=(3, shape[-1], 4), name="up")
        self.down = self.add_weight(shape=(3, 4, shape[-1]), name="down")

    def call(self, x, training=None):
        hidden = ops.relu(ops.einsum("th,ehm->etm", x, ops.cast(self.up, x.dtype)))
        back = ops.einsum("etm,ehm->eth", hidden, self.up)
        return ops.einsum("eti,eih->eth", hidden, self.down) + back + ops.sum(self.down)


def built(cls, *arguments, shape=(2, 6), **options):
    layer = cls(*arguments, **options)
    layer.build(shape)
    return layer


@pytest.mark.parametrize("layer", [lambda: built(Scores, 3), lambda: built(Experts)], ids=["kernel", "factored"])
@pytest.mark.every_backend
def test_the_contract_holds_for_registered_layers_and_leaves_them_as_they_were(layer):
    layer = layer()
    weights = [value(v) for v in layer.weights]
    seen = check_layer(layer, numbers(5, 6))
    assert set(seen) == {"lora", "dora"}
    assert all(np.array_equal(value(v), before) for v, before in zip(layer.weights, weights, strict=True))
    assert not adapted_maps(layer)


@pytest.mark.parametrize("cls", [layers.Dense, layers.Conv1D, layers.LSTM, layers.Embedding, layers.SeparableConv1D])
def test_the_contract_holds_for_layers_of_keras(cls):
    arguments = {"Conv1D": (4, 2), "SeparableConv1D": (4, 2), "Embedding": (9, 4)}.get(cls.__name__, (4,))
    x = np.ones((2, 5), "int32") if cls is layers.Embedding else numbers(2, 5, 3)
    layer = cls(*arguments)
    layer(x)
    if cls is layers.LSTM:
        with pytest.raises(ValueError, match="not registered"):
            check_layer(layer, x)
    else:
        assert max(check_layer(layer, x).values()) < 1e-5


def test_the_contract_catches_a_subclass_that_is_not_like_its_parent():
    @keras.saving.register_keras_serializable("registration")
    class Noisy(layers.Dense):
        def call(self, inputs, training=None):
            return 2 * super().call(inputs) + ops.sin(ops.sum(self.kernel))

    keras_lora.register_layer(Noisy, like=layers.Dense)
    with pytest.raises(AssertionError, match=r"Noisy with lora: what runs, and the plain layer .* differ by"):
        check_layer(built(Noisy, 3), numbers(5, 6))


def test_the_contract_catches_a_kernel_that_the_call_does_not_use():
    @keras.saving.register_keras_serializable("registration")
    @keras_lora.register_layer(kernels={"w": "io"})
    class Idle(Scores):
        def call(self, x):
            return self.inner(x[..., : self.units])

    with pytest.raises(AssertionError, match="does not use 'w'"):
        check_layer(built(Idle, 3), numbers(5, 6))


def test_the_contract_needs_a_built_layer_of_a_registered_class():
    with pytest.raises(ValueError, match="not registered"):
        check_layer(built(layers.LayerNormalization), numbers(5, 6))
    with pytest.raises(ValueError, match="not built"):
        check_layer(layers.Dense(3), numbers(5, 6))


def test_a_registered_layer_trains_saves_and_merges_like_any(tmp_path):
    x = keras.Input((6,))
    model = keras.Model(x, layers.Dense(2, name="head")(Scores(3, name="scores")(x)))
    keras_lora.apply_lora(model, rank=1)
    assert list(adapted_maps(model)) == ["layers/0/w", "layers/0/inner"]
    assert [v.path for v in model.trainable_variables if "/w/" in v.path] == ["scores/w/lora/lora_a", "scores/w/lora/lora_b"]
    perturb(model)
    data = numbers(4, 6)
    before = model.predict(data, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert difference(loaded.predict(data, verbose=0), before) == 0
    assert list(adapted_maps(loaded)) == list(adapted_maps(model))
    keras_lora.save_adapter(model, tmp_path / "adapter.safetensors")
    fresh = keras.Model(x, layers.Dense(2, name="head")(Scores(3, name="scores")(x)))
    fresh.set_weights([value(v) for v in keras_lora.remove_lora(loaded).variables])
    keras_lora.load_adapter(fresh, tmp_path / "adapter.safetensors")
    assert difference(fresh.predict(data, verbose=0), before) < 1e-6
    merged = keras_lora.merge_lora(model)
    assert difference(merged.predict(data, verbose=0), before) < 1e-5
    assert type(merged.get_layer("scores")) is Scores


def test_no_change_of_an_expert_is_formed_where_the_sum_is_plain(monkeypatch):
    layer = built(Experts)
    keras_lora.apply_lora(layer, rank=1, targets="up")
    formed = []
    changed = AdaptedKernel.changed.fget
    monkeypatch.setattr(AdaptedKernel, "changed", property(lambda self: formed.append(self.linear.part) or changed(self)))
    layer(numbers(5, 6))
    assert formed == ["up"]  # the einsum that sums over the other axis, and no other


def test_what_cannot_be_registered():
    class Plain(layers.Layer):
        def call(self, x):
            return x

    for arguments, match in [
        ({"layer_class": layers.Dense, "kernels": {"kernel": "io"}}, "known already"),
        ({"layer_class": Plain}, "Exactly one of"),
        ({"layer_class": Plain, "like": layers.Dense, "kernels": {"w": "io"}}, "Exactly one of"),
        ({"layer_class": Plain, "like": layers.Dense}, "a parent of Plain"),
        ({"layer_class": Plain, "kernels": {}}, "names no attribute"),
        ({"layer_class": Plain, "kernels": {"w": "ix"}}, "one letter each"),
        ({"layer_class": Plain, "kernels": {"w": "ii"}}, "one letter each"),
    ]:
        with pytest.raises(ValueError, match=match):
            keras_lora.register_layer(**arguments)
    with pytest.raises(TypeError, match="must be a class of Keras layers"):
        keras_lora.register_layer("Dense", kernels={"w": "io"})
    assert keras_lora.swap.adapted.adapted_class(Plain) is None


def test_factored_needs_code_that_calls_ops():
    namespace = {"keras": keras}
    exec(
        "class Other(keras.layers.Layer):\n"
        "    def build(self, shape):\n        self.w = self.add_weight(shape=(shape[-1], 3), name='w')\n"
        "    def call(self, x):\n        return x @ self.w\n",
        namespace,
    )
    with pytest.raises(TypeError, match="without `factored=True`"):
        keras_lora.register_layer(namespace["Other"], kernels={"w": "io"}, factored=True)


def test_axes_that_do_not_fit_the_kernel_are_refused_by_name():
    @keras_lora.register_layer(kernels={"w": "gio"})
    class Wrong(Scores):
        pass

    layer = built(Wrong, 3, name="wrong")
    with pytest.raises(
        ValueError, match=r"'wrong/w' was registered with the axes 'gio', and its kernel has the shape \(6, 3\)"
    ):
        keras_lora.apply_lora(layer, targets="w")


def test_an_unregistered_subclass_is_left_frozen_with_a_word():
    class Mine(layers.Dense):
        pass

    model = keras.Sequential([keras.Input((6,)), Mine(4, name="mine"), layers.Dense(4), layers.Dense(2)])
    with pytest.warns(UserWarning, match=r"Left frozen, because a subclass .* mine \(Mine\)\. `keras_lora.register_layer`"):
        keras_lora.apply_lora(model)


def test_what_a_layer_notes_when_it_is_loaded_is_kept(tmp_path):
    class Noting(keras.layers.Layer):
        loaded = False

        def build(self, shape):
            self.w = self.add_weight(shape=(shape[-1], 3), name="w")

        def call(self, x):
            return keras.ops.matmul(x, self.w)

        def load_own_variables(self, store):
            super().load_own_variables(store)
            self.loaded = True

    keras_lora.register_layer(Noting, kernels={"w": "io"})
    model = keras.Sequential([keras.Input((8,)), Noting(name="noting")])
    keras_lora.apply_lora(model, head=None)
    model.save_weights(tmp_path / "some.weights.h5")
    model.load_weights(tmp_path / "some.weights.h5")
    assert model.get_layer("noting").loaded
