"""Files from strangers: each published way to attack a reader of model files, against each reader that it can reach.

A row makes a file. After the reader, whether it refused the file or read it: nothing that the file names has run, nothing
was written, the model has no number of another file, and no more memory was taken than a few times the file's size.
"""

import io
import json
import os
import pickle
import random
import sys
import tracemalloc
import zipfile
from pathlib import Path

import fuzz
import h5py
import keras
import numpy as np
import pytest
import safetensors.numpy
from helpers import header_of, once, value
from test_huggingface import hub  # noqa: F401  # a fixture

import keras_lora
from keras_lora import adapters, cli
from keras_lora.adapters import LowRank
from keras_lora.cli import compress
from keras_lora.files import tensor_file
from keras_lora.interop import from_lora_h5, from_peft, peft_folder

pytestmark = once

#: The number in the other file, which must reach no model.
SECRET = 123456.0
#: The kinds of error that Keras gives for a file that it refuses.
BY_KERAS = (ValueError, TypeError, KeyError, ImportError, AttributeError, OSError, RuntimeError)
#: What a small model, its library and this test take beside the file, in bytes.
ROOM = 12_000_000


def base():
    keras.utils.set_random_seed(0)
    stack = [keras.layers.Dense(4, name="first"), keras.layers.Dense(2, name="head")]
    return keras.Sequential([keras.Input((3,)), *stack], name="net")


# Good files, as bytes, and changes of them.


def adapter_file(folder, header=lambda found: found, tensors=lambda found: found):
    path = folder / "good.safetensors"
    keras_lora.save_adapter(keras_lora.apply_lora(base(), rank=2), path)
    found = safetensors.numpy.load_file(path)
    data = safetensors.numpy.save(tensors(found), {tensor_file.ENTRY: json.dumps(header(header_of(path)))})
    path.write_bytes(data)
    return path


def peft(folder, tensors=lambda found: found, **config):
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["first"], **config}
    found = {"a": np.ones((2, 3), "float32"), "b": np.ones((4, 2), "float32")}
    names = {key: f"base_model.model.first.lora_{key.upper()}.weight" for key in found}
    (folder / "peft").mkdir()
    (folder / "peft" / peft_folder.CONFIG).write_text(json.dumps(said))
    made = safetensors.numpy.save({names[key]: each for key, each in tensors(found).items()}, {"format": "pt"})
    (folder / "peft" / peft_folder.TENSORS).write_bytes(made)
    return folder / "peft"


def lora_h5(folder, change):
    """A `.lora.h5` file in which `change(file, key)` has written the factor at `key`, of shape `(3, 2)`."""
    with h5py.File(folder / "good.lora.h5", "w") as file:
        file["lora/vars/rank"] = 2
        file["lora/0/vars/lora_kernel_b"] = np.ones((2, 4), "float32")
        change(file, "lora/0/vars/lora_kernel_a")
    return folder / "good.lora.h5"


def in_weights(file, change):
    """Write the kernel of the first layer, of shape `(3, 4)`, in the weights of a whole model by `change`."""
    found = []
    file.visititems(lambda key, item: found.append(key) if getattr(item, "shape", None) == (3, 4) else None)
    del file[found[0]]
    change(file, found[0])


