"""LoRA and its family for Keras 3, on TensorFlow, JAX and PyTorch."""

import sys

if "keras_lora_command" not in sys.modules:  # see there: it imports only what a command needs
    from keras_lora import callbacks, interop, layers, memory, optimizers, plots, testing
    from keras_lora.adapters import (
        IA3,
        OFT,
        AdaLoRA,
        Adapter,
        DoRA,
        LoHa,
        LoKr,
        LoRA,
        LowRank,
        MiSS,
        TrainableTokens,
        VeRA,
    )
    from keras_lora.adapters.registering import register_adapter
    from keras_lora.applying import apply_lora, remove_lora
    from keras_lora.combining import CombinationReport, CombinedKernel, combine_adapters, compress_adapter
    from keras_lora.files.saving import load_adapter, save_adapter
    from keras_lora.inspecting import AdapterList, AdapterRow, list_adapters
    from keras_lora.layers import LoRADense
    from keras_lora.layers.registering import register_layer
    from keras_lora.loading import reduced_base
    from keras_lora.logits.chunked import chunk_logits
    from keras_lora.memory.planning import MemoryPlan, plan
    from keras_lora.memory.rematerializing import rematerialize
    from keras_lora.merging import merge_lora, unmerge_lora
    from keras_lora.serving import AdapterPool, AdapterServer, MultiAdapterModel
    from keras_lora.starts.methods import EVA, LoRAGA
    from keras_lora.starts.starting import start_from
    from keras_lora.switching import activate_adapters, active_adapters, delete_adapter, disable_adapters, train_adapters
    from keras_lora.targets.choosing import list_targets
    from keras_lora.targets.target_list import Target, TargetList

__version__ = "0.1.0"

__all__ = [
    "AdaLoRA",
    "Adapter",
    "AdapterList",
    "AdapterPool",
    "AdapterRow",
    "AdapterServer",
    "CombinationReport",
    "CombinedKernel",
    "DoRA",
    "EVA",
    "IA3",
    "LoHa",
    "LoKr",
    "LoRA",
    "LoRADense",
    "LoRAGA",
    "LowRank",
    "MemoryPlan",
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
    "callbacks",
    "chunk_logits",
    "combine_adapters",
    "compress_adapter",
    "delete_adapter",
    "disable_adapters",
    "interop",
    "layers",
    "list_adapters",
    "list_targets",
    "load_adapter",
    "memory",
    "merge_lora",
    "optimizers",
    "plan",
    "plots",
    "reduced_base",
    "register_adapter",
    "register_layer",
    "rematerialize",
    "remove_lora",
    "save_adapter",
    "start_from",
    "testing",
    "train_adapters",
    "unmerge_lora",
]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
