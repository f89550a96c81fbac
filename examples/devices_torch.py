"""LoRA in two processes with torch's `DistributedDataParallel`: the losses are those of one process.

    python examples/devices_torch.py

Both processes run on the CPU; each has the whole model and half of the batch, and sends the gradients of the adapter alone.
The training loop is your own, because Keras's `fit` does not call torch's wrapper. torch only.
"""

import os
import tempfile

os.environ["KERAS_BACKEND"] = "torch"

import keras
import numpy as np
import torch

import keras_lora

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(8, 16)).astype("float32"), RNG.normal(size=(8, 4)).astype("float32")


def train(x, y, wrap) -> tuple[list[float], keras.Model]:
    keras.utils.set_random_seed(0)
    hidden = [keras.layers.Dense(64, activation="gelu") for _ in range(2)]
    model = keras.Sequential([keras.Input((16,)), *hidden, keras.layers.Dense(4)])
    keras_lora.apply_lora(model, keras_lora.DoRA(rank=4, seed=0), head=None)
    wrapped = wrap(model)  # after `apply_lora`, so that it sees the adapter's parameters
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2, eps=1e-7)
    x, y = (keras.ops.convert_to_tensor(each) for each in (x, y))
    losses = []
    for _ in range(4):
        loss = torch.mean((wrapped(x) - y) ** 2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model


def work(process: int, file: str, results) -> None:
    torch.distributed.init_process_group("gloo", f"file://{file}", rank=process, world_size=2)
    share = slice(4 * process, 4 * process + 4)
    losses, model = train(X[share], Y[share], torch.nn.parallel.DistributedDataParallel)
    results.put((losses, model.predict(X, verbose=0)))
    torch.distributed.destroy_process_group()


def main() -> None:
    spawn = torch.multiprocessing.get_context("spawn")
    results = spawn.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        workers = [spawn.Process(target=work, args=(process, f"{folder}/meeting", results)) for process in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    if any(worker.exitcode for worker in workers):
        raise SystemExit("A process failed.")
    of_each = [results.get() for _ in workers]
    one, model = train(X, Y, lambda model: model)
    two = np.mean([losses for losses, _ in of_each], axis=0)  # each process has the loss of its half
    print("one process:  ", *(f"{loss:.6f}" for loss in one))
    print("two processes:", *(f"{loss:.6f}" for loss in two))
    outputs = model.predict(X, verbose=0)
    if not np.allclose(one, two, rtol=0, atol=1e-5) or not all(np.allclose(y, outputs, atol=1e-5) for _, y in of_each):
        raise SystemExit("The losses and the outputs must be equal.")
    print("The losses and the outputs are equal.")


if __name__ == "__main__":
    main()
