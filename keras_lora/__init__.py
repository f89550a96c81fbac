"""LoRA and its family for Keras 3, on TensorFlow, JAX and PyTorch."""

import sys

if "keras_lora_command" not in sys.modules:  # see there: it imports only what a command needs
    from keras_lora import interop, layers, plots, testing
    from keras_lora.adapters import IA3, OFT, Adapter, DoRA, LoHa, LoKr, LoRA, LowRank, MiSS, TrainableTokens, VeRA
    from keras_lora.adapters.registering import register_adapter
    from keras_lora.applying import apply_lora, remove_lora
    from keras_lora.combining import CombinationReport, CombinedKernel, combine_adapters, compress_adapter
    from keras_lora.files.saving import load_adapter, save_adapter
    from keras_lora.inspecting import AdapterList, AdapterRow, list_adapters
    from keras_lora.layers import LoRADense
    from keras_lora.layers.registering import register_layer
    from keras_lora.loading import reduced_base
    from keras_lora.merging import merge_lora, unmerge_lora
    from keras_lora.serving import MultiAdapterModel
    from keras_lora.switching import activate_adapters, active_adapters, delete_adapter, disable_adapters, train_adapters
    from keras_lora.targets.choosing import list_targets
    from keras_lora.targets.target_list import Target, TargetList

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "AdapterList",
    "AdapterRow",
    "CombinationReport",
    "CombinedKernel",
    "DoRA",
    "IA3",
    "LoHa",
    "LoKr",
    "LoRA",
    "LoRADense",
    "LowRank",
    "MiSS",
    "MultiAdapterModel",
    "OFT",
    "Target",
    "TargetList",
    "TrainableTokens",
    "VeRA",
    "activate_adapters",
    "active_adapters",
    "apply_lora",
    "combine_adapters",
    "compress_adapter",
    "delete_adapter",
    "disable_adapters",
    "interop",
    "layers",
    "list_adapters",
    "list_targets",
    "load_adapter",
    "merge_lora",
    "plots",
    "reduced_base",
    "register_adapter",
    "register_layer",
    "remove_lora",
    "save_adapter",
    "testing",
    "train_adapters",
    "unmerge_lora",
]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
