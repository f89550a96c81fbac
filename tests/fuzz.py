"""Feed damaged files to everything that reads a file: `make fuzz`, or one reader with a count and a seed.

    python tests/fuzz.py --reader adapter --count 1000000 --seed 0
    python tests/fuzz.py --report          # print the table of tests/fuzz_results.md from all runs so far

A good file is damaged: bits are flipped, it is cut, parts of it and of other good files are spliced, and what it says (JSON,
lengths, names in HDF5 and zip) is edited. Then the reader reads it, in this process. Three things may happen: it is refused
with a `ValueError` (of the command line `Refused`; of a `.keras` or `.h5` file, which Keras reads, any `Exception`), it is
read, or the run fails and prints the number of the input, which `--start NUMBER --count 1` makes again. A crash of the
process, an input that takes over 10 seconds, and memory of more than 2 GB are failures too: inputs run in a child process.

Readers: `adapter` (an adapter file), `command` (what `inspect`, `diff` and `compress` read of one), `peft` (a PEFT folder),
`lora_h5` (a KerasHub `.lora.h5`), `keras_facts` (`inspect` of a `.keras`): these build no model. `load_adapter` loads an
adapter file into a model, `keras` and `h5` load the whole file of an adapted model.
"""

from __future__ import annotations

import argparse
import collections
import io
import json
import os
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
import safetensors.numpy

import keras_lora
from keras_lora.cli import common, compress, diff, inspect_file
from keras_lora.files import tensor_file
from keras_lora.files.adapter_state import AdapterState
from keras_lora.interop import lora_h5, peft_folder

RESULTS = Path(__file__).parents[1] / ".cache" / "fuzz.jsonl"
PAGE = Path(__file__).with_name("fuzz_results.md")
LONGEST, MOST_MEMORY = 10, 2 * 2**30
JUNK: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 2**31, 2**63, 10**400, 1.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "\0", "..", "../../etc/passwd", "__class__", "F64", "BF16", "ключ", "\ud800", "a" * 3000),
    *([], {}, [[]], [None], {"a": 1}, [2**62, 4]),
    {"class_name": "__lambda__", "config": {"value": "4wEA"}},
    {"module": "os", "class_name": "system", "config": "x"},
]


# Damage. Each function takes a source of random numbers and a good file, and returns another file.


def flipped(draw: random.Random, data: bytes, others: list[bytes]) -> bytes:
    content = bytearray(data)
    # Half of the damage is near the beginning, where a file says what it is.
    end = min(len(content), 400) if draw.random() < 0.5 else len(content)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        content[draw.randrange(end)] ^= 1 << draw.randrange(8)
    return bytes(content)


def overwritten(draw: random.Random, data: bytes, others: list[bytes]) -> bytes:
    size = draw.choice((1, 2, 4, 8))
    number = draw.choice((0, 1, 2**7, 2**8 - 1, 2**15, 2**31, 2**32 - 1, 2**63, 2**64 - 1, len(data), draw.getrandbits(64)))
    place = draw.randrange(max(1, len(data) - size))
    return data[:place] + struct.pack("<Q", number % 2**64)[:size] + data[place + size :]


def cut(draw: random.Random, data: bytes, others: list[bytes]) -> bytes:
    return data[: draw.randrange(len(data))]


def spliced(draw: random.Random, data: bytes, others: list[bytes]) -> bytes:
    other = draw.choice([*others, data])
    start, end = sorted(draw.randrange(len(other) + 1) for _ in range(2))
    place = draw.randrange(len(data) + 1)
    return data[:place] + other[start : min(end, start + 2000)] + data[place + draw.choice((0, 0, end - start)) :]


RAW = (flipped, flipped, overwritten, cut, spliced)


def edited(draw: random.Random, table: Any) -> Any:
    """A JSON value with one or two places removed, doubled, renamed or replaced."""
    table = json.loads(json.dumps(table))
    for _ in range(draw.choice((1, 1, 2))):
        holder, place = None, table
        while isinstance(place, (dict, list)) and place and (holder is None or draw.random() < 0.85):
            key = draw.choice(list(place)) if isinstance(place, dict) else draw.randrange(len(place))
            holder, place = (place, key), place[key]
        if holder is None:
            return draw.choice(JUNK)
        inside, key = holder
        way = draw.randrange(4)
        if way == 0:
            del inside[key]
        elif way == 1 and isinstance(inside, dict):
            inside[draw.choice((*inside, "x", "..", key + "/0"))] = inside.pop(key)
        elif way == 1:
            inside.append(inside[key])
        elif way == 2 and type(place) in (int, float):
            inside[key] = draw.choice((place + 1, place - 1, -place, place * 10**9, str(place), place * 2))
        else:
            inside[key] = draw.choice(JUNK)
    return table


