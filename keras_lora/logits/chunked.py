"""`chunk_logits`: train and evaluate a language model without the logits of a whole batch."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any, TypeVar

import keras
from keras import ops

from keras_lora import backend, checks
from keras_lora.compat import call_internals, keras_internals, training_internals
from keras_lora.logits.head import Head

AnyModel = TypeVar("AnyModel", bound=keras.Model)

#: The methods of a model that `ChunkedSteps` replaces, on that one object: its class and its config stay what they are.
_REPLACED = ("train_step", "test_step", "call", "compute_loss", "compute_metrics")


@checks.helpful
def chunk_logits(model: AnyModel, *, tokens: int | None = 256) -> AnyModel:
    """Make `fit` and `evaluate` compute the logits of a language model in chunks of tokens.

    The logits of a batch, `tokens × vocabulary`, are often the largest array of a training step, and their gradient is as
    large. After this call a step computes the logits of `tokens` positions at a time, with their loss, metrics and
    gradients, and keeps none of them. The losses and gradients are those of the whole batch. What you give to `compile`
    stays the same.

    Use it before or after `apply_lora`, before or after `compile`. `predict`, `generate`, calls of the model, and saved
    files are as without it; a loaded or cloned model needs another `chunk_logits`.

    Args:
        model: A Functional or Sequential model. Its last layer with weights is a `Dense`, an `EinsumDense` or a
            `ReversibleEmbedding` in reverse, as in every `CausalLM` of KerasHub that outputs logits for each of its
            tokens. Operations on each position alone may follow, such as a soft cap.
        tokens: Positive integer, positions per chunk; `None` undoes the call.

    Returns:
        `model`, changed in place.

    Raises:
        ValueError: The model does not end like that, or has a training step of its own. In `fit`: the loss does not give
            one number for each position, or is not reduced to a mean or a sum.

    The loss in `compile` is one loss, for example `SparseCategoricalCrossentropy`, with any label mask (`ignore_class`),
    sample weights and reduction to one number. Each metric is updated once per chunk, as with smaller batches. Inside
    `fit`, do not differentiate the gradients again.

    Example:

    >>> import keras, keras_lora
    >>> layers = [keras.Input((6,)), keras.layers.Embedding(50, 8), keras.layers.Dense(50)]
    >>> model = keras_lora.chunk_logits(keras.Sequential(layers), tokens=4)
    >>> loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    >>> model.compile("adam", loss)
    >>> ids = keras.ops.ones((3, 6), "int32")
    >>> history = model.fit(ids, ids, verbose=0)
    >>> model.predict(ids, verbose=0).shape
    (3, 6, 50)

    Reference:
        [Wijmans et al., 2024](https://arxiv.org/abs/2411.09009), for losses without logits of a whole batch
    """
    checks.keras_layer(model)
    size = None if tokens is None else checks.positive_integer("tokens", tokens)
    steps = None if size is None else ChunkedSteps(model, size)
    for name in _REPLACED:
        vars(model).pop(name, None)
        if steps is not None:
            vars(model)[name] = getattr(steps, name)
    training_internals.forget_steps(model)
    return model


class ChunkedSteps:
    """The methods of a model that trains and evaluates with logits in chunks.

    Inside a step the model returns its hidden states instead of logits. `compute_loss` computes the logits, the loss, its
    gradients and the metrics of one chunk after another.
    """

    def __init__(self, model: keras.Model, tokens: int):
        self.model, self.tokens = model, tokens
        self.head = Head(model)
        self.body = keras.Model((keras_internals.graph_of(model) or model).input, self.head.hidden)
        theirs: dict[str, tuple[Any, ...]] = {name: (getattr(keras.Model, name),) for name in _REPLACED}
        theirs["call"] = (type(self.body).call, keras.Sequential.call)
        own = [name for name in _REPLACED if getattr(type(model), name) not in theirs[name]]
        if own:
            raise ValueError(
                f"`chunk_logits()` replaces methods that the class of '{model.name}' defines itself. Expected those of "
                f"`keras.Model`. Received: a {type(model).__name__} with {', '.join(f'`{name}`' for name in own)}. Train "
                "this model without `chunk_logits`."
            )
        self._in_step = contextvars.ContextVar("in_step", default=False)

    @contextlib.contextmanager
    def _step(self) -> Iterator[None]:
        token = self._in_step.set(True)
        try:
            yield
        finally:
            self._in_step.reset(token)

    def train_step(self, *args: Any) -> Any:
        with self._step():
            return type(self.model).train_step(self.model, *args)

    def test_step(self, *args: Any) -> Any:
        with self._step():
            return type(self.model).test_step(self.model, *args)

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        if self._in_step.get():
            return self.body.call(inputs, training=training, mask=mask)
        return type(self.model).call(self.model, inputs, training=training, mask=mask)

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        if self._in_step.get():  # `compute_loss` has updated them
            return self.model.get_metrics_result()
        return type(self.model).compute_metrics(self.model, x, y, y_pred, sample_weight)

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        if not self._in_step.get():
            return type(self.model).compute_loss(self.model, x, y, y_pred, sample_weight, training)
        model, hidden = self.model, y_pred
        logits = keras.KerasTensor((*hidden.shape[:-1], self.head.vocabulary), hidden.dtype)
        loss, loss_weight = self._loss(y, logits)
        rows = _Rows(hidden, y, sample_weight)
        metrics = training_internals.compiled_metrics(model)
        seeds = call_internals.seed_states(self.head.layer)
        carried = [*(metrics.variables if metrics is not None else []), *seeds]
        variables = [v for v in self.head.layer.variables if all(v is not each for each in seeds)]
        trained = [v for v in variables if v.trainable]
        fixed = [(v, backend.tensor_of(v)) for v in variables if not v.trainable]

        def chunk(values: list[Any], state: list[Any], arrays: list[Any]) -> tuple[Any, list[Any]]:
            x, y, weight, mask = rows.of_chunk(arrays)
            counts, numbers, drawn = state[:2], state[2 : len(state) - len(seeds)], state[len(state) - len(seeds) :]
            mapping = [*fixed, *zip(trained, values, strict=True), *zip(seeds, drawn, strict=True)]
            with keras.StatelessScope(state_mapping=mapping) as scope:
                logits, mask = self.head.of_rows(x, mask, training=training)
                drawn = [scope.get_current_value(each) for each in seeds]
            total, *more = _summed(loss, y, logits, weight, mask)
            if metrics is not None:
                logits = ops.stop_gradient(logits)
                logits = logits if mask is None else call_internals.with_mask(logits, mask)
                numbers = metrics.stateless_update_state(numbers, y, logits, weight)
            state = [*(ops.add(count, each) for count, each in zip(counts, more, strict=True)), *numbers, *drawn]
            return total, [ops.stop_gradient(each) for each in state]

        state = [ops.zeros((), "float32")] * 2 + [backend.tensor_of(v) for v in carried]
        total, state = backend.sum_of_chunks(
            chunk, self.tokens, [backend.tensor_of(v) for v in trained], state, rows.arrays, train=training
        )
        for variable, value in zip(carried, state[2:], strict=True):
            variable.assign(value)
        if loss.reduction != "sum":
            divisor = state[1] if loss.reduction == "mean_with_sample_weight" else state[0]
            total = training_internals.share_of_replica(ops.divide_no_nan(total, divisor))
        total = total if loss_weight is None else ops.multiply(total, loss_weight)
        return training_internals.with_added_losses(model, total)

    def _loss(self, y: Any, logits: keras.KerasTensor) -> tuple[keras.losses.Loss, Any]:
        """The one loss that the model was compiled with, and its weight."""
        losses = training_internals.compiled_losses(self.model, y, logits)
        kinds = [f"{type(loss).__name__}(reduction={loss.reduction!r})" for loss, _ in losses]
        if len(losses) != 1 or losses[0][0].reduction in (None, "none") or not _is_plain(losses[0][0]):
            raise ValueError(
                f"The logits of '{self.model.name}' are computed in chunks, which needs one loss that is the mean or the "
                f"sum of one number for each position. Received: {', '.join(kinds) or 'no loss'}. Compile it with one such "
                "loss, for example `keras.losses.SparseCategoricalCrossentropy(from_logits=True)`, or call "
                "`keras_lora.chunk_logits(model, tokens=None)`."
            )
        return losses[0]


class _Rows:
    """Hidden states, labels, sample weights and mask, with the positions of all examples as the first axis.

    So for the loss and the metrics each position is an example.
    """

    def __init__(self, hidden: Any, y: Any, sample_weight: Any):
        positions = tuple(hidden.shape[:-1])
        (y,) = keras.tree.flatten(y)
        weights = [each for each in keras.tree.flatten(sample_weight) if each is not None]
        weight = _fit("sample_weight", weights[0], positions, last=False) if weights else None
        found = [hidden, _fit("y", y, positions), weight, call_internals.mask_of(hidden)]
        self._present = [each is not None for each in found]
        self.arrays = [ops.reshape(each, (-1, *each.shape[len(positions) :])) for each in found if each is not None]

    def of_chunk(self, arrays: list[Any]) -> list[Any]:
        """The four of a chunk, with `None` for those that are missing."""
        given = iter(arrays)
        return [next(given) if present else None for present in self._present]


def _fit(name: str, array: Any, positions: tuple[Any, ...], last: bool = True) -> Any:
    """`array`, if it has an entry for each position; labels may have another axis."""
    array = ops.convert_to_tensor(array)
    shape = given = tuple(array.shape)
    if len(shape) == len(positions) + 1 and shape[-1] == 1:
        array, shape = ops.squeeze(array, -1), shape[:-1]
    same = all(a == b or a is None or b is None for a, b in zip(shape, positions, strict=False))
    if not same or not len(positions) <= len(shape) <= len(positions) + last:
        raise ValueError(
            f"The logits are computed in chunks of positions. Expected `{name}` to have an entry for each position, "
            f"shape {positions}. Received: {name} of shape {given}. Repeat it for each position."
        )
    return array


def _summed(loss: keras.losses.Loss, y: Any, logits: Any, weight: Any, mask: Any) -> tuple[Any, ...]:
    """What `Loss.__call__` reduces to one number: the weighted sum of losses, and the sums of mask and weights."""
    losses = loss.call(ops.convert_to_tensor(y, dtype=loss.dtype), ops.convert_to_tensor(logits, dtype=loss.dtype))
    if len(losses.shape) != 1:
        raise ValueError(
            f"The logits are computed in chunks of positions. Expected a loss with one number for each position. Received: "
            f"{type(loss).__name__}, which gives shape {tuple(losses.shape)} for logits {tuple(logits.shape)}. Use another "
            "loss, or call `keras_lora.chunk_logits(model, tokens=None)`."
        )
    valid = ops.ones_like(losses)
    for each in (mask, call_internals.mask_of(losses)):
        valid = valid if each is None else ops.multiply(valid, ops.cast(each, losses.dtype))
    weights = valid if weight is None else ops.multiply(valid, ops.cast(weight, losses.dtype))
    return tuple(ops.cast(ops.sum(each), "float32") for each in (ops.multiply(losses, weights), valid, weights))


def _is_plain(loss: keras.losses.Loss) -> bool:
    """Whether a loss reduces the numbers of its `call` as Keras's own losses do."""
    return type(loss).__call__ is keras.losses.Loss.__call__
