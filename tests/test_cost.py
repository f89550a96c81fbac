"""What training costs, by counters that do not depend on the machine: XLA's own, torch's saved tensors, bytes and traces."""

import contextlib
import os
import re

import keras
import numpy as np
import pytest
from keras import layers
from zoo import ZOO

import keras_lora
from keras_lora.adapters import initial

BACKEND = keras.backend.backend()
only_jax = pytest.mark.skipif(BACKEND != "jax", reason="XLA's counters are read through JAX")
only_torch = pytest.mark.skipif(BACKEND != "torch", reason="only torch shows what it keeps for the backward pass")
TOKENS, WIDTH, DEPTH, RANK = 256, 512, 4, 8


def stack(width=WIDTH, activation=None, use_bias=False):
    hidden = (layers.Dense(width, activation=activation, use_bias=use_bias) for _ in range(DEPTH))
    return keras.Sequential([keras.Input((width,)), *hidden])


def with_adapter(adapter):
    return lambda model: keras_lora.apply_lora(model, adapter, head=None)


def with_keras_own(model):
    for layer in model.layers:
        layer.enable_lora(RANK)


# XLA: operations, and memory beside the weights.


def compiled_step(prepare, tokens=TOKENS, **kwargs):
    import jax

    model = stack(**kwargs)
    prepare(model)
    trained = [v.value for v in model.trainable_variables]
    frozen = [v.value for v in model.non_trainable_variables]

    def loss(trained, frozen, x):
        y, _ = model.stateless_call(trained, frozen, x, training=True)
        return keras.ops.sum(y * y)

    x = np.ones((tokens, model.inputs[0].shape[-1]), "float32")
    return jax.jit(jax.grad(loss)).lower(trained, frozen, x).compile()


@pytest.fixture(scope="module", autouse=True)
def _compiled_as_for_a_user():
    """The tests may run with less of XLA's work, to save time (see the Makefile); here it is what is counted."""
    if BACKEND != "jax":
        yield
        return
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def steps(_compiled_as_for_a_user):
    return {
        "full": compiled_step(lambda model: None),
        "lora": compiled_step(with_adapter(keras_lora.LoRA(RANK))),
        "builtin": compiled_step(with_keras_own),
    }


@only_jax
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_base_as_a_reference_in_a_step_costs_what_the_base_costs(method):
    """XLA's count of operations of the forward pass with the adapters disabled, and of the plain model."""
    import jax

    def flops(model, disabled=False):
        variables = [*model.trainable_variables, *model.non_trainable_variables]

        def forward(values, x):
            mapping = list(zip(variables, values, strict=True))
            without = keras_lora.disable_adapters(model) if disabled else contextlib.nullcontext()
            with keras.StatelessScope(state_mapping=mapping), without:
                return model(x)

        x = np.ones((TOKENS, WIDTH), "float32")
        return jax.jit(forward).lower([v.value for v in variables], x).compile().cost_analysis()["flops"]

    base, adapted = stack(), keras_lora.apply_lora(stack(), method, rank=RANK, head=None)
    assert flops(adapted, disabled=True) == flops(base)
    assert flops(adapted) > flops(base)


@only_jax
def test_a_training_step_has_the_flops_of_the_factored_formula(steps):
    flops = {name: step.cost_analysis()["flops"] for name, step in steps.items()}
    limit = ((4 * DEPTH - 2) + (12 * DEPTH - 2) * RANK / WIDTH) / (6 * DEPTH - 2)
    assert flops["lora"] / flops["full"] == pytest.approx(limit, rel=0.01)
    assert flops["builtin"] / flops["full"] > 1


@only_jax
def test_nothing_of_the_size_of_a_kernel_is_made(steps):
    """No array `(in, out)` in the whole program but the kernels that come in."""
    made = [
        line
        for line in steps["lora"].as_text().splitlines()
        if f"= f32[{WIDTH},{WIDTH}]" in line and "parameter(" not in line and "bitcast(" not in line
    ]
    assert not made


