"""Dtype policies: factors stay float32, computation follows the policy, quantised bases train and keep their bytes."""

import keras
import numpy as np
import pytest
from helpers import covering, difference, outputs, perturb, value
from keras import layers
from zoo import BATCH, ZOO, numbers

import keras_lora
from keras_lora import backend
from keras_lora.compat import keras_internals

pytestmark = pytest.mark.torch_first


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("policy", covering(["float32", "mixed_bfloat16", "mixed_float16", "bfloat16"], ["mixed_bfloat16"]))
def test_factors_are_float32_and_the_output_follows_the_policy(policy, method):
    stack = [layers.Dense(8, dtype=policy), layers.EinsumDense("ab,bc->ac", 6, dtype=policy)]
    x = numbers(4, 8)
    for layer in stack:
        layer(x)
        keras_lora.apply_lora(layer, method, rank=2)
        perturb(layer, size=0.02)
        assert {v.dtype for v in layer.trainable_variables} == {"float32"}
        y = layer(x)
        assert keras.backend.standardize_dtype(y.dtype) == layer.compute_dtype
        assert np.isfinite(value(y)).all()
        merged_kernel = value(layer.linear_map.matrix) + value(layer.adapter.delta_kernel(layer.linear_map.matrix))
        assert difference([value(y)], [value(x) @ merged_kernel + value(layer.bias if layer.bias is not None else 0)]) < 0.02


@pytest.mark.parametrize("name", covering(["int8", "int4", "int8_attention"], ["int8"], pytest.mark.full))
def test_a_quantised_base_trains_and_keeps_its_bytes(tmp_path, name):
    specimen = ZOO[name]()
    keras_lora.apply_lora(specimen.model, **specimen.apply)
    kernels = {v.path: value(v).copy() for v in specimen.model.variables if keras.backend.is_int_dtype(v.dtype)}
    assert {path.rpartition("/")[2] for path in kernels} >= {"kernel"}
    specimen.model.compile(keras.optimizers.Adam(1e-2), "mse")
    history = specimen.model.fit(specimen.x, specimen.y, epochs=5, batch_size=BATCH, verbose=0).history["loss"]
    assert history[-1] < history[0]
    specimen.model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    stored = [value(v) for v in loaded.variables if keras.backend.is_int_dtype(v.dtype) and "seed" not in v.path]
    before = [kernels[path] for path in kernels if "seed" not in path]
    assert all(np.array_equal(left, right) for left, right in zip(before, stored, strict=True))
    assert difference(outputs(loaded, specimen.x), outputs(specimen.model, specimen.x)) == 0


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_a_quantised_embedding_trains(mode):
    x = keras.Input((3,), dtype="int32")
    model = keras.Model(x, layers.Dense(2)(layers.GlobalAveragePooling1D()(layers.Embedding(9, 8, name="tokens")(x))))
    model.quantize(mode)
    data = np.array([[1, 2, 3], [4, 5, 6]], "int32")
    before = outputs(model, data)
    keras_lora.apply_lora(model, rank=2, targets="tokens")
    assert difference(outputs(model, data), before) < 1e-8  # compiled code may round the same sum in another order
    model.compile(keras.optimizers.Adam(1e-2), "mse")
    model.fit(data, np.ones((2, 2)), epochs=2, verbose=0)
    assert difference(outputs(model, data), before) > 1e-4


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_the_float_matrix_of_a_quantised_layer_is_near_the_kernel_it_came_from(mode):
    for layer, shape in [
        (layers.Dense(6), (2, 8)),
        (layers.EinsumDense("abc,cde->abde", (None, 2, 4)), (2, 3, 8)),
        (layers.Embedding(8, 6), (2, 3)),
    ]:
        layer.build(shape)
        name = "embeddings" if isinstance(layer, layers.Embedding) else "kernel"
        kernel = value(getattr(layer, name)).copy()
        layer.quantize(mode)
        keras_lora.apply_lora(layer, rank=1)
        error = np.abs(value(layer.linear_map.kernel) - kernel).max() / np.abs(kernel).max()
        assert error < (0.01 if mode == "int8" else 0.1)


