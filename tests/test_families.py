"""Models of KerasHub and keras.applications, from small random configs, put through all that a user does with them.

A slice that is quick to build runs always; `-m sweep` runs every model there is.
"""

import keras
import numpy as np
import pytest
from families import KINDS, MODELS, applications, multimodal, text, vision  # noqa: F401  # they enter their models
from sweep import check, move_adapters

import keras_lora
from keras_lora.adapted import adapted_maps
from keras_lora.hub import BANKS
from keras_lora.presets import PRESETS

#: One of many kinds, each quick to build.
SLICE = [
    "bert/BertTextClassifier",
    "gemma4_moe/Gemma4Backbone",
    "gpt2/GPT2CausalLM",
    "mixtral/MixtralCausalLM",
    "qwen_moe/QwenMoeBackbone",
    "gpt_oss/GptOssBackbone",
    "t5/T5Backbone",
    "clip/CLIPBackbone",
    "whisper/WhisperBackbone",
    "vit/ViTImageClassifier",
    "segformer/SegFormerBackbone",
    "xception/XceptionBackbone",
]
#: What does not hold, and why; seen on plain models too.
PLAIN_FAILS = {
    "efficientnet/EfficientNetBackbone": "KerasHub rebuilds another model from its config: the plain one fails too",
    "efficientnet/EfficientNetImageClassifier": "KerasHub rebuilds another model from its config: the plain one fails too",
    "llama3/Llama3Backbone": "KerasHub's config lacks `tie_word_embeddings`: the plain one does not load either",
    "llama3/Llama3CausalLM": "KerasHub's config lacks `tie_word_embeddings`: the plain one does not load either",
    "parseq/PARSeqCausalLM": "needs a tokenizer that only tensorflow-text has",
}


def hold(name):
    seen = check(MODELS[name])
    assert seen["adapted"] > 0
    assert seen["trainable"] < seen["parameters"]
    assert seen["apply"] <= 1e-6
    assert seen["effect"] > 1e-5
    assert seen["merge"] < 1e-4
    if name not in PLAIN_FAILS:
        assert seen["round_trip"] < 1e-5
    assert not seen["moved"] or isinstance(seen["moved"], str)  # a reason why this model has no ordinary `fit`
    return seen


@pytest.mark.parametrize("name", SLICE)
def test_a_slice_of_the_families(name):
    seen = hold(name)
    assert seen["moved"] == []
    assert seen["moved_adapters"] > 0.5


@pytest.mark.sweep
@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_model(name):
    hold(name)


def test_every_family_of_the_slice_is_of_another_kind_or_another_layer():
    assert len({KINDS[name.split("/")[0]] for name in SLICE}) >= 7


@pytest.mark.parametrize("name", ["mixtral/MixtralBackbone", "gpt_oss/GptOssBackbone", "gemma4_moe/Gemma4Backbone"])
def test_banks_of_experts_have_a_pair_of_factors_for_each_expert(name):
    model, _ = MODELS[name]()
    keras_lora.apply_lora(model, rank=2)
    banks = [linear for linear, _ in adapted_maps(model).values() if type(linear.layer).__name__ in BANKS]
    assert banks
    for linear in banks:
        adapter = getattr(linear.layer, linear.slot)
        experts, in_dim, out_dim = linear.matrix_shape
        assert tuple(adapter.lora_a.shape) == (experts, in_dim, 2)
        assert tuple(adapter.lora_b.shape) == (experts, 2, out_dim)


@pytest.mark.parametrize("name", ["llama/LlamaCausalLM", "gemma/GemmaCausalLM", "mixtral/MixtralCausalLM"])
def test_generate_works_adapted_and_merged(name):
    model, _ = MODELS[name]()
    keras_lora.apply_lora(model, rank=2)
    move_adapters(model)
    model.compile(sampler="greedy")
    prompt = {"token_ids": np.array([[3, 5, 2, 0, 0, 0, 0, 0]]), "padding_mask": np.array([[1, 1, 1, 0, 0, 0, 0, 0]])}
    adapted = np.asarray(model.generate(prompt, stop_token_ids=None)["token_ids"])
    expected = np.array(prompt["token_ids"])
    for position in range(3, 8):  # without the cache: the whole sequence again for each token
        mask = (np.arange(8) < position).astype("int32")[None]
        logits = keras.ops.convert_to_numpy(model({"token_ids": expected, "padding_mask": mask}))
        expected[0, position] = logits[0, position - 1].argmax()
    assert adapted.tolist() == expected.tolist()
    keras_lora.merge_lora(model)
    model.compile(sampler="greedy")
    assert np.asarray(model.generate(prompt, stop_token_ids=None)["token_ids"]).tolist() == expected.tolist()


WITH_PRESETS = {
    "blip2/BLIP2Backbone": "vision_encoder",
    "gemma3n/Gemma3nBackbone": "mobile_net_v5",
    "stable_diffusion_3/StableDiffusion3Backbone": "clip_l",
    "gemma3_vision/Gemma3Backbone": "vision_encoder",
    "gemma4/Gemma4Backbone": "audio_encoder",
    "gemma4_moe/Gemma4Backbone": "moe_router",
    "gpt_oss/GptOssBackbone": "router_dense",
    "mixtral/MixtralBackbone": "sparse_feedforward_gate_dense",
    "pali_gemma/PaliGemmaBackbone": "pali_gemma_vit",
    "qwen3_5/Qwen3_5Backbone": "vision_encoder",
    "qwen3_5_moe/Qwen3_5MoeBackbone": "router_gate",
    "qwen3_moe/Qwen3MoeBackbone": "sparse_feedforward_gate_dense",
    "qwen_moe/QwenMoeBackbone": "sparse_feedforward_gate_dense",
    "t5gemma2/T5Gemma2Backbone": "vision_encoder",
}


@pytest.mark.parametrize("name", WITH_PRESETS)
def test_a_preset_leaves_frozen_what_it_names_and_says_why(name):
    model = text.qwen3_5_with_vision() if name == "qwen3_5/Qwen3_5Backbone" else MODELS[name]()[0]
    rows, everything = keras_lora.list_targets(model), keras_lora.list_targets(model, targets="all-linear")
    left_out = [row for row in rows.of("freeze") if row.why.startswith("preset:")]
    assert any(WITH_PRESETS[name] in row.path for row in left_out)
    assert not any(WITH_PRESETS[name] in row.path for row in rows.of("adapt"))
    assert any(WITH_PRESETS[name] in row.path for row in everything.of("adapt"))
    assert type(model).__name__ in PRESETS


def test_every_preset_has_a_case():
    assert {name.split("/")[1] for name in WITH_PRESETS} == set(PRESETS)
