"""A pool of adapter files and a queue of requests: each answer is that of its adapter alone, whatever else happens."""

import concurrent.futures
import functools
import os
import threading

import keras
import numpy as np
import pytest
from helpers import difference
from keras import layers
from test_serving import Counter, language_model, move

import keras_lora
from keras_lora.files.adapter_state import AdapterState
from keras_lora.serving import adapter_pool, batches

TORCH = keras.backend.backend() == "torch"


def base(counter=None):
    keras.utils.set_random_seed(7)
    steps = [keras.Input((6,)), layers.Dense(5, activation="relu", name="up"), layers.Dense(3, name="down")]
    return keras.Sequential(steps if counter is None else [*steps, counter])


class Files:
    """Adapter files of `base()`, and what each answers, computed in NumPy."""

    def __init__(self, folder, count, rank=2):
        self.folder = folder
        model = base()
        self.kernels = [np.asarray(keras.ops.convert_to_numpy(layer.kernel)) for layer in model.layers]
        self.state = AdapterState.of(keras_lora.apply_lora(model, rank=rank, alpha=rank, head=None))
        self.changes = {None: [0, 0]}
        for number in range(count):
            self.write(f"{number}", number)

    def path(self, name):
        return self.folder / f"{name}.safetensors"

    def write(self, name, seed):
        rng, changes = np.random.default_rng(seed), []
        for entry in self.state.adapters.values():
            entry.tensors = {key: rng.normal(size=each.shape).astype("float32") for key, each in entry.tensors.items()}
            changes.append(entry.tensors["lora_a"] @ entry.tensors["lora_b"])
        self.state.write(self.path(name))
        self.changes[name] = changes

    def answer(self, x, name):
        (up, down), (of_up, of_down) = self.kernels, self.changes[name]
        return np.maximum(x @ (up + of_up), 0) @ (down + of_down)


def pool_of(files, capacity=3, rank=2, counter=None):
    pool = keras_lora.AdapterPool(keras_lora.MultiAdapterModel(base(counter), capacity=capacity, rank=rank, head=None))
    for name in files.changes:
        if name is not None:
            pool.register(name, files.path(name))
    return pool


def rows(count, seed=0):
    return np.random.default_rng(seed).normal(size=(count, 6)).astype("float32")


def check(pool, files, names, x=None):
    x = rows(len(names)) if x is None else x
    found = pool.predict_on_batch(x, names)
    assert difference(found, np.stack([files.answer(row, name) for row, name in zip(x, names, strict=True)])) < 2e-5


def test_adapters_take_turns_in_the_places_and_nothing_is_traced_again(tmp_path):
    files, counter = Files(tmp_path, 5), Counter()
    pool = pool_of(files, counter=counter)
    check(pool, files, ["0", None, "1", "2"])
    traced = counter.count[0]
    assert pool.resident == ["0", "1", "2"]
    check(pool, files, ["0", "3", "0", None])  # "1" was used least recently
    assert pool.resident == ["2", "0", "3"]
    check(pool, files, ["4", "1", "4", "2"])
    assert pool.resident == ["4", "1", "2"]
    if not TORCH:
        assert counter.count[0] == traced
    if TORCH:  # `Files` computes what the adapter alone gives
        plain = keras_lora.load_adapter(base(), files.path("3"))
        assert difference(plain.predict_on_batch(rows(2)), files.answer(rows(2), "3")) < 2e-5


