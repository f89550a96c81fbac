"""Layers whose code has no place to add a change, such as recurrent cells: it runs with the changed kernel."""

from __future__ import annotations

import functools
from typing import Any

import keras

from keras_lora.compat import call_internals
from keras_lora.linear_map import view_of
from keras_lora.swap.adapted import AdaptedLayer


class ChangedKernelLayer(AdaptedLayer):
    """An adapted layer whose original code runs with `W + ΔW` as its kernels. This works for any code that reads them."""

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        base_call = cls.linear_maps[0].layer_class.call

        @functools.wraps(base_call)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            return self.with_changed_kernels().call(*args, **kwargs)

        cls.call = call  # type: ignore[method-assign]  # with the signature of the original `call`, which Keras reads

    def with_changed_kernels(self) -> Any:
        """The plain layer with the changed kernels, sharing everything else with this one."""
        kernels: dict[str, Any] = {}
        for linear, adapter in self.maps_in_call():
            dtype = call_internals.dtype_in_call(self, linear.kernel_variable, stored_apart=linear.base_dtype is not None)
            kernels[linear.kernel_attribute] = keras.ops.cast(linear.changed_kernel(adapter), dtype)
        return view_of(self, self.base_class, **kernels)
