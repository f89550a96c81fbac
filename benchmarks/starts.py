"""Measure the starting points, and write the tables of `docs/starting_points.md`.

KERAS_BACKEND=torch python benchmarks/starts.py          # measure, write benchmarks/results/starts.json and the page
KERAS_BACKEND=torch python benchmarks/starts.py --page   # the page alone, from the committed numbers
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "starts.json", ROOT / "docs" / "starting_points.md"
RATES = (1e-3, 3e-3, 1e-2)
SEEDS = (0, 1, 2)
STARTS = ("none", "pissa", "olora", "orthogonal", "eva", "lora_ga")
PLANTED = 4


def seconds_of_svd() -> dict[str, float]:
    """CPU seconds of a randomised SVD of a 4096 × 4096 kernel, the median of three."""
    import numpy as np

    from keras_lora.starts import sketches

    rng, found = np.random.default_rng(0), {}
    matrix = rng.normal(size=(4096, 4096)).astype("float32")
    for rank in (8, 64):
        times = []
        for _ in range(3):
            begin = time.process_time()
            sketches.leading(matrix, rank, rng)
            times.append(time.process_time() - begin)
        found[str(rank)] = sorted(times)[1]
    return found


def energy_of_eva() -> float:
    """The share of the largest possible energy of the inputs that A of EVA has, on inputs with a decaying spectrum."""
    import keras
    import numpy as np

    import keras_lora

    rng = np.random.default_rng(0)
    x = rng.normal(size=(2048, 256)) / np.arange(1, 257) @ np.linalg.qr(rng.normal(size=(256, 256)))[0]
    x = x.astype("float32")
    model = keras.Sequential([keras.Input((256,)), keras.layers.Dense(64), keras.layers.Dense(2)])
    keras_lora.apply_lora(model, rank=8)
    keras_lora.start_from(model, "eva", x, batch_size=64)
    a = next(
        value
        for variable, value in zip(model.layers[0].weights, model.layers[0].get_weights(), strict=True)
        if variable.name == "lora_a"
    )
    best = np.linalg.svd(x, compute_uv=False)[:8]
    return float(np.linalg.norm(x @ a) ** 2 / np.sum(best**2))


def error_of_loftq() -> dict[str, list[float]]:
    """The relative error of the output of quantised layers, and with the start, on random inputs."""
    import keras
    import numpy as np

    import keras_lora

    found = {}
    x = np.random.default_rng(0).normal(size=(256, 512)).astype("float32")
    for mode in ("int8", "int4"):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((512,)), keras.layers.Dense(512), keras.layers.Dense(512)])
        base = keras.models.clone_model(model)
        base.set_weights(model.get_weights())
        wanted = base.predict(x, verbose=0)
        model.quantize(mode)
        keras_lora.apply_lora(model, rank=16, head=None)
        errors = []
        for start in (None, "loftq"):
            if start is not None:
                keras_lora.start_from(model, start, base=base)
            errors.append(float(np.linalg.norm(model.predict(x, verbose=0) - wanted) / np.linalg.norm(wanted)))
        found[mode] = errors
    return found


def planted_loss(start: str, rank: int, rate: float, seed: int, steps: int) -> float:
    """The loss, relative to that of the base, after training on data of a kernel that differs by a matrix of rank 4."""
    import keras
    import numpy as np

    import keras_lora

    rng = np.random.default_rng(seed)
    keras.utils.set_random_seed(seed)
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(48, use_bias=False)])
    kernel = model.layers[0].get_weights()[0]
    change = rng.normal(size=(64, PLANTED)) @ rng.normal(size=(PLANTED, 48)) / 48
    x = rng.normal(size=(512, 64)).astype("float32")
    y = (x @ (kernel + change)).astype("float32")
    before = float(np.mean((x @ kernel - y) ** 2))
    keras_lora.apply_lora(model, keras_lora.LoRA(rank=rank, seed=seed), head=None)
    if start != "none":
        needs: Any = {"eva": {"data": x}, "lora_ga": {"data": (x, y), "loss": "mse"}}.get(start, {})
        keras_lora.start_from(model, start, **needs)
    model.compile(keras.optimizers.Adam(rate), "mse")
    model.fit(x, y, batch_size=512, epochs=steps, verbose=0)
    return float(model.evaluate(x, y, verbose=0)) / before


def best(start: str, rank: int, steps: int, rates: tuple[float, ...] = RATES) -> dict[str, float]:
    """The smallest mean loss over the rates, its rate, and the largest distance of a seed from the mean."""
    found = []
    for rate in rates:
        losses = [planted_loss(start, rank, rate, seed, steps) for seed in SEEDS]
        mean = sum(losses) / len(losses)
        found.append((mean, rate, max(abs(each - mean) for each in losses)))
    mean, rate, spread = min(found)
    return {"loss": mean, "rate": rate, "spread": spread}


def measured() -> dict[str, Any]:
    """All numbers of the page."""
    import keras

    return {
        "backend": keras.backend.backend(),
        "cores": os.cpu_count(),
        "svd": seconds_of_svd(),
        "eva": energy_of_eva(),
        "loftq": error_of_loftq(),
        "starts": {start: best(start, PLANTED, 60) for start in STARTS},
        "ranks": {str(rank): best("none", rank, 320, (1e-2,)) for rank in (1, 2, 3, 4, 6, 8)},
    }


def tables(data: dict[str, Any]) -> dict[str, str]:
    """The tables by their mark in the page."""

    def lines(head: list[str], rows: list[list[str]]) -> str:
        rule = ["---", *["---:"] * (len(head) - 1)]
        return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *rows])

    def of(name: str, key: str) -> list[str]:
        row = data[name][key]
        return [key, f"{row['loss']:.2g}", f"{row['spread']:.1g}", f"{row['rate']:g}"]

    percent = {mode: [f"{100 * each:.2f} %" for each in errors] for mode, errors in data["loftq"].items()}
    return {
        "svd": lines(["rank", "CPU seconds"], [[rank, f"{each:.2f}"] for rank, each in data["svd"].items()]),
        "eva": f"{data['eva']:.4f}",
        "loftq": lines(["base", "quantised", "with `loftq`"], [[mode, *each] for mode, each in percent.items()]),
        "starts": lines(["start", "loss", "± seeds", "rate"], [of("starts", start) for start in data["starts"]]),
        "ranks": lines(["rank", "loss", "± seeds", "rate"], [of("ranks", rank) for rank in data["ranks"]]),
    }


def with_tables(page: str, data: dict[str, Any]) -> str:
    """The page with the numbers between their marks."""
    for mark, text in tables(data).items():
        begin, end = f"<!-- starts {mark} -->", f"<!-- /starts {mark} -->"
        head, _, rest = page.partition(begin)
        between = text if "\n" not in text else f"\n{text}\n"
        page = head + begin + between + end + rest.partition(end)[2]
    return page


def main() -> None:
    """Measure if asked to, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", action="store_true")
    if not parser.parse_args().page:
        RESULTS.write_text(json.dumps(measured(), indent=1) + "\n")
    PAGE.write_text(with_tables(PAGE.read_text(), json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
