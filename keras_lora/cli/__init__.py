"""The command line, `keras-lora`. A command is a file beside this one: `add` says its arguments, `run` does it."""

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
  0  done; `diff`: the files hold the same
  1  `diff`: the files differ
  2  bad arguments or files; one line on stderr says what to do, and nothing was written
  3  an error in keras_lora itself, with its traceback"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {one_line(message)}. See `{self.prog} --help`.\n")


def parser() -> argparse.ArgumentParser:
    """What the command line takes."""
    whole = _Parser(
        prog="keras-lora",
        description="Look at, merge, compress, convert and compare adapters of Keras models.",
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
        arguments: What stands behind `keras-lora`; by default what this process was started with.

    Returns:
        The exit code.
    """
    given = parser().parse_args(arguments)
    try:
        return given.run(given)
    except Refused as error:
        print(f"keras-lora {given.command}: {one_line(str(error))}", file=sys.stderr)
        return 2
    except Exception:  # not Python's own exit code, which `diff` has another meaning for
        traceback.print_exc()
        return 3
