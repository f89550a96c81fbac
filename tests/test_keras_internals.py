"""Each door to a Keras private name, alone: these fail first when Keras changes."""

import keras
import numpy as np
import pytest
from helpers import value
from keras import layers

from keras_lora.compat import keras_internals as internals


@pytest.fixture
def dense():
    layer = layers.Dense(3)
    layer.build((None, 2))
    return layer


def test_sublayers_are_the_direct_ones_in_order():
    inner = keras.Sequential([layers.Dense(2)])
    model = keras.Sequential([inner, layers.Dropout(0.1)])
    assert internals.sublayers(model) == [inner, model.layers[1]]
    assert internals.sublayers(layers.Dense(1)) == []


def test_what_keras_hub_sets_past_tracking_is_found_on_torch():
    hub = pytest.importorskip("keras_hub")
    config = {"vocabulary_size": 9, "num_layers": 1, "num_heads": 1, "hidden_dim": 4, "intermediate_dim": 4}
    model = hub.models.BertBackbone(**config)
    found = internals.set_past_tracking(model)
    assert ("pooled_dense" in found) == (keras.backend.backend() == "torch")
    assert internals.set_past_tracking(keras.Sequential([layers.Dense(1)])) == {}


def test_own_variables_are_without_those_of_sublayers():
    norm = layers.BatchNormalization()
    norm.build((None, 2))
    assert [v.name for v in internals.own_variables(norm)] == ["gamma", "beta", "moving_mean", "moving_variance"]
    assert [v.name for v in internals.own_trainable_variables(norm)] == ["gamma", "beta"]
    norm.trainable = False
    assert [v.name for v in internals.own_trainable_variables(norm)] == ["gamma", "beta"]
    assert internals.own_variables(keras.Sequential([norm])) == []


def test_a_flag_is_set_on_one_layer_only(dense):
    model = keras.Sequential([dense])
    internals.set_own_trainable(model, False)
    assert not model.trainable
    assert dense.trainable
    assert dense.kernel.trainable


def test_a_built_layer_takes_a_sublayer_while_it_is_unlocked_and_forgets_it(dense):
    child = layers.Dense(1)
    with pytest.raises(ValueError, match="already built"):
        dense.child = child
    with internals.unlocked(dense):
        dense.child = child
    assert internals.sublayers(dense) == [child]
    internals.forget_sublayer(dense, "child")
    assert internals.sublayers(dense) == []
    assert not hasattr(dense, "child")
    with pytest.raises(ValueError, match="already built"):
        dense.child = child


def test_the_signature_of_call_is_read_again():
    class Quiet(layers.Layer):
        def call(self, x):
            return x

    class Training(Quiet):
        def call(self, x, training=None):
            return x + 1 if training else x

    layer = Quiet()
    layer.__class__ = Training
    internals.forget_call_signature(layer)
    assert value(layer(np.zeros(1), training=True)) == 1


def test_when_built_waits_for_the_build_and_runs_once_in_order(dense):
    seen = []
    internals.when_built(dense, lambda: seen.append("now"))
    assert seen == ["now"]
    later = layers.Embedding(3, 2)
    internals.when_built(later, lambda: seen.append(later.embeddings.shape[0]))
    internals.when_built(later, lambda: seen.append("after"))
    assert seen == ["now"]
    later.build()
    later.build()
    assert seen == ["now", 3, "after"]


def test_public_names_are_what_keras_writes(dense):
    for each in (dense, keras.Sequential([dense])):
        written = keras.saving.serialize_keras_object(each)
        name = internals.public_name(type(each))
        assert name == {key: written[key] for key in ("module", "class_name", "registered_name")}


def test_a_model_goes_through_bytes(dense):
    model = keras.Sequential([keras.Input((2,)), dense])
    twin = internals.model_from_bytes(internals.model_to_bytes(model))
    assert np.array_equal(value(twin.layers[0].kernel), value(dense.kernel))


def test_the_producer_of_a_tensor():
    x = keras.Input((2,))
    layer = layers.Dense(3)
    operation, inputs = internals.producer_of(layer(x))
    assert operation is layer
    assert inputs[0] is x


def test_overridden_compile_is_seen():
    class Own(keras.Sequential):
        def compile(self, **kwargs):
            super().compile(**kwargs)

    assert internals.overrides_compile(Own())
    assert not internals.overrides_compile(keras.Sequential())


def test_compiled_functions_are_dropped(dense):
    model = keras.Sequential([keras.Input((2,)), dense])
    model.predict(np.ones((1, 2)), verbose=0)
    assert model.predict_function is not None
    internals.drop_compiled_functions(model)
    assert model.predict_function is None


def test_the_dtype_in_which_a_layer_sees_a_variable():
    for policy, autocast, expected in [
        ("float32", True, "float32"),
        ("mixed_bfloat16", True, "bfloat16"),
        ("mixed_bfloat16", False, "float32"),
    ]:
        layer = layers.Dense(3, dtype=policy, autocast=autocast)
        layer.build((None, 2))
        assert internals.dtype_in_call(layer, layer.kernel) == expected


def test_a_mask_is_copied():
    masked = layers.Embedding(5, 2, mask_zero=True)(np.array([[1, 0]], "int32"))
    to = keras.ops.ones((1, 2, 2))
    assert internals.copy_mask(masked, to) is to
    assert value(internals.copy_mask(to, keras.ops.zeros((1, 2, 2)))._keras_mask).tolist() == [[True, False]]
    assert not hasattr(internals.copy_mask(keras.ops.ones((1, 2)), keras.ops.zeros((1, 2))), "_keras_mask")


def test_the_class_of_conv_lstm_cells():
    assert type(layers.ConvLSTM2D(2, 1).cell) is internals.conv_lstm_cell()
