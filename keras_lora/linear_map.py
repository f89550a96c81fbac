"""READ FIRST. The linear map: how every adaptable layer is seen, whatever the shape of its kernel.

A layer type defines how the layer is a linear map. A method (LoRA, DoRA) defines how to change a linear map. Neither knows
the other, so there is one module per layer type in `layers/`, one module per method in `adapters/`, and no class for a pair.

These words are used throughout:

- **kernel**: the layer's weight in the layer's own shape. **matrix**: the same numbers as `(in_dim, out_dim)`, or
  `(groups, in_dim, out_dim)` if the kernel shares an axis with both its input and its output (grouped convolutions,
  experts).
- `y = apply(x, W)` is the layer's linear part: its output before bias and activation.
- A layer with several kernels (a recurrent cell, a separable convolution) is several linear maps, and each can be a target.

**The law** is the equation that every layer type and every method must satisfy. `tests/test_law.py` checks it on every
backend:

    adapter.adapted_output(x, apply(x, W)) == apply(x, W + adapter.strength · adapter.delta_kernel(W))

The right side is the definition, with ΔW as in the paper. The strength is 1 unless adapters are switched (see
`switching.py`); the changes of several adapters add up. The left side is what runs. If a layer's code has no place to add
the change (a recurrent cell, a depthwise convolution, a custom layer), that code runs with the changed kernel.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_lora import backend
from keras_lora.compat import call_internals, keras_internals, quantization
from keras_lora.compat.stored_kernel import StoredKernel


def view_of(layer: keras.layers.Layer, cls: type, /, **attributes: Any) -> Any:
    """A shallow copy of `layer`, of class `cls`, in which `attributes` replace those of the layer.

    The copy shares every other attribute and every weight. Running it reuses the layer's code with another kernel or
    without its bias. `layer` is not written to, so this is safe across threads and traces.
    """
    view: Any = object.__new__(cls)
    vars(view).update(vars(layer), **attributes)
    return view


class LinearMap(StoredKernel):
    """One kernel of a built layer, seen as a linear map. Each layer type has a subclass in `keras_lora/layers/`.

    A subclass sets `layer_class` and overrides whatever differs from a layer that computes `x @ kernel` on the last axis.
    """

    layer_class: type[keras.layers.Layer]
    kernel_name = "kernel"
    #: Tells the kernels of one layer apart in paths and files; `""` for a layer's only or main kernel.
    part = ""
    #: Attributes to replace in the layer so that its `call` computes only the linear part.
    held_out: dict[str, Any] = {"bias": None, "activation": None}
    #: True if an input picks one row of the matrix (an embedding) instead of summing over rows.
    picks_rows = False
    #: Whether `apply_lora` adapts it by default, without `targets`.
    by_default = True
    #: Why an adapter cannot drop entries of this map's input, or `None` if it can.
    no_dropout: str | None = None
    #: Why the examples of a batch cannot use different adapters, or `None` if they can.
    no_examples: str | None = None
    #: Whether scaling an output unit means scaling entries of `y`.
    scales_outputs = True
    #: Whether `apply` is `x @ matrix` once the last axes of `x` are flattened into one, with `y` laid out the same way.
    is_matmul = False
    #: Whether the layer itself computes it with `ops.matmul(x, kernel)`.
    calls_matmul = False

    @property
    def is_plain_matmul(self) -> bool:
        """Whether the whole map is one float32 product, so that it costs the same with a changed matrix."""
        float32 = keras.backend.standardize_dtype(self.layer.compute_dtype) == "float32"
        return self.is_matmul and float32 and self.base_dtype is None and quantization.mode_of(self.layer) is None

    def __init__(self, layer: keras.layers.Layer):
        self.layer = layer

    @classmethod
    def is_in(cls, layer: keras.layers.Layer) -> bool:
        """Whether `layer`, of class `layer_class`, has this kernel."""
        return True

    @property
    def slot(self) -> str:
        """The attribute of an adapted layer that contains the adapter of this kernel."""
        return f"{self.part}_adapter" if self.part else "adapter"

    @property
    def plain(self) -> Any:
        """The layer as its original class. An adapted layer returns the changed kernel to code outside that reads it."""
        return view_of(self.layer, getattr(type(self.layer), "base_class", type(self.layer)))

    # The kernel.

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """Shape of the float kernel."""
        if (shape := quantization.shape_of(self.layer)) is not None:  # of one that Keras stores flat
            return shape
        stored = self.stored
        return tuple(getattr(self.plain, self.kernel_name).shape) if stored is None else stored.shape

    @property
    def kernel_axes(self) -> str:
        """A letter for each axis of the kernel: `i` summed over, `o` of the output, `g` of both (groups, experts)."""
        return "i" * (len(self.kernel_shape) - 1) + "o"

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """`(*groups, in_dim, out_dim)`; `groups` is `()` or `(number of groups,)`."""
        sizes: dict[str, list[int]] = {"g": [], "i": [], "o": []}
        for role, size in zip(self.kernel_axes, self.kernel_shape, strict=True):
            sizes[role].append(size)
        groups = (math.prod(sizes["g"]),) if sizes["g"] else ()
        return (*groups, math.prod(sizes["i"]), math.prod(sizes["o"]))

    @property
    def kernel(self) -> Any:
        """The float kernel, in the layer's own shape, dequantised if need be."""
        if self.base_dtype == "nf4":
            return self.unpacked(keras.backend.standardize_dtype(self.layer.compute_dtype))
        return quantization.float_kernel(self.plain, self.kernel_name)

    @property
    def kernel_variable(self) -> keras.Variable:
        """The variable that stores the kernel of a float layer."""
        return getattr(self.plain, self.kernel_name)

    @property
    def stored_kernel(self) -> Any:
        """The variable that stores the kernel, float or quantised; `None` in GPTQ and AWQ, where it has another name."""
        return getattr(self.plain, self.kernel_attribute, None)

    @property
    def kernel_attribute(self) -> str:
        """The attribute from which the layer's code reads the kernel: `Dense.kernel` is a property over `_kernel`."""
        return keras_internals.stored_under(self.layer, self.kernel_name)

    @property
    def constraint(self) -> Any:
        """The constraint of the kernel, or `None`."""
        return getattr(self.kernel_variable, "constraint", None)

    @property
    def matrix(self) -> Any:
        """The kernel as `(*groups, in_dim, out_dim)`."""
        return self.as_matrix(self.kernel)

    def as_matrix(self, kernel: Any) -> Any:
        """From the kernel's own shape to `(*groups, in_dim, out_dim)`."""
        order = self._matrix_order
        if order != sorted(order):
            kernel = ops.transpose(kernel, order)
        return ops.reshape(kernel, self.matrix_shape)

    def as_kernel(self, matrix: Any) -> Any:
        """From `(*groups, in_dim, k)` to the kernel's own shape; `k` may differ from `out_dim` if that is one axis."""
        order, sizes = self._matrix_order, list(self.kernel_shape)
        if self.kernel_axes.count("o") == 1:
            sizes[self.kernel_axes.index("o")] = matrix.shape[-1]
        kernel = ops.reshape(matrix, [sizes[axis] for axis in order])
        return kernel if order == sorted(order) else ops.transpose(kernel, [order.index(axis) for axis in range(len(order))])

    def times_matrix(self, rows: Any) -> Any:
        """`rows @ matrix` in the kernel's dtype, for `rows (*groups, k, in_dim)`.

        On JAX the kernel keeps its own shape: to make a matrix of one that is split over devices along the second of two
        merged axes, XLA would gather it.
        """
        apart = len(self.kernel_axes) > len(self.matrix_shape) and type(self).as_matrix is LinearMap.as_matrix
        if not apart or keras.backend.backend() != "jax":
            matrix = self.matrix
            return ops.matmul(ops.cast(rows, matrix.dtype), matrix)
        kernel, letters = self.kernel, string.ascii_lowercase[: len(self.kernel_axes)]
        of = {role: [axis for axis, each in enumerate(self.kernel_axes) if each == role] for role in "gio"}
        g, i, o = ("".join(letters[axis] for axis in of[role]) for role in "gio")
        shape = [self.kernel_shape[axis] for axis in of["g"]], [self.kernel_shape[axis] for axis in of["i"]]
        rows = ops.reshape(ops.cast(rows, kernel.dtype), (*shape[0], rows.shape[-2], *shape[1]))
        product = ops.einsum(f"{g}z{i},{letters}->{g}z{o}", rows, kernel)
        return ops.reshape(product, (*self.matrix_shape[:-2], -1, self.matrix_shape[-1]))

    @property
    def _matrix_order(self) -> list[int]:
        return [axis for role in "gio" for axis, each in enumerate(self.kernel_axes) if each == role]

    def changed_kernel(self, adapter: Any) -> Any:
        """`W + ΔW` in the kernel's own shape, for a layer whose own code uses the kernel."""
        with call_internals.as_stored():  # so that the sum is rounded to the compute dtype, and not W before it
            matrix = self.matrix
        if keras.backend.standardize_dtype(matrix.dtype) != "float64":
            matrix = ops.cast(matrix, "float32")
        return self.as_kernel(ops.add(matrix, ops.cast(adapter.change(matrix), matrix.dtype)))

    @property
    def precise(self) -> LinearMap:
        """This map, but with a kernel that is stored in fewer digits read in float32, whatever the compute dtype."""
        if quantization.mode_of(self.layer) is None and self.base_dtype != "nf4":
            return self
        layer = view_of(self.layer, type(self.layer), **quantization.in_float32(self.layer))
        found: LinearMap = view_of(self, type(self), layer=layer)
        return found

    # The layer's sum.

    def base_output(self, x: Any) -> Any:
        """The layer's own linear part, float or quantised: `apply(x, W)`.

        If the kernel is stored in fewer digits, it is formed for the product and formed again for the gradient of `x`, so a
        training step keeps no float kernel. Where the layer rounds `x`, as in int8, the gradient passes as if it did not.
        """
        known = type(self).transposed is not LinearMap.transposed
        quantized = known and quantization.mode_of(self.layer) is not None and not quantization.waits(self.layer)
        x = ops.convert_to_tensor(x)  # `layer.call` may be given NumPy arrays
        float32 = keras.backend.standardize_dtype(self.layer.compute_dtype) == "float32"
        in_float32 = self.base_dtype == "bfloat16" and float32 and backend.lacks_bfloat16(x)
        widened = self.base_dtype == "nf4" or (self.base_dtype is not None and backend.widens_bfloat16()) or in_float32
        if self.picks_rows or not (quantized or widened):
            return self.own_output(x)
        stored = {name: each for name, each in vars(self.layer).items() if isinstance(each, keras.Variable)}
        stored = {name: ops.convert_to_tensor(each) for name, each in stored.items() if name not in self.held_out}
        dtype = x.dtype

        def of(tensors: tuple[Any, ...]) -> Any:
            attributes = dict(zip(stored, tensors, strict=True))
            if in_float32:
                kernel = ops.cast(attributes[self.kernel_attribute], "float32")
                attributes |= {self.kernel_attribute: kernel, **self.not_stored}
            layer = view_of(self.layer, type(self.layer), **attributes)
            return view_of(self, type(self), layer=layer)

        return backend.frozen_product(
            lambda x, *tensors: of(tensors).own_output(x),
            (lambda dy, *tensors: ops.cast(of(tensors).transposed(dy), dtype)) if known else None,
            x,
            list(stored.values()),
        )

    def own_output(self, x: Any) -> Any:
        """The linear part as the layer's own code computes it."""
        if self.base_dtype is not None and not self.picks_rows:
            return self.in_base_dtype(x, lambda x: self.call_with(x, self.kernel))
        view = view_of(self.layer, self.layer_class, **self.held_out)
        return view.call(x) if quantization.mode_of(self.layer) is None else view.quantized_call(x)

    def transposed(self, dy: Any) -> Any:
        """The transposed map: from the gradient of the output to the gradient of the input, in the dtype of the product.

        A map that does not define it cannot be quantised.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how to compute the gradient of its input.")

    def in_base_dtype(self, x: Any, product: Callable[[Any], Any]) -> Any:
        """`product(x)` in the dtype in which the kernel is stored, if there are products of it. This copies `x`."""
        return ops.cast(product(ops.cast(x, self.product_dtype)), self.layer.compute_dtype)

    def apply(self, x: Any, matrix: Any) -> Any:
        """The layer's linear part with `matrix` instead of its kernel, in the layout of the layer's output."""
        return self.call_with(x, self.as_kernel(matrix))

    def contract(self, x: Any, m: Any) -> Any:
        """The layer's sum over its inputs, with `m (*groups, in_dim, k)` instead of the kernel: `(..., *groups, k)`."""
        return ops.matmul(x, m)

    def apply_product(self, x: Any, a: Any, b: Any) -> Any:
        """`apply(x, a b)` with `a (*groups, in_dim, k)` and `b (*groups, k, out_dim)`, without forming `a b`."""
        return self.expand(self.contract(x, a), b)

    def per_example_sum(self, x: Any, a: Any, b: Any, index: Any, strength: Any, y: Any) -> Any:
        """`y + strength · apply(x, a b)` with different factors for each example: example i uses `a[j]` and `b[j]`.

        Args:
            x: `(batch, ...)`.
            a, b: Factors stacked, `(places, *groups, k, in_dim)` and `(places, *groups, k, out_dim)`.
            index: `(batch,)`, the place `j` of the factors for each example.
            strength: A scalar tensor.
            y: The base output.
        """
        if self.is_matmul:
            return backend.per_example_sum(x, a, b, index, strength, y)
        a, b = (ops.cast(ops.take(stacked, index, axis=0), y.dtype) for stacked in (ops.swapaxes(a, -1, -2), b))
        change = backend.each_example(lambda x, a, b: self.apply_product(x[None], a, b)[0], x, a, b)
        return ops.add(y, ops.multiply(ops.cast(strength, y.dtype), ops.reshape(change, ops.shape(y))))

    def low_rank_sum(
        self,
        x: Any,
        a: Any,
        b: Any,
        scale: float,
        strength: Any,
        y: Any = None,
        kept: tuple[Any, Any] | None = None,
        drop: backend.Drop | None = None,
    ) -> Any:
        """`y + strength · scale · apply(x, a b)`, which is how a low-rank change runs. The factors keep their dtype.

        If `y`, the base output, is not given, it is computed here, together with the change if that is faster. If `kept`,
        frozen factors `c` and `d`, is given, `strength · apply(x, c d)` is added, and they get no gradient. With `drop`,
        entries of `x` are left out on their way to `a`, and the others scaled; what is left is not kept for the gradient.
        """
        whole = y is None and kept is None and drop is None and getattr(a, "trainable", True)
        if whole and self.forms_kernel(x):  # with a frozen `a`, the input is not kept, so this way is not taken
            b = ops.multiply(ops.multiply(scale, strength), b)
            return self.formed_sum(x, ops.convert_to_tensor(a), b)
        in_one = y is None and self._can_run_in_one
        if y is None and not in_one:
            y = self.base_output(x)
        if not self.is_matmul or backend.has_symbolic_sizes(x):
            if kept is not None:
                y = self.low_rank_sum(x, *kept, 1.0, strength, y)
            return self._factored_sum(x, a, b, scale, strength, y, drop)
        x = ops.cast(x, self.layer.compute_dtype if in_one else y.dtype)
        kernel = ops.cast(self.kernel_variable, x.dtype) if in_one else None
        if len(x.shape) == 2 and self.kernel_axes == "io":
            return backend.low_rank_sum(x, a, b, scale, strength, y=y, kernel=kernel, kept=kept, drop=drop)
        rows_of_y = None if in_one else ops.reshape(y, (-1, self.matrix_shape[-1]))
        rows = self.as_rows(x)
        rows = backend.low_rank_sum(rows, a, b, scale, strength, y=rows_of_y, kernel=kernel, kept=kept, drop=drop)
        return self.from_rows(rows, x)

    def forms_kernel(self, x: Any) -> bool:
        """Whether `low_rank_sum` forms the changed kernel, which then takes one product instead of three."""
        return False

    def formed_sum(self, x: Any, a: Any, b: Any) -> Any:
        """`low_rank_sum` of a map that `forms_kernel`, with the scale in `b`."""
        raise NotImplementedError

    def _factored_sum(self, x: Any, a: Any, b: Any, scale: float, strength: Any, y: Any, drop: Any) -> Any:
        """`low_rank_sum` for a map that is no product of rows and a matrix."""
        b = ops.multiply(ops.multiply(scale if drop is None else scale / (1 - drop.rate), strength), b)
        a, b = ops.cast(a, y.dtype), ops.cast(b, y.dtype)
        if drop is None:
            return ops.add(y, self.apply_product(x, a, b))

        def of_dropped(x: Any, a: Any, drawn: Any) -> Any:
            return self.contract(backend.dropped(x, backend.Drop(drop.rate, drawn)), a)

        return ops.add(y, self.expand(keras.remat(of_dropped)(x, a, drop.drawn), b))

    # For methods that act on the input, such as block rotations and gains of input units.

    @property
    def last_axes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Sizes of the last axes of the input and of the output that correspond to the matrix, if `is_matmul`."""
        in_dim, out_dim = self.matrix_shape
        return (in_dim,), (out_dim,)

    def as_rows(self, x: Any) -> Any:
        """The input as rows `(n, in_dim)`, one for each use of the matrix.

        Raises:
            ValueError: The map is not a product of rows and a matrix (a convolution, a lookup, groups).
        """
        self._need_rows()
        return ops.reshape(x, (-1, self.matrix_shape[-2]))

    def from_rows(self, y: Any, x: Any) -> Any:
        """Rows `(n, out_dim)` in the layout of the layer's output for the input `x`."""
        self._need_rows()
        inputs, outputs = self.last_axes
        return ops.reshape(y, (*ops.shape(x)[: len(x.shape) - len(inputs)], *outputs))

    def along_inputs(self, v: Any, x: Any) -> Any:
        """One number per input unit, `v (in_dim,)`, shaped to broadcast against the input `x`."""
        self._need_rows()
        return ops.reshape(v, self.last_axes[0])

    def _need_rows(self) -> None:
        if not self.is_matmul:
            raise ValueError(
                f"The input of layer '{self.layer.name}', a {type(self.layer).__name__}, has no rows. Expected a layer that "
                "computes `rows @ matrix`, such as Dense. Use `linear.apply` or `linear.contract` instead."
            )

    @property
    def _can_run_in_one(self) -> bool:
        """Whether the base product and the change can be computed together, with the same numbers as the layer itself."""
        as_stored = quantization.mode_of(self.layer) is None and self.base_dtype is None
        return self.calls_matmul and as_stored and backend.fuses_base()

    def expand(self, h: Any, m: Any) -> Any:
        """Multiply the result of `contract` by `m (*groups, k, out_dim)`, in the layout of the layer's output."""
        if len(h.shape) <= 2 or backend.has_symbolic_sizes(h):
            return ops.matmul(h, m)
        # Flat, because XLA on CPU otherwise writes a transposed copy of the output's gradient to get the gradient of `m`.
        flat = ops.matmul(ops.reshape(h, (-1, m.shape[-2])), m)
        return ops.reshape(flat, (*ops.shape(h)[:-1], m.shape[-1]))

    def along_outputs(self, v: Any, y: Any) -> Any:
        """One number per output unit, `v (*groups, out_dim)`, shaped to broadcast against the layer's output `y`."""
        return ops.reshape(v, (-1,))

    def finish(self, y: Any) -> Any:
        """What the layer does after its sum: bias, then activation."""
        if self.layer.bias is not None:
            y = ops.add(y, self.layer.bias)
        if self.layer.activation is not None:
            y = self.layer.activation(y)
        return y

    def call_with(self, x: Any, kernel: Any) -> Any:
        """The layer's own `call` with another float `kernel` and nothing after the sum."""
        policy = keras.DTypePolicy(self.product_dtype)
        attributes = {**self.held_out, self.kernel_attribute: kernel, **keras_internals.with_policy(policy)}
        return view_of(self.layer, self.layer_class, **attributes).call(x)
