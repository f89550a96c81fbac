"""Rules for what vLLM, llama.cpp and Ollama read from a PEFT adapter. They silently ignore parts they do not support.

The rules come from the source code of vLLM (`vllm/lora/peft_helper.py`, `lora_model.py`, `utils.py`), llama.cpp
(`convert_lora_to_gguf.py`) and Ollama (`convert/convert_adapter.go`). vLLM reads `rank_pattern` and `alpha_pattern` from
version 0.32 on, which `examples/to_vllm.py` runs. The tests run none of these programs.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from keras_lora.interop import peft_folder
from keras_lora.interop.problems import grouped

#: The modules that the decoders in all three programs have, and vLLM's and llama.cpp's embeddings.
DECODER_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_EMBEDDINGS = ("embed_tokens", "lm_head")
_MOST_RANK = 512
READERS = ("vllm", "llama.cpp", "ollama")


def serving_problems(folder: str | os.PathLike[str]) -> dict[str, list[str]]:
    """Check whether vLLM, llama.cpp and Ollama read a PEFT adapter as PEFT does.

    Args:
        folder: A folder with `adapter_config.json` and `adapter_model.safetensors`.

    Returns:
        A dict with the keys `"vllm"`, `"llama.cpp"` and `"ollama"`, each with a list of what the program refuses or would
        read wrongly. The list is empty if it reads the adapter correctly, as far as its rules are known here. Problems that
        differ only in the name of a tensor are one line.

    Raises:
        FileNotFoundError, ValueError: As `keras_lora.interop.from_peft`.

    Example:

    >>> import os, tempfile, keras_hub, keras_lora
    >>> from keras_lora.interop import to_peft
    >>> from keras_lora.interop import serving_problems
    >>> sizes = {"num_layers": 1, "num_query_heads": 2, "num_key_value_heads": 1, "hidden_dim": 8, "intermediate_dim": 8}
    >>> model = keras_hub.models.Llama3Backbone(vocabulary_size=9, **sizes)
    >>> folder = os.path.join(tempfile.mkdtemp(), "french")
    >>> to_peft(keras_lora.apply_lora(model, "dora", rank=2), folder)
    >>> serving_problems(folder)["vllm"]
    ['it is a DoRA, which is refused']
    """
    folder = Path(folder)
    peft_folder.read(folder)
    config = json.loads((folder / peft_folder.CONFIG).read_text(encoding="utf-8"))
    tensors = peft_folder.tensors_of(folder / peft_folder.TENSORS)
    return {reader: grouped(_problems(reader, config, tensors)) for reader in READERS}


def unread(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> list[str]:
    """Return what all these readers refuse or read wrongly, for any model."""
    found: dict[str, list[str]] = {}
    for reader in READERS:
        for problem in _problems(reader, config, tensors, any_model=True):
            found.setdefault(problem, []).append(reader)
    return [f"{problem} ({', '.join(readers)})" for problem, readers in found.items()]


def _problems(reader: str, config: dict[str, Any], tensors: dict[str, np.ndarray], any_model: bool = False) -> list[str]:
    problems = [
        f"`{key}` is missing from the config" for key in ("r", "lora_alpha", "target_modules") if not config.get(key)
    ]
    if config.get("use_dora"):
        problems.append("it is a DoRA, which is refused")
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        problems.append("it has trained biases, which are refused or left out")
    if config.get("modules_to_save"):
        problems.append(f"it has modules trained themselves, {config['modules_to_save']}, which are refused")
    if config.get("trainable_token_indices"):
        problems.append("it has trained tokens, which are refused or left out")
    if config.get("target_parameters"):
        problems.append("it has adapted parameters (banks of experts, routers), which are refused or left out")
    if config.get("ensure_weight_tying"):
        problems.append("it has an output projection that is the embedding, which is refused or left out")
    until = " before version 0.32" if reader == "vllm" else ""
    if config.get("alpha_pattern"):
        problems.append(f"its `alpha_pattern` is ignored{until}: there is one scale for all modules")
    if config.get("rank_pattern") and reader != "llama.cpp":
        problems.append(f"its `rank_pattern` is ignored{until}: there is one scale for all modules")
    if config.get("use_rslora") and reader != "vllm":
        problems.append("its `use_rslora` is ignored: the scale is alpha / rank")
    if reader == "ollama" and type(config.get("lora_alpha")) is not int:
        problems.append("its `lora_alpha` is no whole number, as which it is parsed")
    rank = config.get("r")
    if reader == "vllm" and type(rank) is int and rank > _MOST_RANK:
        problems.append(f"its rank {rank} is over {_MOST_RANK}, the largest that is served")
    known = DECODER_MODULES if reader == "ollama" else (*DECODER_MODULES, *_EMBEDDINGS)
    for key, tensor in sorted(tensors.items()):
        match = re.fullmatch(
            r"(?:base_model\.model\.)?(.+)\.(lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B)", key
        )
        if match is None:
            if not key.endswith((".lora_magnitude_vector", ".trainable_tokens_delta", ".bias")):
                problems.append(f"the tensor '{key}' is no factor, which is refused")
            continue
        if tensor.ndim != 2:
            problems.append(f"the tensor '{key}' is of a convolution, which is refused")
        if reader != "llama.cpp" and tensor.shape[0 if "_A" in match[2] else -1] != rank:
            problems.append(f"the tensor '{key}' has not the rank {rank} of the config, which gives the scale{until}")
        if reader == "ollama" and "embedding" in match[2] and not any_model:
            problems.append(f"the tensor '{key}' is of an embedding, which is left out")
        elif not any_model and match[1].rpartition(".")[2] not in known:
            problems.append(f"the module '{match[1]}' is none of those it knows in most models: {', '.join(known)}")
    return problems