@pytest.mark.torch_first
def test_what_is_wrong_with_a_file_is_an_error_of_its_requests_alone(tmp_path):
    files = Files(tmp_path, 3)
    pool = pool_of(files)
    check(pool, files, ["0", "1", "2"])
    keras_lora.save_adapter(keras_lora.apply_lora(base(), rank=3, head=None), files.path("large"))
    other = keras.Sequential([keras.Input((6,)), layers.Dense(4, name="up"), layers.Dense(3, name="down")])
    keras_lora.save_adapter(keras_lora.apply_lora(other, rank=2, head=None), files.path("other"))
    files.path("damaged").write_bytes(files.path("0").read_bytes()[:-9])
    for name, message in {
        "large": "a place takes ranks up to 2, and this has rank 3",
        "other": r"the kernel at 'layers/0' has shape \[6, 5\]; in the file it has \[6, 4\]",
        "damaged": "is not a whole adapter file",
    }.items():
        pool.register(name, files.path(name))
        with pytest.raises(ValueError, match=message):
            pool.predict_on_batch(rows(2), ["0", name])
        assert pool.resident == ["0", "1", "2"]
        check(pool, files, ["0", "1", "2"])
    with pytest.raises(ValueError, match=r"no adapter 'lrge', or it was removed.*such as \['large'\]"):
        pool.predict_on_batch(rows(1), ["lrge"])
    with pytest.raises(ValueError, match=r"needs places for 4 adapters, and .* has 3, of which 0 are pinned"):
        pool.predict_on_batch(rows(4), ["0", "1", "2", "large"])
    with pytest.raises(FileNotFoundError, match=r"The file of adapter 'x', .* cannot be found"):
        pool.register("x", tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="rank 3"):
        pool.register("0", files.path("large"), pinned=True)
    with pytest.raises(ValueError, match="rank 3"):
        pool.register("new", files.path("large"), pinned=True)
    assert "new" not in pool.registered
    assert pool.pinned == []
    check(pool, files, ["0", "1", "2"])


@pytest.mark.torch_first
def test_pinned_changed_and_removed_adapters(tmp_path):
    files = Files(tmp_path, 5)
    pool = pool_of(files, capacity=2)
    pool.pin("0")
    check(pool, files, ["1"])
    check(pool, files, ["2", "0", "2"])
    check(pool, files, ["3"])
    assert pool.resident == ["0", "3"]
    files.write("0", seed=100)  # a changed file is read again, into the same place
    files.write("4", seed=101)
    check(pool, files, ["0", "3"])
    pool.register("3", files.path("4"))  # another file under the name
    files.changes["3"] = files.changes["4"]
    check(pool, files, ["0", "3"])
    with pytest.raises(ValueError, match="of which 1 are pinned"):
        pool.predict_on_batch(rows(2), ["1", "2"])
    pool.unpin("0")
    check(pool, files, ["1", "2"])
    pool.remove("1")
    assert pool.resident == ["2"]
    with pytest.raises(ValueError, match="or it was removed"):
        check(pool, files, ["1"])
    files.path("2").unlink()
    with pytest.raises(FileNotFoundError, match="cannot be found"):
        check(pool, files, ["2"])
    check(pool, files, ["0", "3"])


@pytest.mark.once
def test_a_file_that_never_stands_still_is_refused(tmp_path, monkeypatch):
    files = Files(tmp_path, 1)
    pool, reads = pool_of(files), []

    def read(path, whole=pool.model.read):
        values = whole(path)
        reads.append(path)
        if len(reads) != changing:
            os.utime(path, ns=(len(reads), len(reads)))
        return values

    monkeypatch.setattr(pool.model, "read", read)
    changing = 2  # the second time it stands still
    assert pool.read("0").version.changed == 1
    changing = None
    with pytest.raises(ValueError, match=f"changed each of {adapter_pool.TRIES} times while it was read"):
        pool.read("0")


def test_a_batch_sees_one_whole_state_of_an_adapter(tmp_path):
    files, done = Files(tmp_path, 4), threading.Event()
    pool = pool_of(files, capacity=1)
    whole = {name: files.path(name).read_bytes() for name in ("0", "1")}
    x, wanted = rows(1), [files.answer(rows(1), "0"), files.answer(rows(1), "1")]
    assert difference(*wanted) > 0.1

    def change():
        number = 0
        while not done.is_set():
            number += 1
            (tmp_path / "aside").write_bytes(whole[f"{number % 2}"])
            os.replace(tmp_path / "aside", files.path("0"))
            pool.predict_on_batch(x, ["2"])  # takes the only place

    with concurrent.futures.ThreadPoolExecutor(1) as writers:
        changing = writers.submit(change)
        try:
            found = [pool.predict_on_batch(x, ["0"]) for _ in range(25)]
        finally:
            done.set()
        changing.result()
    nearest = [[difference(each, state) < 2e-5 for state in wanted] for each in found]
    assert all(any(each) for each in nearest)


