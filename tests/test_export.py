"""`model.export`: what Keras writes of an adapted and of a merged model runs without keras_lora, as `predict` does.

What Keras cannot export of a plain model is here too, each with its reason, so that we notice when that changes.
"""

import importlib.util
import os
import subprocess
import sys
import warnings

import keras
import numpy as np
import pytest
from helpers import perturb
from keras import layers

import keras_lora

HERE = keras.backend.backend()
BATCHES = (2, 5)
TOLERANCE = 1e-5

ENDING = {"tf_saved_model": "", "onnx": ".onnx", "openvino": ".xml", "litert": ".tflite", "torch": ".pt2"}
#: The packages that write a format, and those that run it.
NEEDS = {
    "tf_saved_model": ["tensorflow"],
    "onnx": ["onnx", "onnxruntime", *{"tensorflow": ["tf2onnx"], "jax": ["jax2onnx", "flax"], "torch": []}[HERE]],
    "openvino": ["openvino"],
    "litert": ["tensorflow", *(["litert_torch", "ai_edge_litert"] if HERE == "torch" else [])],
    "torch": ["torch"],
}
WORKS = {
    "tensorflow": ["tf_saved_model", "onnx", "openvino", "litert"],
    "jax": ["tf_saved_model", "onnx"],
    "torch": ["onnx", "openvino", "torch"],
}[HERE]
#: Slow to convert or to import, and run by `make test` as another format or on another backend.
NIGHTLY = {"tensorflow": ["litert"], "jax": [], "torch": ["openvino"]}[HERE]
#: What Keras cannot do with any model here: a word of its error, and the reason.
KERAS_CANNOT = {
    "tensorflow": {"torch": ("requires PyTorch backend", "an ExportedProgram is traced by torch")},
    "jax": {
        "openvino": ("XlaCallModule", "Keras asks jax2tf for TensorFlow operations, which it no longer writes"),
        "litert": ("requires TensorFlow or PyTorch backend", "LiteRT is converted from TensorFlow or torch"),
        "torch": ("requires PyTorch backend", "an ExportedProgram is traced by torch"),
    },
    "torch": {
        "tf_saved_model": (
            "mismatch between the structure",
            "Keras gives torch.export the dynamic shapes one level too high",
        )
    },
}[HERE]

#: Runs exported files, each in the runtime of its format: `python -c RUN format folder`, where `folder/name` is a file and
#: `folder/name.in.npz` its inputs. It writes `folder/name.out.npz` or `folder/name.error`.
RUN = """
import pathlib
import sys
import traceback

import numpy as np

sys.modules["keras_lora"] = None  # an import would fail
kind, folder = sys.argv[1], pathlib.Path(sys.argv[2])
if kind in ("tf_saved_model", "litert"):
    import tensorflow as tf


def runner(path):
    if kind == "tf_saved_model":
        loaded = tf.saved_model.load(path)
        return lambda x: loaded.serve(x).numpy()
    if kind == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda x: session.run(None, {session.get_inputs()[0].name: x})[0]
    if kind == "openvino":
        import openvino

        compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return lambda x: compiled(x)[0]
    if kind == "torch":
        import torch

        module = torch.export.load(path).module()
        return lambda x: module(torch.from_numpy(x)).detach().numpy()
    interpreter = tf.lite.Interpreter(model_path=path)
    (entry,), (exit_,) = interpreter.get_input_details(), interpreter.get_output_details()

    def run(x):
        interpreter.resize_tensor_input(entry["index"], x.shape)
        interpreter.allocate_tensors()
        interpreter.set_tensor(entry["index"], x)
        interpreter.invoke()
        return interpreter.get_tensor(exit_["index"])

    return run


for given in folder.glob("*.in.npz"):
    path = str(given).removesuffix(".in.npz")
    try:
        run = runner(path)
        np.savez(path + ".out.npz", **{batch: run(x) for batch, x in np.load(given).items()})
    except Exception:
        pathlib.Path(path + ".error").write_text(traceback.format_exc())
"""


def dense():
    model = keras.Sequential(
        [keras.Input((8,)), *(layers.Dense(n, activation="relu", name=f"dense_{n}") for n in (16, 12, 3))]
    )
    return model, {"adapter_pattern": {"dense_12": "dora"}}


def attention():
    tokens = keras.Input((6,), dtype="int32", name="tokens")
    x = layers.Embedding(20, 8, name="embedding")(tokens)
    x = layers.MultiHeadAttention(2, 4, name="attention")(x, x)
    x = layers.Dense(3, name="head")(layers.GlobalAveragePooling1D()(x))
    return keras.Model(tokens, x), {"targets": ["embedding", "attention", "head"]}


def prepared(make, state):
    """A model in one of the states, with adapters that do something, and called: Keras asks for that."""
    model, how = make()
    if state != "plain":
        keras_lora.apply_lora(model, rank=2, head=None, base_dtype="nf4" if state == "nf4" else None, **how)
        perturb(model)
    if state == "merged":
        keras_lora.merge_lora(model)
    model(inputs(model, 1))
    return model


def inputs(model, batch):
    rng = np.random.default_rng(batch)
    entry = model.inputs[0]
    shape = (batch, *entry.shape[1:])
    return rng.integers(0, 20, shape).astype("int32") if entry.dtype == "int32" else rng.normal(size=shape).astype("float32")


