"""`layer.kernel` of an adapted layer is the changed kernel, for code that reads it without calling the layer."""

from __future__ import annotations

from typing import Any

from keras import ops

from keras_lora.compat import quantization
from keras_lora.linear_map import LinearMap
from keras_lora.swap import slots


class ChangedKernel(property):
    """A property that is `W + ΔW`, as with Keras's own LoRA. It is computed each time it is read."""

    def __init__(self, map_class: type[LinearMap]):
        def kernel(layer: Any) -> Any:
            linear = map_class(layer)
            packed = linear.base_dtype == "nf4"
            change, plain = (
                slots.change_in_call(linear),
                linear.kernel if packed else getattr(linear.plain, linear.kernel_name),
            )
            if change is None or not change.built or quantization.mode_of(layer) is not None:
                return plain  # a quantised layer returns stored integers, to which no change can be added
            return ops.cast(linear.changed_kernel(change), ops.convert_to_tensor(plain).dtype)

        super().__init__(kernel)
