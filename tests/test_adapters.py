"""Each method against NumPy written from its paper, and the arguments it takes."""

import keras
import numpy as np
import pytest
from helpers import difference, gradients, perturb, value
from keras import layers

import keras_lora
from keras_lora import adapters

EVERYWHERE = pytest.mark.every_backend
pytestmark = pytest.mark.torch_first


def dense(method, units=6, width=9, **arguments):
    layer = layers.Dense(units)
    layer.build((None, width))
    return keras_lora.apply_lora(layer, adapters.get(method, **arguments))


@EVERYWHERE
@pytest.mark.parametrize(("rank_stabilized", "scale"), [(False, 24 / 4), (True, 24 / 2)])
def test_lora_is_the_scaled_product_of_its_factors(rank_stabilized, scale):
    layer = dense("lora", rank=4, alpha=24, rank_stabilized=rank_stabilized)
    perturb(layer)
    a, b = value(layer.adapter.lora_a), value(layer.adapter.lora_b)
    delta = value(layer.adapter.delta_kernel(layer.linear_map.matrix))
    assert layer.adapter.scale == scale
    np.testing.assert_allclose(delta, scale * a @ b, rtol=1e-5, atol=1e-6)


@EVERYWHERE
def test_dora_is_the_normalised_direction_times_the_magnitude():
    layer = dense("dora", rank=2, alpha=6)
    perturb(layer)
    adapter, w = layer.adapter, value(layer.kernel)
    direction = w + 3 * value(adapter.lora.lora_a) @ value(adapter.lora.lora_b)
    expected = value(adapter.magnitude) * direction / np.linalg.norm(direction, axis=0)  # Liu et al., eq. 5
    np.testing.assert_allclose(w + value(adapter.delta_kernel(w.astype("float32"))), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        pytest.param("dense", "float32", marks=EVERYWHERE),
        ("dense", "mixed_bfloat16"),
        ("conv", "float32"),
        pytest.param("conv", "mixed_bfloat16", marks=EVERYWHERE),
    ],
)
def test_dora_leaves_an_output_unit_of_zeros_as_it_is(kind, dtype):
    """A dead filter of a pretrained net, or a projection that starts at zero, has no direction."""
    layer = layers.Dense(6, dtype=dtype) if kind == "dense" else layers.Conv1D(6, 2, dtype=dtype)
    x = np.random.default_rng(0).normal(size=(2, 5, 4)).astype("float32")
    layer.build(x.shape)
    kernel = value(layer.kernel)
    kernel[..., 1], kernel[..., 2] = 0, 1e-25 * kernel[..., 2]
    layer.kernel.assign(kernel)
    before = value(layer(x))
    keras_lora.apply_lora(layer, "dora", rank=2)
    np.testing.assert_array_equal(value(layer(x)), before)
    matrix = layer.linear_map.matrix
    np.testing.assert_allclose(value(layer.adapter.delta_kernel(matrix)), np.zeros(matrix.shape), atol=1e-6)
    found = gradients(lambda: keras.ops.sum(keras.ops.square(layer(x))), layer.adapter.trainable_variables)
    assert all(np.isfinite(each).all() for each in found)
    assert all(np.abs(each).max() > 0 for each in found[:1] + found[2:])  # that of A is zero while B is
    perturb(layer)
    assert np.isfinite(value(layer(x))).all()


def test_a_magnitude_over_zeros_becomes_the_norm_of_the_weights_loaded_there():
    layer = layers.Dense(6, kernel_initializer="zeros")
    layer.build((None, 9))
    keras_lora.apply_lora(layer, "dora", rank=2)
    kernel = np.random.default_rng(0).normal(size=(9, 6))
    layer.linear_map.kernel_variable.assign(kernel.astype("float32"))
    layer.adapter.base_changed(layer.linear_map)
    np.testing.assert_allclose(value(layer.adapter.magnitude), np.linalg.norm(kernel, axis=0), rtol=1e-6)


def test_the_factored_norm_of_dora_is_the_norm():
    for layer in (dense("dora", rank=3), conv("dora", rank=3)):
        perturb(layer)
        linear, lora = layer.linear_map, layer.adapter.lora
        direction = value(linear.matrix) + value(lora.delta_kernel(linear.matrix))
        factored = value(layer.adapter.direction_norm(linear))
        np.testing.assert_allclose(factored, np.linalg.norm(direction, axis=-2), rtol=1e-6)


def conv(method, **arguments):
    layer = layers.Conv2D(6, 3, groups=2, data_format="channels_last")
    layer.build((None, 8, 8, 4))
    return keras_lora.apply_lora(layer, adapters.get(method, **arguments))


