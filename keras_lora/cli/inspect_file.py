"""`keras-lora inspect`: show what is in a file. No model is built."""

from __future__ import annotations

import argparse
import json
import math
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from keras_lora.cli.common import METHODS, Refused, old_file, read_adapter, refusing, scale_of, show, table
from keras_lora.files import tensor_file

_PEFT_CONFIG, _PEFT_TENSORS = "adapter_config.json", "adapter_model.safetensors"
#: The key in the config of an adapted layer, as in `keras_lora.swap.adapted`.
KEY = "keras_lora"
#: An entry of a .keras file of at most this many bytes is always unpacked.
_SHORT = 1_000_000
_EXPECTED = f"Expected an adapter file (.safetensors), a .keras file, or the folder of a PEFT adapter ({_PEFT_CONFIG})."


def add(commands: Any) -> None:
    """Define the arguments of `inspect`."""
    command = commands.add_parser(
        "inspect",
        help="show what is in an adapter file, a .keras file or a PEFT adapter",
        description="Show what is in a file: methods, ranks, shapes, sizes. No model is built, and no base is needed.",
        epilog="example: keras-lora inspect french.safetensors",
    )
    command.add_argument(
        "file",
        metavar="FILE",
        help="an adapter file (.safetensors), a .keras file, or a PEFT adapter (the folder, or its .safetensors file)",
    )
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    command.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Print what is in a file."""
    path = Path(given.file)
    if path.suffix == ".keras" and not path.is_dir():
        data, display = keras_file(path), _show_keras_file
    elif path.is_dir() or path.suffix == ".safetensors":
        own = not path.is_dir() and tensor_file.ENTRY in _safetensors(path)[0]
        data, display = (_adapter_file(path), _show_adapter_file) if own else (_peft(path), _show_peft)
    else:
        raise Refused(f"{path} is {'of another kind' if path.exists() else 'not there'}. {_EXPECTED}")
    if given.json:
        show(json.dumps(data, indent=2))
    else:
        display(path, data)
    return 0


# An adapter file.


def _adapter_file(path: Path) -> dict[str, Any]:
    state = read_adapter(str(path))
    data = {key: value for key, value in state.header.items() if key not in ("adapters", "trained")}
    data |= {"kind": "adapter", "adapters": [], "trained": []}
    for address, entry in state.adapters.items():
        with refusing(ValueError, before=f"The adapter at '{address}' of {path} is damaged: "):
            scale = scale_of(entry.said["config"])
        row = {"layer": address, **{key: entry.said[key] for key in ("class", "kernel", "method")}}
        data["adapters"].append({**row, "rank": entry.said["config"].get("rank"), "scale": scale, **_sizes(entry.tensors)})
    for address, trained in state.trained.items():
        names = [name.partition(".")[2] for name in trained.tensors]
        row = {"layer": address, "class": trained.said["class"], "variables": names}
        data["trained"].append({**row, **_sizes(trained.tensors)})
    return {**data, "total": {**_sizes(state.tensors), "file": path.stat().st_size}}


def _sizes(tensors: dict[str, np.ndarray]) -> dict[str, int]:
    found = tensors.values()
    return {"parameters": sum(each.size for each in found), "bytes": sum(each.nbytes for each in found)}


def _show_adapter_file(path: Path, data: dict[str, Any]) -> None:
    methods = ", ".join(sorted({row["method"] for row in data["adapters"]}))
    said = {key: data[key] for key in data.keys() - {"kind"} if isinstance(data[key], (str, int, float))}
    rows = list(data["adapters"])
    for row in data["trained"]:
        itself = {"method": f"trained itself: {', '.join(row['variables'])}", "kernel": None, "rank": None, "scale": None}
        rows.append({key: {**row, **itself}[key] for key in ("layer", "class", "kernel", "method", *_NUMBERS)})
    show(
        f"{path}: an adapter file of keras_lora, {data['total']['file']:,} bytes",
        *(f"{key}: {said[key]}" for key in sorted(said)),
        table(rows, _NUMBERS, {"layer": f"{len(data['adapters'])} adapters", "method": methods, **data["total"]}),
    )


_NUMBERS = ("rank", "scale", "parameters", "bytes")


# A PEFT adapter.


def _safetensors(path: Path) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """The metadata of a safetensors file, and the name, shape and dtype of each tensor. The numbers are not read."""
    old_file(str(path), ".safetensors")
    damaged = refusing(safetensors.SafetensorError, OSError, before=f"{path} is not a whole safetensors file: ")
    with damaged, safetensors.safe_open(path, framework="numpy") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        rows = [{"tensor": key, "shape": each.get_shape(), "dtype": each.get_dtype()} for key, each in slices.items()]
        return file.metadata() or {}, [{**row, **_size(**row)} for row in rows]


def _size(shape: list[int], dtype: str, **_: str) -> dict[str, int]:
    count, bits = math.prod(shape), re.search(r"\d+", dtype)  # BOOL has no number and takes a byte
    return {"parameters": count, "bytes": count * (int(bits[0]) if bits else 8) // 8}


def _peft(path: Path) -> dict[str, Any]:
    folder = path if path.is_dir() else path.parent
    file, config_file = folder / _PEFT_TENSORS if path.is_dir() else path, folder / _PEFT_CONFIG
    if path.is_dir() and not (file.is_file() and config_file.is_file()):
        missing = [each.name for each in (config_file, file) if not each.is_file()]
        raise Refused(
            f"The folder {path} lacks {' and '.join(missing)}. {_EXPECTED} A pickled adapter_model.bin is not read."
        )
    _, tensors = _safetensors(file)
    ranks = sorted({row["shape"][0] for row in tensors if "lora_A" in row["tensor"] or "lora_embedding_A" in row["tensor"]})
    if not ranks:
        raise Refused(f"{file} has {len(tensors)} tensors, none of an adapter of keras_lora or a LoRA of PEFT. {_EXPECTED}")
    config: dict[str, Any] = {}
    if config_file.is_file():
        with refusing(ValueError, OSError, before=f"{config_file} is not whole: "):
            config = json.loads(config_file.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise Refused(
                f"{config_file} contains a {type(config).__name__}. Expected the config of a PEFT adapter, a table."
            )
    return {
        "kind": "peft",
        "rank": config.get("r", ranks[0] if len(ranks) == 1 else ranks),
        "alpha": config.get("lora_alpha"),
        "targets": config.get("target_modules"),
        "base": config.get("base_model_name_or_path"),
        "adapters": _peft_rows(config, tensors),
        "config": config,
        "tensors": tensors,
        "total": {**_sum(tensors), "file": file.stat().st_size},
    }


def _peft_rows(config: dict[str, Any], tensors: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The adapters, as for other files. The scale is `None` if PEFT takes it from a pattern."""
    modules: dict[str, list[dict[str, Any]]] = {}
    for row in tensors:
        module, lora, _ = row["tensor"].partition(".lora_")
        if lora:
            modules.setdefault(module, []).append(row)
    alpha, rows = config.get("lora_alpha"), []
    for module, own in modules.items():
        rank = next((row["shape"][0] for row in own if re.search(r"\.lora_(embedding_)?A\b", row["tensor"])), None)
        scale = None
        if rank and isinstance(alpha, (int, float)) and not config.get("alpha_pattern"):
            scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        method = "dora" if any("lora_magnitude" in row["tensor"] for row in own) else "lora"
        rows.append({"layer": module, "method": method, "rank": rank, "scale": scale, **_sum(own)})
    return rows


