"""What gets an adapter: patterns, the head, and one error that says everything that is wrong."""

import re
import warnings

import keras
import numpy as np
import pytest
from helpers import difference, outputs, perturb, value
from keras import layers
from zoo import ZOO, Subclassed, numbers

import keras_lora
from keras_lora.swap.addresses import walk
from keras_lora.targets.choosing import find_head

pytestmark = pytest.mark.torch_first


def transformer():
    """Two blocks with query, value and feed-forward layers, an embedding and a head."""
    ids = keras.Input((5,), dtype="int32")
    x = layers.Embedding(11, 8, name="tokens")(ids)
    for index in range(2):
        inside = keras.Input((5, 8))
        y = layers.Dense(8, name="query")(inside) + layers.Dense(8, name="value")(inside)
        y = layers.LayerNormalization(name="norm")(layers.Dense(8, name="feed_forward")(y))
        x = keras.Model(inside, y, name=f"block_{index}")(x)
    return keras.Model(ids, layers.Dense(2, name="head")(layers.GlobalAveragePooling1D()(x)), name="transformer")


def adapted(**arguments):
    return [target.path for target in keras_lora.list_targets(transformer(), **arguments).of("adapt")]


BLOCK = ["query", "value", "feed_forward"]
ALL = [f"block_{index}/{name}" for index in (0, 1) for name in BLOCK]


def test_the_default_is_every_linear_layer_but_the_head_and_the_embedding():
    assert adapted() == ALL


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("query", ["block_0/query", "block_1/query"]),
        (["query", "value"], [path for path in ALL if "feed" not in path]),
        ("block_1", [path for path in ALL if "block_1" in path]),
        ("block_1/query", ["block_1/query"]),
        ("*query", ["block_0/query", "block_1/query"]),
        ("block_[0]/*", [path for path in ALL if "block_0" in path]),
        (re.compile(r"block_\d/(query|value)"), [path for path in ALL if "feed" not in path]),
        (layers.Embedding, ["tokens"]),
        (["tokens", "head"], ["tokens", "head"]),
        (lambda layer: layer.name.startswith("q"), ["block_0/query", "block_1/query"]),
    ],
    ids=str,
)
def test_a_target_is_a_name_a_path_a_glob_an_expression_a_class_or_a_function(targets, expected):
    assert adapted(targets=targets) == expected


def test_a_target_is_a_layer_itself():
    model = transformer()
    rows = keras_lora.list_targets(model, targets=model.get_layer("block_1")).of("adapt")
    assert [row.path for row in rows] == [path for path in ALL if "block_1" in path]


def test_a_regular_expression_matches_the_whole_path():
    with pytest.raises(ValueError, match="matches no layer"):
        adapted(targets=re.compile("query"))


def test_exclude_takes_away():
    assert adapted(exclude="block_0") == [path for path in ALL if "block_1" in path]
    assert adapted(exclude=["query", "feed_forward"]) == ["block_0/value", "block_1/value"]


def test_the_caller_overrules_the_head():
    assert adapted(head=None) == [*ALL, "head"]
    assert adapted(head="block_1") == [*ALL[:3], "head"]
    assert adapted(targets=["query", "head"]) == ["block_0/query", "block_1/query", "head"]


def test_a_layer_trained_in_full_gets_no_adapter():
    rows = keras_lora.list_targets(transformer(), train=["block_0", "head"])
    assert [row.path for row in rows.of("adapt")] == ALL[3:]
    assert [row.path for row in rows.of("train")] == [*ALL[:3], "block_0/norm", "head"]


def test_rank_and_alpha_by_pattern_the_first_that_matches_counts():
    rows = keras_lora.list_targets(
        transformer(), rank=2, rank_pattern={"block_0/query": 7, "query": 4}, alpha_pattern={"value": 3.0}
    )
    by_path = {row.path: row.adapter for row in rows.of("adapt")}
    assert {path: adapter.rank for path, adapter in by_path.items()} == {
        "block_0/query": 7,
        "block_1/query": 4,
        **{path: 2 for path in ALL if "query" not in path},
    }
    assert by_path["block_0/value"].alpha == 3.0
    assert by_path["block_0/query"].alpha == keras_lora.LoRA().alpha


