"""Starting points: what they start from, that the outputs stay, and that the base does not move."""

import itertools

import keras
import numpy as np
import pytest
from helpers import covering, difference, gradients, outputs, perturb, value, values
from keras import layers, ops

import keras_lora
from keras_lora.starts import sketches
from keras_lora.swap.adapted import named_adapters

EVERYWHERE = pytest.mark.every_backend
pytestmark = pytest.mark.torch_first
RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 16)).astype("float32")
Y = RNG.normal(size=(64, 3)).astype("float32")


def base(seed=1):
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((16,)),
            layers.Dense(24, activation="tanh"),
            layers.BatchNormalization(),
            layers.Dropout(0.5, seed=3),
            layers.Dense(20, activation="tanh"),
            layers.Dense(3),
        ]
    )


def adapted(rank=4, model=None, **arguments):
    method = keras_lora.LoRA(rank=rank, seed=2, **arguments)
    return keras_lora.apply_lora(base() if model is None else model, method)


def parts(model, name="default"):
    return [adapter for _, adapter in named_adapters(model)[name].values()]


STARTS = {
    "pissa": ("pissa", {}),
    "olora": ("olora", {}),
    "orthogonal": ("orthogonal", {}),
    "eva": (keras_lora.EVA(rho=2.0), {"data": X}),
    "lora_ga": (keras_lora.LoRAGA(), {"data": (X, Y), "loss": "mse"}),
}


def start(model, which, **more):
    method, arguments = STARTS[which]
    return keras_lora.start_from(model, method, **{**arguments, **more})


@pytest.mark.parametrize("which", covering(STARTS, ["pissa", "lora_ga"]))
def test_the_outputs_and_all_that_is_not_an_adapter_stay(which):
    model = adapted(alpha=6)
    before, base_values = outputs(model, X), values(base_of(model))
    start(model, which)
    assert difference(outputs(model, X), before) < 1e-5
    after = values(base_of(model))
    assert base_values.keys() == after.keys()
    assert all(np.array_equal(each, after[path]) for path, each in base_values.items())
    for adapter in parts(model):
        assert np.abs(value(adapter.lora_a)).max() > 0
        assert np.abs(value(adapter.lora_b)).max() > 0 or which == "eva"
    assert [v.name for v in model.trainable_variables] == ["lora_a", "lora_b"] * 2
    model.compile(keras.optimizers.SGD(0.01), "mse")
    model.fit(X, Y, epochs=1, verbose=0)
    assert difference(outputs(model, X), before) > 1e-4


def base_of(model):
    """The variables beside the adapters, seeds among them."""
    return [v for v in model.variables if not v.path.rpartition("/")[2].startswith(("lora_", "kept_", "strength"))]


@pytest.mark.parametrize("which", ["pissa", pytest.param("lora_ga", marks=pytest.mark.nightly)])
def test_files_are_relative_to_the_base_that_was_loaded(which, tmp_path):
    model = start(adapted(), which)
    perturb(model)
    wanted = outputs(model, X)
    keras_lora.save_adapter(model, tmp_path / "a.safetensors")
    assert difference(outputs(keras_lora.load_adapter(base(), tmp_path / "a.safetensors"), X), wanted) < 1e-5
    model.save(tmp_path / "whole.keras")
    assert difference(outputs(keras.saving.load_model(tmp_path / "whole.keras"), X), wanted) < 1e-6
    assert {row.rank for row in keras_lora.compress_adapter(model, energy=1)} == {8}
    assert difference(outputs(model, X), wanted) < 1e-5
    keras_lora.remove_lora(model)
    assert difference(outputs(model, X), outputs(base(), X)) == 0


def test_pissa_is_the_best_product_of_its_rank_times_the_scale():
    model = start(adapted(alpha=6), "pissa")
    adapter, kernel = parts(model)[0], value(base().layers[0].kernel)
    u, s, v = np.linalg.svd(kernel, full_matrices=False)
    best = u[:, :4] * s[:4] @ v[:4]
    a, b = value(adapter.lora_a), value(adapter.lora_b)
    np.testing.assert_allclose(1.5 * a @ b, best, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=1), rtol=1e-5)


def test_olora_is_the_start_of_the_qr_decomposition():
    model = start(adapted(), "olora")
    adapter, kernel = parts(model)[0], value(base().layers[0].kernel)
    q, r = np.linalg.qr(kernel.T)
    np.testing.assert_allclose(
        value(adapter.lora_a) @ value(adapter.lora_b), r[:4].T @ q[:, :4].T, atol=1e-5
    )  # PEFT's B A, transposed


