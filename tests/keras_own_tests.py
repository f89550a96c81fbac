"""A pytest plugin: the tests that Keras ships for its layers, run against ours with an adapter that adds zero.

    cd tests
    KERAS_BACKEND=jax python -m pytest --noconftest -p conftest -p keras_own_tests -c /dev/null --rootdir=/ -q --speed=all

On JAX and TensorFlow `make test` takes the files in `EVERYWHERE`, on torch all. Paths of Keras's test files, or `-k`,
narrow it. `KERAS_OWN_TESTS_JSON` names a file
for the counts. Where a test says `layers.Dense` it gets `keras_lora.LoRADense`; a layer around cells or around other layers
is Keras's own, adapted by `apply_lora` right after its first `build`. What the tests then say about outputs, shapes, dtypes,
masks, states, errors, saving and training holds for adapted layers too, or is in `EXPLAINED`.
"""

import collections
import fnmatch
import functools
import json
import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "jax")
if os.environ["KERAS_BACKEND"] == "torch":
    import torch  # noqa: F401  # before TensorFlow: the other order crashes in one process

import keras
import pytest
from keras.src import layers as keras_layers
from keras.src.layers.rnn.conv_lstm import ConvLSTM, ConvLSTMCell
from keras.src.testing import TestCase

import keras_lora
from keras_lora.compat import keras_internals
from keras_lora.layers import TABLE
from keras_lora.swap.adapted import AdaptedLayer, adapted_maps, maps_by_address

FILES = {
    "core": ["dense", "einsum_dense", "embedding", "reversible_embedding"],
    "convolutional": ["conv", "conv_transpose", "depthwise_conv", "separable_conv"],
    "rnn": ["simple_rnn", "lstm", "gru", "rnn", "stacked_rnn_cells", "bidirectional", "time_distributed"]
    + ["conv_lstm", "conv_lstm1d", "conv_lstm2d", "conv_lstm3d"],
}
EVERYWHERE = ["dense_test", "embedding_test", "gru_test"]
_QUANTIZE = "Keras quantises layers of exactly its own classes and refuses any subclass: quantise first, then adapt"
_REFUSED = "an adapted layer refuses `enable_lora` and `quantize`, with the cure (tests/test_apply.py)"
#: Tests that are left out, by `file::pattern of the test's name`, and why.
EXPLAINED = {
    "*::test_*dense_quantize_[bci]*": _QUANTIZE,
    "*::test_*embedding_quantize_*": _QUANTIZE,
    "*::test_quantize_int_*": _QUANTIZE,
    "*::test_quantize_when_already_quantized_*": _QUANTIZE,
    "*::test_quantize_by_setting_dtype_policy_*": _QUANTIZE,
    "*::test_quantize_with_specific_equations_*": _QUANTIZE,
    "*::test_quantize_lora_integration_*": _QUANTIZE,
    "*::test_quantize_float8*": _QUANTIZE,
    "*::test_gptq_*": _QUANTIZE,
    "*::test_awq_*": _QUANTIZE,
    "*::test_int4_*": _QUANTIZE,
    "*::test_*_int[48]*_quantizer": _QUANTIZE,
    "dense_test::test_legacy_load_own_variables": "also loads gptq and awq weights; a layer of these has no kernel",
    "*::test_enable_lora*": _REFUSED,
    "*::test_lora_weight_name": _REFUSED,
    "*::test_lora_rank_argument": _REFUSED,
    "*::test_quantize_on_unbuilt_layer_*": _REFUSED,
    "*::test_quantize_on_subclass_*": _REFUSED,
}
#: Tests that take `layer.kernel` for a variable: they assign it, ask for its constraint or a gradient by it. Of an adapted
#: layer it is the tensor `W + ΔW`. For these alone our property is taken away, so that they run with Keras's own.
READ_THE_VARIABLE = [
    "conv_test::test_conv[123]d[0-9]",
    "conv_test::test_conv_constraints",
    "dense_test::test_dense_constraints",
    "dense_test::test_dense_sparse",
    "einsum_dense_test::test_einsum_dense_constraints",
    "embedding_test::test_embedding_constraints",
    "*embedding_test::test_correctness",
    "embedding_test::test_correctness_sparse",
    "embedding_test::test_weights_constructor_arg",
]


