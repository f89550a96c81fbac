"""A method from outside the package: it goes through everything that a built-in one does, and a wrong one is caught."""

import keras
import numpy as np
import pytest
from helpers import difference, outputs, perturb
from keras import layers, ops

import keras_lora
from keras_lora import adapters
from keras_lora.testing import check_adapter

pytestmark = pytest.mark.torch_first


@pytest.fixture(autouse=True)
def _the_table_is_as_it_was():
    before = dict(adapters.TABLE)
    yield
    adapters.TABLE.clear()
    adapters.TABLE.update(before)


class OutputGain(keras_lora.Adapter):
    """W' = W diag(1 + gain): no product of thin factors."""

    def build_for(self, linear):
        *groups, _, out_dim = linear.matrix_shape
        self.gain = self.add_factor("gain", (*groups, 1, out_dim), "zeros")

    def parameter_count(self, matrix_shape):
        return int(np.prod([*matrix_shape[:-2], matrix_shape[-1]]))

    def delta_kernel(self, matrix):
        return ops.multiply(matrix, ops.cast(self.gain, matrix.dtype))


class Folded(keras_lora.LowRank):
    """A fixed 0/1 A, a trained B, and a saved offset of B that does not train."""

    def build_for(self, linear):
        *groups, _, out_dim = linear.matrix_shape
        self.b = self.add_factor("b", (*groups, self.rank, out_dim), "zeros")
        self.offset = self.add_factor("offset", (*groups, self.rank, 1), "zeros", trainable=False)

    def pair(self, weights, matrix_shape):
        *groups, in_dim, _ = matrix_shape
        a = ops.one_hot(ops.arange(in_dim) % self.rank, self.rank)
        return ops.broadcast_to(a, (*groups, in_dim, self.rank)), ops.add(weights["b"], weights["offset"])

    def parameter_count(self, matrix_shape):
        return int(np.prod([*matrix_shape[:-2], self.rank, matrix_shape[-1]]))

    def size(self, matrix_shape):
        return self.parameter_count(matrix_shape) + int(np.prod([*matrix_shape[:-2], self.rank]))


def registered(cls, name="outside"):
    return keras_lora.register_adapter(name)(type(cls.__name__, (cls,), {"__module__": __name__}))


@pytest.mark.parametrize("cls", [OutputGain, Folded])
def test_a_method_passes_the_law_files_merging_sums_and_counts(cls):
    seen = check_adapter(registered(cls)())
    assert {"dense", "einsum", "experts", "conv", "depthwise", "embedding", "tied_embedding"} == set(seen)
    assert max(seen.values()) < 1e-5


@pytest.mark.full
def test_every_built_in_method_passes_too():
    for method in (keras_lora.LoRA(2), keras_lora.DoRA(2), keras_lora.TrainableTokens([1, 4])):
        assert check_adapter(method)


def stack():
    keras.utils.set_random_seed(1)
    return keras.Sequential([keras.Input((8,)), layers.Dense(6, name="hidden"), layers.Dense(2)])


def test_it_is_used_by_its_name_and_is_counted_right():
    registered(Folded, "folded")
    rows = keras_lora.list_targets(stack(), "folded", rank=2)
    assert [row.trainable for row in rows.of("adapt")] == [12]
    model = keras_lora.apply_lora(stack(), "folded", rank=2)
    assert sum(int(np.prod(v.shape)) for v in model.trainable_variables) == 12
    assert rows.total == keras_lora.list_adapters(model).total == "trainable: 12 of 83 (14.5 %)"


