"""Recurrent cells, which have two linear maps: the kernel for the inputs and the recurrent kernel for the state.

A cell uses its kernels inside a loop over time. The layer around it (`LSTM`, `GRU`, `SimpleRNN`, `RNN`, and the layers with
a convolution in the cell) computes the changed kernels once per call, before the loop, and runs its original code with
them. That code may be cuDNN, which reads the kernels from the cell.
"""

from __future__ import annotations

from typing import Any

import keras

from keras_lora.compat import keras_internals
from keras_lora.layers.changed_kernel import ChangedKernelLayer
from keras_lora.linear_map import LinearMap, view_of
from keras_lora.swap.adapted import CONTAINER_KINDS, AdaptedContainer


class AdaptedRecurrent(AdaptedContainer):
    """A recurrent layer around adapted cells."""

    def call(self, *args: Any, **kwargs: Any) -> Any:
        layer: Any = self
        return view_of(layer, self.base_class, cell=_with_changed_kernels(layer.cell)).call(*args, **kwargs)


CONTAINER_KINDS[keras.layers.RNN] = AdaptedRecurrent


def _with_changed_kernels(cell: Any) -> Any:
    if isinstance(cell, ChangedKernelLayer):
        return cell.with_changed_kernels()
    if isinstance(cell, keras.layers.StackedRNNCells):
        return view_of(cell, type(cell), cells=[_with_changed_kernels(each) for each in cell.cells])
    return cell


class CellMap(LinearMap):
    """Kernel `(in, gates · units)`, or `(*window, in, gates · filters)`."""

    part = "kernel"
    no_dropout = no_examples = "a recurrent cell's kernel is changed whole, before its loop"


class RecurrentKernelMap(CellMap):
    """The recurrent kernel of any cell, `(units, gates · units)`, or `(*window, filters, gates · filters)`."""

    kernel_name = part = "recurrent_kernel"


class LSTMCellMap(CellMap):
    """The kernel of `LSTMCell`."""

    layer_class = keras.layers.LSTMCell


class GRUCellMap(CellMap):
    """The kernel of `GRUCell`."""

    layer_class = keras.layers.GRUCell


class SimpleRNNCellMap(CellMap):
    """The kernel of `SimpleRNNCell`."""

    layer_class = keras.layers.SimpleRNNCell


class LoRALSTMCell(ChangedKernelLayer, keras.layers.LSTMCell):
    """An `LSTMCell` with two frozen kernels and a trainable low-rank change of each kernel.

    Args:
        units: As for `keras.layers.LSTMCell`.
        rank, alpha, adapter: As for `keras_lora.LoRADense`. The adapter's dropout is refused; the cell's `dropout` works.
        **kwargs: The other arguments of `keras.layers.LSTMCell`.

    Input shape, output shape:
        As for `keras.layers.LSTMCell`.

    Example:

    >>> import keras, keras_lora
    >>> layer = keras.layers.RNN(keras_lora.layers.LoRALSTMCell(4, rank=2))
    >>> layer(keras.ops.ones((1, 5, 3))).shape
    (1, 4)

    Reference:
        [Hu et al., 2021](https://arxiv.org/abs/2106.09685)
    """

    linear_maps = (LSTMCellMap, RecurrentKernelMap)


class LoRAGRUCell(ChangedKernelLayer, keras.layers.GRUCell):
    """A `GRUCell` with two frozen kernels and a trainable low-rank change of each kernel.

    Args:
        units: As for `keras.layers.GRUCell`.
        rank, alpha, adapter: As for `keras_lora.LoRADense`. The adapter's dropout is refused; the cell's `dropout` works.
        **kwargs: The other arguments of `keras.layers.GRUCell`.

    Input shape, output shape:
        As for `keras.layers.GRUCell`.

    Example:

    >>> import keras, keras_lora
    >>> layer = keras.layers.RNN(keras_lora.layers.LoRAGRUCell(4, rank=2))
    >>> layer(keras.ops.ones((1, 5, 3))).shape
    (1, 4)

    Reference:
        [Hu et al., 2021](https://arxiv.org/abs/2106.09685)
    """

    linear_maps = (GRUCellMap, RecurrentKernelMap)


class LoRASimpleRNNCell(ChangedKernelLayer, keras.layers.SimpleRNNCell):
    """A `SimpleRNNCell` with two frozen kernels and a trainable low-rank change of each kernel.

    Args:
        units: As for `keras.layers.SimpleRNNCell`.
        rank, alpha, adapter: As for `keras_lora.LoRADense`. The adapter's dropout is refused; the cell's `dropout` works.
        **kwargs: The other arguments of `keras.layers.SimpleRNNCell`.

    Input shape, output shape:
        As for `keras.layers.SimpleRNNCell`.

    Example:

    >>> import keras, keras_lora
    >>> layer = keras.layers.RNN(keras_lora.layers.LoRASimpleRNNCell(4, rank=2))
    >>> layer(keras.ops.ones((1, 5, 3))).shape
    (1, 4)

    Reference:
        [Hu et al., 2021](https://arxiv.org/abs/2106.09685)
    """

    linear_maps = (SimpleRNNCellMap, RecurrentKernelMap)


_ConvLSTMCell: Any = keras_internals.conv_lstm_cell()


class ConvLSTMCellMap(CellMap):
    """The kernel of the cell of `ConvLSTM1D`, `ConvLSTM2D` and `ConvLSTM3D`."""

    layer_class = _ConvLSTMCell


class LoRAConvLSTMCell(ChangedKernelLayer, _ConvLSTMCell):
    """What the cell of an adapted `ConvLSTM1D`, `ConvLSTM2D` or `ConvLSTM3D` becomes; Keras does not export the cell."""

    linear_maps = (ConvLSTMCellMap, RecurrentKernelMap)
