"""Fine-tune a language model of a billion random weights, with its base in NF4 from the start.

    KERAS_BACKEND=torch python benchmarks/reduced_memory.py --layers 16

The model is KerasHub's Llama, in the widths of Llama-3.2-1B. `keras_lora.reduced_base` quantises each kernel as soon as
it is built, so there is never a float copy of the model. `--json FILE` keeps the result. "Peak" is the most memory that
this process has had, from its start, with Python and Keras. "Full" is what full fine-tuning with Adam needs at least,
without activations: 16 bytes a parameter.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import resource
import time
from pathlib import Path

import keras
import keras_hub
import numpy as np

import keras_lora

WIDTHS = {"hidden_dim": 2048, "intermediate_dim": 8192, "num_query_heads": 32, "num_key_value_heads": 8}
EVERY_KERNEL = (keras.layers.Dense, keras.layers.EinsumDense, keras.layers.ReversibleEmbedding)
#: Adam in float32: the weight, its gradient and two moments.
BYTES_OF_FULL = 16


def peak() -> float:
    """The most memory that this process has had so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def build(layers: int, vocabulary: int) -> keras.Model:
    """A causal language model with random weights."""
    backbone = keras_hub.models.LlamaBackbone(vocabulary_size=vocabulary, num_layers=layers, **WIDTHS)
    return keras_hub.models.LlamaCausalLM(backbone=backbone, preprocessor=None)


def parameters(model: keras.Model) -> int:
    """The parameters of the float model."""
    maps = keras_lora.swap.adapted.maps_by_address(model).values()
    in_kernels = sum(math.prod(linear.kernel_shape) for linear in maps)
    stored = {id(v) for linear in maps for v in linear.stored_variables}
    return in_kernels + sum(math.prod(v.shape) for v in model.weights if id(v) not in stored)


def measured(layers: int, vocabulary: int, rank: int, tokens: int, steps: int) -> dict[str, object]:
    """Build, adapt and train, and return what was seen."""
    keras.utils.set_random_seed(0)
    started, at_start = time.perf_counter(), peak()
    with keras_lora.reduced_base("nf4", layers=EVERY_KERNEL):
        model = build(layers, vocabulary)
    built, after_build, of_base = time.perf_counter() - started, peak(), parameters(model)
    stored = sum(math.prod(v.shape) * np.dtype(v.dtype).itemsize for v in model.weights)
    keras_lora.apply_lora(model, rank=rank)
    model.compile(keras.optimizers.AdamW(1e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    ids = np.random.default_rng(0).integers(0, vocabulary, (1, tokens + 1)).astype("int32")
    x = {"token_ids": ids[:, :-1], "padding_mask": np.ones((1, tokens), "int32")}
    losses, seconds = [], []
    for _ in range(steps):
        begun = time.perf_counter()
        losses.append(float(np.ravel(model.train_on_batch(x, ids[:, 1:]))[0]))
        seconds.append(time.perf_counter() - begun)
    return {
        "backend": keras.backend.backend(),
        "parameters": of_base,
        "layers": layers,
        "vocabulary": vocabulary,
        "tokens": tokens,
        "trainable": sum(math.prod(v.shape) for v in model.trainable_variables),
        "bytes of the base": int(stored),
        "bytes of the float base": 4 * of_base,
        "bytes of full fine-tuning": BYTES_OF_FULL * of_base,
        "seconds to build": round(built, 1),
        "seconds of a step": round(min(seconds), 2),
        "losses": [round(each, 4) for each in losses],
        "GiB before": round(at_start, 2),
        "peak GiB after building": round(after_build, 2),
        "peak GiB after training": round(peak(), 2),
        "machine": f"{platform.machine()}, Keras {keras.__version__}",
    }


def main() -> None:
    """Measure once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--json", type=Path, help="add the result to this file, by backend and number of layers")
    arguments = vars(parser.parse_args())
    path = arguments.pop("json")
    result = measured(**arguments)
    print(json.dumps(result, indent=2))
    if path is not None:
        found = json.loads(path.read_text()) if path.exists() else {}
        found[f"{result['backend']}-{result['layers']}"] = result
        path.write_text(json.dumps(dict(sorted(found.items())), indent=2) + "\n")


if __name__ == "__main__":
    main()