def test_every_wrong_pattern_is_in_one_error_with_the_nearest_names():
    model = transformer()
    with pytest.raises(ValueError, match="cannot adapt 'transformer'") as error:
        keras_lora.apply_lora(
            model, targets=["query", "valeu"], exclude="feedforward", train="haed", rank_pattern={"tokns": 1}
        )
    message = str(error.value)
    for part in (
        "targets='valeu'",
        "'value'",
        "exclude='feedforward'",
        "'feed_forward'",
        "train='haed'",
        "'head'",
        "'tokns'",
    ):
        assert part in message
    assert not any(v.path.endswith("lora_a") for v in model.variables)


def test_a_rank_pattern_must_match_a_layer_that_is_adapted():
    with pytest.raises(ValueError, match=r"rank_pattern='head' matches only layers that cannot be chosen here: Dense"):
        adapted(rank_pattern={"head": 2})


def test_a_pattern_that_matches_only_what_cannot_be_adapted_says_what_it_matched():
    with pytest.raises(
        ValueError, match=r"targets='norm' matches only layers that cannot be chosen here: LayerNormalization"
    ):
        adapted(targets="norm")


def test_nothing_to_adapt_names_what_could_be():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(2, name="only")], name="small")
    with pytest.raises(ValueError, match=r"nothing is left to adapt: the kernels that could be \(only\) are: 1 output head"):
        keras_lora.apply_lora(model)


def test_a_pattern_of_another_kind_is_refused():
    with pytest.raises(TypeError, match="Received: 3 of type int"):
        adapted(targets=3)


def test_a_subclass_of_a_known_layer_is_said_and_not_guessed():
    class Odd(layers.Dense):
        def call(self, x):
            return -super().call(x)

    model = keras.Sequential([keras.Input((4,)), Odd(4, name="odd"), layers.Dense(4), layers.Dense(2)])
    with pytest.warns(UserWarning, match=r"may compute something else than its parent: odd \(Odd\)"):
        rows = keras_lora.list_targets(model)
    assert len(rows.of("adapt")) == 1
    with pytest.raises(ValueError, match=r"targets='odd' matches only layers that cannot be chosen here: Odd"):
        keras_lora.list_targets(model, targets="odd")


def test_listing_changes_nothing_and_says_everything():
    model = transformer()
    before = [(type(place.layer), place.layer.trainable) for place in walk(model)]
    rows = keras_lora.list_targets(model, rank=4, train="head", bias="lora_only")
    assert before == [(type(place.layer), place.layer.trainable) for place in walk(model)]
    query = rows[1]
    assert (query.path, query.layer_type, query.action, query.shape) == ("block_0/query", "Dense", "adapt", (8, 8))
    assert (query.rank, query.parameters, query.trainable) == (4, 72, 4 * 16 + 8)
    text = str(rows)
    for part in ("block_0…1 (× 2)/", "8×8", "2 × LayerNormalization", "train: named", rows.total):
        assert part in text
    assert rows[4].why == "no adapter for LayerNormalization"
    keras_lora.apply_lora(model, rank=4, train="head", bias="lora_only")
    trained = sum(v.value.shape[0] * (v.value.shape[1] if len(v.shape) > 1 else 1) for v in model.trainable_variables)
    assert f"trainable: {trained:,} of {model.count_params():,} " in rows.total


def heads_of(model):
    return [place.path for place in find_head(model, walk(model))]


def test_the_head_of_a_graph_is_behind_layers_without_weights():
    x = keras.Input((4, 8))
    y = layers.Dense(6, name="hidden")(x)
    left = layers.Softmax()(layers.Dropout(0.1)(layers.Dense(3, name="left")(y)))
    right = layers.EinsumDense("abc,cd->abd", (None, 2), name="right")(y)
    assert heads_of(keras.Model(x, [left, layers.Reshape((8,))(right)])) == ["left", "right"]


