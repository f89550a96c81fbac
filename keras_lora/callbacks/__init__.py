"""Callbacks for `fit`. `keras_lora.plots.LogAdapters` is one too."""

from keras_lora.callbacks.adalora_budget import AdaLoRABudget
from keras_lora.callbacks.prune_rank import PruneRank
from keras_lora.callbacks.restarts import ReLoRA
from keras_lora.callbacks.save_adapter import SaveAdapter

__all__ = ["AdaLoRABudget", "PruneRank", "ReLoRA", "SaveAdapter"]
