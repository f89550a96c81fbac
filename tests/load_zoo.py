"""Run in a fresh process: load every saved specimen, check it, go on training it, and write down what was seen.

    python load_zoo.py FOLDER BACKEND NAMES TRAINED

Names are joined by commas. For each `FOLDER/<name>.keras` there is a `FOLDER/<name>.npz` with inputs and targets. What is
seen goes to `FOLDER/<name>.<backend>.json`. Those in TRAINED train on; if all do, then again with a fresh optimizer.
"""

import gc
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    folder, backend = Path(sys.argv[1]), sys.argv[2]
    names, trained = (words.split(",") for words in sys.argv[3:5])
    os.environ["KERAS_BACKEND"] = backend
    if backend == "torch":
        import torch  # noqa: F401  # before TensorFlow

import json
import traceback

import keras
import numpy as np
import zoo  # the classes a user would have registered

import keras_lora  # all that an adapted file asks for


def packed(data):
    return data if isinstance(data, dict) else {"only": data}


def unpacked(file, prefix):
    data = {key.removeprefix(prefix): file[key] for key in file.files if key.startswith(prefix)}
    return data["only"] if set(data) == {"only"} else data


def losses(model, x, y):
    return model.fit(x, y, epochs=2, batch_size=zoo.BATCH, shuffle=False, verbose=0).history["loss"]


def look(folder, name, train, again):
    """What is seen of `FOLDER/<name>.keras`; `train` trains it on, `again` with a fresh optimizer too."""
    with np.load(folder / f"{name}.npz") as file:
        x, y, expected = unpacked(file, "x/"), unpacked(file, "y/"), unpacked(file, "out/")
    model = keras.saving.load_model(folder / f"{name}.keras")
    predicted, expected = packed(model.predict(x, verbose=0)), packed(expected)
    seen = {
        "difference": max(float(np.abs(predicted[key].astype("float32") - expected[key]).max()) for key in expected),
        "classes": [[place.address, type(place.layer).__name__] for place in keras_lora.swap.addresses.walk(model)],
        "trainable": [list(v.shape) for v in model.trainable_variables],
        "flags": [place.layer.trainable for place in keras_lora.swap.addresses.walk(model)],
        "iterations": int(model.optimizer.iterations),
        "optimizer": [list(v.shape) for v in model.optimizer.variables],
    }
    if not train:
        return seen
    frozen = [v for v in model.non_trainable_variables if "seed" not in v.path]
    before = [keras.ops.convert_to_numpy(v.value).copy() for v in frozen]
    seen["resumed"] = losses(model, x, y)
    if again:
        model.compile(keras.optimizers.Adam(1e-3), loss=model.loss)
        seen["fresh"] = losses(model, x, y)
    after = [keras.ops.convert_to_numpy(v.value) for v in frozen]
    seen["moved"] = [v.path for v, a, b in zip(frozen, before, after, strict=True) if not np.array_equal(a, b)]
    return seen


if __name__ == "__main__":
    gc.freeze()  # see tests/conftest.py
    for name in names:
        try:
            seen = look(folder, name, name in trained, trained == names)
        except Exception:
            seen = {"error": traceback.format_exc()}
        (folder / f"{name}.{backend}.json").write_text(json.dumps(seen))