def test_the_halves_of_the_orthogonal_start_do_not_meet():
    for rank in (2, 3, 8):
        for adapter in parts(start(adapted(rank), "orthogonal")):
            a, b = value(adapter.lora_a), value(adapter.lora_b)
            assert np.abs(a @ b).max() < 1e-7
            assert adapter.kept == 0
    a, b = sketches.halves((), (400, 300), 8, np.random.default_rng(0))
    assert abs(a.var() - 1) < 0.1
    assert abs(b.var() - 1) < 0.1


def planted(n=512, width=64, rank=4, noise=0.05, seed=0):
    """Inputs with `rank` large directions."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, rank)) * [4, 3, 2, 1.5][:rank] @ np.linalg.qr(rng.normal(size=(width, rank)))[0].T
    return (x + noise * rng.normal(size=(n, width))).astype("float32")


@EVERYWHERE
def test_eva_finds_the_directions_of_the_inputs():
    x = planted()
    keras.utils.set_random_seed(0)
    model = adapted(model=keras.Sequential([keras.Input((64,)), layers.Dense(32), layers.Dense(2)]))
    keras_lora.start_from(model, keras_lora.EVA(), x, batch_size=100)
    a = value(parts(model)[0].lora_a)
    np.testing.assert_allclose(a.T @ a, np.eye(4), atol=1e-5)
    best = np.linalg.svd(x, compute_uv=False)[:4]
    assert np.linalg.norm(x @ a) ** 2 > 0.99 * np.sum(best.astype("float64") ** 2)


def test_eva_moves_ranks_to_layers_with_more_directions_and_keeps_the_sum():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((64,)), keras.Input((64,))
    wide, narrow = layers.Dense(32, name="wide")(inputs[0]), layers.Dense(32, name="narrow")(inputs[1])
    model = keras.Model(inputs, layers.Dense(2)(layers.add([wide, narrow])))
    adapted(2, model=model, alpha=4)
    x = [np.random.default_rng(0).normal(size=(256, 64)).astype("float32") for _ in range(2)]
    x[0], x[1] = planted(256), planted(256, rank=1)
    keras_lora.start_from(model, keras_lora.EVA(rho=2.0), x)
    found = {row.layer.split("/")[-1]: row for row in keras_lora.list_adapters(model)}
    assert {name: row.rank for name, row in found.items()} == {"wide": 3, "narrow": 1}
    assert {adapter.scale for adapter in parts(model)} == {2.0}


def kinds():
    rng = np.random.default_rng(1)
    last = {"data_format": "channels_last"}
    x = rng.normal(size=(8, 9, 8)).astype("float32")
    yield "conv", layers.Conv1D(12, 3, padding="causal", dilation_rate=2, **last), x
    yield "grouped conv", layers.Conv1D(12, 3, groups=2, **last), x
    yield "transposed conv", layers.Conv1DTranspose(6, 3, strides=2, **last), x
    yield "einsum", layers.EinsumDense("abc,cde->abde", (None, 3, 4)), x
    yield "experts", layers.EinsumDense("ebd,edh->ebh", (None, 7)), x
    yield "depthwise", layers.DepthwiseConv1D(3, **last), x
    yield "lstm", layers.LSTM(5), x
    yield "embedding", layers.Embedding(11, 6), rng.integers(0, 11, size=(8, 5)).astype("int32")


KINDS = {name: (type(layer), layer.get_config(), x) for name, layer, x in kinds()}


#: Those that `make test` tries: with groups, and with the two inputs that are not rows.
SOME = [("experts", "pissa"), ("grouped conv", "lora_ga"), ("grouped conv", "eva"), ("embedding", "pissa"), ("lstm", "eva")]
TRIED = [pytest.param(*pair, marks=() if pair in SOME else pytest.mark.nightly) for pair in itertools.product(KINDS, STARTS)]


def of_kind(kind, rank=4):
    cls, config, x = KINDS[kind]
    keras.utils.set_random_seed(4)
    inputs = keras.Input(x.shape[1:], batch_size=8, dtype=x.dtype.name)
    model = keras.Model(inputs, cls.from_config(config)(inputs))
    return keras_lora.apply_lora(model, keras_lora.LoRA(rank=rank), targets=lambda each: True, head=None), x


@pytest.mark.parametrize(("kind", "which"), TRIED)
def test_every_kind_of_layer_starts_or_is_refused_and_stays(kind, which):
    model, x = of_kind(kind)
    before = outputs(model, x)
    data = {"eva": {"data": x}, "lora_ga": {"data": (x, np.ones_like(before[0])), "loss": "mse"}}.get(which, {})
    if which == "eva" and kind in ("depthwise", "lstm", "embedding"):
        state = values(model.variables)
        with pytest.raises(ValueError, match="inputs cannot be measured, because"):
            start(model, which, **data)
        assert all(np.array_equal(each, state[path]) for path, each in values(model.variables).items())
        return
    start(model, which, **data)
    assert difference(outputs(model, x), before) < 1e-5
    for adapter in parts(model):
        assert np.isfinite(value(adapter.lora_a)).all()
        trains = np.abs(value(adapter.lora_a)).sum(-2) + np.abs(value(adapter.lora_b)).sum(-1)
        assert (trains > 0).all(), "a column of A and its row of B are both zero, so neither learns"


def test_the_sketch_of_the_gradients_is_that_of_the_kernel():
    """A kernel whose rank is small is found whole; the gradient is that of a plain model at inference."""
    model = base()
    model.compile("sgd", "mse")
    whole = gradients(lambda: ops.mean(ops.square(ops.subtract(model(X, training=False), Y))), [model.layers[0].kernel])[0]
    adapted(model=model)
    keras_lora.start_from(model, keras_lora.LoRAGA(gamma=4), (X, Y), loss="mse", batch_size=64)
    adapter = parts(model)[0]
    u = np.linalg.svd(whole)[0]
    size = 24**0.25 / 2
    a, b = value(adapter.lora_a) / size, value(adapter.lora_b) / size
    np.testing.assert_allclose(np.linalg.svd(a.T @ u[:, :3], compute_uv=False), 1, atol=1e-3)  # the loss has rank 3
    np.testing.assert_allclose(b @ b.T, np.eye(4), atol=1e-5)
    np.testing.assert_allclose(a.T @ a, np.eye(4), atol=1e-5)


def streams():
    yield "arrays", lambda: (X, Y)

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            chosen = slice(16 * index, 16 * index + 16)
            return X[chosen], Y[chosen]

    yield "PyDataset", Batches
    yield "generator", lambda: ((X[16 * i : 16 * i + 16], Y[16 * i : 16 * i + 16]) for i in range(4))

    def dataset():
        tf = pytest.importorskip("tensorflow")
        return tf.data.Dataset.from_tensor_slices((X, Y)).batch(16)

    yield "tf.data", dataset

    def loader():
        torch = pytest.importorskip("torch")
        both = torch.utils.data.TensorDataset(torch.tensor(X), torch.tensor(Y))
        return torch.utils.data.DataLoader(both, batch_size=16)

    yield "DataLoader", loader


@pytest.mark.full
@pytest.mark.parametrize("which", [pytest.param("eva", marks=pytest.mark.nightly), "lora_ga"])
def test_any_data_that_fit_takes_gives_the_same_start(which):
    wanted = None
    for name, make in streams():
        model = start(adapted(), which, data=make(), **({"batch_size": 16} if name == "arrays" else {}))
        found = [np.abs(value(adapter.lora_a)) for adapter in parts(model)]  # singular vectors have no sign
        wanted = wanted or found
        assert difference(found, wanted) < 1e-3, name


def test_a_compiled_model_that_is_refused_is_as_it_was():
    model = adapted()
    model.compile(keras.optimizers.Adam(0.01), "mse")
    model.fit(X, Y, verbose=0)
    state, before = values(model.variables + model.optimizer.variables), outputs(model, X)
    for which, words in {"pissa": "trained already", "lora_ga": "trained already"}.items():
        with pytest.raises(ValueError, match=words):
            start(model, which)
    with pytest.raises(ValueError, match="is zero or not finite"):
        start(model, "lora_ga", data=(X, np.full_like(Y, np.nan)), overwrite=True)
    assert all(
        np.array_equal(each, state[path]) for path, each in values(model.variables + model.optimizer.variables).items()
    )
    assert difference(outputs(model, X), before) == 0
    model.fit(X, Y, verbose=0)


def test_a_trained_adapter_is_started_again_on_request():
    model = adapted()
    before = outputs(model, X)
    perturb(model)
    start(model, "pissa", overwrite=True)
    assert difference(outputs(model, X), before) < 1e-5
    start(model, "olora")  # what was started and not trained can start again
    assert difference(outputs(model, X), before) < 1e-5
    assert {adapter.kept for adapter in parts(model)} == {4}


def test_one_of_several_adapters_by_name():
    model = adapted()
    perturb(model)
    keras_lora.apply_lora(model, rank=3, name="second")
    with pytest.raises(ValueError, match="several adapters"):
        keras_lora.start_from(model, "pissa")
    keras_lora.activate_adapters(model, ["default", "second"])
    before = outputs(model, X)
    keras_lora.start_from(model, "pissa", name="second")
    assert difference(outputs(model, X), before) < 1e-5
    assert [adapter.kept for adapter in parts(model)] == [0, 0]
    assert [adapter.kept for adapter in parts(model, "second")] == [3, 3]


@pytest.mark.parametrize(
    ("method", "arguments", "words"),
    [
        ("pisa", {}, "`start` must be one of"),
        ("pissa", {"data": X}, "PiSSA needs no data"),
        ("eva", {}, "EVA needs `data`"),
        ("lora_ga", {"data": X}, "LoRAGA needs `data` and `loss`"),
        ("loftq", {}, "LoftQ needs `base`"),
    ],
)
def test_what_is_missing_or_not_used_is_refused(method, arguments, words):
    model = adapted()
    with pytest.raises(ValueError, match=words):
        keras_lora.start_from(model, method, **arguments)


def test_methods_and_ranks_that_cannot_start_are_named_by_layer():
    model = keras_lora.apply_lora(base(), "dora")
    with pytest.raises(ValueError, match="starting points are for LoRA") as raised:
        keras_lora.start_from(model, "pissa")
    assert str(raised.value).count("\n") == 2
    with pytest.raises(ValueError, match="rank of 2 or more"):
        keras_lora.start_from(adapted(rank=1), "orthogonal")
    with pytest.raises(ValueError, match="not quantised"):
        keras_lora.start_from(adapted(), "loftq", base=base())
    for wrong in ({"rho": 0.5}, {"oversampling": 0}, {"batches": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            keras_lora.EVA(**wrong)


def quantised(mode, width=128):
    keras.utils.set_random_seed(5)
    model = keras.Sequential([keras.Input((width,)), layers.Dense(width), layers.Dense(width), layers.Dense(2)])
    floats = keras.models.clone_model(model)
    floats.set_weights(model.get_weights())
    model.quantize(mode)
    return keras_lora.apply_lora(model, rank=8), floats


@pytest.mark.parametrize("mode", [pytest.param("int8", marks=pytest.mark.nightly), "int4"])
def test_loftq_reduces_the_error_of_a_quantised_base(mode):
    model, floats = quantised(mode)

    def error():
        (linear, adapter) = next(iter(named_adapters(model)["default"].values()))
        found = value(linear.matrix) + value(adapter.delta_kernel(None))
        return np.linalg.norm(found - value(floats.layers[0].kernel))

    before = error()
    keras_lora.start_from(model, "loftq", base=floats)
    lost = value(floats.layers[0].kernel) - value(next(iter(named_adapters(model)["default"].values()))[0].matrix)
    best = np.linalg.norm(np.linalg.svd(lost, compute_uv=False)[8:])
    assert error() < before
    assert error() == pytest.approx(best, rel=5e-3)


def test_the_randomised_svd_is_the_svd():
    rng = np.random.default_rng(0)
    matrix = (rng.normal(size=(300, 400)) / np.arange(1, 401)).astype("float32")
    u, s, v = sketches.leading(matrix, 8, rng)
    exact = np.linalg.svd(matrix.astype("float64"), compute_uv=False)
    np.testing.assert_allclose(s, exact[:8], rtol=1e-3)
    assert np.linalg.norm(matrix - u * s @ v) == pytest.approx(np.linalg.norm(exact[8:]), rel=1e-3)


@pytest.mark.full
def test_the_first_step_along_the_gradient_is_of_one_size_for_all_ranks():
    """With `alpha / rank` and Adam: each column of the factors adds a step of one size, and the scale is their mean."""
    rng = np.random.default_rng(0)
    x, y = 100 * rng.normal(size=(2, 1024, 256)).astype("float32")  # so that the gradients are large beside Adam's epsilon
    sizes = dict.fromkeys((4, 16, 64, 128), 0.0)
    for rank, seed in itertools.product(sizes, range(2)):
        keras.utils.set_random_seed(7)
        model = keras.Sequential([keras.Input((256,)), layers.Dense(256, use_bias=False)])
        keras_lora.apply_lora(model, keras_lora.LoRA(rank=rank, seed=seed), head=None)
        gradient = x.T.astype("float64") @ (outputs(model, x)[0] - y)
        model.compile(keras.optimizers.Adam(1e-3), "mse")
        model.fit(x, y, epochs=1, batch_size=1024, verbose=0)
        sizes[rank] -= np.sum(value(parts(model)[0].delta_kernel(None)) * gradient) / np.linalg.norm(gradient) / 2
    assert max(sizes.values()) / min(sizes.values()) < 1.05, sizes


def test_ranks_are_shared_out_by_what_they_explain():
    values = {
        "a": np.array([0.5, 0.3, 0.1, 0.05]),
        "b": np.array([0.9, 0.01, 0.0, 0.0]),
        "c": np.array([0.2, 0.2, 0.2, 0.2]),
    }
    assert sketches.shared_out(values, 6, dict.fromkeys(values, 4)) == {"a": 2, "b": 1, "c": 3}
    assert sketches.shared_out(values, 6, dict.fromkeys(values, 2)) == {"a": 2, "b": 2, "c": 2}
    assert sketches.shared_out(values, 3, dict.fromkeys(values, 4)) == {"a": 1, "b": 1, "c": 1}
