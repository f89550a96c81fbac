"""A queue: requests from many threads, gathered into batches that one thread runs."""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from keras_lora import checks
from keras_lora.serving import batches
from keras_lora.serving.adapter_pool import AdapterPool, ReadAdapter

#: How many files are read at the same time.
READERS = 2


@dataclass(eq=False)
class _Request:
    """One example, the adapter it names, and the future that its caller has."""

    example: Any
    adapter: str | None
    future: Future[Any] = field(default_factory=Future)
    read: ReadAdapter | None = None
    arrived: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.signature = batches.signature(self.example)


class AdapterServer:
    """Answers requests from many threads with one model: a request is one example and the name of its adapter.

    One thread runs the model. While it runs, requests gather, and the next batch takes them, whatever their adapters are.
    Files of adapters that are not resident are read by other threads meanwhile. Batches are padded to a few sizes, so that
    nothing is traced again.

    An error belongs to the request that caused it: if a batch fails, its requests run again one by one.

    Use it as a context manager. At the end it answers the requests that wait, or, after an error inside the context, fails
    them.

    Args:
        pool: The `keras_lora.AdapterPool` with the adapters. You may register, remove and pin adapters while it serves.
        run: What answers a batch, called with the batch of inputs and a name (or `None`) for each example. By default
            `pool.predict_on_batch`. For text, `functools.partial(pool.generate, max_length=64)`.
        batch_sizes: The sizes of batches. A batch has the smallest of them that fits; the largest is the most that is
            taken at once.
        max_wait: For how many seconds the first request of a batch waits for others. Without it, a batch still takes what
            came while the model ran.
        max_waiting: How many requests may wait. More are refused.

    Raises:
        ValueError: An argument is not valid.

    Example:

    >>> import concurrent.futures, keras, keras_lora, numpy as np, os, tempfile
    >>> base = lambda: keras.Sequential([keras.Input((16,)), keras.layers.Dense(32), keras.layers.Dense(2)])
    >>> path = os.path.join(tempfile.mkdtemp(), "french.safetensors")
    >>> keras_lora.save_adapter(keras_lora.apply_lora(base(), rank=2), path)
    >>> pool = keras_lora.AdapterPool(keras_lora.MultiAdapterModel(base(), capacity=4, rank=4))
    >>> pool.register("french", path)
    >>> with keras_lora.AdapterServer(pool, batch_sizes=(1, 8)) as server:
    ...     server.warm_up(np.ones(16, "float32"))
    ...     with concurrent.futures.ThreadPoolExecutor(8) as clients:
    ...         ask = lambda name: server.predict(np.ones(16, "float32"), name)
    ...         answers = list(clients.map(ask, ["french", None] * 10))
    >>> len(answers)
    20
    >>> answers[0].shape
    (2,)
    """

    def __init__(
        self,
        pool: AdapterPool,
        *,
        run: Callable[[Any, Sequence[str | None]], Any] | None = None,
        batch_sizes: Sequence[int] = (1, 2, 4, 8, 16, 32),
        max_wait: float = 0.002,
        max_waiting: int = 1000,
    ):
        if not isinstance(pool, AdapterPool):
            raise ValueError(f"A server needs a `keras_lora.AdapterPool`. Received: {type(pool).__name__}.")
        sizes = [checks.positive_integer("batch_sizes", size) for size in batch_sizes]
        if not sizes:
            raise ValueError("`batch_sizes` must have at least one size. Received: none.")
        if not (checks.is_number(max_wait) and max_wait >= 0):
            raise ValueError(f"`max_wait` must be a number of seconds, at least 0. Received: {max_wait!r}.")
        self.pool = pool
        self._answer = run or pool.predict_on_batch
        self._sizes = sorted(set(sizes))
        self._max_wait = float(max_wait)
        self._max_waiting = checks.positive_integer("max_waiting", max_waiting)
        self._ready: collections.deque[_Request] = collections.deque()
        self._reading: dict[str, list[_Request]] = {}
        self._closed: str | None = None
        self._changed = threading.Condition()
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="adapter-reader")
        self._thread = threading.Thread(target=self._work, name="adapter-server", daemon=True)
        self._thread.start()

    # For callers.

    def predict(self, inputs: Any, adapter: str | None = None, *, timeout: float | None = None) -> Any:
        """Answer one request, and wait for it.

        Args:
            inputs: The model's inputs for one example, without the batch axis: an array, or a dict of arrays.
            adapter: The name of an adapter, `None` for the base.
            timeout: How many seconds to wait; without it, as long as it takes.

        Returns:
            The model's output for the example, without the batch axis.

        Raises:
            ValueError: There is no such adapter, its file does not fit, or the model does not take the inputs.
            FileNotFoundError: The file of the adapter does not exist any more.
            TimeoutError: There is no answer yet.
            RuntimeError: The server is closed, or too many requests wait.
        """
        future = self.submit(inputs, adapter)
        try:
            return future.result(timeout)
        finally:
            future.cancel()  # nobody waits for it any more

    def submit(self, inputs: Any, adapter: str | None = None) -> Future[Any]:
        """Add a request and return a `concurrent.futures.Future` of its answer. Arguments and errors as for `predict`."""
        request = _Request(batches.as_example(inputs), adapter)
        self._admit(request, new=True)
        return request.future

    @property
    def waiting(self) -> int:
        """How many requests wait for a batch or for the file of their adapter."""
        with self._changed:
            return len(self._ready) + sum(map(len, self._reading.values()))

    def warm_up(self, inputs: Any) -> None:
        """Run every batch size with the base, so that no request waits for a compilation.

        Args:
            inputs: One example, as for `predict`.
        """
        example = batches.as_example(inputs)
        for size in self._sizes:
            with self.pool.placed([]):
                self._answer(batches.stacked([example], size), [None] * size)

    def close(self, *, drain: bool = True) -> None:
        """Take no more requests, and end the threads.

        Args:
            drain: Whether to answer the requests that wait. Otherwise they get a `RuntimeError`.
        """
        with self._changed:
            self._closed = (self._closed or "drained") if drain else "closed"
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self._readers.shutdown()

    def __enter__(self) -> AdapterServer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self.close(drain=kind is None)

    # From a request to the queue.

    def _admit(self, request: _Request, new: bool = False) -> None:
        """Put a request into the queue; before that, have the file of its adapter read if it is not resident."""
        name = request.adapter
        resident = name is None or self.pool.is_current(name)
        with self._changed:
            if new:
                self._refuse()
            if name is None or resident:
                self._ready.append(request)
                self._changed.notify_all()
            elif name in self._reading:
                self._reading[name].append(request)
            else:
                self._reading[name] = [request]
                self._readers.submit(self._read, name)

    def _refuse(self) -> None:
        """Raise an error if no new request may wait."""
        if self._closed is not None:
            raise RuntimeError("This server is closed, so it answers no requests. Make a new `keras_lora.AdapterServer`.")
        if (waiting := self.waiting) >= self._max_waiting:
            raise RuntimeError(
                f"{waiting} requests wait, and this server lets no more wait. Try again later, allow larger batches with "
                "`batch_sizes`, or raise `max_waiting`."
            )

    def _read(self, name: str) -> None:
        found: ReadAdapter | Exception
        try:
            found = self.pool.read(name)
        except Exception as error:
            found = error
        with self._changed:
            requests = self._reading.pop(name)
            if not isinstance(found, Exception):
                for request in requests:
                    request.read = found
                self._ready.extend(requests)
            self._changed.notify_all()
        if isinstance(found, Exception):
            for request in requests:
                _fail(request, found)

    # The thread that runs the model.

    def _work(self) -> None:
        try:
            while batch := self._next_batch():
                self._serve(batch)
        finally:
            with self._changed:
                self._closed = "closed"
                left = [*self._ready, *(request for requests in self._reading.values() for request in requests)]
                self._ready.clear()
                for requests in self._reading.values():
                    requests.clear()
            for request in left:
                _fail(request, RuntimeError("This server was closed before it answered the request."))

    def _next_batch(self) -> list[_Request]:
        """Wait for requests and take those of the next batch; none at the end."""
        with self._changed:
            while not self._ready:
                if self._closed == "closed" or (self._closed and not self._reading):
                    return []
                self._changed.wait()
            first = self._ready[0]
            while self._closed is None and self._matching(first) < self._sizes[-1]:
                left = first.arrived + self._max_wait - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    break
            return [] if self._closed == "closed" else self._take()

    def _matching(self, first: _Request) -> int:
        return sum(request.signature == first.signature for request in self._ready)

    def _take(self) -> list[_Request]:
        """The first request and those that can share its batch, in order: same shapes, and places for all adapters."""
        batch: list[_Request] = []
        rest: collections.deque[_Request] = collections.deque()
        names: set[str | None] = set()
        for request in self._ready:
            same = not batch or request.signature == batch[0].signature
            if len(batch) < self._sizes[-1] and same and (not batch or self.pool.fits(names | {request.adapter})):
                batch.append(request)
                names.add(request.adapter)
            else:
                rest.append(request)
        self._ready = rest
        return batch

    def _serve(self, batch: list[_Request]) -> None:
        chosen = []
        for request in batch:
            if request.future.running() or request.future.set_running_or_notify_cancel():
                try:
                    if request.adapter is None or request.read or self.pool.is_current(request.adapter):
                        chosen.append(request)
                    else:  # its place was taken while it waited
                        self._admit(request)
                except Exception as error:
                    _fail(request, error)
        if not chosen:
            return
        size = next(size for size in self._sizes if size >= len(chosen))
        names: list[str | None] = [request.adapter for request in chosen] + [None] * (size - len(chosen))
        read = {request.adapter: request.read for request in chosen if request.adapter and request.read}
        try:
            with self.pool.placed(names, read):
                outputs = self._answer(batches.stacked([request.example for request in chosen], size), names)
            answers = [batches.row(outputs, number) for number in range(len(chosen))]
        except Exception as error:
            if len(chosen) == 1:
                _fail(chosen[0], error)
            else:
                for request in chosen:
                    self._serve([request])
            return
        for request, answer in zip(chosen, answers, strict=True):
            request.future.set_result(answer)


def _fail(request: _Request, error: Exception) -> None:
    if request.future.running() or request.future.set_running_or_notify_cancel():
        request.future.set_exception(error)