def keras_file(folder, config=lambda found: found, weights=None, more=(), adapted=True, compression=zipfile.ZIP_STORED):
    path = folder / "good.keras"
    (keras_lora.apply_lora(base(), rank=2) if adapted else base()).save(path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    said = config(json.loads(parts["config.json"]))
    parts["config.json"] = said if isinstance(said, bytes) else json.dumps(said).encode()
    if weights is not None:
        held = io.BytesIO(parts["model.weights.h5"])
        with h5py.File(held, "a") as file:
            in_weights(file, weights)
        parts["model.weights.h5"] = held.getvalue()
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in {**parts, **dict(more)}.items():
            archive.writestr(name, content)
    return path


def plain_keras_file(folder, **changes):
    return keras_file(folder, adapted=False, **changes)


def h5(folder, config=lambda found: found, weights=None):
    path = folder / "good.h5"
    keras_lora.apply_lora(base(), rank=2).save(path)
    with h5py.File(path, "a") as file:
        file.attrs["model_config"] = json.dumps(config(json.loads(file.attrs["model_config"])))
        if weights is not None:
            in_weights(file, weights)
    return path


# The ways to attack.


def external(folder):
    (folder / "secret").write_bytes(np.full(12, SECRET, "float32").tobytes())

    def change(file, key):
        group, _, name = key.rpartition("/")
        shape = (3, 4) if "kernel_a" not in key else (3, 2)
        file[group].create_dataset(name, shape, "float32", external=[(str(folder / "secret"), 0, h5py.h5f.UNLIMITED)])

    return change


def other_h5(folder):
    with h5py.File(folder / "secret", "w") as file:
        file["wide"], file["thin"] = np.full((3, 4), SECRET, "float32"), np.full((3, 2), SECRET, "float32")
    return lambda key: ("thin", (3, 2)) if "kernel_a" in key else ("wide", (3, 4))


def virtual(folder):
    inside = other_h5(folder)

    def change(file, key):
        name, shape = inside(key)
        layout = h5py.VirtualLayout(shape, "float32")
        layout[:] = h5py.VirtualSource(str(folder / "secret"), name, shape)
        file.create_virtual_dataset(key, layout)

    return change


def external_link(folder):
    inside = other_h5(folder)
    return lambda file, key: file.__setitem__(key, h5py.ExternalLink(str(folder / "secret"), inside(key)[0]))


def soft_link(folder):
    def change(file, key):
        file["elsewhere"] = np.ones((3, 2) if "kernel_a" in key else (3, 4), "float32")
        file[key] = h5py.SoftLink("/elsewhere")

    return change


def hard_links(folder):
    def change(file, key):
        file[key] = np.ones((3, 2), "float32")
        for index in range(1, 400):
            file[f"lora/{index}/vars/lora_kernel_a"] = file[key]
        file["lora/0/vars/again"] = file["lora"]  # a group in itself

    return change


def shape_bomb(folder):
    return lambda file, key: file.create_dataset(key, (40_000, 40_000), "float32", chunks=(100, 100), compression="gzip")


def shape_bomb_in_one_piece(folder):
    return lambda file, key: file.create_dataset(key, (40_000, 40_000), "float32")


def called(module, class_name, /, **config):
    return {"module": module, "class_name": class_name, "config": config, "registered_name": None}


#: What a config may name, so that it is made or called.
CALLS = {
    "a module on the path": called("evil", "run"),
    "os.system": called("os", "system", command="touch ran"),
    "a function of Python": called("builtins", "eval", source="1"),
    "a tool of Keras": called("keras.utils", "get_file", fname="ran", origin="file:///etc/passwd"),
    "the switch of safe mode": called("keras.config", "enable_unsafe_deserialization"),
    "the switch as a function": {
        "module": "keras.config",
        "class_name": "function",
        "config": "enable_unsafe_deserialization",
        "registered_name": "function",
    },
    "code of a Lambda": {"class_name": "__lambda__", "config": {"value": "4wEAAAAAAAAAAAAAAAA=", "defaults": None}},
    "a Lambda": called(
        "keras.layers", "Lambda", function={"class_name": "__lambda__", "config": {"value": "4wEAAAAA"}}, name="first"
    ),
    "a pickled torch module": called(
        "keras.layers", "TorchModuleWrapper", module="gASVEwAAAAAAAACMAm9zlIwGc3lzdGVtlJOULg=="
    ),
    "a SavedModel": called("keras.layers", "TFSMLayer", filepath="/etc"),
    "a file as words": called("keras.layers", "StringLookup", vocabulary="/etc/passwd", name="first"),
    "a page as words": called("keras.layers", "StringLookup", vocabulary="https://example.com/words", name="first"),
}


#: Those that run by `make test` in every place; they cost the same, and differ in Keras alone.
FIRST = ("a module on the path", "a Lambda")


def descriptions(config):
    """What a config says about adapters: an adapted layer says it, and each container around it again."""
    if isinstance(config, dict):
        yield from [config["keras_lora"]] if "keras_lora" in config else []
    for each in config.values() if isinstance(config, dict) else config if isinstance(config, list) else ():
        yield from descriptions(each)


#: Where in the config of an adapted model: as its base, as an adapter, as one of its layers.
PLACES = {
    "base": lambda config, call: [each.update(base=call) for each in descriptions(config)],
    "adapter": lambda config, call: [
        entry.update(adapter=call) for each in descriptions(config) for entry in each["adapters"]
    ],
    "layer": lambda config, call: config["config"]["layers"].__setitem__(1, call),
    "all": lambda config, call: config.update(call),
}


def with_call(place, call):
    def change(config):
        PLACES[place](config, json.loads(json.dumps(call)))
        return config

    return change


def with_rank(rank):
    def change(config):
        for entry in [entry for each in descriptions(config) for entry in each["adapters"]]:
            entry["adapter"]["config"]["rank"] = rank
        return config

    return change


def rank_in_header(rank, **more):
    def change(header):
        entry = header["adapters"]["layers/0"]
        entry["config"], entry["scale"] = {**entry["config"], "rank": rank}, 16 / rank
        header["adapters"]["layers/0"] = {**entry, **more}
        return header

    return change


class Drawn(LowRank):
    """A method that trains one number per rank and draws its two matrices."""

    def build_for(self, linear):
        *_, in_dim, out_dim = linear.matrix_shape
        self.d = self.add_factor("d", (self.rank,), "zeros")
        self.a = self.add_factor("a", (in_dim, self.rank), "ones", trainable=False)
        self.b = self.add_factor("b", (self.rank, out_dim), "ones", trainable=False)

    def pair(self, weights, matrix_shape):
        return self.a * self.d, self.b

    def parameter_count(self, matrix_shape):
        return self.rank

    @property
    def saved_weights(self):
        return {"d": self.d}


def drawn(folder):
    header = rank_in_header(400_000, method="drawn")
    return adapter_file(
        folder,
        header,
        lambda found: {
            **{key: each for key, each in found.items() if not key.startswith("layers/0:")},
            "layers/0:d": np.zeros(400_000, "float32"),
        },
    )


def pickled_folder(folder):
    path = peft(folder)
    (path / peft_folder.TENSORS).unlink()
    (path / "adapter_model.bin").write_bytes(Call.pickled())
    return path


class Call:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)

    @staticmethod
    def pickled():
        return pickle.dumps(Call())


