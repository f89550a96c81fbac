"""Convolutions whose changed kernel is formed for a call: when that is, what it computes, and how."""

import keras
import numpy as np
import pytest
from helpers import covering, gradients, perturb, value
from keras import layers, ops

import keras_lora

BACKEND = keras.backend.backend()
EVERYWHERE = pytest.mark.every_backend
pytestmark = pytest.mark.torch_first
LAYERS = {
    "plain": (lambda: layers.Conv2D(5, 3, activation="tanh"), (6, 5, 4)),
    "same, dilated": (lambda: layers.Conv2D(5, (3, 2), padding="same", dilation_rate=(2, 1)), (6, 5, 4)),
    "causal": (lambda: layers.Conv1D(5, 3, padding="causal", dilation_rate=2), (30, 4)),
    "strided": (lambda: layers.Conv2D(5, 3, strides=2, padding="same"), (6, 5, 4)),
    "one by one": (lambda: layers.Conv2D(5, 1), (6, 5, 4)),
    "three axes": (lambda: layers.Conv3D(3, 2), (4, 3, 5, 2)),
    "transposed": (lambda: layers.Conv2DTranspose(5, 3, strides=2), (5, 5, 4)),
}


def adapted(make, shape, batch=3, **arguments):
    keras.utils.set_random_seed(1)
    layer = make()
    keras_lora.apply_lora(keras.Sequential([keras.Input(shape), layer]), keras_lora.LoRA(2, **arguments), head=None)
    perturb(layer)
    return layer, np.random.default_rng(0).normal(size=(batch, *shape)).astype("float32")


def by_definition(layer, x):
    linear, adapter = layer.linear_map, layer.adapter
    return linear.finish(linear.apply(x, ops.add(linear.matrix, adapter.change(linear.matrix))))


@pytest.fixture(autouse=True)
def _channels_last():
    before = keras.config.image_data_format()
    keras.config.set_image_data_format("channels_last")
    yield
    keras.config.set_image_data_format(before)


@pytest.mark.parametrize("name", covering(LAYERS, ["same, dilated", "strided"]))
def test_output_and_all_gradients_are_those_of_the_definition(name):
    layer, x = adapted(*LAYERS[name])
    assert layer.linear_map.forms_kernel(x)
    np.testing.assert_allclose(value(layer(x)), value(by_definition(layer, x)), rtol=1e-5, atol=1e-6)
    x = keras.Variable(x)
    variables = [x, *layer.adapter.trainable_variables]
    found, expected = (
        gradients(lambda f=f: ops.sum(ops.square(f(x.value))), variables) for f in (layer, lambda x: by_definition(layer, x))
    )
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def second(loss, values):
    """The gradient of the sum of the squares of the gradients."""
    if BACKEND == "torch":
        import torch

        tensors = [torch.tensor(each, requires_grad=True) for each in values]
        first = torch.autograd.grad(loss(*tensors), tensors, create_graph=True)
        return torch.autograd.grad(sum((each**2).sum() for each in first), tensors)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        tensors = [tf.convert_to_tensor(each) for each in values]
        with tf.GradientTape() as outer:
            outer.watch(tensors)
            with tf.GradientTape() as tape:
                tape.watch(tensors)
                scalar = loss(*tensors)
            total = tf.add_n([tf.reduce_sum(each**2) for each in tape.gradient(scalar, tensors)])
        return outer.gradient(total, tensors)
    import jax

    def total(*values):
        return sum((each**2).sum() for each in jax.grad(loss, (0, 1, 2))(*values))

    return jax.grad(total, (0, 1, 2))(*values)