@only_jax
@pytest.mark.parametrize(
    ("tokens", "activation", "limit"),
    [
        (256, None, 0.5),
        (32, None, 0.2),
        (32, "relu", 0.2),
        # XLA on CPU keeps `x W` and `h B` apart until the backward pass, to add them there again for the mask of the ReLU;
        # it drops an optimization barrier between them. So this one is at 0.55, and not at 0.5.
        (256, "relu", 0.56),
    ],
)
def test_temporary_memory_beside_that_of_keras_own_lora(tokens, activation, limit):
    def temporary(prepare):
        step = compiled_step(prepare, tokens, width=1024, activation=activation, use_bias=activation is not None)
        return step.memory_analysis().temp_size_in_bytes

    assert temporary(with_adapter(keras_lora.LoRA(RANK))) <= limit * temporary(with_keras_own)


@only_jax
@pytest.mark.parametrize("alpha", [RANK, 2 * RANK])  # a scale of 1, which XLA drops, and another
def test_the_gradient_of_a_is_never_the_slow_product(alpha):
    """`dhᵀ x (rank, in)` and not `xᵀ dh (in, rank)`, which takes XLA on CPU ten times as long."""
    text = compiled_step(with_adapter(keras_lora.LoRA(RANK, alpha=alpha))).as_text()
    products = [line.split("=")[1].strip() for line in text.splitlines() if " dot(" in line]
    assert sum(line.startswith(f"f32[{RANK},{WIDTH}]") for line in products) == 2 * DEPTH  # of A and of B
    assert not any(line.startswith(f"f32[{WIDTH},{RANK}]") for line in products)


@only_jax
def test_the_dropped_input_is_not_kept():
    """By what JAX keeps: XLA on CPU merges the two drawings of one mask again."""
    import jax

    def kept(adapter):
        model = stack()
        keras_lora.apply_lora(model, adapter, head=None)
        trained = [v.value for v in model.trainable_variables]
        frozen = [v.value for v in model.non_trainable_variables]
        x = np.ones((TOKENS, WIDTH), "float32")

        def loss(trained):
            return keras.ops.sum(keras.ops.square(model.stateless_call(trained, frozen, x, training=True)[0]))

        found = jax.make_jaxpr(lambda trained: jax.vjp(loss, trained)[1])(trained).out_avals
        return sum(each.size * each.dtype.itemsize for each in found if each.shape == (TOKENS, WIDTH))

    assert 0 < kept(keras_lora.LoRA(RANK, dropout=0.1)) <= kept(keras_lora.LoRA(RANK))


# Torch: what is kept for the backward pass.


def kept_on_torch(prepare, activation):
    """Bytes kept by a forward pass, each storage once, without the weights and the input."""
    import torch

    model = stack(width=128, activation=activation, use_bias=True)
    prepare(model)
    x = torch.ones((TOKENS, 128))
    known = {v.value.untyped_storage().data_ptr() for v in model.variables} | {x.untyped_storage().data_ptr()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor, storage  # held, so that no other array gets its address

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed[0]):
        held = model(x, training=True)
    del held
    return sum(kept.values())


def only_the_first_bias(model):
    for v in model.trainable_variables:
        v.trainable = v is model.layers[0].bias


NOTHING_BUT_H = TOKENS * RANK * 4 * DEPTH


@only_torch
def test_torch_keeps_what_the_frozen_base_keeps_and_the_rank_sized_product():
    base = kept_on_torch(only_the_first_bias, "relu")
    assert 0 < kept_on_torch(with_adapter(keras_lora.LoRA(RANK)), "relu") - base <= NOTHING_BUT_H
    assert kept_on_torch(with_keras_own, "relu") - base > NOTHING_BUT_H


@only_torch
@pytest.mark.parametrize("activation", ["relu", "gelu", None])
def test_with_a_frozen_the_input_is_not_kept_either(activation):
    base = kept_on_torch(only_the_first_bias, activation)
    assert kept_on_torch(with_adapter(keras_lora.LoRA(RANK, freeze_a=True)), activation) - base <= NOTHING_BUT_H


@only_torch
@pytest.mark.parametrize("seed", [None, 1])
def test_dropout_keeps_no_second_copy_of_the_input(seed):
    plain = kept_on_torch(with_adapter(keras_lora.LoRA(RANK)), "relu")
    dropped = kept_on_torch(with_adapter(keras_lora.LoRA(RANK, dropout=0.1, seed=seed)), "relu")
    assert dropped - plain < TOKENS * 128  # less than a byte for each number of one layer's input


# Every backend.


