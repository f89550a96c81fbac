"""A hundred clients in threads, several hundred adapters and fewer places: the part `load` of `served.py`.

A request is one row through four Dense layers of 512 units, with one of 300 adapters of rank 8. 64 of them have a place. In
"popular", adapter k is asked for in proportion to 1 / k; in "uniform", all alike. Each answer is compared with that of its
adapter alone, computed in NumPy from the weights in its file. "one at a time" is the same pool without a queue: each client
calls `pool.predict_on_batch` with its one row.
"""

from __future__ import annotations

import concurrent.futures
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

WIDTH, LAYERS, RANK = 512, 4, 8
CLIENTS, ADAPTERS, PLACES, BATCH_SIZES = 100, 300, 64, (8, 32, 64)
BACKENDS = {"jax": "JAX", "tensorflow": "TensorFlow", "torch": "PyTorch"}


def measure(requests: int = 20, width: int = WIDTH, adapters: int = ADAPTERS, clients: int = CLIENTS) -> dict[str, Any]:
    """Requests per second and latencies in milliseconds; `requests` of each client."""
    import keras

    import keras_lora
    from keras_lora.files.adapter_state import AdapterState

    def base() -> keras.Model:
        keras.utils.set_random_seed(0)
        dense = [keras.layers.Dense(width, activation="relu") for _ in range(LAYERS)]
        return keras.Sequential([keras.Input((width,)), *dense])

    plain = base()
    kernels = [keras.ops.convert_to_numpy(layer.kernel) for layer in plain.layers]
    state = AdapterState.of(keras_lora.apply_lora(plain, rank=RANK, alpha=RANK, head=None))
    model = keras_lora.MultiAdapterModel(base(), capacity=min(PLACES, adapters // 2), rank=RANK, head=None)
    pool, changes = keras_lora.AdapterPool(model), {}
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(adapters):
            name, pairs = f"{number}", []
            for entry in state.adapters.values():
                for key, each in entry.tensors.items():
                    entry.tensors[key] = (rng.normal(size=each.shape) / np.sqrt(width)).astype("float32")
                pairs.append((entry.tensors["lora_a"], entry.tensors["lora_b"]))
            state.write(Path(folder) / f"{name}.safetensors")
            pool.register(name, Path(folder) / f"{name}.safetensors")
            changes[name] = pairs
        x = rng.normal(size=(clients, width)).astype("float32")

        def error(number: int, name: str, answer: Any) -> float:
            y = x[number]
            for kernel, (a, b) in zip(kernels, changes[name], strict=True):
                y = np.maximum(y @ kernel + (y @ a) @ b, 0)
            return float(np.abs(answer - y).max() / np.abs(y).max())

        results: dict[str, Any] = {}
        weights = {"popular": 1 / np.arange(1, adapters + 1), "uniform": np.ones(adapters)}
        for traffic, weight in weights.items():
            asked = rng.choice(adapters, (clients, requests), p=weight / weight.sum())
            loads = Counted(model)
            sizes: list[int] = []

            def run(batch: Any, names: Any, sizes: list[int] = sizes) -> Any:
                sizes.append(len(names))
                return pool.predict_on_batch(batch, names)

            with keras_lora.AdapterServer(pool, run=run, batch_sizes=BATCH_SIZES) as server:
                server.warm_up(x[0])
                sizes.clear()
                loads.number = 0
                results[f"{traffic}, server"] = found = load(lambda n, name: server.predict(x[n], name), asked, error)
                found |= {"loads": loads.number, "batches": len(sizes)}
            pool.predict_on_batch(x[:1], [None])
            loads.number = 0
            few = asked[:, : max(1, requests // 4)]  # it takes longer
            one = lambda n, name: pool.predict_on_batch(x[n : n + 1], [name])[0]  # noqa: E731
            results[f"{traffic}, one at a time"] = load(one, few, error)
            results[f"{traffic}, one at a time"] |= {"loads": loads.number, "batches": few.size}
            loads.stop()
    check(results)
    return results


def check(results: dict[str, Any]) -> None:
    """Whether every answer was that of its adapter alone, up to the rounding of float32."""
    assert all(each["error"] < 1e-4 for each in results.values()), results


class Counted:
    """Counts how often adapters are brought into places."""

    def __init__(self, model: Any):
        self.number, self._model, put = 0, model, model.put

        def counted(*arguments: Any) -> None:
            self.number += 1
            put(*arguments)

        model.put = counted

    def stop(self) -> None:
        del self._model.put


def load(ask: Callable[[int, str], Any], asked: np.ndarray, error: Callable[[int, str, Any], float]) -> dict[str, Any]:
    """Let each client ask one request after the other, and measure. The answers are checked at the end."""
    together = threading.Barrier(len(asked) + 1)

    def client(number: int) -> tuple[list[float], list[Any]]:
        seconds, answers = [], []
        together.wait()
        for each in asked[number]:
            start = time.perf_counter()
            answers.append(ask(number, f"{each}"))
            seconds.append(time.perf_counter() - start)
        return seconds, answers

    with concurrent.futures.ThreadPoolExecutor(len(asked)) as threads:
        futures = [threads.submit(client, number) for number in range(len(asked))]
        together.wait()
        start = time.perf_counter()
        found = [each.result() for each in futures]
        wall = time.perf_counter() - start
    seconds = np.concatenate([each for each, _ in found])
    errors = [
        error(number, f"{name}", answer)
        for number, (_, answers) in enumerate(found)
        for name, answer in zip(asked[number], answers, strict=True)
    ]
    return {
        "requests": asked.size,
        "per second": round(asked.size / wall, 1),
        "p50": round(1000 * float(np.percentile(seconds, 50)), 1),
        "p99": round(1000 * float(np.percentile(seconds, 99)), 1),
        "error": max(errors),
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    lines = ["| backend | traffic | requests per second | p50 | p99 | requests in a batch | adapters loaded |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for backend, rows in results.items():
        for name, row in rows.items():
            mean, loaded = row["requests"] / row["batches"], row["loads"] / row["requests"]
            lines.append(
                f"| {BACKENDS[backend]} | {name} | {row['per second']:,.0f} | {row['p50']:.0f} ms | {row['p99']:.0f} ms "
                f"| {mean:.1f} | {loaded:.0%} of requests |"
            )
    return "\n".join(lines) + "\n"