# The stand-ins.


def _default_maps(layer):
    return [linear for linear in maps_by_address(layer).values() if linear.by_default]


def _adapt(layer):
    found = len(adapted_maps(layer))
    if found < len(_default_maps(layer)):  # an `RNN` may be given a cell that is adapted already
        if found:  # of the two layers in a `Bidirectional`, one is the stand-in that it was given
            keras_lora.remove_lora(layer)
        keras_lora.apply_lora(layer, rank=1, targets="all-linear", head=None)


def _adapted_when_built(cls):
    """A class whose instances are Keras's own `cls`, adapted as soon as they are built."""

    def new(_, *args, **kwargs):
        layer = cls(*args, **kwargs)
        keras_internals.when_built(layer, lambda: _adapt(layer))
        return layer

    return type(cls.__name__, (cls,), {"__new__": new})


AROUND = ["SimpleRNN", "LSTM", "GRU", "RNN", "ConvLSTM1D", "ConvLSTM2D", "ConvLSTM3D", "Bidirectional", "TimeDistributed"]
STAND_INS = {
    **{each.base_class: each for each in TABLE},
    **{cls: _adapted_when_built(cls) for cls in [ConvLSTM, ConvLSTMCell, *(getattr(keras.layers, name) for name in AROUND)]},
}


def _put_stand_ins(module):
    for name, value in list(vars(module).items()):
        if isinstance(value, type) and value in STAND_INS:
            setattr(module, name, STAND_INS[value])


# What a plain layer has and an adapted one has not, by design: the base does not train, and there are more weights.


def _adapter_weights(layer):
    return [weight for _, adapter in adapted_maps(layer).values() for weight in adapter.weights]


@functools.wraps(TestCase.run_layer_test, assigned=["__doc__"])
def _run_layer_test(self, layer_cls, init_kwargs, _run=TestCase.run_layer_test, **kwargs):
    # Keras's counts are those of the plain layer. Dropped here, `run_layer_test` still compares the counts of layers that
    # were built in different ways; and below they are held to what the adapter adds.
    names = ("trainable_weights", "non_trainable_weights", "non_trainable_variables")
    expected = [kwargs.pop(f"expected_num_{name}", None) for name in names]
    if kwargs.get("expected_num_losses") is not None:  # a regularizer of a frozen weight adds no loss
        frozen = [name for name in init_kwargs if name.endswith("_regularizer") and name != "activity_regularizer"]
        kwargs["expected_num_losses"] -= sum(init_kwargs[name] is not None for name in frozen)
    made = []

    def recorded(**arguments):
        layer = layer_cls(**arguments)
        if arguments == init_kwargs:  # not the one of another dtype
            made.append(layer)
        return layer

    _run(self, recorded, init_kwargs, **kwargs)
    for layer in [each for each in made if each.built]:
        added = _adapter_weights(layer)
        self.assertLen(added, 3 * len(adapted_maps(layer)))  # two factors and the strength, which does not train
        assert len(adapted_maps(layer)) >= len(_default_maps(layer))
        assert {id(v) for v in layer.trainable_weights} == {id(v) for v in added if v.name != "strength"}
        if expected[0] is not None and expected[1] is not None:
            self.assertLen(layer.weights, sum(expected[:2]) + len(added))


def _set_weights(self, weights, _set=keras.layers.Layer.set_weights):
    """Takes the weights of the plain layer too, and then leaves the adapters' as they are."""
    added, given = {id(v) for v in _adapter_weights(self)}, iter(weights)
    if added and len(weights) == len(self.weights) - len(added):
        weights = [keras.ops.convert_to_numpy(v) if id(v) in added else next(given) for v in self.weights]
    _set(self, weights)


