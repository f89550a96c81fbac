"""How the kernel of a layer is stored: in its own dtype, in bfloat16, or in NF4."""

from __future__ import annotations

import contextlib
import math
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_lora.compat import keras_internals, nf4, quantization, training_internals

#: On a layer, what is known of the kernels that `LinearMap.store_kernel` stores in another dtype, by name.
_STORED = "_keras_lora_stored"
#: The names of the variables of NF4 that are added to a layer, after the name of the kernel.
_PARTS = ("absmax", "absmax_scale", "absmax_mean")


class Stored(NamedTuple):
    """How a kernel is stored.

    Attributes:
        base_dtype: `"bfloat16"` or `"nf4"`.
        dtype, shape, trainable: Those of the float kernel.
        found: Whether it was stored so before the layer had an adapter, and stays so after it.
    """

    base_dtype: str
    dtype: str
    shape: tuple[int, ...]
    trainable: bool
    found: bool = False


def is_stored(layer: Any) -> bool:
    """Whether a kernel of `layer` is stored in another dtype than its own."""
    return bool(vars(layer).get(_STORED))


def float_shapes(layer: Any) -> list[tuple[int, ...]]:
    """The shapes of the own variables of `layer`, with those of the float kernels where these are stored in NF4."""
    stored = {name: each for name, each in vars(layer).get(_STORED, {}).items() if each.base_dtype == "nf4"}
    hidden = {id(vars(layer)[f"{name}_{part}"]) for name in stored for part in _PARTS}
    shapes = {id(vars(layer)[keras_internals.stored_under(layer, name)]): each.shape for name, each in stored.items()}
    return [shapes.get(id(v), tuple(v.shape)) for v in keras_internals.own_variables(layer) if id(v) not in hidden]