def test_lora_starts_as_in_peft():
    layer = dense("lora", units=50, width=4000, rank=8)
    a, b = value(layer.adapter.lora_a), value(layer.adapter.lora_b)
    bound = 1 / np.sqrt(4000)
    assert a.shape == (4000, 8)
    assert np.abs(a).max() <= bound
    assert abs(a.mean()) < 0.03 * bound
    assert a.std() == pytest.approx(bound / np.sqrt(3), rel=0.02)
    assert not b.any()


def test_an_embedding_starts_with_the_other_factor_at_zero():
    layer = layers.Embedding(500, 400)
    layer.build()
    keras_lora.apply_lora(layer, rank=4)
    assert not value(layer.adapter.lora_a).any()
    assert value(layer.adapter.lora_b).std() == pytest.approx(1, rel=0.06)


def test_initializers_can_be_given_and_come_back_from_the_config():
    layer = dense(keras_lora.LoRA(2, a_initializer="ones", b_initializer=keras.initializers.Constant(0.5)))
    assert (value(layer.adapter.lora_a) == 1).all()
    assert (value(layer.adapter.lora_b) == 0.5).all()
    twin = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer.adapter))
    assert twin.get_config() == layer.adapter.get_config()


def test_a_magnitude_starts_as_the_norm_of_the_kernel():
    layer = dense("dora")
    np.testing.assert_allclose(value(layer.adapter.magnitude), np.linalg.norm(value(layer.kernel), axis=0), rtol=1e-6)


@EVERYWHERE
def test_a_seed_gives_the_same_start_every_time_and_another_one_to_each_layer():
    def start():
        stack = [keras.Input((8,)), layers.Dense(8), layers.Dense(8), layers.Dense(2)]  # Keras numbers their names
        model = keras_lora.apply_lora(keras.Sequential(stack), keras_lora.LoRA(rank=2, seed=5))
        return [value(layer.adapter.lora_a) for layer in model.layers[:2]]

    first, second = start(), start()
    assert np.array_equal(first[0], second[0])
    assert not np.array_equal(first[0], first[1])


@EVERYWHERE
def test_dropout_acts_in_training_alone_and_on_the_adapter_alone():
    layer = dense("lora", units=4, width=2000, rank=1, dropout=0.5)
    layer.adapter.lora_a.assign(np.ones((2000, 1), "float32"))
    layer.adapter.lora_b.assign(np.ones((1, 4), "float32"))
    x = np.ones((1, 2000), "float32")
    still, base = value(layer(x)), value(layer.linear_map.finish(layer.linear_map.base_output(x)))
    assert np.array_equal(still, value(layer(x, training=False)))
    first, second = value(layer(x, training=True)), value(layer(x, training=True))
    assert not np.array_equal(first, second)
    # Half of 2,000 ones, doubled: the adapter's sum keeps its mean.
    kept = (first - base)[0, 0] / (still - base)[0, 0]
    assert kept == pytest.approx(1, abs=0.1)


def test_dropout_reaches_a_layer_whose_own_call_takes_no_training_argument():
    layer = layers.Conv2D(3, 2, data_format="channels_last")
    model = keras.Sequential([keras.Input((6, 6, 2)), layer])
    keras_lora.apply_lora(model, keras_lora.LoRA(rank=1, dropout=0.5), head=None)
    perturb(layer)
    x = np.ones((1, 6, 6, 2), "float32")
    assert np.array_equal(value(model(x)), value(model(x)))
    assert not np.array_equal(value(model(x, training=True)), value(model(x, training=True)))


def test_dropout_on_an_embedding_is_refused_and_nothing_is_changed():
    model = keras.Sequential([keras.Input((3,), dtype="int32"), layers.Embedding(9, 4), layers.Dense(4), layers.Dense(2)])
    before = [type(layer) for layer in model.layers]
    with pytest.raises(ValueError, match="token ids"):
        keras_lora.apply_lora(model, keras_lora.LoRA(dropout=0.1), targets=[layers.Embedding, layers.Dense])
    assert [type(layer) for layer in model.layers] == before
    assert len(model.trainable_variables) == 5


@pytest.mark.parametrize(
    "wrong",
    [
        {"rank": 0},
        {"rank": -1},
        {"rank": 2.0},
        {"rank": True},
        {"alpha": 0},
        {"alpha": float("nan")},
        {"alpha": float("inf")},
        {"alpha": "16"},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"dropout": None},
    ],
    ids=str,
)
@pytest.mark.parametrize("method", [keras_lora.LoRA, keras_lora.DoRA])
def test_arguments_out_of_range_are_named_with_what_came(method, wrong):
    name, given = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=f"`{name}` must be .* Received: {name}={given!r}".replace("(", r"\(")):
        method(**wrong)


