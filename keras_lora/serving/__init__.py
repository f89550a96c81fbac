"""Serve many adapters of one base: a model with places for adapters, a pool of files, and a queue of requests."""

from keras_lora.serving.adapter_pool import AdapterPool
from keras_lora.serving.adapter_server import AdapterServer
from keras_lora.serving.multi_adapter_model import MultiAdapterModel

__all__ = ["AdapterPool", "AdapterServer", "MultiAdapterModel"]