class StoredKernel:
    """The part of a linear map that stores its kernel."""

    layer: Any
    kernel_name: str
    plain: Any
    kernel_shape: Any
    kernel_variable: Any
    matrix_shape: Any
    as_matrix: Any
    as_kernel: Any
    #: Whether the kernel can be stored in NF4: all code that reads it asks this map for it.
    packs = False
    #: Whether the blocks of NF4 lie along the rows of the matrix (those of a table) instead of along its inputs.
    packs_rows = False

    @property
    def stored(self) -> Stored | None:
        """How `store_kernel` has stored the kernel, or `None` if the kernel has its original dtype."""
        found: Stored | None = vars(self.layer).get(_STORED, {}).get(self.kernel_name)
        return found

    @property
    def not_stored(self) -> dict[str, Any]:
        """The attribute for a view of the layer whose kernel is in its original dtype."""
        others = {name: each for name, each in vars(self.layer).get(_STORED, {}).items() if name != self.kernel_name}
        return {_STORED: others}

    @property
    def float_dtype(self) -> str:
        """The dtype of the kernel if it is not stored in another."""
        return keras.backend.standardize_dtype(self.kernel_variable.dtype) if self.stored is None else self.stored.dtype

    @property
    def base_dtype(self) -> str | None:
        """The dtype in which `store_kernel` has stored the kernel, or `None` if the kernel has its original dtype."""
        return None if self.stored is None else self.stored.base_dtype

    @property
    def product_dtype(self) -> str:
        """The dtype of the base product: that in which the kernel is stored, if there are products of it."""
        return "bfloat16" if self.base_dtype == "bfloat16" else keras.backend.standardize_dtype(self.layer.compute_dtype)

    def store_kernel(self, dtype: str | None, found: bool = False) -> None:
        """Store the kernel as `dtype`, `"bfloat16"` or `"nf4"`, or in its original dtype if `None`.

        The variable of the kernel stays the same object in the same place; in NF4 it has the codes, and the layer gets three
        more variables, which do not train.
        """
        if quantization.mode_of(self.layer) is not None:
            return
        was, variable = self.stored, self.kernel_variable
        own = self.float_dtype
        dtype = None if dtype == own else dtype
        if dtype == self.base_dtype:
            return
        shape, trainable = (self.kernel_shape, variable.trainable) if was is None else (was.shape, was.trainable)
        packed = was is not None and was.base_dtype == "nf4"
        value = None  # of a model that is only planned
        if training_internals.has_value(variable):
            value = self.unpacked(own) if packed else ops.convert_to_tensor(variable)
        if packed:
            for name in self.parts:
                keras_internals.forget_variable(self.layer, name)
        kept = {} if dtype is None else {self.kernel_name: Stored(dtype, own, shape, trainable, found)}
        vars(self.layer)[_STORED] = {**self.not_stored[_STORED], **kept}
        if dtype == "nf4":
            self._pack(value)
        else:
            keras_internals.store_variable(variable, dtype or own, autocast=dtype is None, value=value, shape=shape)
            variable.trainable = trainable if packed else variable.trainable
        keras_internals.track_torch_parameters(self.layer)  # else torch keeps the old array too

    def store_value(self, kernel: Any) -> None:
        """Store another float kernel in the same variables, quantised again or rounded as this one is."""
        if quantization.mode_of(self.layer) is not None:
            quantization.store(self.plain, self.kernel_name, kernel)
            return
        values = self._quantized(kernel) if self.base_dtype == "nf4" else [kernel]
        for variable, value in zip(self.stored_variables, values, strict=True):
            variable.assign(ops.cast(value, variable.dtype))

    def keep_stored(self) -> None:
        """Keep the kernel as it is stored when the layer loses its adapters."""
        if self.stored is not None:
            vars(self.layer)[_STORED] = {**self.not_stored[_STORED], self.kernel_name: Stored(*self.stored[:-1], found=True)}

    @property
    def stored_variables(self) -> list[keras.Variable]:
        """The variables that store the kernel: one, the four of NF4, or those of Keras's quantisation."""
        if quantization.mode_of(self.layer) is not None:
            return quantization.variables_of(self.plain, self.kernel_name)
        return [self.kernel_variable, *(vars(self.layer)[name] for name in self.parts)]

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the variables that NF4 adds to the layer, if the kernel is stored in it."""
        return tuple(f"{self.kernel_name}_{part}" for part in _PARTS) if self.base_dtype == "nf4" else ()

    def _pack(self, kernel: Any) -> None:
        """Store `kernel` in NF4. The blocks lie along the inputs of the `(out, in)` matrix, or along the rows of a table."""
        if kernel is None:
            packed = nf4.Packed(*map(keras.KerasTensor, nf4.shapes(math.prod(self.kernel_shape)), nf4.DTYPES))
        else:
            packed = self._quantized(ops.stop_gradient(kernel))
        variable, codes = self.kernel_variable, None if kernel is None else packed.codes
        variable.trainable = False
        keras_internals.store_variable(variable, "uint8", autocast=False, value=codes, shape=packed.codes.shape)
        with contextlib.ExitStack() as scopes:
            scopes.enter_context(keras_internals.unlocked(self.layer))
            for name in (self.layer.path or self.layer.name).split("/")[:-1]:
                scopes.enter_context(keras.name_scope(name))
            for name, value in zip(self.parts, packed[1:], strict=True):
                added = self.layer.add_weight(
                    name=name,
                    shape=tuple(value.shape),
                    initializer="zeros",
                    dtype=keras.backend.standardize_dtype(value.dtype),
                    trainable=False,
                    autocast=False,
                )
                if kernel is not None:
                    added.assign(value)
                setattr(self.layer, name, added)

    def _quantized(self, kernel: Any) -> nf4.Packed:
        matrix = self.as_matrix(kernel)
        return nf4.quantize(matrix if self.packs_rows else ops.swapaxes(matrix, -1, -2))

    @property
    def packed(self) -> nf4.Packed:
        """The parts of a kernel in NF4, as tensors."""
        codes = getattr(self.plain, self.kernel_name)
        parts = (codes, *(vars(self.layer)[name] for name in self.parts))
        return nf4.Packed(*(ops.convert_to_tensor(each) for each in parts))

    def unpacked(self, dtype: str) -> Any:
        """The float kernel of one in NF4."""
        *groups, in_dim, out_dim = self.matrix_shape
        if self.packs_rows:
            return self.as_kernel(nf4.dequantize(self.packed, self.matrix_shape, dtype))
        return self.as_kernel(nf4.dequantize(self.packed, (*groups, out_dim, in_dim), dtype, swapped=True))
