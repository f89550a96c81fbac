"""What every test shares. The backend comes from `KERAS_BACKEND`; `make test` runs the suite once for each."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "jax")

import torch  # noqa: F401  # before TensorFlow, which KerasHub imports: the other order crashes in one process

import keras  # isort: skip
import pytest


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy("float32")
