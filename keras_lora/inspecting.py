"""List a model's adapters, as a table to print or as plain data."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from typing import Any

import keras
from rich.table import Table

from keras_lora import adapters, checks, reports
from keras_lora.compat import keras_internals
from keras_lora.swap import flags
from keras_lora.swap.adapted import address_of, named_adapters
from keras_lora.swap.addresses import walk


@dataclass(frozen=True)
class AdapterRow:
    """One adapter of one kernel, or one layer that trains without an adapter.

    Attributes:
        layer: The path of the layer, with the kernel's name if it has several.
        name: The adapter's name; `None` for a layer that trains without one (a head, a bias).
        method: The class of the adapter.
        rank: Its rank, or `None` if the method has no rank.
        scale: The factor of `A B`, before the strength, or `None`.
        strength: The current factor of the whole change; 0 is off.
        trainable: The number of trainable parameters.
        parameters: The number of parameters.
        bytes: Their size in memory.
    """

    layer: str
    name: str | None
    method: str | None
    rank: int | None
    scale: float | None
    strength: float | None
    trainable: int
    parameters: int
    bytes: int


class AdapterList(reports.Printed, list[AdapterRow]):
    """A list of `AdapterRow`; printing it prints a table with totals."""

    def __init__(self, rows: list[AdapterRow], trainable: int, parameters: int):
        super().__init__(rows)
        #: The number of trainable parameters of the whole model, and of all its parameters.
        self.trainable, self.parameters = trainable, parameters

    @property
    def total(self) -> str:
        """One line that shows how much of the model trains."""
        return reports.total(self.trainable, self.parameters)

    def lines(self) -> list[str]:
        return [self.total]

    @property
    def adapters(self) -> dict[str, dict[str, Any]]:
        """A summary of each adapter: columns on which all layers agree, else `"irregular"`, and the summed sizes."""
        lines: dict[str, dict[str, Any]] = {}
        for name in dict.fromkeys(row.name for row in self if row.name is not None):
            rows = [row for row in self if row.name == name]
            same = {key: {getattr(row, key) for row in rows} for key in ("method", "rank", "scale", "strength")}
            line = {key: each.pop() if len(each) == 1 else "irregular" for key, each in same.items()}
            sums = {key: sum(getattr(row, key) for row in rows) for key in ("trainable", "parameters", "bytes")}
            lines[name] = {"layers": len(rows), **line, **sums}
        return lines

    def data(self) -> dict[str, Any]:
        """The whole list as plain data that JSON can store."""
        rows = [asdict(row) for row in self]
        return {"rows": rows, "adapters": self.adapters, "trainable": self.trainable, "parameters": self.parameters}

    def table(self, width: float) -> Table:
        """The table: equal blocks once, then a row for each adapter. If it is too wide, without bytes."""
        table = self._table(with_bytes=True)
        return self._table(with_bytes=False) if reports.is_wider(table, width) else table

    def _table(self, with_bytes: bool) -> Table:
        groups = reports.folded(self, lambda row: tuple({**asdict(row), "layer": reports.stem(row.layer)}.values()))
        sizes = ("parameters", "trainable", "bytes")
        lines = [asdict(group[0]) | {key: sum(getattr(row, key) for row in group) for key in sizes} for group in groups]
        paths = [reports.span([row.layer for row in group]) for group in groups]
        numbers = ("rank", "scale", "active", "params", "trained", *(["bytes"] if with_bytes else []))
        table = reports.table_of(("layer", "adapter", "method"), numbers)
        reports.add_branches(table, zip(paths, (_cells(line, with_bytes) for line in lines), strict=True))
        table.add_section()
        for name, line in self.adapters.items():
            table.add_row(f"{line['layers']} layers", *_cells({"name": name, **line}, with_bytes))
        return table


def _cells(row: dict[str, Any], with_bytes: bool) -> tuple[str, ...]:
    """The cells of a row after the first."""

    def number(value: Any) -> str:
        return "" if value is None else value if isinstance(value, str) else f"{value:.4g}"

    numbers = [number(row["rank"]), number(row["scale"]), "no" if row["strength"] == 0 else number(row["strength"])]
    sizes = [reports.short(row[key]) for key in ("parameters", "trainable", *(["bytes"] if with_bytes else []))]
    return (row["name"] or "", row["method"] or "in full", *numbers, *sizes)


def list_adapters(model: Any) -> AdapterList:
    """List the adapters of a model: their layers, methods, ranks, scales and sizes, and which are active and trainable.

    Args:
        model: A model or layer, adapted or plain.

    Returns:
        A list of `AdapterRow`: one for each adapter of each kernel, and one for each layer with other trainable variables.
        Printing it prints a table, in which equal blocks are one. `list_adapters(model).data()` has every row as plain data;
        `.total` is a one-line summary.

    Raises:
        TypeError: `model` is not a Keras layer.

    Example:

    >>> import keras, keras_lora
    >>> model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(32), keras.layers.Dense(2)])
    >>> keras_lora.list_adapters(keras_lora.apply_lora(model, rank=4, name="french")).total
    'trainable: 192 of 803 (23.9 %)'
    """
    checks.keras_layer(model)
    adapters_at: dict[int, list[AdapterRow]] = {}
    places = walk(model)
    paths = {id(place.layer): place.path for place in places}
    for name, found in named_adapters(model).items():
        for linear, adapter in found.values():
            row = _row(address_of(paths[id(linear.layer)], linear), name, adapter)
            adapters_at.setdefault(id(linear.layer), []).append(row)
    rows = []
    for place in places:
        rows += adapters_at.get(id(place.layer), [])
        trained = [v for v in flags.planned_variables(place.layer) if v.trainable]
        if trained and not isinstance(place.layer, adapters.Adapter):
            rows.append(AdapterRow(place.path, None, None, None, None, None, *_sizes(trained)))
    return AdapterList(rows, *_sizes(keras_internals.variables_of(place.layer for place in places))[:2])


def _row(path: str, name: str, adapter: adapters.Adapter) -> AdapterRow:
    strength = adapters.strength_of(adapter) if adapter.built else 1.0
    rank, scale = getattr(adapter, "rank", None), getattr(adapter, "scale", None)
    return AdapterRow(path, name, type(adapter).__name__, rank, scale, strength, *_sizes(adapter.weights))


def _sizes(variables: Any) -> tuple[int, int, int]:
    """The number of trainable parameters, of all parameters, and their bytes."""
    sizes = [(v, math.prod(v.shape)) for v in variables]
    trainable = sum(size for v, size in sizes if v.trainable)
    held = sum(size * _item_bytes(v) for v, size in sizes)
    return trainable, sum(size for _, size in sizes), held


def _item_bytes(variable: keras.Variable) -> int:
    bits = re.search(r"\d+", keras.backend.standardize_dtype(variable.dtype))
    return int(bits.group()) // 8 if bits else 1  # bool
