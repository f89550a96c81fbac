"""LoRA and its family for Keras 3, on TensorFlow, JAX and PyTorch."""

from keras_lora.adapters import Adapter, DoRA, LoRA
from keras_lora.inject import apply_lora, remove_lora
from keras_lora.layers import (
    LoRAConv1D,
    LoRAConv2D,
    LoRAConv3D,
    LoRADense,
    LoRAEinsumDense,
    LoRAEmbedding,
)
from keras_lora.targets import Target, list_targets

__version__ = "0.1.0"