def export(model, kind, path, **kwargs):
    if kind == "torch" and HERE == "torch":
        import torch

        kwargs["dynamic_shapes"] = {0: torch.export.Dim("batch", min=1, max=64)}  # without it the batch is 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the converters
        model.export(path, format=kind, verbose=False, **kwargs)


def need(kind):
    missing = [name for name in NEEDS[kind] if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"`export(format={kind!r})` on {HERE} needs {', '.join(missing)}, not installed")


def write(model, kind, path, batches=BATCHES, **kwargs):
    """Export to `path`, with inputs for `RUN`, and give what is expected of them; or the error of the export."""
    expected = {batch: model.predict(inputs(model, batch), verbose=0) for batch in batches}
    try:
        export(model, kind, str(path), **kwargs)
    except Exception as error:
        return error
    np.savez(f"{path}.in.npz", **{str(batch): inputs(model, batch) for batch in batches})
    return expected


def run_all(kind, folder):
    """Run the files of a folder in one new process."""
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    subprocess.run([sys.executable, "-c", RUN, kind, folder], env=environment, check=True)


def check(path, expected):
    """What came out of `run_all` is what `write` expected."""
    if isinstance(expected, Exception):
        raise expected
    error = path.with_name(path.name + ".error")
    assert not error.exists(), error.read_text()
    got = np.load(f"{path}.out.npz")
    for batch, each in expected.items():
        assert got[str(batch)].shape == each.shape
        assert np.abs(got[str(batch)] - each).max() <= TOLERANCE * np.abs(each).max()


EXPORTED = "test_an_exported_model_runs_without_keras_lora"


@pytest.fixture(
    scope="module", params=[pytest.param(kind, marks=pytest.mark.nightly) if kind in NIGHTLY else kind for kind in WORKS]
)
def exported(request, tmp_path_factory):
    """A format, the folder of its files, and what is expected of each."""
    kind = request.param
    need(kind)
    folder, expected = tmp_path_factory.mktemp(kind), {}
    asked = [item.callspec.params for item in request.session.items if item.originalname == EXPORTED]
    for make, state in dict.fromkeys((each["make"], each["state"]) for each in asked):
        keras.utils.set_random_seed(0)
        name = f"{make.__name__}_{state}{ENDING[kind]}"
        expected[name] = write(prepared(make, state), kind, folder / name)
    run_all(kind, folder)
    return kind, folder, expected


#: What has no operation for a base in NF4 (docs/exporting.md).
NF4_CANNOT = {
    "tensorflow": [("litert", dense), ("litert", attention)],
    "jax": [],
    "torch": [("onnx", attention), ("openvino", attention)],
}[HERE]
STATES = [
    "adapted",
    pytest.param("merged", marks=pytest.mark.torch_first),
    pytest.param("nf4", marks=pytest.mark.nightly),
]


@pytest.mark.full
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("make", [dense, pytest.param(attention, marks=pytest.mark.torch_first)])
def test_an_exported_model_runs_without_keras_lora(exported, make, state):
    kind, folder, expected = exported
    name = f"{make.__name__}_{state}{ENDING[kind]}"
    if state == "nf4" and (kind, make) in NF4_CANNOT:
        assert isinstance(expected[name], Exception) or (folder / f"{name}.error").exists(), "now it can: say so on the page"
        return
    check(folder / name, expected[name])


@pytest.mark.nightly
@pytest.mark.parametrize("kind", KERAS_CANNOT)
def test_what_keras_cannot_export_of_a_plain_model_either(tmp_path, kind):
    need(kind)
    word, reason = KERAS_CANNOT[kind]
    print(f"Keras could not, because {reason}. Once it can, {kind!r} belongs into WORKS.")
    for state in ("plain", "adapted", "merged"):
        model = prepared(dense, state)
        with pytest.raises(Exception, match=word):  # of many classes, of Keras and of the converters
            export(model, kind, str(tmp_path / f"{state}{ENDING[kind]}"))


@pytest.mark.skipif(HERE != "torch", reason="only on torch LiteRT takes one batch size")
@pytest.mark.parametrize("state", ["adapted", "merged"])
def test_litert_on_torch_runs_with_the_batch_it_was_exported_for(tmp_path, state):
    need("litert")
    model = prepared(dense, state)
    path = tmp_path / "model.tflite"
    signature = [keras.InputSpec(shape=(2, 8), dtype="float32")]
    expected = write(model, "litert", path, batches=(2,), input_signature=signature)
    run_all("litert", tmp_path)
    check(path, expected)


@pytest.mark.skipif(HERE != "tensorflow", reason="only TensorFlow has the operation")
@pytest.mark.parametrize("state", ["plain", "adapted", "merged"])
def test_onnx_has_no_exact_gelu_on_tensorflow(tmp_path, state):
    """tf2onnx leaves TensorFlow's `Erfc` in the file, which no runtime knows. `gelu` with `approximate=True` has none."""
    need("onnx")
    import onnxruntime

    def gelu():
        return keras.Sequential([keras.Input((8,)), layers.Dense(16, activation="gelu"), layers.Dense(3)]), {}

    path = str(tmp_path / "model.onnx")
    export(prepared(gelu, state), "onnx", path)
    with pytest.raises(Exception, match="Erfc"):
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
