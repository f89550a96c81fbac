"""AdaLoRA against NumPy and PEFT, and the callbacks that act on ranks during `fit`."""

import keras
import numpy as np
import pytest
from helpers import difference, outputs, perturb, value
from keras import layers

import keras_lora
from keras_lora.callbacks import AdaLoRABudget, PruneRank, ReLoRA

X = np.random.default_rng(0).normal(size=(64, 8)).astype("float32")
Y = np.random.default_rng(1).normal(size=(64, 3)).astype("float32")


class Counted(layers.Layer):
    """Counts how often it is traced; on torch, how often it runs."""

    traces = 0

    def call(self, x):
        type(self).traces += 1
        return x


def net():
    keras.utils.set_random_seed(3)
    stack = [layers.Dense(6, activation="tanh", name="a"), Counted(), layers.Dense(7, name="b"), layers.Dense(3, name="out")]
    return keras.Sequential([keras.Input((8,)), *stack], name="net")


def fit(model, epochs=1, callbacks=(), optimizer=None, shuffle=False):
    if optimizer is not False:
        model.compile(optimizer or keras.optimizers.Adam(1e-2), "mse")
    return model.fit(X, Y, batch_size=8, epochs=epochs, shuffle=shuffle, verbose=0, callbacks=list(callbacks))


def dense(**arguments):
    layer = layers.Dense(6)
    layer.build((None, 9))
    layer = keras_lora.apply_lora(layer, keras_lora.AdaLoRA(rank=4, alpha=8, **arguments))
    perturb(layer, 0.5)
    return layer


@pytest.mark.torch_first
def test_it_is_the_masked_product_of_three_factors():
    layer = dense()
    layer.adapter.rank_mask.assign([1.0, 0.0, 1.0, 1.0])
    p, e, q = (value(getattr(layer.adapter, name)) for name in ("lora_a", "lora_e", "lora_b"))
    expected = 2 * p @ np.diag(e * [1, 0, 1, 1]) @ q  # Zhang et al., eq. 3
    np.testing.assert_allclose(value(layer.adapter.delta_kernel(layer.linear_map.matrix)), expected, atol=1e-6)
    x = np.random.default_rng(2).normal(size=(3, 9)).astype("float32")
    np.testing.assert_allclose(value(layer(x)), x @ (value(layer.linear_map.matrix) + expected), atol=1e-5)


@pytest.mark.torch_first
def test_the_penalty_is_that_of_the_paper():
    layer = dense(orthogonality=0.5)
    p, q = value(layer.adapter.lora_a), value(layer.adapter.lora_b)
    expected = 0.5 * sum(((gram - np.eye(4)) ** 2).sum() for gram in (p.T @ p, q @ q.T))  # eq. 4
    assert sum(float(keras.ops.convert_to_numpy(each)) for each in layer.losses) == pytest.approx(expected, rel=1e-5)
    assert not dense(orthogonality=0).losses


@pytest.mark.once
def test_peft_gives_the_same_outputs():
    import torch
    from peft import AdaLoraConfig, get_peft_model

    layer = dense()
    base = torch.nn.Sequential(torch.nn.Linear(9, 6))
    config = AdaLoraConfig(target_modules=["0"], init_r=4, target_r=2, lora_alpha=8, total_step=10, tinit=1, tfinal=1)
    theirs = get_peft_model(base, config)
    module = theirs.base_model.model[0]
    with torch.no_grad():
        module.base_layer.weight.copy_(torch.tensor(value(layer.linear_map.matrix).T))
        module.base_layer.bias.copy_(torch.tensor(value(layer.bias)))
        module.lora_A["default"].copy_(torch.tensor(value(layer.adapter.lora_a).T))
        module.lora_E["default"].copy_(torch.tensor(value(layer.adapter.lora_e))[:, None])
        module.lora_B["default"].copy_(torch.tensor(value(layer.adapter.lora_b).T))
    x = np.random.default_rng(2).normal(size=(3, 9)).astype("float32")
    theirs.eval()
    found = theirs.base_model.model(torch.tensor(x)).detach().numpy()
    assert np.abs(found - x @ value(layer.linear_map.matrix) - value(layer.bias)).max() > 0.1
    np.testing.assert_allclose(value(layer(x)), found, atol=1e-5)


