"""Several adapters of one kernel at once: their changes add up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from keras import ops

from keras_lora.adapters.adapter import Adapter


class Sum:
    """`W + Σ strength · ΔW`: each change is that of the base kernel, so their order does not matter.

    What a layer asks of its adapter, it can ask of this.
    """

    def __init__(self, adapters: Sequence[Adapter]):
        self.adapters = adapters

    @property
    def built(self) -> bool:
        """Whether all of them have weights."""
        return all(adapter.built for adapter in self.adapters)

    def change(self, matrix: Any) -> Any:
        """What is added to the kernel."""
        first, *rest = (adapter.change(matrix) for adapter in self.adapters)
        return sum(rest, start=first)

    def adapted_output(self, x: Any, y: Any, linear: Any, training: bool | None = None) -> Any:
        """`apply(x, W + Σ strength · ΔW)`, given the input `x` and the base output `y`."""
        total = y
        for adapter in self.adapters:
            if adapter.adds:
                total = adapter.adapted_output(x, total, linear, training)
            else:
                total = ops.add(total, ops.subtract(adapter.adapted_output(x, y, linear, training), y))
        return total

    def output(self, x: Any, linear: Any, training: bool | None = None) -> Any:
        """`adapted_output` from `x` alone."""
        first, *rest = self.adapters
        if not all(adapter.adds for adapter in self.adapters):
            return self.adapted_output(x, linear.base_output(x), linear, training)
        return Sum(rest).adapted_output(x, first.output(x, linear, training), linear, training)

    def base_changed(self, linear: Any) -> None:
        """Bring what was computed from the kernel up to date."""
        for adapter in self.adapters:
            adapter.base_changed(linear)