def of_bytes(name, data):
    def make(folder):
        (folder / name).write_bytes(data())
        return folder / name

    return make


def linked(folder, name, to):
    (folder / to).write_text(f"secret {SECRET}")
    (folder / "peft" / name).unlink()
    (folder / "peft" / name).symlink_to(folder / to)


def link_in_folder(name):
    def make(folder):
        path = peft(folder)
        linked(folder, name, "secret")
        return path

    return make


def link_as_file(folder):
    (folder / "secret").write_text(f"secret {SECRET}")
    (folder / "good.safetensors").symlink_to(folder / "secret")
    return folder / "good.safetensors"


def traversing(folder):
    names = ("../outside", "assets/../../outside", "/tmp/outside_of_keras_lora", "assets/x")
    return keras_file(folder, more=[(name, b"outside") for name in names])


def bomb(folder):
    return keras_file(
        folder, lambda config: json.dumps(config).encode() + b" " * 30_000_000, compression=zipfile.ZIP_DEFLATED
    )


def bomb_of_lzma(folder):
    return keras_file(folder, compression=zipfile.ZIP_LZMA)


def layer_named(name):
    def change(config):
        text = json.dumps(config).replace('"first"', json.dumps(name))
        return json.loads(text)

    return change


# The readers.


def by_command(*arguments):
    def read(path, server):
        given = [str(path) if each == "FILE" else str(path.parent / each) for each in arguments]
        if "base.keras" in arguments:
            base().save(path.parent / "base.keras")
        if "other.safetensors" in arguments:
            keras_lora.save_adapter(keras_lora.apply_lora(base(), rank=2), path.parent / "other.safetensors")
        code = cli.main([arguments[0], *given[1:], *(["--rank=1"] if "compress" in arguments else [])])
        if code == 2:
            raise cli.Refused
        assert code in (0, 1)

    return read