def used(model):
    return sum(int(value(v).sum()) for v in model.variables if v.name == "rank_mask")


@pytest.mark.every_backend
def test_the_budget_is_met_exactly_and_nothing_is_traced_again(tmp_path):
    model = keras_lora.apply_lora(net(), "adalora", rank=6)
    budget, seen = AdaLoRABudget(rank=2, begin=4, end=16), []
    watch = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append((Counted.traces, used(model))))
    fit(model, 4, [budget, watch])
    if keras.backend.backend() != "torch":
        assert len({traces for traces, _ in seen}) == 1
    assert [count for _, count in seen] == [budget.budget(step) for step in (8, 16, 24, 32)]
    assert [count for _, count in seen][1:] == [4, 4, 4]
    assert seen[0][1] == 4 + round(8 * (8 / 12) ** 3)
    assert sum(budget.ranks().values()) == 4
    masks = [value(v) for v in model.variables if v.name == "rank_mask"]
    assert {*np.concatenate(masks)} == {0.0, 1.0}
    expected = outputs(model, X)
    keras_lora.save_adapter(model, tmp_path / "a.safetensors")
    assert difference(outputs(keras_lora.load_adapter(net(), tmp_path / "a.safetensors"), X), expected) < 1e-6
    report = keras_lora.compress_adapter(model, energy=1.0)
    assert [row.rank for row in report] == [max(1, int(mask.sum())) for mask in masks]
    assert difference(outputs(model, X), expected) < 1e-5


@pytest.mark.torch_first
def test_the_budget_keeps_the_terms_that_move_the_loss():
    """Only kernel `a` is given something to learn."""
    model = keras_lora.apply_lora(net(), "adalora", rank=4, targets=["a", "b"])
    for name, size in (("a", 1.0), ("b", 1e-4)):
        adapter = model.get_layer(name).adapter
        adapter.lora_e.assign(np.full(4, size))
    budget = AdaLoRABudget(rank=2, begin=2, end=8)
    fit(model, 2, [budget])
    ranks = budget.ranks()
    assert sorted(ranks.values()) == [0, 4]
    assert value(model.get_layer("a").adapter.rank_mask).all()


@pytest.mark.torch_first
def test_a_short_fit_and_wrong_arguments_are_told():
    model = keras_lora.apply_lora(net(), "adalora", rank=4)
    with pytest.warns(UserWarning, match="reached step 8 of 20"):
        fit(model, 1, [AdaLoRABudget(rank=2, begin=2, end=20)])
    fit(model, 2, [AdaLoRABudget(rank=2, begin=2, end=20)], optimizer=False)  # goes on at step 8
    assert used(model) == 4
    with pytest.raises(ValueError, match="at most the rank"):
        fit(model, 1, [AdaLoRABudget(rank=5, begin=2, end=20)])
    with pytest.raises(ValueError, match="larger than `begin`"):
        AdaLoRABudget(rank=2, begin=3, end=3)
    with pytest.raises(ValueError, match="found no AdaLoRA"):
        fit(keras_lora.apply_lora(net(), rank=2), 1, [AdaLoRABudget(rank=2, begin=1, end=2)])


