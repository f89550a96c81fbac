"""`keras-lora compress`: a smaller adapter file. Only NumPy on the factors; no base is needed."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from keras_lora import factors, reports
from keras_lora.cli.common import (
    LORA,
    AdapterFile,
    Refused,
    lora_factors,
    new_file,
    read_adapter,
    refusing,
    show,
    table,
)


def add(commands: Any) -> None:
    """Define the arguments of `compress`."""
    command = commands.add_parser(
        "compress",
        help="make an adapter file of smaller rank",
        description="Replace the adapter of each layer with its best LoRA approximation, at a given rank or at a share of "
        "the energy, and print the errors. No base is needed. Heads and biases that were trained with the adapter are "
        "copied.",
        epilog="example: keras-lora compress french.safetensors small.safetensors --energy 0.9",
    )
    command.add_argument("file", metavar="FILE", help="an adapter file of LoRA, .safetensors")
    command.add_argument("out", metavar="OUT", help="the .safetensors file to write, completely or not at all")
    size = command.add_mutually_exclusive_group(required=True)
    size.add_argument("--rank", metavar="N", type=_rank, help="the largest rank that a layer may have")
    size.add_argument(
        "--energy",
        metavar="E",
        type=_energy,
        help="a number in (0, 1]: for each layer, the smallest rank that keeps this share of its squared singular values",
    )
    command.add_argument("--force", action="store_true", help="replace OUT if it exists")
    command.set_defaults(run=run)


def _rank(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, received {text!r}")
    return int(text)


def _energy(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"expected a number in (0, 1], received {text!r}")
    return number


def run(given: argparse.Namespace) -> int:
    """Compress an adapter file."""
    out = new_file(given.out, ".safetensors", given.force)
    state = read_adapter(given.file)
    before = _bytes(state)
    rows: list[dict[str, Any]] = []
    others: list[str] = []
    with reports.progress(len(state.adapters), after=0) as step:
        for address, entry in state.adapters.items():
            step(address)
            with refusing(ValueError, before=f"The adapter at '{address}' of {given.file} is damaged: "):
                whole, said = lora_factors(entry), entry.said
                if whole is None:
                    others.append(said["method"])
                    continue
                (a, b), error = factors.truncate(whole, given.rank, given.energy)
            rank = a.shape[-1]
            rows.append({"layer": address, "rank before": said["config"]["rank"], "rank": rank, "error": error})
            entry.said = {**said, "config": {**LORA, "rank": rank, "alpha": rank}}
            if "scale" in said:  # files of version 1 have none
                entry.said["scale"] = 1.0
            new = {"lora_a": a, "lora_b": b}
            entry.tensors = {name: np.ascontiguousarray(factor, "float32") for name, factor in new.items()}
    if others:
        raise Refused(
            f"{given.file} has adapters of the method {', '.join(sorted(set(others)))}. Expected only lora, whose change "
            "can be computed without the base. Load the file into its base and call "
            "`keras_lora.compress_adapter(model, rank=...)` in Python."
        )
    with refusing(OSError, before=f"{out} cannot be written: "):
        state.write(out)
    after = _bytes(state)
    largest = max((row["error"] for row in rows), default=0.0)
    show(
        table(rows, ("rank before", "rank", "error")),
        f"{out}: {after:,} bytes of numbers instead of {before:,}; largest error: {largest:.2g}",
    )
    return 0


def _bytes(state: AdapterFile) -> int:
    return sum(tensor.nbytes for tensor in state.tensors.values())
