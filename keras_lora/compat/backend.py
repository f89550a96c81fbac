"""Backend-specific code: what Keras's operations cannot do, or do slowly. Only this file may name a backend."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
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


def widens_bfloat16() -> bool:
    """Whether XLA makes a float32 copy of a bfloat16 kernel: measured, on a CPU JAX's does and TensorFlow's does not."""
    found: bool = keras.backend.backend() == "jax"
    return found


def frozen_product(product: Callable[..., Any], gradient: Callable[..., Any] | None, x: Any, stored: Sequence[Any]) -> Any:
    """Return `product(x, *stored)`, linear in `x`, of a kernel that is formed from what is stored of it.

    `gradient(dy, *stored)` gives the gradient of `x`, and forms the kernel again; if it is `None`, the product is
    differentiated. What is stored has no gradient, and nothing else is kept.

    XLA would form the kernels of all layers before anything else, and keep them for the gradients: a float copy of the
    whole model. So here what is stored depends on `x`, or on `dy`, in a way that changes nothing.
    """
    if keras.backend.backend() == "torch":
        import torch

        if not torch.is_grad_enabled() or not x.requires_grad or _torch_transforms(x):
            return product(x, *stored)
        if gradient is None:
            shape, dtype = x.shape, x.dtype
            gradient = lambda dy, *stored: _transposed(product, shape, dtype, dy, stored)  # noqa: E731
        return _torch_frozen_product().apply(product, gradient, x, *stored)

    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        stored = [tf.convert_to_tensor(each) for each in stored]  # Keras's `convert_to_tensor` returns variables as they are

    def with_gradient(x: Any, *stored: Any) -> tuple[Any, Callable[..., Any]]:
        shape, dtype = ops.shape(x), x.dtype

        def grad(*args: Any, upstream: Any = None) -> tuple[Any, ...]:
            dy = args[-1] if upstream is None else upstream
            late = _not_before(dy, stored)
            dx = _transposed(product, shape, dtype, dy, late) if gradient is None else gradient(dy, *late)
            return dx, *(None for _ in stored)

        return product(x, *_not_before(x, stored)), grad

    return ops.custom_gradient(with_gradient)(x, *stored)


def _transposed(product: Callable[..., Any], shape: Any, dtype: Any, dy: Any, stored: Sequence[Any]) -> Any:
    """The gradient of an input of this shape. The product is linear in it, so the gradient is the same everywhere."""
    if keras.backend.backend() == "torch":
        import torch

        with torch.enable_grad():
            x = torch.zeros(shape, dtype=dtype, device=dy.device, requires_grad=True)
            return torch.autograd.grad(product(x, *stored), x, dy)[0]
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        x = tf.zeros(shape, dtype)
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = product(x, *stored)
        return tape.gradient(y, x, dy)
    import jax

    return jax.vjp(lambda x: product(x, *stored), ops.zeros(shape, dtype))[1](dy)[0]


def look_up(table: np.ndarray, index: Any) -> Any:
    """Return the rows of a table of float32, one or two numbers each, at an array of bytes."""
    if keras.backend.backend() != "torch":
        return ops.take(ops.convert_to_tensor(table), ops.cast(index, "int32"), axis=0)
    import torch

    # `ops.take` makes indices of 64 bits, which takes longer than all the rest. Two numbers are moved as one of 64 bits.
    words = torch.from_numpy(table.view("int64" if table.ndim == 2 else "float32").reshape(-1)).to(index.device)
    found = torch.index_select(words, 0, index.reshape(-1).to(torch.int32))
    return found.view(torch.float32).reshape(*index.shape, *table.shape[1:])


def _not_before(x: Any, arrays: Iterable[Any]) -> list[Any]:
    """The same arrays, which cannot be had before `x`: no number is larger than infinity, but XLA does not know that."""
    never = ops.any(ops.greater(ops.reshape(x, (-1,))[:1], float("inf")))
    return [ops.add(each, ops.cast(never, each.dtype)) for each in arrays]


@functools.cache
def _torch_frozen_product() -> Any:
    """Return `frozen_product` for torch, which computes when it is told to: it needs the gradient alone."""
    import torch

    class FrozenProduct(torch.autograd.Function):
        @staticmethod
        def forward(product: Any, gradient: Any, x: Any, *stored: Any) -> Any:
            return product(x, *stored)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            _, ctx.gradient, _, *stored = inputs
            ctx.save_for_backward(*stored)

        @staticmethod
        def backward(ctx: Any, dy: Any) -> tuple[Any, ...]:
            stored = ctx.saved_tensors
            return None, None, ctx.gradient(dy, *stored), *(None for _ in stored)

    return FrozenProduct


def tensor_of(variable: keras.Variable) -> Any:
    """The value of a variable now, as a tensor: TensorFlow would give the variable itself, and so would torch."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.convert_to_tensor(variable.value)
    if keras.backend.backend() == "torch" and not variable.trainable:
        return variable.value.detach()
    return ops.convert_to_tensor(variable)


