"""Measure the peak memory of training a language model in the shape of SmolLM2 (135 million parameters), lever by lever.

    python benchmarks/memory.py                    # what is not in results/memory.json yet; a few minutes for each row
    python benchmarks/memory.py --only full lora   # some rows again
    python benchmarks/memory.py --steps 3          # more steps
    python benchmarks/memory.py --quick --results .cache/memory.json   # a tiny model, to check that everything runs

The weights are random: they do not change what is held. Each row is a fresh process on JAX that builds the model, runs a
step of `train_on_batch` on 8 × 256 tokens (or on parts of them), and reports its largest resident set since it started: the
interpreter, the compiler and all. XLA reserves what the compiled step needs, so further steps do not change it. `plan` then
says in another process what it expects. The file is written after each row, so that a run can be stopped, and then the
table in `docs/memory.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = Path(__file__).parent / "results" / "memory.json", ROOT / "docs" / "memory.md"
BEGIN, END = "<!-- memory -->\n", "<!-- /memory -->\n"
RANK, BATCH, TOKENS = 16, 8, 256
#: Sizes of SmolLM2-135M, as in its config.json, and a small model with the same parts.
SMOLLM2 = {"vocabulary_size": 49152, "num_layers": 30, "num_query_heads": 9, "num_key_value_heads": 3}
SMOLLM2 |= {"hidden_dim": 576, "intermediate_dim": 1536, "tie_word_embeddings": True, "rope_max_wavelength": 100_000}
TINY = {**SMOLLM2, "vocabulary_size": 512, "num_layers": 2, "hidden_dim": 72, "intermediate_dim": 96}

#: What each row does: its levers. Each row adds one to those before it; the last has another base.
ROWS: dict[str, dict[str, Any]] = {
    "full": {"label": "full fine-tuning"},
    "lora": {"label": "LoRA, rank 16", "rank": RANK},
    "bfloat16": {"label": "LoRA, bfloat16", "rank": RANK, "base_dtype": "bfloat16"},
    "remat": {"label": "LoRA, bfloat16, `rematerialize`", "rank": RANK, "base_dtype": "bfloat16", "remat": True},
    "parts": {
        "label": "LoRA, bfloat16, `rematerialize`, 4 parts of 2 × 256 tokens",
        "rank": RANK,
        "base_dtype": "bfloat16",
        "remat": True,
        "parts": 4,
    },
}
ROWS["chunked"] = {**ROWS["parts"], "label": "LoRA, bfloat16, `rematerialize`, 4 parts, `chunk_logits`", "chunked": True}
ROWS["nf4"] = {**ROWS["chunked"], "label": "LoRA, nf4, `rematerialize`, 4 parts, `chunk_logits`", "base_dtype": "nf4"}


def prepared(row: dict[str, Any], sizes: dict[str, Any]) -> tuple[Any, Any]:
    """The model of a row and its optimizer."""
    import keras
    import keras_hub

    import keras_lora

    backbone = keras_hub.models.Llama3Backbone(**sizes)
    model = keras_hub.models.Llama3CausalLM(backbone=backbone, preprocessor=None)
    if "rank" in row:
        keras_lora.apply_lora(model, rank=row["rank"], base_dtype=row.get("base_dtype"))
    if row.get("remat"):
        keras_lora.rematerialize(model)
    parts = row.get("parts", 1)
    return model, keras.optimizers.Adam(1e-4, gradient_accumulation_steps=parts if parts > 1 else None)


def measure(row: dict[str, Any], quick: bool, steps: int) -> dict[str, Any]:
    """Train as `row` says, in this process, and return its peak."""
    import keras
    import keras_hub  # noqa: F401 - before `imported`: it is no memory of the model
    import numpy as np

    import keras_lora

    imported = peak()
    sizes = TINY if quick else SMOLLM2
    model, optimizer = prepared(row, sizes)
    parts = row.get("parts", 1)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    if row.get("chunked"):
        keras_lora.chunk_logits(model)
    model.compile(optimizer=optimizer, loss=loss, weighted_metrics=[])
    rng = np.random.default_rng(0)
    ids = rng.integers(1, sizes["vocabulary_size"], (BATCH, TOKENS + 1)).astype("int32")
    weights, losses = sum(v.value.nbytes for v in model.weights), []
    for _ in range(steps):
        for part in np.split(ids, parts):
            x = {"token_ids": part[:, :-1], "padding_mask": np.ones_like(part[:, :-1])}
            losses.append(float(model.train_on_batch(x, part[:, 1:])))
    return {
        "peak": peak(),
        "imports": imported,
        "weights": weights,
        "trained": sum(int(np.prod(v.shape)) for v in model.trainable_variables),
        "losses": [losses[0], losses[-1]],
        "steps": steps,
    }


def planned(row: dict[str, Any], quick: bool) -> dict[str, Any]:
    """What `plan` says of `row`, for a model without weights, and the peak of this process without the imports."""
    import keras
    import keras_hub  # noqa: F401 - before `imported`: it is no memory of the model

    import keras_lora
    from keras_lora.compat.training_internals import unallocated

    imported = peak()
    with unallocated():
        model, optimizer = prepared(row, TINY if quick else SMOLLM2)
    parts = row.get("parts", 1)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    found = keras_lora.plan(model, batch_size=BATCH // parts, sequence_length=TOKENS, optimizer=optimizer, loss=loss)
    return {"planned": found.peak, "planned bytes": found.bytes, "process of the plan": peak() - imported}


def peak() -> int:
    """The largest resident set of this process so far, in bytes (`ru_maxrss` would begin with that of its parent)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def table(results: dict[str, Any]) -> str:
    """The rows as a table in Markdown."""
    full = results["rows"]["full"]
    heads = ("", "peak of the process", "of full", "without the imports", "of full", "weights", "planned")
    lines = [f"| {' | '.join(heads)} |", f"|---{'|---:' * (len(heads) - 1)}|"]
    for row in results["rows"].values():
        cells = [row["label"]]
        for least in (0, 1):
            above, of = (each["peak"] - least * each["imports"] for each in (row, full))
            cells += [f"{above / 1e9:.2f} GB", f"{above / of:.2f}"]
        cells += [f"{row['weights'] / 1e6:,.0f} MB", f"{row['planned'] / 1e9:.2f} GB" if "planned" in row else ""]
        lines.append(f"| {' | '.join(cells)} |")
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines += ["", f"{results['machine']['memory GiB']} GiB, {results['machine']['cores']} cores, {versions}."]
    return "".join(f"{line}\n" for line in lines)


