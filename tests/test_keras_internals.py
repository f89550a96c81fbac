"""Each door to a Keras private name, alone: these fail first when Keras changes."""

import subprocess
import sys

import keras
import numpy as np
import pytest
from helpers import value
from keras import layers

from keras_lora.compat import call_internals, training_internals
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
    wrapper = layers.SpectralNormalization(layers.Dense(1))
    wrapper.build((None, 2))
    assert wrapper.trainable_variables[0] is wrapper.kernel  # which it tracks beside the layer in it
    assert [v.name for v in internals.own_variables(wrapper)] == ["vector_u"]
    assert internals.own_trainable_variables(wrapper) == []


def test_variables_of_layers_are_theirs_alone_each_once(dense):
    model = keras.Sequential([dense, layers.BatchNormalization()])
    model.build((None, 2))
    found = internals.variables_of([model, *model.layers, dense])
    assert {id(v) for v in found} == {id(v) for v in model.weights}
    assert len(found) == 6


def test_makes_weights_of_layers_that_are_not_built():
    made = [layers.Dense(1), layers.MultiHeadAttention(1, 1), layers.LSTM(1), layers.BatchNormalization()]
    none = [layers.RandomFlip(), layers.Normalization(), layers.Rescaling(1.0), layers.Dropout(0.1), layers.Concatenate()]
    none += [layers.TimeDistributed(layers.Dense(1)), layers.Bidirectional(layers.LSTM(1)), keras.Sequential([])]
    assert [internals.makes_weights(layer) for layer in made] == [True] * len(made)
    assert [internals.makes_weights(layer) for layer in none] == [False] * len(none)


def test_has_run_says_whether_everything_that_is_used_is_built(dense):
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(1)

        def call(self, x):
            return self.dense(x)

    model = Model()
    assert not internals.has_run(model)
    assert not internals.has_run(dense)
    with pytest.warns(UserWarning, match="does not have a `build"):
        model.build((None, 2))  # which builds nothing in it
    assert not internals.has_run(model)
    called, loaded = Model(), Model()
    called(np.ones((1, 2)))
    loaded.build_from_config({"input_shape": (None, 2)})
    loaded.built = True  # as Keras's loader sets it
    assert internals.has_run(called)
    assert internals.has_run(loaded)
    assert internals.has_run(keras.Sequential([keras.Input((2,)), dense]))


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

    assert training_internals.overrides_compile(Own())
    assert not training_internals.overrides_compile(keras.Sequential())


def test_compiled_functions_are_dropped(dense):
    model = keras.Sequential([keras.Input((2,)), dense])
    model.predict(np.ones((1, 2)), verbose=0)
    assert model.predict_function is not None
    training_internals.drop_compiled_functions(model)
    assert model.predict_function is None


def test_the_dtype_in_which_a_layer_sees_a_variable():
    for policy, autocast, expected in [
        ("float32", True, "float32"),
        ("mixed_bfloat16", True, "bfloat16"),
        ("mixed_bfloat16", False, "float32"),
    ]:
        layer = layers.Dense(3, dtype=policy, autocast=autocast)
        layer.build((None, 2))
        assert call_internals.dtype_in_call(layer, layer.kernel) == expected


def test_a_mask_is_copied():
    masked = layers.Embedding(5, 2, mask_zero=True)(np.array([[1, 0]], "int32"))
    to = keras.ops.ones((1, 2, 2))
    assert call_internals.copy_mask(masked, to) is to
    assert value(call_internals.copy_mask(to, keras.ops.zeros((1, 2, 2)))._keras_mask).tolist() == [[True, False]]
    assert not hasattr(call_internals.copy_mask(keras.ops.ones((1, 2)), keras.ops.zeros((1, 2))), "_keras_mask")


def test_the_class_of_conv_lstm_cells():
    assert type(layers.ConvLSTM2D(2, 1).cell) is internals.conv_lstm_cell()