def safetensors_edited(draw: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """A safetensors file with an edited header, or edited text inside its metadata."""
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    own = header.get("__metadata__", {}).get(tensor_file.ENTRY)
    if own is not None and draw.random() < 0.7:
        header["__metadata__"][tensor_file.ENTRY] = json.dumps(edited(draw, json.loads(own)))
    else:
        header = edited(draw, header)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def zip_edited(draw: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """A zip archive with an entry edited, removed, repeated or renamed, perhaps compressed."""
    made = io.BytesIO()
    way = draw.choice([zipfile.ZIP_STORED] * 8 + [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(made, "w", way) as new:
        chosen = draw.choice(old.namelist() + ["config.json"] * 4)
        for name in old.namelist():
            content = old.read(name)
            if name == chosen and name.endswith(".json"):
                content = json.dumps(edited(draw, json.loads(content))).encode("utf-8", "surrogatepass")
            elif name == chosen:
                content = draw.choice(RAW)(draw, content, others)
            if name != chosen or draw.random() < 0.95:
                new.writestr(name if name != chosen or draw.random() < 0.97 else "../" + name, content)
    return made.getvalue()


def json_edited(draw: random.Random, data: bytes, others: list[bytes]) -> bytes:
    return json.dumps(edited(draw, json.loads(data))).encode("utf-8", "surrogatepass")


# Readers. Each has good files, ways to damage them beside `RAW`, and a function that reads one, or raises.


class Reader:
    #: What a refusal raises.
    refusal: tuple[type[Exception], ...] = (ValueError,)
    ending = ".safetensors"
    ways: tuple[Callable[..., bytes], ...] = RAW + (safetensors_edited,) * 4

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / f"file{self.ending}"
        self.good = self.made()

    def made(self) -> list[bytes]:
        return adapter_files(self.folder)

    def damaged(self, draw: random.Random) -> bytes:
        data = draw.choice(self.good)
        for _ in range(draw.choice((1, 1, 1, 2))):
            way = draw.choice(self.ways)
            try:
                data = way(draw, data, self.good) or data
            except (ValueError, KeyError, struct.error, zipfile.BadZipFile, AttributeError, TypeError, NotImplementedError):
                data = flipped(draw, data, self.good)  # the second damage cannot read what the first one left
        return data

    def read(self, data: bytes) -> None:
        self.path.write_bytes(data)
        AdapterState.read(self.path)


class Command(Reader):
    """All that the command line does with one adapter file, but for printing."""

    refusal = (common.Refused, ValueError)

    def read(self, data: bytes) -> None:
        self.path.write_bytes(data)
        inspect_file._adapter_file(self.path)
        parts = diff._parts(common.read_adapter(str(self.path)))
        for place in parts:
            diff._row(place, parts[place], self.other.get(place))
        if compress.run(argparse.Namespace(file=str(self.path), out=str(self.out), rank=1, energy=None, force=True)):
            raise AssertionError("compress has another exit code")

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.path.write_bytes(self.good[0])
        self.other = diff._parts(common.read_adapter(str(self.path)))
        self.out = folder / "out.safetensors"
        compress.show = lambda *parts: None


class Peft(Reader):
    def made(self) -> list[bytes]:
        rng, module = np.random.default_rng(0), "base_model.model.layers.{}.q_proj.lora_{}.weight"
        a = {module.format(i, "A"): rng.normal(size=(2, 6)).astype("float32") for i in range(2)}
        b = {module.format(i, "B"): rng.normal(size=(4, 2)).astype("float32") for i in range(2)}
        more = {"base_model.model.score.modules_to_save.weight": np.ones((2, 4), "float16")}
        self.config = json.dumps({
            "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "rank_pattern": {"0.q_proj": 2},
            "alpha_pattern": {r"layers\.1.*": 8}, "use_rslora": False, "auto_map": {"base_model_class": "os.system"},
        }).encode()  # fmt: skip
        return [safetensors.numpy.save({**a, **b, **more}, {"format": "pt"}), safetensors.numpy.save({**a, **b})]

    def read(self, data: bytes) -> None:
        config = self.config
        if data[:1] == b"{":
            config, data = data, self.good[0]
        (self.folder / peft_folder.TENSORS).write_bytes(data)
        (self.folder / peft_folder.CONFIG).write_bytes(config)
        peft_folder.read(self.folder)

    def damaged(self, draw: random.Random) -> bytes:
        if draw.random() < 0.4:
            data = draw.choice((json_edited, json_edited, flipped, cut, spliced))(draw, self.config, [self.config])
            return data if data[:1] == b"{" else b"{" + data
        return super().damaged(draw)


class LoraH5(Reader):
    ending = ".lora.h5"
    ways = RAW

    def made(self) -> list[bytes]:
        import h5py

        found = []
        for libver in ("earliest", "latest"):
            with h5py.File(self.path, "w", libver=libver) as file:
                file["lora/vars/rank"] = 2
                file["lora/3/vars/lora_kernel_a"] = np.ones((4, 2), "float32")
                file["lora/3/vars/lora_kernel_b"] = np.ones((2, 4), "float16")
            found.append(self.path.read_bytes())
        return found

    def read(self, data: bytes) -> None:
        self.path.write_bytes(data)
        if problems := lora_h5._read(self.path)[2]:
            raise ValueError(problems)


class KerasFacts(Reader):
    ending, refusal = ".keras", (common.Refused,)
    ways = RAW + (zip_edited,) * 4

    def made(self) -> list[bytes]:
        return whole_files(self.folder, ".keras")

    def read(self, data: bytes) -> None:
        self.path.write_bytes(data)
        inspect_file.keras_file(self.path)


class LoadAdapter(Reader):
    def __init__(self, folder: Path):
        super().__init__(folder)
        self.model = base()
        self.start = self.state()

    def state(self) -> list[Any]:
        return [type(self.model), [(v.path, v.trainable, np.asarray(keras.ops.convert_to_numpy(v)).tobytes())
                                   for v in self.model.variables]]  # fmt: skip

    def read(self, data: bytes) -> None:
        self.path.write_bytes(data)
        try:
            keras_lora.load_adapter(self.model, self.path)
        except ValueError:
            if self.state() != self.start:
                raise AssertionError("a refusal changed the model") from None
            raise
        self.model = base()


class Keras(Reader):
    """Keras reads these files: its errors are of any kind."""

    ending, refusal = ".keras", (Exception,)
    ways = RAW + (zip_edited,) * 4

    def made(self) -> list[bytes]:
        return whole_files(self.folder, self.ending)

    def read(self, data: bytes) -> None:
        self.path.write_bytes(data)
        keras.saving.load_model(self.path)


class H5(Keras):
    ending, ways = ".h5", RAW


READERS = {
    "adapter": Reader,
    "command": Command,
    "peft": Peft,
    "lora_h5": LoraH5,
    "keras_facts": KerasFacts,
    "load_adapter": LoadAdapter,
    "keras": Keras,
    "h5": H5,
}


def base() -> keras.Model:
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(4, name="first"), keras.layers.Dense(2, name="head")], name="net"
    )


def adapter_files(folder: Path) -> list[bytes]:
    found = []
    for arguments in ({"rank": 2, "train": "head"}, {"adapter": "dora", "rank": 1}, {"rank": 2, "bias": "lora_only"}):
        keras_lora.save_adapter(keras_lora.apply_lora(base(), **arguments), folder / "good.safetensors")
        found.append((folder / "good.safetensors").read_bytes())
    (folder / "good.safetensors").unlink()
    return found


def whole_files(folder: Path, ending: str) -> list[bytes]:
    found = []
    for model in (keras_lora.apply_lora(base(), rank=2), keras_lora.apply_lora(base(), "dora", rank=1, train="head")):
        if ending == ".keras":
            model.compile("sgd", "mse")  # Keras cannot read an .h5 file with this loss
        model.save(folder / f"good{ending}")
        found.append((folder / f"good{ending}").read_bytes())
    (folder / f"good{ending}").unlink()
    return found


# Running.


def batch(name: str, seed: int, start: int, count: int, pipe: int) -> None:
    """Read inputs `start` to `start + count`, and write down what happened; in a child process, which may die."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    number = start

    def tell(**said: Any) -> None:
        os.write(pipe, (json.dumps(said) + "\n").encode())

    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, even inside a library
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(dir=_fast_folder()) as folder:
        reader = READERS[name](Path(folder))
        reader.read(reader.good[0])  # a good file is read
        before, counts, kinds = _most_memory(), collections.Counter(), collections.Counter()
        for number in range(start, start + count):
            os.pwrite(notes, struct.pack("<3q", number, counts["loaded"], counts["refused"]), 0)
            signal.alarm(LONGEST)
            try:
                reader.read(reader.damaged(random.Random(f"{seed}:{number}")))
                counts["loaded"] += 1
            except reader.refusal as error:
                counts["refused"] += 1
                kinds[type(error).__name__] += 1
            except BaseException as error:
                tell(failed=number, why=repr(error)[:500])
            finally:
                signal.alarm(0)
            if _most_memory() > before + MOST_MEMORY:
                tell(failed=number, why=f"memory: {_most_memory() - before} bytes")
                break
        tell(counts=counts, kinds=kinds, done=number + 1 - start, memory=_most_memory() - before)


def _most_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _fast_folder() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


#: A file in which a child notes the input that it reads, so that its parent knows it if the child dies.
notes = -1


def run(name: str, seed: int, start: int, count: int, minutes: float) -> dict[str, Any]:
    """Read inputs until `minutes` are over, 5,000 in a child process. A child that dies is a failure of its last input."""
    global notes
    total: dict[str, Any] = {"reader": name, "seed": seed, "start": start, "inputs": 0, "loaded": 0, "refused": 0,
                             "kinds": collections.Counter(), "memory": 0, "failed": []}  # fmt: skip
    begun, end = time.time(), start + count
    with tempfile.TemporaryFile() as numbers:
        notes = numbers.fileno()
        while start < end and time.time() < begun + 60 * minutes:
            receive, send = os.pipe()
            child = os.fork()
            if child == 0:
                os.close(receive)
                status = 1
                try:
                    batch(name, seed, start, min(5_000, end - start), send)
                    status = 0
                finally:
                    os._exit(status)
            os.close(send)
            with os.fdopen(receive) as said:
                lines = [json.loads(line) for line in said]
            status = os.waitpid(child, 0)[1]
            total["failed"] += [line for line in lines if "failed" in line]
            if status:
                last, *read = struct.unpack("<3q", os.pread(notes, 24, 0))
                total["loaded"], total["refused"] = total["loaded"] + read[0], total["refused"] + read[1]
                why = f"no end after {LONGEST} seconds" if status == signal.SIGALRM else f"it ended the process: {status}"
                total["failed"].append({"failed": last, "why": why})
                total["inputs"] += last + 1 - start
                start = last + 1
            else:
                closing = lines[-1]
                for key in ("loaded", "refused"):
                    total[key] += closing["counts"].get(key, 0)
                total["kinds"].update(closing["kinds"])
                total["memory"] = max(total["memory"], closing["memory"])
                total["inputs"] += closing["done"]
                start += closing["done"]
            total["seconds"] = round(time.time() - begun)
            print(f"{name}: {total['inputs']:,} of {count:,}, {len(total['failed'])} failed", file=sys.stderr, flush=True)
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reader", choices=READERS, action="append", help="default: all")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1e6, help="stop after so many minutes for each reader")
    parser.add_argument("--report", action="store_true")
    given = parser.parse_args()
    if given.report:
        PAGE.write_text(page([json.loads(line) for line in RESULTS.read_text().splitlines()]))
        return 0
    failed = False
    for name in given.reader or READERS:
        found = run(name, given.seed, given.start, given.count, given.minutes)
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(found) + "\n")
        print(json.dumps(found))
        failed |= bool(found["failed"])
    return int(failed)


def page(runs: list[dict[str, Any]]) -> str:
    """The results of all runs, as a page."""
    import h5py

    lines = [
        "# Results of fuzzing",
        "",
        "Written by `python tests/fuzz.py --report` from the runs of `make fuzz`. `tests/fuzz.py` says what the readers are",
        "and what a failure is. `--reader NAME --seed SEED --start NUMBER --count 1` makes an input again. Memory is what a",
        "process took more than before, at most.",
        "",
        f"Keras {keras.__version__}, backend {keras.backend.backend()}, safetensors {safetensors.__version__}, h5py "
        f"{h5py.__version__} with HDF5 {h5py.version.hdf5_version}.",
        "",
        "| reader | seeds | inputs | refused | read | failed | seconds | memory, MB |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    failures = []
    for name in READERS:
        own = [each for each in runs if each["reader"] == name]
        if not own:
            continue
        seeds = ", ".join(f"{each['seed']}" + (f" from {each['start']:,}" if each["start"] else "") for each in own)
        sums = {key: sum(each[key] for each in own) for key in ("inputs", "refused", "loaded", "seconds")}
        numbers = " | ".join(f"{sums[key]:,}" for key in ("inputs", "refused", "loaded"))
        failed, memory = sum(len(each["failed"]) for each in own), max(each["memory"] for each in own) / 1e6
        lines.append(f"| `{name}` | {seeds} | {numbers} | {failed} | {sums['seconds']:,} | {memory:,.0f} |")
        failures += [(name, each["seed"], line) for each in own for line in each["failed"]]
        kinds = sum((collections.Counter(each["kinds"]) for each in own), collections.Counter())
        if name in ("keras", "h5"):
            listed = ", ".join(f"{kind} {count:,}" for kind, count in kinds.most_common())
            failures.append((name, "", {"failed": "", "why": f"no failure, the kinds of Keras's refusals: {listed}"}))
    lines += ["", *(f"- `{name}` {seed} {line['failed']}: {line['why']}" for name, seed, line in failures)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
