"""The adaptable layers: how each layer type is a linear map. One file per layer type, and a table of all types.

`keras_lora.layers` has the class that `apply_lora` gives to a layer of each type. You can also build these layers yourself.
"""

from __future__ import annotations

import keras

from keras_lora.layers.conv import (
    LoRAConv1D,
    LoRAConv1DTranspose,
    LoRAConv2D,
    LoRAConv2DTranspose,
    LoRAConv3D,
    LoRAConv3DTranspose,
)
from keras_lora.layers.dense import LoRADense
from keras_lora.layers.einsum_dense import LoRAEinsumDense
from keras_lora.layers.embedding import LoRAEmbedding, LoRAReversibleEmbedding
from keras_lora.layers.recurrent import LoRAConvLSTMCell, LoRAGRUCell, LoRALSTMCell, LoRASimpleRNNCell
from keras_lora.layers.separable_conv import (
    LoRADepthwiseConv1D,
    LoRADepthwiseConv2D,
    LoRASeparableConv1D,
    LoRASeparableConv2D,
)
from keras_lora.layers.spectral_normalization import AdaptedSpectralNormalization
from keras_lora.swap.adapted import CONTAINER_KINDS, LATE_LAYERS, AdaptedLayer, enter_layer

TABLE: tuple[type[AdaptedLayer], ...] = (
    LoRADense,
    LoRAEinsumDense,
    LoRAEmbedding,
    LoRAReversibleEmbedding,
    LoRAConv1D,
    LoRAConv2D,
    LoRAConv3D,
    LoRAConv1DTranspose,
    LoRAConv2DTranspose,
    LoRAConv3DTranspose,
    LoRADepthwiseConv1D,
    LoRADepthwiseConv2D,
    LoRASeparableConv1D,
    LoRASeparableConv2D,
    LoRASimpleRNNCell,
    LoRALSTMCell,
    LoRAGRUCell,
    LoRAConvLSTMCell,
)
for adapted_class in TABLE:
    enter_layer(adapted_class)
CONTAINER_KINDS[keras.layers.SpectralNormalization] = AdaptedSpectralNormalization
LATE_LAYERS["keras_hub"] = "keras_lora.layers.keras_hub"

__all__ = [
    "LoRAConv1D",
    "LoRAConv1DTranspose",
    "LoRAConv2D",
    "LoRAConv2DTranspose",
    "LoRAConv3D",
    "LoRAConv3DTranspose",
    "LoRADense",
    "LoRADepthwiseConv1D",
    "LoRADepthwiseConv2D",
    "LoRAEinsumDense",
    "LoRAEmbedding",
    "LoRAGRUCell",
    "LoRALSTMCell",
    "LoRAReversibleEmbedding",
    "LoRASeparableConv1D",
    "LoRASeparableConv2D",
    "LoRASimpleRNNCell",
]


def __dir__() -> list[str]:
    return __all__
