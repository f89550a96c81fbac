"""Whatever is in an adapter file: it loads, or is refused with an error that says so, and nothing else happens."""

import copy
import json
import os
import struct
import sys
import tracemalloc

import keras
import numpy as np
import pytest
import safetensors.numpy
from helpers import once, value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import keras_lora
from keras_lora import adapters
from keras_lora.compat import keras_internals
from keras_lora.files import tensor_file
from keras_lora.swap.addresses import walk

pytestmark = once


def examples(number):
    healthy = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(derandomize=True, deadline=None, database=None, max_examples=number, suppress_health_check=healthy)


X = np.array([[0, 3, 6], [5, 5, 1]], "int32")
APPLY = {"adapter": keras_lora.LoRA(2, seed=1), "train": ["head", keras.layers.BatchNormalization], "bias": "lora_only"}


def base():
    x = keras.Input((3,), dtype="int32", name="ids")
    y = keras.layers.Embedding(7, 4, name="tokens")(x)
    y = keras.layers.BatchNormalization(name="norm")(keras.layers.Dense(5, name="dense")(y))
    model = keras.Model(x, keras.layers.Dense(2, name="head")(y), name="base")
    rng = np.random.default_rng(3)
    model.set_weights([np.abs(rng.normal(size=tuple(v.shape))).astype("float32") for v in model.weights])
    return model


def adapted():
    return keras_lora.apply_lora(base(), **APPLY, adapter_pattern={"tokens": keras_lora.TrainableTokens([5, 6])})


def state(model):
    flags = [
        (
            place.address,
            type(place.layer),
            place.layer.trainable,
            [v.trainable for v in keras_internals.own_variables(place.layer)],
        )
        for place in walk(model)
    ]
    return flags, [value(v).tobytes() for v in model.variables]


