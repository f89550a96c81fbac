"""`keras-lora convert`: from an adapter file to a PEFT folder, and from a PEFT folder to an adapter file."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

from keras_lora import reports
from keras_lora.cli.common import Refused, new_file, new_folder, read_adapter, refusing, show
from keras_lora.cli.merge import load_base, plain_base
from keras_lora.files.saving import load_adapter, save_adapter
from keras_lora.interop import from_peft, peft_folder, to_peft

#: How addresses begin in the adapter file of a KerasHub task. Those of a backbone do not.
_OF_A_TASK = "_backbone/"


def add(commands: Any) -> None:
    """Define the arguments of `convert`."""
    command = commands.add_parser(
        "convert",
        help="convert an adapter file to a PEFT folder, or back",
        description="Load BASE and the adapter, and write the adapter in the other format. The layers of a KerasHub model "
        "are found by the names that KerasHub's converters have for them. Your own classes must be importable: add their "
        "folder to PYTHONPATH.",
        epilog="example: keras-lora convert --to peft french.safetensors french --base net.keras",
    )
    command.add_argument("adapter", metavar="ADAPTER", help="an adapter file, .safetensors; with --to keras a PEFT folder")
    command.add_argument(
        "out",
        metavar="OUT",
        help="the folder to write, completely or not at all; with --to keras the .safetensors file",
    )
    command.add_argument("--to", choices=("peft", "keras"), required=True, help="the format of OUT")
    command.add_argument(
        "--base",
        metavar="BASE",
        required=True,
        help="the plain base: a .keras file, or a folder with a KerasHub preset or a Hugging Face checkpoint",
    )
    command.add_argument(
        "--causal-lm",
        action="store_true",
        help="load a folder as a CausalLM instead of a backbone; with --to peft, automatic if the adapter is of a CausalLM",
    )
    command.add_argument(
        "--prefix", metavar="P", help="--to peft: a prefix for the names of KerasHub's converter, for example 'bert.'"
    )
    command.add_argument(
        "--base-model", metavar="NAME", help="--to peft: the base for PEFT to load, for example 'meta-llama/Llama-3.2-1B'"
    )
    command.add_argument(
        "--bake-scaling", action="store_true", help="--to peft: write a form that vLLM, llama.cpp and Ollama read correctly"
    )
    command.add_argument("--force", action="store_true", help="replace OUT if it exists; in a folder, only the adapter")
    command.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Convert an adapter."""
    return _to_peft(given) if given.to == "peft" else _to_keras(given)


def _to_peft(given: argparse.Namespace) -> int:
    out = new_folder(given.out, given.force)
    state = read_adapter(given.adapter)  # before the base, which may take long
    _keras_hub()
    with reports.progress(3, after=0) as step:
        step("loading the base")
        model = loaded(given.base, given.causal_lm or any(address.startswith(_OF_A_TASK) for address in state.adapters))
        step("loading the adapter")
        with refusing(ValueError, OSError):
            load_adapter(model, given.adapter)
        step("writing")
        options = {"base_model": given.base_model, "bake_scaling": given.bake_scaling}
        with refusing(ValueError), refusing(OSError, before=f"{out} cannot be written: "):
            to_peft(model, out, prefix=given.prefix or "", **options)
    kernels = f"{len(state.adapters)} changed kernels"
    show(f"{out}: a PEFT adapter, {kernels}, {(out / peft_folder.TENSORS).stat().st_size:,} bytes")
    return 0


def _to_keras(given: argparse.Namespace) -> int:
    unfit = {"--prefix": given.prefix, "--base-model": given.base_model, "--bake-scaling": given.bake_scaling}
    if names := [name for name, said in unfit.items() if said]:
        raise Refused(
            f"Expected {' and '.join(names)} only with --to peft, because --to keras does not use it. Leave it out."
        )
    out = new_file(given.out, ".safetensors", given.force)
    _keras_hub()
    if not Path(given.adapter).is_dir():
        raise Refused(
            f"There is no folder {given.adapter}. Expected one that PEFT's `save_pretrained` wrote. Check the path."
        )
    with refusing(ValueError, OSError):
        peft_folder.read(Path(given.adapter))  # before the base, which may take long
    with reports.progress(3, after=0) as step:
        step("loading the base")
        model = loaded(given.base, given.causal_lm)
        step("loading the adapter")
        with refusing(ValueError, OSError):
            from_peft(model, given.adapter)
        step("writing")
        with refusing(OSError, before=f"{out} cannot be written: "):
            save_adapter(model, out)
    written = read_adapter(given.out)
    show(f"{out}: an adapter file, {len(written.adapters)} changed kernels, {out.stat().st_size:,} bytes")
    return 0


def _keras_hub() -> ModuleType:
    try:
        return importlib.import_module("keras_hub")
    except ImportError as error:
        raise Refused(f"PEFT adapters need KerasHub ({error}). Install it: `pip install keras_lora[hub]`.") from error


def loaded(base: str, causal_lm: bool, **options: Any) -> Any:
    """The plain model in a `.keras` file or a folder; `options` are for KerasHub."""
    if not Path(base).is_dir():
        return load_base(plain_base(base))
    task = _keras_hub().models.CausalLM if causal_lm else _keras_hub().models.Backbone
    without = {"preprocessor": None} if causal_lm else {}  # the folder may lack a tokenizer
    try:
        return task.from_preset(str(Path(base).resolve()), **without, **options)
    except (ValueError, TypeError, KeyError, OSError, ImportError) as error:
        said = " ".join(str(error).split())
        raise Refused(
            f"KerasHub cannot load {base} as a {task.__name__} ({type(error).__name__}: {said[:300]}"
            f"{'...' * (len(said) > 300)}). Expected the folder of a KerasHub preset, or of a Hugging Face checkpoint of a "
            "family that KerasHub converts. For another model, save a .keras file."
        ) from error
