"""Small random models of `transformers`, each with the KerasHub model that is the same: `FAMILIES[name].pair(folder)`.

A checkpoint is written by `transformers` and read by KerasHub. Its numbers have the precision of float16, to which
KerasHub's converter for Mistral rounds.
"""

from __future__ import annotations

import copy
import functools
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import keras_hub
import numpy as np
import safetensors.torch
import torch
import transformers

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
DECODER = {**SIZES, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ENCODER = {**SIZES, "num_labels": 3, "pad_token_id": 0}
MODULE = {**DECODER, "head_dim": 4, "query_pre_attn_scalar": 4, "sliding_window": 8}
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32, "bos_token_id": 1, "eos_token_id": 2}
DISTIL = {"vocab_size": 40, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 32}
VIT = {**SIZES, "image_size": 8, "patch_size": 4, "num_labels": 3}
DINO = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 8, "patch_size": 4}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
QWEN3_5 = {**DECODER, **EXPERTS, "head_dim": 8, "shared_expert_intermediate_size": 20, "linear_num_key_heads": 2} | {
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
    "layer_types": ["linear_attention", "full_attention"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    | {"mrope_section": [1, 1, 0], "mrope_interleaved": True},
}
NO_IMAGES = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "patch_size": 8} | {
    "out_hidden_size": 16,
    "num_position_embeddings": 16,
}
OSS = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 8} | {
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}
}
DROPOUT = {name: 0.0 for name in ("hidden_dropout_prob", "attention_probs_dropout_prob")}

WEIGHTS = "model.safetensors"
TOKENS = np.random.default_rng(0).integers(3, 40, size=(2, 6)).astype("int32")
IMAGES = np.random.default_rng(1).normal(size=(2, 8, 8, 3)).astype("float32")


@functools.lru_cache(maxsize=4)
def _read(cls: Any, folder: Path) -> Any:
    return cls.from_pretrained(folder).eval()


@dataclass(frozen=True)
class Family:
    """One family: how it is made on both sides.

    Attributes:
        cls, config: The class and the config in `transformers`.
        task: The class in KerasHub: a task, of which logits are compared, or a backbone, of which the last states are.
        targets: Modules for PEFT's `target_modules`.
        prefix: For `to_peft`.
        names: For heads that KerasHub's converters do not know.
        arguments: Of the task.
        parameters: For PEFT's `target_parameters`.
        encoded: Whether KerasHub reads the experts in the four bits of GPT-OSS only.
    """

    cls: Any
    config: Any
    task: Any
    targets: Any = "all-linear"
    prefix: str = ""
    names: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    parameters: tuple[str, ...] = ()
    encoded: bool = False

    @property
    def of_images(self) -> bool:
        return hasattr(self.config, "image_size")

    def checkpoint(self, folder: Path) -> Path:
        """A checkpoint of `transformers`."""
        torch.manual_seed(0)
        model = self.cls(self.config)
        with torch.no_grad():
            for name, each in model.named_parameters():
                each.copy_((each + 0.1 * torch.randn_like(each)).half().float())
                if "token_type" in name and self.cls is transformers.RobertaForSequenceClassification:
                    each.zero_()  # KerasHub's RoBERTa has none
        packed = {} if not self.encoded else _in_four_bits(model)
        model.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        if "num_local_experts" in config:  # KerasHub reads the name of `transformers` 4
            config["num_experts"] = config["num_local_experts"]
        config["language_model_only"] = "vision_config" in config  # no images are given here
        (folder / "config.json").write_text(json.dumps(config))
        if packed:
            shutil.copytree(folder, folder / "packed")
            whole = {key: each for key, each in safetensors.torch.load_file(folder / WEIGHTS).items() if key not in packed}
            pairs = {key: each for pair in packed.values() for key, each in pair.items()}
            safetensors.torch.save_file({**whole, **pairs}, folder / "packed" / WEIGHTS)
        return folder

    def theirs(self, folder: Path) -> Any:
        return copy.deepcopy(_read(self.cls, folder))

    def ours(self, folder: Path) -> Any:
        folder = folder / "packed" if self.encoded else folder
        if issubclass(self.task, keras_hub.models.Backbone):
            return self.task.from_preset(str(folder))
        if self.of_images:
            return self.task.from_preset(str(folder), preprocessor=None)
        return self.task(backbone=self.backbone.from_preset(str(folder)), preprocessor=None, **self.arguments)

    @property
    def backbone(self) -> Any:
        """The class of the backbone."""
        if issubclass(self.task, keras_hub.models.Backbone):
            return self.task
        return next(cls for cls in self.task.__mro__ if getattr(cls, "backbone_cls", None)).backbone_cls

    @property
    def inputs(self) -> Any:
        """The input of our model."""
        if issubclass(self.task, keras_hub.models.Seq2SeqLM):
            ids = {"encoder": TOKENS, "decoder": TOKENS[:, ::-1]}
            masks = {f"{part}_padding_mask": np.ones_like(each) for part, each in ids.items()}
            return masks | {f"{part}_token_ids": each for part, each in ids.items()}
        if self.of_images:
            name = {keras_hub.models.DINOV2Backbone: "images", keras_hub.models.DINOV3Backbone: "pixel_values"}
            return {name[self.task]: IMAGES} if self.task in name else IMAGES
        x = {"token_ids": TOKENS, "padding_mask": np.ones_like(TOKENS)}
        return x | ({"segment_ids": np.zeros_like(TOKENS)} if self.cls is transformers.BertForSequenceClassification else {})

    def our_logits(self, model: Any) -> np.ndarray:
        return keras.ops.convert_to_numpy(model(keras.tree.map_structure(keras.ops.convert_to_tensor, self.inputs)))

    def their_logits(self, model: Any) -> np.ndarray:
        given = {"pixel_values": IMAGES.transpose(0, 3, 1, 2)} if self.of_images else {"input_ids": TOKENS.astype("int64")}
        if issubclass(self.task, keras_hub.models.Seq2SeqLM):
            given["decoder_input_ids"] = given["input_ids"][:, ::-1].copy()
        with torch.no_grad():
            found = model.eval()(**{name: torch.tensor(each) for name, each in given.items()})
        names = ("cls_logits", "logits", "last_hidden_state")  # of DeiT with a teacher, KerasHub has the first
        return next(found[name] for name in names if name in found).numpy()