def test_a_hundred_clients_get_the_answers_of_their_adapters_alone(tmp_path):
    files, counter = Files(tmp_path, 100), Counter()
    pool = pool_of(files, capacity=16, counter=counter)
    x, rng = rows(100), np.random.default_rng(3)
    asked = rng.integers(0, 100, (100, 2))
    together = threading.Barrier(100)
    with keras_lora.AdapterServer(pool, batch_sizes=(32,), max_wait=0.01) as server:
        server.warm_up(x[0])
        traced = counter.count[0]

        def client(number):
            together.wait(60)
            names = [None if each % 10 == 0 else f"{each}" for each in asked[number]]
            return max(difference(server.predict(x[number], name), files.answer(x[number], name)) for name in names)

        with concurrent.futures.ThreadPoolExecutor(100) as clients:
            assert max(clients.map(client, range(100))) < 2e-5
    assert len(pool.resident) == 16
    if not TORCH:
        assert counter.count[0] == traced


@pytest.mark.torch_first
def test_an_error_goes_to_the_caller_that_caused_it(tmp_path):
    files = Files(tmp_path, 4)
    pool = pool_of(files)
    files.path("3").write_bytes(b"no adapter")
    ran = []

    def run(x, names):
        ran.append(list(names))
        if np.isnan(x).any():
            raise ArithmeticError("not a number")
        return pool.predict_on_batch(x, names)

    with keras_lora.AdapterServer(pool, run=run, batch_sizes=(1, 8), max_wait=0.2) as server:
        x = rows(6)
        x[2] = np.nan
        futures = [server.submit(row, name) for row, name in zip(x, ["0", "1", "1", "2", None, "3"], strict=True)]
        futures += [server.submit(np.ones(4, "float32"), "0")]
        for number, (row, name) in enumerate(zip(x[:2], ["0", "1"], strict=True)):
            assert difference(futures[number].result(60), files.answer(row, name)) < 2e-5
        with pytest.raises(ArithmeticError, match="not a number"):
            futures[2].result(60)
        assert difference(futures[3].result(60), files.answer(x[3], "2")) < 2e-5
        assert difference(futures[4].result(60), files.answer(x[4], None)) < 2e-5
        with pytest.raises(ValueError, match="is not a whole adapter file"):
            futures[5].result(60)
        with pytest.raises(ValueError, match="shape"):
            futures[6].result(60)
        with pytest.raises(ValueError, match="no adapter 'x'"):
            server.predict(x[0], "x")
        assert difference(server.predict(x[0], "0"), files.answer(x[0], "0")) < 2e-5
    assert max(map(len, ran)) == 8


@pytest.mark.torch_first
def test_a_place_that_is_taken_while_a_request_waits(tmp_path):
    files, free, started = Files(tmp_path, 3), threading.Event(), threading.Event()
    pool = pool_of(files, capacity=1)

    def run(x, names):
        started.set()
        assert free.wait(60)
        return pool.predict_on_batch(x, names)

    with keras_lora.AdapterServer(pool, run=run, batch_sizes=(4,), max_wait=0) as server:
        check(pool, files, ["0"])
        first = server.submit(rows(1)[0], "1")
        assert started.wait(60)
        pool._resident["0"] = pool.read("0").version  # as if it were resident when the request comes
        late = [server.submit(rows(1)[0], name) for name in ("0", "2", "0")]
        with pool._table:
            pool._release("0")
        free.set()
        assert difference(first.result(60), files.answer(rows(1)[0], "1")) < 2e-5
        for future, name in zip(late, ("0", "2", "0"), strict=True):
            assert difference(future.result(60), files.answer(rows(1)[0], name)) < 2e-5


@pytest.mark.torch_first
def test_closing_drains_or_fails_what_waits(tmp_path):
    files, free, started = Files(tmp_path, 3), threading.Event(), threading.Event()
    pool = pool_of(files)

    def run(x, names):
        started.set()
        assert free.wait(60)
        return pool.predict_on_batch(x, names)

    def waiting():
        free.clear(), started.clear()
        server = keras_lora.AdapterServer(pool, run=run, batch_sizes=(1,), max_wait=0, max_waiting=3)
        futures = [server.submit(rows(1)[0], "0")]
        assert started.wait(60)
        futures += [server.submit(rows(1)[0], name) for name in ("1", "2", None)]
        with pytest.raises(RuntimeError, match="3 requests wait, and this server lets no more wait"):
            server.submit(rows(1)[0])
        with pytest.raises(concurrent.futures.TimeoutError):
            futures[1].result(0)
        assert server.waiting == 3
        threading.Timer(0.05, free.set).start()
        return server, futures

    server, futures = waiting()
    futures[2].cancel()
    server.close()
    assert [each.cancelled() for each in futures] == [False, False, True, False]
    assert difference(futures[3].result(0), files.answer(rows(1)[0], None)) < 2e-5
    with pytest.raises(RuntimeError, match="This server is closed"):
        server.submit(rows(1)[0])
    server.close()
    server, futures = waiting()
    with pytest.raises(KeyError), server:
        raise KeyError
    assert difference(futures[0].result(0), files.answer(rows(1)[0], "0")) < 2e-5
    for future in futures[1:]:
        with pytest.raises(RuntimeError, match="was closed before it answered"):
            future.result(60)


