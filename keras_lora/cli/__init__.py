"""The command line, `keras-lora`. Each command is a file in this folder: `add` defines its arguments, `run` runs it.

`merge`, `convert` and `plan` need Keras, which takes seconds to import. They are imported when they are asked for, and
everything else here runs without Keras.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

import keras_lora
from keras_lora.cli import compress, diff, inspect_file
from keras_lora.cli.common import Refused, one_line

#: The commands in the order of the help: a module, or the line of help of one that needs Keras.
COMMANDS: dict[str, ModuleType | str] = {
    "inspect": inspect_file,
    "merge": "merge an adapter into its base model",
    "compress": compress,
    "convert": "convert an adapter file to a PEFT folder, or back",
    "diff": diff,
    "plan": "plan the memory of a training step, before there are weights",
}

_CODES = """\
exit codes:
  0  done; for `diff`: the files have the same contents
  1  for `diff`: the files differ
  2  bad arguments or files; one line on stderr tells you what to do, and nothing was written
  3  an unexpected error in keras_lora, with its traceback"""


class _Parser(argparse.ArgumentParser):
    """Reports a wrong argument in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {one_line(message)}. See `{self.prog} --help`.\n")


def parser(asked: str | None = None) -> argparse.ArgumentParser:
    """The parser of all commands. A command that needs Keras has its arguments only if it is `asked` for."""
    whole = _Parser(
        prog="keras-lora",
        description="Inspect, merge, compress, convert and compare adapters of Keras models, and plan their memory.",
        epilog=_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whole.add_argument("--version", action="version", version=f"keras_lora {keras_lora.__version__}")
    commands = whole.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        if not isinstance(command, str):
            command.add(commands)
        elif name == asked:
            _with_keras(name).add(commands)
        else:
            commands.add_parser(name, help=command)
    return whole


def _with_keras(name: str) -> ModuleType:
    """The module of a command that needs Keras."""
    try:
        if sys.modules.pop("keras_lora_command", None):  # which left out most of the package
            importlib.reload(keras_lora)
        return importlib.import_module(f"keras_lora.cli.{name}")
    except ModuleNotFoundError as error:
        backend = os.environ.get("KERAS_BACKEND", "not set, which means TensorFlow unless ~/.keras/keras.json names another")
        raise Refused(
            f"A package cannot be imported: {error}. Keras needs the package of its backend, and KERAS_BACKEND to name it: "
            f"tensorflow, jax or torch. Received: KERAS_BACKEND is {backend}. Example: KERAS_BACKEND=jax keras-lora {name}."
        ) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: The arguments after `keras-lora`; by default those of this process.

    Returns:
        The exit code.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    asked = words[0] if words else ""
    try:
        given = parser(asked).parse_args(words)
        found: int = given.run(given)
        return found
    except Refused as error:
        print(f"keras-lora {asked}: {one_line(str(error))}", file=sys.stderr)
        return 2
    except Exception:  # Python would exit with 1, which `diff` uses for "differ"
        traceback.print_exc()
        return 3
