"""What a training step costs, by counters that do not depend on the machine: XLA's own, on JAX."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_lora

pytestmark = pytest.mark.skipif(keras.backend.backend() != "jax", reason="XLA's counters are read through JAX")
TOKENS, WIDTH, DEPTH, RANK = 256, 512, 4, 8


def compiled_step(prepare):
    import jax

    model = keras.Sequential([keras.Input((WIDTH,)), *(layers.Dense(WIDTH, use_bias=False) for _ in range(DEPTH))])
    prepare(model)
    trained = [v.value for v in model.trainable_variables]
    frozen = [v.value for v in model.non_trainable_variables]

    def loss(trained, frozen, x):
        y, _ = model.stateless_call(trained, frozen, x, training=True)
        return keras.ops.sum(y * y)

    return jax.jit(jax.grad(loss)).lower(trained, frozen, np.ones((TOKENS, WIDTH), "float32")).compile()


@pytest.fixture(scope="module")
def steps():
    return {
        "full": compiled_step(lambda model: None),
        "lora": compiled_step(lambda model: keras_lora.apply_lora(model, rank=RANK, head=None)),
        "builtin": compiled_step(lambda model: [layer.enable_lora(RANK) for layer in model.layers]),
    }


def test_a_training_step_has_the_flops_of_the_factored_formula(steps):
    flops = {name: step.cost_analysis()["flops"] for name, step in steps.items()}
    limit = ((4 * DEPTH - 2) + (12 * DEPTH - 2) * RANK / WIDTH) / (6 * DEPTH - 2)
    assert flops["lora"] / flops["full"] == pytest.approx(limit, rel=0.01)
    assert flops["builtin"] / flops["full"] > 1


def test_nothing_of_the_size_of_a_kernel_is_made(steps):
    """No array `(in, out)` in the whole program but the kernels that come in."""
    made = [
        line
        for line in steps["lora"].as_text().splitlines()
        if f"= f32[{WIDTH},{WIDTH}]" in line and "parameter(" not in line and "bitcast(" not in line
    ]
    assert not made