@pytest.mark.nightly
def test_prompts_of_several_clients_are_generated_together(tmp_path):
    tokens = np.array([3, 4, 0, 0, 0], "int32")
    prompt = {"token_ids": tokens, "padding_mask": (tokens > 0).astype("int32")}
    model = keras_lora.MultiAdapterModel(language_model(), capacity=1, rank=2)
    model.model.compile(sampler="greedy")
    pool, wanted = keras_lora.AdapterPool(model), {}
    for number in range(3):
        alone = keras_lora.apply_lora(language_model(), rank=2)
        move(alone, seed=number, size=1.0)
        alone.compile(sampler="greedy")
        keras_lora.save_adapter(alone, tmp_path / f"{number}.safetensors")
        batch = {key: each[None] for key, each in prompt.items()}
        wanted[f"{number}"] = alone.generate(batch, stop_token_ids=None)["token_ids"][0]
        pool.register(f"{number}", tmp_path / f"{number}.safetensors")
    run = functools.partial(pool.generate, stop_token_ids=None)
    with keras_lora.AdapterServer(pool, run=run, batch_sizes=(4,)) as server:
        futures = {name: server.submit(prompt, name) for name in ("2", "0", "1")}
        for name, future in futures.items():
            assert np.array_equal(future.result(60)["token_ids"], wanted[name])


@pytest.mark.once
def test_examples_and_batches():
    prompts = batches.stacked(["a", "b"], 3)
    assert prompts == ["a", "b", "b"]
    assert batches.row(prompts, 1) == "b"
    example = batches.as_example({"x": np.ones(2), "y": "text"})
    assert batches.signature(example) == batches.signature(batches.as_example({"x": np.zeros(2), "y": "other"}))
    assert batches.signature(example) != batches.signature(batches.as_example({"x": np.zeros(3), "y": "text"}))
    batch = batches.stacked([{"x": np.arange(2.0)}, {"x": np.ones(2)}], 4)
    assert batch["x"].shape == (4, 2)
    assert batches.row({"x": batch["x"], "z": [batch["x"]]}, 0)["z"][0].tolist() == [0, 1]


@pytest.mark.once
def test_what_a_pool_and_a_server_do_not_take(tmp_path):
    files = Files(tmp_path, 1)
    pool = pool_of(files)
    with pytest.raises(ValueError, match=r"A pool serves a `keras_lora\.MultiAdapterModel`. Received: Sequential"):
        keras_lora.AdapterPool(base())
    loaded = keras_lora.MultiAdapterModel(base(), capacity=1, rank=2, head=None)
    loaded.load(files.path("0"), "x")
    with pytest.raises(ValueError, match=r"has the adapters \['x'\]. Expected a model without any"):
        keras_lora.AdapterPool(loaded)
    with pytest.raises(ValueError, match=r"must end in '.safetensors'"):
        pool.register("x", tmp_path)
    for name in ("remove", "pin", "unpin"):
        with pytest.raises(ValueError, match="no adapter 'x'"):
            getattr(pool, name)("x")
    for arguments, message in {
        "batch_sizes": ({"batch_sizes": ()}, "must have at least one size"),
        "zero": ({"batch_sizes": (0,)}, "must be a positive integer"),
        "max_wait": ({"max_wait": -1}, "must be a number of seconds"),
        "max_waiting": ({"max_waiting": 0}, "must be a positive integer"),
    }.values():
        with pytest.raises(ValueError, match=message):
            keras_lora.AdapterServer(pool, **arguments)
    with pytest.raises(ValueError, match=r"A server needs a `keras_lora\.AdapterPool`"):
        keras_lora.AdapterServer(loaded)
