"""The law, for every layer type and every method: what runs equals the definition.

    adapted_output(x, apply(x, W)) == apply(x, W + delta_kernel(W))

The right side is computed with a plain Keras layer that holds the merged kernels, so that nothing of ours is on it but the
definition itself; `test_adapters.py` holds the definitions to NumPy.
"""

import copy
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import pytest
from helpers import covering, difference, gradients, once, perturb, value
from keras import layers, ops

import keras_lora
from keras_lora.adapters import TABLE
from keras_lora.layers import TABLE as LAYERS
from keras_lora.layers.changed_kernel import ChangedKernelLayer
from keras_lora.linear_map import view_of
from keras_lora.swap.adapted import adapted_class, adapted_maps, maps_by_address

NUMBERS = np.random.default_rng(0)
METHODS = {
    "adalora": lambda: keras_lora.AdaLoRA(rank=2),
    "dora": lambda: keras_lora.DoRA(rank=2),
    "dora_fa": lambda: keras_lora.DoRA(rank=2, freeze_a=True, a_initializer="random_normal"),
    "ia3": lambda: keras_lora.IA3(),
    "ia3_inputs": lambda: keras_lora.IA3(side="inputs"),
    "loha": lambda: keras_lora.LoHa(rank=2),
    "lokr": lambda: keras_lora.LoKr(rank=2, factor=2),
    "lora": lambda: keras_lora.LoRA(rank=2),
    "lora_fa": lambda: keras_lora.LoRA(rank=2, freeze_a=True, a_initializer="random_normal"),
    "lora_kept": lambda: keras_lora.LoRA(rank=2, kept=3),
    "miss": lambda: keras_lora.MiSS(rank=2),
    "oft": lambda: keras_lora.OFT(block_size=4),
    "trainable_tokens": lambda: keras_lora.TrainableTokens([1, 4]),
    "vera": lambda: keras_lora.VeRA(rank=5, d_initial=0.5),
}


def numbers(*shape):
    return NUMBERS.normal(size=shape).astype("float32")


def ids(*shape):
    return NUMBERS.integers(0, 11, size=shape).astype("int32")


def convolutions():
    """Every option of a convolution that the matrix must inherit."""
    first, last = {"data_format": "channels_first"}, {"data_format": "channels_last"}
    yield "conv1d", layers.Conv1D(6, 3, **last), numbers(2, 9, 4)
    yield "conv1d_causal_dilated", layers.Conv1D(6, 3, padding="causal", dilation_rate=2, **last), numbers(2, 9, 4)
    yield "conv1d_grouped", layers.Conv1D(6, 3, groups=2, activation="relu", **last), numbers(2, 9, 4)
    yield "conv2d", layers.Conv2D(6, 3, activation="relu", **last), numbers(2, 8, 7, 4)
    yield "conv2d_strided_same", layers.Conv2D(6, (3, 2), strides=(2, 1), padding="same", **last), numbers(2, 8, 7, 4)
    yield "conv2d_dilated", layers.Conv2D(6, 3, dilation_rate=(2, 1), padding="same", **last), numbers(2, 8, 7, 4)
    yield "conv2d_grouped", layers.Conv2D(6, 3, groups=2, **last), numbers(2, 8, 7, 4)
    yield "conv2d_one_by_one", layers.Conv2D(6, 1, use_bias=False, **last), numbers(2, 8, 7, 4)
    yield "conv3d", layers.Conv3D(4, 2, strides=2, padding="same", **last), numbers(2, 5, 4, 5, 2)
    yield "conv1d_channels_first", layers.Conv1D(6, 3, activation="relu", **first), numbers(2, 4, 9)
    yield "conv2d_channels_first", layers.Conv2D(6, 3, strides=2, padding="same", **first), numbers(2, 4, 8, 7)
    yield "conv2d_channels_first_grouped", layers.Conv2D(6, 3, groups=2, **first), numbers(2, 4, 8, 7)
    yield "conv3d_channels_first", layers.Conv3D(4, 2, **first), numbers(2, 2, 5, 4, 5)