def test_the_attributes_of_a_layer_hold_its_layers_on_torch_too():
    block = keras.Sequential([layers.Dense(2)])
    holder = layers.Layer()
    holder.block = block
    assert internals.attributes_of(holder)["block"] is block
    assert internals.is_bookkeeping("_self_tracked_trackables")
    assert not internals.is_bookkeeping("block")


def test_where_a_layer_stores_its_kernel(dense):
    assert internals.stored_under(dense, "kernel") == "_kernel"
    assert internals.stored_under(layers.LSTMCell(2), "kernel") == "kernel"
    assert getattr(dense, internals.stored_under(dense, "kernel")) is dense.kernel


def test_a_layer_computes_by_the_policy_in_its_attribute(dense):
    vars(dense).update(internals.with_policy(keras.DTypePolicy("mixed_bfloat16")))
    assert dense.compute_dtype == "bfloat16"
    assert dense.variable_dtype == "float32"


def test_the_block_size_and_the_groups_of_an_int4_layer(dense):
    assert internals.int4_block_size(dense) is None
    layer = layers.Dense(4)
    layer.build((None, 8))
    kernel = np.resize([0.5, -1.0, 0.25], (8, 4))  # of both signs in each group: Keras's zero points reach no further
    layer.kernel.assign(kernel)
    layer.quantize("int4", config=keras.quantizers.Int4QuantizationConfig(block_size=4))
    assert internals.int4_block_size(layer) == 4
    stored = keras.ops.cast(layer.kernel, "float32")
    found = internals.dequantize_groups(stored, layer.kernel_scale, layer.kernel_zero, layer.g_idx, 0)
    assert np.abs(value(found) - kernel).max() < 0.1 * np.abs(kernel).max()


def test_the_scale_of_an_int8_einsum_divides_its_kernel():
    layer = layers.EinsumDense("abc,cde->abde", (None, 2, 3))
    layer.build((None, 4, 5))
    kernel = value(layer.kernel)
    layer.quantize("int8")
    scale = internals.scale_in_kernel_layout(layer, layer.kernel_scale)
    assert np.abs(value(layer.kernel) / value(scale) - kernel).max() < 0.01 * np.abs(kernel).max()


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="only a torch module has `parameters()`")
def test_torch_lists_a_variable_that_came_late(dense):
    model = keras.Sequential([keras.Input((2,)), dense])
    before = len(list(model.parameters()))
    with internals.unlocked(dense):
        dense.late = dense.add_weight(shape=(1,), name="late")
    internals.track_torch_parameters(model)
    assert len(list(model.parameters())) == before + 1


def test_a_seed_that_was_drawn_gives_the_same_numbers_again():
    generator = keras.random.SeedGenerator(3)
    drawn = generator.next()
    first, second = (keras.random.uniform((4,), seed=call_internals.drawn_seed(generator, drawn)) for _ in range(2))
    assert np.array_equal(value(first), value(second))


def test_a_variable_is_stored_in_another_dtype_in_place(dense):
    kernel, number = dense.kernel, np.float32(1.2345678)
    kernel.assign(np.full((2, 3), number))
    internals.store_variable(kernel, "bfloat16", autocast=False)
    assert dense.kernel is kernel
    assert kernel.dtype == "bfloat16"
    assert np.abs(value(kernel) - number).max() < 0.01
    internals.store_variable(kernel, "float32")
    assert kernel.dtype == "float32"


def test_whether_a_graph_calls_a_layer_in_reverse():
    one, other = layers.ReversibleEmbedding(5, 3), layers.ReversibleEmbedding(5, 3)
    ids = keras.Input((2,), dtype="int32")
    keras.Model(ids, one(one(ids), reverse=True))
    keras.Model(ids, other(ids))
    assert internals.is_called_in_reverse(one)
    assert not internals.is_called_in_reverse(other)


def test_whether_layers_are_in_other_graphs(dense):
    inner = keras.Sequential([keras.Input((2,)), dense, layers.Dropout(0.1)])
    model = keras.Sequential([keras.Input((2,)), inner, layers.Dense(1)])
    assert not internals.is_in_other_graphs(model)
    assert not internals.is_in_other_graphs(layers.Dense(1))
    assert dense in internals.graph_of(inner).layers
    assert internals.graph_of(dense) is None
    keras.ops.add(inner.output, 1)
    assert internals.is_in_other_graphs(model)
    again = keras.Sequential([keras.Input((2,)), layers.Dense(2)])
    assert not internals.is_in_other_graphs(again)
    again.layers[0](keras.Input((2,)))
    assert internals.is_in_other_graphs(again)


