"""`SaveAdapter` saves during `fit`, and what cannot work is an error before the first step."""

import json
import os

import keras
import numpy as np
import pytest
from helpers import header_of, once, value
from keras import layers

import keras_lora
from keras_lora.callbacks import SaveAdapter

X, Y = np.random.default_rng(0).normal(size=(12, 8)).astype("float32"), np.ones((12, 2), "float32")


def net(**options):
    model = keras.Sequential([keras.Input((8,)), layers.Dense(8, name="a"), layers.Dense(2, name="head")])
    keras_lora.apply_lora(model, rank=2, train="head", **options)
    model.compile(keras.optimizers.SGD(0.01), "mse", metrics=["mae"])
    return model


def fit(model, callback, epochs=2, **options):
    return model.fit(X, Y, batch_size=4, epochs=epochs, shuffle=False, verbose=0, callbacks=[callback], **options)


def values_of(model):
    return [value(v) for v in model.trainable_variables]


@pytest.mark.every_backend
def test_each_file_has_the_values_of_its_moment(tmp_path):
    class Look(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            seen.append(values_of(self.model))

    seen, model = [], net()
    model.fit(
        X,
        Y,
        batch_size=4,
        epochs=2,
        verbose=0,
        callbacks=[SaveAdapter(tmp_path / "{epoch:02d}_{loss:.3f}.safetensors"), Look()],
    )
    files = sorted(tmp_path.iterdir())
    assert [each.name[:3] for each in files] == ["01_", "02_"]
    for file, expected in zip(files, seen, strict=True):
        loaded = keras_lora.load_adapter(net(), file)
        assert all(map(np.array_equal, values_of(loaded), expected))
    assert not np.array_equal(seen[0][0], seen[1][0])


@pytest.mark.torch_first
def test_every_so_many_batches_across_epochs(tmp_path):
    model, states = net(), []

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            states.append(values_of(self.model))

    callbacks = [SaveAdapter(tmp_path / "{epoch}_{batch}.safetensors", save_freq=2), Look()]
    model.fit(X, Y, batch_size=4, epochs=2, verbose=0, callbacks=callbacks)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["1_2.safetensors", "2_1.safetensors", "2_3.safetensors"]
    loaded = keras_lora.load_adapter(net(), tmp_path / "2_1.safetensors")
    assert all(map(np.array_equal, values_of(loaded), states[3]))


def run(callback, logs, model=None):
    """The callback in a training with these logs at the end of each epoch."""
    callback.set_model(model or net())
    callback.on_train_begin()
    for epoch, each in enumerate(logs):
        callback.on_epoch_begin(epoch)
        callback.on_train_batch_end(0, {"loss": 1.0, "mae": 1.0, "accuracy": 1.0, "score": 1.0})
        callback.on_epoch_end(epoch, each)


@once
@pytest.mark.parametrize(
    ("options", "numbers", "saved"),
    [
        ({}, [3, 4, 2, float("nan"), 1], [1, 3, 5]),
        ({"mode": "max"}, [3, 4, 2, 5], [1, 2, 4]),
        ({"initial_value_threshold": 2.5}, [3, 2, 1], [2, 3]),
        ({}, [float("nan"), 3], [2]),
        ({}, [3, 3], [1]),
    ],
)
def test_only_the_best_is_saved(tmp_path, options, numbers, saved):
    run(SaveAdapter(tmp_path / "{epoch}.safetensors", save_best_only=True, **options), [{"val_loss": n} for n in numbers])
    assert sorted(int(each.stem) for each in tmp_path.iterdir()) == saved


@once
def test_the_direction_of_a_metric_is_known(tmp_path):
    model = net()
    model.compile("sgd", "mse", metrics=["accuracy", "mae"])
    model.fit(X, Y, verbose=0)
    for monitor, saved in {"val_accuracy": [2], "val_mae": [1]}.items():
        callback = SaveAdapter(tmp_path / "{epoch}.safetensors", monitor, save_best_only=True, initial_value_threshold=0.5)
        run(callback, [{monitor: 0.4}, {monitor: 0.6}], model)
        assert sorted(int(each.stem) for each in tmp_path.iterdir()) == saved
        [each.unlink() for each in tmp_path.iterdir()]


@once
def test_a_metric_of_unknown_direction_is_refused_after_the_first_batch(tmp_path):
    with pytest.raises(ValueError, match=r"not known whether 'val_score' is better.*Pass `mode='max'`"):
        run(SaveAdapter(tmp_path / "a.safetensors", "val_score", save_best_only=True), [{}])
    assert not list(tmp_path.iterdir())


@once
def test_a_monitor_that_the_logs_lack_is_named_and_nothing_is_lost(tmp_path):
    callback = SaveAdapter(tmp_path / "{epoch}.safetensors", "val_mea", mode="min", save_best_only=True)
    with pytest.warns(UserWarning, match=r"`SaveAdapter|`save_best") as warnings:
        run(callback, [{}, {"val_mea": 3.0}, {}, {"val_mea": 2.0}])
    texts = [text for each in warnings if "`" in (text := str(each.message))]
    assert "uses 'val_mea', which the logs do not have after the first batch" in texts[0]
    assert "Did you mean 'val_mae'?" in texts[0]
    assert "`save_best_only` needs 'val_mea' in the logs" in texts[1]
    assert len(texts) == 2
    assert sorted(int(each.stem) for each in tmp_path.iterdir()) == [1, 2, 4]


@once
def test_an_older_best_file_is_not_replaced_without_a_word(tmp_path):
    path = tmp_path / "best.safetensors"
    run(SaveAdapter(path, save_best_only=True), [{"val_loss": 1.0}])
    with pytest.warns(UserWarning, match=r"the first epoch replaces it.*`initial_value_threshold`"):
        run(SaveAdapter(path, save_best_only=True), [])
    before = path.read_bytes()
    run(SaveAdapter(path, save_best_only=True, initial_value_threshold=1.0), [{"val_loss": 2.0}])
    assert path.read_bytes() == before


@once
def test_a_named_adapter_is_saved(tmp_path):
    model = net(name="french")
    keras_lora.apply_lora(model, rank=3, name="german")
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match=r"several adapters. Expected one of \['french', 'german'\]"):
        run(SaveAdapter(tmp_path / "a.safetensors"), [{}], model)
    run(SaveAdapter(tmp_path / "a.safetensors", name="german"), [{}], model)
    assert [each["config"]["rank"] for each in header_of(tmp_path / "a.safetensors")["adapters"].values()] == [3]


