"""The numbers behind the plots against numbers worked out by hand, and what the figures show of them."""

import ast
import io
import math
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from helpers import perturb
from keras import layers

import keras_lora
from keras_lora import plots
from keras_lora.plots import drawing
from keras_lora.plots.measuring import AdapterMeasure, effective_rank
from keras_lora.swap import slots

pytestmark = pytest.mark.torch_first

#: Importing matplotlib and drawing take more time than all else here.
full = pytest.mark.full
FIGURES = {
    "ranks": lambda model: plots.plot_ranks(model),
    "changes": lambda model: plots.plot_changes(model),
    "overlaps": lambda model: plots.plot_overlaps(model),
    "cosines": lambda model: plots.plot_overlaps(model, measure="cosine"),
    "curves": lambda model: plots.plot_curves({"a": {"loss": [2.0, 1.0], "val_loss": [3.0, 2.0]}, "b": {"loss": [2.0]}}),
}


def net(*names, kernel=((6, 0), (0, 8), (0, 0))):
    """A model whose layers of these names have kernels with the norm 10, and a head."""
    model = keras.Sequential([keras.Input((3,)), *(layers.Dense(2, name=name) for name in names[:1])])
    for name in names[1:]:
        model.add(layers.Dense(3, name=f"between_{name}"))
        model.add(layers.Dense(2, name=name))
    model.add(layers.Dense(2, name="head"))
    for name in names:
        model.get_layer(name).kernel.assign(np.array(kernel, "float32"))
    return model


def adapt(model, name="default", rank=2, **changes):
    """Add a LoRA of the scale 1 to layers, with these factors for each."""
    keras_lora.apply_lora(model, keras_lora.LoRA(rank=rank, alpha=rank), targets=list(changes), name=name)
    for layer, (a, b) in changes.items():
        [adapter] = [each for each in slots.adapters_in(model.get_layer(layer)) if each.adapter_name == name]
        adapter.lora_a.assign(np.array(a, "float32"))
        adapter.lora_b.assign(np.array(b, "float32"))
    return model


#: ΔW = [[3, 0], [0, 4], [0, 0]].
RANK_2 = ([[1, 0], [0, 1], [0, 0]], [[3, 0], [0, 4]])
#: Two equal directions, so ΔW = [[3, 4], [0, 0], [0, 0]] of rank 1.
RANK_1 = ([[1, 1], [0, 0], [0, 0]], [[3, 0], [0, 4]])


def along(*direction):
    """A change of rank 1 that reads this direction of the input, and writes the first output."""
    return [[each] for each in direction], [[1, 0]]


# The size and the rank of a change.


def test_a_change_of_rank_2_has_the_numbers_worked_out_by_hand():
    [row] = plots.measure_adapters(adapt(net("hidden"), hidden=RANK_2))
    assert (row.layer, row.name, row.method, row.rank, row.strength) == ("hidden", "default", "LoRA", 2, 1.0)
    assert row.singular_values == pytest.approx((4, 3))
    assert row.effective_rank == pytest.approx(7 / (4 ** (4 / 7) * 3 ** (3 / 7)))
    assert row.compressed_rank == 2
    assert row.relative_change == pytest.approx(0.5)


def test_a_change_of_rank_1_is_seen_in_factors_of_rank_2():
    [row] = plots.measure_adapters(adapt(net("hidden"), hidden=RANK_1))
    assert row.singular_values == pytest.approx((5, 0), abs=1e-12)
    assert (row.effective_rank, row.compressed_rank) == (pytest.approx(1), 1)
    assert row.relative_change == pytest.approx(0.5)


def test_a_new_adapter_changes_nothing():
    [row] = plots.measure_adapters(keras_lora.apply_lora(net("hidden"), rank=2))
    assert (row.singular_values, row.effective_rank, row.relative_change) == ((0, 0), 0, 0)


def test_the_effective_rank_of_equal_values_is_their_number():
    assert effective_rank(np.array([2.0, 2.0, 2.0, 0.0])) == pytest.approx(3)
    assert effective_rank(np.zeros(3)) == 0