def write(variable: keras.Variable, value: Any) -> None:
    """Assign a value, and leave what `tensor_of` gave before as it is: torch would write into the same memory."""
    if keras.backend.backend() == "torch" and not variable.trainable:
        variable.value.data = value.detach()
    else:
        variable.assign(value)


def rematerialized(
    function: Callable[..., list[Any]], inputs: list[Any], trained: list[Any], frozen: list[Any]
) -> list[Any]:
    """Return `function(inputs, trained, frozen)`, a list of tensors, which runs again when its gradient is needed.

    `frozen` has no gradient. XLA merges equal computations and would keep the first run, so `inputs` depend on the upstream
    gradient in the second, in a way that changes nothing (on a CPU it drops the barriers of `jax.checkpoint`).
    """
    if keras.backend.backend() == "torch":
        import torch

        if not torch.is_grad_enabled():
            return function(inputs, trained, frozen)
        from torch.utils.checkpoint import checkpoint

        found: list[Any] = checkpoint(function, inputs, trained, frozen, use_reentrant=False)
        return found
    with_gradient = _jax_rematerialized if keras.backend.backend() == "jax" else _tensorflow_rematerialized
    return with_gradient(function, inputs, trained, frozen)


def _tied(inputs: Iterable[Any], dys: Iterable[Any]) -> list[Any]:
    """The same tensors, which cannot be had before these gradients."""
    inputs = list(inputs)
    for dy in dys:
        numbers = [i for i, each in enumerate(inputs) if keras.backend.standardize_dtype(each.dtype) != "bool"]
        for i, tied in zip(numbers, _not_before(dy, [inputs[i] for i in numbers]), strict=True):
            inputs[i] = tied
    return inputs


def _is_float(tensor: Any) -> bool:
    found: bool = keras.backend.is_float_dtype(keras.backend.standardize_dtype(tensor.dtype))
    return found


def _jax_rematerialized(function: Any, inputs: list[Any], trained: list[Any], frozen: list[Any]) -> list[Any]:
    import jax

    run, captured = jax.closure_convert(function, inputs, trained, frozen)

    def first(*given: Any) -> Any:
        inputs, trained, frozen, captured = given
        return run(inputs, trained, frozen, *captured)

    def backward(given: Any, dys: Any) -> Any:
        inputs, trained, frozen, captured = given
        floats = [i for i, each in enumerate(inputs) if _is_float(each)]
        tied = _tied(inputs, [dy for dy in dys if dy.dtype != jax.dtypes.float0 and dy.size])

        def of(of_inputs: list[Any], trained: list[Any], captured: list[Any]) -> Any:
            given = list(tied)
            for i, each in zip(floats, of_inputs, strict=True):
                given[i] = each
            return run(given, trained, frozen, *captured)

        d_inputs, d_trained, d_captured = jax.vjp(of, [tied[i] for i in floats], trained, captured)[1](dys)
        found: list[Any] = [None] * len(inputs)
        for i, each in zip(floats, d_inputs, strict=True):
            found[i] = each
        return found, d_trained, [None] * len(frozen), d_captured

    again: Any = jax.custom_vjp(first)
    again.defvjp(lambda *given: (first(*given), given), backward)
    return list(again(inputs, trained, frozen, captured))