def from_hub(path, server):
    files = [path] if path.is_file() else list(path.iterdir())
    server.files["owner/name"] = {"main": {each.name: each.read_bytes() for each in files}}
    if path.is_file():
        model = keras_lora.load_adapter(base(), f"hf://owner/name/{path.name}")
    else:
        model = from_peft(base(), "hf://owner/name", names={"first": "first"})
    assert not any("evil" in asked or ".bin" in asked for asked in server.asked)
    return model


READERS = {
    "adapter file": lambda path, server: keras_lora.load_adapter(base(), path),
    "PEFT folder": lambda path, server: from_peft(base(), path, names={"first": "first"}),
    ".lora.h5": lambda path, server: from_lora_h5(base(), path),
    ".keras": lambda path, server: keras.saving.load_model(path),
    ".h5": lambda path, server: keras.saving.load_model(path),
    "inspect": by_command("inspect", "FILE"),
    "diff": by_command("diff", "FILE", "other.safetensors"),
    "compress": by_command("compress", "FILE", "out.safetensors"),
    "merge": by_command("merge", "FILE", "other.safetensors", "out.keras"),
    "merge of it": by_command("merge", "base.keras", "FILE", "out.keras"),
    "hub": from_hub,
}

HDF5 = {
    "external storage": external,
    "virtual data set": virtual,
    "external link": external_link,
    "soft link": soft_link,
    "shape bomb": shape_bomb,
}


def rows():
    """Every mechanism with every reader that it can reach: name, what makes the file, reader, and whether it may be read."""
    for name, way in HDF5.items():
        yield name, lambda at, way=way: lora_h5(at, way(at)), ".lora.h5", False
        yield name, lambda at, way=way: keras_file(at, weights=way(at)), ".keras", False
        yield name, lambda at, way=way: plain_keras_file(at, weights=way(at)), "merge", False
        yield name, lambda at, way=way: h5(at, weights=way(at)), ".h5", False
    yield "hard links", lambda at: lora_h5(at, hard_links(at)), ".lora.h5", False
    yield "shape bomb in one piece", lambda at: lora_h5(at, shape_bomb_in_one_piece(at)), ".lora.h5", False
    for make in (bomb, bomb_of_lzma):
        for reader in ("inspect", "merge"):
            yield make.__name__.replace("_", " "), make, reader, False
    for name, call in CALLS.items():
        for place in PLACES:
            change = with_call(place, call)
            yield f"{name} as {place}", lambda at, change=change: keras_file(at, change), ".keras", False
            yield f"{name} as {place}", lambda at, change=change: h5(at, change), ".h5", False
        change = with_call("layer", call)
        yield f"{name} as layer", lambda at, change=change: plain_keras_file(at, config=change), "merge", False
    for name in ("../../outside", "/tmp/outside_of_keras_lora", "..\\outside"):
        yield f"a layer named {name}", lambda at, name=name: keras_file(at, layer_named(name)), ".keras", True
        yield f"a layer named {name}", lambda at, name=name: h5(at, layer_named(name)), ".h5", True
    for reader in (".keras", "inspect"):
        yield "archive traversal", traversing, reader, True
    evil = {"auto_map": {"base_model_class": "evil.run", "parent_library": "evil"}, "base_model_name_or_path": "../evil"}
    for reader in ("PEFT folder", "hub", "inspect"):
        yield "auto_map", lambda at: peft(at, **evil), reader, True
        yield "pickled adapter_model.bin", pickled_folder, reader, False
        yield "rank 1e9", lambda at: peft(at, r=10**9), reader, reader == "inspect"
    for name in (peft_folder.TENSORS, peft_folder.CONFIG):
        for reader in ("PEFT folder", "inspect"):
            yield f"link as {name}", link_in_folder(name), reader, False
    for reader in ("adapter file", "hub", "inspect", "diff", "compress", "merge of it"):
        yield "pickle", of_bytes("a.safetensors", Call.pickled), reader, False
        for rank in (10**9, 10**400):
            header = rank_in_header(rank) if rank < 10**300 else lambda found, rank=rank: {**found, "version": rank}
            reads = rank == 10**9 and reader in ("inspect", "diff")
            yield f"rank {len(str(rank))} digits", lambda at, header=header: adapter_file(at, header), reader, reads
        yield "scale of 400 digits", lambda at: adapter_file(at, rank_in_header(2, scale=10**400)), reader, False
        yield "a factor of rank 400,000", drawn, reader, reader in ("inspect", "diff")
        if reader != "hub":
            yield "link as file", link_as_file, reader, False
    yield "rank 1e9", lambda at: keras_file(at, with_rank(10**9)), ".keras", False
    yield "rank 1e9", lambda at: h5(at, with_rank(10**9)), ".h5", False


