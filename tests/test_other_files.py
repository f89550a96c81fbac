"""Every other way to save or copy a Keras model either works or refuses by name."""

import copy
import pickle
import zipfile

import keras
import numpy as np
import pytest
from helpers import covering, difference, outputs, perturb, value, values
from keras import layers
from zoo import BATCH, DIM, ZOO, Block, numbers

import keras_lora
from keras_lora.swap.addresses import walk

pytestmark = pytest.mark.torch_first

SOME = ["sequential", "multi_head_attention", "block_built_in_build", "subclassed", "hub_bert_backbone"]


def adapted(name):
    specimen = ZOO[name]()
    keras_lora.apply_lora(specimen.model, **specimen.apply)
    perturb(specimen.model)
    return specimen


def flags(model):
    return [(v.trainable, tuple(v.shape)) for v in model.variables]


@pytest.mark.parametrize("name", covering(SOME, SOME[:2]))
def test_weights_of_an_adapted_model_load_into_a_model_adapted_the_same_way(tmp_path, name):
    trained, fresh = adapted(name), ZOO[name]()
    trained.model.save_weights(tmp_path / "m.weights.h5")
    keras_lora.apply_lora(fresh.model, **fresh.apply)
    fresh.model.load_weights(tmp_path / "m.weights.h5")
    assert difference(outputs(fresh.model, fresh.x), outputs(trained.model, trained.x)) == 0


@pytest.mark.parametrize("name", SOME)
def test_base_weights_load_into_an_adapted_model_and_leave_the_adapter(tmp_path, name):
    base, other = ZOO[name](), adapted(name)
    perturb(base.model, seed=5)
    base.model.save_weights(tmp_path / "base.weights.h5")
    before = {v.path: value(v) for v in other.model.trainable_variables if "/lora_" in v.path}
    other.model.load_weights(tmp_path / "base.weights.h5")
    after = {v.path: value(v) for v in other.model.trainable_variables if "/lora_" in v.path}
    assert before
    assert all(np.array_equal(before[path], after[path]) for path in before)
    keras_lora.remove_lora(other.model)
    assert difference(outputs(other.model, other.x), outputs(base.model, base.x)) == 0


def test_an_untrained_dora_follows_other_base_weights(tmp_path):
    specimen, other = ZOO["multi_head_attention"](), ZOO["multi_head_attention"]()
    perturb(specimen.model, seed=5)
    specimen.model.save_weights(tmp_path / "base.weights.h5")
    keras_lora.apply_lora(other.model, "dora", rank=2)
    other.model.load_weights(tmp_path / "base.weights.h5")
    assert difference(outputs(other.model, other.x), outputs(specimen.model, specimen.x)) < 1e-6


@pytest.mark.parametrize("name", SOME)
@pytest.mark.filterwarnings("ignore:Skipping nested container")  # Keras says so before it raises
def test_adapted_weights_are_refused_by_a_plain_model(tmp_path, name):
    trained, plain = adapted(name), ZOO[name]()
    trained.model.save_weights(tmp_path / "m.weights.h5")
    with pytest.raises(ValueError, match=r"could not be loaded|expected|Expected"):
        plain.model.load_weights(tmp_path / "m.weights.h5")


def test_an_adapter_of_another_method_refuses_the_weights(tmp_path):
    trained, other = ZOO["sequential"](), ZOO["sequential"]()
    keras_lora.apply_lora(trained.model, "lora", rank=2)
    keras_lora.apply_lora(other.model, "dora", rank=2)
    trained.model.save_weights(tmp_path / "m.weights.h5")
    with pytest.raises(ValueError, match="does not fit adapter"):
        other.model.load_weights(tmp_path / "m.weights.h5")


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_a_copy_is_the_same_model_apart(name, way):
    specimen = adapted(name)
    twin = way(specimen.model)
    assert flags(twin) == flags(specimen.model)
    expected = outputs(specimen.model, specimen.x)
    assert difference(outputs(twin, specimen.x), expected) == 0
    perturb(twin, seed=6)
    assert difference(outputs(specimen.model, specimen.x), expected) == 0
    assert difference(outputs(twin, specimen.x), expected) > 0


