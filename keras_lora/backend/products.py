"""Products of a layer, with gradients of their own where a backend's keep or compute too much."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_lora.backend import dropping
from keras_lora.backend.dropping import Drop


def frozen_product(product: Callable[..., Any], gradient: Callable[..., Any] | None, x: Any, stored: Sequence[Any]) -> Any:
    """Return `product(x, *stored)`, linear in `x`, of a kernel that is formed from what is stored of it.

    `gradient(dy, *stored)` gives the gradient of `x`, and forms the kernel again; if it is `None`, the product is
    differentiated. What is stored has no gradient, and nothing else is kept.

    XLA would form the kernels of all layers before anything else, and keep them for the gradients: a float copy of the
    whole model. So here what is stored depends on `x`, or on `dy`, in a way that changes nothing.
    """
    if keras.backend.backend() == "torch":
        import torch

        if not torch.is_grad_enabled() or not x.requires_grad or torch_transforms(x):
            return product(x, *stored)
        if gradient is None:
            shape, dtype = x.shape, x.dtype
            gradient = lambda dy, *stored: transposed(product, shape, dtype, dy, stored)  # noqa: E731
        return _torch_frozen_product().apply(product, gradient, x, *stored)

    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        stored = [tf.convert_to_tensor(each) for each in stored]  # Keras's `convert_to_tensor` returns variables as they are

    def with_gradient(x: Any, *stored: Any) -> tuple[Any, Callable[..., Any]]:
        shape, dtype = ops.shape(x), x.dtype

        def grad(*args: Any, upstream: Any = None) -> tuple[Any, ...]:
            dy = args[-1] if upstream is None else upstream
            late = _not_before(dy, stored)
            dx = transposed(product, shape, dtype, dy, late) if gradient is None else gradient(dy, *late)
            return dx, *(None for _ in stored)

        return product(x, *_not_before(x, stored)), grad

    return ops.custom_gradient(with_gradient)(x, *stored)


def transposed(product: Callable[..., Any], shape: Any, dtype: Any, dy: Any, stored: Sequence[Any]) -> Any:
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

    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # ONNX has no word for the view below
        return torch.from_numpy(table).to(index.device)[index.to(torch.int32)]
    # `ops.take` makes indices of 64 bits, which takes longer than all the rest. Two numbers are moved as one of 64 bits.
    words = torch.from_numpy(table.view("int64" if table.ndim == 2 else "float32").reshape(-1)).to(index.device)
    found = torch.index_select(words, 0, index.reshape(-1).to(torch.int32))
    return found.view(torch.float32).reshape(*index.shape, *table.shape[1:])


def as_one_kernel(function: Callable[..., Any], arrays: Any, *fixed: Any) -> Any:
    """Return `function(arrays, *fixed)`. On TensorFlow, XLA compiles it, which looks numbers up faster.

    Args:
        function: Of arrays in a tuple, and of values that can be hashed. Nothing differentiates it.
    """
    if keras.backend.backend() != "tensorflow":
        return function(arrays, *fixed)
    return _tensorflow_kernel(function, *fixed)(type(arrays)(*(ops.convert_to_tensor(each) for each in arrays)))


@functools.cache
def _tensorflow_kernel(function: Callable[..., Any], *fixed: Any) -> Any:
    """One for each shape: TensorFlow warns of a function that it traces for many."""
    import tensorflow as tf

    return tf.function(lambda arrays: function(arrays, *fixed), jit_compile=True)


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


def low_rank_sum(
    x: Any,
    a: Any,
    b: Any,
    scale: float,
    strength: Any,
    *,
    y: Any = None,
    kernel: Any = None,
    kept: Any = None,
    drop: Drop | None = None,
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
        drop: Which entries of `x` are left out on their way to `a`, and the others scaled.

    Its speed depends on how it is written. The gradient of `a` is `xᵀ dh`, a product with few columns, and that shape is
    slow: on one CPU core, it takes several times as long as its transpose `dhᵀ x` (`benchmarks/products.py`). So both
    branches compute the transpose.
    """
    if drop is not None:
        scale = scale / (1 - drop.rate)
    if keras.backend.backend() == "torch":
        dtype = x.dtype
        a, b = ops.cast(a, dtype), ops.cast(b, dtype)
        c, d = (None, None) if kept is None else (ops.cast(each, dtype) for each in kept)
        return _torch_low_rank_sum(x, a, b, scale, ops.convert_to_tensor(strength), y, kernel, c, d, drop)
    # Without a multiplication between them, XLA would swap the factors of `dhᵀ x` back to save the transposition.
    a = ops.cast(ops.transpose(ops.multiply(ops.multiply(scale, strength), ops.transpose(a))), x.dtype)
    base = ops.matmul(x, kernel) if y is None else y
    if kept is not None:
        c, d = ops.multiply(strength, kept[0]), ops.convert_to_tensor(kept[1])
        base = ops.add(base, ops.matmul(ops.matmul(x, ops.cast(c, x.dtype)), ops.cast(d, x.dtype)))
    h = ops.matmul(x, a) if drop is None else dropping.dropped_product(x, a, drop)
    return ops.add(base, ops.matmul(h, ops.cast(b, x.dtype)))


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
    x: Any,
    a: Any,
    b: Any,
    scale: float,
    strength: Any,
    y: Any,
    kernel: Any,
    c: Any = None,
    d: Any = None,
    drop: Drop | None = None,
) -> Any:
    """`low_rank_sum` for torch, which can add a product to an array in place. Allocating arrays is the main cost there."""
    import torch

    if drop is not None and c is not None:  # it acts on one of the pairs alone
        y, kernel, c, d = _torch_low_rank_sum(x, c, d, 1.0, strength, y, kernel), None, None, None
    if torch.is_grad_enabled() and not torch_transforms(x):
        draw = None if drop is None else dropping.torch_draw(drop)
        return _torch_function().apply(x, a, b, scale, strength, y, kernel, c, d, draw)[0]
    base = torch.mm(x, kernel) if y is None else y
    if c is not None:
        base = torch.addmm(base, torch.mm(x, c) * strength.to(x.dtype), d)
    x = x if drop is None else dropping.dropped(x, drop)
    return torch.addmm(base, torch.mm(x, a) * (scale * strength).to(x.dtype), b)


