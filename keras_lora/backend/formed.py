"""A product with the changed kernel, formed for one call, whose gradient is that of the thin factors."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_lora.backend.products import torch_transforms, transposed


class Shifts(NamedTuple):
    """A window that moves by one step at a time over an input with its channels last.

    The gradient of a thin convolution with respect to its kernel is slow on a CPU. As one matrix product of the input and
    all shifts of the output's gradient it takes a small part of that time.
    """

    window: Sequence[int]
    steps: Sequence[int]  # the distance of its entries along each axis
    outside: Sequence[tuple[int, int]]  # how many zeros the layer adds before and after each axis

    @property
    def starts(self) -> list[tuple[int, ...]]:
        """For each entry of the window, where it is."""
        axes = zip(self.window, self.steps, strict=True)
        return list(itertools.product(*(range(0, size * step, step) for size, step in axes)))

    @property
    def outside_back(self) -> list[tuple[int, int]]:
        """How many zeros around the output's gradient show a window of it to each position of the input."""
        reach = ((size - 1) * step for size, step in zip(self.window, self.steps, strict=True))
        return [(each - before, each - after) for each, (before, after) in zip(reach, self.outside, strict=True)]


class Parts(NamedTuple):
    """What a layer computes with a matrix in the place of its kernel, all linear in both arguments."""

    apply: Callable[[Any, Any], Any]  # x, matrix (in, out)
    contract: Callable[[Any, Any], Any]  # x, a (in, rank) -> h
    expand: Callable[[Any, Any], Any]  # h, b (rank, out)
    channels_last: bool
    shifts: Shifts | None


def formed_sum(parts: Parts, x: Any, matrix: Any, a: Any, b: Any) -> Any:
    """Return `apply(x, matrix + a b)`.

    The gradients of `a` and `b` are computed from `h = contract(x, a)`, so none of the size of the kernel is. That of
    `x` takes one product with the changed kernel. `matrix` gets the gradient of the whole, if it trains.
    """
    if keras.backend.backend() == "torch":
        import torch

        if not torch.is_grad_enabled() or torch_transforms(x) or matrix.requires_grad:
            return parts.apply(x, torch.addmm(matrix, a, b))
        return _torch_function().apply(parts, x, matrix, a, b)
    with_gradient = _jax_sum if keras.backend.backend() == "jax" else _tensorflow_sum
    return with_gradient(parts, x, matrix, a, b)


def _whole(parts: Parts, x: Any, matrix: Any, a: Any, b: Any) -> Any:
    return parts.apply(x, ops.add(matrix, ops.matmul(a, b)))


def _jax_sum(parts: Parts, x: Any, matrix: Any, a: Any, b: Any) -> Any:
    """By the rule of a directional derivative, which JAX transposes for the gradient, and differentiates again."""
    import jax

    function: Any = jax.custom_jvp(functools.partial(_whole, parts))
    contract = parts.contract if parts.shifts is None else functools.partial(_contract_by_shifts, parts.shifts)

    def rule(given: Any, moves: Any) -> tuple[Any, Any]:
        x, matrix, a, b = given
        terms: tuple[Any, ...] = (
            lambda dx: _whole(parts, dx, matrix, a, b),
            lambda dmatrix: parts.apply(x, dmatrix),
            lambda da: parts.expand(contract(x, da), b),
            lambda db: parts.expand(parts.contract(x, a), db),
        )
        moving = [not isinstance(each, jax.custom_derivatives.SymbolicZero) for each in moves]
        found = [term(move) for term, move, does in zip(terms, moves, moving, strict=True) if does]
        y = function(*given)
        return y, sum(found[1:], start=found[0]) if found else jax.numpy.zeros_like(y)

    function.defjvp(rule, symbolic_zeros=True)
    return function(x, matrix, a, b)


def _contract_by_shifts(shifts: Shifts, x: Any, a: Any) -> Any:
    """`contract` as one product with all entries of the window, and the sum of its shifted parts."""
    rank, channels = a.shape[-1], x.shape[-1]
    apart = ops.reshape(ops.transpose(ops.reshape(a, (-1, channels, rank)), (1, 0, 2)), (channels, -1))
    z = ops.pad(ops.matmul(x, apart), [(0, 0), *shifts.outside, (0, 0)])
    return _sum_of_shifts(shifts, [z[..., i * rank : (i + 1) * rank] for i in range(math.prod(shifts.window))], 1)


def _sum_of_shifts(shifts: Shifts, parts: Sequence[Any], first: int) -> Any:
    """The sum of parts, one for each entry of the window, each cut where its entry is. `first` is the first axis of them."""
    reach = [(size - 1) * step for size, step in zip(shifts.window, shifts.steps, strict=True)]
    sizes = [parts[0].shape[first + axis] - each for axis, each in enumerate(reach)]
    before = (slice(None),) * first
    cuts = [(*before, *(slice(s, s + n) for s, n in zip(at, sizes, strict=True))) for at in shifts.starts]
    total = parts[0][cuts[0]]
    for part, cut in zip(parts[1:], cuts[1:], strict=True):
        total = total + part[cut]
    return total


def _tensorflow_sum(parts: Parts, x: Any, matrix: Any, a: Any, b: Any) -> Any:
    import tensorflow as tf

    def function(x: Any, matrix: Any, a: Any, b: Any) -> Any:
        def grad(dy: Any) -> tuple[Any, ...]:
            kernel = ops.add(matrix, ops.matmul(a, b))
            dx = transposed(parts.apply, tf.shape(x), x.dtype, dy, (kernel,))
            return dx, of_matrix(dy), *_of_factors(parts, x, dy, a, b)

        def of_matrix(dy: Any) -> Any:  # a graph does not run what is not used
            with tf.GradientTape() as tape:
                tape.watch(matrix)
                y = parts.apply(x, matrix)
            return tape.gradient(y, matrix, dy)

        return _whole(parts, x, matrix, a, b), grad

    return tf.custom_gradient(function)(x, *(tf.convert_to_tensor(each) for each in (matrix, a, b)))


