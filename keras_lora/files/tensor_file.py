"""The bytes of an adapter file: safetensors with a header, fully checked when read and written atomically.

`adapter_state.py` defines what the header and the tensors mean.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from keras_lora import checks
from keras_lora.swap import whole_files

VERSION = 2
#: The entry of the metadata that contains the header.
ENTRY = "keras_lora"
#: In the key of a tensor, what is between the address of a layer and a variable of the base.
BASE = ":base."
_DTYPES = {"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "F16", "F32", "F64"}


def checked_path(path: str | os.PathLike[str]) -> Path:
    """`path` as a `Path`. Raises an error if an adapter file cannot have this path."""
    path = Path(path)
    if path.suffix != ".safetensors":
        other = what_it_is(path)
        raise ValueError(
            f"The path of an adapter file must end in '.safetensors'. Received: {str(path)!r}."
            f"{f' It is {other}' if other else ''}"
        )
    return path


def what_it_is(path: Path) -> str | None:
    """The kind of a file or folder that is not an adapter file, and what reads it, in words; `None` if it is not known."""
    names = {each.name for each in path.iterdir()} if path.is_dir() else set()
    start = b""
    if path.is_file():
        with path.open("rb") as file:
            start = file.read(8)
    if "adapter_config.json" in names:
        return "the folder of a PEFT adapter, which `keras_lora.interop.from_peft(model, folder)` reads."
    if "config.json" in names or (start.startswith(b"PK") and path.suffix == ".keras"):
        return (
            "a whole Keras model, which `keras.saving.load_model(path)` reads, after `import keras_lora` if it is adapted."
        )
    if names:
        return f"a folder, with {', '.join(sorted(names)[:8])} in it. Expected one file."
    if start.startswith(b"\x89HDF"):
        return (
            "an HDF5 file. `keras_lora.interop.from_lora_h5(backbone, path)` reads the `.lora.h5` files of KerasHub, "
            "`model.load_weights(path)` a `.weights.h5`, and `keras.saving.load_model(path)` an `.h5` of a whole model."
        )
    if start[:1] == b"\x80" or start.startswith(b"PK"):
        return (
            "a pickle, such as `torch.save` writes, or another archive. keras_lora never opens pickles, because they run "
            "code; ask its author for safetensors."
        )
    return None


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read and check the header and the tensors of an adapter file."""
    if not path.exists():
        raise FileNotFoundError(f"There is no adapter file at {path}.")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            header = json.loads(metadata[ENTRY], object_pairs_hook=_each_once)
            version = header["version"]
            if type(version) is not int:
                raise TypeError("'version' is not a number")
            if 1 <= version <= VERSION:
                _check_header(header)
                tensors = {key: _tensor(file, key) for key in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RecursionError, OSError) as error:
        other = what_it_is(path) or _of_another_library(path)
        raise ValueError(
            f"{path} is not a whole adapter file of keras_lora ({type(error).__name__}: {_short(str(error))}). Expected a "
            f"file written by `keras_lora.save_adapter`. It {f'is {other}' if other else 'may be cut off or damaged.'}"
        ) from error
    if not 1 <= version <= VERSION:
        raise ValueError(f"{path} has format version {version}. Expected at most {VERSION}. A newer keras_lora may read it.")
    return header, tensors


