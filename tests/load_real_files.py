"""Run in a fresh process: load what `test_real_files.py` saved, and write down how far the outputs are from those there.

    python load_real_files.py FOLDER BACKEND KIND NAMES

NAMES are joined by commas. KIND is `keras`, which loads `FOLDER/<name>.keras`, or `adapter`, which loads the model file of
the package and `FOLDER/<name>.safetensors` into it. `FOLDER/<name>.npz` has the outputs that are expected. What is seen goes
to `FOLDER/<name>.<kind>.json`.
"""

import os
import sys
from pathlib import Path

folder, backend, kind, names = Path(sys.argv[1]), *sys.argv[2:5]
os.environ["KERAS_BACKEND"] = backend
if backend == "torch":
    import torch  # noqa: F401  # before TensorFlow

import json  # noqa: E402
import traceback  # noqa: E402

import keras  # noqa: E402
import numpy as np  # noqa: E402
from helpers import difference, outputs  # noqa: E402
from real_files import REAL_FILES, load  # noqa: E402  # with the classes a user would have registered

import keras_lora  # noqa: E402


def look(name):
    if kind == "keras":
        model = keras.saving.load_model(folder / f"{name}.keras")
    else:
        model = keras_lora.load_adapter(load(name), folder / f"{name}.safetensors")
    with np.load(folder / f"{name}.npz") as file:
        expected = [file[key] for key in file.files]
    return {
        "difference": difference(outputs(model, REAL_FILES[name].x()), expected),
        "trainable": [list(v.shape) for v in model.trainable_variables],
    }


if __name__ == "__main__":
    for name in names.split(","):
        try:
            seen = look(name)
        except Exception:
            seen = {"error": traceback.format_exc()}
        (folder / f"{name}.{kind}.json").write_text(json.dumps(seen))
