"""Dtype policies: factors stay float32, computation follows the policy, quantised bases train and keep their bytes."""

import keras
import numpy as np
import pytest
from helpers import difference, outputs, perturb, value
from keras import layers
from zoo import BATCH, ZOO, numbers

import keras_lora


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16", "bfloat16"])
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


@pytest.mark.parametrize("name", ["int8", "int4", "int8_attention"])
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