def test_a_model_that_ends_in_a_normalization_a_merge_or_a_block_has_no_head():
    x = keras.Input((8,))
    assert heads_of(keras.Model(x, layers.LayerNormalization()(layers.Dense(8)(x)))) == []
    assert heads_of(keras.Model(x, layers.Dense(8)(x) + x)) == []
    assert heads_of(ZOO["multi_head_attention"]().model.get_layer("attention")) == []


def test_the_head_is_found_inside_a_nested_model():
    x = keras.Input((8,))
    inner = keras.Sequential(
        [keras.Input((8,)), layers.Dense(4), layers.Dense(2, name="out"), layers.Softmax()], name="inner"
    )
    assert heads_of(keras.Model(x, inner(x))) == ["inner/out"]


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        ([layers.TimeDistributed(layers.Dense(3, name="tags"), name="wrapper")], ["wrapper/tags"]),
        ([layers.TimeDistributed(layers.Dense(3, name="tags"), name="wrapper"), layers.Softmax()], ["wrapper/tags"]),
        ([layers.Conv1D(3, 1, name="map")], ["map"]),
        ([layers.Conv1DTranspose(3, 2, name="map"), layers.Cropping1D(1)], ["map"]),
        ([layers.SeparableConv1D(3, 2, name="map"), layers.Activation("sigmoid")], ["map"]),
        ([layers.Conv1D(3, 1, name="map"), layers.GlobalAveragePooling1D(), layers.Softmax()], ["map"]),
        ([layers.Conv1D(3, 1, name="features"), layers.MaxPooling1D(2)], []),
        ([layers.Conv1D(3, 1, name="features"), layers.MaxPooling1D(2), layers.GlobalMaxPooling1D()], []),
        ([layers.Conv1D(3, 1), layers.BatchNormalization()], []),
        ([layers.Dense(3, name="each"), layers.AveragePooling1D(2)], ["each"]),
        ([layers.Dense(3, name="out"), keras.Sequential([keras.Input((8, 3)), layers.Softmax()])], ["out"]),
        ([layers.LSTM(3)], []),
    ],
    ids=[
        "time_distributed",
        "time_distributed_softmax",
        "conv",
        "transposed_cropped",
        "separable_sigmoid",
        "global_pooling",
        "pooling",
        "two_poolings",
        "norm",
        "dense_pooling",
        "nested_softmax",
        "lstm",
    ],
)
def test_the_head_is_found_by_its_role(last, expected):
    assert heads_of(keras.Sequential([keras.Input((8, 4)), layers.Conv1D(4, 1, name="first"), *last])) == expected


def test_the_word_head_in_train_is_the_head_that_was_found():
    model = keras.Sequential([keras.Input((8, 4)), layers.Dense(4, name="body"), layers.Conv1D(3, 1, name="map")])
    assert [row.path for row in keras_lora.list_targets(model, train="head").of("train")] == ["map"]
    assert [row.path for row in keras_lora.list_targets(model, train="head").of("adapt")] == ["body"]
    with pytest.raises(ValueError, match=r"could be \(body, map\) are: 2 named in `train`"):
        keras_lora.list_targets(model, train=["head", "body"], targets="map")
    named = keras_lora.list_targets(model, head="body", train="head")
    assert [row.path for row in named.of("train")] == ["body"]
    with pytest.raises(ValueError, match="train='head': no layer has this name, and no output head was found"):
        keras_lora.list_targets(model, head=None, train="head")
    # A layer of that name which is no output trains too.
    model = keras.Sequential([keras.Input((8,)), layers.Dense(4, name="head"), layers.Dense(4), layers.Dense(2, name="out")])
    assert [row.path for row in keras_lora.list_targets(model, train="head").of("train")] == ["head", "out"]


