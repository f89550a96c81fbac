"""The parts of known models that are best left frozen by default."""

from __future__ import annotations

from dataclasses import dataclass

import keras

from keras_lora.swap.addresses import Place, walk
from keras_lora.targets.patterns import matches


@dataclass(frozen=True)
class Preset:
    """What `apply_lora` leaves frozen by default in a backbone, and why: attributes of the backbone, or patterns."""

    frozen: tuple[str, ...]
    why: str

    def places_in(self, backbone: keras.layers.Layer, places: list[Place]) -> list[Place]:
        """The `places` to leave frozen."""
        parts = [getattr(backbone, each, None) for each in self.frozen if each.isidentifier()]
        inside = {id(place.layer) for part in parts if part is not None for place in walk(part)}
        patterns = [each for each in self.frozen if not each.isidentifier()]
        return [place for place in places if id(place.layer) in inside or any(matches(each, place) for each in patterns)]


_ENCODERS = "preset: the encoder of another modality stays as it was trained"
_DIFFUSER = "preset: the diffuser learns; the text encoders and the autoencoder stay as they were trained"
_ROUTER = "preset: the router goes on choosing experts as it was trained to"
_VISION = Preset(("vision_encoder",), _ENCODERS)
_VISION_AND_AUDIO = Preset(("vision_encoder", "audio_encoder"), _ENCODERS)
_SPARSE = Preset(("*/sparse_feedforward_gate_dense",), _ROUTER)

#: By the class name of a KerasHub backbone. Parts that a variant lacks (a text-only one has no encoder) are ignored.
PRESETS: dict[str, tuple[Preset, ...]] = {
    "BLIP2Backbone": (_VISION,),
    "Gemma3Backbone": (_VISION,),
    "Gemma3nBackbone": (_VISION_AND_AUDIO,),
    "Gemma4Backbone": (_VISION_AND_AUDIO, Preset(("*/moe_router*",), _ROUTER)),
    "GptOssBackbone": (Preset(("*/router_dense",), _ROUTER),),
    "MixtralBackbone": (_SPARSE,),
    "PaliGemmaBackbone": (Preset(("vit_encoder",), _ENCODERS),),
    "Qwen3MoeBackbone": (_SPARSE,),
    "Qwen3_5Backbone": (_VISION,),
    "Qwen3_5MoeBackbone": (_VISION, Preset(("*/router_gate",), _ROUTER)),
    "QwenMoeBackbone": (_SPARSE,),
    "StableDiffusion3Backbone": (
        Preset(("clip_l", "clip_l_projection", "clip_g", "clip_g_projection", "t5", "vae"), _DIFFUSER),
    ),
    "T5Gemma2Backbone": (_VISION,),
}


def left_out(places: list[Place]) -> list[tuple[Place, str]]:
    """The places that a preset leaves frozen, with the reasons."""
    found = []
    for backbone in (place.layer for place in places if type(place.layer).__module__.partition(".")[0] == "keras_hub"):
        if presets := PRESETS.get(type(backbone).__name__, ()):
            inside = {id(each.layer) for each in walk(backbone)}
            within = [place for place in places if id(place.layer) in inside]
            found += [(place, preset.why) for preset in presets for place in preset.places_in(backbone, within)]
    return found