@once
@pytest.mark.parametrize(
    ("path", "error", "text"),
    [
        ("missing/a.safetensors", FileNotFoundError, "there is no folder .*missing. Make it before training"),
        ("file/a.safetensors", NotADirectoryError, "there is no folder"),
        ("folder.safetensors", IsADirectoryError, "it is a folder"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_before_training(tmp_path, path, error, text):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder.safetensors").mkdir()
    model = net()
    before = values_of(model)
    with pytest.raises(error, match=text):
        fit(model, SaveAdapter(tmp_path / path))
    assert all(map(np.array_equal, values_of(model), before))


@once
def test_a_folder_without_permission_is_refused_before_training(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)  # root may write everywhere
    with pytest.raises(PermissionError, match=r"Permission denied, so `SaveAdapter` cannot write.*a.safetensors"):
        run(SaveAdapter(tmp_path / "a.safetensors"), [])


@once
def test_a_plain_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`SaveAdapter.*found no adapter"):
        run(SaveAdapter(tmp_path / "a.safetensors"), [], keras.Sequential([keras.Input((8,)), layers.Dense(2)]))


@once
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"filepath": "a.keras"}, "must end in '.safetensors'"),
        ({"filepath": "hf://me/french"}, "saves to a local path"),
        ({"mode": "largest"}, "`mode` must be one of"),
        ({"save_freq": 0}, "positive integer. Received: save_freq=0"),
        ({"save_freq": "batch"}, "`save_freq` must be 'epoch'"),
        ({"filepath": "{batch}.safetensors"}, "`filepath` may contain.*'batch'"),
        ({"filepath": "{}.safetensors"}, "`filepath` may contain"),
        ({"initial_value_threshold": float("nan")}, "must be a finite number"),
        ({"save_best_only": "yes"}, "`save_best_only`"),
    ],
)
def test_wrong_arguments_are_refused(arguments, text):
    with pytest.raises(ValueError, match=text):
        SaveAdapter(**{"filepath": "a.safetensors", **arguments})


@once
def test_a_name_that_the_path_cannot_get_is_named(tmp_path):
    with (
        pytest.warns(UserWarning, match=r"uses 'val_los'"),
        pytest.raises(ValueError, match=r"cannot fill in its `filepath`.*Expected names out of \['epoch', 'val_loss'\]"),
    ):
        run(SaveAdapter(tmp_path / "{val_los:.2f}.safetensors"), [{"val_loss": 1.0}])
    assert json.dumps(os.listdir(tmp_path)) == "[]"
