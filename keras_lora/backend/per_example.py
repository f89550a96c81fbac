"""Products with different factors for each example, and writing one adapter into the stacked factors."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_lora.backend.differences import has_symbolic_sizes

#: Up to this rank, the product with B is written as one sum of `rank` terms.
MOST_TERMS = 32
#: Up to so many rows in an example, XLA on a CPU does not copy the factors. With 16 both ways took the same time.
FEW_ROWS = 4


def per_example_sum(x: Any, a: Any, b: Any, index: Any, strength: Any, y: Any) -> Any:
    """Return `y[i] + strength · x[i] a[index[i]]ᵀ b[index[i]]` for each example i.

    With a few rows in each example the factors are most of what is read, so copying them costs as much as the products. On
    a CPU, XLA copies what it gathers for a product; it does not copy what a loop or a sum of terms reads. Measured by
    `benchmarks/one_row.py`.

    Args:
        x: `(batch, ..., in)`, or with `in` as several axes.
        a, b: Stacked factors, `(places, rank, in)` and `(places, rank, out)`, in their stored dtype.
        index: `(batch,)` integers.
        strength: A scalar tensor.
        y: The rows of `out` numbers of each example, in any shape. Its dtype is that of the products.
    """
    if keras.backend.backend() == "torch":
        a, b, strength = (each.value if isinstance(each, keras.Variable) else each for each in (a, b, strength))
        return _torch_sum(x, a, b, strength, index, y)
    a, b, dtype = ops.convert_to_tensor(a), ops.convert_to_tensor(b), y.dtype
    index, strength = ops.convert_to_tensor(index), ops.cast(strength, dtype)
    rows = ops.reshape(ops.cast(x, dtype), (ops.shape(index)[0], -1, a.shape[-1]))
    total = ops.reshape(y, (ops.shape(index)[0], -1, b.shape[-1]))
    few = rows.shape[1] in range(1, FEW_ROWS + 1) and not has_symbolic_sizes(x) and _is_xla_on_cpu()
    index = _after(total, index)
    h = _looped(rows, a, index) if few else _times_transposed(rows, _taken(a, index, dtype))
    h, b = ops.multiply(strength, h), _taken(b, _after(h, index), dtype)
    if few and b.shape[1] <= MOST_TERMS:
        for term in range(b.shape[1]):
            total = ops.add(total, ops.multiply(h[:, :, term : term + 1], b[:, term : term + 1]))
    else:
        total = ops.add(total, ops.matmul(h, b))
    return ops.reshape(total, ops.shape(y))


def _torch_sum(x: Any, a: Any, b: Any, strength: Any, index: Any, y: Any) -> Any:
    """With torch's own operations: around products of one row, those of Keras take as long as the products."""
    import torch

    dtype, index = y.dtype, torch.as_tensor(index, device=a.device)
    rows, total = x.to(dtype).reshape(len(index), -1, a.shape[-1]), y.reshape(len(index), -1, b.shape[-1])
    h = torch.bmm(rows, a.index_select(0, index).to(dtype).transpose(1, 2)) * strength
    return torch.baddbmm(total, h, b.index_select(0, index).to(dtype)).reshape(y.shape)


def _taken(stacked: Any, index: Any, dtype: Any) -> Any:
    return ops.cast(ops.take(stacked, index, axis=0), dtype)


def _after(tensor: Any, index: Any) -> Any:
    """`index`, once `tensor` is known: otherwise TensorFlow gathers the factors of all layers first, and keeps them."""
    if keras.backend.backend() != "tensorflow":
        return index
    import tensorflow as tf

    with tf.control_dependencies([tensor]):
        return tf.identity(index)


def _times_transposed(x: Any, a: Any) -> Any:
    if keras.backend.backend() == "tensorflow":  # outside of XLA, a transposition is a copy there
        import tensorflow as tf

        return tf.matmul(x, a, transpose_b=True)
    return ops.matmul(x, ops.swapaxes(a, 1, 2))


def _looped(x: Any, a: Any, index: Any) -> Any:
    """`x[i] a[index[i]]ᵀ`, one example after the other."""

    def product(each: Any) -> Any:
        row, place = each
        return ops.matmul(row, ops.transpose(ops.cast(a[place], row.dtype)))

    if keras.backend.backend() == "jax":
        import jax

        return jax.lax.map(product, (x, index))
    import tensorflow as tf

    return tf.map_fn(product, (x, index), fn_output_signature=x.dtype)


def _is_xla_on_cpu() -> bool:
    """Whether XLA compiles this for one CPU, as far as the trace tells."""
    if keras.distribution.distribution() is not None:
        return False
    if keras.backend.backend() == "jax":
        import jax

        return bool(jax.default_backend() == "cpu")
    import tensorflow as tf
    from tensorflow.python.ops import control_flow_util  # RNN layers of TensorFlow ask it the same

    if tf.executing_eagerly() or tf.config.list_logical_devices("GPU"):
        return False
    return bool(control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()))


def write_place(variables: Sequence[keras.Variable], place: int, rows: Sequence[np.ndarray]) -> None:
    """Write `rows[i]` into `variables[i][place]`, without a copy of the variables. Nothing may read them meanwhile."""
    backend = keras.backend.backend()
    if backend == "jax":
        stacks = [variable.value for variable in variables]
        written = _jax_writer()(stacks, place, [row.astype("float32") for row in rows])
        for variable, stack in zip(variables, written, strict=True):
            variable.assign(stack)
        return
    for variable, row in zip(variables, rows, strict=True):
        value: Any = variable.value
        if backend == "torch":
            import torch

            with torch.no_grad():
                value.data[place].copy_(torch.from_numpy(np.ascontiguousarray(row, "float32")))
        elif hasattr(value, "handle") and not hasattr(value, "values"):  # a variable without a `tf.distribute` strategy
            import tensorflow as tf

            updates = np.ascontiguousarray(row, "float32")[None]
            tf.raw_ops.ResourceScatterUpdate(resource=value.handle, indices=np.array([place]), updates=updates)
        else:
            start = [place, *(0,) * row.ndim]
            variable.assign(ops.slice_update(ops.convert_to_tensor(variable), start, row[None].astype("float32")))


@functools.cache
def _jax_writer() -> Any:
    import jax

    def write(stacks: list[Any], place: Any, rows: list[Any]) -> list[Any]:
        return [stack.at[place].set(row.astype(stack.dtype)) for stack, row in zip(stacks, rows, strict=True)]

    return jax.jit(write, donate_argnums=0)