def test_the_energy_chooses_the_compressed_rank():
    model = adapt(net("hidden"), hidden=RANK_2)  # 16 of 25 are in the first
    ranks = [plots.measure_adapters(model, energy=energy)[0].compressed_rank for energy in (0.63, 0.65, 1)]
    assert ranks == [1, 2, 2]


def test_the_compressed_rank_is_the_rank_that_compressing_gives():
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((12,)), layers.Dense(16), layers.Dense(9), layers.Dense(2)])
    perturb(keras_lora.apply_lora(model, rank=6), size=1.0)
    measured = {row.layer: row.compressed_rank for row in plots.measure_adapters(model, energy=0.7)}
    report = keras_lora.compress_adapter(model, energy=0.7)
    assert measured == {row.layer: row.rank for row in report}
    assert set(measured.values()) < set(range(2, 6))


def test_the_strength_multiplies_the_size_and_not_the_singular_values():
    model = adapt(net("hidden"), hidden=RANK_2)
    keras_lora.activate_adapters(model, {"default": -0.5})
    [row] = plots.measure_adapters(model)
    assert row.relative_change == pytest.approx(0.25)
    assert row.singular_values == pytest.approx((4, 3))


def test_a_dora_is_measured_on_its_whole_change():
    model = keras_lora.apply_lora(net("hidden"), "dora", rank=1)
    [row] = plots.measure_adapters(model)
    assert (row.effective_rank, row.relative_change) == (0, 0), "rounding of a change that is zero"
    magnitude = model.get_layer("hidden").adapter.magnitude
    magnitude.assign(2 * magnitude)  # W' = 2 W, so ΔW is W
    [row] = plots.measure_adapters(model)
    assert row.singular_values == pytest.approx((8, 6), rel=1e-5)
    assert (row.method, row.rank, row.relative_change) == ("DoRA", 1, pytest.approx(1, rel=1e-5))


def test_trained_tokens_have_no_rank():
    ids = keras.Input((4,), dtype="int32")
    model = keras.Model(ids, layers.Dense(2)(layers.Embedding(5, 2, name="tokens")(ids)))
    model.get_layer("tokens").embeddings.assign(np.full((5, 2), math.sqrt(10), "float32"))  # the norm is 10
    keras_lora.apply_lora(model, keras_lora.TrainableTokens([1, 3]), targets=["tokens"])
    model.get_layer("tokens").adapter.token_delta.assign(np.array([[3, 4], [0, 0]], "float32"))
    [row] = plots.measure_adapters(model)
    assert (row.rank, row.relative_change, row.effective_rank) == (None, pytest.approx(0.5), pytest.approx(1))


def test_a_kernel_with_groups_has_the_root_mean_square_of_its_groups():
    model = keras.Sequential([keras.Input((5, 4)), layers.Conv1D(4, 1, groups=2, name="grouped"), layers.Dense(2)])
    model.get_layer("grouped").kernel.assign(np.full((1, 2, 4), 10 / math.sqrt(8), "float32"))
    keras_lora.apply_lora(model, keras_lora.LoRA(rank=2, alpha=2))
    adapter = model.get_layer("grouped").adapter
    adapter.lora_a.assign(np.stack([np.eye(2)] * 2).astype("float32"))
    adapter.lora_b.assign(np.array([[[3, 0], [0, 0]], [[4, 0], [0, 1]]], "float32"))
    [row] = plots.measure_adapters(model)
    assert row.singular_values == pytest.approx((math.sqrt(12.5), math.sqrt(0.5)))
    assert row.relative_change == pytest.approx(math.sqrt(26) / 10)


def test_several_adapters_have_rows_layer_by_layer():
    model = adapt(net("one", "two"), "french", one=RANK_2, two=RANK_2)
    adapt(model, "formal", two=RANK_1)
    rows = plots.measure_adapters(model)
    assert [(row.layer, row.name) for row in rows] == [("one", "french"), ("two", "french"), ("two", "formal")]
    assert [row.relative_change for row in rows] == pytest.approx([0, 0, 0.5])  # the first is not active now
    assert [row.name for row in plots.measure_adapters(model, names="formal")] == ["formal"]


