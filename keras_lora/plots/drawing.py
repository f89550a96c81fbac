"""The figures. matplotlib is imported when one is drawn."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_lora import checks, reports
from keras_lora.plots.curves import read_curves
from keras_lora.plots.measuring import AdapterMeasure, measure_adapters
from keras_lora.plots.overlaps import Overlaps, measure_overlaps

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: The most labels on an axis. If there are more rows, only some have a label.
MOST_LABELS = 30
#: The most singular values of a row.
_MOST_VALUES = 64
#: A cell of a heat map has its number up to this many rows.
_MOST_NUMBERS = 10


@checks.helpful
def plot_ranks(model: Any, *, names: str | Iterable[str] | None = None, energy: float = 0.9) -> Figure:
    """Draw the singular values of each adapter's change and its effective rank. It shows if a rank is higher than needed.

    On the left is a row of singular values for each kernel, divided by the largest one. On the right is the effective rank
    of each kernel (a dot), the smallest rank that keeps the share `energy` (a cross), and the adapter's rank (a line). If
    dots and crosses are far below the line, a lower rank may do; `keras_lora.compress_adapter` gives you one.

    Equal blocks share a row: the left panel shows their mean, and the right panel a dot for each, from the first block
    (dark) to the last (light).

    Args:
        model: An adapted model, or an adapted part of one.
        names: The name of an adapter, or several. All of them by default.
        energy: Number in (0, 1], the share of the squared singular values for the crosses.

    Returns:
        A matplotlib `Figure`. Save it with `figure.savefig("ranks.svg")`. `measure_adapters` has the numbers.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: As for `measure_adapters`.

    Example:

    >>> import keras, keras_lora
    >>> model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(32), keras.layers.Dense(2)])
    >>> figure = keras_lora.plots.plot_ranks(keras_lora.apply_lora(model, rank=4))
    >>> [ax.get_xlabel() for ax in figure.axes][:2]
    ['singular value', 'rank']
    """
    groups = _folded(measure_adapters(model, names=names, energy=energy))
    labels = [_name_of(group) for group in groups]
    figure, (left, right) = _panels(labels, 2, sharey=True)
    most = min(_MOST_VALUES, max(len(row.singular_values) for group in groups for row in group))
    heat = np.full((len(groups), most), np.nan)
    for line, group in enumerate(groups):
        shares = np.array([_shares(row, most) for row in group])
        heat[line, : shares.shape[1]] = shares.mean(axis=0)
    drawn = left.imshow(
        heat, aspect="auto", vmin=0, vmax=1, cmap="viridis", extent=(0.5, most + 0.5, len(groups) - 0.5, -0.5)
    )
    left.set(title="singular values of ΔW", xlabel="singular value")
    _whole_numbers(left.xaxis)
    figure.colorbar(drawn, ax=left, label="divided by the largest", location="top", shrink=0.6)
    _dots(right, groups, [[row.effective_rank for row in group] for group in groups], "effective rank")
    ranked = [line for line, group in enumerate(groups) if group[0].rank is not None]
    for line, group in enumerate(groups):
        again = {} if line else {"label": f"rank that keeps {energy:.4g}"}
        right.plot([row.compressed_rank for row in group], [line] * len(group), "x", color="tab:red", markersize=4, **again)
        if line in ranked:
            again = {} if line != ranked[0] else {"label": "rank of the adapter"}
            right.plot([group[0].rank] * 2, [line - 0.4, line + 0.4], color="gray", **again)
    right.set(title="effective rank", xlabel="rank", xlim=(0, None))
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    _label(left, labels)
    return figure


@checks.helpful
def plot_changes(model: Any, *, names: str | Iterable[str] | None = None) -> Figure:
    """Draw how far each layer moved: the size of the change relative to the kernel, `‖strength · ΔW‖ / ‖W‖` (Frobenius).

    Equal blocks share a row, with a dot for each, from the first block (dark) to the last (light).

    Args:
        model: An adapted model, or an adapted part of one.
        names: The name of an adapter, or several. All of them by default.

    Returns:
        A matplotlib `Figure`. `measure_adapters` has the numbers.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: As for `measure_adapters`, or a kernel is zero.

    Example:

    >>> import keras, keras_lora
    >>> model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(32, name="hidden"), keras.layers.Dense(2)])
    >>> figure = keras_lora.plots.plot_changes(keras_lora.apply_lora(model, rank=4))
    >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
    ['hidden']
    """
    rows = measure_adapters(model, names=names)
    infinite = [row.layer for row in rows if math.isinf(row.relative_change)]
    if infinite:
        raise ValueError(
            f"A change has no relative size if the kernel is zero. Received: zero kernels in the layers {infinite}."
        )
    groups = _folded(rows)
    labels = [_name_of(group) for group in groups]
    figure, (ax,) = _panels(labels, 1)
    _dots(ax, groups, [[row.relative_change for row in group] for group in groups], "")
    ax.set(xlabel="‖strength · ΔW‖ / ‖W‖", xlim=(0, None), ylim=(len(groups) - 0.5, -0.5))
    ax.grid(axis="x", alpha=0.3)
    _label(ax, labels)
    return figure


@checks.helpful
def plot_overlaps(
    model: Any, *, names: Iterable[str] | None = None, measure: str = "subspace", directions: int | None = None
) -> Figure:
    """Draw how much the changes of two or more adapters have in common, as a heat map.

    With exactly two adapters, a second panel has a bar for each layer.

    Args:
        model: An adapted model with several adapters, or an adapted part of one.
        names: Their names, at least two. All of them by default.
        measure: `"subspace"` or `"cosine"`, as for `measure_overlaps`.
        directions: For `"subspace"`, the largest number of directions.

    Returns:
        A matplotlib `Figure`. `measure_overlaps` has the numbers.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: As for `measure_overlaps`.

    Example:

    >>> import keras, keras_lora
    >>> model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(32), keras.layers.Dense(2)])
    >>> for name in ("french", "formal"):
    ...     model = keras_lora.apply_lora(model, rank=2, name=name)
    >>> figure = keras_lora.plots.plot_overlaps(model, measure="cosine")
    >>> [label.get_text() for label in figure.axes[0].get_xticklabels()]
    ['french', 'formal']
    """
    found = measure_overlaps(model, names=names, measure=measure, directions=directions)
    pair = len(found.names) == 2
    figure, (ax, *others) = _panels([*found.layers, *found.names] if pair else [*found.names] * 2, 2 if pair else 1)
    least = 0 if measure == "subspace" else -1
    drawn = ax.imshow(found.values, vmin=least, vmax=1, cmap="viridis" if measure == "subspace" else "RdBu")
    figure.colorbar(drawn, ax=ax, shrink=0.6)
    ax.set(title=_title(found))
    _label(ax, list(found.names), "x")
    _label(ax, list(found.names))
    if len(found.names) <= _MOST_NUMBERS:
        for (line, column), value in np.ndenumerate(np.array(found.values)):
            text = "-" if math.isnan(value) else f"{value:.2f}"
            box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1}
            ax.text(column, line, text, ha="center", va="center", color="black", fontsize="small", bbox=box)
    for other in others:
        values = [table[0][1] for table in found.layers.values()]
        other.barh(range(len(values)), values)
        other.axvline(found.chance, color="gray", linestyle="--")
        other.set(title=" and ".join(found.names), xlim=(least, 1), ylim=(len(values) - 0.5, -0.5))
        _label(other, list(found.layers))
    return figure


@checks.helpful
def plot_curves(runs: Any, *, metrics: Iterable[str] | None = None) -> Figure:
    """Draw the training curves of several runs side by side, a panel for each metric.

    Solid lines are from training, dashed lines from validation. The first epoch is 1.

    Args:
        runs: A mapping from names of runs to `History` objects, paths of files of `keras.callbacks.CSVLogger`, or dicts of
            lists, as for `read_curves`.
        metrics: The metrics to draw, without `val_`. All of them by default.

    Returns:
        A matplotlib `Figure`. `read_curves` has the numbers.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: As for `read_curves`, or no run has a metric.
        TypeError: As for `read_curves`.

    Example:

    >>> import keras_lora
    >>> runs = {"rank 1": {"loss": [0.7, 0.5]}, "rank 8": {"loss": [0.7, 0.4], "val_loss": [0.8, 0.6]}}
    >>> figure = keras_lora.plots.plot_curves(runs)
    >>> figure.axes[0].get_title(), len(figure.axes[0].lines)
    ('loss', 3)
    """
    curves = read_curves(runs)
    known = dict.fromkeys(name.removeprefix("val_") for run in curves.values() for name in run if name != "epoch")
    wanted = list(known) if metrics is None else [metrics] if isinstance(metrics, str) else list(metrics)
    unknown = [metric for metric in wanted if metric not in known]
    if unknown or not wanted:
        raise ValueError(f"No run has the metrics {unknown or 'to draw'}. Expected some of {list(known)}.")
    columns = min(3, len(wanted))
    figure = _figure(3.4 * columns, 3.0 * math.ceil(len(wanted) / columns) + 0.5)
    colours = _colours(len(curves))
    for place, metric in enumerate(wanted):
        ax = figure.add_subplot(math.ceil(len(wanted) / columns), columns, place + 1)
        for colour, (name, run) in zip(colours, curves.items(), strict=True):
            for key, style in ((metric, "-"), (f"val_{metric}", "--")):
                if key in run:
                    epochs = [epoch + 1 for epoch in run["epoch"]]
                    label = name if style == "-" else f"{name}, validation"
                    ax.plot(epochs, run[key], style, color=colour, marker="o", markersize=3, label=label)
        ax.set(title=metric, xlabel="epoch")
        _whole_numbers(ax.xaxis)
        _plain_spines(ax)
    entries = {each: line for ax in figure.axes for line, each in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(
        list(entries.values()), list(entries), loc="outside lower center", ncols=3, frameon=False, fontsize="small"
    )
    return figure


def _figure(width: float, height: float) -> Figure:
    """A figure that pyplot does not know, so nothing keeps it after you drop it."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        text = f"Plots need matplotlib ({error}). Install it: `pip install 'keras_lora[plots]'`."
        raise ModuleNotFoundError(text, name="matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained")


