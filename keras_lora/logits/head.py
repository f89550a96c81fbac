"""The end of a model that computes logits: one layer over the vocabulary, and what follows it at each position."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_lora.compat import call_internals, keras_internals

_EXPECTED = (
    "Expected a Functional or Sequential model (every `CausalLM` of KerasHub is one) with one output, whose last layer "
    "with weights is a `Dense`, an `EinsumDense` or a `ReversibleEmbedding` called with `reverse=True`, followed only by "
    "operations on each position alone, such as an activation or a soft cap"
)


class Head:
    """From hidden states `(..., width)` to logits `(..., vocabulary)`.

    Attributes:
        layer: The layer with the vocabulary.
        hidden: The symbolic input of `layer`.
        vocabulary: The size of the last axis of the output.
    """

    def __init__(self, model: keras.Model):
        outputs = getattr(keras_internals.graph_of(model) or model, "outputs", None)
        if not outputs or len(outputs) != 1:
            raise _error(
                model, f"a {type(model).__name__} " + (f"with {len(outputs)} outputs" if outputs else "without a graph")
            )
        self._tensors: list[keras.KerasTensor] = []
        tensor, layer = outputs[0], None
        while layer is None:
            operation, inputs = keras_internals.producer_of(tensor)
            if len({id(each) for each in inputs}) != 1:
                raise _error(model, f"'{operation.name}', with {len(inputs)} inputs, before any layer with weights")
            self._tensors.insert(0, tensor)
            tensor = inputs[0]
            if isinstance(operation, keras.layers.Layer) and operation.weights:
                layer = operation
        self.layer, self.hidden, self.vocabulary = layer, tensor, outputs[0].shape[-1]
        kinds = (keras.layers.Dense, keras.layers.EinsumDense, keras.layers.ReversibleEmbedding)
        if not isinstance(layer, kinds) or len(self.hidden.shape) != len(outputs[0].shape):
            raise _error(model, f"a {type(layer).__name__} called '{layer.name}', from {tensor.shape} to {outputs[0].shape}")
        if layer.activity_regularizer is not None:
            raise _error(model, f"'{layer.name}' with an `activity_regularizer`, which needs all of its outputs at once")
        self._check_positions(model)

    def logits(self, hidden: Any, training: bool | None = None) -> Any:
        for tensor in self._tensors:
            hidden = call_internals.applied_again(tensor, hidden, training)
        return hidden

    def of_rows(self, rows: Any, mask: Any = None, training: bool | None = None) -> tuple[Any, Any]:
        """The logits `(n, vocabulary)` of hidden states `(n, width)`, and their Keras mask."""
        extra = tuple(range(len(self.hidden.shape) - 2))  # an einsum needs all axes
        x = ops.expand_dims(rows, extra) if extra else rows
        if mask is not None:
            x = call_internals.with_mask(x, ops.expand_dims(mask, extra) if extra else mask)
        logits = self.logits(x, training=training)
        mask = call_internals.mask_of(logits)
        return ops.reshape(logits, (-1, self.vocabulary)), None if mask is None else ops.reshape(mask, (-1,))

    def _check_positions(self, model: keras.Model) -> None:
        """Compare the logits of three positions with those of each alone."""
        width = self.hidden.shape[-1]
        x = np.random.default_rng(0).normal(size=(*(1,) * (len(self.hidden.shape) - 2), 3, width))
        x = ops.convert_to_tensor(x.astype("float32"), dtype=self.hidden.dtype)
        try:
            together = self.logits(x, training=False)
            alone = ops.concatenate([self.logits(x[..., i : i + 1, :], training=False) for i in range(3)], axis=-2)
            mixed = {tuple(together.shape), tuple(alone.shape)} != {(*x.shape[:-1], self.vocabulary)}
            mixed = mixed or bool(ops.max(ops.abs(together - alone)) > 0.1 * ops.max(ops.abs(together)))
        except (ValueError, TypeError, RuntimeError) as error:
            raise _error(model, f"operations after '{self.layer.name}' that fail on three positions ({error})") from error
        if mixed:
            raise _error(model, f"operations after '{self.layer.name}' that mix or select positions")


def _error(model: keras.Model, received: str) -> ValueError:
    return ValueError(
        f"`chunk_logits()` cannot split the logits of '{model.name}'. {_EXPECTED}. Received: {received}. Train this model "
        "without `chunk_logits`."
    )
