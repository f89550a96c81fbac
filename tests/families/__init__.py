"""Small random models of every KerasHub family, and of keras.applications: `MODELS[name]()` gives a model and its input.

A name is `family/ClassName`. The models are built from configs of their own, without weights, and have the layers of the
real ones at a small width and depth.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

MODELS: dict[str, Callable[[], tuple[Any, Any]]] = {}
#: What each family is, in two words: "text encoder", "decoder", "mixture of experts", "vision", "image and text", ...
KINDS: dict[str, str] = {}
#: Classes of KerasHub that are no model of their own here, and why.
NOT_HERE = {
    "CLIPTextEncoder": "a part of `CLIPBackbone`",
    "CLIPVisionEncoder": "a part of `CLIPBackbone`",
    "FeaturePyramidBackbone": "an abstract class",
    "Gemma4AssistantCausalLM": "runs only inside the `generate` of another model, with that model's cache",
    "MetaCLIP2TextEncoder": "a part of `MetaCLIP2Backbone`",
    "MetaCLIP2VisionEncoder": "a part of `MetaCLIP2Backbone`",
    "Seq2SeqLM": "an abstract class",
    "SigLIPTextEncoder": "a part of `SigLIPBackbone`",
    "SigLIPVisionEncoder": "a part of `SigLIPBackbone`",
}


def family(name: str, kind: str) -> Callable[[Callable[[], dict[str, Callable[[], tuple[Any, Any]]]]], Any]:
    """Enter a family. The function decorated gives, by class name, functions that build `(model, input)`."""

    def enter(function: Callable[[], dict[str, Callable[[], tuple[Any, Any]]]]) -> Any:
        KINDS[name] = kind
        for class_name, build in function().items():
            MODELS[f"{name}/{class_name}"] = _seeded(build)
        return function

    return enter


def _seeded(build: Callable[[], tuple[Any, Any]]) -> Callable[[], tuple[Any, Any]]:
    def seeded() -> tuple[Any, Any]:
        keras.utils.set_random_seed(7)
        return build()

    return seeded


def numbers(*shape: int) -> np.ndarray:
    """Random float32 numbers."""
    return np.random.default_rng(3).normal(size=shape).astype("float32")


def ids(*shape: int, below: int) -> np.ndarray:
    """Random int32 ids from 1 to `below - 1`."""
    return np.random.default_rng(4).integers(1, below, size=shape).astype("int32")


def ones(*shape: int) -> np.ndarray:
    """Ones as int32: a padding mask of full length."""
    return np.ones(shape, "int32")
