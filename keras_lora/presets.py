"""Which parts of known models are best left out when no targets are given."""

from __future__ import annotations

from dataclasses import dataclass

import keras

from keras_lora.patterns import matches
from keras_lora.structure import Place, walk


@dataclass(frozen=True)
class Preset:
    """Patterns of what `apply_lora` leaves frozen by default in a backbone, and why."""

    frozen: tuple[str, ...]
    why: str


_ENCODERS = "preset: the encoder of another modality stays as it was trained"
_ROUTER = "preset: the router goes on choosing experts as it was trained to"
_SPARSE = Preset(("*/sparse_feedforward_gate_dense",), _ROUTER)

#: By the class name of a KerasHub backbone. A pattern that matches nothing (a text-only variant) says nothing.
PRESETS: dict[str, tuple[Preset, ...]] = {
    "Gemma3Backbone": (Preset(("*vision_encoder*",), _ENCODERS),),
    "Gemma4Backbone": (Preset(("*vision_encoder*", "*audio_encoder*"), _ENCODERS), Preset(("*/moe_router*",), _ROUTER)),
    "GptOssBackbone": (Preset(("*/router_dense",), _ROUTER),),
    "MixtralBackbone": (_SPARSE,),
    "PaliGemmaBackbone": (Preset(("*pali_gemma_vit*",), _ENCODERS),),
    "Qwen3MoeBackbone": (_SPARSE,),
    "Qwen3_5MoeBackbone": (Preset(("*/router_gate",), _ROUTER),),
    "QwenMoeBackbone": (_SPARSE,),
    "T5Gemma2Backbone": (Preset(("*vision_encoder*",), _ENCODERS),),
}


def left_out(places: list[Place]) -> list[tuple[Place, str]]:
    """The places that a preset leaves frozen, each with the reason."""
    found = []
    for holder in places:
        for preset in PRESETS.get(type(holder.layer).__name__, ()) if _is_of_keras_hub(holder.layer) else ():
            inside = {id(each.layer) for each in walk(holder.layer)}
            within = [place for place in places if id(place.layer) in inside]
            found += [(place, preset.why) for place in within if any(matches(each, place) for each in preset.frozen)]
    return found


def _is_of_keras_hub(layer: keras.layers.Layer) -> bool:
    return type(layer).__module__.partition(".")[0] == "keras_hub"