@pytest.mark.parametrize("scale", [1.0, 0.5, 2.0])
def test_the_fast_product_has_the_numbers_and_gradients_of_the_plain_one(scale):
    from helpers import difference, gradients, perturb, value

    x = keras.ops.convert_to_tensor(np.random.default_rng(0).normal(size=(6, 5, 16)).astype("float32"))
    model = keras.Sequential([keras.Input((5, 16)), layers.Dense(12, activation="tanh"), layers.Dense(16)])
    keras_lora.apply_lora(model, keras_lora.LoRA(4, alpha=4 * scale), head=None)
    perturb(model, size=0.3)
    factors = [v for v in model.trainable_variables]
    bases = [[value(v) for v in layer.variables if v.name in ("kernel", "bias")] for layer in model.layers]

    def plain(x):
        for layer, (kernel, bias), activation in zip(model.layers, bases, (keras.ops.tanh, lambda y: y), strict=True):
            own = layer.adapter
            x = (
                x @ keras.ops.convert_to_tensor(kernel, "float32")
                + scale * ((x @ own.lora_a) @ own.lora_b)
                + keras.ops.convert_to_tensor(bias, "float32")
            )
            x = activation(x)
        return x

    assert difference([value(model(x))], [value(plain(x))]) < 1e-6
    found, expected = (gradients(lambda f=f: keras.ops.sum(keras.ops.square(f(x))), factors) for f in (model, plain))
    assert difference(found, expected) < 1e-6


def test_an_einsum_that_sums_over_nothing_is_no_plain_product():
    from helpers import difference, perturb, value

    layer = layers.EinsumDense("ab,cd->abcd", (7, 3, 4))
    layer.build((2, 7))
    keras_lora.apply_lora(layer, rank=2)
    perturb(layer, size=0.3)
    x = np.random.default_rng(0).normal(size=(2, 7)).astype("float32")
    assert difference([value(layer(x))], [np.einsum("ab,cd->abcd", x, value(layer.kernel))]) < 1e-6


@only_torch
def test_torch_transforms_an_adapted_layer_as_a_plain_one():
    import torch
    from helpers import perturb

    layer = layers.Dense(5)
    layer.build((None, 7))
    keras_lora.apply_lora(layer, rank=2)
    perturb(layer, size=0.3)
    x = torch.ones((3, 7))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        y.float().sum().backward()
    assert torch.allclose(y.float(), layer(x), rtol=0.05, atol=0.05)
    compiled = torch.compile(layer.adapter.output, backend="eager", fullgraph=True)
    expected = layer.adapter.output(x, layer.linear_map)
    assert torch.allclose(compiled(x, layer.linear_map), expected)
    tangent = torch.func.jvp(lambda x: layer.adapter.output(x, layer.linear_map), (x,), (x,))[1]
    assert torch.allclose(tangent, expected, atol=1e-5)  # it is linear
    each = torch.func.vmap(lambda x: layer.adapter.output(x[None], layer.linear_map)[0])(x)
    assert torch.allclose(each, expected, atol=1e-5)


@only_torch
@pytest.mark.parametrize("with_kernel", [True, False])
def test_the_gradient_written_out_is_right_and_so_is_its_own(with_kernel):
    import torch

    from keras_lora import backend

    torch.manual_seed(0)
    shapes = [(4, 5), (5, 2), (2, 3), (5, 3) if with_kernel else (4, 3)]
    given = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def function(x, a, b, last):
        return backend.low_rank_sum(x, a, b, 0.7, 1.0, **({"kernel": last} if with_kernel else {"y": last}))

    assert torch.autograd.gradcheck(function, given)
    assert torch.autograd.gradgradcheck(function, given)


def test_optimizer_and_file_have_the_size_of_the_factors(tmp_path):
    model = stack()
    keras_lora.apply_lora(model, rank=RANK, head=None)
    numbers = DEPTH * RANK * (WIDTH + WIDTH)
    optimizer = keras.optimizers.Adam()
    optimizer.build(model.trainable_variables)
    sizes = [int(np.prod(v.shape)) for v in optimizer.variables]
    assert 2 * numbers <= sum(sizes) <= 2 * numbers + 10  # and the learning rate and the count of steps
    keras_lora.save_adapter(model, tmp_path / "a.safetensors")
    assert 0 <= os.path.getsize(tmp_path / "a.safetensors") - 4 * numbers < 1024 * DEPTH