# A base that is stored in bfloat16.


def mixed_model():
    ids = keras.Input((6,), dtype="int32")
    h = layers.Embedding(50, 16, name="tokens")(ids)
    h = layers.MultiHeadAttention(2, 8)(h, h)
    h = layers.Conv1D(16, 3, data_format="channels_last")(h)
    h = layers.SeparableConv1D(12, 2, data_format="channels_last")(h)
    h = layers.LSTM(7)(h)
    return keras.Model(ids, layers.Dense(2, name="out")(layers.Dense(9, activation="relu")(h)))


EVERYTHING = [layers.Dense, layers.EinsumDense, layers.Embedding, layers.Conv1D, layers.SeparableConv1D, "lstm*"]


def stored_in_bfloat16(model):
    return [v.path for v in model.variables if v.dtype == "bfloat16"]


@pytest.mark.every_backend
def test_a_base_in_bfloat16_trains_saves_merges_and_is_given_back(tmp_path):
    model, x = mixed_model(), np.random.default_rng(0).integers(0, 50, (8, 6)).astype("int32")
    before = outputs(model, x)
    keras_lora.apply_lora(model, rank=2, targets=EVERYTHING, exclude="out", base_dtype="bfloat16")
    kernels = stored_in_bfloat16(model)
    assert len(kernels) == 11
    assert {v.dtype for v in model.trainable_variables} == {"float32"}
    assert 0 < difference(outputs(model, x), before) < 1e-2
    model.compile(keras.optimizers.Adam(1e-2), "mse")
    model.fit(x, np.ones((8, 2)), epochs=3, verbose=0)
    trained = outputs(model, x)
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert len(stored_in_bfloat16(loaded)) == len(kernels)
    assert difference(outputs(loaded, x), trained) == 0
    keras_lora.merge_lora(loaded, keep=True)
    assert not stored_in_bfloat16(loaded)
    assert difference(outputs(loaded, x), trained) < 1e-2
    keras_lora.unmerge_lora(loaded)
    assert len(stored_in_bfloat16(loaded)) == len(kernels)
    assert difference(outputs(loaded, x), trained) == 0
    keras_lora.remove_lora(loaded)
    assert not stored_in_bfloat16(loaded)
    assert difference(outputs(loaded, x), before) < 1e-2


def test_dora_on_a_base_in_bfloat16_has_the_norm_of_what_is_stored(tmp_path):
    x = numbers(4, 8)
    model = keras.Sequential([keras.Input((8,)), layers.Dense(12), layers.Dense(5)])
    keras_lora.apply_lora(model, "dora", rank=2, head=None, base_dtype="bfloat16")
    perturb(model, size=0.1)
    before = outputs(model, x)
    model.save(tmp_path / "m.keras")
    assert difference(outputs(keras.saving.load_model(tmp_path / "m.keras"), x), before) < 1e-6


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("policy", "reverse"), [("mixed_bfloat16", "float32"), ("float32", None), ("float32", "bfloat16")])
def test_a_reversible_embedding_in_bfloat16_keeps_the_dtype_of_its_way_back(policy, reverse, tied):
    layer = layers.ReversibleEmbedding(11, 6, tie_weights=tied, reverse_dtype=reverse, dtype=policy)
    layer.build((None, 3))
    x = numbers(2, 3, 6)
    before = layer(x, reverse=True)
    targets = lambda each: True  # noqa: E731
    keras_lora.apply_lora(layer, rank=2, targets=targets, base_dtype="bfloat16")
    after = layer(x, reverse=True)
    assert after.dtype == before.dtype
    assert difference([value(after)], [value(before)]) < 0.02


def test_merging_into_a_base_in_bfloat16_keeps_a_change_that_bfloat16_would_round_away():
    layer = layers.Dense(8, use_bias=False)
    layer.build((None, 8))
    layer.kernel.assign(np.ones((8, 8), "float32"))
    keras_lora.apply_lora(layer, rank=1, base_dtype="bfloat16")
    layer.adapter.lora_a.assign(np.full((8, 1), 1e-2, "float32"))
    layer.adapter.lora_b.assign(np.full((1, 8), 1e-3, "float32"))
    keras_lora.merge_lora(layer)
    assert np.allclose(value(layer.kernel), 1 + 16e-5, atol=1e-6)


