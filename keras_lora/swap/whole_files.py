"""Write a file next to its place and rename it: whatever interrupts a save, the old file or the new one is whole."""

from __future__ import annotations

import contextlib
import glob
import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

#: In the name of a temporary file, so that what a killed process left behind is recognised.
UNFINISHED = ".unfinished"
#: After so many seconds a temporary file belongs to no running save.
_LEFT_OVER = 3600
#: The endings of one file with a whole model or its weights, the longest first: Keras checks the ending.
_ENDINGS = (".weights.h5", ".keras", ".h5")


@contextlib.contextmanager
def replacing(path: Path, ending: str = "") -> Iterator[Path]:
    """Give a temporary path to write to, and rename that file to `path` when it is complete."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}{UNFINISHED}{ending}")
    try:
        yield aside
        with aside.open("rb+") as file:
            os.fsync(file.fileno())  # or a power cut after the renaming could leave an empty file
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def take_left_over(path: Path, ending: str = "") -> None:
    """Remove what a killed save to `path` left behind. No file of a model or an adapter has such a name."""
    for each in path.parent.glob(f".{glob.escape(path.name)}.*{UNFINISHED}{ending}"):
        with contextlib.suppress(OSError):
            if each.stat().st_mtime < time.time() - _LEFT_OVER:  # a newer one may belong to a running save
                each.unlink()


def save(write: Callable[..., None], filepath: Any, overwrite: bool = True, *args: Any, **kwargs: Any) -> None:
    """Call `write`, the `save` or `save_weights` of a Keras model, so that it replaces a local file only when complete."""
    path = (
        Path(os.path.realpath(filepath)) if isinstance(filepath, (str, os.PathLike)) and "://" not in str(filepath) else None
    )
    ending = next((each for each in _ENDINGS if str(filepath).endswith(each)), None)
    new_or_file = path is not None and (path.is_file() if path.exists() else True)
    asked = path is not None and path.exists() and not overwrite  # Keras asks before it overwrites
    if path is None or ending is None or not new_or_file or asked or not os.access(path.parent, os.W_OK):
        write(filepath, overwrite, *args, **kwargs)
        return
    take_left_over(path, ending)
    with replacing(path, ending) as aside:
        write(str(aside), True, *args, **kwargs)
