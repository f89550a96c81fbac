"""Words that people bring from PEFT and Keras, mistyped keywords and misplaced arguments: the error has the right word."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_lora

pytestmark = pytest.mark.torch_first


@pytest.fixture
def model():
    x = keras.Input((5, 8))
    return keras.Model(x, layers.Dense(2)(layers.MultiHeadAttention(2, 4)(x, x)))


WORDS = {
    "r": ({"r": 8}, "no argument `r`. Use `rank`"),
    "lora_rank": ({"lora_rank": 8}, "Use `rank`"),
    "lora_alpha": ({"lora_alpha": 8}, "Use `alpha`"),
    "target_modules": ({"target_modules": ["query"]}, "Use `targets`"),
    "lora_dropout": ({"lora_dropout": 0.1}, r"keras_lora.LoRA\(dropout=...\)"),
    "modules_to_save": ({"modules_to_save": ["head"]}, "Use `train`"),
    "use_dora": ({"use_dora": True}, 'adapter="dora"'),
    "mistyped": ({"target": "query"}, "no argument `target`. Use `targets`"),
    "far from all": ({"zzz": 1}, "It takes `model`, `adapter`"),
}


@pytest.mark.parametrize("word", WORDS)
def test_a_word_of_another_library_gets_ours(model, word):
    arguments, said = WORDS[word]
    before = [type(layer) for layer in model.layers]
    for function in (keras_lora.apply_lora, keras_lora.list_targets):
        with pytest.raises(TypeError, match=said):
            function(model, **arguments)
    assert [type(layer) for layer in model.layers] == before


def test_a_method_knows_the_words_too():
    with pytest.raises(TypeError, match=r"`LoRA\(\)` has no argument `r`. Use `rank`"):
        keras_lora.LoRA(r=4)
    with pytest.raises(TypeError, match=r"`DoRA\(\)` has no argument `lora_alpha`. Use `alpha`"):
        keras_lora.DoRA(lora_alpha=4)
    with pytest.raises(TypeError, match=r"`TrainableTokens\(\)` has no argument `rank`"):
        keras_lora.apply_lora(keras.Sequential([layers.Dense(2)]), "trainable_tokens", rank=4)
    with pytest.raises(ValueError, match=r"has arguments without a default. Expected an instance: TrainableTokens\(tokens"):
        keras_lora.apply_lora(keras.Sequential([layers.Dense(2)]), "trainable_tokens")


def test_a_method_without_a_rank_says_so():
    model = keras.Sequential([keras.Input((3,)), layers.Dense(4), layers.Dense(2)])
    for function in (keras_lora.apply_lora, keras_lora.list_targets):
        with pytest.raises(TypeError, match=r"`TrainableTokens\(\)` has no argument `rank`: this method takes `tokens`\."):
            function(model, "trainable_tokens", rank=4)
        with pytest.raises(TypeError, match=r"has no argument `alpha`.* Received: alpha=2\. Leave it out"):
            function(model, keras_lora.TrainableTokens([1]), alpha=2)


def test_what_is_no_model_is_said_in_a_few_words(model):
    heavy = [keras.Variable(np.ones((100, 100))), keras.Variable(np.ones(3))]
    for function in (keras_lora.apply_lora, keras_lora.list_targets, keras_lora.list_adapters):
        with pytest.raises(TypeError, match="`model` must be a Keras model or layer") as error:
            function(heavy)
        assert str(error.value).endswith(f"Received: a list of length 2, the first of type {type(heavy[0]).__name__}.")
        with pytest.raises(TypeError, match=r"Received: None of type NoneType\."):
            function(None)
        with pytest.raises(TypeError, match=r"Received: an object of type ndarray\."):
            function(np.ones(9))


def test_swapped_arguments_are_noticed(model):
    for function in (keras_lora.apply_lora, keras_lora.list_targets):
        for method, shown in [("lora", "'lora' of type str"), (keras_lora.LoRA(rank=2), "an object of type LoRA")]:
            with pytest.raises(TypeError, match=rf"Received: {shown}\. Expected the model first: swap the two\."):
                function(method, model)
    with pytest.raises(TypeError, match=r"must be a name.*of type Functional"):
        keras_lora.apply_lora(model, model)


def test_a_rank_for_some_layers_is_refused_by_a_method_that_has_none():
    ids = keras.Input((3,), dtype="int32")
    model = keras.Model(ids, layers.Dense(2)(layers.Embedding(9, 4, name="tokens")(ids)))
    with pytest.raises(ValueError, match=r"TrainableTokens has no argument \['rank'\]"):
        keras_lora.apply_lora(model, keras_lora.TrainableTokens([1]), targets="tokens", rank_pattern={"tokens": 2})


def test_a_rank_in_the_place_of_the_adapter(model):
    with pytest.raises(TypeError, match="A rank is given by name: rank=8"):
        keras_lora.apply_lora(model, 8)


def test_a_name_in_the_place_of_another_argument(model, tmp_path):
    keras_lora.apply_lora(model, rank=1)
    with pytest.raises(TypeError, match=r"takes 2 arguments by place \(model, path\).*Received by place: 'french'"):
        keras_lora.save_adapter(model, tmp_path / "a.safetensors", "french")
    assert not (tmp_path / "a.safetensors").exists()
    with pytest.raises(TypeError, match=r"takes 2 arguments by place.*Write for example `name=...`"):
        keras_lora.load_adapter(model, tmp_path / "a.safetensors", "french")
    with pytest.raises(TypeError, match=r"takes 2 arguments by place.*Received by place: 'svd'"):
        keras_lora.combine_adapters(model, "default", "svd")


@pytest.mark.parametrize(("word", "ours"), [("q_proj", "query"), ("v_proj", "value"), ("o_proj", "attention_output")])
def test_a_name_of_transformers_gets_that_of_keras(model, word, ours):
    with pytest.raises(ValueError, match=rf"targets='{word}' matches no layer; the nearest names are \['{ours}'"):
        keras_lora.apply_lora(model, targets=word)


def test_numbers_of_numpy_are_numbers(model):
    method = keras_lora.LoRA(rank=np.int64(4), alpha=np.float32(8), dropout=np.float64(0.5))
    assert (method.rank, method.alpha, method.dropout) == (4, 8.0, 0.5)
    assert {type(each) for each in (method.rank, method.alpha, method.dropout)} == {int, float}
    rows = keras_lora.list_targets(
        model, rank=np.int32(4), alpha=np.int64(8), rank_pattern={"query": np.int64(2)}, alpha_pattern={"key": np.float32(3)}
    )
    assert [(row.rank, row.adapter.alpha) for row in rows.of("adapt")] == [(2, 8), (4, 3.0), (4, 8), (4, 8)]
    for wrong in ({"rank": True}, {"rank": 2.0}, {"rank": 0}, {"alpha": np.nan}, {"alpha": "8"}, {"dropout": 1}):
        with pytest.raises(ValueError, match="must be a"):
            keras_lora.LoRA(**wrong)