def _tensorflow_rematerialized(function: Any, inputs: list[Any], trained: list[Any], frozen: list[Any]) -> list[Any]:
    import tensorflow as tf

    ends = len(inputs), len(inputs) + len(trained)

    def run(given: Sequence[Any]) -> list[Any]:
        return list(function(list(given[: ends[0]]), list(given[ends[0] : ends[1]]), list(given[ends[1] :])))

    def first(*given: Any) -> Any:
        def backward(*dys: Any) -> list[Any]:
            tied = [*_tied(given[: ends[0]], [dy for dy in dys if dy is not None and _is_float(dy)]), *given[ends[0] :]]
            floats = [i for i, each in enumerate(tied[: ends[1]]) if _is_float(each)]
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch([tied[i] for i in floats])
                outputs = run(tied)
            pairs = [(y, dy) for y, dy in zip(outputs, dys, strict=True) if _is_float(y) and dy is not None]
            found: list[Any] = [None] * len(given)
            ys, upstream = zip(*pairs, strict=True)
            gradients = tape.gradient(ys, [tied[i] for i in floats], output_gradients=upstream)
            for i, each in zip(floats, gradients, strict=True):
                found[i] = each
            return found

        return run(given), backward

    return list(tf.custom_gradient(first)(*inputs, *trained, *frozen))


def low_rank_sum(
    x: Any, a: Any, b: Any, scale: float, strength: Any, *, y: Any = None, kernel: Any = None, kept: Any = None
) -> Any:
    """Return `strength · scale · (x a) b`, added to `y` or to `x kernel`, whichever is given.

    Args:
        x: `(n, in)`, in the compute dtype.
        a, b: The factors `(in, rank)` and `(rank, out)`, in their stored dtype.
        scale: A number.
        strength: A scalar tensor, which does not train.
        y: `(n, out)`.
        kernel: `(in, out)`.
        kept: Frozen factors `c`, `d` like `a` and `b`, for `strength · (x c) d` beside it. They get no gradient.

    Its speed depends on how it is written. The gradient of `a` is `xᵀ dh`, a product with few columns, and that shape is
    slow: on one CPU core, it takes several times as long as its transpose `dhᵀ x` (`benchmarks/products.py`). So both
    branches compute the transpose.
    """
    if keras.backend.backend() == "torch":
        dtype = x.dtype
        a, b = ops.cast(a, dtype), ops.cast(b, dtype)
        c, d = (None, None) if kept is None else (ops.cast(each, dtype) for each in kept)
        return _torch_low_rank_sum(x, a, b, scale, ops.convert_to_tensor(strength), y, kernel, c, d)
    # Without a multiplication between them, XLA would swap the factors of `dhᵀ x` back to save the transposition.
    a = ops.cast(ops.transpose(ops.multiply(ops.multiply(scale, strength), ops.transpose(a))), x.dtype)
    base = ops.matmul(x, kernel) if y is None else y
    if kept is not None:
        c, d = ops.multiply(strength, kept[0]), ops.convert_to_tensor(kept[1])
        base = ops.add(base, ops.matmul(ops.matmul(x, ops.cast(c, x.dtype)), ops.cast(d, x.dtype)))
    return ops.add(base, ops.matmul(ops.matmul(x, a), ops.cast(b, x.dtype)))