def test_wrong_arguments_of_the_numbers_raise():
    model = adapt(net("hidden"), hidden=RANK_2)
    with pytest.raises(ValueError, match=r"`measure_adapters\(\)` found no adapter"):
        plots.measure_adapters(net("hidden"))
    with pytest.raises(ValueError, match="has no adapter"):
        plots.measure_adapters(model, names="french")
    with pytest.raises(ValueError, match="must name at least one"):
        plots.measure_adapters(model, names=[])
    with pytest.raises(ValueError, match="`energy` must be"):
        plots.measure_adapters(model, energy=2)
    with pytest.raises(ValueError, match="needs two adapters or more"):
        plots.measure_overlaps(model)
    with pytest.raises(ValueError, match="'subspace' or 'cosine'"):
        plots.measure_overlaps(model, measure="angle")
    with pytest.raises(ValueError, match="does not use `directions`"):
        plots.measure_overlaps(model, measure="cosine", directions=2)
    model.get_layer("hidden").adapter.lora_a.assign(np.full((3, 2), np.nan, "float32"))
    with pytest.raises(ValueError, match="'default' at 'hidden' cannot be measured"):
        plots.measure_adapters(model)


# What adapters have in common.


@pytest.mark.parametrize(
    ("other", "subspace", "cosine"),
    [
        (along(2, 0, 0), 1, 1),
        (along(-1, 0, 0), 1, -1),
        (along(0, 5, 0), 0, 0),
        (along(1, 1, 0), 0.5, math.sqrt(0.5)),
    ],
)
def test_the_overlap_of_two_directions(other, subspace, cosine):
    model = adapt(net("hidden"), "a", rank=1, hidden=along(1, 0, 0))
    adapt(model, "b", rank=1, hidden=other)
    found = plots.measure_overlaps(model)
    assert (found.names, found.chance) == (("a", "b"), pytest.approx(1 / 3))
    np.testing.assert_allclose(found.values, [[1, subspace], [subspace, 1]], atol=1e-9)
    np.testing.assert_allclose(found.layers["hidden"], found.values)
    found = plots.measure_overlaps(model, measure="cosine")
    np.testing.assert_allclose(found.values, [[1, cosine], [cosine, 1]], atol=1e-9)


def test_a_subspace_inside_another_overlaps_in_full_until_fewer_directions_count():
    model = adapt(net("hidden"), "a", hidden=RANK_2)  # its first direction is the second axis
    adapt(model, "b", rank=1, hidden=along(1, 0, 0))
    assert plots.measure_overlaps(model).values[0][1] == pytest.approx(1)
    assert plots.measure_overlaps(model, directions=1).values[0][1] == pytest.approx(0)


def test_the_whole_is_the_mean_of_the_subspaces_and_the_cosine_of_everything():
    three, four = (lambda a, b, size=size: ([[a], [b], [0]], [[size, 0]]) for size in (3, 4))
    model = adapt(net("one", "two"), "a", rank=1, one=three(1, 0), two=four(1, 0))
    adapt(model, "b", rank=1, one=three(1, 0), two=four(0, 1))
    assert plots.measure_overlaps(model).values[0][1] == pytest.approx(0.5)
    assert plots.measure_overlaps(model, measure="cosine").values[0][1] == pytest.approx(9 / 25)


def test_a_layer_that_one_adapter_lacks_or_leaves_as_it_is_has_no_overlap():
    model = adapt(net("one", "two"), "a", rank=1, one=along(1, 0, 0), two=along(1, 0, 0))
    adapt(model, "b", rank=1, one=along(1, 0, 0))
    found = plots.measure_overlaps(model)
    assert found.values[0][1] == pytest.approx(1)
    assert math.isnan(found.layers["two"][0][1])
    assert plots.measure_overlaps(model, measure="cosine").values[0][1] == pytest.approx(math.sqrt(0.5))
    keras_lora.apply_lora(model, rank=1, name="new")
    assert math.isnan(plots.measure_overlaps(model, names=["a", "new"]).values[0][1])


# Training curves.