def _of_factors(parts: Parts, x: Any, dy: Any, a: Any, b: Any) -> tuple[Any, Any]:
    """The gradients of `a` and `b`, by Keras's operations."""
    dh, h = parts.expand(dy, ops.transpose(b)), parts.contract(x, a)
    da = (
        _of_a_by_shifts(parts.shifts, x, dh)
        if parts.shifts
        else transposed(lambda a, x: parts.contract(x, a), a.shape, x.dtype, dh, (x,))
    )
    if not parts.channels_last:
        h, dy = (ops.moveaxis(each, 1, -1) for each in (h, dy))
    h, dy = (ops.reshape(each, (-1, each.shape[-1])) for each in (h, dy))
    return da, ops.matmul(ops.transpose(h), dy)


def _of_a_by_shifts(shifts: Shifts, x: Any, dh: Any) -> Any:
    rank, channels, count = dh.shape[-1], x.shape[-1], math.prod(shifts.window)
    dh = ops.pad(dh, [(0, 0), *shifts.outside_back, (0, 0)])
    cuts = ([slice(s, s + n) for s, n in zip(at, x.shape[1:-1], strict=True)] for at in shifts.starts)
    seen = ops.concatenate([dh[(slice(None), *cut)] for cut in cuts], axis=-1)
    found = ops.matmul(ops.transpose(ops.reshape(seen, (-1, count * rank))), ops.reshape(x, (-1, channels)))
    # The first entry of a window of `dh` belongs to the last entry of the window of `x`.
    found = ops.flip(ops.reshape(found, (count, rank, channels)), 0)
    return ops.reshape(ops.transpose(found, (0, 2, 1)), (-1, rank))


def _torch_of_factors(shifts: Shifts, x: Any, dy: Any, a: Any, b: Any) -> tuple[Any, Any]:
    """The gradients of `a` and `b` in torch's own operations, of which the thin arrays have their long axes last.

    Around arrays this small, Keras's operations take as long as the arithmetic.
    """
    import torch

    rank, channels, sizes = a.shape[1], x.shape[-1], x.shape[:-1]
    rows, out = x.reshape(-1, channels), dy.reshape(-1, dy.shape[-1])
    around = [side for pair in reversed(shifts.outside_back) for side in pair]
    dh = torch.nn.functional.pad(torch.mm(b, out.t()).view(rank, *dy.shape[:-1]), around)
    first, batch, *along = dh.stride()
    inside = (each * step for each, step in zip(along, shifts.steps, strict=True))
    seen = dh.as_strided((*shifts.window, rank, *sizes), (*inside, first, batch, *along))
    found = torch.mm(seen.reshape(-1, rows.shape[0]), rows).view(-1, rank, channels)
    # The first entry of a window of `dh` belongs to the last entry of the window of `x`.
    da = found.flip(0).transpose(1, 2).reshape(-1, rank)

    apart = a.view(-1, channels, rank).transpose(1, 2).reshape(-1, channels)
    z = torch.mm(apart, rows.t()).view(-1, rank, *sizes)
    z = torch.nn.functional.pad(z, [side for pair in reversed(shifts.outside) for side in pair])
    h = _sum_of_shifts(shifts, z.unbind(0), 2)
    return da, torch.mm(h.reshape(rank, -1), out)


@functools.cache
def _torch_function() -> Any:
    import torch

    class FormedSum(torch.autograd.Function):
        """It keeps the changed kernel for the gradient of `x`, as a plain layer keeps its own."""

        @staticmethod
        def forward(ctx: Any, parts: Any, x: Any, matrix: Any, a: Any, b: Any) -> Any:
            ctx.parts, ctx.graph = parts, None
            ctx.save_for_backward(x, matrix, a, b)
            kernel = torch.addmm(matrix, a, b)
            if not ctx.needs_input_grad[1]:
                return parts.apply(x, kernel)
            with torch.enable_grad():
                given = x.detach().requires_grad_()
                y = parts.apply(given, kernel)
            ctx.graph = given, y
            return y.detach()

        @staticmethod
        def backward(ctx: Any, dy: Any) -> tuple[Any, ...]:
            parts, (x, matrix, a, b) = ctx.parts, ctx.saved_tensors
            wanted = [ctx.needs_input_grad[place] for place in (1, 3, 4)]
            if torch.is_grad_enabled():  # the gradient is differentiated too
                inputs = [each for each, of in zip((x, a, b), wanted, strict=True) if of]
                found = iter(torch.autograd.grad(parts.apply(x, matrix + a @ b), inputs, dy, create_graph=True))
                dx, da, db = (next(found) if of else None for of in wanted)
                return None, dx, None, da, db
            dx = torch.autograd.grad(ctx.graph[1], ctx.graph[0], dy)[0] if wanted[0] else None
            ctx.graph = da = db = None
            if wanted[1] or wanted[2]:
                of_factors = functools.partial(_of_factors, parts)
                if parts.shifts is not None:
                    of_factors = functools.partial(_torch_of_factors, parts.shifts)
                da, db = of_factors(x, dy, a, b)
            return None, dx, None, da, db

    return FormedSum
