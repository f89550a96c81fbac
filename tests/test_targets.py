"""What gets an adapter: patterns, the head, and one error that says everything that is wrong."""

import re

import keras
import pytest
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
    with pytest.raises(
        ValueError, match=r"nothing is left to adapt .* Dense, .* EinsumDense, Embedding, .* 1 of them: only"
    ):
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
    for part in ("block_0/query", "8 × 8", "no adapter for LayerNormalization", "named in `train`", rows.total):
        assert part in text
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
        "the model does not use it: it has no weights",
    )
    assert [row.path for row in rows.values() if row.action == "adapt"] == ["holder/used"]
    keras_lora.apply_lora(model)
    assert not model.get_layer("holder").unused.built


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
    with pytest.raises(ValueError, match="has no series of like blocks"):
        keras_lora.apply_lora(keras.Sequential([keras.Input((4,)), layers.Dense(3), layers.Dense(2)]), blocks=0)
    with pytest.raises(TypeError, match="`blocks` must be an index"):
        keras_lora.apply_lora(blocks(), blocks="last")


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