class Target:
    """Models that files are loaded into, one plain, one into its adapter, one beside its adapter; the folder of the file."""

    def __init__(self, folder):
        self.path = folder / "a.safetensors"
        self.makers = {"plain": base, "adapted": adapted, "beside": adapted}
        self.models = {name: make() for name, make in self.makers.items()}
        self.states = {name: state(model) for name, model in self.models.items()}
        self.outputs = self.outputs_now()
        keras_lora.save_adapter(self.models["adapted"], self.path)
        self.good = self.path.read_bytes()
        self.tensors = safetensors.numpy.load_file(self.path)
        with safetensors.safe_open(self.path, framework="numpy") as file:
            self.header = json.loads(file.metadata()[tensor_file.ENTRY])

    def outputs_now(self):
        return {name: value(model(X)).tobytes() for name, model in self.models.items()}

    def load(self, data):
        """Where `data` was loaded into a model, the error where it was refused."""
        self.path.write_bytes(data)
        results = []
        for name, make in self.makers.items():
            try:
                keras_lora.load_adapter(self.models[name], self.path, name="another" if name == "beside" else None)
            except ValueError as error:
                message = str(error)
                assert str(self.path) in message
                assert "not a whole adapter file" in message or "does not fit" in message or "format version" in message
                assert len(message) < 100_000
                assert state(self.models[name]) == self.states[name]
                results.append(message)
            else:
                self.models[name] = make()
                assert state(self.models[name]) == self.states[name]
                results.append("loaded")
            assert [each.name for each in self.path.parent.iterdir()] == ["a.safetensors"]
        return results

    def refused(self, data):
        results = self.load(data)
        assert "loaded" not in results
        return results

    def written(self, header, tensors=None):
        header = header if isinstance(header, str) else json.dumps(header)
        return safetensors.numpy.save(self.tensors if tensors is None else tensors, {tensor_file.ENTRY: header})


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return Target(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture(autouse=True)
def _same_outputs(target):
    yield
    assert target.outputs_now() == target.outputs


def raw(header, data=b"", length=None):
    """A safetensors file by hand."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def test_the_file_itself_loads(target):
    assert target.load(target.good) == ["loaded"] * 3


# Damage.


@examples(40)
@given(st.data())
def test_a_file_cut_off_anywhere_is_refused(target, data):
    target.refused(target.good[: data.draw(st.integers(0, len(target.good) - 1))])


@examples(80)
@given(st.data())
def test_flipped_bits_in_the_header_give_a_refusal_or_what_the_header_then_says(target, data):
    size = 8 + struct.unpack("<Q", target.good[:8])[0]
    content = bytearray(target.good)
    for place in data.draw(st.lists(st.integers(0, 8 * size - 1), min_size=1, max_size=4, unique=True)):
        content[place // 8] ^= 1 << place % 8
    target.load(bytes(content))


@examples(15)
@given(st.data())
def test_flipped_bits_in_the_data_load(target, data):
    start = 8 + struct.unpack("<Q", target.good[:8])[0]
    content = bytearray(target.good)
    for place in data.draw(st.lists(st.integers(8 * start, 8 * len(content) - 1), min_size=1, max_size=8, unique=True)):
        content[place // 8] ^= 1 << place % 8
    assert target.load(bytes(content)) == ["loaded"] * 3


@examples(40)
@given(st.data())
def test_a_tensor_of_another_shape_or_kind_is_refused_by_its_key(target, data):
    key = data.draw(st.sampled_from(sorted(target.tensors)))
    shape = tuple(data.draw(st.lists(st.integers(1, 9), max_size=4)))
    dtype = data.draw(st.sampled_from(["float32", "float16", "float64", "int32", "bool", "uint8"]))
    same = shape == target.tensors[key].shape and dtype.startswith("float")
    results = target.load(target.written(target.header, {**target.tensors, key: np.ones(shape, dtype)}))
    assert all((result == "loaded") == same and (same or key in result) for result in results)


FLOAT = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
RAW = {
    "nothing": b"",
    "a huge length": raw({}, length=2**63),
    "the largest length": raw({}, length=2**64 - 1),
    "a length of a gigabyte": raw({}, length=10**9),
    "no table": raw([]),
    "deep tables": raw(b'{"a":' * 100_000),
    "deep lists": raw(b"[" * 1_000_000),
    "metadata that are no words": raw({"__metadata__": {tensor_file.ENTRY: 1}}),
    "offsets that overlap": raw({"a": FLOAT, "b": FLOAT}, b"\0" * 8),
    "offsets with a gap": raw({"a": FLOAT, "b": {**FLOAT, "data_offsets": [16, 24]}}, b"\0" * 24),
    "offsets the wrong way": raw({"a": {**FLOAT, "data_offsets": [8, 0]}}, b"\0" * 8),
    "offsets past the end": raw({"a": {**FLOAT, "data_offsets": [0, 2**64 - 1]}}, b"\0" * 8),
    "a shape that overflows": raw({"a": {**FLOAT, "shape": [2**63, 2**63]}}, b"\0" * 8),
    "a negative shape": raw({"a": {**FLOAT, "shape": [-2]}}, b"\0" * 8),
    "bytes that nothing names": raw({"a": FLOAT}, b"\0" * 100),
    "not UTF-8": raw(b"\xff\xfe{}"),
}


@pytest.mark.parametrize("name", RAW)
def test_a_file_that_is_no_safetensors_file_is_refused(target, name):
    target.refused(RAW[name])


DTYPES = {"BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8, "F4": 1}
SHAPES = [([0], 0), ([0, 10**12], 0), ([10**12, 0], 0), ([1] * 100, 4)]


@pytest.mark.parametrize(
    ("dtype", "shape", "size"),
    [*((dtype, [1], size) for dtype, size in DTYPES.items()), *(("F32", *each) for each in SHAPES)],
)
def test_a_tensor_that_no_save_writes_is_refused(target, dtype, shape, size):
    entry = json.dumps(target.header)
    tensors, data = {}, b""
    for key, tensor in target.tensors.items():
        kind, sizes, content = "F32", list(tensor.shape), tensor.tobytes()
        if key == "layers/1:lora_a":
            kind, sizes, content = dtype, shape, b"\0" * size
        tensors[key] = {"dtype": kind, "shape": sizes, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    target.refused(raw({"__metadata__": {tensor_file.ENTRY: entry}, **tensors}, data))


# Hostile metadata.

LAMBDA = {"class_name": "__lambda__", "config": {"value": "4wEAAAAAAAAAAAAAAAA="}}
CALLS = [
    {"module": "os", "class_name": "system", "config": {"command": "touch ran"}, "registered_name": None},
    {"module": "evil", "class_name": "run", "config": {}, "registered_name": None},
    {"module": "builtins", "class_name": "function", "config": "evil.run", "registered_name": "function"},
    {"module": "evil", "class_name": "function", "config": "run", "registered_name": "function"},
    {"class_name": "keras_lora>LoRA", "config": {}},
    "os.system",
    "evil.run",
    "keras_lora>LoRA",
    LAMBDA,
]
JUNK = [
    *CALLS,
    *(None, True, False, 0, -1, 2, 10**12, 10**400, 1.5, 1e308, float("nan"), float("inf"), -float("inf")),
    *("", "\0", "x\0y", "../../x", "/etc/passwd", "__class__", "__dict__", "layers", "ключ 🔑", "\ud800", "a" * 5000),
    *([], {}, [[]], [None], [{}], [10**12], ["a"], {"a": 1}, {"": {}}),
]
NESTED = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def paths_in(table, path=()):
    yield path
    for key in table if isinstance(table, dict) else range(len(table)) if isinstance(table, list) else ():
        yield from paths_in(table[key], (*path, key))


def replaced(header, path, new):
    if not path:
        return new
    header = copy.deepcopy(header)
    place = header
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = new
    return header


def at(header, path):
    for key in path:
        header = header[key]
    return header


def is_allowed(header, path, new):
    """Whether a header with `new` at `path` is one that some save writes for these tensors."""
    if path == ("version",):
        return new == 1 and type(new) is int
    if path in [("base_structure",), ("base_weights",)]:
        return isinstance(new, str)
    if path[-1:] == ("freeze_a",):
        return isinstance(new, bool)
    if path[-2:-1] == ("tokens",):
        return type(new) is int and 0 <= new < 7
    if path[-1:] == ("dropout",):
        return type(new) in (int, float) and 0 <= new < 1
    return path != () and at(header, path) == new and type(at(header, path)) is type(new)


@examples(120)
@given(st.data())
def test_a_value_of_the_header_replaced_by_anything_is_refused(target, data):
    path = data.draw(st.sampled_from(list(paths_in(target.header))))
    new = data.draw(st.sampled_from(JUNK) | NESTED)
    results = target.load(target.written(replaced(target.header, path, new)))
    assert all(result != "loaded" or is_allowed(target.header, path, new) for result in results), (path, new)


@pytest.mark.full
def test_every_part_of_the_header_replaced_by_every_wrong_kind_is_refused(target):
    for path in paths_in(target.header):
        for new in (None, [], "x", -1, True, CALLS[0]):
            if not is_allowed(target.header, path, new):
                target.refused(target.written(replaced(target.header, path, new)))


ENTRIES = {
    "deep lists": "[" * 100_000,
    "deep lists in a config": '{"version": 2, "adapters": ' + "[" * 900 + "]" * 900 + "}",
    "a deep version": '{"version": ' + "[" * 900 + "]" * 900 + "}",
    "many digits": '{"version": ' + "1" * 100_000 + "}",
    "ten megabytes": '{"version": 2, "adapters": {"' + "a" * 10_000_000 + '": {}}}',
    "a key twice": '{"version": 2, "version": 2, "adapters": {}, "trained": {}, "base_structure": ""}',
    "no table": "5",
    "no JSON": "import os",
    "nothing": "",
    "nothing in it": '{"version": 2, "adapters": {}, "trained": {}, "base_structure": ""}',
    "a pickle": "cos\nsystem\n(S'touch ran'\ntR.",
}


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_that_is_no_header_is_refused(target, name):
    target.refused(target.written(ENTRIES[name]))


def test_a_thousand_adapters_that_are_not_there_are_refused_at_once(target):
    entry = target.header["adapters"]["layers/1"]
    header = {**target.header, "adapters": {f"x/{index}": entry for index in range(1000)}}
    assert all("no layer at 'x/999'" in message for message in target.refused(target.written(header)))


@pytest.mark.parametrize("part", ["adapters", "trained"])
@pytest.mark.parametrize(
    "address",
    ["../../x", "/etc/passwd", "__class__", "", "layers", "layers/1/adapter", "layers/-1", "layers/1/", "a\0b", "é"],
)
def test_an_address_is_only_looked_up(target, part, address):
    table = dict(target.header[part])
    table[address] = table.pop("layers/1")
    tensors = {key.replace("layers/1:", f"{address}:"): tensor for key, tensor in target.tensors.items()}
    target.refused(target.written({**target.header, part: table}))
    target.refused(target.written({**target.header, part: table}, tensors))


@pytest.mark.parametrize("kind", ["Functional", "LoRA", "InputLayer", "Embedding"])
def test_nothing_that_has_no_own_variables_to_train_is_marked(target, kind):
    trained = {**target.header["trained"], "": {"class": kind, "plan": [True, []], "shapes": []}}
    target.refused(target.written({**target.header, "trained": trained}))


def test_the_weights_of_another_adapter_are_no_base_variables(target):
    lora = {"class": "LoRA", "plan": [True, [True, True]], "shapes": [[4, 2], [2, 5], []]}
    tensors = {"0.lora_a": np.ones((4, 2)), "1.lora_b": np.ones((2, 5)), "2.strength": np.ones(())}
    tensors = {f"layers/1/adapter:base.{name}": tensor.astype("float32") for name, tensor in tensors.items()}
    header = {**target.header, "trained": {**target.header["trained"], "layers/1/adapter": lora}}
    target.refused(target.written(header, {**target.tensors, **tensors}))


def test_a_method_that_does_not_fit_the_kernel_is_listed(target):
    tokens = {**target.header["adapters"]["layers/0"], "config": {"tokens": [5, 7]}}
    header = {**target.header, "adapters": {**target.header["adapters"], "layers/0": tokens}}
    assert "names row 7 of an embedding with 7 rows" in target.refused(target.written(header))[0]


# Nothing runs, and no memory is taken.


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A module `evil` that can be imported, and notes it; so does `os.system`."""
    ran = []
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(os, "system", lambda *given, **named: ran.append((given, named)))
    yield
    assert not ran
    assert "evil" not in sys.modules


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_a_config_cannot_name_what_is_called(target, evil, call):
    of_start = ("a_initializer", "b_initializer", "name", "dtype", "trainable", "seed", "activity_regularizer", "autocast")
    for key in ("rank", "alpha", "rank_stabilized", "freeze_a", "dropout", "adapter", "tokens", *of_start):
        for address in ("layers/0", "layers/1"):
            config = {**target.header["adapters"][address]["config"], key: call}
            target.refused(target.written(replaced(target.header, ("adapters", address, "config"), config)))


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_an_argument_of_a_method_cannot_name_what_is_called(evil, call):
    for arguments in ({"a_initializer": call}, {"b_initializer": call}):
        if "keras_lora>LoRA" in str(call):
            continue  # a class that is entered with Keras, and does nothing
        with pytest.raises((ValueError, TypeError)):
            adapters.get("lora", **arguments)


@pytest.mark.parametrize("rank", [10**6, 10**12, 10**300, 10**400], ids=["1e6", "1e12", "1e300", "1e400"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_huge_rank_takes_no_memory(target, method, rank):
    entry = {**target.header["adapters"]["layers/1"], "method": method}
    entry["config"] = {**entry["config"], "rank": rank}
    entry["scale"] = 16 / rank if rank < 10**308 else 0.0
    header = {**target.header, "adapters": {**target.header["adapters"], "layers/1": entry}}
    tracemalloc.start()
    try:
        target.refused(target.written(header))
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


def test_a_long_tensor_with_a_short_axis_is_not_filled_up(target):
    tensors = {**target.tensors, "layers/1:lora_a": np.ones((200_000, 1), "float32")}
    entry = {**target.header["adapters"]["layers/1"], "scale": 16.0}
    entry["config"] = {**entry["config"], "rank": 1}
    header = {**target.header, "adapters": {**target.header["adapters"], "layers/1": entry}}
    assert all(
        "'layers/1:lora_a' has shape (200000, 1)" in message for message in target.refused(target.written(header, tensors))
    )


def test_a_folder_or_a_pickle_in_the_place_of_a_file_is_refused(tmp_path):
    model = base()
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "pickle.safetensors").write_bytes(b"\x80\x04cos\nsystem\n(S'touch ran'\ntR.")
    for name in ("folder", "pickle"):
        with pytest.raises(ValueError, match="not a whole adapter file"):
            keras_lora.load_adapter(model, tmp_path / f"{name}.safetensors")
    with pytest.raises(FileNotFoundError):
        keras_lora.load_adapter(model, tmp_path / "none.safetensors")
