"""The small products that decided how `keras_lora/backend/products.py` is written: gradients of A, parallel projections."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras import ops
from measuring import Budget, Record, interleaved, record


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run `function` as the backend runs a training step: through XLA, or eagerly on torch."""
    if keras.backend.backend() == "jax":
        import jax

        step = jax.jit(function)
        return lambda *args: jax.block_until_ready(step(*args))
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.function(function, jit_compile=True)
    return function


def gradient_of_a(x: Any, dh: Any) -> Any:
    return ops.matmul(ops.transpose(x), dh)


def transposed_gradient_of_a(x: Any, dh: Any) -> Any:
    return ops.matmul(ops.transpose(dh), x)


def down(x: Any, a: Any) -> Any:
    """`x a`, in the backend's fastest form."""
    return ops.transpose(ops.matmul(ops.transpose(a), ops.transpose(x))) if keras.backend.backend() == "torch" else x @ a


def base(x: Any, kernel: Any) -> Any:
    """The products of three frozen kernels, forward and backward."""
    return [(ops.matmul(x, kernel), ops.matmul(x, ops.transpose(kernel))) for _ in range(3)]


def apart(x: Any, dh: Any, *factors: Any) -> Any:
    """Three separate down-projections of one input, forward and backward."""
    found = []
    dx = 0.0
    for a in factors:
        found += [down(x, a), ops.matmul(ops.transpose(dh), x)]
        dx = dx + ops.matmul(dh, ops.transpose(a))
    return dx, found


def shared(x: Any, dh: Any, *factors: Any) -> Any:
    """The same as one product of three times the rank."""
    a = ops.concatenate(factors, axis=1)
    wide = ops.concatenate([dh] * len(factors), axis=1)
    return ops.matmul(wide, ops.transpose(a)), down(x, a), ops.matmul(ops.transpose(wide), x)


def products(quick: bool) -> Iterator[Record]:
    """The CPU seconds of each way. The ways take turns."""
    for width, tokens in [(32, 8)] if quick else [(512, 256), (1024, 256), (1024, 1024)]:
        rank, rng = 8, np.random.default_rng(0)
        shapes = [(tokens, width), (tokens, rank), *[(width, rank)] * 3]
        arrays = [ops.convert_to_tensor(rng.normal(size=shape).astype("float32")) for shape in shapes]
        kernel = ops.convert_to_tensor(rng.normal(size=(width, width)).astype("float32"))
        ways: dict[str, tuple[Callable[..., Any], list[Any]]] = {
            "x^T dh": (gradient_of_a, arrays[:2]),
            "dh^T x": (transposed_gradient_of_a, arrays[:2]),
            "apart": (apart, arrays),
            "shared": (shared, arrays),
            "three kernels": (base, [arrays[0], kernel]),
        }
        calls = {name: functools.partial(compiled(way), *given) for name, (way, given) in ways.items()}
        for variant, seconds in interleaved(calls, *(Budget(0, 2, 2) if quick else Budget(2, 60, 5, times=5))).items():
            yield record("products", {"d": width, "tokens": tokens, "rank": rank}, "product", "s", variant, seconds)