def test_the_word_head_for_a_kerashub_task_is_all_that_is_outside_the_backbone():
    x = keras.Input((8,))
    backbone = keras.Model(x, layers.Dense(8, name="inner")(x), name="backbone")

    class Task(keras.Model):
        def __init__(self):
            y = layers.BatchNormalization(name="norm")(layers.Dense(6, name="pooler")(backbone.output))
            super().__init__(x, layers.Dense(2, name="logits")(y))
            self.backbone = backbone

    rows = keras_lora.list_targets(Task(), train="head")
    assert [row.path for row in rows.of("train")] == ["pooler", "norm", "logits"]
    assert [row.path for row in rows.of("adapt")] == ["inner"]


def test_the_head_of_a_subclassed_model_is_its_last_layer():
    model = Subclassed(6)
    model(numbers(2, 5, 8))
    assert heads_of(model) == ["head"]


def test_the_head_of_a_kerashub_task_is_what_is_outside_the_backbone():
    assert heads_of(ZOO["hub_bert_classifier"]().model) == ["logits"]
    assert heads_of(ZOO["hub_llama_causal_lm"]().model) == []


def test_addresses_do_not_depend_on_names():
    first, second = ZOO["subclassed"]().model, ZOO["subclassed"]().model
    assert [place.address for place in walk(first)] == [place.address for place in walk(second)]
    assert "attention/_query_dense" in [place.address for place in walk(first)]
    assert "branches/a" in [place.address for place in walk(first)]
    assert "blocks/0/stack/1" in [place.address for place in walk(first)]


def test_a_layer_that_the_graph_does_not_use_is_listed_and_left_alone():
    class Holder(layers.Layer):
        def __init__(self):
            super().__init__(name="holder")
            self.used, self.unused = layers.Dense(4, name="used"), layers.Dense(4, name="unused")

        def call(self, x):
            return self.used(x)

    x = keras.Input((8,))
    model = keras.Model(x, layers.Dense(2, name="head")(Holder()(x)))
    rows = {row.path: row for row in keras_lora.list_targets(model)}
    assert (rows["holder/unused"].action, rows["holder/unused"].why) == (
        "freeze",
        "the model does not use it",
    )
    assert [row.path for row in rows.values() if row.action == "adapt"] == ["holder/used"]
    keras_lora.apply_lora(model)
    assert not model.get_layer("holder").unused.built


@keras.saving.register_keras_serializable("targets")
class Guide(keras.Model):
    """A subclassed model as in the guides of Keras: its `call` does not use every layer."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.augment = keras.Sequential([layers.RandomFlip()], name="augment")
        self.hidden = layers.Dense(4, name="hidden")
        self.spare = keras.Sequential([layers.Dense(3, name="inner"), layers.BatchNormalization(name="norm")], name="spare")
        self.recurrent = layers.LSTM(2, name="recurrent")
        self.head = layers.Dense(2, name="head")

    def call(self, x):
        return self.head(self.hidden(x))

    def get_config(self):
        return {"name": self.name}


class Decoder(keras.Model):
    """A subclassed model that ends in a model with a graph."""

    def __init__(self):
        super().__init__()
        self.encoder = keras.Sequential([keras.Input((8,)), layers.Dense(4)], name="encoder")
        self.decoder = keras.Sequential([keras.Input((4,)), layers.Dense(6), layers.Dense(8, name="out")], name="decoder")

    def call(self, x):
        return self.decoder(self.encoder(x))


def test_the_head_of_a_subclassed_model_is_what_its_last_layer_ends_in():
    model = Decoder()
    model(numbers(2, 8))
    assert heads_of(model) == ["decoder/out"]


@pytest.fixture
def guide():
    model = Guide(name="guide")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras: "does not have a `build()` method implemented"
        model(numbers(2, 8))
    return model


UNUSED = "the model does not use it"


@pytest.mark.every_backend
def test_a_subclassed_model_with_layers_it_does_not_use_is_adapted(guide, tmp_path):
    rows = {row.path: row for row in keras_lora.list_targets(guide, rank=1)}
    unused = ["spare/inner", "spare/norm", "recurrent/lstm_cell"]
    assert list(rows) == ["hidden", *unused, "head"]
    assert [(rows[path].action, rows[path].why, rows[path].parameters) for path in unused] == [("freeze", UNUSED, 0)] * 3
    assert "3 not used" in keras_lora.list_targets(guide, rank=1, train="head").notes[0]
    keras_lora.apply_lora(guide, rank=1, train="head")
    perturb(guide)
    assert [v.name for v in guide.trainable_variables] == ["lora_a", "lora_b", "kernel", "bias"]
    before = outputs(guide, numbers(2, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        guide.save(tmp_path / "guide.keras")
        loaded = keras.saving.load_model(tmp_path / "guide.keras")
    assert difference(outputs(loaded, numbers(2, 8)), before) < 1e-6
    assert not loaded.spare.layers[0].built
    loaded = keras_lora.merge_lora(loaded)
    assert difference(outputs(loaded, numbers(2, 8)), before) < 1e-5
    keras_lora.apply_lora(loaded, rank=1)  # built from its config, never called


@keras.saving.register_keras_serializable("targets")
class Helped(keras.Model):
    """Its `call` uses a layer in training alone."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.main = layers.Dense(2, name="main")
        self.helper = keras.Sequential([layers.Dense(2, name="inner"), layers.BatchNormalization()], name="helper")

    def call(self, x, training=False):
        return self.main(x) + self.helper(x) if training else self.main(x)

    def get_config(self):
        return {"name": self.name}


