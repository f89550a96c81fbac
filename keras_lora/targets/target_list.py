"""What would happen to each layer of a model, as a list that prints as a table."""

from __future__ import annotations

from dataclasses import dataclass, field

import keras
from rich.table import Table

from keras_lora import adapters, reports
from keras_lora.linear_map import LinearMap

#: Why a row has the action "train" although this call did not ask for it.
ALREADY = "trains already"
#: Why a layer trains in full, and why a normalization trains its scale and offset.
NAMED = "named in `train`"
NORM = "normalization"
#: Why a row has the action "adapt", and what is said if its adapter has more parameters than its kernel.
TARGET = "target"
LARGE = f"{TARGET}, larger than its kernel"
#: How the reason starts if a layer stays frozen because it is not a known linear map.
NO_ADAPTER = "no adapter for"
#: The reason if a layer stays frozen because it has no weights after the model has run.
UNUSED = "the model does not use it"


@dataclass(frozen=True)
class Target:
    """What would happen to one layer that has variables, or to one of its kernels if it has several.

    Attributes:
        path: The path of the layer, with the kernel's name if it has several.
        layer_type: The name of its class.
        action: `"adapt"`, `"train"` (in full) or `"freeze"`.
        why: The reason, in words.
        shape: Shape of its kernel as a matrix, `(in_dim, out_dim)`, or `None` if it is not a known linear map.
        rank: Rank of the adapter, or `None`.
        parameters: The number of parameters of the layer.
        trainable: The number of parameters that would train because of this row.
    """

    path: str
    layer_type: str
    action: str
    why: str
    shape: tuple[int, ...] | None
    rank: int | None
    parameters: int
    trainable: int
    layer: keras.layers.Layer = field(repr=False)
    linear: LinearMap | None = field(repr=False, default=None)
    adapter: adapters.Adapter | None = field(repr=False, default=None)


class TargetList(reports.Printed, list[Target]):
    """A list of `Target`, one for each layer or kernel; printing it prints a table in which equal blocks are one.

    Attributes:
        parameters: The number of parameters that the adapted model would have.
        notes: What to look at before you train, in words.
    """

    def __init__(self, rows: list[Target], parameters: int, notes: list[str]):
        super().__init__(rows)
        self.parameters = parameters
        self.notes = notes

    def of(self, action: str) -> list[Target]:
        """The rows with this action."""
        return [target for target in self if target.action == action]

    @property
    def total(self) -> str:
        """One line that shows how much of the model would train, as `list_adapters(model).total` does afterwards."""
        return reports.total(sum(row.trainable for row in self), self.parameters)

    def lines(self) -> list[str]:
        return [self.total, *self.notes]

    def table(self, width: float) -> Table:
        """The table: equal blocks once, then each type of layer that has no adapter. If it is too wide, without types."""
        table = self._table(with_types=True)
        return self._table(with_types=False) if reports.is_wider(table, width) else table

    def _table(self, with_types: bool) -> Table:
        groups = reports.folded([row for row in self if not _is_aside(row)], _equality)
        branches = [(reports.span([row.path for row in group]), _cells(group, with_types)) for group in groups]
        aside: dict[tuple[str, str], list[Target]] = {}
        for row in filter(_is_aside, self):
            aside.setdefault((row.layer_type, row.why), []).append(row)
        words = ("layer", "type", "action") if with_types else ("layer", "action")
        table = reports.table_of(words, ("matrix", "rank", "params", "trained"))
        table.columns[words.index("action")].max_width = None if with_types else 12  # paths need the space
        reports.add_branches(table, branches)
        for (layer_type, _), group in aside.items():
            name = group[0].path if with_types and len(group) == 1 else f"{len(group)} × {layer_type}"
            table.add_row(name, *_cells(group, with_types))
        return table


def _is_aside(row: Target) -> bool:
    return row.why.startswith(NO_ADAPTER) or row.why == UNUSED


def _equality(row: Target) -> tuple[object, ...]:
    """The key for folding: rows with equal keys are printed as one."""
    columns = (row.layer_type, row.action, row.why, row.shape, row.rank, row.parameters, row.trainable)
    return (reports.stem(row.path), *columns)


def _cells(group: list[Target], with_types: bool) -> tuple[str, ...]:
    """The cells of equal rows after the first; the numbers of parameters are those of all."""
    row = group[0]
    why = {TARGET: "", LARGE: "large"}.get(row.why, row.why.removesuffix(f" for {row.layer_type}"))
    words = [row.layer_type] if with_types else []
    words.append(f"{row.action}: {why}" if why else row.action)
    shape = "" if row.shape is None else "×".join(map(str, row.shape))
    rank = "" if row.rank is None else str(row.rank)
    sums = (sum(each.parameters for each in group), sum(each.trainable for each in group))
    return (*words, shape, rank, *map(reports.short, sums))
