"""A save that is killed at any moment leaves the old file or the new one, whole."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
import safetensors.numpy
from helpers import once

import keras_lora
from keras_lora.files import tensor_file

pytestmark = [once, pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system kills in another way")]

#: As the command line does: without Keras, which takes seconds to import. For each line that it reads, a copy of
#: the process writes one file after another, until it is killed after so many seconds.
WRITER = """
import itertools, os, pathlib, signal, sys, time
import numpy as np
import keras_lora_command
from keras_lora.files import tensor_file
assert "keras" not in sys.modules
for seconds in sys.stdin:
    if not (writer := os.fork()):
        for number in itertools.count():
            tensor_file.write(pathlib.Path(sys.argv[1]), {"number": number}, {"a": np.full(500_000, number, "float32")})
    time.sleep(float(seconds))
    os.kill(writer, signal.SIGKILL)
    print(os.waitstatus_to_exitcode(os.waitpid(writer, 0)[1]), flush=True)
"""

SAVER = """
import itertools, sys
import keras, keras_lora
model = keras.Sequential([keras.Input((600,)), keras.layers.Dense(600), keras.layers.Dense(2)])
keras_lora.apply_lora(model, rank=100)
for number in itertools.count():
    for variable in model.trainable_variables:
        variable.assign(keras.ops.full(variable.shape, number % 1000))
    keras_lora.save_adapter(model, sys.argv[1])
    print("saved", flush=True)
"""


def test_thirty_kills_leave_a_whole_file_each_time(tmp_path):
    path, rng = tmp_path / "a.safetensors", random.Random(0)
    tensor_file.write(path, {"number": 0}, {"a": np.full(500_000, 0, "float32")})
    command = [sys.executable, "-c", WRITER, path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as writers:
        for _ in range(30):
            writers.stdin.write(f"{rng.uniform(0, 0.1)}\n")
            assert int(writers.stdout.readline()) == -signal.SIGKILL
            with safetensors.safe_open(path, framework="numpy") as file:
                number, a = json.loads(file.metadata()[tensor_file.ENTRY])["number"], file.get_tensor("a")
            assert a.shape == (500_000,)
            assert (a == number).all()
    left = [each for each in tmp_path.iterdir() if each != path]
    assert left  # or no kill came while a file was written
    assert all(each.name.startswith(".a.safetensors.") and each.suffix == ".unfinished" for each in left)


def test_what_is_left_is_no_adapter_and_the_next_save_after_an_hour_takes_it_away(tmp_path):
    path = tmp_path / "a.safetensors"
    model = keras_lora.apply_lora(keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)]), rank=1, head=None)
    old, new, others = (
        f".{name}.unfinished" for name in ("a.safetensors.1234_old", "a.safetensors.1234_new", "b.safetensors.old")
    )
    names = [old, new, others, ".a.safetensors.original", "a.safetensors.old"]
    for name in names:
        (tmp_path / name).write_bytes(b"half a file")
        with pytest.raises(ValueError, match="must end in"):
            keras_lora.load_adapter(model, tmp_path / name)
        if name != new:
            os.utime(tmp_path / name, (time.time() - 4000,) * 2)
    keras_lora.save_adapter(model, path)
    assert {each.name for each in tmp_path.iterdir()} == {path.name, *names} - {old}


@pytest.mark.full
def test_a_kill_of_the_whole_save_leaves_an_adapter_that_loads(tmp_path):
    path = tmp_path / "0.safetensors"
    with subprocess.Popen([sys.executable, "-c", SAVER, path], stdout=subprocess.PIPE) as saver:
        assert saver.stdout.readline().strip() == b"saved"
        time.sleep(0.1)
        saver.kill()
    assert saver.returncode == -signal.SIGKILL
    model = keras.Sequential([keras.Input((600,)), keras.layers.Dense(600), keras.layers.Dense(2)])
    keras_lora.load_adapter(model, path)
    numbers = {float(number) for v in model.trainable_variables for number in np.unique(keras.ops.convert_to_numpy(v))}
    assert len(numbers) == 1


MODEL_SAVER = """
import itertools, os, signal, sys, time
import keras, keras_lora
from keras_lora.compat import keras_internals
model = keras.Sequential([keras.Input((100,)), keras.layers.Dense(100), keras.layers.Dense(2)])
keras_lora.apply_lora(model, rank=50)
with keras_internals.without_tensorflow():
    for seconds in [0.0, *map(float, sys.argv[3:])]:
        if not (writer := os.fork()):
            for number in itertools.count():
                for variable in model.trainable_variables:
                    variable.assign(keras.ops.full(variable.shape, number % 1000))
                model.save(sys.argv[1])
                model.save_weights(sys.argv[2])
                if not seconds:
                    os._exit(0)
        time.sleep(seconds)
        if seconds:
            os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
        model.load_weights(sys.argv[2])
        loaded = keras.saving.load_model(sys.argv[1])
        for each in (model, loaded):
            assert len({float(v[0, 0]) for v in each.trainable_variables}) == 1
    print("whole")
"""


@pytest.mark.nightly
def test_a_kill_while_a_whole_model_is_saved_leaves_a_file_that_loads(tmp_path):
    rng = random.Random(1)
    seconds = [f"{rng.uniform(0.01, 0.1):.3f}" for _ in range(12)]
    command = [sys.executable, "-c", MODEL_SAVER, tmp_path / "m.keras", tmp_path / "m.weights.h5", *seconds]
    assert subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout.splitlines() == ["whole"]
    assert [each for each in tmp_path.iterdir() if ".unfinished" in each.name]  # or no kill came while a file was written