def _in_four_bits(model: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Give the experts of GPT-OSS numbers that its four bits can have, and return these, as its checkpoints have them."""
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    found = {}
    for name, each in model.named_parameters():
        if name.endswith(("gate_up_proj", "down_proj")):
            number, in_dim, out_dim = each.shape
            codes = torch.randint(16, (number, out_dim, in_dim // 32, 16, 2), dtype=torch.uint8)
            each.data.copy_((table[codes.long()] / 16).reshape(number, out_dim, in_dim).transpose(1, 2))
            scales = torch.full(codes.shape[:3], 127 - 4, dtype=torch.uint8)
            found[name] = {f"{name}_blocks": codes[..., 0] | (codes[..., 1] << 4), f"{name}_scales": scales}
    return found


_t, _k = transformers, keras_hub.models
_gelu = {"hidden_act": "gelu_pytorch_tanh"}
_heads = {"num_classes": 3, "dropout": 0.0}

FAMILIES = {
    "llama": Family(_t.LlamaForCausalLM, _t.LlamaConfig(**DECODER, tie_word_embeddings=False), _k.Llama3CausalLM),
    "mistral": Family(_t.MistralForCausalLM, _t.MistralConfig(**DECODER, sliding_window=8), _k.MistralCausalLM),
    "qwen2": Family(_t.Qwen2ForCausalLM, _t.Qwen2Config(**DECODER, tie_word_embeddings=True), _k.QwenCausalLM),
    "gemma": Family(
        _t.GemmaForCausalLM, _t.GemmaConfig(**{**DECODER, "num_key_value_heads": 1}, head_dim=4), _k.GemmaCausalLM
    ),
    "gemma2": Family(
        _t.Gemma2ForCausalLM,
        _t.Gemma2Config(**DECODER, head_dim=4, query_pre_attn_scalar=4, sliding_window=8),
        _k.GemmaCausalLM,
    ),
    "gemma3": Family(
        _t.Gemma3ForCausalLM,
        _t.Gemma3TextConfig(
            **DECODER, head_dim=4, query_pre_attn_scalar=4, sliding_window=8, layer_types=["sliding_attention"] * 2
        ),
        _k.Gemma3CausalLM,
    ),
    "gpt2": Family(_t.GPT2LMHeadModel, _t.GPT2Config(**GPT2), _k.GPT2CausalLM, prefix="transformer."),
    "bert": Family(
        _t.BertForSequenceClassification,
        _t.BertConfig(**ENCODER, **_gelu),
        _k.BertTextClassifier,
        targets=["query", "key", "value", "dense"],
        prefix="bert.",
        names={"logits": "classifier"},
        arguments=_heads,
    ),
    "roberta": Family(
        _t.RobertaForSequenceClassification,
        _t.RobertaConfig(**{**ENCODER, "max_position_embeddings": 34, "pad_token_id": 1}),
        _k.RobertaTextClassifier,
        targets=["query", "value", "intermediate.dense", "attention.output.dense"],
        names={"pooled_dense": "classifier.dense", "logits": "classifier.out_proj"},
        arguments=_heads,
    ),
    "distilbert": Family(
        _t.DistilBertForSequenceClassification,
        _t.DistilBertConfig(**DISTIL, num_labels=3),
        _k.DistilBertTextClassifier,
        targets=["q_lin", "v_lin", "lin1", "lin2"],
        names={"pooled_dense": "pre_classifier", "logits": "classifier"},
        arguments=_heads,
    ),
    "vit": Family(
        _t.ViTForImageClassification,
        _t.ViTConfig(**VIT),
        _k.ViTImageClassifier,
        targets=["q_proj", "v_proj", "fc1", "fc2", "projection"],
    ),
    "t5gemma": Family(
        _t.T5GemmaForConditionalGeneration,
        _t.T5GemmaConfig(encoder=MODULE, decoder=MODULE, vocab_size=40),
        _k.T5GemmaSeq2SeqLM,
        targets=["q_proj", "v_proj", "up_proj", "encoder.embed_tokens"],
        prefix="model.",
    ),
    "deit": Family(
        _t.DeiTForImageClassificationWithTeacher,
        _t.DeiTConfig(**VIT),
        _k.DeiTImageClassifier,
        targets=["q_proj", "v_proj", "fc1", "fc2", "projection"],
    ),
    "dinov2": Family(
        _t.Dinov2Model,
        _t.Dinov2Config(**DINO, mlp_ratio=2),
        _k.DINOV2Backbone,
        targets=["q_proj", "o_proj", "fc1", "fc2", "projection"],
    ),
    "dinov2 with registers": Family(
        _t.Dinov2WithRegistersModel,
        _t.Dinov2WithRegistersConfig(**DINO, mlp_ratio=2, num_register_tokens=2),
        _k.DINOV2Backbone,
        targets=["q_proj", "v_proj", "fc1", "fc2"],
    ),
    "dinov3": Family(
        _t.DINOv3ViTModel,
        _t.DINOv3ViTConfig(**DINO, num_register_tokens=2, intermediate_size=24),
        _k.DINOV3Backbone,
        targets=["q_proj", "v_proj", "up_proj", "patch_embeddings"],
    ),
    "mixtral": Family(
        _t.MixtralForCausalLM,
        _t.MixtralConfig(**DECODER, num_local_experts=4, num_experts_per_tok=2, sliding_window=8),
        _k.MixtralCausalLM,
        targets=["q_proj", "v_proj", "lm_head"],
        parameters=("experts.gate_up_proj", "experts.down_proj"),
    ),
    "qwen2_moe": Family(
        _t.Qwen2MoeForCausalLM,
        _t.Qwen2MoeConfig(**DECODER, **EXPERTS, shared_expert_intermediate_size=20),
        _k.QwenMoeCausalLM,
        targets=["q_proj", "shared_expert_gate"],
        parameters=("experts.gate_up_proj", "experts.down_proj", "mlp.gate.weight", "shared_expert.up_proj.weight"),
    ),
    "qwen3_moe": Family(
        _t.Qwen3MoeForCausalLM,
        _t.Qwen3MoeConfig(**DECODER, **EXPERTS, head_dim=4, norm_topk_prob=True),
        _k.Qwen3MoeCausalLM,
        targets=["q_proj", "v_proj"],
        parameters=("experts.gate_up_proj", "experts.down_proj"),
    ),
    "qwen3_5_moe": Family(
        _t.Qwen3_5MoeForConditionalGeneration,
        _t.Qwen3_5MoeConfig(text_config=QWEN3_5, vision_config=NO_IMAGES, tie_word_embeddings=False),
        _k.Qwen3_5MoeCausalLM,
        targets=["q_proj", "in_proj_qkv", "shared_expert.gate_proj"],
        parameters=("experts.gate_up_proj", "experts.down_proj", "mlp.gate.weight"),
    ),
    "gpt_oss": Family(
        _t.GptOssForCausalLM,
        _t.GptOssConfig(**{**DECODER, "hidden_size": 32, "intermediate_size": 32}, **OSS),
        _k.GptOssCausalLM,
        targets=["q_proj", "o_proj"],
        parameters=("experts.gate_up_proj", "experts.down_proj"),
        encoded=True,
    ),
}
