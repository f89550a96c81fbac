"""Does a sentence praise a film or not? One pretrained encoder, fine-tuned in four ways on the same real sentences.

    make demo                        # or: python examples/movie_reviews.py
    KERAS_BACKEND=torch make demo    # jax (the default), torch or tensorflow
    make demo DEMO="--seeds 3"       # the mean of three seeds, and how far they differ

"frozen" trains a new head only. LoRA trains the head and a change of low rank to every projection of the encoder. "full"
trains everything. Each starts from a fresh copy of MiniLM (22.7 million parameters), with the same seeds and sentences. A
seed sets the new head, the adapters and the order of the sentences.
Learning rates and epochs were chosen for each on a validation slice, sentences 6,000 to 8,000; the table is from test
sentences that had no part in it. Then the LoRA model is saved to a `.keras` file and loaded in a new process,
and is merged into a plain Keras model. Neither may change its predictions.
"""

import argparse
import importlib
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np
import rich.box
from movie_reviews_data import CACHE, load_minilm, load_sentences
from rich.console import Console
from rich.table import Table

import keras_lora

TRAIN, TEST = slice(0, 3200), slice(8000, None)
BATCH = 32
METHODS: list[dict[str, Any]] = [
    {"method": "frozen", "rank": None, "learning_rate": 2e-2, "epochs": 2},
    {"method": "LoRA rank 1", "rank": 1, "learning_rate": 2e-3, "epochs": 1},
    {"method": "LoRA rank 8", "rank": 8, "learning_rate": 2e-3, "epochs": 1},
    {"method": "full", "rank": None, "learning_rate": 2e-4, "epochs": 1},
]
COLUMNS = ["", "test accuracy", "trainable parameters", "optimizer MB", "checkpoint MB", "s/step", "fit s"]

LOAD_ELSEWHERE = """
import sys, numpy as np, keras, keras_lora
model = keras.saving.load_model(sys.argv[1])
np.save(sys.argv[3], model.predict(dict(np.load(sys.argv[2])), verbose=0))
"""


def build_classifier(**minilm: Any) -> keras.Model:
    """MiniLM, the mean of its outputs over the tokens, and a new head. Arguments are those of `load_minilm`."""
    encoder = load_minilm(**minilm)
    tokens = encoder.output["sequence_output"]
    mean = keras.layers.GlobalAveragePooling1D()(tokens, mask=encoder.input["padding_mask"])
    return keras.Model(encoder.input, keras.layers.Dense(2, name="head")(mean), name="film_reviews")


def choose_what_trains(model: keras.Model, method: str, rank: int | None) -> None:
    if rank is not None:
        keras_lora.apply_lora(model, rank=rank, train="head")
    elif method == "frozen":
        for layer in model.layers:
            layer.trainable = layer.name == "head"


def save_what_trained(model: keras.Model, method: str, rank: int | None, folder: Path) -> int:
    """Write the smallest file that restores the result on top of MiniLM, and return its size in bytes."""
    if rank is not None:
        path = folder / "lora.safetensors"
        keras_lora.save_adapter(model, path)
    elif method == "frozen":
        path = folder / "head.npz"
        np.savez(path, *model.get_layer("head").get_weights())
    else:
        path = folder / "full.weights.h5"
        keras.Model(model.input, model.output).save_weights(path)  # the same layers, without the optimizer
    return path.stat().st_size


def fine_tune(train, test, folder, seed, method, rank, learning_rate, epochs) -> tuple[keras.Model, dict[str, float]]:
    """Fine-tune a fresh copy in one way, and return it with what was measured."""
    print(f"\n{method}, seed {seed}", flush=True)
    keras.utils.set_random_seed(seed)
    model = build_classifier()
    choose_what_trains(model, method, rank)

    steps = epochs * math.ceil(len(train[1]) / BATCH)
    warmup = steps // 10
    schedule = keras.optimizers.schedules.CosineDecay(0.0, steps - warmup, warmup_target=learning_rate, warmup_steps=warmup)
    model.compile(
        optimizer=keras.optimizers.AdamW(schedule, weight_decay=0.0),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    ends: list[float] = []  # when each step ended; the first step, which compiles, ends before the first difference
    timer = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: ends.append(time.perf_counter()))
    start = time.perf_counter()
    verbose = 1 if sys.stdout.isatty() else 2  # no progress bar in a pipe or a file
    model.fit(*train, batch_size=BATCH, epochs=epochs, verbose=verbose, callbacks=[timer])
    seconds = time.perf_counter() - start

    _, accuracy = model.evaluate(*test, batch_size=200, verbose=0)
    return model, {
        "test accuracy": accuracy,
        "trainable parameters": sum(math.prod(v.shape) for v in model.trainable_variables),
        "optimizer MB": sum(math.prod(v.shape) * np.dtype(v.dtype).itemsize for v in model.optimizer.variables) / 1e6,
        "checkpoint MB": save_what_trained(model, method, rank, folder) / 1e6,
        "s/step": float(np.median(np.diff(ends))),
        "fit s": seconds,
    }