@EVERYWHERE
def test_the_second_derivative_is_right_too():
    layer, x = adapted(*LAYERS["same, dilated"])
    linear, (a, b) = layer.linear_map, (np.asarray(value(each), "float32") for each in layer.adapter.current_pair())

    def fast(x, a, b):
        return ops.sum(ops.sin(linear.low_rank_sum(x, a, b, 1.5, 1.0)))

    def defined(x, a, b):
        return ops.sum(ops.sin(linear.apply(x, ops.add(linear.matrix, ops.multiply(1.5, ops.matmul(a, b))))))

    for one, other in zip(second(fast, [x, a, b]), second(defined, [x, a, b]), strict=True):
        np.testing.assert_allclose(value(one), value(other), rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(BACKEND != "jax", reason="torch's and JAX's alone; torch's is tested in test_cost.py")
@EVERYWHERE
def test_jax_differentiates_it_forward():
    import jax

    layer, x = adapted(*LAYERS["same, dilated"])
    moves = [jax.jvp(f, (x,), (np.ones_like(x),))[1] for f in (layer, lambda x: by_definition(layer, x))]
    np.testing.assert_allclose(value(moves[0]), value(moves[1]), rtol=1e-4, atol=1e-5)


def test_the_plan_depends_on_shapes_and_dtypes_alone():
    """3 · 3 · 4 · 5 = 180 numbers in the kernel, 120 in an example."""
    layer, x = adapted(*LAYERS["plain"], batch=2)
    assert layer.linear_map.forms_kernel(x)
    assert not layer.linear_map.forms_kernel(x[:1])
    half, x = adapted(lambda: layers.Conv2D(5, 3, dtype="mixed_bfloat16"), (6, 5, 4))
    assert not half.linear_map.forms_kernel(x)  # the sum of W and ΔW would be rounded
    grouped, x = adapted(lambda: layers.Conv2D(4, 3, groups=2), (6, 5, 4))
    assert not grouped.linear_map.forms_kernel(x)
    keras_lora.apply_lora(model := keras.Sequential([keras.Input((6, 5, 4)), layers.Conv2D(5, 3)]), head=None)
    model.layers[0].linear_map.store_kernel("bfloat16")
    assert not model.layers[0].linear_map.forms_kernel(x)


@EVERYWHERE
@pytest.mark.parametrize(("batch", "forward", "both"), [(3, 1, 2), (1, 2, 4)])
def test_what_is_convolved(batch, forward, both):
    """Formed: the output and the gradient of the input. Factored: both through the kernel and through A, and one for A."""
    layer, x = adapted(lambda: layers.Conv2D(5, 3, padding="same"), (6, 5, 4), batch=batch)
    assert layer.linear_map.forms_kernel(x) == (forward == 1)
    if BACKEND == "torch":
        import torch
        from torch.utils._python_dispatch import TorchDispatchMode

        class Count(TorchDispatchMode):
            calls = 0

            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                name = function.overloadpacket._qualified_op_name
                self.calls += name in ("aten::convolution", "aten::convolution_backward")
                return function(*args, **(kwargs or {}))

        x = torch.tensor(x, requires_grad=True)
        with Count() as counted:
            y = layer(x)
            assert counted.calls == forward
            y.sum().backward()
        assert counted.calls == both
    elif BACKEND == "jax":
        import jax

        trained = [v.value for v in layer.trainable_variables]
        frozen = [v.value for v in layer.non_trainable_variables]

        def loss(trained, x):
            return ops.sum(layer.stateless_call(trained, frozen, x)[0] ** 2)

        assert str(jax.make_jaxpr(loss)(trained, x)).count("conv_general_dilated") == forward
        thin = 1 if forward == 1 else 3  # for B; or that, for A and for the input
        assert len(_convolutions(jax.make_jaxpr(jax.grad(loss, (0, 1)))(trained, x))) == 2 + thin
    else:
        import tensorflow as tf

        graph = tf.function(layer).get_concrete_function(tf.constant(x)).graph
        assert sum(op.type == "Conv2D" for op in graph.get_operations()) == forward


def _convolutions(jaxpr):
    return [line for line in str(jaxpr).splitlines() if "= conv_general_dilated[" in line]


@EVERYWHERE
def test_a_bias_belongs_to_the_channels_where_the_width_is_as_long():
    """Keras on TensorFlow adds a second vector to the last axis if that is as long."""
    layer, _ = adapted(lambda: layers.Conv2D(4, 1, data_format="channels_first"), (3, 4, 4))
    layer.bias.assign(np.arange(4.0))
    y = value(layer.linear_map.finish(ops.zeros((1, 4, 2, 4))))
    assert np.array_equal(y, np.broadcast_to(np.arange(4.0).reshape(1, 4, 1, 1), y.shape))