def einsums():
    """The equations of Keras's and KerasHub's attention and feed-forward layers, experts, and odd orders of axes."""
    for name, equation, shape, x, bias in [
        ("query", "abc,cde->abde", (None, 3, 4), (2, 5, 6), "de"),
        ("output", "abcd,cde->abe", (None, 6), (2, 5, 3, 4), "e"),
        ("llama_query", "bqm,muh->bquh", (None, 3, 4), (2, 5, 6), None),
        ("llama_output", "bquh,uhm->bqm", (None, 6), (2, 5, 3, 4), None),
        ("gemma_query", "btd,ndh->btnh", (None, 3, 4), (2, 5, 6), None),
        ("gemma_output", "btnh,nhd->btd", (None, 6), (2, 5, 3, 4), None),
        ("feed_forward", "...x,xy->...y", (7,), (2, 5, 6), "y"),
        ("feed_forward_ellipsis_with_two_axes", "...x,xyz->...yz", (7, 3), (2, 4, 5, 6), "z"),
        ("output_axes_in_another_order", "abc,cde->adbe", (3, None, 4), (2, 5, 6), None),
        ("output_axes_exchanged", "abc,cde->aebd", (4, None, 3), (2, 5, 6), None),
        ("experts", "ebd,edh->ebh", (None, 7), (3, 5, 6), None),
        ("experts_inside", "bed,hed->bhe", (7, 3), (2, 3, 6), None),
        ("per_head", "btnh,nhk->btnk", (None, 3, 4), (2, 5, 3, 6), "nk"),
    ]:
        yield f"einsum_{name}", layers.EinsumDense(equation, shape, bias_axes=bias, activation="tanh"), numbers(*x)


def transposed_convolutions():
    first, last = {"data_format": "channels_first"}, {"data_format": "channels_last"}
    yield "conv1d_transpose", layers.Conv1DTranspose(6, 3, strides=2, **last), numbers(2, 5, 4)
    yield (
        "conv2d_transpose",
        layers.Conv2DTranspose(6, (3, 2), strides=2, padding="same", activation="relu", **last),
        numbers(2, 5, 4, 4),
    )
    yield (
        "conv2d_transpose_output_padding",
        layers.Conv2DTranspose(6, 3, strides=2, output_padding=1, **last),
        numbers(2, 5, 4, 4),
    )
    yield (
        "conv2d_transpose_dilated",
        layers.Conv2DTranspose(6, 3, dilation_rate=2, use_bias=False, **last),
        numbers(2, 5, 4, 4),
    )
    yield "conv3d_transpose", layers.Conv3DTranspose(4, 2, strides=2, **last), numbers(2, 3, 3, 3, 2)
    yield "conv1d_transpose_channels_first", layers.Conv1DTranspose(6, 3, **first), numbers(2, 4, 5)
    yield "conv2d_transpose_channels_first", layers.Conv2DTranspose(6, 3, strides=2, **first), numbers(2, 4, 5, 4)


def depthwise_and_separable_convolutions():
    first, last = {"data_format": "channels_first"}, {"data_format": "channels_last"}
    yield "depthwise1d", layers.DepthwiseConv1D(3, padding="same", activation="relu", **last), numbers(2, 9, 4)
    yield "depthwise2d", layers.DepthwiseConv2D(3, strides=2, depth_multiplier=2, **last), numbers(2, 8, 7, 4)
    yield "depthwise2d_dilated", layers.DepthwiseConv2D(3, dilation_rate=2, use_bias=False, **last), numbers(2, 8, 7, 4)
    yield "depthwise2d_channels_first", layers.DepthwiseConv2D(3, depth_multiplier=2, **first), numbers(2, 4, 8, 7)
    yield "separable1d", layers.SeparableConv1D(6, 3, strides=2, padding="same", **last), numbers(2, 9, 4)
    yield "separable2d", layers.SeparableConv2D(6, 3, depth_multiplier=2, activation="relu", **last), numbers(2, 8, 7, 4)
    yield "separable2d_dilated", layers.SeparableConv2D(6, 3, dilation_rate=2, padding="same", **last), numbers(2, 8, 7, 4)
    yield "separable2d_strided", layers.SeparableConv2D(6, 3, strides=2, use_bias=False, **last), numbers(2, 8, 7, 4)
    yield "separable2d_channels_first", layers.SeparableConv2D(6, 3, **first), numbers(2, 4, 8, 7)