def kronecker_sum(x: Any, c: Any, a: Any, b: Any, scale: float, strength: Any, y: Any) -> Any:
    """Return `y + strength · scale · x (c ⊗ (a b))`, without the Kronecker product.

    A row has parts: each part times `a`, then the parts mixed by `c`, then each of the results times `b`. On torch, Keras's
    operations around such small arrays take as long as the arithmetic.

    Args:
        x: `(rows, m · p)`, in the compute dtype.
        c, a, b: `(m, n)`, `(p, rank)` and `(rank, q)`, in their stored dtype.
        scale: A number.
        strength: A scalar tensor, which does not train.
        y: `rows · n · q` numbers, in any shape.
    """
    m, q = c.shape[0], b.shape[-1]
    p, r = a.shape
    c, a, b = (ops.cast(factor, x.dtype) for factor in (c, a, b))
    if keras.backend.backend() == "torch":
        import torch

        h = torch.matmul(c.t(), torch.mm(x.reshape(-1, p), a).reshape(-1, m, r)).reshape(-1, r)
        b = b * (scale * ops.convert_to_tensor(strength)).to(b.dtype)
        return torch.addmm(y.reshape(-1, q), h, b).reshape(y.shape)
    h = ops.matmul(ops.transpose(c), ops.reshape(ops.matmul(ops.reshape(x, (-1, p)), a), (-1, m, r)))
    b = ops.multiply(b, ops.cast(ops.multiply(scale, strength), b.dtype))
    return ops.add(y, ops.reshape(ops.matmul(ops.reshape(h, (-1, r)), b), ops.shape(y)))


def _torch_low_rank_sum(
    x: Any, a: Any, b: Any, scale: float, strength: Any, y: Any, kernel: Any, c: Any = None, d: Any = None
) -> Any:
    """`low_rank_sum` for torch, which can add a product to an array in place. Allocating arrays is the main cost there."""
    import torch

    if torch.is_grad_enabled() and not _torch_transforms(x):
        return _torch_function().apply(x, a, b, scale, strength, y, kernel, c, d)[0]
    base = torch.mm(x, kernel) if y is None else y
    if c is not None:
        base = torch.addmm(base, torch.mm(x, c) * strength.to(x.dtype), d)
    return torch.addmm(base, torch.mm(x, a) * (scale * strength).to(x.dtype), b)


def _torch_transforms(x: Any) -> bool:
    """Whether torch compiles, traces, autocasts, vectorises or differentiates forward; these need torch's operations."""
    import torch

    inside = torch._C._functorch.maybe_current_level() is not None or torch.autograd.forward_ad._current_level >= 0
    jit: Any = torch.jit
    traces = torch.compiler.is_compiling() or jit.is_tracing()  # for an export
    return inside or traces or torch.is_autocast_enabled(x.device.type)


@functools.cache
def _torch_function() -> Any:
    """Return `low_rank_sum` with a written-out gradient, which makes two large arrays instead of torch's six.

    It keeps `x` only if `a` (or the kernel) trains, and `x a` only if `b` trains. `(x a)ᵀ` is an output too, so that the
    second derivative is correct: torch differentiates `backward`. A kept pair `c d` is a part of the thin products, whose
    cost is that of the large array on their other side; the gradients are taken of the trained part alone.
    """
    import torch

    class LowRankSum(torch.autograd.Function):
        @staticmethod
        def forward(
            x: Any, a: Any, b: Any, scale: float, strength: Any, y: Any, kernel: Any, c: Any, d: Any
        ) -> tuple[Any, Any]:
            all_a, all_b = _with_kept(a, _scaled(b, scale, strength), strength, c, d)
            ht = torch.mm(all_a.t(), x.t())
            total = torch.addmm(y, ht.t(), all_b) if kernel is None else torch.mm(x, kernel).addmm_(ht.t(), all_b)
            return total, ht if c is None else ht[: a.shape[1]].clone()

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            x, a, b, ctx.scale, strength, _, kernel, c, d = inputs
            _, of_a, of_b, _, _, _, of_kernel, _, _ = ctx.needs_input_grad
            ctx.save_for_backward(
                x if of_a or of_kernel else None, a, b, strength, kernel, c, d, output[1] if of_b else None
            )
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx: Any, dy: Any, dht: Any) -> tuple[Any, ...]:
            x, a, b, strength, kernel, c, d, ht = ctx.saved_tensors
            of_x, of_a, of_b, _, _, _, of_kernel, _, _ = ctx.needs_input_grad
            if dy is None and dht is None:
                return (None,) * 9
            if dy is None:  # only `(x a)ᵀ` was used, by a second differentiation
                dx = torch.mm(dht.t(), a.t()) if of_x else None
                return dx, torch.mm(dht, x).t() if of_a else None, *(None,) * 7
            all_a, all_b = _with_kept(a, _scaled(b, ctx.scale, strength), strength, c, d)
            through_b = torch.mm(all_b if of_x else all_b[: a.shape[1]], dy.t())
            own, kept = through_b[: a.shape[1]], through_b[a.shape[1] :]
            all_dht = through_b if dht is None else torch.cat([own + dht, kept])
            dht = all_dht[: a.shape[1]]
            dx = None
            if of_x:
                through = all_dht.t(), all_a.t()
                dx = torch.mm(*through) if kernel is None else torch.mm(dy, kernel.t()).addmm_(*through)
            da = torch.mm(dht, x).t() if of_a else None
            db = _scaled(torch.mm(ht, dy), ctx.scale, strength) if of_b else None
            dkernel = torch.mm(x.t(), dy) if of_kernel else None
            return dx, da, db, None, None, dy if kernel is None else None, dkernel, None, None

    def _with_kept(a: Any, scaled: Any, strength: Any, c: Any, d: Any) -> tuple[Any, Any]:
        if c is None:
            return a, scaled
        return torch.cat([a, c], 1), torch.cat([scaled, _scaled(d, 1.0, strength)])

    def _scaled(m: Any, scale: float, strength: Any) -> Any:
        return m * (scale * strength).to(m.dtype)

    return LowRankSum