def test_get_takes_a_name_an_instance_and_a_config():
    instance = keras_lora.DoRA(rank=3)
    assert adapters.get(instance) is instance
    assert adapters.get("LoRA", rank=3).rank == 3
    assert adapters.get(keras.saving.serialize_keras_object(instance)).lora.rank == 3


def test_get_refuses_what_it_does_not_know():
    with pytest.raises(
        ValueError, match=r"no adapter method called 'lorra'. Expected one of \['adalora', 'dora', 'ia3', 'loha', 'lokr"
    ):
        adapters.get("lorra")
    with pytest.raises(TypeError, match="must be a name"):
        adapters.get(3)
    with pytest.raises(ValueError, match=r"already has its arguments\. Received: rank=4 beside LoRA"):
        adapters.get(keras_lora.LoRA(), rank=4)


def test_alpha_does_not_follow_the_rank():
    assert keras_lora.LoRA(rank=1).alpha == keras_lora.LoRA(rank=64).alpha


@pytest.mark.parametrize("method", sorted(adapters.TABLE))
def test_the_parameter_count_is_what_gets_trained(method):
    arguments = {"trainable_tokens": {"tokens": [3, 5]}, "ia3": {}, "oft": {}}.get(method, {"rank": 3})
    table = layers.Embedding(9, 4)
    table.build()
    made = []
    if method != "oft":
        made += [keras_lora.apply_lora(table, adapters.get(method, **arguments), targets=layers.Embedding)]
    if "tokens" not in arguments:
        made += [dense(method, **arguments), conv(method, **arguments)]
    for layer in made:
        trained = sum(int(np.prod(v.shape)) for v in layer.trainable_variables)
        assert layer.adapter.parameter_count(layer.linear_map.matrix_shape) == trained


def test_a_method_of_ones_own_needs_three_functions():
    class Shift(keras_lora.Adapter):
        """`W' = W + d`: one number added to every entry."""

        def build_for(self, linear):
            self.shift = self.add_factor("shift", (), "zeros")
            self.built = True

        def parameter_count(self, matrix_shape):
            return 1

        def delta_kernel(self, matrix):
            return keras.ops.ones_like(matrix) * self.shift

    layer = layers.Dense(3)
    layer.build((None, 4))
    keras_lora.apply_lora(layer, Shift())
    before, x = value(layer(np.ones((1, 4)))), np.ones((1, 4), "float32")
    layer.adapter.shift.assign(0.5)
    np.testing.assert_allclose(value(layer(x)) - before, 2.0, rtol=1e-5)


def with_tokens(tied=True):
    """A language model with a reversible embedding of eleven rows, two of which train."""
    ids = keras.Input((5,), dtype="int32")
    tokens = layers.ReversibleEmbedding(11, 8, tie_weights=tied, name="tokens")
    y = tokens(layers.Dense(8, activation="tanh", name="dense")(tokens(ids)), reverse=True)
    return keras.Model(ids, y)


@EVERYWHERE
def test_trainable_tokens_train_their_rows_and_leave_every_other_bit(tmp_path):
    model, x = with_tokens(), np.array([[1, 2, 3, 4, 5], [7, 7, 2, 9, 0]], "int32")
    table = value(model.get_layer("tokens").embeddings).copy()
    before = model.predict(x, verbose=0)
    keras_lora.apply_lora(model, rank=1, adapter_pattern={"tokens": keras_lora.TrainableTokens([2, 9])})
    assert np.array_equal(model.predict(x, verbose=0), before)
    assert sorted(v.name for v in model.trainable_variables) == ["lora_a", "lora_b", "token_delta"]
    model.compile(keras.optimizers.Adam(0.1), loss="mse")
    model.fit(x, np.ones(before.shape), epochs=3, verbose=0)
    trained = model.predict(x, verbose=0)
    assert np.abs(trained - before).max() > 1e-2
    keras_lora.save_adapter(model, tmp_path / "tokens.safetensors")
    assert (tmp_path / "tokens.safetensors").stat().st_size < 2000
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert np.abs(loaded.predict(x, verbose=0) - trained).max() < 1e-6
    keras_lora.merge_lora(model)
    after = value(model.get_layer("tokens").embeddings)
    changed = np.flatnonzero((after != table).any(axis=1))
    assert changed.tolist() == [2, 9]
    assert np.abs(model.predict(x, verbose=0) - trained).max() < 1e-5, "rows are read on the way in and on the way out"
    fresh = with_tokens()
    fresh.set_weights([value(v) for v in keras_lora.remove_lora(loaded).variables])
    keras_lora.load_adapter(fresh, tmp_path / "tokens.safetensors")
    assert np.abs(fresh.predict(x, verbose=0) - trained).max() < 1e-6


