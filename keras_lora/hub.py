"""KerasHub's own layers: banks of experts, and its `ReversibleEmbedding`. Imported when a KerasHub layer is first met."""

from __future__ import annotations

import keras
import keras_hub

from keras_lora.registration import register_layer

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