@pytest.mark.skipif(BACKEND == "torch", reason="torch runs eagerly: there is no trace to make again")
@pytest.mark.parametrize("method", ["lora", "dora", keras_lora.LoRA(2, dropout=0.1)])
def test_nothing_is_traced_again(tmp_path, method):
    traces = []

    def counted(y):
        traces.append(y.shape)
        return keras.ops.tanh(y)

    model = keras.Sequential([keras.Input((6,)), layers.Dense(6, activation=counted), layers.Dense(1)])
    keras_lora.apply_lora(model, method, head=None)
    keras_lora.save_adapter(model, tmp_path / "a.safetensors")
    model.compile("adam", "mse")
    x, y = np.ones((4, 6), "float32"), np.ones((4, 1), "float32")
    model.train_on_batch(x, y)
    model.predict_on_batch(x)
    traced = len(traces)
    assert traced > 0
    for _ in range(10):
        model.train_on_batch(x, y)
    model.predict_on_batch(x)
    keras_lora.load_adapter(model, tmp_path / "a.safetensors")
    model.train_on_batch(x, y)
    model.predict_on_batch(x)
    assert len(traces) == traced


def test_loading_draws_nothing_random(tmp_path, monkeypatch):
    keras_lora.save_adapter(keras_lora.apply_lora(stack(16), rank=2, head=None), tmp_path / "a.safetensors")
    fresh = stack(16)
    drawn = []
    uniform = initial.uniform

    def counted(limit, seed):
        draw = uniform(limit, seed)
        return lambda *args, **kwargs: drawn.append(limit) or draw(*args, **kwargs)

    monkeypatch.setattr(initial, "uniform", counted)
    keras_lora.apply_lora(stack(16), rank=2, head=None)
    assert drawn
    drawn.clear()
    keras_lora.load_adapter(fresh, tmp_path / "a.safetensors")
    assert not drawn


@only_jax
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_adapting_and_saving_compile_nothing_but_copies(method, tmp_path, caplog):
    import jax

    jax.clear_caches()
    model = keras.Sequential(
        [keras.Input((53,)), layers.Dense(59), layers.Embedding(61, 3), layers.Dense(67), layers.Dense(2)]
    )
    rebuilt = keras.models.clone_model(model)
    with jax.log_compiles(), caplog.at_level("WARNING", "jax"):
        keras_lora.apply_lora(model, method, rank=3, targets=[layers.Dense, layers.Embedding])
        model.save(tmp_path / "adapted.keras")
        keras_lora.save_adapter(model, tmp_path / "adapter.safetensors")
        keras_lora.load_adapter(rebuilt, tmp_path / "adapter.safetensors")
    compiled = {found for record in caplog.records if (found := re.search(r"Compiling jit\((\w+)\)", record.getMessage()))}
    names = {found[1] for found in compiled}
    of_norms = {"square", "_reduce_sum", "sqrt"} if method == "dora" else set()
    assert names - {"_reduce_any"} == {"stage"} | of_norms  # whether the head's bias is zero


def test_apply_asks_of_each_layer_equally_often():
    """How often a kernel's shape is read, counted: four times the layers, four times the work."""
    from keras_lora.linear_map import LinearMap

    def reads(depth):
        model = keras.Sequential([keras.Input((4,)), *(layers.Dense(4) for _ in range(depth))])
        count, shape = [0], LinearMap.kernel_shape

        def counted(linear):
            count[0] += 1
            return shape.fget(linear)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LinearMap, "kernel_shape", property(counted))
            keras_lora.apply_lora(model, rank=1, head=None)
        return count[0]

    assert reads(32) == 4 * reads(8)


@pytest.mark.parametrize("function", ["apply_lora", "load_adapter", "load_adapter into it"])
def test_a_model_is_walked_at_most_twice(function, monkeypatch, tmp_path):
    from keras_lora.swap import addresses

    specimen, other = ZOO["subclassed"](), ZOO["subclassed"]()
    keras_lora.apply_lora(other.model, rank=2)
    keras_lora.save_adapter(other.model, tmp_path / "a.safetensors")
    if function == "load_adapter into it":
        keras_lora.apply_lora(specimen.model, rank=2)
    walked, real = [], addresses._walked
    monkeypatch.setattr(addresses, "_walked", lambda model: (walked.append(model), real(model))[1])
    if function == "apply_lora":
        keras_lora.apply_lora(specimen.model, rank=2, train="head", exclude=layers.MultiHeadAttention)
    else:
        keras_lora.load_adapter(specimen.model, tmp_path / "a.safetensors")
    assert 1 <= sum(model is specimen.model for model in walked) <= 2