def test_what_a_model_was_compiled_with_is_forgotten(dense):
    model = keras.Sequential([keras.Input((2,)), dense])
    model.compile("adam", "mse")
    training_internals.forget_compilation(model)
    assert model.optimizer is None


def test_a_model_asks_for_compile_and_compile_is_enough(dense):
    model = keras.Sequential([keras.Input((2,)), dense])
    model.compile("sgd", "mse")
    training_internals.drop_compiled_functions(model)
    assert model.test_function.func is training_internals.ask_for_compile
    x, y = np.ones((1, 2)), np.ones((1, 3))
    with pytest.raises(ValueError, match=r"[Cc]all `compile"):
        model.evaluate(x, y, verbose=0)
    model.compile("sgd", "mse")
    model.evaluate(x, y, verbose=0)


def test_what_keras_calls_first_when_it_quantises(dense):
    called = internals.called_first("quantize")
    refusing = type("Refusing", (layers.Dense,), {called: lambda *_: 1 / 0})
    layer = refusing(2)
    layer.build((None, 2))
    with pytest.raises(ZeroDivisionError):
        layer.quantize("int8")
    assert internals.called_first("enable_lora") == "enable_lora"


def test_whether_a_step_is_traced_and_its_numbers_are_synced(dense):
    seen = []

    class Asking(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = dense

        def call(self, x):
            seen.append(training_internals.in_a_trace())
            return self.dense(x)

    model = Asking()
    model.compile("sgd", "mse")
    model.fit(np.ones((2, 2)), np.ones((2, 3)), verbose=0)
    assert seen[-1] == (keras.backend.backend() != "torch")
    assert not training_internals.in_a_trace()
    training_internals.sync_training_state(model)  # outside of a fit it does nothing; see test_in_a_fit.py


def test_keras_own_lora_can_be_undone(dense):
    names = [v.name for v in dense.weights]
    dense.enable_lora(1)
    internals.forget_enabled_lora(dense)
    assert not dense.lora_enabled
    assert [v.name for v in dense.weights] == names


def test_a_backbone_forgets_its_lora_and_its_layers_are_counted_as_keras_hub_counts():
    hub = pytest.importorskip("keras_hub")
    config = {"vocabulary_size": 9, "num_layers": 1, "num_heads": 1, "hidden_dim": 4, "intermediate_dim": 4}
    model = hub.models.BertBackbone(**config)
    model.enable_lora(1)
    assert hasattr(model, "_lora_enabled_layers")
    counted = internals.layers_with_weights(model)
    assert all(counted[index].lora_enabled for index in model._lora_enabled_layers)
    internals.forget_backbone_lora(model)
    assert not hasattr(model, "_lora_enabled_layers")


def test_an_optimizer_of_torch_is_written_by_its_public_name():
    config = keras.saving.serialize_keras_object(keras.optimizers.Adam(1e-2))
    theirs = {"optimizer": {**config, "module": "keras.src.backend.torch.optimizers.torch_adam"}}
    assert training_internals.with_portable_names(theirs)["optimizer"]["module"] == "keras.optimizers"
    assert training_internals.with_portable_names(["loss"]) == ["loss"]


ANOTHER_BACKEND = """
import sys, tempfile
import keras, keras_lora

def net():
    return keras.Sequential([keras.Input((8,)), keras.layers.Dense(4), keras.layers.Dense(2)])

model, path = net(), tempfile.mkdtemp() + "/a.safetensors"
keras_lora.apply_lora(model, keras_lora.LoRA(2, seed=1, a_initializer="zeros"), adapter_pattern={"*": keras_lora.DoRA(2)})
keras_lora.save_adapter(model, path)
keras_lora.activate_adapters(keras_lora.load_adapter(model, path, name="b"), {"default": 1, "b": 1})
keras_lora.merge_lora(model)
keras_lora.compress_adapter(keras_lora.apply_lora(net()), rank=1)
print(sorted({"jax", "tensorflow", "torch"} & set(sys.modules)))
"""


@(pytest.mark.full if keras.backend.backend() == "jax" else pytest.mark.nightly)  # it starts a process
@pytest.mark.skipif(keras.backend.backend() == "tensorflow", reason="there it is the backend")
def test_tensorflow_is_not_imported_on_another_backend():
    with internals.without_tensorflow():
        pass
    out = subprocess.run([sys.executable, "-c", ANOTHER_BACKEND], capture_output=True, text=True, check=True).stdout
    assert "tensorflow" not in out
    assert keras.backend.backend() in out


def test_a_task_of_keras_hub_keeps_its_sampler():
    hub = pytest.importorskip("keras_hub")
    config = {"vocabulary_size": 9, "num_layers": 1, "num_query_heads": 1, "num_key_value_heads": 1}
    backbone = hub.models.Llama3Backbone(**config, hidden_dim=4, intermediate_dim=4)
    task = hub.models.Llama3CausalLM(backbone)
    assert training_internals.compiled_besides(keras.Sequential([keras.Input((2,)), layers.Dense(2)])) == {}
    task.compile(sampler="greedy")
    assert training_internals.compiled_besides(task)["sampler"]["class_name"] == "GreedySampler"


def test_the_optimizer_in_a_loss_scale_optimizer_is_found(dense):
    model = keras.Sequential([keras.Input((2,)), layers.Dense(2)])
    model.compile("adam", "mse")
    assert training_internals.compiled_besides(model) == {}
    model.compile(keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam()), "mse")
    assert training_internals.compiled_besides(model)["optimizer"]["class_name"] == "LossScaleOptimizer"


