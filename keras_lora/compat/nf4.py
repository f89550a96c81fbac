"""NF4: 4-bit NormalFloat with double quantisation, in plain Keras operations.

A number is one of 16 quantiles of a normal distribution, times the largest absolute value (absmax) of its block of 64.
The absmax of a block is stored in 8 bits: less the mean of all blocks, as one of 256 numbers times the absmax of 256
blocks. That takes 4.127 bits a number. Tables, order and rounding are those of bitsandbytes, so the codes are equal.

Reference:
    [Dettmers et al., 2023](https://arxiv.org/abs/2305.14314)
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_lora import backend
from keras_lora.compat import call_internals

BLOCK = 64
#: Blocks whose absmax share a scale.
GROUP = 256
#: Numbers that are quantised at a time, so that the arrays in between stay small.
_AT_A_TIME = 64 * BLOCK * GROUP
#: The least absmax: a little above the smallest number that XLA does not take for 0.
_SMALLEST = 1.2e-38

#: Table 5 of the paper.
TABLE = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
        *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    "float32",
)
#: The two numbers in each byte. The first has the high bits.
PAIRS = np.stack([np.repeat(TABLE, 16), np.tile(TABLE, 16)], axis=1)


def _dynamic_table() -> np.ndarray:
    """The 256 numbers of an absmax: one sign, a decimal exponent of 0 to -6, and equal steps in the bits that are left."""
    found: list[float] = [0.0, 1.0]
    for exponent in range(7):
        count = 2**exponent
        place, step = np.arange(count + 1), float(np.float32(0.9) / np.float32(count))
        # From the nearer end and rounded once, as `torch.linspace` does, to have the same last digit.
        bounds = np.where(place < (count + 1) // 2, np.float32(0.1) + step * place, 1 - step * (count - place))
        bounds = bounds.astype("float32")
        steps = (bounds[:-1] + bounds[1:]) / np.float32(2)
        steps = np.float32(10.0 ** (exponent - 6)) * steps
        found += [*steps.tolist(), *(-steps).tolist()]
    return np.sort(np.array(found, "float32"))


ABSMAX_TABLE = _dynamic_table()


class Packed(NamedTuple):
    """A float array in NF4.

    Attributes:
        codes: Two numbers a byte, uint8.
        absmax: A code for each block, uint8.
        scale: The scale of each group of blocks, float32.
        mean: The mean of the absmax of all blocks, float32.
    """

    codes: Any
    absmax: Any
    scale: Any
    mean: Any


#: The dtypes of the parts.
DTYPES = Packed("uint8", "uint8", "float32", "float32")


def shapes(size: int) -> Packed:
    """The shapes of the parts for an array of `size` numbers."""
    blocks = math.ceil(size / BLOCK)
    return Packed((math.ceil(size / 2),), (blocks,), (math.ceil(blocks / GROUP),), ())


def quantize(numbers: Any) -> Packed:
    """Quantise an array in its own order; a block may be shorter at the end."""
    flat = ops.reshape(numbers, (-1,))
    parts = [_quantize_part(flat[start : start + _AT_A_TIME]) for start in range(0, flat.shape[0], _AT_A_TIME)]
    codes, absmax = (ops.concatenate(each, axis=0) if len(each) > 1 else each[0] for each in zip(*parts, strict=True))
    mean = ops.mean(absmax)
    steps, scale = _nearest(ops.subtract(absmax, mean), ABSMAX_TABLE, GROUP)
    return Packed(codes, steps, scale, mean)


def _quantize_part(flat: Any) -> tuple[Any, Any]:
    nibbles, absmax = _nearest(ops.cast(flat, "float32"), TABLE, BLOCK)
    if flat.shape[0] % 2:
        nibbles = ops.pad(nibbles, (0, 1), constant_values=_ZERO)
    high, low = ops.unstack(ops.reshape(nibbles, (-1, 2)), axis=1)
    return ops.add(ops.multiply(high, np.uint8(16)), low), absmax


#: The code of 0.
_ZERO = 7


def _nearest(flat: Any, table: np.ndarray, block: int) -> tuple[Any, Any]:
    """The place in a sorted table of each number ÷ absmax of its block, as uint8, and the absmax of each block."""
    size = flat.shape[0]
    rows = ops.reshape(ops.pad(flat, (0, -size % block)), (-1, block))
    absmax = ops.max(ops.abs(rows), axis=1)
    small = ops.maximum(absmax, _SMALLEST)
    part = ops.clip(ops.multiply(rows, ops.expand_dims(ops.divide(1.0, small), 1)), -1.0, 1.0)
    if size % block:  # bitsandbytes divides the last, shorter block
        last = ops.clip(ops.divide(rows[-1:], small[-1]), -1.0, 1.0)
        part = ops.concatenate([part[:-1], last], axis=0)
    bounds = (table[:-1] + table[1:]) / np.float32(2)
    if len(bounds) > BLOCK:
        places = ops.cast(ops.searchsorted(ops.convert_to_tensor(bounds), ops.reshape(part, (-1,))), "uint8")
    else:
        places = ops.zeros(part.shape, "uint8")
        for bound in bounds:
            places = ops.add(places, ops.cast(ops.greater(part, bound), "uint8"))
    return ops.reshape(places, (-1,))[:size], absmax


def block_sizes(packed: Packed) -> Any:
    """The absmax of each block, from its 8 bits."""
    steps = backend.look_up(ABSMAX_TABLE, packed.absmax)
    blocks = packed.absmax.shape[0]
    scale = packed.scale if blocks <= GROUP else ops.repeat(packed.scale, GROUP)[:blocks]
    return ops.add(ops.multiply(steps, scale), packed.mean)


def dequantize(packed: Packed, shape: tuple[int, ...], dtype: str = "float32", swapped: bool = False) -> Any:
    """The float array of this shape; with its last two axes `swapped` after that, if asked for."""
    if call_internals.runs_inference():  # an exported model may run where there is no XLA
        return _dequantize(packed, shape, dtype, swapped)
    return backend.as_one_kernel(_dequantize, packed, shape, dtype, swapped)


def _dequantize(packed: Packed, shape: tuple[int, ...], dtype: str, swapped: bool) -> Any:
    size = math.prod(shape)
    short = -packed.codes.shape[0] % (BLOCK // 2)
    codes = ops.pad(packed.codes, (0, short)) if short else packed.codes
    values = ops.reshape(backend.look_up(PAIRS, codes), (-1, BLOCK))
    values = ops.multiply(values, ops.expand_dims(block_sizes(packed), 1))
    flat = ops.reshape(values, (-1,))
    flat = flat if flat.shape[0] == size else flat[:size]
    found = ops.cast(ops.reshape(flat, shape), dtype)
    return ops.swapaxes(found, -1, -2) if swapped else found


def rows(packed: Packed, shape: tuple[int, int], index: Any, dtype: str = "float32") -> Any:
    """Some rows of a table of this shape, without forming the table."""
    width = shape[1]
    if width % 2:
        return ops.take(dequantize(packed, shape, dtype), index, axis=0)
    index = ops.expand_dims(ops.cast(index, "int32"), -1)
    # The vector first: Keras on TensorFlow takes a second one for a bias of axis 1 if it is as long as that axis.
    bytes_at = ops.add(np.arange(width // 2, dtype="int32"), ops.multiply(index, width // 2))
    values = backend.look_up(PAIRS, ops.take(packed.codes, bytes_at, axis=0))
    block = ops.floor_divide(bytes_at, BLOCK // 2)
    steps = backend.look_up(ABSMAX_TABLE, ops.take(packed.absmax, block, axis=0))
    scale = ops.take(packed.scale, ops.floor_divide(block, GROUP), axis=0)
    sizes = ops.add(ops.multiply(steps, scale), packed.mean)
    values = ops.multiply(values, ops.expand_dims(sizes, -1))
    return ops.cast(ops.reshape(values, (*ops.shape(bytes_at)[:-1], width)), dtype)
