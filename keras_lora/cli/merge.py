"""`keras-lora merge`: make a plain model from a base and an adapter file."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import keras

from keras_lora import reports
from keras_lora.cli.common import Refused, new_file, read_adapter, refusing, show
from keras_lora.cli.inspect_file import keras_file
from keras_lora.files.saving import load_adapter
from keras_lora.merging import merge_lora


def add(commands: Any) -> None:
    """Define the arguments of `merge`."""
    command = commands.add_parser(
        "merge",
        help="merge an adapter into its base model",
        description="Load BASE, add the change of ADAPTER to its kernels, and save a plain Keras model as OUT. OUT is not "
        "compiled, even if BASE is. Your own classes must be importable: add their folder to PYTHONPATH.",
        epilog="example: keras-lora merge base.keras french.safetensors merged.keras",
    )
    command.add_argument("base", metavar="BASE", help="the plain base model, a .keras file")
    command.add_argument("adapter", metavar="ADAPTER", help="an adapter file, .safetensors")
    command.add_argument("out", metavar="OUT", help="the .keras file to write, completely or not at all")
    command.add_argument("--force", action="store_true", help="replace OUT if it exists")
    command.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Merge an adapter file into a base."""
    out = new_file(given.out, ".keras", given.force)
    state = read_adapter(given.adapter)  # before the base, which may take long
    base = plain_base(given.base)
    with reports.progress(4, after=0) as step:
        step("loading the base")
        model = load_base(base)
        step("loading the adapter")
        with refusing(ValueError, OSError):
            load_adapter(model, given.adapter)
        step("merging")
        with refusing(ValueError):
            merge_lora(model)
        step("saving")
        with refusing(OSError, before=f"{out} cannot be written: "):
            _save(model, out)
    show(f"{out}: {base} with {len(state.adapters)} changed kernels, {out.stat().st_size:,} bytes")
    return 0


def plain_base(path: str) -> Path:
    """`path`, if it is a `.keras` file of a plain model."""
    if keras_file(Path(path))["adapters"]:
        raise Refused(
            f"{path} is adapted already. Expected the plain base of the adapter. Merge its adapters first, in Python: "
            "`keras_lora.merge_lora(keras.saving.load_model(path))`."
        )
    return Path(path)


def load_base(base: Path) -> Any:
    """The model in a `.keras` file, not compiled."""
    try:
        return keras.saving.load_model(base, compile=False)
    except Exception as error:  # a damaged or hostile file gives an error of any kind
        said = " ".join(str(error).split())
        raise Refused(
            f"Keras cannot load {base} ({type(error).__name__}: {said[:300]}{'...' * (len(said) > 300)}). Expected a whole "
            ".keras file, whose classes can be imported here (PYTHONPATH) and are registered with Keras."
        ) from error


def _save(model: Any, out: Path) -> None:
    """Write to a temporary folder next to `out`, then rename, so that `out` is never half written."""
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as aside:
        whole = Path(aside) / out.name
        model.save(whole)
        with whole.open("r+b") as file:
            os.fsync(file.fileno())
        os.replace(whole, out)
