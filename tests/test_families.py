"""Models of KerasHub and keras.applications, from small random configs, put through all that a user does with them.

A slice that is quick to build runs always, a third of it on each backend; `-m sweep` runs every model there is.
"""

import keras
import keras_hub
import numpy as np
import pytest
from families import KINDS, MODELS, applications, multimodal, text, vision  # noqa: F401  # they enter their models
from helpers import covering
from sweep import check, holds, move_adapters, problems

import keras_lora
from keras_lora.layers.keras_hub import BANKS
from keras_lora.swap.adapted import adapted_maps
from keras_lora.targets.presets import PRESETS

pytestmark = pytest.mark.torch_first

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


#: Each backend takes a third of the slice, to save time; with `-m sweep` each takes every model.
THIRD = SLICE[("jax", "tensorflow", "torch").index(keras.backend.backend()) :: 3]


@pytest.mark.parametrize("name", covering(THIRD, THIRD[:1]))
def test_a_slice_of_the_families(name):
    seen = check(MODELS[name])
    assert problems(seen) == []
    assert holds(seen["round_trip"])
    assert seen["moved"] == []


@pytest.mark.sweep
@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_model(name):
    assert problems(check(MODELS[name])) == []


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


GENERATING = ["llama/LlamaCausalLM", "gpt2/GPT2CausalLM", "mixtral/MixtralCausalLM", "bart/BartSeq2SeqLM"]
ALL_GENERATING = [name for name in sorted(MODELS) if name.endswith(("CausalLM", "Seq2SeqLM"))]
#: What `generate` needs beside the input of these models.
CANNOT_GENERATE = {
    "gemma3/Gemma3CausalLM": "without images it makes an array of `None`, unless a preprocessor has been there",
    "parseq/PARSeqCausalLM": "needs a tokenizer that only tensorflow-text has",
    "rwkv7/RWKV7CausalLM": "needs what its preprocessor makes of a prompt",
}


def generated(model, given, side):
    """The tokens that `generate` gives, and those that a loop without its cache gives."""
    tokens, mask = f"{side}token_ids", f"{side}padding_mask"
    length = given[tokens].shape[1]
    model.compile(sampler="greedy")
    by_generate = np.asarray(model.generate(given, stop_token_ids=None)[tokens])
    looped = {key: np.array(each) for key, each in given.items()}
    for position in range(length - 2, length):
        looped[mask] = np.repeat((np.arange(length) < position).astype("int32")[None], len(looped[mask]), axis=0)
        logits = keras.ops.convert_to_numpy(model(looped))
        looped[tokens][:, position] = logits[:, position - 1].argmax(-1)
    return by_generate.tolist(), looped[tokens].tolist()


def generated_plain_adapted_and_merged(name, size):
    """What is generated as the last two tokens of the model's input: before, adapted, and as the plain model once merged."""
    model, x = MODELS[name]()
    side = "decoder_" if name.endswith("Seq2SeqLM") else ""
    given = {key: np.array(each) for key, each in x.items()}
    given[f"{side}padding_mask"][:, -2:] = 0
    given[f"{side}token_ids"][:, -2:] = 0
    plain = generated(model, given, side)
    keras_lora.apply_lora(model, rank=2)
    move_adapters(model, size)
    adapted = generated(model, given, side)
    assert adapted_maps(model)
    return plain, adapted, generated(keras_lora.merge_lora(model), given, side)


@pytest.mark.parametrize("name", covering(GENERATING, []))
def test_generate_works_adapted_and_merged(name):
    (plain, _), (adapted, looped), (merged, _) = generated_plain_adapted_and_merged(
        name, size=4.0
    )  # so far that other tokens come
    assert plain != adapted == looped == merged


@pytest.mark.sweep
@pytest.mark.parametrize("name", sorted(set(ALL_GENERATING) - set(GENERATING) - set(CANNOT_GENERATE)))
def test_generate_of_an_adapted_model_is_that_of_the_plain_model_it_becomes(name):
    _, adapted, merged = generated_plain_adapted_and_merged(name, size=0.1)
    assert adapted == merged


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
    attributes = [each for preset in PRESETS[type(model).__name__] for each in preset.frozen if each.isidentifier()]
    assert all(hasattr(model, each) for each in attributes)
    assert not any(WITH_PRESETS[name] in row.path for row in rows.of("adapt"))
    assert any(WITH_PRESETS[name] in row.path for row in everything.of("adapt"))
    assert type(model).__name__ in PRESETS


#: On torch KerasHub keeps parts of these from Keras. An address must lead there all the same, or files would not travel.
UNTRACKED_ON_TORCH = {
    "flux/FluxTextToImage": (23, "_backbone/double_blocks/0/image_attn/proj"),
    "gemma3n/Gemma3nBackbone": (33, "embed_audio/embedding_projection"),
    "rwkv7/RWKV7CausalLM": (13, "_backbone/rwkv_layers/0/att/key"),
    "sam/SAMImageSegmenter": (63, "_backbone/image_encoder/layers/1/projection"),
    "stable_diffusion_3/StableDiffusion3TextToImage": (27, "_backbone/diffuser/context_embedding"),
    "vit_det/ViTDetBackbone": (11, "layers/1/projection"),
}


@pytest.mark.parametrize("name", UNTRACKED_ON_TORCH)
def test_addresses_and_targets_are_the_same_on_every_backend(name):
    count, address = UNTRACKED_ON_TORCH[name]
    model, _ = MODELS[name]()
    found = adapted_maps(keras_lora.apply_lora(model, rank=2))
    assert address in found
    assert len(found) == count


def test_every_preset_has_a_case():
    assert {name.split("/")[1] for name in WITH_PRESETS} == set(PRESETS)


def test_a_file_of_a_causal_lm_keeps_the_sampler(tmp_path):
    backbone = keras_hub.models.Llama3Backbone(
        vocabulary_size=9, num_layers=1, num_query_heads=1, num_key_value_heads=1, hidden_dim=4, intermediate_dim=4
    )
    model = keras_lora.apply_lora(keras_hub.models.Llama3CausalLM(backbone), rank=1)
    for sampler in (keras_hub.samplers.GreedySampler(), keras_hub.samplers.TopKSampler(k=3, temperature=0.7, seed=2)):
        model.compile("adam", "mse", sampler=sampler)
        model.save(tmp_path / "lm.keras")
        loaded = keras.saving.load_model(tmp_path / "lm.keras")
        assert type(loaded.sampler) is type(sampler)
        assert loaded.sampler.get_config() == sampler.get_config()
