"""Trainable tokens: train chosen rows of an embedding and freeze the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import ops

from keras_lora.adapters.adapter import Adapter

if TYPE_CHECKING:
    from keras_lora.linear_map import LinearMap


@keras.saving.register_keras_serializable("keras_lora")
class TrainableTokens(Adapter):
    """Train chosen rows of an embedding: `W'[token] = W[token] + token_delta`. All other rows stay unchanged.

    Use it for new or rare tokens: it has `len(tokens) · dim` parameters for any size of vocabulary. In a tied embedding,
    the same rows also change in the output projection.

    Args:
        tokens: Ids of the rows, a list of distinct non-negative integers.
        **kwargs: `name`, `dtype` and `trainable` of a Keras layer.

    Raises:
        ValueError: `tokens` is empty, or contains a negative number or a duplicate.

    Example:

    >>> import keras, keras_lora
    >>> ids = keras.Input((5,), dtype="int32")
    >>> y = keras.layers.Dense(2)(keras.layers.Embedding(100, 16, name="tokens")(ids))
    >>> new_tokens = {"tokens": keras_lora.TrainableTokens([98, 99])}
    >>> model = keras_lora.apply_lora(keras.Model(ids, y), head=None, rank=1, adapter_pattern=new_tokens)
    >>> [(v.name, tuple(v.shape)) for v in model.trainable_variables][0]
    ('token_delta', (2, 16))

    Reference:
        [PEFT, Trainable tokens](https://huggingface.co/docs/peft/package_reference/trainable_tokens)
    """

    def __init__(self, tokens: Iterable[int], **kwargs: Any):
        super().__init__(**kwargs)
        given = list(tokens)
        self.tokens = [int(token) for token in given]
        if not given or self.tokens != given or min(self.tokens) < 0 or len(set(self.tokens)) < len(self.tokens):
            raise ValueError(
                f"`tokens` must be a list of distinct non-negative integers, not empty. Received: tokens={given!r}."
            )

    def problem_with(self, linear: LinearMap) -> str | None:
        if not linear.picks_rows:
            return "`TrainableTokens` trains rows of an embedding, and this layer is not one; name embeddings in `targets`"
        if max(self.tokens) >= linear.matrix_shape[0]:
            return f"`tokens` names row {max(self.tokens)} of an embedding with {linear.matrix_shape[0]} rows"
        return None

    def build_for(self, linear: LinearMap) -> None:
        self.token_delta = self.add_factor("token_delta", (len(self.tokens), linear.matrix_shape[-1]), "zeros", axes="to")

    def parameter_count(self, matrix_shape: tuple[int, ...]) -> int:
        return len(self.tokens) * matrix_shape[-1]

    def delta_kernel(self, matrix: Any) -> Any:
        return ops.matmul(self._selection(self.matrix_shape), self.token_delta)

    def factors_of(
        self, weights: Mapping[str, np.ndarray], matrix_shape: tuple[int, ...] | None
    ) -> tuple[np.ndarray, np.ndarray] | None:
        if matrix_shape is None:
            return None
        selection = np.asarray(ops.convert_to_numpy(self._selection(matrix_shape)), "float64")
        return selection, np.asarray(weights["token_delta"], "float64")

    def adapted_output(self, x: Any, y: Any, linear: LinearMap, training: bool | None = None) -> Any:
        delta = ops.cast(ops.multiply(self.strength, self.token_delta), y.dtype)
        if linear.picks_rows:
            hits = ops.equal(ops.expand_dims(x, -1), ops.convert_to_tensor(self.tokens, dtype=x.dtype))
            return ops.add(y, ops.matmul(ops.cast(hits, y.dtype), delta))
        return ops.add(y, linear.apply_product(x, ops.cast(self._selection(self.matrix_shape), y.dtype), delta))

    def _selection(self, matrix_shape: tuple[int, ...]) -> Any:
        """`(rows, tokens)`, with a one if the row is the token, else zero."""
        return ops.transpose(ops.one_hot(self.tokens, matrix_shape[0], dtype="float32"))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "tokens": self.tokens}
