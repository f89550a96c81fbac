"""One model of any kind, put through all that a user does with it: what `test_families.py` and the coverage table check.

    KERAS_BACKEND=torch python tests/sweep.py [--json FILE] [NAME ...]     # all models, if none is named

prints a JSON line for each model, and enters it in FILE. `coverage_page.py` makes a page of the docs of such files.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    if os.environ.get("KERAS_BACKEND") == "torch":
        import torch  # noqa: F401  # before TensorFlow
    # Each program runs once here: compiling it well takes longer than running it badly.
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")

import keras
import numpy as np
from helpers import value

import keras_lora
from keras_lora.swap.adapted import adapted_maps
from keras_lora.swap.addresses import walk


def outputs(model: Any, x: Any) -> list[np.ndarray]:
    """The float outputs of a call of the model: on TensorFlow in a graph, elsewhere operation by operation."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        y = tf.function(lambda: model(x, training=False))()
    else:
        y = model(keras.tree.map_structure(keras.ops.convert_to_tensor, x), training=False)
    arrays = [value(each) for each in keras.tree.flatten(y)]
    return [each for each in arrays if each.dtype.kind == "f"]


def difference(left: list[np.ndarray], right: list[np.ndarray]) -> float:
    """The largest difference of any output, relative to the largest number of that output on the right."""
    assert [y.shape for y in left] == [y.shape for y in right]
    apart = [np.abs(a - b).max() / (np.abs(b).max() or 1.0) for a, b in zip(left, right, strict=True)]
    return float(np.max(apart))  # Python's `max` would lose a NaN


def settle(model: Any, x: Any) -> None:
    """Give every BatchNormalization the statistics of `x`: without them a deep random network explodes or dies out."""
    norms = [place.layer for place in walk(model) if isinstance(place.layer, keras.layers.BatchNormalization)]
    found = [(norm.momentum, norm.trainable) for norm in norms]
    for norm in norms:
        norm.momentum, norm.trainable = 0.0, True
    if norms:
        model(keras.tree.map_structure(keras.ops.convert_to_tensor, x), training=True)
    for norm, (momentum, trainable) in zip(norms, found, strict=True):
        norm.momentum, norm.trainable = momentum, trainable


def move_adapters(model: Any, size: float = 0.1) -> None:
    """Move every adapter away from its start, by so much that a change is seen, and deep models stay finite."""
    rng = np.random.default_rng(11)
    for v in model.trainable_variables:
        step = size / np.sqrt(v.shape[-2] if len(v.shape) > 1 else 100)
        v.assign(value(v).astype("float32") + step * rng.normal(size=tuple(v.shape)).astype("float32"))


def pull(x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True) -> Any:
    """A loss that any outputs have: the squared distance of each from waves of its own shape."""
    parts = [each for each in keras.tree.flatten(y_pred) if "float" in keras.backend.standardize_dtype(each.dtype)]
    waves = [keras.ops.sin(keras.ops.cast(keras.ops.arange(math.prod(each.shape)), each.dtype)) for each in parts]
    return sum(
        keras.ops.mean(keras.ops.square(each - keras.ops.reshape(wave, each.shape)))
        for each, wave in zip(parts, waves, strict=True)
    )


def train_one_step(model: Any, x: Any) -> None:
    """One step of Keras's `fit`. Detectors and others have losses that want targets of their own, so `pull` is the loss."""
    model.compute_loss = pull
    keras.Model.compile(model, optimizer=keras.optimizers.SGD(0.01, global_clipnorm=1.0))
    model._compile_metrics = None  # Keras keeps those of an earlier `compile`: KerasHub tasks have been compiled
    keras.Model.fit(model, x, epochs=1, batch_size=keras.tree.flatten(x)[0].shape[0], verbose=0)
    del model.compute_loss