def history(epochs, **metrics):
    found = keras.callbacks.History()
    found.epoch, found.history = epochs, metrics
    return found


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_file_of_csv_logger_is_read_as_it_was_logged(separator, tmp_path):
    path = tmp_path / "log.csv"
    logger = keras.callbacks.CSVLogger(path, separator=separator)
    logger.on_train_begin()
    for epoch, loss in enumerate([0.5, math.nan]):
        logger.on_epoch_end(epoch, {"loss": loss, "accuracy": 0.25})
    logger.on_train_end()
    found = plots.read_curves({"run": path})["run"]
    assert list(found) == ["epoch", "accuracy", "loss"]  # the columns of a validation that there was not are left out
    assert (found["epoch"], found["accuracy"], found["loss"][0]) == ([0, 1], [0.25, 0.25], 0.5)
    assert math.isnan(found["loss"][1])


def test_a_history_that_goes_on_keeps_its_epochs():
    found = plots.read_curves({"run": history([4, 5], loss=[2, 1])})
    assert found == {"run": {"epoch": [4, 5], "loss": [2, 1]}}


def test_wrong_runs_raise(tmp_path):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    for error, runs, said in [
        (TypeError, history([0], loss=[1]), "must be a mapping from names to runs"),
        (ValueError, {}, "at least one run"),
        (TypeError, {"a": 3}, "The run 'a' must be a History"),
        (ValueError, {"a": {"loss": ["high"]}}, "'loss' of the run 'a' must have numbers"),
        (ValueError, {"a": {"loss": [1, 2], "accuracy": [1]}}, "a number for each of its epochs"),
        (ValueError, {"a": history([])}, "0 epochs"),
        (ValueError, {"a": tmp_path / "other.csv"}, "must be a file of `keras.callbacks.CSVLogger`"),
    ]:
        with pytest.raises(error, match=said):
            plots.read_curves(runs)
    with pytest.raises(ValueError, match=r"No run has the metrics \['acc'\]. Expected some of \['loss'\]"):
        plots.plot_curves({"a": {"loss": [1]}}, metrics=["acc"])


# The figures.


def two_adapters():
    model = adapt(net("one", "two"), "a", one=RANK_2, two=RANK_1)
    return adapt(model, "b", one=RANK_1, two=RANK_2)


@full
@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_can_be_saved(name):
    file = io.StringIO()
    FIGURES[name](two_adapters()).savefig(file, format="svg")
    assert file.getvalue().rstrip().endswith("</svg>")


@full
def test_the_ranks_show_the_singular_values_and_the_effective_rank():
    figure = plots.plot_ranks(adapt(net("one", "two"), one=RANK_2, two=RANK_1))
    left, right = figure.axes[:2]
    np.testing.assert_allclose(left.images[0].get_array(), [[1, 0.75], [1, 0]], atol=1e-9)
    expected = [7 / (4 ** (4 / 7) * 3 ** (3 / 7)), 1]
    np.testing.assert_allclose(
        [each.get_offsets()[0] for each in right.collections], list(zip(expected, [0, 1], strict=True))
    )
    crosses = [line.get_xdata()[0] for line in right.lines if line.get_marker() == "x"]
    assert crosses == [2, 1]
    assert [label.get_text() for label in left.get_yticklabels()] == ["one", "two"]


@full
def test_the_changes_show_the_relative_sizes():
    [ax] = plots.plot_changes(adapt(net("hidden"), hidden=RANK_2)).axes
    assert [each.get_offsets().tolist() for each in ax.collections] == [[[pytest.approx(0.5), 0]]]


def test_a_zero_kernel_has_no_relative_change_to_draw():
    model = adapt(net("hidden", kernel=np.zeros((3, 2))), hidden=RANK_2)
    assert plots.measure_adapters(model)[0].relative_change == math.inf
    with pytest.raises(ValueError, match=r"zero kernels in the layers \['hidden'\]"):
        plots.plot_changes(model)


@full
def test_the_overlaps_of_two_have_a_bar_for_each_layer():
    model = adapt(net("one", "two"), "a", rank=1, one=along(1, 0, 0), two=along(1, 0, 0))
    adapt(model, "b", rank=1, one=along(1, 0, 0), two=along(1, 1, 0))
    figure = plots.plot_overlaps(model)
    np.testing.assert_allclose(figure.axes[0].images[0].get_array(), [[1, 0.75], [0.75, 1]])
    [bars] = [ax for ax in figure.axes if ax.get_title() == "a and b"]
    np.testing.assert_allclose([bar.get_width() for bar in bars.patches], [1, 0.5])


