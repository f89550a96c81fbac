"""KerasHub layers: banks of experts, `ReversibleEmbedding`, and `generate` with one adapter per prompt.

Imported when a KerasHub layer is first met.
"""

from __future__ import annotations

from typing import Any

import keras
import keras_hub

from keras_lora.adapters import per_example
from keras_lora.adapters.per_example import INDEX
from keras_lora.layers.registering import register_layer
from keras_lora.swap.adapted import CONTAINER_KINDS, AdaptedModel

_GATED = {"_expert_feedforward_gate_dense": "gio", "_expert_feedforward_output_dense": "gio"}
#: The kernels of KerasHub's banks of experts, each `(experts, in, out)`.
BANKS: dict[str, dict[str, str]] = {
    "MixtralMoeExperts": {**_GATED, "_expert_feedforward_intermediate_dense": "gio"},
    "QwenMoeExperts": _GATED,
    "Qwen3MoeExperts": _GATED,
    "Qwen3_5MoeExperts": _GATED,
    "GptOssExperts": {"gate_up_proj": "gio", "down_proj": "gio"},
    "Gemma4MoEBlock": {"gate_proj": "gio", "up_proj": "gio", "down_proj": "gio"},
}

for cls in keras.layers.Layer.__subclasses__():
    if cls.__module__.partition(".")[0] == "keras_hub" and cls.__name__ in BANKS:
        register_layer(cls, kernels=BANKS[cls.__name__], factored=True)
register_layer(keras_hub.layers.ReversibleEmbedding, like=keras.layers.ReversibleEmbedding)


class AdaptedGenerator(AdaptedModel):
    """An adapted model that generates text; its inputs may include an index of adapters."""

    def generate_step(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        index = inputs.get(INDEX) if isinstance(inputs, dict) else None
        rest = inputs if index is None else {key: value for key, value in inputs.items() if key != INDEX}
        with per_example.using(index):
            return super().generate_step(rest, *args, **kwargs)  # type: ignore[misc]


CONTAINER_KINDS[keras_hub.models.CausalLM] = AdaptedGenerator
