"""`SpectralNormalization`, which in each training step divides the kernel of the layer in it by its largest singular value.

Keras does that even if the kernel is frozen. Around a frozen kernel, the adapted wrapper runs as at inference, as a frozen
`BatchNormalization` does. So the kernel keeps its value, and an adapter of the layer inside is a change of that kernel.
"""

from __future__ import annotations

from typing import Any

from keras_lora.linear_map import view_of
from keras_lora.swap.adapted import AdaptedContainer


class AdaptedSpectralNormalization(AdaptedContainer):
    """A wrapper that normalises only a kernel that trains."""

    def call(self, inputs: Any, training: bool | None = False) -> Any:
        layer: Any = self
        return super().call(inputs, training=bool(training) and layer.kernel.trainable)  # type: ignore[misc]

    def as_base(self) -> Any:
        # The wrapper takes the kernel of the layer inside as a variable when it is built, and an adapted layer has none to
        # give: its `kernel` is a sum. So the config has the plain layer, which gets its adapter once the wrapper is built.
        layer: Any = self
        inside = layer.layer
        return view_of(layer, self.base_class, layer=inside.as_base() if isinstance(inside, AdaptedContainer) else inside)
