"""`Embedding` and `ReversibleEmbedding`: a lookup is a linear map of one-hot rows, computed by selecting rows.

A reversible embedding is used twice: the input selects rows, and for the output a hidden state is multiplied by the
transposed table (tied) or by a separate kernel (untied). If tied, one change ΔW applies in both directions.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_lora.compat import call_internals, nf4, quantization
from keras_lora.linear_map import LinearMap, view_of
from keras_lora.swap.adapted import AdaptedLayer
from keras_lora.swap.slots import change_in_call


class EmbeddingMap(LinearMap):
    """Table `(vocabulary, dim)`. The input is integer ids, so the sum over the vocabulary is a gather."""

    layer_class = keras.layers.Embedding
    kernel_name = "embeddings"
    held_out: dict[str, Any] = {}
    picks_rows = packs = packs_rows = True
    by_default = False
    no_dropout = "the input of an embedding is token ids"

    def contract(self, x: Any, m: Any) -> Any:
        if keras.backend.standardize_dtype(x.dtype) not in ("int32", "int64"):
            x = ops.cast(x, "int32")  # as Embedding does
        return ops.take(m, x, axis=0)

    def own_output(self, x: Any) -> Any:
        if self.base_dtype != "nf4":
            return super().own_output(x)
        table: Any = self.matrix_shape
        return nf4.rows(self.packed, table, x, self.product_dtype)

    def products(self, x: Any, a: Any, b: Any, index: Any) -> Any:
        # Each id selects its row from the stacked tables; no table is copied per example.
        x = ops.cast(ops.reshape(x, (ops.shape(index)[0], -1)), "int32")
        rows = ops.expand_dims(ops.cast(index, "int32"), -1) * a.shape[1] + x
        h = ops.take(ops.reshape(a, (-1, a.shape[-1])), rows, axis=0)
        dtype = self.layer.compute_dtype
        return ops.matmul(ops.cast(h, dtype), ops.cast(ops.take(b, index, axis=0), dtype))

    def finish(self, y: Any) -> Any:
        return y


class ReversibleEmbeddingMap(EmbeddingMap):
    """The table of a `ReversibleEmbedding`, from ids to rows."""

    layer_class = keras.layers.ReversibleEmbedding

    def own_output(self, x: Any) -> Any:
        y = super().own_output(x)
        marks = self.base_dtype == "nf4" and self.layer.mask_zero  # else its code does it
        return call_internals.with_mask(y, ops.not_equal(x, 0)) if marks else y


class ReverseMap(LinearMap):
    """From hidden states to one number for each row of the table: `x @ matrixᵀ`, with the matrix as stored."""

    kernel_name = "embeddings"
    packs = packs_rows = True
    scales_outputs = False
    no_dropout: str | None = "a tied embedding has one change for both its directions"

    def own_output(self, x: Any) -> Any:
        if self.base_dtype == "nf4":
            # In the dtype of the layer's own product: an embedding does not cast the hidden states.
            dtype = self.layer.reverse_dtype or keras.backend.result_type(x.dtype, self.float_dtype)
            return self.apply(ops.cast(x, dtype), self.as_matrix(self.unpacked(dtype)))
        # With a `reverse_dtype`, the layer casts the kernel to that dtype.
        if self.base_dtype is not None and self.layer.reverse_dtype is None:
            return self.in_base_dtype(x, lambda x: self.apply(x, self.matrix))
        view = view_of(self.plain, type(self.plain), logit_soft_cap=None)
        return (view.call if quantization.mode_of(self.layer) is None else view.quantized_call)(x, reverse=True)

    def transposed(self, dy: Any) -> Any:
        table = self.table
        dtype = table.dtype if self.layer.reverse_dtype is None and self.base_dtype != "nf4" else dy.dtype
        return ops.matmul(ops.cast(dy, dtype), ops.cast(table, dtype))

    @property
    def table(self) -> Any:
        """A row for each word."""
        return self.matrix

    def apply(self, x: Any, matrix: Any) -> Any:
        return ops.matmul(ops.cast(x, matrix.dtype), ops.transpose(matrix))

    def apply_product(self, x: Any, a: Any, b: Any) -> Any:
        return self.apply(self.apply(x, b), a)

    def finish(self, y: Any) -> Any:
        cap = self.layer.logit_soft_cap
        return y if cap is None else ops.multiply(ops.tanh(ops.divide(y, cap)), cap)


class UntiedReverseMap(ReverseMap):
    """The kernel `(dim, vocabulary)` of an untied `ReversibleEmbedding`, a linear map like any other."""

    kernel_name = part = "reverse_embeddings"
    scales_outputs = True
    no_dropout = None
    by_default = packs_rows = False

    @classmethod
    def is_in(cls, layer: Any) -> bool:
        return not layer.tie_weights

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        return self.layer.output_dim, self.layer.input_dim  # int4 packs two rows into one

    @property
    def table(self) -> Any:
        return ops.transpose(self.matrix)

    def apply(self, x: Any, matrix: Any) -> Any:
        return ops.matmul(ops.cast(x, matrix.dtype), matrix)

    def apply_product(self, x: Any, a: Any, b: Any) -> Any:
        return self.apply(self.apply(x, a), b)


class LoRAEmbedding(AdaptedLayer, keras.layers.Embedding):
    """An `Embedding` layer with a frozen table and a trainable low-rank change of it.

    `ΔW = scale · A B` with `A (vocabulary, rank)` zero and `B (rank, dim)` normal at the start, so only the rows that
    training sees change. The cost of a step grows with the tokens in the batch, not with the vocabulary.

    Args:
        input_dim: Positive integer, size of the vocabulary.
        output_dim: Positive integer, size of a row.
        rank, alpha, adapter: As for `keras_lora.LoRADense`. Dropout is not defined for token ids and is refused.
        **kwargs: The other arguments of `keras.layers.Embedding`.

    Input shape:
        Integer ids, `(batch, ...)`.

    Output shape:
        `(batch, ..., output_dim)`.

    Example:

    >>> import keras, keras_lora
    >>> layer = keras_lora.layers.LoRAEmbedding(1000, 16, rank=2)
    >>> layer(keras.ops.ones((2, 5), "int32")).shape
    (2, 5, 16)

    Reference:
        [Hu et al., 2021](https://arxiv.org/abs/2106.09685)
    """

    linear_maps = (EmbeddingMap,)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        if hasattr(inputs, "with_flat_values"):  # ragged ids, from TensorFlow: all ids are in one flat row
            return inputs.with_flat_values(super().call(inputs.flat_values, training=training))
        return super().call(inputs, training=training)


class LoRAReversibleEmbedding(AdaptedLayer, keras.layers.ReversibleEmbedding):
    """A `ReversibleEmbedding` with a frozen table and a trainable low-rank change of it, the same in both directions.

    Args:
        input_dim: Positive integer, size of the vocabulary.
        output_dim: Positive integer, size of a row.
        rank, alpha, adapter: As for `keras_lora.LoRADense`. Dropout is not defined for token ids and is refused.
        **kwargs: The other arguments of `keras.layers.ReversibleEmbedding`. With `tie_weights=False` the output
            kernel, `reverse_embeddings`, is a separate target.

    Input shape:
        Integer ids, `(batch, ...)`; with `reverse=True` hidden states, `(batch, ..., output_dim)`.

    Output shape:
        `(batch, ..., output_dim)`; with `reverse=True` `(batch, ..., input_dim)`.

    Example:

    >>> import keras, keras_lora
    >>> layer = keras_lora.layers.LoRAReversibleEmbedding(1000, 16, rank=2)
    >>> layer(layer(keras.ops.ones((2, 5), "int32")), reverse=True).shape
    (2, 5, 1000)

    Reference:
        [Hu et al., 2021](https://arxiv.org/abs/2106.09685)
    """

    linear_maps = (ReversibleEmbeddingMap, UntiedReverseMap)

    def call(self, inputs: Any, reverse: bool = False, training: bool | None = None) -> Any:  # type: ignore[override]
        if not reverse and hasattr(inputs, "with_flat_values"):  # ragged, as above
            return inputs.with_flat_values(self.call(inputs.flat_values, training=training))
        back = ReverseMap if self.tie_weights else UntiedReverseMap
        linear = back(self) if reverse else self.linear_map
        base, change = linear.base_output(inputs), change_in_call(linear)
        if change is None:
            return linear.finish(base)
        y = linear.finish(change.adapted_output(inputs, base, linear, training=training))
        return y if reverse else call_internals.copy_mask(base, y)
