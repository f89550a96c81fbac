"""Module names of `transformers` models, if they differ from the names in checkpoints.

`transformers` 5 renames the tensors of older checkpoints when it loads them. PEFT uses module names, and KerasHub's
converters use checkpoint names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def module_names(model_type: str) -> Callable[[str], str]:
    """Return a function from checkpoint names to module names of the installed version of `transformers`.

    Args:
        model_type: The `model_type` in the `config.json` of the checkpoint, for example `"vit"`.

    Raises:
        ImportError: `transformers` 5 or PyTorch, which it needs, is not installed.
        ValueError: `transformers` does not know this model type.

    Example:

    >>> from keras_lora.interop import module_names
    >>> module_names("vit")("vit.encoder.layer.0.attention.attention.query.weight")
    'vit.layers.0.attention.q_proj.weight'
    >>> module_names("llama")("model.layers.0.self_attn.q_proj.weight")
    'model.layers.0.self_attn.q_proj.weight'
    """
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
        from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES
    except ImportError as error:
        raise ImportError(
            f"`module_names({model_type!r})` asks `transformers` for its module names. Expected version 5 and PyTorch. "
            f"Received: {error}. Run `pip install 'keras_lora[interop]'`, or pass a function of your own."
        ) from error
    if model_type not in MODEL_MAPPING_NAMES:
        raise ValueError(f"`transformers` has no model of the type {model_type!r}. Expected one such as 'vit' or 'llama'.")
    class_names = MODEL_MAPPING_NAMES[model_type]
    classes = [class_names] if isinstance(class_names, str) else list(class_names)
    table_of: Any = get_checkpoint_conversion_mapping
    tables = [table_of(name) for name in (*classes, model_type)]
    rules: list[Any] = next((table for table in tables if table), [])

    def rename(name: str) -> str:
        for rule in rules:
            name, _ = rule.rename_source_key(name)
        return name

    return rename