@pytest.mark.skipif(keras.backend.backend() == "jax", reason="there Keras cannot make weights inside `fit`, adapted or not")
def test_a_layer_that_training_alone_uses_gets_its_weights_frozen(tmp_path):
    model, x = Helped(name="helped"), numbers(4, 3)
    model(x)
    keras_lora.apply_lora(model, rank=1, head=None)
    model.save(tmp_path / "helped.keras")
    for each in (model, keras.saving.load_model(tmp_path / "helped.keras")):
        each.compile("sgd", "mse")
        each.fit(x, numbers(4, 2), epochs=2, verbose=0)
        assert [v.name for v in each.trainable_variables] == ["lora_a", "lora_b"]
        inner, norm = each.helper.layers
        assert not value(inner.bias).any()
        assert not value(norm.moving_mean).any()
        each.trainable = False
        each.trainable = True
        assert [v.name for v in each.trainable_variables] == ["lora_a", "lora_b"]
        each.save(tmp_path / "again.keras")
        keras.saving.load_model(tmp_path / "again.keras")
        keras_lora.remove_lora(each)
        assert [v.name for v in each.trainable_variables] == ["kernel", "bias", "kernel", "bias", "gamma", "beta"]


def test_a_layer_that_is_not_used_cannot_be_chosen(guide):
    for argument in ("targets", "train"):
        for pattern in ("spare", "inner"):
            with pytest.raises(ValueError, match=f"{argument}='{pattern}' matches only layers that the model does not use"):
                keras_lora.apply_lora(guide, **{argument: pattern})
    assert len(keras_lora.list_targets(guide, exclude="spare").of("adapt")) == 1


def test_layers_without_weights_are_no_reason_that_a_model_is_not_built():
    class Built(keras.Model):
        def __init__(self):
            super().__init__(name="built")
            self.flip, self.both = layers.RandomFlip(), layers.Concatenate()
            self.hidden, self.head = layers.Dense(4, name="hidden"), layers.Dense(2, name="head")

        def build(self, input_shape):
            self.hidden.build(input_shape)

        def call(self, x):
            return self.head(self.both([x, self.hidden(self.flip(x))]))

    model = Built()
    model.build((None, 8))
    with pytest.raises(ValueError, match="'built' is not built: head have no weights yet"):
        keras_lora.apply_lora(model)
    model.head.build((None, 12))
    assert [row.path for row in keras_lora.list_targets(model).of("adapt")] == ["hidden"]


