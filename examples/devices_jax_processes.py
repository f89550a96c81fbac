"""LoRA in two processes, as on two machines, with `jax.distributed`: the losses are those of one process.

    python examples/devices_jax_processes.py

Each process has two simulated devices. The four are a mesh of 2 x 2: the processes share the batch, the two devices of a
process share the kernels. With `--mesh 1 4` the kernels are split over the processes. JAX only.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile

os.environ["KERAS_BACKEND"] = "jax"

import numpy as np

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(8, 16)).astype("float32"), RNG.normal(size=(8, 4)).astype("float32")


def build():
    import keras

    import keras_lora

    keras.utils.set_random_seed(0)
    hidden = [keras.layers.Dense(64, activation="gelu", name=name) for name in ("up", "wide")]
    model = keras.Sequential([keras.Input((16,)), *hidden, keras.layers.Dense(4, name="down")])
    keras_lora.apply_lora(model, keras_lora.DoRA(rank=4, seed=0), head=None)
    model.compile(keras.optimizers.Adam(1e-2), "mse")
    return model


def train(model, x, y) -> list[float]:
    return model.fit(x, y, batch_size=len(x), epochs=4, shuffle=False, verbose=0).history["loss"]


def work(address: str, process: int, mesh: tuple[int, int], folder: str) -> None:
    """What each process does: the same calls in the same order, with its own share of the batch and its own files."""
    import keras
    from jax.experimental import multihost_utils

    import keras_lora

    keras.distribution.initialize(address, 2, process)
    layouts = keras.distribution.LayoutMap(keras.distribution.DeviceMesh(mesh, ("batch", "model")))
    layouts[".*(up|wide)/kernel"] = (None, "model")
    layouts[".*down/kernel"] = ("model", None)
    keras.distribution.set_distribution(keras.distribution.ModelParallel(layout_map=layouts, auto_shard_dataset=False))
    model = build()
    share = slice(4 * process, 4 * process + 4) if mesh[0] == 2 else slice(None)
    losses = train(model, X[share], Y[share])
    keras_lora.save_adapter(model, f"{folder}/{process}.safetensors")
    model.save(f"{folder}/{process}.keras")
    keras_lora.merge_lora(model)
    merged = [multihost_utils.process_allgather(layer.kernel.value, tiled=True) for layer in model.layers]
    np.savez(f"{folder}/{process}.npz", *merged, losses=losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mesh", type=int, nargs=2, default=(2, 2), metavar=("BATCH", "MODEL"))
    parser.add_argument("--work", nargs=3, metavar=("ADDRESS", "PROCESS", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        address, process, folder = arguments.work
        return work(address, int(process), tuple(arguments.mesh), folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--mesh", *map(str, arguments.mesh), "--work", address]
        workers = [subprocess.Popen([*command, str(process), folder], env=environment) for process in range(2)]
        if any([worker.wait() for worker in workers]):
            raise SystemExit("A process failed.")
        compare(folder)


def compare(folder: str) -> None:
    import keras

    import keras_lora

    model = build()
    losses = train(model, X, Y)
    print("one process:  ", *(f"{loss:.6f}" for loss in losses))
    expected = model.predict(X, verbose=0)
    kernels = [layer.kernel for layer in keras_lora.merge_lora(model).layers]
    for process in range(2):
        theirs = np.load(f"{folder}/{process}.npz")
        print(f"process {process} of 2:", *(f"{loss:.6f}" for loss in theirs["losses"]))
        saved = keras.saving.load_model(f"{folder}/{process}.keras")
        loaded = keras_lora.load_adapter(build(), f"{folder}/{process}.safetensors")
        equal = [(theirs["losses"], losses), *((theirs[f"arr_{i}"], kernel) for i, kernel in enumerate(kernels))]
        equal += [(each.predict(X, verbose=0), expected) for each in (saved, loaded)]
        if not all(np.allclose(*pair, rtol=0, atol=1e-5) for pair in equal):
            raise SystemExit("The losses, the merged kernels and the saved models must be equal.")
    print("The losses, the merged kernels and the saved models are equal.")


if __name__ == "__main__":
    main()
