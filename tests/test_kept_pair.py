"""The frozen pair that a LoRA can keep beside the trained one: `W' = W + scale · A B + K_a K_b`."""

import keras
import numpy as np
import pytest
from helpers import difference, gradients, outputs, perturb, value
from keras import layers, ops

import keras_lora
from keras_lora.adapters import LoRA
from keras_lora.cli import common
from keras_lora.swap.adapted import named_adapters

EVERYWHERE = pytest.mark.every_backend
pytestmark = pytest.mark.torch_first
X = np.random.default_rng(0).normal(size=(4, 9)).astype("float32")


def base():
    keras.utils.set_random_seed(3)
    return keras.Sequential([keras.Input((9,)), layers.Dense(6, activation="tanh"), layers.Dense(7), layers.Dense(2)])


def adapted(**arguments):
    model = keras_lora.apply_lora(base(), LoRA(rank=2, kept=3, **arguments))
    perturb(model)
    rng = np.random.default_rng(1)
    for adapter in parts(model):
        for variable in (adapter.kept_a, adapter.kept_b):
            variable.assign(rng.normal(size=tuple(variable.shape)).astype("float32"))
    return model


def parts(model, name="default"):
    return [adapter for _, adapter in named_adapters(model)[name].values()]


@EVERYWHERE
def test_the_kept_pair_is_added_without_the_scale_and_does_not_train():
    model = adapted(alpha=6)
    adapter = parts(model)[0]
    a, b, c, d = (value(each) for each in (adapter.lora_a, adapter.lora_b, adapter.kept_a, adapter.kept_b))
    np.testing.assert_allclose(value(adapter.delta_kernel(None)), 3 * a @ b + c @ d, rtol=1e-5, atol=1e-6)
    left, right = adapter.numpy_factors()
    assert left.shape[-1] == adapter.product_rank(adapter.matrix_shape) == 5
    joined = np.matmul(*(value(each) for each in adapter.current_pair()))
    np.testing.assert_allclose(3 * joined, 3 * a @ b + c @ d, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(left @ right, 3 * a @ b + c @ d, rtol=1e-12, atol=1e-12)
    assert [v.name for v in model.trainable_variables] == ["lora_a", "lora_b"] * 2
    assert adapter.parameter_count((9, 6)) == 30
    assert adapter.size((9, 6)) == 75


@EVERYWHERE
def test_dropout_does_not_act_on_the_kept_pair():
    model = adapted(dropout=0.5)
    adapter, layer = parts(model)[0], model.layers[0]
    adapter.lora_b.assign(np.zeros((2, 6)))
    assert difference(value(layer(X, training=True)), value(layer(X))) < 1e-6
    perturb(model)
    assert difference(value(layer(X, training=True)), value(layer(X))) > 1e-2


@EVERYWHERE
def test_no_gradient_of_the_kept_pair_is_computed():
    """The gradient of a product with it would be another thin product: its rank shows in no size of the backward pass."""
    model = keras_lora.apply_lora(base(), LoRA(rank=2, kept=3))
    perturb(model)
    found = gradients(lambda: ops.sum(model(X, training=True)), model.trainable_variables)
    assert [g.shape for g in found] == [(9, 2), (2, 6), (6, 2), (2, 7)]
    if keras.backend.backend() == "jax":
        import jax

        def loss(values):
            with keras.StatelessScope(state_mapping=list(zip(model.trainable_variables, values, strict=True))):
                return ops.sum(model(X, training=True))

        text = str(jax.make_jaxpr(jax.grad(loss))([v.value for v in model.trainable_variables]))
        assert "f32[2,9]" in text  # the gradient of A is computed transposed
        assert "f32[3,9] = dot_general" not in text
        assert "f32[3,6] = dot_general" not in text


@pytest.mark.parametrize("kept", [0, 3, 5])
def test_a_second_derivative_and_one_without_an_input_gradient(kept):
    """The gradient that is written out for torch is that of the definition, once and twice."""
    if keras.backend.backend() != "torch":
        pytest.skip("only torch has a written-out gradient")
    import torch

    from keras_lora import backend

    rng = np.random.default_rng(0)

    def tensor(*shape, grad=True):
        return torch.tensor(rng.normal(size=shape), requires_grad=grad)

    a, b, w = tensor(5, 2), tensor(2, 4), tensor(5, 4, grad=False)
    frozen = (tensor(5, kept, grad=False), tensor(kept, 4, grad=False)) if kept else None
    strength = torch.tensor(0.75, dtype=torch.float64)

    def function(x, a, b):
        return backend.low_rank_sum(x, a, b, 2.0, strength, kernel=w, kept=frozen)

    assert torch.autograd.gradcheck(function, (tensor(3, 5), a, b))
    assert torch.autograd.gradgradcheck(function, (tensor(3, 5), a, b))
    assert torch.autograd.gradcheck(function, (tensor(3, 5, grad=False), a, b))


def test_files_sums_and_one_adapter_per_example(tmp_path):
    model = adapted()
    wanted = outputs(model, X)
    file = str(tmp_path / "kept.safetensors")
    keras_lora.save_adapter(model, file)
    assert difference(outputs(keras_lora.load_adapter(base(), file), X), wanted) < 1e-6
    served = keras_lora.MultiAdapterModel(base(), rank=5)
    index = np.full(4, served.load(file, "kept"), "int32")
    assert difference(value(served({"inputs": X, "adapter_index": index})), wanted[0]) < 1e-6
    with pytest.raises(ValueError, match="takes ranks up to 4, and this has rank 5"):
        keras_lora.MultiAdapterModel(base(), rank=4).load(file, "kept")
    keras_lora.apply_lora(model, "dora", rank=2, name="other")
    keras_lora.activate_adapters(model, {"default": 1, "other": 1})
    assert difference(outputs(model, X), wanted) < 1e-6


def test_the_command_line_reads_the_factors_of_a_file(tmp_path):
    model = adapted()
    keras_lora.save_adapter(model, tmp_path / "kept.safetensors")
    found = [
        common.lora_factors(entry) for entry in common.read_adapter(str(tmp_path / "kept.safetensors")).adapters.values()
    ]
    for (a, b), adapter in zip(found, parts(model), strict=True):
        assert difference(a @ b, value(adapter.delta_kernel(None))) < 1e-6


def test_compressing_gives_a_plain_lora_of_the_rank_of_the_change():
    model = adapted()
    wanted = outputs(model, X)
    assert [row.rank for row in keras_lora.compress_adapter(model, energy=1)] == [5, 5]
    assert {adapter.kept for adapter in parts(model)} == {0}
    assert difference(outputs(model, X), wanted) < 1e-5


def test_pairs_that_cancel_leave_a_change_of_zero():
    model = adapted(alpha=5)
    for adapter in parts(model):
        a, b = (np.round(value(each), 3) for each in (adapter.lora_a, adapter.lora_b))
        adapter.lora_a.assign(a)
        adapter.lora_b.assign(b)
        adapter.kept_a.assign(np.pad(value(adapter.lora_a), [(0, 0), (0, 1)]))
        adapter.kept_b.assign(np.pad(-2.5 * value(adapter.lora_b), [(0, 1), (0, 0)]))
    assert np.abs(np.matmul(*parts(model)[0].numpy_factors())).max() < 1e-7


def test_values_of_smaller_ranks_and_another_scale_are_taken_and_larger_ones_refused(tmp_path):
    model = adapted(alpha=4)
    wanted = outputs(model, X)
    keras_lora.save_adapter(model, tmp_path / "kept.safetensors")
    larger = keras_lora.apply_lora(base(), LoRA(rank=4, alpha=4, kept=5), name="default")
    file = keras_lora.files.adapter_state.AdapterState.read(str(tmp_path / "kept.safetensors"))
    plain = LoRA(rank=2, alpha=8)
    for entry, adapter in zip(file.adapters.values(), parts(larger), strict=True):
        assert adapter.misfit_with(entry.made()) is None
        for key, found in adapter.values_from(entry.made(), entry.tensors).items():
            adapter.saved_weights[key].assign(found)
        assert parts(model)[0].misfit_with(plain) is None
        assert "kept=5" in parts(model)[0].misfit_with(adapter)
    assert difference(outputs(larger, X), wanted) < 1e-6
    values = {"lora_a": np.ones((9, 2), "float32"), "lora_b": np.ones((2, 6), "float32")}
    taken = parts(model)[0].values_from(plain, values)
    assert not taken["kept_a"].any()
    assert not taken["kept_b"].any()
    assert (taken["lora_b"] == 2).all()


@pytest.mark.parametrize("wrong", [-1, 1.5, True])
def test_a_rank_that_is_none_is_refused(wrong):
    with pytest.raises(ValueError, match="`kept` must be a non-negative integer"):
        LoRA(kept=wrong)


def test_a_plain_lora_has_no_kept_pair_in_its_config():
    assert "kept" not in LoRA(rank=2).get_config()
    assert LoRA.from_config(LoRA(rank=2, kept=3).get_config()).kept == 3