@pytest.mark.parametrize(
    "model",
    [
        lambda: layers.Rescaling(1 / 255),
        lambda: layers.Normalization(),
        lambda: layers.StringLookup(vocabulary=["a"]),
        lambda: keras.Sequential([layers.RandomFlip(), layers.Rescaling(1 / 255)]),
    ],
    ids=["rescaling", "normalization", "lookup", "sequential"],
)
def test_preprocessing_has_nothing_to_adapt(model):
    with pytest.raises(ValueError, match=r"nothing is left to adapt: the model has no layer that could be\. Adaptable are"):
        keras_lora.apply_lora(model())


def blocks(count=4):
    """A model of like blocks, then one more layer."""
    x = inputs = keras.Input((8,))
    for index in range(count):
        inside = keras.Input((8,))
        x = keras.Model(inside, layers.Dense(8, name="dense")(inside), name=f"block_{index}")(x)
    return keras.Model(inputs, layers.Dense(2, name="head")(layers.Dense(8, name="last")(x)))


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (0, [0]),
        (-1, [3]),
        ([0, 2], [0, 2]),
        (range(1, 3), [1, 2]),
        (slice(-2, None), [2, 3]),
        (slice(0.5, None), [2, 3]),
        (slice(0.0, 0.25), [0]),
        (slice(0.4, None), [2, 3]),
        (slice(None, None, 2), [0, 2]),
    ],
    ids=str,
)
def test_blocks_are_chosen_by_index_range_and_depth(chosen, expected):
    rows = keras_lora.list_targets(blocks(), blocks=chosen)
    assert [row.path for row in rows.of("adapt")] == [f"block_{index}/dense" for index in expected]
    assert {row.why for row in rows.of("freeze")} == {"outside `blocks`", "output head"}


def test_blocks_that_are_not_there_are_refused():
    for chosen, match in [
        (7, r"names no block at \[7\]; the model has 4 named like 'block_0'"),
        (slice(4, 9), "names no block"),
    ]:
        with pytest.raises(ValueError, match=match):
            keras_lora.apply_lora(blocks(), blocks=chosen)
    for chosen in ("last", True, 0.5, slice("a", None), slice(0, None, 0.5), ["a"]):
        with pytest.raises(TypeError, match=rf"`blocks` must be an index.*Received: blocks={re.escape(repr(chosen))}\."):
            keras_lora.apply_lora(blocks(), blocks=chosen)


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [(np.int64(1), [1]), (np.arange(2), [0, 1]), (slice(np.float32(0.5), None), [2, 3]), (slice(np.int32(-1), None), [3])],
    ids=str,
)
def test_numbers_of_numpy_choose_blocks(chosen, expected):
    rows = keras_lora.list_targets(blocks(), blocks=chosen)
    assert [row.path for row in rows.of("adapt")] == [f"block_{index}/dense" for index in expected]


def test_a_model_without_like_blocks_is_cut_by_the_order_of_its_layers():
    stack = [layers.Conv2D(4, 3, name="a"), layers.BatchNormalization(), layers.DepthwiseConv2D(3, name="b")]
    stack += [layers.Conv2D(4, 1, name="c"), layers.Flatten(), layers.Dense(3, name="d"), layers.Dense(2, name="head")]
    model = keras.Sequential([keras.Input((8, 8, 3)), *stack], name="flat")
    assert [row.path for row in keras_lora.list_targets(model, blocks=slice(0.6, None)).of("adapt")] == ["d"]
    assert [row.path for row in keras_lora.list_targets(model, blocks=slice(0.4, None)).of("adapt")] == ["c", "d"]
    assert [row.path for row in keras_lora.list_targets(model, blocks=slice(None, 0.4)).of("adapt")] == ["a"]
    named = keras_lora.list_targets(model, targets=["a", "b"], blocks=slice(0.0, 0.5)).of("adapt")
    assert [row.path for row in named] == ["a", "b"]
    for chosen in (0, slice(-2, None), slice(1, None)):
        with pytest.raises(ValueError, match=r"'flat' has no repeated blocks, so select a fraction .*slice\(0\.5, None\)"):
            keras_lora.apply_lora(model, blocks=chosen)


