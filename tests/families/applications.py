"""Every architecture of `keras.applications`, its smallest member, without weights, on small images."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras

from families import family, numbers

#: The size of the images, and what else keeps the model small. Images of 32 would leave one pixel at the end, and the
#: statistics of so few numbers let a deep network explode at the smallest change.
ARCHITECTURES: dict[str, tuple[int, dict[str, Any]]] = {
    "ConvNeXtTiny": (64, {}),
    "DenseNet121": (64, {}),
    "EfficientNetB0": (64, {}),
    "EfficientNetV2B0": (64, {}),
    "InceptionResNetV2": (75, {}),
    "InceptionV3": (75, {}),
    "MobileNet": (64, {"alpha": 0.25, "dropout": 0.0}),
    "MobileNetV2": (64, {"alpha": 0.35}),
    "MobileNetV3Small": (64, {"dropout_rate": 0.0}),
    "NASNetMobile": (64, {}),
    "ResNet50": (64, {}),
    "ResNet50V2": (64, {}),
    "VGG16": (64, {}),
    "Xception": (71, {}),
}


def _build(name: str, size: int, arguments: dict[str, Any]) -> Callable[[], tuple[Any, Any]]:
    def build() -> tuple[Any, Any]:
        cls = getattr(keras.applications, name)
        return cls(input_shape=(size, size, 3), weights=None, classes=5, classifier_activation=None, **arguments), numbers(
            8, size, size, 3
        )

    return build


for name, (size, arguments) in ARCHITECTURES.items():
    family(name, "keras.applications")(functools.partial(dict, {name: _build(name, size, arguments)}))