def _panels(labels: list[str], panels: int, sharey: bool = False) -> tuple[Figure, list[Any]]:
    """A figure with panels side by side, as high and as wide as these labels need."""
    figure = _figure(0.065 * max(map(len, labels)) + 3.4 * panels + 0.6, min(9.0, 2.0 + 0.26 * len(labels)))
    axes = figure.subplots(1, panels, squeeze=False, sharey=sharey)[0]
    for ax in axes:
        _plain_spines(ax)
    return figure, list(axes)


def _folded(rows: list[AdapterMeasure]) -> list[list[AdapterMeasure]]:
    """The rows of equal blocks as one group."""
    return reports.folded(
        rows, lambda row: (reports.stem(row.layer), row.name, row.method, row.rank, len(row.singular_values))
    )


def _name_of(group: Sequence[AdapterMeasure]) -> str:
    """The label of a group: the path, and the adapter if it has a name of its own."""
    path = "/".join(reports.span([row.layer for row in group]))
    return path if group[0].name == "default" else f"{path} · {group[0].name}"


def _shares(row: AdapterMeasure, most: int) -> list[float]:
    largest = row.singular_values[0] or 1.0
    return [each / largest for each in row.singular_values[:most]]


def _dots(ax: Any, groups: list[list[AdapterMeasure]], values: list[list[float]], label: str) -> None:
    """A dot for each value: those of a group on one line, dark for the first and light for the last."""
    for line, own in enumerate(values):
        colours = np.linspace(0, 1, len(own)) if len(own) > 1 else [0.0]
        name = label if label and line == 0 else None
        ax.scatter(own, [line] * len(own), c=colours, cmap="viridis", vmin=0, vmax=1.15, s=22, label=name, zorder=3)


def _label(ax: Any, names: list[str], axis: str = "y") -> None:
    """Label the lines of a heat map or of dots, at most `MOST_LABELS` of them at equal distances."""
    step = math.ceil(len(names) / MOST_LABELS)
    places = range(0, len(names), step)
    shown = [names[place] for place in places]
    if axis == "x":
        ax.set_xticks(places, shown, rotation=30, ha="right")
    else:
        ax.set_yticks(places, shown, fontsize="small")


def _title(found: Overlaps) -> str:
    if found.measure == "cosine":
        return "cosine of the changes"
    return f"overlap of the subspaces\n(random ones: {found.chance:.2f})"


def _colours(count: int) -> list[Any]:
    """A colour for each run."""
    from matplotlib import colormaps

    return [f"C{each}" for each in range(count)] if count <= 10 else list(colormaps["viridis"](np.linspace(0, 0.9, count)))


def _whole_numbers(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))


def _plain_spines(ax: Any) -> None:
    ax.spines[["top", "right"]].set_visible(False)
