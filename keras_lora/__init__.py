"""LoRA and its family for Keras 3, on TensorFlow, JAX and PyTorch."""

from keras_lora import interop, testing
from keras_lora.adapters import Adapter, DoRA, LoRA, TrainableTokens
from keras_lora.applying import apply_lora, remove_lora
from keras_lora.combining import Combination, Combined, combine, compress
from keras_lora.files.saving import load_adapter, save_adapter
from keras_lora.inspecting import Row, Summary, summary
from keras_lora.layers import (
    LoRAConv1D,
    LoRAConv1DTranspose,
    LoRAConv2D,
    LoRAConv2DTranspose,
    LoRAConv3D,
    LoRAConv3DTranspose,
    LoRADense,
    LoRADepthwiseConv1D,
    LoRADepthwiseConv2D,
    LoRAEinsumDense,
    LoRAEmbedding,
    LoRAGRUCell,
    LoRALSTMCell,
    LoRAReversibleEmbedding,
    LoRASeparableConv1D,
    LoRASeparableConv2D,
    LoRASimpleRNNCell,
)
from keras_lora.layers.registering import register_layer
from keras_lora.merging import merge_lora, unmerge_lora
from keras_lora.serving import MultiAdapterModel
from keras_lora.switching import activate, active, delete_adapter, disabled, train_adapters
from keras_lora.targets.choosing import Target, TargetList, list_targets

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "Combination",
    "Combined",
    "DoRA",
    "LoRA",
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
    "MultiAdapterModel",
    "Row",
    "Summary",
    "Target",
    "TargetList",
    "TrainableTokens",
    "activate",
    "active",
    "apply_lora",
    "combine",
    "compress",
    "delete_adapter",
    "disabled",
    "interop",
    "list_targets",
    "load_adapter",
    "merge_lora",
    "register_layer",
    "remove_lora",
    "save_adapter",
    "summary",
    "testing",
    "train_adapters",
    "unmerge_lora",
]
