"""What callbacks that act at certain steps share: counting steps, and reading a model inside `fit`."""

from __future__ import annotations

from typing import Any

import keras

from keras_lora import adapters
from keras_lora.applying import require_adapted
from keras_lora.linear_map import LinearMap
from keras_lora.swap.adapted import named_adapters
from keras_lora.swap.adapters_of_model import only_name


class StepCallback(keras.callbacks.Callback):
    """A callback with a count of the batches trained, those of a resumed run included.

    Args:
        name: The name of the adapter, if the model has several.
    """

    def __init__(self, name: str | None = None):
        super().__init__()
        self.name = name
        self.steps = 0
        self._last_batch = -1

    def adapters_of(self, method: type[adapters.Adapter], word: str) -> dict[str, tuple[LinearMap, Any]]:
        """The adapters of a method by address. Brings the variables up to date on JAX."""
        require_adapted(self.model, type(self).__name__)
        name = only_name(self.model, self.name)
        found = {at: pair for at, pair in named_adapters(self.model)[name].items() if isinstance(pair[1], method)}
        if not found:
            raise ValueError(
                f"`{type(self).__name__}` found no {word} in '{self.model.name}'. Expected adapters made by it."
            )
        return found

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        optimizer = self.model.optimizer
        inner = optimizer
        while hasattr(inner, "inner_optimizer") or hasattr(inner, "inner"):
            inner = getattr(inner, "inner_optimizer", None) or inner.inner
        updates = int(keras.ops.convert_to_numpy(optimizer.iterations)) if optimizer.built else 0
        self.steps = updates * (getattr(inner, "gradient_accumulation_steps", None) or 1)

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._last_batch = -1

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        before = self.steps
        self.steps += batch - self._last_batch  # more than one with `steps_per_execution`
        self._last_batch = batch
        self.at_step(before)

    def at_step(self, before: int) -> None:
        """Act after a batch. The count was `before` and is `self.steps` now."""