@pytest.mark.torch_first
def test_restarts_keep_what_was_learned_and_leave_the_base(tmp_path):
    model = keras_lora.apply_lora(net(), keras_lora.LoRA(rank=1, kept=4, seed=5))
    base = [value(layer.linear_map.matrix) for layer in model.layers if hasattr(layer, "linear_map")]
    restarts, seen, states = ReLoRA(every=4), [], []

    def look(batch, logs):
        model.jax_state_sync() if keras.backend.backend() == "jax" else None
        if restarts.steps in (4, 8):
            states.append([float(np.abs(value(v)).max()) for v in model.optimizer.variables if "lora" in v.name])

    watch = keras.callbacks.LambdaCallback(on_train_batch_end=look)
    epochs = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(Counted.traces))
    history = fit(model, 2, [restarts, watch, epochs]).history
    if keras.backend.backend() != "torch":
        assert len(set(seen)) == 1
    assert [step for step, _ in restarts.restarts] == [4, 8, 12, 16]
    assert max(error for _, error in restarts.restarts) < 1e-6, "a sum of four changes of rank 1 fits in rank 4"
    assert history["relora_error"][-1] == restarts.restarts[-1][1]
    assert [len(each) for each in states] == [8, 8]
    assert max(max(each) for each in states) == 0
    for layer, before in zip([each for each in model.layers if hasattr(each, "linear_map")], base, strict=True):
        assert np.array_equal(value(layer.linear_map.matrix), before)
        assert np.linalg.matrix_rank(value(layer.adapter.kept_a) @ value(layer.adapter.kept_b), 1e-6) > 1
        assert not value(layer.adapter.lora_b).any()
        assert value(layer.adapter.lora_a).any()
    keras_lora.save_adapter(model, tmp_path / "a.safetensors")
    again = keras_lora.load_adapter(net(), tmp_path / "a.safetensors")
    assert difference(outputs(again, X), outputs(model, X)) < 1e-6


@pytest.mark.torch_first
def test_a_restart_changes_no_output_and_reports_what_does_not_fit():
    model = keras_lora.apply_lora(net(), keras_lora.LoRA(rank=2, kept=2, seed=5))
    restarts, seen = ReLoRA(every=8, until=16), []
    plain = keras_lora.apply_lora(net(), keras_lora.LoRA(rank=2, kept=2, seed=5))
    fit(plain, 1)
    fit(model, 1, [restarts])
    assert difference(outputs(model, X), outputs(plain, X)) < 1e-6
    first = [value(layer.adapter.lora_a) for layer in model.layers if hasattr(layer, "adapter")]
    fit(model, 2, [restarts, keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: seen.append(1))], optimizer=False)
    assert [step for step, _ in restarts.restarts] == [8, 16]
    assert restarts.restarts[0][1] < 1e-6 < restarts.restarts[1][1], "rank 4 does not fit in 2"
    assert difference(first, [value(layer.adapter.lora_a) for layer in model.layers if hasattr(layer, "adapter")]) > 1e-3
    with pytest.raises(ValueError, match="needs a kept pair, which"):
        fit(keras_lora.apply_lora(net(), rank=2), 1, [ReLoRA(every=2)])
    with pytest.raises(ValueError, match="found no LoRA"):
        fit(keras_lora.apply_lora(net(), "dora", rank=2), 1, [ReLoRA(every=2)])


@pytest.mark.torch_first
def test_moving_averages_start_anew_at_the_factors():
    model = keras_lora.apply_lora(net(), keras_lora.LoRA(rank=1, kept=2, seed=5))
    scaled = keras_lora.optimizers.ScaledUpdates(keras.optimizers.Adam(1e-2, use_ema=True), {"lora_b": 4})
    fit(model, 1, [ReLoRA(every=8)], optimizer=scaled)
    for layer in (model.get_layer("a"), model.get_layer("b")):
        assert value(layer.adapter.lora_a).any()
        assert not value(layer.adapter.lora_b).any()


@pytest.mark.torch_first
def test_ranks_are_pruned_by_energy_at_the_end():
    model = keras_lora.apply_lora(net(), rank=4)
    prune, plain = PruneRank(0.9), keras_lora.apply_lora(net(), rank=4)
    keras.utils.set_random_seed(1)
    fit(model, 2, [prune])
    keras.utils.set_random_seed(1)
    fit(plain, 2)
    kept = {row.layer: row for row in prune.report}
    assert all(row.rank < 4 and row.error < np.sqrt(0.1) + 1e-3 for row in kept.values())
    assert [v.shape[-1] for v in model.trainable_variables if v.name == "lora_a"] == [row.rank for row in prune.report]
    fit(model)
    with pytest.raises(ValueError, match="energy"):
        PruneRank(0)
