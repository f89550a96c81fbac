"""Compare the ways to store a base: error, bytes and time. `--write` puts the table into `docs/how_it_works.md`.

    KERAS_BACKEND=torch python benchmarks/base_dtypes.py         # measures, and keeps the result of this backend
    python benchmarks/base_dtypes.py --write

One Dense of 1,024 x 1,024 with normal weights and 256 rows. "Error" is the root mean square of what was rounded away, over
that of the weights. The times are those of a training step, over that of a float32 base; the ways take turns in one process.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "base_dtypes.json"
PAGE = ROOT / "docs" / "how_it_works.md"
BEGIN, END = "<!-- base dtypes -->\n", "<!-- /base dtypes -->\n"
WAYS = (None, "bfloat16", "int8", "int4", "nf4")


def measured(width: int = 1024, rows: int = 256, turns: int = 12) -> dict[str, dict[str, float]]:
    """Error, bits a parameter and time of each way."""
    import keras
    import numpy as np

    import keras_lora

    weights = np.random.default_rng(0).normal(size=(width, width)).astype("float32")
    x = np.random.default_rng(1).normal(size=(rows, width)).astype("float32")
    models, found = {}, {}
    for way in WAYS:
        layers = [keras.Input((width,)), *(keras.layers.Dense(width, use_bias=False) for _ in range(2))]
        model = keras.Sequential(layers)
        for layer in model.layers:
            layer.kernel.assign(weights)
        keras_lora.apply_lora(model, rank=8, head=None, base_dtype=way)
        linear = model.layers[0].linear_map
        error = keras.ops.convert_to_numpy(keras.ops.cast(linear.kernel, "float32")) - weights
        frozen = [v for v in model.layers[0].weights if "lora" not in v.path]
        stored = sum(math.prod(v.shape) * keras.backend.standardize_dtype(v.dtype).endswith("16") for v in frozen) * 2
        stored += (
            sum(v.value.nbytes if hasattr(v.value, "nbytes") else v.numpy().nbytes for v in frozen) if not stored else 0
        )
        model.compile("sgd", "mse")
        models[way] = model
        found[str(way or "float32")] = {
            "error": float(np.sqrt(np.mean(error**2)) / weights.std()),
            "bits": 8 * stored / weights.size,
            "seconds": math.inf,
        }
    for _ in range(turns):
        for way, model in models.items():
            begun = time.process_time()
            model.train_on_batch(x, x)
            entry = found[str(way or "float32")]
            entry["seconds"] = min(entry["seconds"], time.process_time() - begun)
    return found


def table(results: dict[str, Any]) -> str:
    """The table of the page."""
    names = {"jax": "JAX", "tensorflow": "TensorFlow", "torch": "PyTorch"}
    backends = [each for each in names if each in results]
    heads = " | ".join(f"step on {names[each]}" for each in backends)
    lines = [f"| base | error | bits a parameter | {heads} |", f"| --- | ---: | ---: |{' ---: |' * len(backends)}"]
    for way, entry in results[backends[0]].items():
        times = (results[each][way]["seconds"] / results[each]["float32"]["seconds"] for each in backends)
        cells = [f"{entry['error']:.3f}", f"{entry['bits']:.2f}", *(f"{each:.1f}" for each in times)]
        lines.append(f"| `{way}` | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def page(text: str, results: dict[str, Any]) -> str:
    """The page with the table in it."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table(results)}\n{END}{rest.split(END)[1]}"


def main() -> None:
    """Measure, or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table of the kept results into the page")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if parser.parse_args().write:
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")
        return
    import keras

    results[keras.backend.backend()] = measured()
    RESULTS.write_text(json.dumps(dict(sorted(results.items())), indent=2) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