def parameters():
    for name, make, reader, reads in rows():
        what, _, place = name.rpartition(" as ")
        rare = what in CALLS and what not in FIRST and (reader == ".h5" or place != "base")
        yield pytest.param(name, make, reader, reads, id=f"{reader}-{name}", marks=[pytest.mark.nightly] if rare else [])


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """A folder to work in, a module `evil` that can be imported, and tools that note that they ran."""
    ran = []
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(os, "system", lambda *given: ran.append(given))
    monkeypatch.setitem(adapters.TABLE, "drawn", Drawn)
    (tmp_path / "in").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    yield tmp_path / "in"
    assert not ran
    assert "evil" not in sys.modules
    assert not list((tmp_path / "work").iterdir())
    assert not Path("/tmp/outside_of_keras_lora").exists()
    with pytest.raises(ValueError, match="lambda"):  # safe mode is on, as before
        keras.saving.deserialize_keras_object(CALLS["code of a Lambda"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "make", "reader", "reads"), list(parameters()))
def test_a_hostile_file(watched, hub, capsys, name, make, reader, reads):  # noqa: F811
    path = make(watched)
    before = set(watched.parent.rglob("*"))
    size = sum(each.stat().st_size for each in ([path] if path.is_file() else path.iterdir()))
    model, error = None, None
    tracemalloc.start()
    try:
        model = READERS[reader](path, hub)
    except BaseException as raised:
        error = raised
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert reads or error is not None
    if error is not None:
        assert isinstance(error, BY_KERAS if reader in (".keras", ".h5") else (cli.Refused, ValueError, OSError)), repr(
            error
        )
        assert str(SECRET) not in str(error)
    assert peak < 8 * size + ROOM
    printed = "".join(capsys.readouterr())
    assert "Traceback" not in printed
    assert str(SECRET) not in printed
    made = {each.name for each in set(watched.parent.rglob("*")) - before}
    assert {each for each in made if not each.startswith("out.")} <= {
        "base.keras",
        "other.safetensors",
        *made_by_hub(watched),
    }
    if isinstance(model, keras.layers.Layer):
        assert all(np.abs(value(each)).max(initial=0) < SECRET for each in model.variables)


def made_by_hub(watched):
    cache = watched.parent / "cache"
    return {each.name for each in cache.rglob("*")} | {"cache"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["adapter", "command", "peft", "lora_h5", "keras_facts", "load_adapter"])
def test_a_damaged_file_is_read_or_refused(tmp_path, monkeypatch, name):
    """A little of `make fuzz`, so that it cannot rot."""
    monkeypatch.setattr(compress, "show", compress.show)  # the reader silences it
    reader = fuzz.READERS[name](tmp_path)
    reader.read(reader.good[0])
    refused = 0
    for number in range(50):
        try:
            reader.read(reader.damaged(random.Random(f"2:{number}")))
        except reader.refusal:
            refused += 1
    assert 20 < refused <= 50