def test_a_name_matches_whole_names_alone():
    names = ["dense", "dense_1", "big_dense"]
    model = keras.Sequential([keras.Input((4,)), *(layers.Dense(4, name=name) for name in names)])
    rows = keras_lora.list_targets(model, targets="dense", head=None)
    assert [row.path for row in rows.of("adapt")] == ["dense"]


def test_a_layer_that_is_used_twice_is_listed_once():
    x, shared = keras.Input((4,)), layers.Dense(4, name="shared")
    inner = keras.Model(x, shared(x), name="inner")
    model = keras.Model(x, layers.Dense(2)(shared(inner(x))))
    rows = keras_lora.list_targets(model)
    assert [row.path for row in rows.of("adapt")] == ["inner/shared"]
    keras_lora.apply_lora(model, rank=1)
    assert len(keras_lora.list_adapters(model)) == 1
    assert keras_lora.list_adapters(model).trainable == 8


def recurrent():
    x = keras.Input((5, 3))
    y = layers.Bidirectional(layers.LSTM(4, name="lstm", return_sequences=True), name="both")(x)
    y = layers.GRU(4, name="gru")(layers.SeparableConv1D(4, 2, name="sep")(y))
    return keras.Model(x, layers.Dense(2, name="head")(y))


LSTMS = [
    f"both/{way}_lstm/lstm_cell/{kernel}" for way in ("forward", "backward") for kernel in ("kernel", "recurrent_kernel")
]
GRU = ["gru/gru_cell/kernel", "gru/gru_cell/recurrent_kernel"]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("recurrent*", [*LSTMS[1::2], GRU[1]]),
        ("gru_cell/*", GRU),
        ("gru/recurrent_kernel", GRU[1:]),
        ("forward_lstm/kernel", LSTMS[:1]),
        ("*_lstm", LSTMS),
        ("g?u", GRU),
        (layers.GRU, GRU),
        (layers.Bidirectional, LSTMS),
        ("sep/pointwise*", ["sep/pointwise_kernel"]),
        ("kernel", [LSTMS[0], LSTMS[2], GRU[0]]),
    ],
    ids=lambda each: "" if isinstance(each, list) else getattr(each, "__name__", each),
)
def test_patterns_reach_the_kernels_of_a_cell(targets, expected):
    rows = keras_lora.list_targets(recurrent(), targets=targets)
    assert [row.path for row in rows.of("adapt")] == expected


def test_exclude_and_rank_pattern_take_a_class_with_what_is_in_it():
    rows = keras_lora.list_targets(recurrent(), exclude=layers.Bidirectional, rank_pattern={layers.GRU: np.int64(3)})
    assert {row.path: row.rank for row in rows.of("adapt")} == {"sep/pointwise_kernel": 8, GRU[0]: 3, GRU[1]: 3}


def test_nothing_left_says_what_took_it():
    with pytest.raises(ValueError, match=r"the kernels that could be \(tokens, .*\) are: 8 excluded") as error:
        keras_lora.apply_lora(transformer(), exclude="*")
    assert "targets=None" not in str(error.value)


def test_a_mistyped_target_alone_is_said_in_one_short_line():
    with pytest.raises(ValueError, match=r"targets='querry' matches no layer; the nearest names are \['query'") as error:
        keras_lora.apply_lora(transformer(), targets="querry")
    assert str(error.value).count("\n") == 2
    assert "ConvLSTMCell" not in str(error.value)