def row_of(method: str, runs: list[dict[str, float]]) -> list[str]:
    """A row of the table: the means over the seeds, and for the accuracy its lowest and highest value too."""
    mean = {key: float(np.mean([run[key] for run in runs])) for key in runs[0]}
    accuracies = [run["test accuracy"] for run in runs]
    spread = f" ({min(accuracies):.3f} to {max(accuracies):.3f})" if len(runs) > 1 else ""
    words = [f"{mean['test accuracy']:.3f}{spread}", f"{mean['trainable parameters']:,.0f}"]
    words += [f"{mean[key]:.3f}" for key in ("optimizer MB", "checkpoint MB", "s/step")]
    return [method, *words, f"{mean['fit s']:.0f}"]


def difference_in_new_process(model: keras.Model, x: dict, expected: np.ndarray, folder: Path) -> float:
    """Save the whole model, load it in a new Python process, and compare what it predicts there."""
    files = [str(folder / name) for name in ("model.keras", "x.npz", "predictions.npy")]
    model.save(files[0])
    np.savez(files[1], **x)
    subprocess.run([sys.executable, "-c", LOAD_ELSEWHERE, *files], check=True)
    return float(np.abs(np.load(files[2]) - expected).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few sentences: shows that it runs, not how well")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="train each way with N seeds; 1 by default")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there too, as Markdown")
    arguments = parser.parse_args()

    x, y = load_sentences()
    train_at, test_at = (slice(0, 64), slice(8000, 8040)) if arguments.quick else (TRAIN, TEST)
    train = {name: each[train_at] for name, each in x.items()}, y[train_at]
    test = {name: each[test_at] for name, each in x.items()}, y[test_at]

    with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
        folder, rows, accuracies = Path(temporary), [], []
        for settings in METHODS:
            runs = []
            for seed in range(arguments.seeds):
                model, run = fine_tune(train, test, folder, seed, **settings)
                runs.append(run)
            rows.append(row_of(settings["method"], runs))
            accuracies += [run["test accuracy"] for run in runs]
            if settings["rank"] is not None:
                adapted = model

        few = {name: each[:40] for name, each in test[0].items()}
        expected = adapted.predict(few, verbose=0)
        reloaded = difference_in_new_process(adapted, few, expected, folder)
    merged = float(np.abs(keras_lora.merge_lora(adapted).predict(few, verbose=0) - expected).max())

    error = max(math.sqrt(each * (1 - each) / len(test[1])) for each in accuracies)
    seeds = "one seed" if arguments.seeds == 1 else f"means of {arguments.seeds} seeds, with the lowest and highest accuracy"
    caption = (
        f"{len(train[1]):,} sentences to train, {len(test[1]):,} to test; {seeds}. "
        f"The standard error of one accuracy, from the number of test sentences, is at most {error:.3f}."
    )
    show(rows, caption, arguments.markdown)
    print(f"largest change of a prediction, saved and loaded in a new process: {reloaded:.1e}")
    print(f"largest change of a prediction, merged into plain Keras layers:    {merged:.1e}")
    if not (reloaded <= 1e-4 and merged <= 1e-4):  # so written, NaN fails too
        raise SystemExit("These must be at most 1e-4.")


def show(rows: list[list[str]], caption: str, markdown: Path | None) -> None:
    table = Table(caption=caption, box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for column in COLUMNS:
        table.add_column(column.replace(" ", "\n", 1), justify="right" if column else "left")
    for row in rows:
        table.add_row(*row)
    Console().print("\n", table)
    if markdown is not None:
        lines = [COLUMNS, ["---", *["---:"] * (len(COLUMNS) - 1)], *rows]
        backend = importlib.import_module(keras.backend.backend())
        made = f"Keras {keras.__version__}, {backend.__name__} {backend.__version__}, keras_lora {keras_lora.__version__}; "
        made += f"{os.cpu_count()} CPU cores; {time.strftime('%Y-%m-%d')}."
        markdown.write_text("".join(f"| {' | '.join(line)} |\n" for line in lines) + f"\n{caption} {made}\n")


if __name__ == "__main__":
    main()