def _of_another_library(path: Path) -> str | None:
    """What a safetensors file without our header is, in words."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            if ENTRY in (file.metadata() or {}):
                return None
    except (safetensors.SafetensorError, OSError):
        return None
    if any(".lora_" in name for name in names):
        return "the tensors of a PEFT adapter. `keras_lora.interop.from_peft(model, folder)` reads the folder it lies in."
    return f"a safetensors file of another kind, with {len(names)} tensors such as {_short(', '.join(names[:3]))}."


def by_place(header: dict[str, Any], tensors: dict[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """The tensors of a file, by part of the header, by address and by name.

    The parts are `"adapters"` and `"trained"`. Tensors that belong to neither are in the part `"unplaced"`, by key.
    """
    found: dict[str, dict[str, Any]] = {part: {at: {} for at in header[part]} for part in ("adapters", "trained")}
    found["unplaced"] = {}
    for key, tensor in tensors.items():
        part, (address, base, name) = "trained", key.rpartition(BASE)
        if not base:
            part, (address, _, name) = "adapters", key.rpartition(":")
        if address in found[part]:
            found[part][address][name] = tensor
        else:
            found["unplaced"][key] = tensor
    return found


def _tensor(file: Any, key: str) -> np.ndarray:
    part = file.get_slice(key)
    if part.get_dtype() not in _DTYPES or 0 in part.get_shape():
        raise TypeError(
            f"the tensor '{key}' of dtype {part.get_dtype()} and shape {part.get_shape()} is not one that keras_lora writes"
        )
    found: np.ndarray = file.get_tensor(key)
    return found


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a key appears twice")
    return table


def _check_header(header: dict[str, Any]) -> None:
    """Raise unless every part that is read later exists and has the right type."""

    def text(value: Any) -> bool:
        return isinstance(value, str)

    def shape(value: Any) -> bool:
        return isinstance(value, list) and all(type(each) is int for each in value)

    def plan(value: Any) -> bool:
        flags = isinstance(value, list) and len(value) == 2 and isinstance(value[1], list)
        return flags and type(value[0]) is bool and all(type(each) is bool for each in value[1]) and any(value[1])

    parts: dict[str, dict[str, Any]] = {
        "adapters": {
            "class": text,
            "method": text,
            "config": lambda value: isinstance(value, dict) and _plain(value),
            "kernel": shape,
        },
        "trained": {
            "class": text,
            "plan": plan,
            "shapes": lambda value: isinstance(value, list) and all(map(shape, value)),
        },
    }
    if header["version"] > 1:
        parts["adapters"]["scale"] = lambda value: type(value) in (int, float) and _plain(value)
        if not text(header["base_structure"]) or not text(header.get("base_weights", "")):
            raise TypeError("a fingerprint of the base is not a string")
    for part, fields in parts.items():
        if not isinstance(header[part], dict):
            raise TypeError(f"'{part}' is not a table")
        for address, entry in header[part].items():
            wrong = [name for name, fits in fields.items() if not isinstance(entry, dict) or not fits(entry.get(name))]
            if wrong:
                raise TypeError(f"{part} at '{address}' has a missing or wrong {', '.join(wrong)}")
    if not header["adapters"]:
        raise ValueError("it has no adapter")


def _plain(value: Any, depth: int = 8) -> bool:
    """Whether `value` is plain data: nothing that Keras would turn into an object, and only finite numbers."""
    if isinstance(value, dict):
        return depth > 0 and "class_name" not in value and all(_plain(each, depth - 1) for each in value.values())
    if isinstance(value, list):
        return depth > 0 and all(_plain(each, depth - 1) for each in value)
    return type(value) not in (int, float) or checks.is_number(value)


def _short(text: str) -> str:
    return text if len(text) <= 500 else f"{text[:500]}…"


def write(path: Path, header: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    """Write an adapter file."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {path.parent} to write {path.name} into. Make it first.")
    whole_files.take_left_over(path)
    write_bytes(path, safetensors.numpy.save(tensors, {ENTRY: json.dumps({"version": VERSION, **header}, sort_keys=True)}))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file that replaces the old one only when complete, so an interrupted save leaves the old one unchanged."""
    try:
        with whole_files.replacing(path) as aside:
            aside.write_bytes(data)
    except OSError as error:
        if error.errno is None:
            raise
        # The error names the file, not the temporary one.
        raise OSError(error.errno, f"{error.strerror}, so it cannot be written", str(path)) from error


def umask() -> int:
    """The permission bits that this process removes from a new file."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