def round_trip(model: Any, x: Any, expected: list[np.ndarray]) -> Any:
    """The difference after `.keras` and back, or the reason why there is no back. The adapters must be where they were."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.keras"
        try:
            model.save(path)
            loaded = keras.saving.load_model(path)
            found = difference(outputs(loaded, x), expected)
        except Exception as error:
            return reason(error)
    assert adapted_maps(loaded).keys() == adapted_maps(model).keys()
    if adapted_maps(model):
        assert [v.shape for v in loaded.trainable_variables] == [v.shape for v in model.trainable_variables]
    return found


def trained(model: Any, x: Any) -> dict[str, Any]:
    """What a step of training moved: the share of the adapters' weights, and the paths of all that is not an adapter's."""
    adapters = {id(v) for _, adapter in adapted_maps(model).values() for v in adapter.variables}
    found = [value(v).copy() for v in model.variables]
    try:
        train_one_step(model, x)
    except Exception as error:
        return {"moved": reason(error)}
    moved = [v for v, was in zip(model.variables, found, strict=True) if not np.array_equal(value(v), was)]
    moved = [v for v in moved if "seed" not in v.path]
    share = sum(id(v) in adapters for v in moved) / max(len(model.trainable_variables), 1)
    return {"moved": [v.path for v in moved if id(v) not in adapters], "moved_adapters": share}


def check(build: Callable[[], tuple[Any, Any]], **apply: Any) -> dict[str, Any]:
    """What was seen of one model: counts, and the largest relative difference at each step (0 is bit-equal).

    Where a step fails, a string says why, and `plain_...` says what the same step gives without adapters: saved and
    loaded, or frozen and trained.
    """
    model, x = build()
    settle(model, x)
    before = outputs(model, x)
    base = sum(int(np.prod(v.shape)) for v in model.variables)
    keras_lora.apply_lora(model, **{"rank": 2, "alpha": 2, **apply})
    seen: dict[str, Any] = {
        "adapted": len(adapted_maps(model)),
        "trainable": sum(int(np.prod(v.shape)) for v in model.trainable_variables),
        "parameters": base,
        "apply": difference(outputs(model, x), before),
    }
    move_adapters(model)
    seen["effect"] = difference(outputs(model, x), before)
    settle(model, x)
    changed = outputs(model, x)
    seen["round_trip"] = round_trip(model, x, changed)
    seen |= trained(model, x)
    changed = outputs(model, x)
    keras_lora.merge_lora(model)
    seen["merge"] = difference(outputs(model, x), changed)
    if not holds(seen["merge"], 1e-4):  # how much of it is rounding: what the last bit of the input changes
        seen["last_bit"] = difference(outputs(model, keras.tree.map_structure(next_number, x)), outputs(model, x))
    assert not adapted_maps(model)
    assert all(type(place.layer).__module__ != "keras_lora.swap.adapted" for place in walk(model))

    if not holds(seen["round_trip"]):
        plain, x = build()
        settle(plain, x)
        seen["plain_round_trip"] = round_trip(plain, x, outputs(plain, x))
    if seen["moved"]:
        plain, x = build()
        plain.trainable = False
        seen["plain_moved"] = trained(plain, x)["moved"]
    return seen


def next_number(x: np.ndarray) -> np.ndarray:
    """The floats right after those of `x`; other numbers as they are."""
    return np.nextafter(x, np.float32(np.inf)) if x.dtype == "float32" else x


def holds(found: Any, tolerance: float = 1e-5) -> bool:
    """Whether a difference is one, and small."""
    return not isinstance(found, str) and found <= tolerance


def problems(seen: dict[str, Any]) -> list[str]:
    """What does not hold of an adapted model, beside what does not hold of the plain model either."""
    expected = {
        "adapted": seen["adapted"] > 0,
        "trainable": seen["trainable"] < seen["parameters"],
        "apply": holds(seen["apply"], 1e-6),
        "effect": seen["effect"] > 1e-5,
        "merge": holds(seen["merge"], min(1e-2, max(1e-4, 10 * seen.get("last_bit", 0)))),
        "round_trip": holds(seen["round_trip"])
        or (not holds(seen["plain_round_trip"]) and type(seen["plain_round_trip"]) is type(seen["round_trip"])),
        "moved": not seen["moved"] or seen["moved"] == seen["plain_moved"],
        "moved_adapters": seen.get("moved_adapters", 1) > 0.5 or isinstance(seen["moved"], str),
    }
    return [f"{key}: {seen.get(key)}" for key, held in expected.items() if not held]


def reason(error: Exception) -> str:
    """The line of an error that says what is wrong, short enough for a table."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    kind = type(error).__name__
    line = next((each for each in lines if each.startswith(f"{kind}: ")), lines[0])  # TensorFlow's is below a trace
    return f"{kind}: {line.removeprefix(f'{kind}: ')[:160]}"


def main() -> None:
    """Print what is seen of the models named, one JSON line each."""
    from families import MODELS, applications, multimodal, text, vision  # noqa: F401  # they enter their models

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="family/ClassName; all if none is given")
    parser.add_argument("--json", type=Path, help="a file to enter the results in, beside what it has")
    arguments = parser.parse_args()
    results = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.exists() else {"models": {}}
    backend = keras.backend.backend()
    results["versions"] = {name: version(name) for name in ("keras", "keras-hub", backend.replace("flow", "flow-cpu"))}
    results["versions"]["python"] = platform.python_version()
    for name in arguments.names or sorted(MODELS):
        start = time.time()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                seen = check(MODELS[name])
        except Exception as error:
            seen = {"error": reason(error)}
            traceback.print_exc()
        print(json.dumps({"name": name, **seen, "seconds": round(time.time() - start, 1)}), flush=True)
        results["models"][name] = seen
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
        keras.backend.clear_session()
        gc.collect()


if __name__ == "__main__":
    main()
