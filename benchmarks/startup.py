"""The time before the first step: importing the package, and adapting a model of thousands of layers."""

from __future__ import annotations

import functools
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
from measuring import Record, record
from sweeps import once

import keras_lora

IMPORT = "import time, keras; start = time.process_time(); import keras_lora; print(time.process_time() - start)"


class Deep(keras.Model):
    """Many small Dense layers, one after the other. It has no Keras graph, which would recurse too deep for so many."""

    def __init__(self, depth: int):
        super().__init__()
        self.stack = [keras.layers.Dense(8) for _ in range(depth)]

    def build(self, input_shape: Any) -> None:
        for layer in self.stack:
            layer.build((None, 8))
        self.built = True


def deep(depth: int) -> keras.Model:
    model = Deep(depth)
    model.build((None, 8))
    return model


def startup(quick: bool) -> Iterator[Record]:
    """CPU seconds. The import time of keras_lora is in addition to that of Keras, in fresh processes."""
    keras_lora.apply_lora(deep(2), rank=2, head=None)  # compiles what every `apply_lora` uses
    command = [sys.executable, "-c", IMPORT]
    runs = [subprocess.run(command, check=True, capture_output=True, text=True) for _ in range(2 if quick else 5)]
    yield record("startup", {}, "import beside Keras", "s", "keras_lora", [float(each.stdout) for each in runs])
    for depth in (8, 16) if quick else (1024, 4096):
        with tempfile.TemporaryDirectory() as folder:
            for quantity, value in once(functools.partial(deep, depth), 2, Path(folder) / "adapter.safetensors").items():
                yield record("startup", {"layers": depth}, quantity, "s", "keras_lora", [value])
