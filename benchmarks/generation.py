"""Prompts with an adapter each through a KerasHub language model, in tokens per second: the part `text` of `served.py`.

Eight prompts of 32 tokens, greedy, with rank 8 on every linear layer but the head. "prefill" is `generate` with one new
token, in prompt tokens per second. "generation" is what 16 more tokens take, in new tokens per second. The variants take
turns, and every new token of the mixed batch is compared with those of each adapter alone. "tiny" has two blocks of random
weights; "SmolLM2" is the first six of its 30 blocks, from the package that `examples/smollm2.py` names.
"""

from __future__ import annotations

import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

PROMPTS, LENGTH, NEW, RANK, ROUNDS = 8, 32, 16, 8, 5
BACKENDS = {"jax": "JAX", "tensorflow": "TensorFlow", "torch": "PyTorch"}
VARIANTS = ("base", "an adapter for each prompt", "one adapter for all", "one prompt at a time")


def tiny() -> Any:
    import keras
    import keras_hub

    keras.utils.set_random_seed(0)
    heads = {"num_query_heads": 8, "num_key_value_heads": 4}
    sizes = {"vocabulary_size": 2000, "num_layers": 2, "hidden_dim": 256, "intermediate_dim": 512}
    backbone = keras_hub.models.Llama3Backbone(**sizes, **heads)
    model = keras_hub.models.Llama3CausalLM(backbone, preprocessor=None, compile=False)
    rng = np.random.default_rng(5)
    for v in model.trainable_variables:
        if len(v.shape) > 1:
            v.assign((rng.normal(size=tuple(v.shape)) / np.sqrt(v.shape[0])).astype("float32"))
    return model


def smollm2(blocks: int = 6) -> Any:
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    import smollm2 as example

    return example.load_keras(blocks)


def prompts(new: int, vocabulary: int) -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(1).integers(3, vocabulary, (PROMPTS, LENGTH + new)).astype("int32")
    tokens[:, LENGTH:] = 0
    mask = np.zeros_like(tokens)
    mask[:, :LENGTH] = 1
    return {"token_ids": tokens, "padding_mask": mask}


def measure(build: Callable[[], Any] = tiny, rounds: int = ROUNDS) -> dict[str, Any]:
    import keras_lora
    from keras_lora.files.adapter_state import AdapterState

    base = build()
    base.compile(sampler="greedy")
    served = keras_lora.MultiAdapterModel(build(), capacity=PROMPTS, rank=RANK)
    served.model.compile(sampler="greedy")
    state = AdapterState.of(keras_lora.apply_lora(build(), rank=RANK))
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(PROMPTS):
            for entry in state.adapters.values():
                for key, each in entry.tensors.items():
                    entry.tensors[key] = (0.5 * rng.normal(size=each.shape) / np.sqrt(each.shape[0])).astype("float32")
            state.write(Path(folder) / "adapter.safetensors")
            served.load(Path(folder) / "adapter.safetensors", f"{number}")
    names = [f"{number}" for number in range(PROMPTS)]
    generate = functools.partial(served.generate, stop_token_ids=None)

    def calls(new: int) -> dict[str, Callable[[], np.ndarray]]:
        batch = prompts(new, base.backbone.vocabulary_size)

        def one_at_a_time() -> np.ndarray:
            rows = [{key: each[i : i + 1] for key, each in batch.items()} for i in range(PROMPTS)]
            return np.concatenate([generate(row, [name])["token_ids"] for row, name in zip(rows, names, strict=True)])

        ways = (
            lambda: base.generate(batch, stop_token_ids=None)["token_ids"],
            lambda: generate(batch, names)["token_ids"],
            lambda: generate(batch, ["0"] * PROMPTS)["token_ids"],
            one_at_a_time,
        )
        return dict(zip(VARIANTS, ways, strict=True))

    short, long = calls(1), calls(NEW + 1)
    outputs = {name: call() for name, call in long.items()}
    for call in short.values():
        call()
    mixed, alone = outputs["an adapter for each prompt"], outputs["one prompt at a time"]
    assert not np.array_equal(mixed, outputs["base"])
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in VARIANTS}
    for _ in range(rounds):
        for name in VARIANTS:
            seconds[name].append((_seconds(short[name]), _seconds(long[name])))
    found: dict[str, Any] = {"same tokens": round(float((mixed == alone)[:, LENGTH:].mean()), 4)}
    for name, pairs in seconds.items():
        prefill = statistics.median(each for each, _ in pairs)
        more = statistics.median(each for _, each in pairs) - prefill
        found[name] = {"prefill": round(PROMPTS * LENGTH / prefill, 1), "generation": round(PROMPTS * NEW / more, 1)}
    return found


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def table(results: dict[str, dict[str, Any]]) -> str:
    """`results` by backend and model, as "jax tiny"."""
    lines = ["| backend | model | " + " | ".join(VARIANTS) + " | same tokens |"]
    lines.append("| --- | --- |" + " ---: |" * (len(VARIANTS) + 1))
    for key, found in results.items():
        backend, model = key.split()
        for part in ("prefill", "generation"):
            of = [found[name][part] for name in VARIANTS]
            cells = [f"{each:,.0f} ({each / of[0]:.2f})" for each in of]
            same = f"{found['same tokens']:.0%}" if part == "generation" else ""
            lines.append(f"| {BACKENDS[backend]} | {model}, {part} | " + " | ".join(cells) + f" | {same} |")
    return "\n".join(lines) + "\n"
