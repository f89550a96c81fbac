"""The command line, `keras-lora`. Each command is a file in this folder: `add` defines its arguments, `run` runs it."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from keras_lora import __version__
from keras_lora.cli import compress, convert, diff, inspect_file, merge
from keras_lora.cli.common import Refused, one_line

COMMANDS = (inspect_file, merge, compress, convert, diff)

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


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    whole = _Parser(
        prog="keras-lora",
        description="Inspect, merge, compress, convert and compare adapters of Keras models.",
        epilog=_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whole.add_argument("--version", action="version", version=f"keras_lora {__version__}")
    commands = whole.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(commands)
    return whole


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: The arguments after `keras-lora`; by default those of this process.

    Returns:
        The exit code.
    """
    given = parser().parse_args(arguments)
    try:
        found: int = given.run(given)
        return found
    except Refused as error:
        print(f"keras-lora {given.command}: {one_line(str(error))}", file=sys.stderr)
        return 2
    except Exception:  # Python would exit with 1, which `diff` uses for "differ"
        traceback.print_exc()
        return 3
