"""Layers that use several kernels in one `call`, each in an einsum or matmul: banks of experts.

The layer's code runs unchanged, except that it sees another `ops` module. Its kernels are `AdaptedKernel` objects, and
`ops.einsum` and `ops.matmul` with such a kernel add the adapter's fast path to their result. So no array of the size of a
kernel is formed. Any other operation gets the tensor `W + ΔW`, which is correct but slower.
"""

from __future__ import annotations

import functools
import inspect
import types
from typing import Any

from keras import ops

from keras_lora.layers.einsum_dense import Axes, EinsumMap, axes_of
from keras_lora.linear_map import view_of
from keras_lora.swap.adapted import AdaptedLayer


class BankMap(EinsumMap):
    """A kernel with stated axes, `"gio"` for experts; the equation is known when the layer uses it."""

    stated_axes: str
    equation: str | None = None
    no_examples: str | None = "its input may be tokens in any order"

    @property
    def kernel_axes(self) -> str:
        return self.stated_axes

    @property
    def axes(self) -> Axes:
        left, _, outputs = str(self.equation).partition("->")
        kernel = left.split(",")[1].strip()
        return axes_of(
            f"{left}->{outputs}", "".join(a for a, role in zip(kernel, self.stated_axes, strict=True) if role == "g")
        )

    def within(self, equation: str) -> BankMap | None:
        """Return this map for `equation`, or `None` if the equation uses the axes in another way than stated."""
        used = type(self)(self.layer)
        used.equation = equation.replace(" ", "")
        kernel = used.equation.partition("->")[0].split(",")[1]
        if len(kernel) != len(self.stated_axes):
            return None
        axes = used.axes
        found = "".join("g" if a in axes.groups else "i" if a in axes.contracted else "o" for a in kernel)
        return used if found == self.stated_axes and all(a in axes.outputs for a in axes.groups + axes.free) else None

    def own_output(self, x: Any) -> Any:
        if self.base_dtype is None:
            return ops.einsum(self.equation, x, ops.cast(self.kernel, x.dtype))
        return self.in_base_dtype(x, lambda x: ops.einsum(self.equation, x, self.kernel))

    def apply(self, x: Any, matrix: Any) -> Any:
        return ops.einsum(self.equation, x, self.as_kernel(matrix))


class AdaptedKernel:
    """The object that the layer's code sees instead of a kernel."""

    def __init__(self, linear: BankMap, adapter: Any, training: bool | None, dtype: Any = None):
        self.linear, self.adapter, self.training, self.dtype = linear, adapter, training, dtype

    @property
    def base(self) -> Any:
        """The kernel without its change."""
        kernel = ops.convert_to_tensor(self.linear.kernel_variable)
        return kernel if self.dtype is None else ops.cast(kernel, self.dtype)

    @property
    def changed(self) -> Any:
        """`W + ΔW`."""
        return ops.cast(self.linear.changed_kernel(self.adapter), self.base.dtype)

    def cast(self, dtype: Any) -> AdaptedKernel:
        """Return the same as `ops.cast`."""
        return AdaptedKernel(self.linear, self.adapter, self.training, dtype)

    def einsum(self, equation: str, x: Any) -> Any:
        """Return `ops.einsum(equation, x, kernel)` with the change added."""
        linear = self.linear.within(equation)
        if linear is None:
            return ops.einsum(equation, x, self.changed)
        y = ops.einsum(equation, x, self.base) if linear.base_dtype is None else linear.base_output(x)
        return self.adapter.adapted_output(x, y, linear, training=self.training)


class _Ops(types.ModuleType):
    """`keras.ops`, for code that works with adapted kernels."""

    def __getattr__(self, name: str) -> Any:
        operation = getattr(ops, name)
        return functools.partial(_operate, name, operation) if callable(operation) else operation


def _operate(name: str, operation: Any, *args: Any, **kwargs: Any) -> Any:
    given = [each for each in (*args, *kwargs.values()) if isinstance(each, AdaptedKernel)]
    if not given:
        return operation(*args, **kwargs)
    if name == "cast" and isinstance(args[0], AdaptedKernel):
        return args[0].cast(*args[1:], **kwargs)
    if name == "einsum" and len(args) == 3 and isinstance(args[2], AdaptedKernel) and not isinstance(args[1], AdaptedKernel):
        return args[2].einsum(*args[:2])
    if name == "matmul" and len(args) == 2 and isinstance(args[1], AdaptedKernel) and len(args[1].linear.kernel_shape) == 2:
        return args[1].einsum("...x,xy->...y", args[0])
    plain = [each.changed if isinstance(each, AdaptedKernel) else each for each in args]
    return operation(*plain, **{k: v.changed if isinstance(v, AdaptedKernel) else v for k, v in kwargs.items()})


class FactoredLayer(AdaptedLayer):
    """An adapted layer whose original code runs with `AdaptedKernel` objects instead of its kernels."""

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        base_call = cls.linear_maps[0].layer_class.call
        signature = inspect.signature(base_call)
        asks = "training" in signature.parameters
        adapting = _with_ops(base_call)

        @functools.wraps(base_call)
        def call(self: Any, *args: Any, training: bool | None = None, **kwargs: Any) -> Any:
            kernels = {m.kernel_attribute: AdaptedKernel(m, adapter, training) for m, adapter in self.maps_in_call()}
            more = {**kwargs, "training": training} if asks else kwargs
            return adapting(view_of(self, self.base_class, **kernels), *args, **more)

        if not asks:  # Keras passes `training` only to a `call` that has it in its signature
            asked = inspect.Parameter("training", inspect.Parameter.KEYWORD_ONLY, default=None)
            call.__signature__ = signature.replace(parameters=[*signature.parameters.values(), asked])  # type: ignore[attr-defined]
        cls.call = call  # type: ignore[method-assign]


def _with_ops(function: Any) -> Any:
    """Return a copy of `function` that uses `_Ops` as `ops`; `function` is not changed."""
    if not isinstance(function.__globals__.get("ops"), types.ModuleType):
        raise TypeError(
            f"{function.__qualname__} cannot run with factored kernels. Expected code that calls `ops.einsum` or "
            "`ops.matmul` of `from keras import ops`. Received: code without it. Register the layer without `factored=True`."
        )
    seen = {**function.__globals__, "ops": _Ops("ops")}
    copy = types.FunctionType(function.__code__, seen, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
