"""Dropout with one random byte for each entry instead of Keras's four or eight.

On a CPU, drawing random numbers is most of what dropout takes. An entry is dropped if its byte is below a limit. The limit
is `256 · rate`, rounded up or down so that every entry is dropped with probability `rate` exactly: it is `256 · rate + u`
rounded down, and `u` goes through `[0, 1)` evenly from call to call. The share that one call drops is a multiple of 1/256.

The numbers depend on the state that a `SeedGenerator` gives, and on nothing else, so they can be drawn again.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import keras
from keras import ops

#: 2³² divided by the golden ratio: multiples of it, as fractions of 2³², are spread evenly.
_GOLDEN = 0x9E3779B9


class Drop(NamedTuple):
    """Which entries are dropped."""

    rate: float  # the probability, in `[0, 1)`
    drawn: Any  # what `SeedGenerator.next()` returned


def dropped(x: Any, drop: Drop) -> Any:
    """Return `x` with the dropped entries as 0. The others are not scaled."""
    if keras.backend.backend() == "torch":
        return x * torch_mask(x.shape, torch_draw(drop))
    return ops.where(_stay(x, drop), x, ops.zeros((), x.dtype))


def dropped_product(x: Any, a: Any, drop: Drop) -> Any:
    """Return `dropped(x) @ a`, on JAX and TensorFlow. The dropped rows are not kept, but formed again from `x`."""
    if keras.backend.backend() == "tensorflow":
        return _tensorflow_product(x, a, drop)
    return keras.remat(lambda x, a, drawn: ops.matmul(dropped(x, Drop(drop.rate, drawn)), a))(x, a, drop.drawn)


def draws_bytes(x: Any) -> bool:
    """Whether `dropped` can be used: compiled torch code cannot have the generator, and on a GPU reading its seed waits."""
    if keras.backend.backend() != "torch":
        return True
    import torch

    found: bool = x.device.type == "cpu" and not torch.compiler.is_compiling()
    return found


def _stay(x: Any, drop: Drop) -> Any:
    """Which entries of `x` stay, on JAX and TensorFlow."""
    rate, drawn = drop
    bytes_ = _jax_bytes(x.shape, drawn) if keras.backend.backend() == "jax" else _tensorflow_bytes(x, drawn)
    first, count = ops.unstack(ops.cast(drawn, "int32"))
    mixed = ops.cast(ops.add(ops.multiply(count, _GOLDEN - 2**32), first), "float32")
    limit = ops.floor(256 * rate + 0.5 + mixed * 2.0**-32)
    return ops.greater_equal(bytes_, ops.cast(limit, bytes_.dtype))


def _jax_bytes(shape: Any, drawn: Any) -> Any:
    """A random byte for each entry, as uint32. A call of the generator gives 64 bits for 8 neighbours in the last axis.

    `jax.random.bits` takes one call for each byte. All is elementwise, so each device makes the part that it has.
    """
    import jax
    from jax import lax
    from jax.extend.random import threefry2x32_p

    *lead, last = shape or (1,)
    sizes = (*lead, math.ceil(last / 8))
    row = functools.reduce(
        lambda so_far, axis: so_far * sizes[axis] + lax.broadcasted_iota("uint32", sizes, axis),
        range(len(lead)),
        lax.full(sizes, 0, "uint32"),
    )
    column = lax.broadcasted_iota("uint32", sizes, len(lead))
    keys = [lax.broadcast(lax.convert_element_type(each, "uint32"), sizes) for each in drawn]
    words = jax.numpy.stack(threefry2x32_p.bind(*keys, row, column), axis=-1)
    found = lax.bitcast_convert_type(words, "uint8").reshape(*lead, sizes[-1] * 8)
    return lax.convert_element_type(found[..., :last].reshape(shape), "uint32")


def _tensorflow_bytes(x: Any, drawn: Any) -> Any:
    """A random byte for each entry."""
    import tensorflow as tf

    shape = tf.shape(x)
    count = tf.reduce_prod(shape) if x.shape.num_elements() is None else x.shape.num_elements()
    seed = tf.cast(drawn, "int32")
    words = tf.random.stateless_uniform([(count + 3) // 4], seed, minval=None, maxval=None, dtype=tf.uint32)
    found = tf.reshape(tf.bitcast(words, tf.uint8), [-1])
    if not isinstance(count, int) or count % 4:
        found = found[:count]
    return tf.reshape(found, shape)


def _tensorflow_product(x: Any, a: Any, drop: Drop) -> Any:
    """It keeps a boolean for each entry: TensorFlow takes longer to draw them than for all the rest."""
    import tensorflow as tf

    def product(x: Any, a: Any) -> Any:
        stay, zero = _stay(x, drop), tf.zeros((), x.dtype)

        def grad(dh: Any) -> tuple[Any, Any]:
            da = tf.matmul(dh, tf.where(stay, x, zero), transpose_a=True)
            return tf.where(stay, tf.matmul(dh, a, transpose_b=True), zero), tf.transpose(da)

        return tf.matmul(tf.where(stay, x, zero), a), grad

    return tf.custom_gradient(product)(x, a)


def torch_draw(drop: Drop) -> tuple[int, int]:
    """The limit of the bytes, and a seed of 32 bits, which is all that torch's generator on a CPU uses."""
    first, count = (int(each) & 0xFFFFFFFF for each in drop.drawn.tolist())
    mixed = (first + count * _GOLDEN) % 2**32
    limit = math.floor(256 * drop.rate + ((mixed + 2**31) % 2**32) / 2**32)
    for factor in (0x85EBCA6B, 0xC2B2AE35):
        mixed = (mixed ^ mixed >> 15) * factor % 2**32
    return limit, mixed ^ mixed >> 16


def torch_mask(shape: Any, draw: tuple[int, int]) -> Any:
    """Ones and zeros, in bytes: torch multiplies by them faster than by booleans."""
    import torch

    limit, seed = draw
    count = math.prod(shape)
    words = torch.empty((count + 7) // 8, dtype=torch.int64)
    words.random_(-(2**63), None, generator=torch.Generator().manual_seed(seed))
    found = words.view(torch.uint8)[:count].view(shape)
    return found.ge_(limit) if limit < 256 else found.zero_()