# The plugin.

_left_out: collections.Counter = collections.Counter()
_counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
_started: list = []


def pytest_configure(config):
    config.addinivalue_line("markers", "requires_trainable_backend: Keras's own marker")
    config.addinivalue_line("markers", "torch_first: as in pyproject.toml, which is not read here")
    if config.args_source is not config.ArgsSource.ARGS:
        root = pathlib.Path(keras_layers.__file__).parent
        config.args[:] = [str(root / folder / f"{name}_test.py") for folder, names in FILES.items() for name in names]
    AdaptedLayer.__init__.__kwdefaults__["rank"] = 1
    keras.layers.Layer.set_weights = _set_weights
    TestCase.run_layer_test = _run_layer_test
    build_for = keras_lora.LoRA.build_for
    keras_lora.LoRA.build_for = lambda self, linear: (_started.append(linear), build_for(self, linear))[1]
    _put_stand_ins(keras_layers)


@pytest.hookimpl(tryfirst=True)  # before conftest.py leaves out what is for another speed
def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.path.stem not in EVERYWHERE:
            item.add_marker(pytest.mark.torch_first)
    for module in {item.module for item in items}:
        _put_stand_ins(module)
    _adapt_cells_of_the_tests()
    kept = []
    for item in items:
        patterns = _matching(item, EXPLAINED)
        if patterns:
            _left_out[EXPLAINED[patterns[0]]] += 1
            _counts[item.path.stem]["left out"] += 1
        else:
            kept.append(item)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def _matching(item, patterns):
    name = f"{item.path.stem}::{item.name}"
    return [each for each in patterns if fnmatch.fnmatchcase(name, each)]


def _adapt_cells_of_the_tests():
    """The cells that Keras's tests of `RNN` write themselves, as a user would register them."""
    from keras.src.layers.rnn import rnn_test

    keras_lora.register_layer(rnn_test.OneStateRNNCell, kernels={"kernel": "io", "recurrent_kernel": "io"})
    kernels = {"kernel": "io", "recurrent_kernel_1": "io", "recurrent_kernel_2": "io"}
    keras_lora.register_layer(rnn_test.TwoStatesRNNCell, kernels=kernels)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    keras.utils.set_random_seed(0)
    _started.clear()
    found = []
    if _matching(item, READ_THE_VARIABLE):
        found = [(each, m.kernel_name) for each in TABLE for m in each.linear_maps if m.kernel_name in vars(each)]
    properties = {(cls, name): vars(cls)[name] for cls, name in found}
    for cls, name in properties:
        delattr(cls, name)
    try:
        return (yield)
    finally:
        for (cls, name), each in properties.items():
            setattr(cls, name, each)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.when == "call" or not report.passed:
        _counts[item.path.stem][report.outcome] += 1
        if report.when == "call" and report.passed and not _started:
            _counts[item.path.stem]["without an adapter"] += 1
        if report.when == "call" and report.passed and _matching(item, READ_THE_VARIABLE):
            _counts[item.path.stem]["with the stored kernel"] += 1
    return report


def pytest_terminal_summary(terminalreporter):
    say = terminalreporter.write_line
    say(f"\nKeras {keras.__version__}'s own tests, on {keras.backend.backend()}")
    for name, counts in sorted(_counts.items()):
        say(f"  {name}: " + ", ".join(f"{count} {what}" for what, count in sorted(counts.items())))
    if path := os.environ.get("KERAS_OWN_TESTS_JSON"):
        found = {"files": _counts, "left out": _left_out, "versions": {"keras": keras.__version__}}
        pathlib.Path(path).write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    ran = sum(counts["passed"] + counts["failed"] for counts in _counts.values())
    say(f"{ran} ran, {sum(_left_out.values())} were left out:")
    for reason, count in _left_out.most_common():
        say(f"  {count}: {reason}")
