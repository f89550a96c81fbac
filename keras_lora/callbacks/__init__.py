"""Callbacks for `fit`. `keras_lora.plots.LogAdapters` is one too."""

from keras_lora.callbacks.save_adapter import SaveAdapter

__all__ = ["SaveAdapter"]
