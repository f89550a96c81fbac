"""Time and memory of a training step with `keras_lora.chunk_logits`, and with the logits of the whole batch.

    python benchmarks/chunked_logits.py run        # measures on each backend, and writes results/chunked_logits.json
    python benchmarks/chunked_logits.py page       # writes the table in docs/chunked_logits.md from that file

The model is the end of a language model: an embedding of 32,000 words in 256 dimensions, used in both directions, and one
layer. It is frozen, with a LoRA of rank 8 on both. A batch is 8 × 256 tokens.

Memory is what a step needs besides what exists before it: on JAX the temporary bytes of the compiled step, elsewhere the
peak of the process (Linux) over its size before the step. Times are medians of steps of the two models in turns, in one
process.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks/results/chunked_logits.json", ROOT / "docs/chunked_logits.md"
BEGIN, END = "<!-- results -->\n", "<!-- /results -->\n"
WORDS, WIDTH, SHAPE, ROUNDS = 32_000, 256, (8, 256), 7
BACKENDS = {"jax": "JAX", "tensorflow": "TensorFlow", "torch": "PyTorch"}


def model(chunked: bool) -> Any:
    import keras

    import keras_lora

    keras.utils.set_random_seed(0)
    ids = keras.Input((SHAPE[1],), dtype="int32")
    table = keras.layers.ReversibleEmbedding(WORDS, WIDTH, name="table")
    x = keras.layers.Dense(WIDTH, activation="gelu", name="inner")(table(ids))
    built = keras_lora.apply_lora(keras.Model(ids, table(x, reverse=True)), rank=8, targets=["table", "inner"])
    if chunked:
        keras_lora.chunk_logits(built)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    built.compile("adam", loss, weighted_metrics=["accuracy"])
    return built


def batch() -> Any:
    import numpy as np

    rng = np.random.default_rng(0)
    return rng.integers(0, WORDS, SHAPE).astype("int32"), rng.integers(0, WORDS, SHAPE).astype("int32")


def memory(chunked: bool) -> int:
    """Bytes of a step."""
    import keras

    built, (x, y) = model(chunked), batch()
    built.train_on_batch(x, y)
    if keras.backend.backend() == "jax":
        import jax

        state = [[v.value for v in group] for group in (built.trainable_variables, built.non_trainable_variables)]
        state += [[v.value for v in built.optimizer.variables], [v.value for v in built.metrics_variables]]
        compiled = jax.jit(built.train_step).lower(tuple(state), (x, y)).compile()
        return int(compiled.memory_analysis().temp_size_in_bytes)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    built.train_on_batch(x, y)
    return _status("VmHWM") - before


def _status(name: str) -> int:
    line = next(each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith(name))
    return int(line.split()[1]) * 1024


def times() -> list[float]:
    """Median seconds of a dense and of a chunked step."""
    x, y = batch()
    models, found = [model(False), model(True)], ([], [])  # type: tuple[Any, tuple[list[float], list[float]]]
    for number in range(ROUNDS + 2):
        for built, seconds in zip(models, found, strict=True):
            start = time.perf_counter()
            built.train_on_batch(x, y)
            if number > 1:
                seconds.append(time.perf_counter() - start)
    return [statistics.median(each) for each in found]


def run() -> None:
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for backend in sys.argv[2:] or BACKENDS:
        environment = {**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        environment["MALLOC_MMAP_THRESHOLD_"] = str(2**20)  # what a step frees goes back: the next one counts it again
        found = {}
        for what in ("dense", "chunked", "times"):
            done = subprocess.run(
                [sys.executable, __file__, "measure", what], env=environment, capture_output=True, text=True, check=True
            )
            found[what] = json.loads(done.stdout.splitlines()[-1])
        dense, chunked = found.pop("times")
        results[backend] = {**found, "dense_seconds": round(dense, 3), "chunked_seconds": round(chunked, 3)}
        print(backend, results[backend], flush=True)
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")


def table() -> str:
    lines = ["| backend | memory of a step: whole | in chunks | ratio | time: whole | in chunks | ratio |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for backend, each in json.loads(RESULTS.read_text()).items():
        dense, chunked, slow, ours = each["dense"], each["chunked"], each["dense_seconds"], each["chunked_seconds"]
        lines.append(
            f"| {BACKENDS[backend]} | {dense / 2**20:,.0f} MiB | {chunked / 2**20:,.0f} MiB | {chunked / dense:.2f} "
            f"| {slow:.2f} s | {ours:.2f} s | {ours / slow:.2f} |"
        )
    return "\n".join(lines) + "\n"


def page() -> str:
    """The page with the table of the committed results."""
    before, rest = PAGE.read_text().split(BEGIN)
    return f"{before}{BEGIN}{table()}{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        print(json.dumps(times() if sys.argv[2] == "times" else memory(sys.argv[2] == "chunked")))
    elif sys.argv[1:] == ["page"]:
        PAGE.write_text(page())
    elif sys.argv[1:2] == ["run"]:
        run()
    else:
        sys.exit(__doc__)