@pytest.mark.every_backend
def test_a_copy_keeps_the_optimizer():
    specimen = adapted("sequential")
    specimen.model.compile(keras.optimizers.Adam(1e-2), "mse")
    specimen.model.fit(specimen.x, specimen.y, epochs=3, verbose=0)
    assert int(copy.deepcopy(specimen.model).optimizer.iterations) == 3


@pytest.mark.parametrize("name", SOME)
def test_from_config_and_json_rebuild_the_adapters(name):
    specimen = adapted(name)
    model = specimen.model
    for twin in (type(model).from_config(model.get_config()), keras.models.model_from_json(model.to_json())):
        if not twin.built:
            twin.build(np.shape(specimen.x))
        assert flags(twin) == flags(model)
        twin.set_weights(model.get_weights())
        assert difference(outputs(twin, specimen.x), outputs(model, specimen.x)) < 1e-6


@pytest.mark.parametrize("name", ["sequential", "multi_head_attention", "block_built_in_build", "nested"])
def test_clone_model_keeps_adapters_and_flags(name):
    specimen = adapted(name)
    twin = keras.models.clone_model(specimen.model)
    assert flags(twin) == flags(specimen.model)
    twin.set_weights(specimen.model.get_weights())
    assert difference(outputs(twin, specimen.x), outputs(specimen.model, specimen.x)) < 1e-6


def test_model_checkpoint_and_early_stopping(tmp_path):
    specimen = adapted("multi_head_attention")
    specimen.model.compile(keras.optimizers.Adam(1e-2), "mse")
    callbacks = [
        keras.callbacks.ModelCheckpoint(tmp_path / "whole.keras"),
        keras.callbacks.ModelCheckpoint(tmp_path / "part.weights.h5", save_weights_only=True),
        keras.callbacks.EarlyStopping("loss", patience=1, restore_best_weights=True),
    ]
    specimen.model.fit(specimen.x, specimen.y, epochs=3, verbose=0, callbacks=callbacks)
    expected = outputs(specimen.model, specimen.x)
    assert difference(outputs(keras.saving.load_model(tmp_path / "whole.keras"), specimen.x), expected) == 0
    other = adapted("multi_head_attention")
    other.model.compile(keras.optimizers.Adam(1e-2), "mse")
    other.model.load_weights(tmp_path / "part.weights.h5")
    assert difference(outputs(other.model, other.x), expected) == 0


@pytest.mark.every_backend
def test_backup_and_restore_goes_on_where_it_stopped(tmp_path):
    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    def run(epochs, folder, *extra):
        specimen = adapted("multi_head_attention")
        specimen.model.compile(keras.optimizers.Adam(1e-2), "mse")
        callbacks = [keras.callbacks.BackupAndRestore(folder), *extra] if folder else list(extra)
        specimen.model.fit(
            specimen.x, specimen.y, epochs=epochs, batch_size=BATCH, shuffle=False, verbose=0, callbacks=callbacks
        )
        return outputs(specimen.model, specimen.x)

    straight = run(4, None)
    with pytest.raises(KeyboardInterrupt):
        run(4, tmp_path, Stop())
    assert difference(run(4, tmp_path), straight) < 1e-6


def test_an_unzipped_keras_folder(tmp_path):
    specimen = adapted("multi_head_attention")
    specimen.model.save(tmp_path / "folder", zipped=False)
    loaded = keras.saving.load_model(tmp_path / "folder")
    assert difference(outputs(loaded, specimen.x), outputs(specimen.model, specimen.x)) == 0


def test_the_old_h5_format(tmp_path):
    specimen = adapted("sequential")
    specimen.model.save(tmp_path / "m.h5")
    loaded = keras.saving.load_model(tmp_path / "m.h5")
    assert flags(loaded) == flags(specimen.model)
    assert difference(outputs(loaded, specimen.x), outputs(specimen.model, specimen.x)) == 0


