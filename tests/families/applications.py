"""Every architecture of `keras.applications`, its smallest member, without weights, on small images."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras

from families import family, numbers

#: The smallest images, and what else keeps the model small.
ARCHITECTURES: dict[str, tuple[int, dict[str, Any]]] = {
    "ConvNeXtTiny": (32, {}),
    "DenseNet121": (32, {}),
    "EfficientNetB0": (32, {}),
    "EfficientNetV2B0": (32, {}),
    "InceptionResNetV2": (75, {}),
    "InceptionV3": (75, {}),
    "MobileNet": (32, {"alpha": 0.25, "dropout": 0.0}),
    "MobileNetV2": (32, {"alpha": 0.35}),
    "MobileNetV3Small": (32, {"dropout_rate": 0.0}),
    "NASNetMobile": (32, {}),
    "ResNet50": (32, {}),
    "ResNet50V2": (32, {}),
    "VGG16": (32, {}),
    "Xception": (71, {}),
}


def _build(name: str, size: int, arguments: dict[str, Any]) -> Callable[[], tuple[Any, Any]]:
    def build() -> tuple[Any, Any]:
        cls = getattr(keras.applications, name)
        return cls(input_shape=(size, size, 3), weights=None, classes=5, classifier_activation=None, **arguments), numbers(
            2, size, size, 3
        )

    return build


for name, (size, arguments) in ARCHITECTURES.items():
    family(name, "keras.applications")(functools.partial(dict, {name: _build(name, size, arguments)}))