def test_the_seed_generators_of_a_layer_are_its_own():
    dropout = layers.Dropout(0.5, seed=3)
    assert internals.seed_generators(dropout) == [dropout.seed_generator]
    assert internals.seed_generators(keras.Sequential([dropout])) == []


def test_direction_of_a_metric():
    model = keras.Sequential([keras.Input((2,)), layers.Dense(2)])
    model.compile("adam", "mse", metrics=["accuracy"])
    model.fit(np.ones((2, 2)), np.ones((2, 2)), verbose=0)
    assert [training_internals.direction_of(model, name) for name in ("val_accuracy", "val_loss")] == ["max", "min"]
    with pytest.raises(ValueError, match="not known whether 'score' is better"):
        training_internals.direction_of(model, "score")


def test_whether_a_layer_was_made_in_a_remat_scope(dense):
    with keras.RematScope("full"):
        inside = layers.Dense(2)
    assert call_internals.is_rematerialized(inside)
    assert not call_internals.is_rematerialized(dense)


def test_an_operation_of_a_graph_is_applied_again():
    x = keras.Input((2,))
    dense, dropout = layers.Dense(3), layers.Dropout(0.5)
    y, numbers = dense(x), np.ones((4, 2), "float32")
    given = keras.ops.convert_to_tensor(numbers)
    assert np.allclose(
        keras.ops.convert_to_numpy(call_internals.applied_again(y, given)), keras.ops.convert_to_numpy(dense(numbers))
    )
    assert np.allclose(keras.ops.convert_to_numpy(call_internals.applied_again(keras.ops.tanh(x) / 2, given)), numbers / 2)
    assert (keras.ops.convert_to_numpy(call_internals.applied_again(dropout(x), given, training=True)) != numbers).any()


def test_the_states_of_seed_generators():
    dropout = layers.Dropout(0.5, seed=1)
    assert call_internals.seed_states(dropout) == [dropout.seed_generator.state]
    assert call_internals.seed_states(layers.Dense(2)) == []


