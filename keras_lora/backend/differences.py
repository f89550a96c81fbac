"""What Keras's operations cannot do, or do otherwise, on one of the backends."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
from keras import ops


def fuses_base() -> bool:
    """Whether `low_rank_sum` is faster with the base product in it: XLA fuses the operations without help."""
    found: bool = keras.backend.backend() == "torch"
    return found


def has_symbolic_sizes(x: Any) -> bool:
    """Whether JAX traces for an export; an axis of unknown size then cannot be merged with another and split again."""
    return keras.backend.backend() == "jax" and not all(isinstance(size, int) for size in x.shape)


def traces() -> bool:
    """Whether TensorFlow is building the graph of a function."""
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    return not tf.executing_eagerly()


def to_numpy(x: Any) -> Any:
    """Return a tensor as a NumPy array, whole, even if JAX has split it over processes: then each of them must call this."""
    x = x.value if isinstance(x, keras.Variable) else x
    if not getattr(x, "is_fully_addressable", True) and not x.is_fully_replicated:
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(x, tiled=True)
    return ops.convert_to_numpy(x)


def strategy_now() -> Any:
    """Return the `tf.distribute` strategy in whose scope TensorFlow would create a variable, or `None`."""
    if keras.backend.backend() != "tensorflow":
        return None
    import tensorflow as tf

    return tf.distribute.get_strategy() if tf.distribute.has_strategy() else None


@contextlib.contextmanager
def holding(pairs: Iterable[tuple[keras.Variable, Any]]) -> Iterator[None]:
    """Give these variables these values inside this context. It works in a step whose gradient is not computed yet."""
    pairs = list(pairs)
    if keras.backend.backend() == "torch":  # not written in place: torch keeps the tensor for the gradient
        before = [variable.value.data for variable, _ in pairs]
        try:
            for variable, numbers in pairs:
                variable.value.data = ops.cast(ops.convert_to_tensor(numbers), variable.dtype).to(variable.value.device)
            yield
        finally:
            for (variable, _), data in zip(pairs, before, strict=True):
                variable.value.data = data
        return
    tensors = [ops.copy(variable) for variable, _ in pairs]  # TensorFlow would give the variable itself
    try:
        for variable, numbers in pairs:
            variable.assign(numbers)
        yield
    finally:
        for (variable, _), tensor in zip(pairs, tensors, strict=True):
            variable.assign(tensor)


def each_example(function: Callable[..., Any], *arrays: Any) -> Any:
    """Apply `function` to each example (first axis) of the arrays, in one call if the backend can."""
    if keras.backend.backend() == "torch":  # its `vmap` does not support convolution with channels last
        return ops.stack([function(*each) for each in zip(*(ops.unstack(array) for array in arrays), strict=True)])
    return ops.vectorized_map(lambda each: function(*each), arrays)


def lacks_bfloat16(x: Any) -> bool:
    """Whether PyTorch has `x` on a CPU without bfloat16 instructions: measured, a product takes 40 times that in float32."""
    return keras.backend.backend() == "torch" and x.device.type == "cpu" and not _torch_has_bfloat16()


@functools.cache
def _torch_has_bfloat16() -> bool:
    import torch

    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def widens_bfloat16() -> bool:
    """Whether XLA makes a float32 copy of a bfloat16 kernel: measured, on a CPU JAX's does and TensorFlow's does not."""
    found: bool = keras.backend.backend() == "jax"
    return found
