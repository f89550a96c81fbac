"""Download files from and upload them to repositories on the Hugging Face Hub.

An address is `hf://owner/name`. Add `@revision` for a revision other than the newest, and `/folder/file` for one file of
several. Downloaded files are in the cache of `huggingface_hub`, and are read from there if the Hub cannot be reached.
`huggingface_hub` is imported only in this module, and only when it is needed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from keras_lora import reports

#: The file if the address has no file name.
FILE = "adapter.safetensors"
CARD = "README.md"

_REPOSITORY = r"(?a:[A-Za-z0-9_][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95})"
_REVISION = r"(?a:refs/pr/\d+|refs/convert/[\w.-]+|[\w.+-]+)"
_ADDRESS = re.compile(rf"hf://(?P<repository>{_REPOSITORY})(?:@(?P<revision>{_REVISION}))?(?P<inside>(?:/[\w.+=-]+)*)")
#: What the Hub refuses, or takes for something other than a model repository.
_REFUSED = re.compile(r"hf://(api|buckets|datasets|kernels|models|spaces)/|\.\.|/\.(/|$)|[.-](/|@|$)|\.git(/|@|$)")


@dataclass(frozen=True)
class Address:
    """A place on the Hub.

    Attributes:
        repository: `"owner/name"`.
        revision: A branch, a tag or a commit; `None` is the newest commit of the main branch.
        inside: The path of a file or folder in the repository, `""` if none was named.
    """

    repository: str
    revision: str | None = None
    inside: str = ""

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return "/".join(["hf:/", self.repository + revision, *([self.inside] if self.inside else [])])


def is_address(path: Any) -> bool:
    """Whether `path` is meant for the Hub, even if it is malformed."""
    return isinstance(path, (str, os.PathLike)) and str(path).startswith("hf:/")


def parsed(address: str | os.PathLike[str]) -> Address:
    """Split an address into its parts.

    Raises:
        ValueError: It is not a valid address.

    Example:

    >>> from keras_lora.files import huggingface
    >>> huggingface.parsed("hf://owner/name@v1/french/adapter.safetensors")
    Address(repository='owner/name', revision='v1', inside='french/adapter.safetensors')
    """
    text = str(address)
    found = _ADDRESS.fullmatch(text)
    if found is None or _REFUSED.search(text) or "--" in found["repository"]:
        slash = " `pathlib` removes one of the two slashes: pass a string." if re.match("hf:/[^/]", text) else ""
        raise ValueError(
            "The address of a model repository on the Hugging Face Hub is 'hf://owner/name', then '@revision' if it is not "
            f"the newest, then '/folder/file', of letters, digits and '_.-'. Received: {text!r}.{slash}"
        )
    return Address(found["repository"], found["revision"], found["inside"].removeprefix("/"))


# From the Hub.


def adapter_file(address: str | os.PathLike[str]) -> Path:
    """Download the adapter file of an address, and return its path on disk.

    Raises:
        ValueError: The address is malformed, or names something other than a `.safetensors` file.
        ImportError: `huggingface_hub` is not installed.
        FileNotFoundError: The Hub has no such repository, revision or file.
        PermissionError: The Hub asks for a token, or for one with more rights.
        ConnectionError: The Hub cannot be reached, and the file is not in the cache.
    """
    place = parsed(address)
    file = _adapter_in(place)
    with _asking(place, "loaded") as hub:
        return Path(hub.hf_hub_download(place.repository, file, revision=place.revision, tqdm_class=_bar()))


def local_folder(address: str | os.PathLike[str], files: Sequence[str]) -> Path:
    """Download files of a repository, or of a folder in it, and return the folder on disk.

    Args:
        address: The repository or the folder.
        files: Their names in that folder, or patterns such as `"*.json"`. Files that the Hub does not have are skipped.

    Raises:
        FileNotFoundError: The Hub has none of these files, or no such repository or revision.
        ValueError, ImportError, PermissionError, ConnectionError: As for `adapter_file`.
    """
    place = parsed(address)
    patterns = [f"{place.inside}/{each}".removeprefix("/") for each in files]
    with _asking(place, "loaded") as hub:
        whole = hub.snapshot_download(place.repository, revision=place.revision, allow_patterns=patterns, tqdm_class=_bar())
    folder = Path(whole, place.inside)
    if not any(any(folder.glob(each)) for each in files):
        raise FileNotFoundError(
            f"{place} was not loaded: it has none of the files {', '.join(files)}. Check the name of the repository, and of "
            "the folder in it."
        )
    return folder


# To the Hub.


@contextlib.contextmanager
def uploading(address: str | os.PathLike[str], base: str) -> Iterator[Path]:
    """Context manager that gives a path for an adapter file, and uploads the file written there.

    Args:
        address: The repository, or the file in it.
        base: The name of the base, for the model card.

    Raises:
        ValueError, ImportError, FileNotFoundError, PermissionError, ConnectionError: As for `upload_folder_to`.
    """
    place = parsed(address)
    file = _adapter_in(place)
    _library()  # before anything is written
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, file)
        path.parent.mkdir(parents=True, exist_ok=True)
        yield path
        Path(folder, CARD).write_text(model_card(place, f"the Keras model `{base}`"), encoding="utf-8")
        _upload(place, Path(folder), "")


def upload_folder_to(address: str | os.PathLike[str], folder: str | os.PathLike[str]) -> None:
    """Upload the content of a folder to a repository, or to a folder in it, as one commit.

    The repository is created if it does not exist, public unless the account settings say otherwise. Files with the same
    names are replaced, except a model card `README.md`, which people edit: it is uploaded only if there is none yet.

    Args:
        address: The repository, or the folder in it. A revision must be an existing branch.
        folder: A folder on disk.

    Raises:
        ValueError: The address is malformed.
        ImportError: `huggingface_hub` is not installed.
        FileNotFoundError: There is no such branch, or no such folder.
        PermissionError: The Hub asks for a token, or for one with write access.
        ConnectionError: The Hub cannot be reached.
    """
    place = parsed(address)
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{place} was not saved: there is no folder {folder} to upload.")
    _upload(place, Path(folder), place.inside)


def model_card(address: str | Address, base: str, library: str = "keras_lora", base_model: str | None = None) -> str:
    """A short model card.

    Args:
        address: The repository of the card.
        base: What the adapter changes, in words.
        library: The library that reads it, for example `"peft"`.
        base_model: The name of the base on the Hub, if known.

    Example:

    >>> from keras_lora.files import huggingface
    >>> print(huggingface.model_card("hf://owner/french", "the Keras model `net`", base_model="owner/net"))
    ---
    library_name: keras_lora
    base_model: "owner/net"
    tags:
    - keras
    - lora
    ---
    <BLANKLINE>
    # french
    <BLANKLINE>
    An adapter for the Keras model `net`, saved by keras_lora.
    <BLANKLINE>
    ```python
    from keras_lora import load_adapter
    <BLANKLINE>
    model = ...  # the base it was trained on
    load_adapter(model, "hf://owner/french")
    ```
    <BLANKLINE>
    """
    place = parsed(str(address))
    known = [] if base_model is None else [f"base_model: {json.dumps(base_model)}"]  # also valid as a quoted YAML string
    module, load = ("keras_lora.interop", "from_peft") if library == "peft" else ("keras_lora", "load_adapter")
    lines = ["---", f"library_name: {library}", *known, "tags:", "- keras", "- lora", "---", ""]
    lines += [f"# {place.repository.partition('/')[2]}", "", f"An adapter for {base}, saved by keras_lora.", ""]
    lines += ["```python", f"from {module} import {load}", "", "model = ...  # the base it was trained on"]
    return "\n".join([*lines, f'{load}(model, "{place}")', "```", ""])


def _upload(place: Address, folder: Path, inside: str) -> None:
    with _asking(place, "saved") as hub:
        hub.create_repo(place.repository, exist_ok=True)
        card = f"{inside}/{CARD}".removeprefix("/")
        has_card = hub.file_exists(place.repository, card, revision=place.revision)
        hub.upload_folder(
            repo_id=place.repository,
            folder_path=folder,
            path_in_repo=inside,
            revision=place.revision,
            ignore_patterns=[CARD] if has_card else [],
            commit_message="Upload with keras_lora",
        )


def _adapter_in(place: Address) -> str:
    file = place.inside or FILE
    if not file.endswith(".safetensors"):
        raise ValueError(
            f"An adapter on the Hugging Face Hub is a file that ends in '.safetensors'. Received: '{place}'. Without a file "
            f"behind the repository it is '{FILE}'; another one is named, as in 'hf://{place.repository}/{file}/{FILE}'."
        )
    return file


# Requests.


def _library() -> ModuleType:
    try:
        import huggingface_hub
        import huggingface_hub.constants  # its submodules must be imported explicitly
        import huggingface_hub.errors
    except ImportError as error:
        raise ImportError(
            "An address 'hf://...' needs the package huggingface_hub, which cannot be imported. Install it: "
            "`pip install keras_lora[huggingface]`."
        ) from error
    return huggingface_hub


def _bar() -> type:
    """The progress bars of `huggingface_hub`, for downloads that take long, unless progress is switched off."""
    plain: Any = _library().utils.tqdm

    class Bar(plain):
        def __init__(self, *args: Any, **kwargs: Any):
            self.began = time.monotonic()
            hidden = {"disable": True} if reports.is_silent() else {}
            super().__init__(*args, **{**kwargs, **hidden, "delay": reports.LONG})

        def display(self, *args: Any, **kwargs: Any) -> Any:
            if time.monotonic() - self.began >= reports.LONG:  # `huggingface_hub` asks for it sooner
                return super().display(*args, **kwargs)
            return None

    return Bar


@contextlib.contextmanager
def _asking(place: Address, done: str) -> Iterator[Any]:
    """The Hub. If it refuses, one error reports that `place` was not `done`, why, and what to do."""
    library = _library()
    errors = library.errors
    of_the_client = [each for each in errors.HfHubHTTPError.__mro__ if each.__name__ == "HTTPError"]  # httpx or requests
    try:
        yield library.HfApi(library_name="keras_lora")
    except (OSError, errors.EntryNotFoundError, *of_the_client) as error:
        if getattr(error, "errno", None) is not None:  # a disk error, already clear
            raise
        kind, why = _explained(error, place, library)
        raise kind(f"{place} was not {done}: {why}") from error


def _explained(error: Exception, place: Address, library: ModuleType) -> tuple[type[OSError], str]:
    """The kind of error to raise, and its message."""
    errors, repository = library.errors, place.repository
    not_cached = isinstance(error, errors.LocalEntryNotFoundError)
    answered = error.__cause__ if not_cached else error  # set if the cache was tried because the Hub refused
    status = getattr(getattr(answered, "response", None), "status_code", None)
    token = "the token was refused" if library.get_token() else "no token was given"
    login = "log in with `hf auth login`, or set HF_TOKEN to a token that may do this"
    if isinstance(error, errors.GatedRepoError):
        page = f"{library.constants.ENDPOINT}/{repository}"
        return PermissionError, f"access to {repository} is granted by its owner. Ask for it on {page}, then {login}."
    if isinstance(error, errors.RepositoryNotFoundError):
        return FileNotFoundError, (
            f"the Hugging Face Hub has no repository {repository}, or it is private and {token}. Check the name; for a "
            f"private one, {login}."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return FileNotFoundError, f"{repository} has no revision {place.revision or 'main'}. Check what is behind the '@'."
    if isinstance(error, errors.EntryNotFoundError) and not not_cached:
        file = place.inside or FILE
        return (
            FileNotFoundError,
            f"{repository} has no file {file}. Name one that it has: hf://{repository}/file.safetensors.",
        )
    if status in (401, 403) or isinstance(error, errors.LocalTokenNotFoundError):
        return PermissionError, f"the Hugging Face Hub refuses it: {token}. Check the name, then {login}."
    cached = "it is not in the cache, and " if not_cached else ""
    if library.constants.HF_HUB_OFFLINE:
        return (
            ConnectionError,
            f"{cached}HF_HUB_OFFLINE is set, so the Hugging Face Hub was not asked. Unset it, or load the file once before.",
        )
    reason = f"status {status}" if status else f"{type(answered or error).__name__}: {str(answered or error)[:300]}"
    return ConnectionError, f"{cached}the Hugging Face Hub cannot be reached ({reason}). Check the network, and try again."