def test_whether_a_layer_runs_for_inference():
    class Asks(layers.Layer):
        def call(self, x, training=None):
            seen.append(call_internals.runs_inference())
            return x

    seen = [call_internals.runs_inference()]
    for training in (None, False, True):
        Asks()(np.ones((1, 1)), training=training)
    assert seen == [False, True, True, False]


def test_what_a_model_was_compiled_with():
    model = keras.Sequential([keras.Input((2,)), layers.Dense(3, kernel_regularizer="l2")])
    model.compile("sgd", "mse", loss_weights=[0.5], metrics=["mae"])
    y = np.ones((1, 3), "float32")
    ((loss, weight),) = training_internals.compiled_losses(model, y, keras.KerasTensor((1, 3)))
    assert (loss.name, loss.reduction, weight) == ("mse", "sum_over_batch_size", 0.5)
    assert [each.name for each in training_internals.compiled_metrics(model).metrics] == ["mae"]
    added = training_internals.with_added_losses(model, keras.ops.ones(()))
    assert keras.ops.convert_to_numpy(added - model.losses[0]) == pytest.approx(1)
    assert float(training_internals.share_of_replica(keras.ops.ones(()))) == 1
    model.fit(np.ones((1, 2), "float32"), y, verbose=0)
    training_internals.forget_steps(model)
    assert model.train_function is None
    assert model.compiled


def test_forget_variable_and_without_variables_leave_the_others():
    layer = keras.layers.Dense(2)
    layer.build((None, 3))
    with internals.unlocked(layer):
        layer.more = layer.add_weight(name="more", trainable=False)
    assert internals.without_variables(layer, ["more"]) == {"_non_trainable_variables": []}
    internals.forget_variable(layer, "more")
    assert [v.name for v in layer.weights] == ["kernel", "bias"]
    assert not hasattr(layer, "more")


def test_with_floats_only_leaves_out_integers():
    layer = keras.layers.Dense(2)
    layer.build((None, 3))
    assert internals.with_floats_only(layer) == {}
    layer.kernel.trainable = False
    internals.store_variable(layer.kernel, "uint8", value=keras.ops.zeros((5,)))
    assert tuple(layer.kernel.shape) == (5,)
    [floats] = internals.with_floats_only(layer).values()
    assert [v.name for v in floats] == ["bias"]


def test_when_any_is_built_runs_after_each_build_and_only_inside():
    built = []
    with internals.when_any_is_built(built.append):
        layer = keras.layers.Dense(2)
        layer.build((None, 3))
    keras.layers.Dense(2).build((None, 3))
    assert built == [layer]


def test_with_mask_gives_a_mask():
    tensor = keras.ops.ones((2, 3))
    mask = keras.ops.ones((2, 3), "bool")
    assert call_internals.copy_mask(call_internals.with_mask(tensor, mask), keras.ops.ones((2, 3))) is not None


def test_variables_are_read_as_stored():
    seen = []

    class Reads(layers.Dense):
        def call(self, inputs):
            with call_internals.as_stored():
                seen.append(keras.backend.standardize_dtype(keras.ops.convert_to_tensor(self.kernel).dtype))
            seen.append(keras.backend.standardize_dtype(keras.ops.convert_to_tensor(self.kernel).dtype))
            return super().call(inputs)

    Reads(2, dtype="mixed_bfloat16")(np.ones((1, 3)))
    assert seen[-2:] == ["float32", "bfloat16"]


def test_the_policies_of_calibrated_layers():
    layer = layers.Dense(4, dtype="gptq/8/2_from_mixed_bfloat16")
    assert internals.own_policy(layer).quantization_mode == "gptq"
    assert internals.float_policy(layer).name == "mixed_bfloat16"
    assert internals.calibrated_bits(layer) == 8
    config = internals.calibrated_config(layer)
    assert (type(config), config.group_size) == (keras.quantizers.GPTQConfig, 2)
    policies = keras.dtype_policies.DTypePolicyMap()
    policies["own"] = keras.dtype_policies.get("awq/4/2_from_float32")
    layer = layers.Dense(4, name="own", dtype=policies)
    layer.build((None, 2))
    assert internals.own_policy(layer).quantization_mode == "awq"


