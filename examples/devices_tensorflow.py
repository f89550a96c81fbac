"""LoRA on two devices with TensorFlow's `MirroredStrategy`: the losses are those of one device.

    python examples/devices_tensorflow.py

The two devices are simulated on a CPU; each has the whole model and half of the batch. TensorFlow only.
"""

import contextlib
import os

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import keras_lora

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(8, 16)).astype("float32"), RNG.normal(size=(8, 4)).astype("float32")


def train(scope) -> list[float]:
    with scope:  # the model is built or loaded, adapted and compiled in the scope
        keras.utils.set_random_seed(0)
        hidden = [keras.layers.Dense(64, activation="gelu") for _ in range(2)]
        model = keras.Sequential([keras.Input((16,)), *hidden, keras.layers.Dense(4)])
        keras_lora.apply_lora(model, keras_lora.DoRA(rank=4, seed=0), head=None)
        model.compile(keras.optimizers.Adam(1e-2), "mse")
    return model.fit(X, Y, batch_size=8, epochs=4, shuffle=False, verbose=0).history["loss"]


def main() -> None:
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    one, two = train(contextlib.nullcontext()), train(strategy.scope())
    print("one device: ", *(f"{loss:.6f}" for loss in one))
    print("two devices:", *(f"{loss:.6f}" for loss in two))
    if not np.allclose(one, two, rtol=0, atol=1e-5):
        raise SystemExit("The losses must be equal.")
    print("The losses are equal.")


if __name__ == "__main__":
    main()
