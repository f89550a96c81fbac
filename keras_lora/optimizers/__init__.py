"""How fast each part trains: wrappers of Keras optimizers."""

from keras_lora.optimizers.scaled_updates import ScaledUpdates

__all__ = ["ScaledUpdates"]