def test_policy_from_float32_keeps_the_quantisation():
    names = {"int4/8_from_mixed_bfloat16": "int4/8_from_float32", "mixed_bfloat16": "float32"}
    for name, expected in names.items():
        found = internals.policy_from_float32(layers.Dense(2, dtype=name))
        assert (found.name, found.compute_dtype) == (expected, "float32")


def test_rebuilds_each_layer_is_true_of_graphs_alone(dense):
    class Own(keras.Model):
        pass

    model = keras.Sequential([dense])
    x = keras.Input((2,))
    assert all(internals.rebuilds_each_layer(each) for each in (model, keras.Model(x, dense(x))))
    others = (dense, Own(x, dense(x)), layers.MultiHeadAttention(1, 2))
    assert not any(internals.rebuilds_each_layer(each) for each in others)


def test_a_layout_can_be_read_and_set(dense):
    variable = dense.kernel
    assert internals.layout_of(variable) is None
    assert internals.value_now(variable) is not None
    if keras.backend.backend() == "jax":
        mesh = keras.distribution.DeviceMesh((1,), ("model",), devices=["cpu:0"])
        internals.set_layout(variable, keras.distribution.TensorLayout((None, "model"), mesh))
        assert internals.layout_of(variable).axes == (None, "model")


def test_with_all_sublayers_has_the_layer_and_every_depth(dense):
    inner = keras.Sequential([dense])
    model = keras.Sequential([inner])
    assert {id(each) for each in (model, inner, dense)} <= {id(each) for each in internals.with_all_sublayers(model)}


def test_whole_leaves_what_one_process_has_as_it_is(dense):
    model = keras.Sequential([dense])
    before = value(dense.kernel)
    with training_internals.whole(model):
        assert np.array_equal(value(dense.kernel), before)
    assert np.array_equal(value(dense.kernel), before)


def test_a_call_context_can_be_opened_again(dense):
    seen = []

    class Outer(layers.Layer):
        def call(self, x, training=None):
            seen.append(call_internals.call_context())
            return x

    class Inner(layers.Layer):
        def call(self, x, training=None):
            seen.append(training)
            return x

    x = keras.ops.ones((1, 2))
    Outer()(x, training=True)
    inner = Inner()
    with seen[0]():
        inner(x)
    with call_internals.with_global_state({"current_call_ctx": None}):
        inner(x)
    assert seen[1:] == [True, None]


def test_a_scope_shows_what_the_scope_around_it_shows():
    outside, inside = (keras.Variable(0.0, name=name) for name in ("outside", "inside"))
    one, two = (keras.ops.convert_to_tensor(each) for each in (1.0, 2.0))
    with keras.StatelessScope([(outside, one)]), call_internals.as_stored(), call_internals.scope_within([(inside, two)]):
        assert (float(outside.value), float(inside.value)) == (1.0, 2.0)
    layer = layers.Layer()
    with call_internals.scope_within([]) as scope:
        layer.add_loss(keras.ops.convert_to_tensor(1.0))
    assert len(scope.losses) == 1
    call_internals.forget_losses(layer, scope.losses)
    assert not layer._loss_ids


def test_masks_are_read_and_set():
    x = keras.ops.ones((1, 2))
    assert call_internals.mask_of(x) is None
    mask = keras.ops.ones((1,), "bool")
    assert call_internals.mask_of(call_internals.with_mask(x, mask)) is mask


def test_variables_without_values():
    with training_internals.unallocated():
        layer = layers.Dense(2)
        layer.build((1, 3))
    assert not training_internals.has_value(layer.kernel)
    assert layer.kernel.shape == (3, 2)
    other = layers.Dense(2)
    other.build((1, 3))
    assert training_internals.has_value(other.kernel)


@pytest.mark.torch_first
def test_the_moving_averages_of_an_optimizer():
    optimizer = keras.optimizers.SGD(0.1, use_ema=True)
    optimizer.build([keras.Variable(np.ones(3, "float32"), name="w")])
    assert [tuple(v.shape) for v in training_internals.averages_of(optimizer)] == [(3,)]