def recurrent():
    """The recurrent layers, by the options that change which code runs; `Bidirectional` and stacks of cells around them."""
    x, mask = numbers(2, 5, 3), np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], "bool")
    for cls in (layers.LSTM, layers.GRU, layers.SimpleRNN):
        name = cls.__name__.lower()
        yield name, cls(4), x
        yield f"{name}_sequences_and_state", cls(4, return_sequences=True, return_state=True), x
        yield f"{name}_masked", cls(4), x, {"mask": mask}
        yield f"{name}_backwards", cls(4, go_backwards=True, return_sequences=True, use_bias=False), x
        yield f"{name}_unrolled", cls(4, unroll=True), x
        yield f"{name}_mixed_bfloat16", cls(4, dtype="mixed_bfloat16"), x
    yield "lstm_implementation_1", layers.LSTM(4, implementation=1), x
    yield "gru_reset_before", layers.GRU(4, reset_after=False), x
    yield "gru_implementation_1", layers.GRU(4, implementation=1), x
    yield "rnn_of_a_cell", layers.RNN(layers.GRUCell(4), return_sequences=True), x
    yield "rnn_of_stacked_cells", layers.RNN(layers.StackedRNNCells([layers.LSTMCell(4), layers.SimpleRNNCell(3)])), x
    yield "bidirectional", layers.Bidirectional(layers.LSTM(4, return_sequences=True)), x, {"mask": mask}
    yield "conv_lstm1d", layers.ConvLSTM1D(4, 3, data_format="channels_last"), numbers(2, 3, 7, 2)
    yield "conv_lstm2d", layers.ConvLSTM2D(4, 3, padding="same", return_sequences=True), numbers(2, 3, 5, 5, 2)
    yield "conv_lstm3d", layers.ConvLSTM3D(2, 2), numbers(1, 2, 3, 3, 3, 2)
    for cls in (layers.LSTMCell, layers.GRUCell, layers.SimpleRNNCell):
        states = [numbers(2, 4), numbers(2, 4)][: 2 if cls is layers.LSTMCell else 1]
        yield cls.__name__.lower(), cls(4), numbers(2, 3), {"states": states}


def embeddings():
    yield "embedding", layers.Embedding(11, 6), ids(2, 5)
    yield "embedding_masked", layers.Embedding(11, 6, mask_zero=True), ids(2, 5)
    for name, arguments in {"": {}, "_capped": {"logit_soft_cap": 2.0}, "_untied": {"tie_weights": False}}.items():
        yield f"reversible_embedding{name}", layers.ReversibleEmbedding(11, 6, **arguments), ids(2, 5)
        yield (
            f"reversible_embedding{name}_reverse",
            layers.ReversibleEmbedding(11, 6, **arguments),
            numbers(2, 5, 6),
            {"reverse": True},
        )
    yield (
        "reversible_embedding_in_float32_reverse",
        layers.ReversibleEmbedding(11, 6, reverse_dtype="float32", dtype="mixed_bfloat16"),
        numbers(2, 5, 6),
        {"reverse": True},
    )


@keras.saving.register_keras_serializable("law")
class Experts(layers.Layer):
    """Two experts' worth of kernels, each used in one einsum, as KerasHub's banks of experts are written."""

    def build(self, shape):
        self.up = self.add_weight(shape=(2, shape[-1], 4), name="up")
        self.down = self.add_weight(shape=(2, 4, shape[-1]), name="down")

    def call(self, x):
        hidden = ops.tanh(ops.einsum("th,ehm->etm", x, ops.cast(self.up, x.dtype)))
        return ops.einsum("eti,eih->eth", hidden, self.down)


@keras.saving.register_keras_serializable("law")
class Bilinear(layers.Layer):
    """A kernel of three axes in code that only the layer knows, and a parent that we know and that must not be guessed."""

    def build(self, shape):
        self.w = self.add_weight(shape=(shape[-1], 3, shape[-1]), name="w")

    def call(self, x):
        return ops.einsum("bi,ioj,bj->bo", x, self.w, x)


@keras.saving.register_keras_serializable("law")
class ScaledDense(layers.Dense):
    """Computes what Dense does, and then scales: only its `call` says so, so it is registered by its kernel."""

    def call(self, inputs, training=None):
        return 2.0 * super().call(inputs)


@keras.saving.register_keras_serializable("law")
class NamedDense(layers.Dense):
    """Computes what Dense does."""


keras_lora.register_layer(Experts, kernels={"up": "gio", "down": "gio"}, factored=True)
keras_lora.register_layer(Bilinear, kernels={"w": "ioi"})
keras_lora.register_layer(ScaledDense, kernels={"_kernel": "io"})
keras_lora.register_layer(NamedDense, like=layers.Dense)


