"""What one row per request costs with 64 adapters, part by part: the part `one row` of `served.py`.

64 examples of one row, each with another adapter of rank 8, through four Dense layers of 1024 units. All variants take turns
of four calls in one process on one core, each as Keras compiles `predict`. The factors of 64 adapters are as many bytes as
the kernel, and the kernel serves 64 rows where a factor serves one. "every factor read once" is the base and a sum over all
factors: nothing that uses them all can take less.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any

import measuring

BACKENDS = {"jax": "JAX", "tensorflow": "TensorFlow", "torch": "PyTorch"}
WIDTH, EXAMPLES, RANK, LAYERS, SECONDS = 1024, 64, 8, 4, 60.0
ROWS = {
    "nothing": "places, and nothing computed with them",
    "factors read": "base, and every factor read once",
    "A alone": "gather and product, A alone",
    "B alone": "gather and product, B alone",
    "no gather": "both products, all factors in order",
    "gather and two products": "gather, then two products",
    "keras_lora": "keras_lora",
}


def variants() -> dict[str, Callable[..., Any]]:
    """Ways to compute `y[i] + strength · x[i] a[index[i]]ᵀ b[index[i]]`, and parts of them."""
    import keras
    from keras import ops

    from keras_lora import backend

    torch = keras.backend.backend() == "torch"

    def gathered(a: Any, index: Any) -> Any:
        return ops.take(a, index, axis=0)

    def with_a(x: Any, a: Any) -> Any:
        return ops.einsum("nti,nri->ntr", x, a)

    def read(x: Any, a: Any, b: Any, index: Any, strength: Any, y: Any) -> Any:
        for each in (a, b):  # XLA adds in vectors only if lanes remain
            each = ops.convert_to_tensor(each)
            y = ops.add(y, ops.multiply(1e-30, ops.sum(each if torch else ops.sum(ops.reshape(each, (-1, 64)), 0))))
        return y

    def a_alone(x: Any, a: Any, b: Any, index: Any, strength: Any, y: Any) -> Any:
        return ops.add(y, ops.multiply(1e-30, with_a(x, gathered(a, index))[:, :, :1]))

    def b_alone(x: Any, a: Any, b: Any, index: Any, strength: Any, y: Any) -> Any:
        return ops.add(y, ops.matmul(x[:, :, : b.shape[1]], gathered(b, index)))

    def in_order(x: Any, a: Any, b: Any, index: Any, strength: Any, y: Any) -> Any:
        a, b = ops.convert_to_tensor(a)[1:], ops.convert_to_tensor(b)[1:]
        return ops.add(y, ops.multiply(strength, ops.matmul(with_a(x, a), b)))

    def two_products(x: Any, a: Any, b: Any, index: Any, strength: Any, y: Any) -> Any:
        return ops.add(y, ops.multiply(strength, ops.matmul(with_a(x, gathered(a, index)), gathered(b, index))))

    return {
        "nothing": lambda x, a, b, index, strength, y: y,
        "factors read": read,
        "A alone": a_alone,
        "B alone": b_alone,
        "no gather": in_order,
        "gather and two products": two_products,
        "keras_lora": backend.per_example_sum,
    }


def measure(seconds: float = SECONDS, width: int = WIDTH) -> dict[str, Any]:
    """Milliseconds of the base, and the median of each variant as a ratio to it in the same turn."""
    import keras
    import numpy as np

    import keras_lora
    from keras_lora import backend

    def stack() -> keras.Model:
        keras.utils.set_random_seed(0)
        dense = [keras.layers.Dense(width, activation="relu") for _ in range(LAYERS)]
        return keras.Sequential([keras.Input((1, width)), *dense])

    def call(way: Callable[..., Any]) -> Callable[[], Any]:
        model = keras_lora.MultiAdapterModel(stack(), capacity=EXAMPLES, rank=RANK, head=None)
        rng = np.random.default_rng(0)
        for variable in model.non_trainable_variables:
            if variable.name in ("lora_a", "lora_b"):
                variable.assign(rng.normal(size=variable.shape).astype("float32") / np.sqrt(width))
        batch = {"inputs": x, "adapter_index": np.arange(1, EXAMPLES + 1, dtype="int32")}

        def called() -> Any:
            backend.per_example_sum = way  # JAX and TensorFlow read it in the first call alone
            return model.predict_on_batch(batch)

        return called

    x = np.random.default_rng(1).normal(size=(EXAMPLES, 1, width)).astype("float32")
    calls: dict[str, Callable[[], Any]] = {"base": functools.partial(stack().predict_on_batch, x)}
    calls |= {name: call(way) for name, way in variants().items()}
    ours = backend.per_example_sum
    try:
        same = [calls[name]() for name in ("no gather", "gather and two products", "keras_lora")]
        assert max(np.abs(each - same[0]).max() for each in same) < 1e-4 * np.abs(same[0]).max()
        times = measuring.interleaved(calls, seconds, 400, 3, 4)  # after the first of 4 calls the weights are in the cache
    finally:
        backend.per_example_sum = ours
    ratios = {
        name: round(statistics.median(one / base for one, base in zip(each, times["base"], strict=True)), 3)
        for name, each in times.items()
    }
    base = statistics.median(times["base"])
    return {"milliseconds": round(1000 * base, 2), "rounds": len(times["base"]), "ratios": ratios}


def table(results: dict[str, dict[str, Any]]) -> str:
    lines = ["| | " + " | ".join(BACKENDS[each] for each in results) + " |", "| --- |" + " ---: |" * len(results)]
    lines.append("| base | " + " | ".join(f"{each['milliseconds']:.1f} ms" for each in results.values()) + " |")
    for name, label in ROWS.items():
        lines.append(f"| {label} | " + " | ".join(f"{each['ratios'][name]:.2f}" for each in results.values()) + " |")
    return "\n".join(lines) + "\n"
