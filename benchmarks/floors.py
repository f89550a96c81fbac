"""How far a training step is from its floor where it was not on it: convolutions, blocks, dropout, DoRA on an embedding.

    python benchmarks/floors.py run [BACKEND ...]   # measures, and writes results/floors.json
    python benchmarks/floors.py page                # writes floors.md from that file

The variants of a case take turns in one process with one thread. A time is CPU seconds of the process. The ratio of the
medians comes first; that of the minima, which suffers less from other work on the machine, is in brackets. "FLOPs" is the
ratio that the operations alone would give, counted by XLA: the whole gradient of a loss, without the optimizer. Those of the
convolutions are counted by hand.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results/floors.json", HERE / "floors.md"
BACKENDS = {"jax": "JAX", "tensorflow": "TensorFlow", "torch": "PyTorch"}
#: By name: the case, the variant, what it is compared with, and the seconds of the case.
ROWS = {
    "convolution of 128 channels / frozen": ("convolution", "keras_lora", "frozen"),
    "block, all linear / frozen": ("block", "keras_lora", "frozen"),
    "block, dropout 0.1 / without": ("block", "keras_lora dropout", "keras_lora"),
    "embedding, DoRA / LoRA": ("embedding", "keras_lora DoRA", "keras_lora"),
}
SECONDS = 15.0


def flops(model: Any, case: Any) -> float:
    import jax
    import keras

    trained, frozen = ([v.value for v in group] for group in (model.trainable_variables, model.non_trainable_variables))

    def loss(trained: Any) -> Any:
        return keras.ops.sum(keras.ops.square(model.stateless_call(trained, frozen, case.x, training=True)[0]))

    return float(jax.jit(jax.grad(loss)).lower(trained).compile().cost_analysis()["flops"])


def measure(backend: str) -> dict[str, Any]:
    import measuring

    measuring.pin(backend)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))  # one thread, but not one core: others work on this machine
    import cases
    from variants import prepare

    made = {"convolution": cases.convolution, "block": lambda: cases.block("all-linear"), "embedding": cases.embedding}
    found: dict[str, Any] = {}
    for name, make in made.items():
        case = make()
        rows = {row: (variant, base) for row, (of, variant, base) in ROWS.items() if of == name}
        models = {each: prepare(each, case) for each in dict.fromkeys(sum(rows.values(), ()))}
        calls = {each: functools.partial(model.train_on_batch, case.x, case.y) for each, model in models.items()}
        load = measuring.load_average()
        times = measuring.interleaved(calls, SECONDS, 200, 9)
        for row, (variant, base) in rows.items():
            ratio = statistics.median(times[variant]) / statistics.median(times[base])
            found[row] = {"ratio": ratio, "of minima": min(times[variant]) / min(times[base]), "load": load}
            found[row]["repeats"] = len(times[base])
            if backend == "jax" and name != "convolution":  # XLA does not count all that its convolutions do
                found[row]["flops"] = flops(models[variant], case) / flops(models[base], case)
    return found


def of_convolutions(channels: int = 128, pixels: int = 2048, rank: int = 8, window: int = 9, layers: int = 3) -> float:
    """The operations of the formed plan over those of a frozen stack, whose first layer has no gradient of its input.

    Beside a convolution: two thin ones for the gradients, the two 1×1 products with `dy`, and forming the kernel twice.
    """
    thin = 2 * rank / channels + 2 * rank / (window * channels) + 2 * rank / pixels
    floor = 2 * layers - 1
    return (floor + layers * thin) / floor


def page() -> str:
    results = json.loads(RESULTS.read_text())
    results["jax"]["convolution of 128 channels / frozen"]["flops"] = of_convolutions()
    lines = [
        "# How far from the floor",
        "",
        "Written by `python benchmarks/floors.py page`, whose head says what is measured.",
        "",
        f"| a training step | FLOPs | {' | '.join(BACKENDS.values())} |",
        f"| --- | ---: | {' | '.join(['---:'] * len(BACKENDS))} |",
    ]
    for row in ROWS:
        count = f"{results['jax'][row]['flops']:.2f}"
        text = [count]
        for backend in BACKENDS:
            one = results.get(backend, {}).get(row)
            text.append(f"{one['ratio']:.2f} ({one['of minima']:.2f})" if one else "-")
        lines.append(f"| {row} | {' | '.join(text)} |")
    loads = [one["load"] for rows in results.values() for one in rows.values()]
    lines += ["", f"2 cores, and a load average of {min(loads):.0f} to {max(loads):.0f}: other work ran beside it."]
    return "\n".join(lines) + "\n"


def main() -> None:
    what, *backends = sys.argv[1:] or ["page"]
    if what == "run":
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        for backend in backends or BACKENDS:
            command = [sys.executable, __file__, "one", backend]
            environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}  # the code beside this file, not an installed one
            one = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
            results[backend] = json.loads(one.stdout.splitlines()[-1])
            RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    elif what == "one":
        print(json.dumps(measure(backends[0])))
        return
    PAGE.write_text(page())
    print(page())


if __name__ == "__main__":
    main()