def rest():
    yield "dense", layers.Dense(5, activation="relu"), numbers(3, 6)
    yield "dense_without_bias", layers.Dense(5, use_bias=False), numbers(3, 6)
    yield "dense_with_a_layer_as_activation", layers.Dense(5, activation=layers.LeakyReLU(0.3)), numbers(3, 4, 6)
    yield "time_distributed", layers.TimeDistributed(layers.Dense(5, activation="relu")), numbers(2, 4, 6)
    yield "time_distributed_conv", layers.TimeDistributed(layers.Conv1D(5, 3)), numbers(2, 4, 6, 3)
    yield "registered_experts", Experts(), numbers(5, 6)
    yield "registered_kernel_of_three_axes", Bilinear(), numbers(5, 6)
    yield "registered_subclass_by_its_kernel", ScaledDense(4, activation="relu"), numbers(5, 6)
    yield "registered_subclass_like_its_parent", NamedDense(4, activation="relu"), numbers(5, 6)


@dataclass
class Case:
    """A layer to adapt, by class and config, and a call of it."""

    cls: type
    config: dict[str, Any]
    x: np.ndarray
    call: dict[str, Any] = field(default_factory=dict)

    def built(self):
        """A layer with the same numbers, biases too, every time."""
        keras.utils.set_random_seed(5)
        layer = self.cls.from_config(copy.deepcopy(self.config))
        layer(self.x, **self.call) if self.call else layer.build(self.x.shape)
        perturb(layer)
        return layer

    def adapted(self, method):
        """One with fresh adapters on every kernel that its call uses, and each such kernel with its adapter."""
        layer = self.built()
        arguments: dict[str, Any] = {}
        if method in OF_ROWS:
            arguments = {"targets": lambda each: isinstance(each, layers.Embedding), "exclude": self.unused}
        elif self.unused:
            arguments = {"exclude": self.unused} if not self.call else {"targets": "reverse_embeddings"}
        keras_lora.apply_lora(layer, METHODS[method](), **arguments)
        return layer, adapted_maps(layer)

    @property
    def unused(self):
        """An untied embedding has one kernel for each direction; a call uses one of them."""
        return "reverse_embeddings" if self.config.get("tie_weights") is False else None

    @property
    def tolerance(self):
        return 2e-2 if "bfloat16" in str(self.config.get("dtype")) else 3e-6


FAMILIES = [
    rest,
    einsums,
    convolutions,
    transposed_convolutions,
    depthwise_and_separable_convolutions,
    recurrent,
    embeddings,
]
CASES = {name: Case(type(layer), layer.get_config(), x, *more) for f in FAMILIES for name, layer, x, *more in f()}
#: Methods that change rows of an embedding, and nothing else.
OF_ROWS = {"trainable_tokens"}
#: Methods with a saved weight that does not train, and the layers that they are tried on.
FROZEN = {"adalora", "dora_fa", "lora_fa", "lora_kept"}
WITH_FROZEN = ["dense", "einsum_query", "conv2d_grouped", "depthwise2d", "lstm_masked"]
PAIRS = [
    (name, method)
    for name, case in CASES.items()
    for method in METHODS
    if method not in OF_ROWS or (issubclass(case.cls, layers.Embedding) and not (case.unused and case.call))
    if method not in FROZEN or name in WITH_FROZEN
    if method != "oft" or not issubclass(case.cls, layers.Embedding) or (case.unused and case.call)
]
#: The layers with a fast path. The others run their own code with W + ΔW, which is the definition.
FAST = [(n, m) for n, m in PAIRS if (cls := adapted_class(CASES[n].cls)) and not issubclass(cls, ChangedKernelLayer)]


#: The ways in which layers run: a product, einsums with and without groups, a convolution in each layout, rows of a table
#: in both directions, a changed kernel, a kernel inside a loop, experts.
HANDFUL = ["dense", "einsum_query", "einsum_experts", "conv2d_grouped", "conv2d_channels_first", "embedding", "separable2d"]
HANDFUL += ["reversible_embedding_reverse", "depthwise2d", "lstm_masked", "registered_experts"]
#: The first case of each class of layers.
FIRST = list({case.cls: name for name, case in reversed(CASES.items())}.values())
#: On JAX and TensorFlow `make test` takes every class of layers with LoRA, the oldest methods on six layers, and all on two.
OLDEST = ("lora", "lora_fa", "dora", "dora_fa", "trainable_tokens")
COVERED = [(n, m) for n, m in PAIRS if n in HANDFUL[:2] or (n in HANDFUL[:6] and m in OLDEST)]
COVERED += [(n, m) for n, m in PAIRS if n in HANDFUL[6:] and m in ("lora", "trainable_tokens")]
COVERED += [(n, m) for n, m in PAIRS if n in FIRST and m == "lora"]
COVERED_FAST = [(n, m) for n, m in FAST if n in HANDFUL[:2]]
FRESH = [(n, m) for n, m in PAIRS if n in HANDFUL[:2]]
#: Of the methods that share their code with LoRA or are written like DoRA, `make test` takes less: on torch every class of
#: layers for the law and the handful for the rest, elsewhere a layer that they compute in a way of their own.
LIGHT = {"ia3", "ia3_inputs", "loha", "lokr", "miss", "oft", "vera"}
OWN_WAY = {"dense": LIGHT, "embedding": {"ia3_inputs", "lokr", "miss"}, "einsum_query": {"lokr", "oft"}}