def test_trainable_tokens_refuse_what_is_no_row_of_an_embedding():
    for tokens in ([], [1, 1], [-1], [1.5]):
        with pytest.raises(ValueError, match="distinct non-negative integers"):
            keras_lora.TrainableTokens(tokens)
    model = with_tokens()
    with pytest.raises(ValueError, match="names row 11 of an embedding with 11 rows"):
        keras_lora.apply_lora(model, adapter_pattern={"tokens": keras_lora.TrainableTokens([11])})
    with pytest.raises(ValueError, match="trains rows of an embedding, and this layer is not one"):
        keras_lora.apply_lora(model, keras_lora.TrainableTokens([1]), targets="dense")
    assert not any("lora" in v.path for v in model.variables)


def test_one_adapter_of_a_tied_embedding_serves_both_ways_and_merges():
    model, x = with_tokens(), np.array([[1, 2, 3, 4, 5]], "int32")
    for method in ("lora", "dora"):
        keras_lora.apply_lora(model, method, rank=2, targets="tokens")
        assert len([v for v in model.trainable_variables if v.name == "lora_a"]) == 1
        perturb(model)
        before = model.predict(x, verbose=0)
        assert np.abs(keras_lora.merge_lora(model).predict(x, verbose=0) - before).max() < 1e-4


@EVERYWHERE
@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="only TensorFlow has ragged tensors")
@pytest.mark.parametrize("method", [keras_lora.LoRA(rank=2), keras_lora.DoRA(rank=2), keras_lora.TrainableTokens([1, 3])])
@pytest.mark.parametrize("cls", [keras_lora.layers.LoRAEmbedding, keras_lora.layers.LoRAReversibleEmbedding])
def test_ragged_ids_give_the_rows_that_flat_ids_give(cls, method):
    import tensorflow as tf

    layer = cls(7, 4, adapter=method)
    layer.build((None,))
    perturb(layer)
    rows = layer(tf.ragged.constant([[1, 2, 3], [4]]))
    assert rows.row_lengths().numpy().tolist() == [3, 1]
    assert np.array_equal(rows.flat_values.numpy(), value(layer(np.array([1, 2, 3, 4]))).astype("float32"))


@pytest.mark.parametrize("method", [keras_lora.LoRA, keras_lora.DoRA])
def test_freeze_a_trains_b_alone_and_both_are_in_the_file(tmp_path, method):
    def base():
        keras.utils.set_random_seed(0)
        return keras.Sequential([keras.Input((6,)), layers.Dense(5, activation="tanh")])

    model = keras_lora.apply_lora(base(), method(rank=2, freeze_a=True), head=None)
    assert "lora_a" not in [v.name for v in model.trainable_variables]
    assert "lora_b" in [v.name for v in model.trainable_variables]
    adapter = model.layers[0].adapter
    counted = sum(int(np.prod(v.shape)) for v in model.trainable_variables)
    assert counted == adapter.parameter_count((6, 5))
    frozen = value((adapter.lora if method is keras_lora.DoRA else adapter).lora_a).copy()
    x = np.random.default_rng(0).normal(size=(8, 6)).astype("float32")
    model.compile("adam", "mse")
    model.fit(x, np.ones((8, 5)), epochs=2, verbose=0)
    assert np.array_equal(value((adapter.lora if method is keras_lora.DoRA else adapter).lora_a), frozen)
    keras_lora.save_adapter(model, tmp_path / "a.safetensors")
    loaded = keras_lora.load_adapter(base(), tmp_path / "a.safetensors")
    assert difference([value(loaded(x))], [value(model(x))]) < 1e-6
    assert len(loaded.trainable_variables) == len(model.trainable_variables)


def test_freeze_a_is_refused_where_a_is_zero():
    table = layers.Embedding(9, 4)
    table.build(None)
    with pytest.raises(ValueError, match="`freeze_a` keeps A as it starts"):
        keras_lora.apply_lora(table, keras_lora.LoRA(rank=2, freeze_a=True))
    assert type(table) is layers.Embedding


def test_an_adapted_embedding_hands_its_mask_on():
    layer = layers.Embedding(9, 4, mask_zero=True)
    ids = np.array([[1, 2, 0], [3, 0, 0]], "int32")
    before = layer(ids)._keras_mask
    keras_lora.apply_lora(layer, rank=1)
    assert np.array_equal(keras.ops.convert_to_numpy(layer(ids)._keras_mask), keras.ops.convert_to_numpy(before))
    reversible = layers.ReversibleEmbedding(9, 4, mask_zero=True)
    reversible(ids)
    keras_lora.apply_lora(reversible, rank=1)
    assert np.array_equal(keras.ops.convert_to_numpy(reversible(ids)._keras_mask), ids != 0)