@pytest.fixture
def narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.usefixtures("narrow")
def test_the_table_fits_the_terminal_and_folds_equal_blocks(monkeypatch):
    x = inputs = keras.Input((64,))
    for index in range(12):
        inside = keras.Input((64,))
        y = layers.BatchNormalization(name="norm")(layers.Dense(64, name="feedforward_intermediate_dense")(inside))
        x = keras.Model(inside, y + layers.Dense(64, name="second")(y), name=f"transformer_layer_{index}")(x)
    model = keras.Model(inputs, layers.Dense(2, name="logits_of_the_classifier")(layers.Dense(64, name="last")(x)))
    lines = str(keras_lora.list_targets(model, rank=4)).splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split() for line in lines if "transformer" in line] == [["transformer_layer_0…11", "(×", "12)/"]]
    assert [line.split()[1:] for line in lines if "second" in line] == [["adapt", "64×64", "4", "49.9k", "6,144"]]
    assert sum("BatchNormalization" in line for line in lines) == 1
    assert len(lines) < 16
    monkeypatch.setenv("COLUMNS", "120")
    wide = str(keras_lora.list_targets(model, rank=4))
    assert "Dense" in wide
    assert "Dense" not in "".join(lines)
    monkeypatch.setenv("COLUMNS", "40")
    assert max(map(len, str(keras_lora.list_targets(model, rank=4)).splitlines())) <= 40
    model = keras_lora.apply_lora(model, rank=4)
    monkeypatch.setenv("COLUMNS", "80")
    lines = str(keras_lora.list_adapters(model)).splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) < 12


def test_every_row_is_printed_once_whatever_its_name():
    names = ["a", "a_1", "b", "a_2", "b_1", "c_2_1", "c_2"]
    stack = [layers.Dense(4, name=name) for name in names]
    rows = keras_lora.list_targets(keras.Sequential([keras.Input((4,)), *stack, layers.Dense(9)]))
    printed = rows.table(width=200)
    (layer, _, _, _, _, parameters, _) = (list(column.cells) for column in printed.columns)
    assert layer[:-1] == ["a", "a_1 … a_2 (× 2)", "b … b_1 (× 2)", "c_2_1 … c_2 (× 2)"] or len(layer) >= 4
    assert sum(int(each) for each in parameters) == sum(row.parameters for row in rows)


def test_a_notebook_gets_a_table_in_html():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(8, name="<b>"), layers.Dense(2, name="out")])
    text = keras_lora.list_targets(model, rank=1)._repr_html_()
    assert text.startswith("<table><thead><tr><th")
    assert "&lt;b&gt;" in text
    assert "<b>" not in text
    assert "trainable: 12 of 71" in text
    assert "2 layers" not in keras_lora.list_adapters(keras_lora.apply_lora(model, rank=1))._repr_html_()


def test_an_adapter_that_is_larger_than_its_kernel_is_said():
    model = keras.Sequential([keras.Input((16,)), layers.Dense(16, name="a"), layers.Dense(16, name="b"), layers.Dense(2)])
    rows = keras_lora.list_targets(model, rank=8, rank_pattern={"b": 9}).of("adapt")
    assert [row.why for row in rows] == ["target", "target, larger than its kernel"]
    assert "1 marked large" in keras_lora.list_targets(model, rank=8, rank_pattern={"b": 9}).notes[0]


def test_a_new_head_that_stays_frozen_is_pointed_out():
    def said(model, **arguments):
        return keras_lora.list_targets(model, rank=1, **arguments).notes

    model = keras.Sequential([keras.Input((32,)), layers.Dense(32), layers.Dense(2, name="out")])
    assert [note for note in said(model) if "'out' looks new" in note and "add train='head'" in note] == said(model)
    assert len(said(model)) == 1
    assert "add train='head'" in str(keras_lora.list_targets(model)).replace("\n", " ")
    assert said(model, train="head") == said(model, train="out") == said(model, head=None) == []
    model.layers[-1].bias.assign([0.0, 0.1])  # it was trained
    assert said(model) == []


@pytest.mark.parametrize("name", ["sequential", "tied_embedding", "wrappers", "int8", "convolutions", "nested"])
@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_the_total_before_is_the_total_after(name, adapter):
    model = ZOO[name]().model
    for number in range(2):  # the second adapter is added to the first
        train = layers.BatchNormalization if name == "sequential" and number == 0 else None
        rows = keras_lora.list_targets(model, adapter, rank=2, train=train, name=f"a{number}")
        keras_lora.apply_lora(model, adapter, rank=2, train=train, name=f"a{number}")
        assert rows.total == keras_lora.list_adapters(model).total
        assert rows.parameters == model.count_params()
