"""A callback that starts the factors of a LoRA anew and keeps what they learned: ReLoRA."""

from __future__ import annotations

import zlib
from typing import Any

import keras
import numpy as np

from keras_lora import adapters, checks, factors
from keras_lora.callbacks.steps import StepCallback
from keras_lora.swap import slots


class ReLoRA(StepCallback):
    """Every few steps, fold the trained pair of a LoRA into its kept pair and start the factors anew, during `fit`.

    So several low-rank changes add up to one of a higher rank, with the memory of a low rank for the optimizer. The base
    does not move: the sum is in the frozen pair of `keras_lora.LoRA(rank=4, kept=16)`, and the file of the adapter has it.
    `kept` is the rank that the sum can have. If it grows beyond that, the best approximation is kept, and `restarts` and
    the log `relora_error` have its error. Shapes do not change, so nothing is traced again.

    The optimizer's state of the factors becomes zero, as in the paper. The learning rate is yours: give the optimizer a
    schedule that warms up again after each restart, because Adam's first steps from a zero state are large.

    Args:
        every: Steps (batches) between two restarts.
        until: The step after which no restart is made, so that the last factors have time to learn.
        name: The name of the adapter, if the model has several.

    Raises:
        ValueError: An argument is outside its range. When training begins: the adapter has no LoRA with a kept pair.

    Example:

    >>> import keras, keras_lora, numpy as np
    >>> model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(32), keras.layers.Dense(2)])
    >>> keras_lora.apply_lora(model, keras_lora.LoRA(rank=2, kept=4)).compile("adam", "mse")
    >>> restarts = keras_lora.callbacks.ReLoRA(every=4)
    >>> history = model.fit(np.ones((64, 16)), np.ones((64, 2)), batch_size=8, verbose=0, callbacks=[restarts])
    >>> [step for step, error in restarts.restarts]
    [4, 8]

    Reference:
        [Lialin et al., 2023](https://arxiv.org/abs/2307.05695)
    """

    @checks.helpful
    def __init__(self, every: int, *, until: int | None = None, name: str | None = None):
        super().__init__(name)
        self.every = checks.positive_integer("every", every)
        self.until = None if until is None else checks.positive_integer("until", until)
        #: Each restart: its step, and the largest relative error of a kept sum.
        self.restarts: list[tuple[int, float]] = []

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        super().on_train_begin(logs)
        self._found()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if logs is not None and self.restarts:
            logs["relora_error"] = self.restarts[-1][1]

    def at_step(self, before: int) -> None:
        over = self.until is not None and self.steps > self.until
        if before // self.every == self.steps // self.every or over:
            return
        found = self._found()
        errors = [self._restart(address, linear, adapter) for address, (linear, adapter) in found.items()]
        self._reset_optimizer([v for _, adapter in found.values() for v in (adapter.lora_a, adapter.lora_b)])
        self.restarts.append((self.steps, max(errors)))

    def _found(self) -> dict[str, tuple[Any, Any]]:
        found = self.adapters_of(adapters.LoRA, "LoRA")
        if without := [address for address, (_, adapter) in found.items() if not adapter.kept]:
            raise ValueError(
                f"`ReLoRA` needs a kept pair, which {', '.join(without[:4])} lack. Expected an adapter such as "
                "`keras_lora.LoRA(rank=4, kept=16)`. Received: kept=0."
            )
        return found

    def _restart(self, address: str, linear: Any, adapter: Any) -> float:
        """Start the factors of one kernel anew without changing its output. Returns the error of the kept pair."""
        seed = zlib.crc32(f"{adapter.seed}:{address}:{self.steps}".encode()) & 0x7FFFFFFF
        fresh = adapters.copy_of(adapter, seed=seed)
        slots.start(linear, fresh)
        a, b = (np.asarray(keras.ops.convert_to_numpy(v.value), "float64") for v in (fresh.lora_a, fresh.lora_b))
        change = adapter.numpy_factors()
        start = (a, adapter.scale * b)  # its product is zero, unless `b_initializer` says otherwise
        whole = factors.concatenate([(1.0, change), (-1.0, start)]) if a.any() and b.any() else change
        (kept_a, kept_b), error = factors.truncate(whole, adapter.kept)
        more = adapter.kept - kept_a.shape[-1]
        kept_a = np.pad(kept_a, [(0, 0)] * (kept_a.ndim - 1) + [(0, more)])
        kept_b = np.pad(kept_b, [(0, 0)] * (kept_b.ndim - 2) + [(0, more), (0, 0)])
        for variable, value in zip(
            (adapter.kept_a, adapter.kept_b, adapter.lora_a, adapter.lora_b), (kept_a, kept_b, a, b), strict=True
        ):
            variable.assign(value.astype("float32"))
        return error

    def _reset_optimizer(self, restarted: list[Any]) -> None:
        """Set what the optimizer knows of the factors to zero, and their moving averages to the new values.

        Keras names an optimizer's variable after the path of the variable that it is for.
        """
        by_name = {f"{v.path.replace('/', '_')}_": v for v in restarted}
        for state in self.model.optimizer.variables:
            for name, v in by_name.items():
                if state.name.startswith(name):
                    is_average = state.name == f"{name}average"
                    state.assign(v.value if is_average else keras.ops.zeros(state.shape, state.dtype))