@full
def test_the_curves_have_a_panel_for_each_metric_and_start_at_epoch_1():
    runs = {"a": history([0, 1], loss=[2, 1], val_loss=[3, 2], accuracy=[0, 1]), "b": {"loss": [5]}}
    loss, accuracy = plots.plot_curves(runs).axes
    assert [ax.get_title() for ax in (loss, accuracy)] == ["loss", "accuracy"]
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in loss.lines}
    assert lines == {"a": ([1, 2], [2, 1]), "a, validation": ([1, 2], [3, 2]), "b": ([1], [5])}
    assert [ax.get_title() for ax in plots.plot_curves(runs, metrics=["accuracy"]).axes] == ["accuracy"]


def measured(*names, change=0.1):
    return [AdapterMeasure(name, "default", "LoRA", 2, 1.0, (1.0, 0.5), 1.5, 2, change) for name in names]


@full
def test_equal_blocks_are_one_row_with_a_dot_for_each(monkeypatch):
    rows = measured(*(f"block_{block}/{name}" for block in range(12) for name in ("query", "value")))
    monkeypatch.setattr(drawing, "measure_adapters", lambda model, **arguments: rows)
    [ax] = plots.plot_changes(None).axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["block_0…11 (× 12)/query", "block_0…11 (× 12)/value"]
    assert [len(each.get_offsets()) for each in ax.collections] == [12, 12]


@full
def test_an_axis_has_at_most_30_labels(monkeypatch):
    rows = measured(*(chr(ord("a") + number // 26) + chr(ord("a") + number % 26) for number in range(100)))
    monkeypatch.setattr(drawing, "measure_adapters", lambda model, **arguments: rows)
    [ax] = plots.plot_changes(None).axes
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels == [row.layer for row in rows[::4]]
    assert len(ax.collections) == 100


def test_without_matplotlib_the_error_has_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'keras_lora\[plots\]'"):
        plots.plot_curves({"a": {"loss": [1]}})


@pytest.mark.once
def test_importing_the_package_does_not_import_matplotlib():
    files = list(Path(keras_lora.__file__).parent.rglob("*.py"))
    at_import = [(path, node) for path in files for node in ast.parse(path.read_text()).body]
    names = [(path, ast.unparse(node)) for path, node in at_import if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert [path for path, name in names if "matplotlib" in name] == []
    assert any("matplotlib" in path.read_text() for path in files)


# The callback.


@pytest.mark.every_backend
def test_the_callback_logs_what_the_model_has_at_the_end_of_each_epoch(tmp_path):
    model = keras_lora.apply_lora(net("hidden"), rank=2)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    x, y = np.eye(3, dtype="float32"), np.ones((3, 2), "float32")
    callbacks = [plots.LogAdapters(), keras.callbacks.CSVLogger(tmp_path / "log.csv")]
    found = model.fit(x, y, batch_size=1, epochs=2, verbose=0, callbacks=callbacks).history
    [row] = plots.measure_adapters(model)
    assert 0 < found["relative_change"][0] < found["relative_change"][1] == pytest.approx(row.relative_change)
    assert found["effective_rank"][1] == pytest.approx(row.effective_rank)
    assert plots.read_curves({"": tmp_path / "log.csv"})[""] == {"epoch": [0, 1], **found}


def test_the_callback_names_several_adapters_and_fails_before_the_first_epoch():
    callback = plots.LogAdapters()
    callback.set_model(two_adapters())
    logs = {}
    callback.on_epoch_end(0, logs)
    assert set(logs) == {f"{name}_{what}" for name in ("a", "b") for what in ("effective_rank", "relative_change")}
    assert logs["a_effective_rank"] == pytest.approx((7 / (4 ** (4 / 7) * 3 ** (3 / 7)) + 1) / 2)
    with pytest.raises(ValueError, match="found no adapter"):
        keras.callbacks.CallbackList([plots.LogAdapters()], model=net("hidden")).on_train_begin()