def _sum(rows: list[dict[str, Any]]) -> dict[str, int]:
    return {key: sum(row[key] for row in rows) for key in ("parameters", "bytes")}


def _show_peft(path: Path, data: dict[str, Any]) -> None:
    show(
        f"{path}: a LoRA of PEFT, {data['total']['file']:,} bytes",
        *(f"{key}: {'not given' if data[key] is None else data[key]}" for key in ("rank", "alpha", "targets", "base")),
        table(data["tensors"], ("parameters", "bytes"), {"tensor": f"{len(data['tensors'])} tensors", **data["total"]}),
    )


# A `.keras` file.


def keras_file(path: Path) -> dict[str, Any]:
    """The facts about a `.keras` file, from its metadata and config."""
    old_file(str(path), ".keras")
    # A damaged archive raises errors of many kinds.
    with refusing(Exception, before=f"{path} is not a whole .keras file: "), zipfile.ZipFile(path) as archive:
        metadata, config = (_json_in(archive, name, path.stat().st_size) for name in ("metadata.json", "config.json"))
        weights = sum(each.file_size for each in archive.infolist() if each.filename.endswith(".h5"))
        return {
            "kind": "keras",
            "class": config["class_name"],
            "name": config["config"].get("name"),
            "keras": metadata.get("keras_version"),
            "saved": metadata.get("date_saved"),
            "adapters": _adapters_in(config["config"]),
            "total": {"file": path.stat().st_size, "weights": weights},
        }


def _json_in(archive: zipfile.ZipFile, name: str, held: int) -> Any:
    """The table in an entry of an archive of `held` bytes. An entry can claim to be a thousand times as long."""
    entry = archive.getinfo(name)
    if entry.file_size > max(_SHORT, 10 * held) or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"its {name} would have {entry.file_size:,} bytes unpacked, and the whole file has {held:,}")
    return json.loads(archive.read(entry))


def _adapters_in(config: Any) -> list[dict[str, Any]]:
    """The adapters listed in a config or in the configs inside it. An outer list includes the adapters of inner models."""
    if isinstance(config, list):
        return [row for each in config for row in _adapters_in(each)]
    if not isinstance(config, dict):
        return []
    if not isinstance(config.get(KEY), dict):
        return [row for each in config.values() for row in _adapters_in(each)]
    return [_row_of(config, entry) for entry in config[KEY]["adapters"]]


def _row_of(config: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    adapter = entry["adapter"]
    method = METHODS.get(adapter["class_name"], adapter["class_name"])  # as in an adapter file
    row = {"in": config.get("name"), "layer": entry["address"], "adapter": entry["name"], "method": method}
    rank, scale = adapter["config"].get("rank"), scale_of(adapter["config"])
    return {**row, "rank": rank, "scale": scale, "strength": entry["strength"]}


def _show_keras_file(path: Path, data: dict[str, Any]) -> None:
    rows, total = data["adapters"], data["total"]
    show(
        f"{path}: a Keras model, {total['file']:,} bytes, weights {total['weights']:,} bytes",
        f"class: {data['class']}",
        f"name: {data['name']}",
        f"keras: {data['keras']}, saved {data['saved']}",
        table(rows, ("rank", "scale", "strength")) if rows else "adapters: none; a plain model",
    )
