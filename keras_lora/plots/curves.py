"""Training curves of several runs, from Keras's `History` objects or the files of `CSVLogger`."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keras_lora import checks

#: What `CSVLogger` may have between its columns.
_SEPARATORS = ",;\t|"


@checks.helpful
def read_curves(runs: Any) -> dict[str, dict[str, list[float]]]:
    """Read the training curves of several runs. These are the numbers behind `plot_curves`.

    Args:
        runs: A mapping from names of runs to what each run left: the `History` that `fit` returns, the path of a file
            written by `keras.callbacks.CSVLogger`, or a dict with a list of numbers for each metric.

    Returns:
        For each run, a list of numbers for each metric, and the list `"epoch"`, which counts from 0 as Keras does. A value
        that is missing is NaN.

    Raises:
        ValueError: A file or a dict has no epochs, or something that is not a number.
        TypeError: `runs` is not a mapping, or a run is none of the above.

    Example:

    >>> import keras_lora
    >>> keras_lora.plots.read_curves({"rank 8": {"loss": [0.7, 0.4]}})
    {'rank 8': {'epoch': [0.0, 1.0], 'loss': [0.7, 0.4]}}
    """
    if not isinstance(runs, Mapping):
        raise TypeError(
            f"`runs` must be a mapping from names to runs, as {{'rank 8': history}}. Received: {checks.described(runs)}."
        )
    if not runs:
        raise ValueError("`runs` must have at least one run. Received: none.")
    return {str(name): _read(str(name), run) for name, run in runs.items()}


def _read(name: str, run: Any) -> dict[str, list[float]]:
    if isinstance(run, (str, os.PathLike)):
        columns = _of_file(Path(run))
    elif isinstance(getattr(run, "history", None), Mapping):
        columns = {"epoch": list(getattr(run, "epoch", [])), **run.history}
    elif isinstance(run, Mapping):
        columns = dict(run)
    else:
        raise TypeError(
            f"The run '{name}' must be a History, the path of a file of CSVLogger, or a dict of lists. Received: "
            f"{checks.described(run)}."
        )
    found = {str(metric): [_number(name, metric, each) for each in values] for metric, values in columns.items()}
    length = max(map(len, found.values()), default=0)
    epochs = found.pop("epoch", []) or [float(each) for each in range(length)]
    short = {metric: len(values) for metric, values in found.items() if len(values) != len(epochs)}
    if not epochs or short:
        raise ValueError(
            f"The run '{name}' must have a number for each of its epochs. Received: {len(epochs)} epochs"
            + (f", and {short} numbers." if short else ".")
        )
    return {"epoch": epochs, **found}


def _of_file(path: Path) -> dict[str, list[Any]]:
    with path.open(newline="", encoding="utf-8") as file:
        head = file.readline()
        separator = max(_SEPARATORS, key=head.count)
        file.seek(0)
        rows = list(csv.DictReader(file, delimiter=separator))
    if not rows or "epoch" not in rows[0]:
        raise ValueError(f"{path} must be a file of `keras.callbacks.CSVLogger`, with an epoch. Received: {head[:80]!r}.")
    columns = {column: [row[column] for row in rows] for column in rows[0] if column}
    # CSVLogger writes the columns of validation even if there is none, with "NA" in each row.
    return {column: values for column, values in columns.items() if set(values) != {"NA"}}


def _number(run: str, metric: Any, value: Any) -> float:
    try:
        return math.nan if value in ("NA", "", None) else float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"'{metric}' of the run '{run}' must have numbers. Received: {checks.described(value)}.") from error