def test_dropout_and_dora_s_inside_and_serving_follow_from_its_factors(tmp_path):
    registered(Folded, "folded")
    x = np.random.default_rng(0).normal(size=(3, 8)).astype("float32")
    model = keras_lora.apply_lora(stack(), adapters.get("folded", rank=2))
    perturb(model)
    wanted = outputs(model, x)
    keras_lora.save_adapter(model, tmp_path / "a.safetensors")
    served = keras_lora.MultiAdapterModel(stack(), capacity=2, rank=3)
    served.load(tmp_path / "a.safetensors", "outside")
    found = served.predict({"inputs": x, "adapter_index": served.index_of(["outside"] * 3)}, verbose=0)
    assert difference([found], wanted) < 1e-6
    keras_lora.compress_adapter(model, energy=1)
    assert difference(outputs(model, x), wanted) < 1e-6
    assert keras_lora.list_adapters(model)[0].method == "LoRA"
    dropped = keras_lora.apply_lora(stack(), type(adapters.get("folded"))(rank=2, dropout=0.5))
    perturb(dropped)
    assert difference([np.asarray(ops.convert_to_numpy(dropped(x, training=True)))], outputs(dropped, x)) > 1e-3


def without_strength(self, x, y, linear, training=None):
    return ops.add(y, linear.apply(x, self.delta_kernel(linear.matrix)))


def with_another_sign(self):
    return self.pair(self.saved_weights, self.matrix_shape)[0], ops.subtract(self.b, self.offset)


def as_its_pair_says(self, matrix):
    return self.scale * ops.matmul(*self.pair(self.saved_weights, self.matrix_shape))


WRONG = {
    "forgets its strength": (
        OutputGain,
        {
            "adapted_output": lambda self, x, y, linear, training=None: ops.add(
                y, linear.apply(x, self.delta_kernel(linear.matrix))
            )
        },
        "what runs, and the plain layer",
    ),
    "a frozen weight has the wrong sign in the fast path": (
        Folded,
        {
            "current_pair": lambda self: (
                self.pair(self.saved_weights, self.matrix_shape)[0],
                ops.subtract(self.b, self.offset),
            ),
            "delta_kernel": lambda self, matrix: self.scale * ops.matmul(*self.pair(self.saved_weights, self.matrix_shape)),
        },
        "what runs, and the plain layer",
    ),
    "counts wrong": (OutputGain, {"parameter_count": lambda self, shape: 1}, "`parameter_count` and `size` are"),
    "does not start at zero": (
        OutputGain,
        {"delta_kernel": lambda self, matrix: ops.multiply(matrix, ops.add(self.gain, 0.5))},
        "outputs with a fresh adapter",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_method_is_caught(wrong):
    base, body, said = WRONG[wrong]
    cls = keras_lora.register_adapter("wrong")(type(base.__name__, (base,), {**body, "__module__": __name__}))
    with pytest.raises(AssertionError, match=said):
        check_adapter(cls())


def test_what_cannot_be_registered():
    with pytest.raises(ValueError, match="There is a method 'lora' already, LoRA"):
        keras_lora.register_adapter("lora")
    for name in ("Two", "two words", "", 3):
        with pytest.raises(ValueError, match="must be a lower-case word"):
            keras_lora.register_adapter(name)
    with pytest.raises(TypeError, match=r"must be a subclass of `keras_lora\.Adapter`"):
        keras_lora.register_adapter("dense")(layers.Dense)
    with pytest.raises(ValueError, match="does not define `parameter_count`; it does not define `delta_kernel`"):
        keras_lora.register_adapter("half")(type("Half", (keras_lora.Adapter,), {"build_for": lambda self, linear: None}))
    body = {"build_for": lambda self, linear: None, "parameter_count": lambda self, shape: 1}
    with pytest.raises(ValueError, match="does not define `pair`"):
        keras_lora.register_adapter("half")(type("Half", (keras_lora.LowRank,), body))

    class Forgets(OutputGain):
        def __init__(self, size=3, **kwargs):
            super().__init__(**kwargs)
            self.size_ = size

        def get_config(self):
            return {"name": self.name}

    with pytest.raises(ValueError, match="`get_config` lacks the argument `size`"):
        keras_lora.register_adapter("forgets")(Forgets)
    built_in = {"adalora", "dora", "ia3", "loha", "lokr", "lora", "miss", "oft", "trainable_tokens", "vera"}
    assert set(adapters.TABLE) == built_in
    with pytest.raises(ValueError, match="needs an adapter of a registered class"):
        check_adapter(OutputGain())
