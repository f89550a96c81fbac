"""Find normalization layers, for `train="norms"`."""

from __future__ import annotations

import keras

from keras_lora.compat import keras_internals


def is_norm(layer: keras.layers.Layer) -> bool:
    """Whether a layer is a normalization with a scale or an offset that it can train.

    These are layers with "norm" in the name of their class, as all of Keras and KerasHub have, and with no layer inside: a
    `SpectralNormalization` or a block of convolution and norm is not one, but the norm inside such a block is.
    """
    named = any("norm" in cls.__name__.lower() for cls in type(layer).__mro__ if cls is not keras.layers.Layer)
    return named and bool(keras_internals.own_trainable_variables(layer)) and not keras_internals.sublayers(layer)
