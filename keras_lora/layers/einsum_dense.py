"""`EinsumDense`, and so the projections inside `MultiHeadAttention` and `GroupedQueryAttention`.

The matrix is *all contracted axes × all free axes*, flattened in kernel order. A query kernel `(embed, heads, head)` is
`(embed, heads · head)`: the textbook matrix, which a PEFT file also contains. Keras's `enable_lora` factors only the
last axis, so its `A` is `heads` times as large.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import keras
from keras import ops

from keras_lora.linear_map import LinearMap
from keras_lora.swap.adapted import AdaptedLayer


@dataclass(frozen=True)
class Axes:
    """The role of each letter in an einsum equation. Every field is a string of letters."""

    inputs: str
    kernel: str
    outputs: str
    groups: str  # in the input, the kernel and the output
    contracted: str  # in the input and the kernel
    free: str  # in the kernel and the output
    passed: str  # in the input and the output ("..." included)
    rank: str  # a letter that the equation does not use

    @property
    def is_matmul(self) -> bool:
        """Whether the contracted axes come last in the input and the free axes come last in the output."""
        before = self.inputs.removesuffix(self.contracted)
        return not self.groups and self.inputs == before + self.contracted and self.outputs == before + self.free


@functools.cache
def axes_of(equation: str, groups: str | None = None) -> Axes:
    """Read an equation such as `"abc,cde->abde"`. Keras has checked that every kernel axis is also in the input or output.

    `groups` are the letters of the kernel and the output that are groups; by default, those that are also in the input.
    """
    left, outputs = equation.replace(" ", "").split("->")
    inputs, kernel = left.split(",")
    letters = set(equation) - set(" ,->.")
    if groups is None:
        groups = "".join(axis for axis in kernel if axis in inputs and axis in outputs)
    passed = [axis for axis in outputs.replace("...", "") if axis in inputs and axis not in kernel]
    return Axes(
        inputs=inputs,
        kernel=kernel,
        outputs=outputs,
        groups=groups,
        contracted="".join(axis for axis in kernel if axis in inputs and axis not in outputs),
        free="".join(axis for axis in kernel if axis not in inputs and axis not in groups),
        passed=("..." if "..." in outputs else "") + "".join(passed),
        rank=next(chr(code) for code in range(ord("A"), ord("z")) if chr(code).isalpha() and chr(code) not in letters),
    )


class EinsumMap(LinearMap):
    """A kernel of any shape in an einsum; a subclass defines the equation."""

    @property
    def axes(self) -> Axes:
        """The roles of the letters in the equation."""
        raise TypeError(f"{type(self).__name__} does not say its `axes`.")

    @property
    def kernel_axes(self) -> str:
        axes = self.axes
        return "".join("g" if axis in axes.groups else "i" if axis in axes.contracted else "o" for axis in axes.kernel)

    @property
    def is_matmul(self) -> bool:  # type: ignore[override]
        return self.axes.is_matmul

    @property
    def no_examples(self) -> str | None:  # type: ignore[override]
        axes = self.axes
        first = "..." if axes.inputs.startswith("...") else axes.inputs[0]
        if first in axes.passed and axes.outputs.startswith(first):
            return None
        return "the first axis of its input is not one of examples"

    @property
    def last_axes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self._letter_sizes(self.axes.contracted), self._letter_sizes(self.axes.free)

    def _letter_sizes(self, letters: str) -> tuple[int, ...]:
        sizes = dict(zip(self.axes.kernel, self.kernel_shape, strict=True))
        return tuple(sizes[axis] for axis in letters)

    def contract(self, x: Any, m: Any) -> Any:
        axes = self.axes
        m = ops.reshape(m, (*self._letter_sizes(axes.groups + axes.contracted), m.shape[-1]))
        factor = axes.groups + axes.contracted + axes.rank
        return ops.einsum(f"{axes.inputs},{factor}->{axes.passed}{axes.groups}{axes.rank}", x, m)

    def expand(self, h: Any, m: Any) -> Any:
        axes = self.axes
        m = ops.reshape(m, (*self._letter_sizes(axes.groups), m.shape[-2], *self._letter_sizes(axes.free)))
        factor = axes.groups + axes.rank + axes.free
        return ops.einsum(f"{axes.passed}{axes.groups}{axes.rank},{factor}->{axes.outputs}", h, m)

    def transposed(self, dy: Any) -> Any:
        axes, kernel = self.axes, self.kernel
        return ops.einsum(f"{axes.outputs},{axes.kernel}->{axes.inputs}", ops.cast(dy, kernel.dtype), kernel)

    def along_outputs(self, v: Any, y: Any) -> Any:
        axes = self.axes
        stored = axes.groups + axes.free
        v = ops.reshape(v, self._letter_sizes(stored))
        placed = [axis for axis in axes.outputs if axis in stored]
        v = ops.transpose(v, [stored.index(axis) for axis in placed])
        hidden = len(y.shape) - len(axes.outputs.replace("...", ""))  # how many axes "..." stands for
        letters = axes.outputs.replace("...", "." * hidden)
        sizes = dict(zip(placed, v.shape, strict=True))
        return ops.reshape(v, [sizes.get(axis, 1) for axis in letters])


class EinsumDenseMap(EinsumMap):
    """The kernel of an `EinsumDense`; the layer's equation defines which axes are inputs and which are outputs."""

    layer_class = keras.layers.EinsumDense
    packs = True

    @property
    def axes(self) -> Axes:
        return axes_of(self.layer.equation)


class LoRAEinsumDense(AdaptedLayer, keras.layers.EinsumDense):
    """An `EinsumDense` layer with a frozen kernel and a trainable low-rank change of it.

    Args:
        equation, output_shape: As for `keras.layers.EinsumDense`.
        rank, alpha, adapter: As for `keras_lora.LoRADense`. An axis that is in the input, the kernel and the output
            (for example experts) gets one pair of factors of this rank per entry.
        **kwargs: The other arguments of `keras.layers.EinsumDense`.

    Input shape, output shape:
        As given by the equation.

    Example:

    >>> import keras, keras_lora
    >>> query = keras_lora.layers.LoRAEinsumDense("abc,cde->abde", output_shape=(None, 4, 8), rank=2)
    >>> query(keras.ops.ones((1, 5, 32))).shape
    (1, 5, 4, 8)
    >>> [(v.name, tuple(v.shape)) for v in query.trainable_variables]
    [('lora_a', (32, 2)), ('lora_b', (2, 32))]

    Reference:
        [Hu et al., 2021](https://arxiv.org/abs/2106.09685)
    """

    linear_maps = (EinsumDenseMap,)
