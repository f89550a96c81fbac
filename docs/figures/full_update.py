"""Fine-tune MiniLM in full, and see how much of the change of each kernel a low rank catches.

    python docs/figures/full_update.py        # after `make demo`, which installs what it needs; also needs matplotlib

The model, the sentences and the settings are those of the row "full" of `examples/movie_reviews.py`. The script takes the
singular values of ΔW, the kernel after training minus the kernel before, for every kernel of the six transformer blocks.
Then it cuts each ΔW to its best approximation of a rank, leaves every other weight as full fine-tuning left it, and
evaluates the model on the test sentences. It writes `full_update.json` and `full_update.svg`. `what_is_lora.py` prints the
table.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import keras
import movie_reviews
import numpy as np
import printing
from movie_reviews_data import load_sentences

from keras_lora.swap.adapted import maps_by_address

RANKS = (0, 1, 2, 4, 8, 16, 32, 64)


def kernels_of(model: keras.Model) -> dict[str, Any]:
    """The kernels of the transformer blocks by the path of their variable, as linear maps."""
    maps = maps_by_address(model).values()
    return {each.kernel_variable.path: each for each in maps if "transformer_layer" in each.kernel_variable.path}


def matrices(model: keras.Model) -> dict[str, np.ndarray]:
    """The kernels as matrices, `(in_dim, out_dim)`, in float64."""
    return {path: np.asarray(keras.ops.convert_to_numpy(each.matrix), "float64") for path, each in kernels_of(model).items()}


def cut(model: keras.Model, before: dict[str, np.ndarray], parts: dict[str, Any], rank: int) -> None:
    """Set each kernel to what it was before, plus the best approximation of its change of a rank."""
    for path, linear in kernels_of(model).items():
        u, s, v = parts[path]
        changed = before[path] + (u[:, :rank] * s[:rank]) @ v[:rank]
        linear.kernel_variable.assign(linear.as_kernel(keras.ops.convert_to_tensor(changed, "float32")))


def accuracy_of(model: keras.Model, test: Any) -> float:
    """The accuracy on the test sentences."""
    return float(model.evaluate(*test, batch_size=200, verbose=0)[1])


def measure(train: Any, test: Any) -> dict[str, Any]:
    """Fine-tune and measure."""
    [settings] = [each for each in movie_reviews.METHODS if each["method"] == "full"]
    before = matrices(movie_reviews.build_classifier())
    keras.utils.clear_session()  # the second model gets the same names
    with tempfile.TemporaryDirectory() as folder:
        model, _ = movie_reviews.fine_tune(train, test, Path(folder), **settings)
    after = matrices(model)
    parts = {path: np.linalg.svd(after[path] - before[path], full_matrices=False) for path in before}
    whole = accuracy_of(model, test)
    cuts = {}
    for rank in RANKS:
        cut(model, before, parts, rank)
        cuts[str(rank)] = accuracy_of(model, test)
        print(f"rank {rank}: {cuts[str(rank)]:.3f}", flush=True)
    kernels = []
    for path, (_, s, _) in parts.items():
        kept = np.cumsum(s**2) / np.sum(s**2)
        kernels.append(
            {
                "kernel": path,
                "shape": list(before[path].shape),
                "relative change": float(np.linalg.norm(s) / np.linalg.norm(before[path])),
                "kept": {str(rank): float(kept[rank - 1]) for rank in RANKS if rank},
            }
        )
    return {
        "settings": {**settings, "train": len(train[1]), "test": len(test[1]), "batch": movie_reviews.BATCH},
        "accuracy": whole,
        "accuracy of a cut update": cuts,
        "kernels": kernels,
        "made": printing.made_with(),
    }


def draw(results: dict[str, Any]) -> Any:
    """For each kind of kernel, the share of the squared norm that a rank catches, the mean over the blocks."""
    from matplotlib.figure import Figure

    kinds: dict[str, list[list[float]]] = {}
    for each in results["kernels"]:
        kinds.setdefault(kind_of(each["kernel"]), []).append(list(each["kept"].values()))
    ranks = [rank for rank in RANKS if rank]
    figure = Figure(figsize=(7, 4), layout="constrained")
    ax = figure.add_subplot()
    for kind, lines in kinds.items():
        shares = np.array(lines)
        ax.plot(ranks, shares.mean(axis=0), marker="o", markersize=3, label=kind)
    ax.set_xscale("log", base=2)
    ax.set_xticks(ranks, [str(rank) for rank in ranks])
    ax.set(
        xlabel="rank", ylabel="share of ‖ΔW‖²", ylim=(0, 1.02), title="What a low rank catches of a full update of MiniLM"
    )
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize="small")
    return figure


def kind_of(path: str) -> str:
    """The name of a kernel inside its block."""
    return path.split("/")[-2].lstrip("_").replace("_", " ")


def main() -> None:
    """Train, measure and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="draw the figure again from the JSON file")
    if not parser.parse_args().draw:
        x, y = load_sentences()
        train, test = (
            ({name: each[at] for name, each in x.items()}, y[at]) for at in (movie_reviews.TRAIN, movie_reviews.TEST)
        )
        printing.write("full_update", measure(train, test))
    printing.save(draw(printing.read("full_update")), "full_update")


if __name__ == "__main__":
    main()