def pairs(all_of_them, kept, light):
    """The pairs, with marks: those in `kept` run everywhere, and those of a light method only on the layers `light`."""

    def marks(name, method):
        if method not in LIGHT:
            return pytest.mark.every_backend if (name, method) in kept else pytest.mark.torch_first
        if (name, method) in kept and method in OWN_WAY.get(name, ()):
            return pytest.mark.every_backend
        return [pytest.mark.torch_first, pytest.mark.full if name in light else pytest.mark.nightly]

    return [pytest.param(*pair, marks=marks(*pair)) for pair in all_of_them]


def run(function, case):
    """`function(x)`. TensorFlow has channels-first convolutions on a CPU only through XLA, so there it is compiled."""
    first = case.config.get("data_format") == "channels_first"
    if first and keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.function(function, jit_compile=True)(tf.convert_to_tensor(case.x))
    return function(ops.convert_to_tensor(case.x))


def result(layer, case):
    """All that a layer returns."""
    return [value(y) for y in keras.tree.flatten(run(lambda x: layer(x, **case.call), case))]


@pytest.fixture(params=covering(CASES, HANDFUL[:2]))
def case(request):
    return CASES[request.param]


@once
def test_every_layer_type_and_every_method_has_a_case():
    covered = {type(each.layer) for case in CASES.values() for each in maps_by_address(case.built()).values()}
    assert covered >= {adapted.linear_maps[0].layer_class for adapted in LAYERS}
    assert {type(make()) for make in METHODS.values()} == set(TABLE.values())


def move_frozen(found):
    """Move the saved weights that do not train: a method may keep some, and a file holds them."""
    for number, (_, adapter) in enumerate(found.values()):
        rng = np.random.default_rng(number)
        for v in adapter.saved_weights.values():
            if not v.trainable:
                v.assign(value(v) + 0.3 * rng.normal(size=tuple(v.shape)))


def test_the_pairs_are_those_that_the_methods_do_not_refuse():
    """What is refused is in the table of exceptions, and nothing else is."""
    for name in HANDFUL:
        case = CASES[name]
        for method, make in METHODS.items():
            if method in FROZEN:
                continue
            used = [m for m in maps_by_address(case.built()).values() if m.part != "reverse_embeddings"]
            refused = all(make().problem_with(linear) is not None for linear in used)
            assert refused == ((name, method) not in PAIRS), (name, method)


def law(name, method):
    """How far what runs is from the definition, and from the layer without its adapters."""
    case = CASES[name]
    plain, (layer, found) = case.built(), case.adapted(method)
    maps = maps_by_address(plain)
    assert found
    perturb(layer, size=0.3)
    move_frozen(found)
    for address, (linear, adapter) in found.items():
        adapter.strength.assign(0.75)  # not 1, so that no method can forget it
        changed = value(linear.matrix) + 0.75 * value(adapter.delta_kernel(linear.matrix))
        kernel = linear.as_kernel(ops.convert_to_tensor(changed.astype("float32")))
        maps[address].kernel_variable.assign(value(kernel).astype("float32"))
    expected = result(plain, case)
    apart = difference(result(layer, case), expected)
    keras_lora.remove_lora(layer)
    return apart, difference(result(layer, case), expected)


@pytest.mark.parametrize(("name", "method"), pairs(PAIRS, COVERED, {*FIRST, *HANDFUL}))
def test_what_runs_equals_a_plain_layer_with_the_changed_kernels(name, method):
    apart, change = law(name, method)
    assert apart < CASES[name].tolerance
    assert change > 1e-2, "the change is too small to be seen"


