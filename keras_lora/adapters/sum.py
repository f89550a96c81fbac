"""Several adapters of one kernel at once: their changes add up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from keras import ops

from keras_lora.adapters.adapter import Adapter

if TYPE_CHECKING:
    from keras_lora.linear_map import LinearMap


class Sum:
    """Several adapters as one: `W + Σ strength · ΔW`.

    Each change is computed from the base kernel, so the order does not matter.

    It has the methods that a layer calls on an adapter.
    """

    def __init__(self, adapters: Sequence[Adapter]):
        self.adapters = adapters

    @property
    def built(self) -> bool:
        """Whether all adapters have weights."""
        return all(adapter.built for adapter in self.adapters)

    def change(self, matrix: Any) -> Any:
        """Return the sum of the changes, which is added to the kernel."""
        first, *rest = (adapter.change(matrix) for adapter in self.adapters)
        return sum(rest, start=first)

    def adapted_output(self, x: Any, y: Any, linear: LinearMap, training: bool | None = None) -> Any:
        """Return `apply(x, W + Σ strength · ΔW)`, given the input `x` and the base output `y`."""
        total = y
        for adapter in _joined(self.adapters, linear, training):
            if adapter.adds:
                total = adapter.adapted_output(x, total, linear, training)
            else:
                total = ops.add(total, ops.subtract(adapter.adapted_output(x, y, linear, training), y))
        return total

    def output(self, x: Any, linear: LinearMap, training: bool | None = None) -> Any:
        """Return `adapted_output` from `x` alone."""
        first, *rest = _joined(self.adapters, linear, training)
        if not all(adapter.adds for adapter in (first, *rest)):
            return self.adapted_output(x, linear.base_output(x), linear, training)
        y = first.output(x, linear, training)
        for adapter in rest:
            y = adapter.adapted_output(x, y, linear, training)
        return y

    def base_changed(self, linear: LinearMap) -> None:
        """Update what was computed from the kernel."""
        for adapter in self.adapters:
            adapter.base_changed(linear)


class _Product:
    """Several low-rank adapters as one: `x [A₁ A₂ …] [B₁; B₂; …]` takes two products for all of them."""

    adds = True

    def __init__(self, factors: Sequence[tuple[Any, Any]]):
        self.factors = factors

    def adapted_output(self, x: Any, y: Any, linear: LinearMap, training: bool | None = None) -> Any:
        a = ops.concatenate([a for a, _ in self.factors], axis=-1)
        b = ops.concatenate([b for _, b in self.factors], axis=-2)
        return linear.low_rank_sum(x, a, b, 1.0, ops.ones((), b.dtype), y)

    def output(self, x: Any, linear: LinearMap, training: bool | None = None) -> Any:
        return self.adapted_output(x, None, linear, training)


def _joined(adapters: Sequence[Adapter], linear: LinearMap, training: bool | None) -> list[Any]:
    """Join the low-rank adapters into one. In training, an adapter that trains stays separate, so it gets a gradient."""
    products, others = [], []
    for adapter in adapters:
        apart = not linear.is_matmul or (training and adapter.trainable_variables)
        factors = None if apart else adapter.live_factors(training)
        if factors is None:
            others.append(adapter)
        else:
            products.append((adapter, factors))
    if len(products) < 2:
        return list(adapters)
    return [*others, _Product([factors for _, factors in products])]