def test_base_dtype_is_bfloat16_or_none():
    layer = layers.Dense(8)
    layer.build((None, 8))
    with pytest.raises(ValueError, match=r"`base_dtype` must be None or one of .*'bfloat16'.*float16"):
        keras_lora.apply_lora(layer, rank=1, base_dtype="float16")
    assert type(layer) is layers.Dense


def test_base_dtype_is_refused_where_a_kernel_is_quantised_and_nothing_changes():
    model = keras.Sequential([keras.Input((8,)), layers.Dense(8, name="first"), layers.Dense(2)])
    model.quantize("int8")
    with pytest.raises(ValueError, match=r"quantised kernels at \['first'\]"):
        keras_lora.apply_lora(model, rank=1, base_dtype="bfloat16")
    assert type(model.get_layer("first")) is layers.Dense


@pytest.mark.every_backend
def test_a_base_in_bfloat16_has_no_float32_copy(monkeypatch):
    """Counted in what each backend is asked to do; a CPU without bfloat16 products may widen them inside."""
    monkeypatch.setattr(backend, "lacks_bfloat16", lambda x: False)
    shape = (24, 40)
    layer = layers.Dense(shape[1])
    layer.build((None, shape[0]))
    x = np.ones((4, shape[0]), "float32")
    keras_lora.apply_lora(layer, rank=2, base_dtype="bfloat16")
    assert float32_arrays_made(layer, x, shape) == 0
    plain = layers.Dense(shape[1], dtype="float32")
    plain.build((None, shape[0]))
    keras_internals.store_variable(plain.kernel, "bfloat16")  # and cast where it is used
    assert float32_arrays_made(plain, x, shape) > 0


@pytest.mark.once
def test_where_bfloat16_is_slow_a_product_has_its_own_float32_copy_and_a_step_keeps_none(monkeypatch):
    import torch

    found = {}
    for slow in (True, False):
        monkeypatch.setattr(backend, "lacks_bfloat16", lambda x, slow=slow: slow)
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((24,)), layers.Dense(40), layers.Dense(24)])
        keras_lora.apply_lora(model, keras_lora.LoRA(rank=2, seed=1), head=None, base_dtype="bfloat16")
        perturb(model, size=0.3)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda each, kept=kept: kept.append(each) or each, lambda each: each):
            y = model(np.ones((4, 24), "float32"))
        sizes = {(tuple(each.shape), each.dtype) for each in kept}
        assert not any(dtype == torch.float32 and set(shape) == {24, 40} for shape, dtype in sizes)
        gradients = torch.autograd.grad(y.square().sum(), [v.value for v in model.trainable_variables])
        found[slow] = [value(y), *map(value, gradients)]
        assert y.dtype == torch.float32
    assert difference(found[True], found[False]) < 0.05 * max(np.abs(each).max() for each in found[False])


def float32_arrays_made(layer, x, shape):
    """How many operations of a call of `layer` give a float32 array of this shape."""
    if keras.backend.backend() == "jax":
        import jax

        trained, rest = [v.value for v in layer.trainable_variables], [v.value for v in layer.non_trainable_variables]
        program = jax.jit(lambda trained, rest, x: layer.stateless_call(trained, rest, x)[0]).lower(trained, rest, x)
        return program.as_text().count(f"-> tensor<{shape[0]}x{shape[1]}xf32>")
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        graph = tf.function(layer).get_concrete_function(tf.constant(x)).graph
        made = [
            each for operation in graph.get_operations() if operation.type != "ReadVariableOp" for each in operation.outputs
        ]
        return sum(tuple(each.shape or ()) == shape and each.dtype == tf.float32 for each in made if each.shape.rank == 2)
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counter(TorchDispatchMode):
        made = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            new = isinstance(result, torch.Tensor) and tuple(result.shape) == shape and result.dtype == torch.float32
            self.made += new and "detach" not in str(function)
            return result

    with Counter() as counter:
        layer(torch.tensor(x))
    return counter.made
