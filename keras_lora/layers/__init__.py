"""Which room serves which Keras layer: the one table of layer types."""

from __future__ import annotations

from keras_lora.adapted import AdaptedLayer, register_layer
from keras_lora.layers.conv import LoRAConv1D, LoRAConv2D, LoRAConv3D
from keras_lora.layers.dense import LoRADense
from keras_lora.layers.einsum_dense import LoRAEinsumDense
from keras_lora.layers.embedding import LoRAEmbedding

TABLE: tuple[type[AdaptedLayer], ...] = (
    LoRADense,
    LoRAEinsumDense,
    LoRAEmbedding,
    LoRAConv1D,
    LoRAConv2D,
    LoRAConv3D,
)
for adapted_class in TABLE:
    register_layer(adapted_class)
