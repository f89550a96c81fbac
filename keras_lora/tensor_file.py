"""The bytes of an adapter file: safetensors with a header, read with every check and written whole or not at all.

What the header and the tensors mean, `adapter_file.py` says.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

VERSION = 1
#: The entry of the metadata that is the header.
ENTRY = "keras_lora"


def checked_path(path: str | os.PathLike[str]) -> Path:
    """`path`, if an adapter file may have it."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"The path of an adapter file must end in '.safetensors'. Received: {str(path)!r}.")
    return path


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The header and the tensors of an adapter file, checked."""
    if not path.exists():
        raise FileNotFoundError(f"There is no adapter file at {path}.")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        header = json.loads(metadata[ENTRY])
        version = header["version"]
        if version == VERSION:
            _check_header(header)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(
            f"{path} is not a whole adapter file of keras_lora ({type(error).__name__}: {error}). Expected a file written "
            "by `keras_lora.save_adapter`. It may be cut off, damaged or of another kind."
        ) from error
    if version != VERSION:
        raise ValueError(f"{path} has format version {version!r}. Expected {VERSION}. A newer keras_lora may read it.")
    return header, tensors


def _check_header(header: dict[str, Any]) -> None:
    """Raise unless every part that is read later is there and of its kind."""

    def shape(value: Any) -> bool:
        return isinstance(value, list) and all(type(each) is int for each in value)

    def plan(value: Any) -> bool:
        flags = isinstance(value, list) and len(value) == 2 and isinstance(value[1], list)
        return flags and all(type(each) is bool for each in [value[0], *value[1]])

    parts = {
        "adapters": {
            "class": lambda value: isinstance(value, str),
            "method": lambda value: isinstance(value, str),
            "config": lambda value: isinstance(value, dict),
            "kernel": shape,
        },
        "trained": {
            "class": lambda value: isinstance(value, str),
            "plan": plan,
            "shapes": lambda value: isinstance(value, list) and all(map(shape, value)),
        },
    }
    for part, fields in parts.items():
        if not isinstance(header[part], dict):
            raise TypeError(f"'{part}' is not a table")
        for address, entry in header[part].items():
            wrong = [name for name, fits in fields.items() if not isinstance(entry, dict) or not fits(entry.get(name))]
            if wrong:
                raise TypeError(f"{part} at '{address}' lacks a right {', '.join(wrong)}")


def write(path: Path, header: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    """Write beside `path` and rename: an interrupted save leaves the old file as it was."""
    data = safetensors.numpy.save(tensors, {ENTRY: json.dumps({"version": VERSION, **header}, sort_keys=True)})
    descriptor, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(aside).chmod(0o666 & ~_umask())
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