def torch_transforms(x: Any) -> bool:
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
            x: Any, a: Any, b: Any, scale: float, strength: Any, y: Any, kernel: Any, c: Any, d: Any, draw: Any
        ) -> tuple[Any, Any]:
            all_a, all_b = _with_kept(a, _scaled(b, scale, strength), strength, c, d)
            given = x if draw is None else x * dropping.torch_mask(x.shape, draw)
            ht = torch.mm(all_a.t(), given.t())
            total = torch.addmm(y, ht.t(), all_b) if kernel is None else torch.mm(x, kernel).addmm_(ht.t(), all_b)
            return total, ht if c is None else ht[: a.shape[1]].clone()

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            x, a, b, ctx.scale, strength, _, kernel, c, d, ctx.draw = inputs
            ctx.rows = x.shape[0]
            _, of_a, of_b, _, _, _, of_kernel, *_ = ctx.needs_input_grad
            ctx.save_for_backward(
                x if of_a or of_kernel else None, a, b, strength, kernel, c, d, output[1] if of_b else None
            )
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx: Any, dy: Any, dht: Any) -> tuple[Any, ...]:
            x, a, b, strength, kernel, c, d, ht = ctx.saved_tensors
            of_x, of_a, of_b, _, _, _, of_kernel, *_ = ctx.needs_input_grad
            if dy is None and dht is None:
                return (None,) * 10
            mask, given = None, x
            if ctx.draw is not None and (of_x or of_a):
                mask = dropping.torch_mask((ctx.rows, a.shape[0]), ctx.draw)
                given = x * mask if of_a else None
            if dy is None:  # only `(x a)ᵀ` was used, by a second differentiation
                dx = torch.mm(dht.t(), a.t()) if of_x else None
                dx = dx if mask is None or dx is None else dx * mask
                return dx, torch.mm(dht, given).t() if of_a else None, *(None,) * 8
            all_a, all_b = _with_kept(a, _scaled(b, ctx.scale, strength), strength, c, d)
            through_b = torch.mm(all_b if of_x else all_b[: a.shape[1]], dy.t())
            own, kept = through_b[: a.shape[1]], through_b[a.shape[1] :]
            all_dht = through_b if dht is None else torch.cat([own + dht, kept])
            dht = all_dht[: a.shape[1]]
            dx = None
            if of_x:
                through = all_dht.t(), all_a.t()
                if kernel is None:
                    dx = torch.mm(*through) if mask is None else torch.mm(*through) * mask
                elif mask is None:
                    dx = torch.mm(dy, kernel.t()).addmm_(*through)
                else:
                    dx = torch.mm(dy, kernel.t()).addcmul_(torch.mm(*through), mask)
            da = torch.mm(dht, given).t() if of_a else None
            db = _scaled(torch.mm(ht, dy), ctx.scale, strength) if of_b else None
            dkernel = torch.mm(x.t(), dy) if of_kernel else None
            return dx, da, db, None, None, dy if kernel is None else None, dkernel, None, None, None

    def _with_kept(a: Any, scaled: Any, strength: Any, c: Any, d: Any) -> tuple[Any, Any]:
        if c is None:
            return a, scaled
        return torch.cat([a, c], 1), torch.cat([scaled, _scaled(d, 1.0, strength)])

    def _scaled(m: Any, scale: float, strength: Any) -> Any:
        return m * (scale * strength).to(m.dtype)

    return LowRankSum
