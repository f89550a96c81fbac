"""Several adapters of one kernel at once: their changes add up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from keras import ops

from keras_lora.adapters.adapter import Adapter

if TYPE_CHECKING:
    from keras_lora.linear_map import LinearMap


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

    def adapted_output(self, x: Any, y: Any, linear: LinearMap, training: bool | None = None) -> Any:
        """`apply(x, W + Σ strength · ΔW)`, given the input `x` and the base output `y`."""
        total = y
        for adapter in _joined(self.adapters, linear, training):
            if adapter.adds:
                total = adapter.adapted_output(x, total, linear, training)
            else:
                total = ops.add(total, ops.subtract(adapter.adapted_output(x, y, linear, training), y))
        return total

    def output(self, x: Any, linear: LinearMap, training: bool | None = None) -> Any:
        """`adapted_output` from `x` alone."""
        first, *rest = _joined(self.adapters, linear, training)
        if not all(adapter.adds for adapter in (first, *rest)):
            return self.adapted_output(x, linear.base_output(x), linear, training)
        y = first.output(x, linear, training)
        for adapter in rest:
            y = adapter.adapted_output(x, y, linear, training)
        return y

    def base_changed(self, linear: LinearMap) -> None:
        """Bring what was computed from the kernel up to date."""
        for adapter in self.adapters:
            adapter.base_changed(linear)


class _Product:
    """Adapters that are products of thin factors, as one: `x [A₁ A₂ …] [B₁; B₂; …]` is two products for all of them."""

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
    """The adapters, with those that are products as one. In training, one that trains stays apart, for its gradient."""
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
