"""One model of any kind, put through all that a user does with it: what `test_families.py` and the coverage table check.

python sweep.py NAME [NAME ...]      # prints a JSON line for each, on the backend of KERAS_BACKEND
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__" and os.environ.get("KERAS_BACKEND") == "torch":
    import torch  # noqa: F401  # before TensorFlow

import keras
import numpy as np
from helpers import difference, value

import keras_lora
from keras_lora.adapted import adapted_maps
from keras_lora.structure import walk


def outputs(model: Any, x: Any) -> list[np.ndarray]:
    """The float outputs of a call of the model, jitted on JAX."""
    if keras.backend.backend() == "jax":
        import jax

        trainable, others = model.trainable_variables, model.non_trainable_variables
        call = jax.jit(lambda *values: model.stateless_call(*values, x, training=False)[0])
        y = call([v.value for v in trainable], [v.value for v in others])
    elif keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        y = tf.function(lambda: model(x, training=False))()
    else:
        y = model(keras.tree.map_structure(keras.ops.convert_to_tensor, x), training=False)
    arrays = [value(each) for each in keras.tree.flatten(y)]
    return [each for each in arrays if each.dtype.kind == "f"]


def settle(model: Any, x: Any) -> None:
    """Give every BatchNormalization the statistics of `x`: with those of its start, deep random networks give constants."""
    norms = [place.layer for place in walk(model) if isinstance(place.layer, keras.layers.BatchNormalization)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    if norms:
        model(keras.tree.map_structure(keras.ops.convert_to_tensor, x), training=True)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def move_adapters(model: Any) -> None:
    """Move every adapter away from its start, by so much that its change is a tenth of an ordinary kernel."""
    rng = np.random.default_rng(11)
    for v in model.trainable_variables:
        size = 0.3 / np.sqrt(v.shape[-2] if len(v.shape) > 1 else 100)
        v.assign(value(v).astype("float32") + size * rng.normal(size=tuple(v.shape)).astype("float32"))


def train_one_step(model: Any, x: Any, y: list[np.ndarray]) -> None:
    """One step of `fit` towards other outputs, whatever their structure."""
    rng = np.random.default_rng(1)

    def moved(each: Any) -> np.ndarray:
        return np.asarray(value(each)) + rng.normal(size=np.shape(each))

    y_true = keras.tree.map_structure(moved, model.predict(x, verbose=0))
    arguments: dict[str, Any] = {"optimizer": keras.optimizers.SGD(0.01), "loss": "mse"}
    keras.Model.compile(model, **arguments)
    model._compile_metrics = None  # Keras keeps those of an earlier `compile`: KerasHub tasks have been compiled
    keras.Model.fit(model, x, y_true, epochs=1, batch_size=keras.tree.flatten(x)[0].shape[0], verbose=0)


def check(build: Callable[[], tuple[Any, Any]], **apply: Any) -> dict[str, Any]:
    """What was seen of one model: counts, and the largest relative difference at each step (0 is bit-equal)."""
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
    changed = outputs(model, x)
    seen["effect"] = difference(changed, before)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.keras"
        try:
            model.save(path)
            loaded = keras.saving.load_model(path)
            seen["round_trip"] = difference(outputs(loaded, x), changed)
            assert adapted_maps(loaded).keys() == adapted_maps(model).keys()
            assert [v.shape for v in loaded.trainable_variables] == [v.shape for v in model.trainable_variables]
        except Exception as error:
            seen["round_trip"] = reason(error)

    adapters = {id(v) for _, adapter in adapted_maps(model).values() for v in adapter.variables}
    found = [value(v).copy() for v in model.variables]
    try:
        train_one_step(model, x, changed)
        moved = [v for v, was in zip(model.variables, found, strict=True) if not np.array_equal(value(v), was)]
        moved = [v for v in moved if "seed" not in v.path]
        seen["moved"] = [v.path for v in moved if id(v) not in adapters]
        seen["moved_adapters"] = sum(id(v) in adapters for v in moved) / max(len(model.trainable_variables), 1)
        changed = outputs(model, x)
    except Exception as error:
        seen["moved"] = reason(error)

    keras_lora.merge_lora(model)
    seen["merge"] = difference(outputs(model, x), changed)
    assert not adapted_maps(model)
    assert all(type(place.layer).__module__ != "keras_lora.adapted" for place in walk(model))
    return seen


def reason(error: Exception) -> str:
    """The first line of an error, short enough for a table."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160] if str(error).strip() else ''}"


def main() -> None:
    """Print what is seen of the models named, one JSON line each."""
    from families import MODELS, applications, multimodal, text, vision  # noqa: F401  # they enter their models

    for name in sys.argv[1:]:
        start = time.time()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                seen = check(MODELS[name])
        except Exception as error:
            seen = {"error": reason(error), "trace": traceback.format_exc()}
        print(json.dumps({"name": name, **seen, "seconds": round(time.time() - start, 1)}), flush=True)


if __name__ == "__main__":
    main()