def traces_memory() -> bool:
    """Whether `step_memory` works here: XLA can count the bytes of a program that it does not run."""
    found: bool = keras.backend.backend() == "jax"
    return found


def shapes_of(function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function` returns, as shapes. Arguments are anything with a shape and a dtype."""
    import jax

    return jax.eval_shape(function, *_as_shapes(arguments))


def value_and_gradient(function: Callable[..., Any], variables: Any, *others: Any) -> Any:
    """The value of `function`, a pair of a loss and more, and the gradient of `variables`, on JAX."""
    import jax

    return jax.value_and_grad(function, has_aux=True)(variables, *others)


def kept_bytes(function: Callable[..., Any], variables: Any, *others: Any) -> int:
    """The bytes that JAX keeps from `function(variables, *others)` for the gradient of `variables`, beside its arguments.

    Arguments are anything with a shape and a dtype. Nothing is computed.
    """
    import jax

    variables, others = _as_shapes((variables, others))

    def residuals(variables: Any, others: Any) -> Any:
        return jax.tree.leaves(jax.vjp(lambda each: function(each, *others), variables)[1])

    traced = jax.make_jaxpr(residuals)(variables, others).jaxpr
    given = {id(each) for each in (*traced.invars, *traced.constvars)}
    kept = {id(each): each.aval for each in traced.outvars if id(each) not in given and not hasattr(each, "val")}
    return sum(each.size * each.dtype.itemsize for each in kept.values())


def step_memory(step: Callable[..., Any], state: Any, data: Any) -> dict[str, int]:
    """The bytes of `state, results = step(state, data)` as XLA compiles it, with the memory of the old state reused.

    Arguments are anything with a shape and a dtype. Nothing is computed and no array is made.
    """
    import jax

    compiled = jax.jit(step, donate_argnums=0).lower(*_as_shapes((state, data))).compile()
    found: Any = compiled.memory_analysis()
    held, more = found.argument_size_in_bytes, found.output_size_in_bytes - found.alias_size_in_bytes
    return {"arguments": held, "temporary": found.temp_size_in_bytes, "outputs": more}


def _as_shapes(tree: Any) -> Any:
    import jax

    def shape_of(each: Any) -> Any:
        return jax.ShapeDtypeStruct(tuple(each.shape), keras.backend.standardize_dtype(each.dtype))

    return jax.tree.map(shape_of, tree, is_leaf=lambda each: isinstance(each, keras.Variable | keras.KerasTensor))
