"""`Embedding`: a lookup is a linear map of one-hot rows, computed by picking rows."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_lora.adapted import AdaptedLayer
from keras_lora.linear_map import LinearMap


class EmbeddingMap(LinearMap):
    """Table `(vocabulary, dim)`. The input is integer ids, so the sum over the vocabulary is a gather."""

    layer_class = keras.layers.Embedding
    kernel_name = "embeddings"
    held_out: dict[str, Any] = {}
    picks_rows = True

    def contract(self, x: Any, m: Any) -> Any:
        if keras.backend.standardize_dtype(x.dtype) not in ("int32", "int64"):
            x = ops.cast(x, "int32")  # as Embedding itself does
        return ops.take(m, x, axis=0)

    def finish(self, y: Any) -> Any:
        return y


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
    >>> layer = keras_lora.LoRAEmbedding(1000, 16, rank=2)
    >>> layer(keras.ops.ones((2, 5), "int32")).shape
    (2, 5, 16)

    Reference:
        [Hu et al., 2021](https://arxiv.org/abs/2106.09685)
    """

    linear_map_class = EmbeddingMap
