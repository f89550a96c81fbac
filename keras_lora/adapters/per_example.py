"""A different adapter for each example of a batch: many LoRAs stacked, and an index that selects one per example."""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from keras_lora import backend, checks
from keras_lora.adapters.adapter import Adapter
from keras_lora.adapters.low_rank import LowRank

if TYPE_CHECKING:
    from keras_lora.linear_map import LinearMap

#: The key of the index among the inputs of a model.
INDEX = "adapter_index"

_INDEX: contextvars.ContextVar[Any] = contextvars.ContextVar(INDEX, default=None)


@contextlib.contextmanager
def using(index: Any) -> Iterator[None]:
    """Use the adapter `index[i]` for example i of calls inside this context; with `index=None` use the base."""
    token = _INDEX.set(index)
    try:
        yield
    finally:
        _INDEX.reset(token)


@keras.saving.register_keras_serializable("keras_lora")
class PerExample(Adapter):
    """Slots for `capacity` LoRAs of up to `rank`, for `keras_lora.MultiAdapterModel`: `y + (x A[i]) B[i]` for example i.

    Slot 0 is the base: its factors are always zero. The scale of each LoRA is included in its `B`.

    Args:
        rank: Positive integer, the largest rank of a LoRA.
        capacity: Positive integer, the largest number of LoRAs.
        **kwargs: `name`, `dtype` and `trainable` of a Keras layer.

    Reference:
        [Chen et al., 2023](https://arxiv.org/abs/2310.18547), for the gather of factors
    """

    def __init__(self, rank: int = 8, capacity: int = 8, **kwargs: Any):
        super().__init__(**kwargs)
        self.rank = checks.positive_integer("rank", rank)
        self.capacity = checks.positive_integer("capacity", capacity)

    def problem_with(self, linear: LinearMap) -> str | None:
        if linear.no_examples is None:
            return None
        return f"its examples cannot use different adapters, because {linear.no_examples}; leave it out of `targets`"

    def build_for(self, linear: LinearMap) -> None:
        *groups, in_dim, out_dim = linear.matrix_shape
        places = self.capacity + 1
        # A is stored transposed: a product with one row reads it in order.
        self.lora_a = self.add_factor("lora_a", (places, *groups, self.rank, in_dim), "zeros", False, axes="gri")
        self.lora_b = self.add_factor("lora_b", (places, *groups, self.rank, out_dim), "zeros", False, axes="gro")

    def parameter_count(self, matrix_shape: tuple[int, ...]) -> int:
        return 0

    def size(self, matrix_shape: tuple[int, ...]) -> int:
        *groups, in_dim, out_dim = matrix_shape
        return (self.capacity + 1) * math.prod(groups) * self.rank * (in_dim + out_dim)

    def delta_kernel(self, matrix: Any) -> Any:
        raise ValueError(
            "With an adapter for each example there is no single kernel to read, merge or combine. Load the adapter into "
            "the plain model with `keras_lora.load_adapter` for that."
        )

    def adapted_output(self, x: Any, y: Any, linear: LinearMap, training: bool | None = None) -> Any:
        index = _INDEX.get()
        if index is None:
            return y
        rows, examples = x.shape[0], index.shape[0]
        if rows is not None and examples is not None and rows != examples:
            raise ValueError(
                f"Layer '{linear.layer.name}' is called on {rows} rows for {examples} examples, so it is not known which "
                "adapter a row is for. Expected an input whose first axis is the examples. Leave the layer out of `targets`."
            )
        return linear.per_example_sum(x, self.lora_a, self.lora_b, index, self.strength, y)

    def misfit_with(self, other: Adapter) -> str | None:
        if not isinstance(other, LowRank):
            return (
                f"a place takes only a LoRA, and this is a {type(other).__name__}; "
                "`keras_lora.compress_adapter` turns it into a LoRA"
            )
        rank = other.product_rank(self.matrix_shape)
        return f"a place takes ranks up to {self.rank}, and this has rank {rank}" if rank > self.rank else None

    def values_from(self, other: Adapter, values: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(other, LowRank) or (factors := other.factors_of(values, self.matrix_shape)) is None:
            return values
        a, b = factors
        more = self.rank - a.shape[-1]
        if a.ndim > 1 and b.ndim > 1 and more > 0:  # columns of zeros do nothing
            a = np.concatenate([a, np.zeros((*a.shape[:-1], more), a.dtype)], -1)
            b = np.concatenate([b, np.zeros((*b.shape[:-2], more, b.shape[-1]), b.dtype)], -2)
        return {"lora_a": a, "lora_b": b}

    def misshapen(self, values: dict[str, np.ndarray]) -> list[str]:
        """Problems with the shapes of a result of `values_from`."""
        *groups, in_dim, out_dim = self.matrix_shape
        wanted = {"lora_a": (*groups, in_dim, self.rank), "lora_b": (*groups, self.rank, out_dim)}
        found = {key: values[key].shape if key in values else None for key in wanted}
        return [f"{key}' has shape {found[key]}; expected is {wanted[key]}" for key in wanted if found[key] != wanted[key]]

    def rows_for(self, values: dict[str, np.ndarray] | None) -> list[tuple[keras.Variable, np.ndarray]]:
        """What `backend.write_place` writes for the result of `values_from`; zeros for `None`."""
        if values is None:
            return [(each, np.zeros(each.shape[1:], "float32")) for each in (self.lora_a, self.lora_b)]
        return [(self.lora_a, np.swapaxes(values["lora_a"], -1, -2)), (self.lora_b, values["lora_b"])]

    def put(self, place: int, values: dict[str, np.ndarray] | None) -> None:
        """Fill a slot with the result of `values_from`, or with zeros."""
        put_all(place, [(self, values)])

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "rank": self.rank, "capacity": self.capacity}


def put_all(place: int, pairs: Iterable[tuple[PerExample, dict[str, np.ndarray] | None]]) -> None:
    """Fill a slot of several layers at once."""
    written = [row for adapter, values in pairs for row in adapter.rows_for(values)]
    backend.write_place([variable for variable, _ in written], place, [row for _, row in written])