class Forgetful(keras.Model):
    """Its config does not say how many units it has."""

    def __init__(self, units=3, deep=False, **kwargs):
        super().__init__(**kwargs)
        self.blocks = [layers.Dense(units) for _ in range(3 if deep else 1)]
        self.head = layers.Dense(2)

    def call(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def get_config(self):
        return {"name": self.name}


def test_a_model_that_would_load_wrong_is_refused_at_save_time_by_name(tmp_path):
    model = Forgetful(deep=True, name="forgetful")
    model(numbers(2, DIM))
    keras_lora.apply_lora(model, rank=2)
    path = tmp_path / "m.keras"
    path.write_bytes(b"an older file")
    with pytest.raises(
        ValueError, match=r"'forgetful' cannot be saved: .* at \['blocks/1 \(Dense\)', 'blocks/2 \(Dense\)'\]"
    ):
        model.save(path)
    assert path.read_bytes() == b"an older file"
    keras_lora.save_adapter(model, tmp_path / "m.safetensors")  # what the message advises


def test_a_config_that_loses_a_size_is_refused_at_save_time(tmp_path):
    model = Forgetful(units=5, name="forgetful")
    model(numbers(2, DIM))
    keras_lora.apply_lora(model, rank=2)
    with pytest.raises(ValueError, match="'forgetful' cannot be saved"):
        model.save(tmp_path / "m.keras")


def test_saving_does_not_change_the_random_numbers_that_follow(tmp_path):
    def draw(save):
        specimen = adapted("subclassed")
        if save:
            specimen.model.save(tmp_path / "m.keras")
        return value(keras.random.uniform((3,), seed=keras.random.SeedGenerator()))

    assert np.array_equal(draw(save=False), draw(save=True))


def test_a_part_of_an_adapted_model_can_be_saved_and_used_alone(tmp_path):
    x = keras.Input((DIM,))
    block = Block(6, name="block")
    model = keras.Model(x, layers.Dense(2)(block(x)))
    keras_lora.apply_lora(model, rank=2)
    perturb(model)
    alone = keras.Model(x, block.output)
    alone.save(tmp_path / "alone.keras")
    loaded = keras.saving.load_model(tmp_path / "alone.keras")
    data = numbers(3, DIM)
    assert difference(outputs(loaded, data), outputs(alone, data)) == 0
    assert len(loaded.trainable_variables) == 4


def test_the_config_keeps_the_arguments_of_the_base_at_its_top():
    specimen = adapted("multi_head_attention")
    attention = specimen.model.get_layer("attention")
    assert attention.get_config()["num_heads"] == 2
    assert "keras_lora" in attention.get_config()


def test_a_kerashub_preset_is_refused_by_name(tmp_path):
    specimen = adapted("hub_bert_backbone")
    with pytest.raises(ValueError, match="merge_lora"):
        specimen.model.save_to_preset(tmp_path / "preset")
    assert not (tmp_path / "preset").exists()


def test_the_weights_file_names_layers_after_the_base_class(tmp_path):
    specimen = adapted("sequential")
    specimen.model.save(tmp_path / "m.keras")
    with zipfile.ZipFile(tmp_path / "m.keras") as file:
        assert b"lo_ra_dense" not in file.read("model.weights.h5")


def test_values_by_path_are_unique():
    model = adapted("hub_bert_backbone").model
    assert len(values(model.variables)) == len(model.variables)


def test_a_model_that_was_saved_is_still_left_as_found_by_removal(tmp_path):
    specimen = ZOO["subclassed"]()
    before = {place.address: set(vars(place.layer)) for place in walk(specimen.model)}
    keras_lora.apply_lora(specimen.model, rank=2)
    specimen.model.save(tmp_path / "m.keras")
    keras_lora.remove_lora(specimen.model)
    after = {place.address: set(vars(place.layer)) - {"_torch_params"} for place in walk(specimen.model)}
    assert after == {address: names - {"_torch_params"} for address, names in before.items()}
