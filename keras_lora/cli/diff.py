"""`keras-lora diff`: how two adapter files differ."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from keras_lora import factors
from keras_lora.cli.common import AdapterFile, Entry, lora_factors, read_adapter, show, table
from keras_lora.factors import Factors


class _Part(NamedTuple):
    """The header fields and the tensors of one adapter or trained layer in a file."""

    said: dict[str, Any]
    tensors: dict[str, np.ndarray]
    entry: Entry | None = None


def add(commands: Any) -> None:
    """Define the arguments of `diff`."""
    command = commands.add_parser(
        "diff",
        help="show how two adapter files differ",
        description="Compare two adapter files: layers, methods, arguments and values. For LoRA, the column `change` shows "
        "|A - B| / |A| for the two changes of the kernel (Frobenius norm); it does not depend on how a change is factored. "
        "For other methods, and for heads and biases that were trained too, `number` shows the largest difference between "
        "two numbers. The exit code is 1 if the files differ.",
        epilog="example: keras-lora diff monday.safetensors tuesday.safetensors",
    )
    command.add_argument("a", metavar="A", help="an adapter file, .safetensors")
    command.add_argument("b", metavar="B", help="another adapter file")
    command.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Compare two adapter files."""
    a, b = (_parts(read_adapter(path)) for path in (given.a, given.b))
    places = list(dict.fromkeys([*a, *b]))
    rows = [row for place in places if (row := _row(place, a.get(place), b.get(place))) is not None]
    if not rows:
        show(f"{given.a} and {given.b} have the same contents: {len(places)} adapters or trained layers")
        return 0
    show(
        table(rows, ("change", "number")),
        f"{given.a} (A) and {given.b} (B) differ at {len(rows)} of {len(places)} adapters or trained layers",
    )
    return 1


def _parts(state: AdapterFile) -> dict[tuple[str, str], _Part]:
    parts: dict[tuple[str, str], _Part] = {}
    for address, entry in state.adapters.items():
        said = {**{key: entry.said[key] for key in ("method", "class", "kernel")}, **entry.said["config"]}
        parts[address, "adapter"] = _Part(said, entry.tensors, entry)
    for address, trained in state.trained.items():
        parts[address, "trained"] = _Part(trained.said, trained.tensors)
    for key, tensor in state.unplaced.items():
        parts[key, "unplaced"] = _Part({}, {key: tensor})
    return parts


def _row(place: tuple[str, str], a: _Part | None, b: _Part | None) -> dict[str, Any] | None:
    """The row for one place, or `None` if nothing differs there."""
    row: dict[str, Any] = {"layer": place[0], "part": place[1]}
    if a is None or b is None:
        return {**row, "A / B": "only in A" if b is None else "only in B", "change": None, "number": None}
    keys = [key for key in {**a.said, **b.said} if a.said.get(key) != b.said.get(key)]
    words = [f"{key}: {a.said.get(key)} / {b.said.get(key)}" for key in keys]
    same = not words and a.tensors.keys() == b.tensors.keys()
    if same and all(np.array_equal(*_pair(a, b, name), equal_nan=True) for name in a.tensors):
        return None
    change = _change_apart(a, b)
    number = None
    if change is None:
        words += _misfits(a, b)
        apart = [float(np.abs(np.subtract(*_pair(a, b, name))).max(initial=0)) for name in _alike(a, b)]
        number = float(np.max(apart)) if apart else None  # NaN if one of them is NaN
    return {**row, "A / B": ", ".join(words), "change": change, "number": number}


def _change_apart(a: _Part, b: _Part) -> float | None:
    """`‖ΔA - ΔB‖ / ‖ΔA‖`, if both are finite products of thin factors, such as LoRA, for kernels of the same shape."""
    if a.entry is None or b.entry is None:
        return None
    try:
        first, second = lora_factors(a.entry), lora_factors(b.entry)
        if first is None or second is None:
            return None
        apart = factors.concatenate([(1.0, first), (-1.0, second)])
        whole, off = _size(first), _size(apart)
    except ValueError:
        return None
    return off / whole if whole else (math.inf if off else 0.0)


def _size(pair: Factors) -> float:
    """`‖a b‖` without forming `a b`: after truncation the columns of `a` have the singular values as squared norms."""
    (a, _), _ = factors.truncate(pair, energy=1.0)
    return float(np.linalg.norm(np.square(a).sum(axis=-2)))


def _pair(a: _Part, b: _Part, name: str) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(a.tensors[name], "float64"), np.asarray(b.tensors[name], "float64")


def _alike(a: _Part, b: _Part) -> list[str]:
    return [name for name in a.tensors if name in b.tensors and a.tensors[name].shape == b.tensors[name].shape]


def _misfits(a: _Part, b: _Part) -> Iterator[str]:
    for name in {**a.tensors, **b.tensors}:
        shapes = [part.tensors[name].shape if name in part.tensors else "none" for part in (a, b)]
        if shapes[0] != shapes[1]:
            yield f"{name}: {shapes[0]} / {shapes[1]}"