@pytest.mark.parametrize(("name", "method"), pairs(PAIRS, FRESH, HANDFUL))
def test_a_fresh_adapter_changes_nothing(name, method):
    case = CASES[name]
    before = result(case.built(), case)
    layer, _ = case.adapted(method)
    # The others add exact zeros; DoRA divides a norm by itself, which recurrent cells then repeat. On torch Keras dilates
    # the 1 × 1 kernel of a dilated separable convolution too, which sums in another order when there is one core.
    exact = not method.startswith("dora") and name != "separable2d_dilated"
    bfloat16 = case.tolerance > 1e-3
    assert difference(result(layer, case), before) <= (0 if exact else 1e-2 if bfloat16 else 1e-6)


def test_matrix_and_kernel_are_inverse(case):
    layer = case.built()
    for linear in maps_by_address(layer).values():
        assert tuple(linear.matrix.shape) == linear.matrix_shape
        assert np.array_equal(value(linear.as_kernel(linear.matrix)), value(linear.kernel))


def test_merging_gives_the_plain_layer_that_the_law_asks_for(case):
    layer, _ = case.adapted("lora")
    perturb(layer, size=0.3)
    before = result(layer, case)
    assert difference(result(keras_lora.merge_lora(layer), case), before) < case.tolerance
    assert type(layer) is case.cls


@pytest.mark.parametrize(("name", "method"), pairs(FAST, COVERED_FAST, HANDFUL))
def test_the_gradients_of_the_fast_path_are_those_of_the_definition(name, method):
    case = CASES[name]
    layer, found = case.adapted(method)
    perturb(layer, size=0.3)
    move_frozen(found)
    weight = numbers(*result(layer, case)[0].shape)

    def definition(x):
        kernels = {
            linear.kernel_attribute: ops.cast(linear.changed_kernel(adapter), layer.compute_dtype)
            for linear, adapter in found.values()
        }
        return view_of(layer, layer.base_class, **kernels).call(x, **case.call)

    def gradients_of(function):
        def loss():
            y = run(function, case)
            return ops.sum(ops.multiply(ops.cast(y, "float32"), weight))

        return gradients(loss, layer.trainable_variables)

    fast, slow = gradients_of(lambda x: layer(x, **case.call)), gradients_of(definition)
    for name, left, right in zip((v.name for v in layer.trainable_variables), fast, slow, strict=True):
        assert difference(left, right) < max(1e-5, case.tolerance * 2), name
        assert np.abs(right).max() > 1e-3, name


def test_a_map_that_sees_no_input_refuses_dropout_and_changes_nothing(case):
    layer = case.built()
    maps = maps_by_address(layer).values()
    if any(linear.no_dropout for linear in maps):
        with pytest.raises(ValueError, match="`dropout` acts on the input"):
            keras_lora.apply_lora(layer, keras_lora.LoRA(dropout=0.5), targets=lambda each: True)
        assert not adapted_maps(layer)
    else:
        keras_lora.apply_lora(layer, keras_lora.LoRA(dropout=0.5))
        perturb(layer)
        dropped = run(lambda x: layer(x, **case.call, training=True), case)
        assert difference(value(dropped), result(layer, case)[0]) > 1e-2


@pytest.mark.parametrize("name", covering(CASES, HANDFUL[:2]))
def test_the_rows_of_an_input_are_what_the_matrix_is_used_on(name):
    case = CASES[name]
    for linear in maps_by_address(case.built()).values():
        if getattr(linear, "equation", "") is None:
            continue  # it is known where the layer uses the kernel
        x, (in_dim, out_dim) = ops.convert_to_tensor(case.x), linear.matrix_shape[-2:]
        if not linear.is_matmul:
            with pytest.raises(ValueError, match="has no rows"):
                linear.as_rows(x)
            continue
        matrix, gain = numbers(in_dim, out_dim), numbers(in_dim)
        wanted = value(linear.apply(x, ops.convert_to_tensor(matrix)))
        found = linear.from_rows(ops.matmul(linear.as_rows(x), matrix), x)
        assert found.shape == wanted.shape
        assert difference(value(found), wanted) < 1e-5
        scaled = linear.apply(x * linear.along_inputs(ops.convert_to_tensor(gain), x), ops.convert_to_tensor(matrix))
        assert difference(value(scaled), value(linear.apply(x, ops.convert_to_tensor(gain[:, None] * matrix)))) < 1e-5
