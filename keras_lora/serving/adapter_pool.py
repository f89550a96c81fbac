"""Hundreds of registered adapter files, of which a fixed number is in the places of a model."""

from __future__ import annotations

import collections
import contextlib
import difflib
import itertools
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from keras_lora.adapters.per_example import INDEX
from keras_lora.files import huggingface, tensor_file
from keras_lora.serving.multi_adapter_model import MultiAdapterModel

#: How often a file is read that changes while it is read.
TRIES = 3


class Version(NamedTuple):
    """Which registration of a name, and which state of its file."""

    registration: int
    changed: int
    size: int
    inode: int


class ReadAdapter(NamedTuple):
    """An adapter that was read from its file and fits the model, but need not be in a place."""

    version: Version
    values: dict[str, Any]


class _Registered(NamedTuple):
    registration: int
    path: Path


class AdapterPool:
    """Serves any number of adapter files with the places of one model.

    A request names an adapter. If it has no place, its file is read and it takes one, and the adapter that was used least
    recently goes. Nothing is traced or compiled again. All methods can be called from several threads: files are read while
    the model runs, and an adapter is written into its place between two batches, so a batch never sees a part of one.

    A file that was changed is read again with the next request. A file that is missing, damaged or does not fit is an error
    of the requests that need it, and of nothing else.

    Args:
        model: A `keras_lora.MultiAdapterModel` without loaded adapters. From now on load adapters only through the pool.

    Raises:
        ValueError: The model has loaded adapters.

    Example:

    >>> import keras, keras_lora, numpy as np, os, tempfile
    >>> base = lambda: keras.Sequential([keras.Input((16,)), keras.layers.Dense(32), keras.layers.Dense(2)])
    >>> folder = tempfile.mkdtemp()
    >>> pool = keras_lora.AdapterPool(keras_lora.MultiAdapterModel(base(), capacity=2, rank=4))
    >>> for name in ("french", "german", "polish"):
    ...     path = os.path.join(folder, f"{name}.safetensors")
    ...     keras_lora.save_adapter(keras_lora.apply_lora(base(), rank=2), path)
    ...     pool.register(name, path)
    >>> pool.predict_on_batch(np.ones((3, 16)), ["french", None, "german"]).shape
    (3, 2)
    >>> pool.predict_on_batch(np.ones((1, 16)), ["polish"]).shape
    (1, 2)
    >>> pool.resident
    ['german', 'polish']

    Reference:
        [Sheng et al., 2023](https://arxiv.org/abs/2311.03285), for adapters that are brought in when a request needs them
    """

    def __init__(self, model: MultiAdapterModel):
        if not isinstance(model, MultiAdapterModel):
            raise ValueError(
                f"A pool serves a `keras_lora.MultiAdapterModel`. Received: {type(model).__name__}. Make one of it with "
                "`keras_lora.MultiAdapterModel(model, capacity=..., rank=...)`."
            )
        if model.names:
            raise ValueError(
                f"'{model.name}' has the adapters {sorted(model.names)}. Expected a model without any. `delete` them, and "
                "`register` their files instead."
            )
        self.model = model
        self._registered: dict[str, _Registered] = {}
        self._resident: collections.OrderedDict[str, Version] = collections.OrderedDict()  # used least recently first
        self._pinned: set[str] = set()
        self._registrations = itertools.count()
        self._table = threading.RLock()  # for the names, and never held while something is read, written or run
        self._running = threading.RLock()  # for the model and its weights; taken before `_table`

    @property
    def capacity(self) -> int:
        """How many adapters can be resident."""
        return self.model.capacity

    @property
    def registered(self) -> list[str]:
        """The names that requests can use."""
        with self._table:
            return list(self._registered)

    @property
    def resident(self) -> list[str]:
        """The names of the adapters in places, the one that was used least recently first."""
        with self._table:
            return list(self._resident)

    @property
    def pinned(self) -> list[str]:
        """The names of the adapters that keep their places."""
        with self._table:
            return sorted(self._pinned)

    # Files.

    def register(self, name: str, path: str | os.PathLike[str], *, pinned: bool = False) -> None:
        """Add an adapter file under a name, or give a name another file. It is read when a request needs it.

        A name that is pinned stays so.

        Args:
            name: The name that requests use.
            path: As for `keras_lora.MultiAdapterModel.load`. A file on the Hub is downloaded now.
            pinned: Whether to `pin` it.

        Raises:
            ValueError: The path is not that of an adapter file, or the file of a pinned adapter does not fit. Nothing is
                changed then.
            FileNotFoundError: There is no such file.
        """
        file = huggingface.adapter_file(path) if huggingface.is_address(path) else tensor_file.checked_path(path)
        new = _Registered(next(self._registrations), Path(file).absolute())
        _version_of(name, new)
        with self._table:
            before = self._registered.get(name)
            self._registered[name] = new
        if pinned:
            try:
                self.pin(name)
            except BaseException:
                with self._table:
                    if self._registered.get(name) is new and before is not None:
                        self._registered[name] = before
                    elif self._registered.get(name) is new:
                        self.remove(name)
                raise

    def remove(self, name: str) -> None:
        """Remove a name. Its place is free for another adapter; a batch that is running still ends with it.

        Raises:
            ValueError: There is no adapter of that name.
        """
        with self._table:
            self._found(name)
            del self._registered[name]
            self._pinned.discard(name)
            self._release(name)

    def pin(self, name: str) -> None:
        """Load an adapter now if it is not resident, and keep it in its place until `unpin` or `remove`.

        Raises:
            ValueError: There is no adapter of that name, its file does not fit, or all places are pinned.
            FileNotFoundError: Its file does not exist any more.
        """
        with self.placed([name]), self._table:
            self._found(name)
            self._pinned.add(name)

    def unpin(self, name: str) -> None:
        """Let an adapter go again when others need its place.

        Raises:
            ValueError: There is no adapter of that name.
        """
        with self._table:
            self._found(name)
            self._pinned.discard(name)

    # Requests.

    def predict_on_batch(self, inputs: Any, adapters: Sequence[str | None]) -> Any:
        """Call the model's `predict_on_batch`, with an adapter for each example.

        Args:
            inputs: A batch of the model's own inputs.
            adapters: A name for each example, `None` for the base. At most `capacity` different ones.

        Raises:
            ValueError: There is no adapter of a given name, a file does not fit, or there are too many different adapters.
            FileNotFoundError: A file does not exist any more.
        """
        with self.placed(adapters) as index:
            inputs = inputs if isinstance(inputs, dict) else {"inputs": inputs}
            return self.model.predict_on_batch({**inputs, INDEX: index})

    def generate(self, inputs: Any, adapters: Sequence[str | None], **kwargs: Any) -> Any:
        """Call `generate` of a KerasHub model, with an adapter for each prompt. See `keras_lora.MultiAdapterModel.generate`.

        Args:
            inputs: A batch of prompts, as for the model's `generate`.
            adapters, Raises: As for `predict_on_batch`.
            **kwargs: The other arguments of the model's `generate`.
        """
        with self.placed(adapters):
            return self.model.generate(inputs, adapters, **kwargs)

    @contextlib.contextmanager
    def placed(self, adapters: Sequence[str | None], read: Mapping[str, ReadAdapter] | None = None) -> Iterator[np.ndarray]:
        """Bring adapters into places, and keep everything else away from the model inside this context.

        Args:
            adapters: A name for each example, `None` for the base.
            read: Adapters that were `read` before.

        Yields:
            The input `"adapter_index"` of the model.
        """
        names = list(dict.fromkeys(name for name in adapters if name is not None))
        if read is None:
            self._need_places(names)
            read = {name: self.read(name) for name in names if not self.is_current(name)}
        with self._running:
            self._place(names, read)
            yield self.model.index_of(adapters)

    def is_current(self, name: str) -> bool:
        """Whether an adapter is resident, as its file is now."""
        with self._table:
            found, resident = self._found(name), self._resident.get(name)
        return resident == _version_of(name, found)

    def read(self, name: str) -> ReadAdapter:
        """Read and check the file of an adapter. This does not touch the model, so it may run at any time."""
        for _ in range(TRIES):
            with self._table:
                found = self._found(name)
            version = _version_of(name, found)
            values = self.model.read(found.path)
            if version == _version_of(name, found):
                return ReadAdapter(version, values)
        raise ValueError(
            f"{found.path}, the file of adapter '{name}', changed each of {TRIES} times while it was read. Replace adapter "
            "files in one step, as `keras_lora.save_adapter` does."
        )

    def fits(self, names: Iterable[str | None]) -> bool:
        """Whether adapters can be resident at the same time, beside those that are pinned."""
        with self._table:
            return len({name for name in names if name is not None} | self._pinned) <= self.capacity

    def _need_places(self, names: list[str]) -> None:
        if not self.fits(names):
            raise ValueError(
                f"A batch needs places for {len(names)} adapters, and '{self.model.name}' has {self.capacity}, of which "
                f"{len(self.pinned)} are pinned. Use fewer different adapters in a batch, `unpin` some, or build the model "
                "with a larger `capacity`."
            )

    def _place(self, names: list[str], read: Mapping[str, ReadAdapter]) -> None:
        """Bring adapters into places. Whatever can fail with a file comes before the first change."""
        self._need_places(names)
        wanted = {}
        for name in names:
            if not self.is_current(name):
                with self._table:
                    version = _version_of(name, self._found(name))
                wanted[name] = read[name] if name in read and read[name].version == version else self.read(name)
        for name, (version, values) in wanted.items():
            with self._table:
                self._found(name)
                place = self.model.names.get(name) or self._free_place(names)
                self._release(name)  # until it is written whole
            self.model.put(place, values)
            with self._table:
                if self._registered.get(name, _Registered(-1, Path())).registration == version.registration:
                    self.model.names = {**self.model.names, name: place}
                    self._resident[name] = version
        with self._table:
            for name in names:
                self._found(name)
                if name in self._resident:
                    self._resident.move_to_end(name)

    def _free_place(self, names: list[str]) -> int:
        """A place that nobody has, or that of the adapter that was used least recently."""
        free = set(range(1, self.capacity + 1)) - set(self.model.names.values())
        if free:
            return min(free)
        victim = next(name for name in self._resident if name not in names and name not in self._pinned)
        place = self.model.names[victim]
        self._release(victim)
        return place

    def _release(self, name: str) -> None:
        self._resident.pop(name, None)
        self.model.names = {each: place for each, place in self.model.names.items() if each != name}

    def _found(self, name: str) -> _Registered:
        if name not in self._registered:
            near = difflib.get_close_matches(str(name), self._registered, n=3)
            raise ValueError(
                f"The pool has no adapter {name!r}, or it was removed. Expected one of its {len(self._registered)} names"
                f"{f', such as {near}' if near else ''}. Call `register(name, path)` first."
            )
        return self._registered[name]


def _version_of(name: str, registered: _Registered) -> Version:
    try:
        found = registered.path.stat()
    except OSError as error:
        raise FileNotFoundError(
            f"The file of adapter '{name}', {registered.path}, cannot be found: {error.strerror}. Write it again, or "
            "`register` another."
        ) from error
    return Version(registered.registration, found.st_mtime_ns, found.st_size, found.st_ino)