def write_page(results: dict[str, Any]) -> None:
    """Put the table into its page."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}{table(results)}{END}{rest.partition(END)[2]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="measure these rows, again if need be")
    parser.add_argument("--quick", action="store_true", help="a tiny model")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--no-plan", action="store_true", help="only train: the plan takes as long")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--row", help=argparse.SUPPRESS)  # in the process of one row: its levers
    parser.add_argument("--plan", help=argparse.SUPPRESS)  # the same, only planned
    given = parser.parse_args()
    os.environ.setdefault("KERAS_BACKEND", "jax")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if given.row:
        print(json.dumps(measure(json.loads(given.row), given.quick, given.steps)))
        return
    if given.plan:
        print(json.dumps(planned(json.loads(given.plan), given.quick)))
        return
    import measuring

    rows = ROWS
    if unknown := sorted({*(given.only or ())} - rows.keys()):
        raise SystemExit(f"There are no rows {unknown}. There are {list(rows)}.")
    results = json.loads(given.results.read_text()) if given.results.exists() else {"rows": {}}
    names = ("python", "keras", "jax", "keras-hub", "numpy")
    found = {**measuring.versions()}
    results["versions"] = {name: found[name] for name in names if name in found}
    results["machine"] = {key: value for key, value in measuring.machine().items() if key != "pinned core"}
    for name, row in rows.items():
        if name not in given.only if given.only else name in results["rows"]:
            continue
        print(f"{row['label']} …", flush=True)
        results["rows"][name] = {"label": row["label"], **results["rows"].get(name, {})}
        for what in (
            ("--row",) if given.no_plan or row.get("chunked") else ("--row", "--plan")
        ):  # `plan` does not know `chunk_logits`
            options = ["--steps", str(given.steps), *(["--quick"] if given.quick else [])]
            command = [sys.executable, __file__, what, json.dumps(row), *options]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{done.stderr[-2000:]}\n{name} did not finish: exit code {done.returncode}")
            results["rows"][name] |= json.loads(done.stdout.splitlines()[-1])
        results["rows"] = {each: results["rows"][each] for each in rows if each in results["rows"]}
        given.results.parent.mkdir(parents=True, exist_ok=True)
        given.results.write_text(json.dumps(results, indent=1) + "\n")
        print(f"  {results['rows'][name]['peak'] / 1e9:.2f} GB", flush=True)
    if "full" in results["rows"]:
        print(table(results))
        if given.results == RESULTS:
            write_page(results)


if __name__ == "__main__":
    main()
