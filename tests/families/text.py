"""The text families of KerasHub: every backbone, and every task on it, at a width of 8 to 16 and two layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras_hub
import numpy as np

from families import family, ids, ones

# No forward here is trivially zero. What starts at zero, biases aside: the scales of the norms of Gemma, T5Gemma and
# Qwen 3.5, to which one is added, and `A_log` of Qwen 3.5.

Entries = dict[str, Callable[[], tuple[Any, Any]]]

MASK_POSITIONS = np.array([[1, 3], [0, 4]], "int32")
#: Which arguments a task has beside its backbone; the tasks that are not here have none.
ARGUMENTS = {
    "TextClassifier": {"num_classes": 3, "dropout": 0.0},
    "ProteinClassifier": {"num_classes": 3, "dropout": 0.0},
}


def inputs(segments: bool = False, mask: bool = True) -> dict[str, np.ndarray]:
    x = {"token_ids": ids(2, 5, below=20)}
    if segments:
        x["segment_ids"] = 0 * ones(2, 5)
    if mask:
        x["padding_mask"] = ones(2, 5)
    return x


def two_inputs() -> dict[str, np.ndarray]:
    """The input of an encoder and a decoder."""
    return {
        "encoder_token_ids": ids(2, 5, below=20),
        "encoder_padding_mask": ones(2, 5),
        "decoder_token_ids": ids(2, 4, below=20),
        "decoder_padding_mask": ones(2, 4),
    }


def models(name: str, tasks: list[str], x: dict[str, np.ndarray], config: dict[str, Any]) -> Entries:
    """`{name}Backbone` of this config, and a `{name}{task}` on one like it for every task."""

    def backbone() -> Any:
        return getattr(keras_hub.models, f"{name}Backbone")(**config)

    def on_backbone(task: str) -> Callable[[], tuple[Any, Any]]:
        given = {**x, "mask_positions": MASK_POSITIONS} if task.startswith("Masked") else x
        arguments = {**ARGUMENTS.get(task, {}), "preprocessor": None}
        return lambda: (getattr(keras_hub.models, name + task)(backbone=backbone(), **arguments), given)

    return {f"{name}Backbone": lambda: (backbone(), x)} | {name + task: on_backbone(task) for task in tasks}


def sizes(**more: Any) -> dict[str, Any]:
    return {"vocabulary_size": 20, "num_layers": 2, "hidden_dim": 8, "intermediate_dim": 16, **more}


def heads(**more: Any) -> dict[str, Any]:
    """Sizes of a model with as many key heads as query heads."""
    return sizes(num_heads=2, **more)


def grouped(**more: Any) -> dict[str, Any]:
    """Sizes of a model whose query heads share key heads."""
    return sizes(**{"hidden_dim": 16, "num_query_heads": 4, "num_key_value_heads": 2, **more})


# Encoders


@family("albert", "text encoder")
def albert() -> Entries:
    config = heads(embedding_dim=6, dropout=0.0, max_sequence_length=6)
    return models("Albert", ["TextClassifier", "MaskedLM"], inputs(segments=True), config)


@family("bert", "text encoder")
def bert() -> Entries:
    config = heads(dropout=0.0, max_sequence_length=6)
    return models("Bert", ["TextClassifier", "MaskedLM", "TextEmbedder"], inputs(segments=True), config)


@family("deberta_v3", "text encoder")
def deberta_v3() -> Entries:
    config = heads(dropout=0.0, max_sequence_length=6, bucket_size=4)
    return models("DebertaV3", ["TextClassifier", "MaskedLM"], inputs(), config)


@family("distil_bert", "text encoder")
def distil_bert() -> Entries:
    config = heads(dropout=0.0, max_sequence_length=6)
    return models("DistilBert", ["TextClassifier", "MaskedLM"], inputs(), config)


@family("electra", "text encoder")
def electra() -> Entries:
    config = heads(embedding_dim=6, dropout=0.0, max_sequence_length=6)
    config["vocab_size"] = config.pop("vocabulary_size")
    return models("Electra", [], inputs(segments=True), config)


@family("esm", "text encoder")
def esm() -> Entries:
    config = heads(dropout=0.0, max_sequence_length=6)
    return models("ESM", ["ProteinClassifier", "MaskedPLM"], inputs(mask=False), config)


@family("f_net", "text encoder")
def f_net() -> Entries:
    config = sizes(dropout=0.0, max_sequence_length=6)
    return models("FNet", ["TextClassifier", "MaskedLM"], inputs(segments=True, mask=False), config)


@family("roberta", "text encoder")
def roberta() -> Entries:
    config = heads(dropout=0.0, max_sequence_length=6)
    return models("Roberta", ["TextClassifier", "MaskedLM"], inputs(), config)


@family("roformer_v2", "text encoder")
def roformer_v2() -> Entries:
    config = heads(head_size=4, dropout=0.0)
    return models("RoformerV2", ["TextClassifier", "MaskedLM"], inputs(segments=True, mask=False), config)


@family("xlm_roberta", "text encoder")
def xlm_roberta() -> Entries:
    config = heads(dropout=0.0, max_sequence_length=6)
    return models("XLMRoberta", ["TextClassifier", "MaskedLM", "TextEmbedder"], inputs(), config)


@family("xlnet", "text encoder")
def xlnet() -> Entries:
    return models("XLNet", [], inputs(segments=True), heads())


# Decoders


@family("bloom", "decoder")
def bloom() -> Entries:
    return models("Bloom", ["CausalLM"], inputs(), heads())


@family("falcon", "decoder")
def falcon() -> Entries:
    return models("Falcon", ["CausalLM"], inputs(), sizes(num_attention_heads=2))


@family("gemma", "decoder")
def gemma() -> Entries:
    # A Gemma 2: what a Gemma 1 has, and soft caps, windows and a second pair of norms.
    config = grouped(
        head_dim=4,
        use_post_ffw_norm=True,
        use_post_attention_norm=True,
        attention_logit_soft_cap=50.0,
        final_logit_soft_cap=30.0,
        use_sliding_window_attention=True,
        sliding_window_size=3,
    )
    return models("Gemma", ["CausalLM"], inputs(), config)


@family("gemma3", "decoder")
def gemma3() -> Entries:
    config = grouped(
        image_size=16,
        vision_encoder=None,
        head_dim=4,
        use_post_ffw_norm=True,
        use_post_attention_norm=True,
        use_sliding_window_attention=True,
        sliding_window_size=3,
    )
    # An EmbeddingGemma, which attends both ways and has two more dense layers after the pooling.
    embedding = {"use_bidirectional_attention": True, "is_embedding_model": True}
    embedding |= {"pooling_intermediate_dim": 12, "embedding_dim": 6}
    embedder = models("Gemma3", ["TextEmbedder"], inputs(), config | embedding)
    return models("Gemma3", ["CausalLM"], inputs(), config) | {"Gemma3TextEmbedder": embedder["Gemma3TextEmbedder"]}


@family("gpt2", "decoder")
def gpt2() -> Entries:
    return models("GPT2", ["CausalLM"], inputs(), heads(dropout=0.0, max_sequence_length=6))


@family("gpt_neo_x", "decoder")
def gpt_neo_x() -> Entries:
    # Half of a head of 4 is rotated: of the usual quarter there would be no pair.
    return models("GPTNeoX", ["CausalLM"], inputs(), heads(rotary_percentage=0.5, max_sequence_length=6))


@family("llama", "decoder")
def llama() -> Entries:
    return models("Llama", ["CausalLM"], inputs(), grouped())


@family("llama3", "decoder")
def llama3() -> Entries:
    config = grouped(
        rope_frequency_adjustment_factor=32.0,
        rope_low_freq_factor=1.0,
        rope_high_freq_factor=4.0,
        rope_pretraining_sequence_length=6,
        tie_word_embeddings=True,
    )
    return models("Llama3", ["CausalLM"], inputs(), config)


@family("mistral", "decoder")
def mistral() -> Entries:
    return models("Mistral", ["CausalLM"], inputs(), grouped(sliding_window=3))


@family("opt", "decoder")
def opt() -> Entries:
    return models("OPT", ["CausalLM"], inputs(), heads(dropout=0.0, max_sequence_length=6))


@family("phi3", "decoder")
def phi3() -> Entries:
    return models("Phi3", ["CausalLM"], inputs(), grouped())


@family("qwen", "decoder")
def qwen() -> Entries:
    return models("Qwen", ["CausalLM"], inputs(), grouped())


@family("qwen3", "decoder")
def qwen3() -> Entries:
    return models("Qwen3", ["CausalLM", "TextEmbedder"], inputs(), grouped(head_dim=4))


#: A Qwen 3.5 has three layers of linear attention to one of full attention; here they are one to one.
QWEN3_5 = {
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
    "linear_conv_kernel_dim": 3,
}


@family("qwen3_5", "decoder")
def qwen3_5() -> Entries:
    return models("Qwen3_5", ["CausalLM"], inputs(), grouped(**QWEN3_5))


def qwen3_5_with_vision() -> Any:
    """Not entered: the vision encoder takes its grid out as NumPy numbers, so no compiled step can hold it."""
    from keras_hub.src.models.qwen3_5.qwen3_5_vision_encoder import Qwen3_5VisionEncoder

    vision = Qwen3_5VisionEncoder(
        depth=1,
        hidden_size=8,
        num_heads=2,
        intermediate_size=16,
        patch_size=4,
        out_hidden_size=16,
        num_position_embeddings=16,
    )
    return keras_hub.models.Qwen3_5Backbone(vision_encoder=vision, **grouped(**QWEN3_5))


@family("rwkv7", "decoder")
def rwkv7() -> Entries:
    config = sizes(hidden_size=16, head_size=4, gate_lora=8, mv_lora=4, aaa_lora=4, decay_lora=4)
    del config["hidden_dim"]
    return models("RWKV7", ["CausalLM"], inputs(), config)


@family("smollm3", "decoder")
def smollm3() -> Entries:
    config = sizes(
        hidden_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=False,
        attention_dropout=0.0,
        rope_layer_enabled_list=[True, False],
        layer_types=["full_attention", "full_attention"],
        mlp_bias=False,
        layer_norm_epsilon=1e-6,
        max_position_embeddings=6,
        rope_theta=10000.0,
        partial_rotary_factor=1.0,
    )
    return models("SmolLM3", ["CausalLM"], inputs(), config)


# Mixtures of experts


@family("gpt_oss", "mixture of experts")
def gpt_oss() -> Entries:
    return models("GptOss", ["CausalLM"], inputs(), grouped(num_experts=4, top_k=2, sliding_window=3))


@family("mixtral", "mixture of experts")
def mixtral() -> Entries:
    return models("Mixtral", ["CausalLM"], inputs(), grouped(num_experts=4, top_k=2, sliding_window=3))


@family("qwen_moe", "mixture of experts")
def qwen_moe() -> Entries:
    config = grouped(moe_intermediate_dim=8, shared_expert_intermediate_dim=12, num_experts=4, top_k=2)
    return models("QwenMoe", ["CausalLM"], inputs(), config)


@family("qwen3_moe", "mixture of experts")
def qwen3_moe() -> Entries:
    config = grouped(head_dim=4, moe_intermediate_dim=8, num_experts=4, top_k=2, norm_top_k_prob=True)
    return models("Qwen3Moe", ["CausalLM"], inputs(), config)


@family("qwen3_5_moe", "mixture of experts")
def qwen3_5_moe() -> Entries:
    config = grouped(moe_intermediate_dim=8, shared_expert_intermediate_size=12, num_experts=4, top_k=2, **QWEN3_5)
    del config["intermediate_dim"]
    return models("Qwen3_5Moe", ["CausalLM"], inputs(), config)


# Encoders with a decoder


@family("bart", "encoder-decoder")
def bart() -> Entries:
    return models("Bart", ["Seq2SeqLM"], two_inputs(), heads(dropout=0.0, max_sequence_length=6))


@family("t5", "encoder-decoder")
def t5() -> Entries:
    # A T5 1.1: gated, and with an output layer of its own.
    config = heads(key_value_dim=6, dropout=0.0, activation="gelu", tie_embedding_weights=False)
    return models("T5", ["Seq2SeqLM"], two_inputs(), config)


@family("t5gemma", "encoder-decoder")
def t5gemma() -> Entries:
    side = {
        "hidden_dim": 16,
        "intermediate_dim": 16,
        "num_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    config = {"vocabulary_size": 20, "sliding_window": 3, "query_pre_attn_scalar": 4.0, "cross_attention_hidden_size": 16}
    config |= {f"{which}_{key}": value for which in ("encoder", "decoder") for key, value in side.items()}
    config |= {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    return models("T5Gemma", ["Seq2SeqLM"], two_inputs(), config)


#: The classes that a small config cannot build, and why.
NOT_BUILT: dict[str, str] = {}
