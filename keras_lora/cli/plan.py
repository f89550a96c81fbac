"""`keras-lora plan`: the memory of a training step of a model whose weights are not read."""

from __future__ import annotations

import argparse
import json
import zipfile
from pathlib import Path
from typing import Any

import keras

from keras_lora import memory
from keras_lora.cli.common import Refused, refusing, show
from keras_lora.cli.inspect_file import keras_file
from keras_lora.compat import training_internals


def add(commands: Any) -> None:
    """Define the arguments of `plan`."""
    command = commands.add_parser(
        "plan",
        help="plan the memory of a training step, before there are weights",
        description="Build MODEL from its config, without its weights, and count the bytes of a training step: of the model "
        "as it is, and with --rank or --base-dtype after `apply_lora` too. It needs KERAS_BACKEND=jax.",
        epilog="example: keras-lora plan llama_folder --causal-lm --batch-size 8 --sequence-length 256 --rank 16 --remat",
    )
    command.add_argument(
        "model", metavar="MODEL", help="a .keras file, or the folder of a preset or checkpoint for KerasHub"
    )
    command.add_argument("--batch-size", type=int, default=1, metavar="N", help="the examples of a step (default 1)")
    command.add_argument("--sequence-length", type=int, metavar="N", help="the size of the input axes that are open")
    command.add_argument("--causal-lm", action="store_true", help="load a folder as a CausalLM, instead of a backbone")
    command.add_argument("--optimizer", default="adam", metavar="NAME", help="a Keras optimizer (default adam)")
    command.add_argument("--rank", type=int, metavar="N", help="plan it with adapters of this rank too")
    command.add_argument("--base-dtype", metavar="DTYPE", help="the dtype of the adapted kernels, such as bfloat16")
    command.add_argument("--remat", action="store_true", help="plan it after `keras_lora.rematerialize` too")
    command.add_argument("--mesh", metavar="A=N,...", help="the mesh of devices, such as batch=4,model=2")
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    command.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Print what a training step of a model needs."""
    mesh = _mesh(given.mesh)
    options = {"batch_size": given.batch_size, "sequence_length": given.sequence_length, "optimizer": given.optimizer}
    changes = {key: getattr(given, key) for key in ("rank", "base_dtype", "remat") if getattr(given, key)}
    with refusing(ValueError, TypeError, NotImplementedError):
        model = _without_weights(given.model, given.causal_lm)
        plans = [memory.plan(model, **options, mesh=mesh)]
        if changes:
            with training_internals.unallocated():
                memory.change(model, {key: each for key, each in changes.items() if key != "remat"}, given.remat)
            plans.append(memory.plan(model, **options, mesh=mesh))
    if given.json:
        show(json.dumps([each.data() for each in plans], indent=2))
    else:
        for each in plans:
            show(each.table(160), *each.lines())
    return 0


def _mesh(words: str | None) -> dict[str, int] | None:
    if words is None:
        return None
    pairs = [word.partition("=")[::2] for word in words.split(",")]
    if not all(name and size.isdigit() for name, size in pairs):
        raise Refused(f"Expected --mesh as names and sizes, such as batch=4,model=2. Received: {words!r}.")
    return {name: int(size) for name, size in pairs}


def _without_weights(path: str, causal_lm: bool) -> Any:
    """The model of a file or folder, with shapes and no values."""
    with training_internals.unallocated():
        if Path(path).is_dir():
            from keras_lora.cli.convert import loaded

            return loaded(path, causal_lm, load_weights=False)
        keras_file(Path(path))
        try:
            with zipfile.ZipFile(path) as archive:
                config = json.loads(archive.read("config.json"))
            config.pop("compile_config", None)
            return keras.saving.deserialize_keras_object(config)
        except Exception as error:  # a damaged or hostile file gives an error of any kind
            said = " ".join(str(error).split())
            raise Refused(f"Keras cannot build {path} ({type(error).__name__}: {said[:300]}).") from error
