"""A training step four ways, side by side in one run: full, frozen base, Keras's `enable_lora`, keras_lora.

    KERAS_BACKEND=jax python benchmarks/training_step.py [--json FILE]

Four Dense layers of width 1,024, 256 rows, rank 8, Adam. The variants take turns, each step is timed in CPU seconds of this
process, and only ratios of medians are printed: absolute times of a shared machine say little.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

if os.environ["KERAS_BACKEND"] == "torch":
    import torch  # before TensorFlow

    torch.set_num_threads(1)

import keras
import numpy as np

import keras_lora

ROWS, WIDTH, DEPTH, RANK, ROUNDS = 256, 1024, 4, 8, 30
RNG = np.random.default_rng(0)
X, Y = (RNG.normal(size=(ROWS, WIDTH)).astype("float32") for _ in range(2))


def model(prepare):
    keras.utils.set_random_seed(0)
    stack = keras.Sequential([keras.Input((WIDTH,)), *(keras.layers.Dense(WIDTH, activation="relu") for _ in range(DEPTH))])
    prepare(stack)
    stack.compile(keras.optimizers.Adam(1e-4), "mse")
    return stack


def freeze_all_but_the_first_bias(stack):
    """The floor: the whole forward and backward pass, and next to nothing to train."""
    for layer in stack.layers[1:]:
        layer.trainable = False
    stack.layers[0].kernel.trainable = False
    assert [v.name for v in stack.trainable_variables] == ["bias"]


def builtin(stack):
    for layer in stack.layers:
        layer.enable_lora(RANK)
        layer.bias.trainable = False


VARIANTS = {
    "full": lambda stack: None,
    "frozen": freeze_all_but_the_first_bias,
    "enable_lora": builtin,
    "keras_lora": lambda stack: keras_lora.apply_lora(stack, rank=RANK, head=None),
    "keras_lora DoRA": lambda stack: keras_lora.apply_lora(stack, "dora", rank=RANK, head=None),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    models = {name: model(prepare) for name, prepare in VARIANTS.items()}
    times = {name: [] for name in models}
    for turn in range(ROUNDS + 3):
        for name, each in models.items():
            start = time.process_time()
            each.train_on_batch(X, Y)
            if turn >= 3:  # the first steps compile
                times[name].append(time.process_time() - start)
    median = {name: float(np.median(seconds)) for name, seconds in times.items()}
    result = {
        "ratios to full": {name: round(seconds / median["full"], 3) for name, seconds in median.items()},
        "enable_lora / keras_lora": round(median["enable_lora"] / median["keras_lora"], 3),
        "case": {"rows": ROWS, "width": WIDTH, "layers": DEPTH, "rank": RANK, "rounds": ROUNDS},
        "backend": keras.backend.backend(),
        "keras": keras.__version__,
        "python": platform.python_version(),
        "load average": round(os.getloadavg()[0], 2),
    }
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
