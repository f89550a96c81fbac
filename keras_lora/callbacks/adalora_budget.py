"""A callback that gives ranks to the kernels that need them: the schedule of AdaLoRA."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from keras_lora import adapters, checks
from keras_lora.callbacks.steps import StepCallback

#: The weights of a term, with the axis of its number counted from the end.
_AXES = {"lora_a": -1, "lora_e": -1, "lora_b": -2}


class AdaLoRABudget(StepCallback):
    """Reduce the average rank of `keras_lora.AdaLoRA` adapters during `fit`, and keep the terms that matter most.

    Until step `begin` all terms train. Then the budget, the number of terms in use in all kernels together, falls from the
    full rank to `rank` per kernel along a cubic, and stays there from step `end` on. At each look the terms with the
    largest importance stay, and the masks of the others become zero. So kernels end with different ranks. The budget is
    met exactly, shapes do not change, and nothing is traced again.

    The importance of a number `w` is the change of the loss if it were zero, `|w · gradient|` in the paper. Callbacks see no
    gradients on JAX and TensorFlow, so it is `|w · Δw|` here, with Δw the change since the last look. It is smoothed over
    the looks and multiplied by its uncertainty, and the importance of a term is that of its singular value plus the means
    of its column of `P` and its row of `Q`, both as in the paper.

    The masks are saved with the adapter. A resumed run goes on from them, with a smoothing that starts anew.

    Args:
        rank: The average rank per kernel in the end. Each group of a kernel with groups counts as one.
        begin, end: Steps (batches) between which the budget falls. The first tenth and the last third of the training
            are best outside.
        every: Steps between two looks.
        smoothing: Number in `[0, 1)`, the share of the old importance in the new one.
        name: The name of the adapter, if the model has several.

    Raises:
        ValueError: An argument is outside its range. When training begins: the model has no AdaLoRA, or `rank` is larger
            than its rank.

    Example:

    >>> import keras, keras_lora, numpy as np
    >>> model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(32), keras.layers.Dense(32), keras.layers.Dense(2)])
    >>> keras_lora.apply_lora(model, "adalora", rank=6).compile("adam", "mse")
    >>> budget = keras_lora.callbacks.AdaLoRABudget(rank=4, begin=2, end=6)
    >>> history = model.fit(np.ones((64, 16)), np.ones((64, 2)), batch_size=8, verbose=0, callbacks=[budget])
    >>> sum(budget.ranks().values())
    8

    Reference:
        [Zhang et al., 2023](https://arxiv.org/abs/2303.10512)
    """

    @checks.helpful
    def __init__(self, rank: int, begin: int, end: int, *, every: int = 1, smoothing: float = 0.85, name: str | None = None):
        super().__init__(name)
        self.rank = checks.positive_integer("rank", rank)
        self.begin = checks.positive_integer("begin", begin, least=0)
        self.end = checks.positive_integer("end", end)
        self.every = checks.positive_integer("every", every)
        self.smoothing = checks.dropout_rate("smoothing", smoothing)
        if begin >= end:
            raise ValueError(f"`end` must be larger than `begin`. Received: begin={begin}, end={end}.")
        self._seen: dict[str, np.ndarray] = {}
        self._scores: dict[str, _Score] = {}

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        super().on_train_begin(logs)
        found = self._found()
        self._seen = {f"{at}:{key}": _array(getattr(each, key)) for at, each in found.items() for key in _AXES}
        self._scores = {}
        if (least := min(adapter.rank for adapter in found.values())) < self.rank:
            raise ValueError(f"`rank` must be at most the rank of the adapters, {least}. Received: rank={self.rank}.")

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        if self.steps < self.end:
            checks.warn(
                f"`AdaLoRABudget` reached step {self.steps} of {self.end}, so the average rank is not {self.rank} yet. "
                "Train on, or choose a smaller `end`."
            )

    def ranks(self) -> dict[str, int]:
        """Return the number of terms in use, by the address of the kernel."""
        return {at: int(_array(adapter.rank_mask).sum()) for at, adapter in self._found().items()}

    def budget(self, step: int) -> int:
        """Return the number of terms in use in all kernels together after `step` steps."""
        masks = [adapter.rank_mask.shape for adapter in self._found().values()]
        full, last = sum(int(np.prod(each)) for each in masks), sum(int(np.prod(each[:-1])) for each in masks) * self.rank
        left = 1 - min(max((step - self.begin) / (self.end - self.begin), 0.0), 1.0)
        return last + round((full - last) * left**3)

    def at_step(self, before: int) -> None:
        passed_end = before < self.end <= self.steps
        if before // self.every == self.steps // self.every and not passed_end:
            return
        if before >= self.end:
            return
        found = self._found()
        importance = {at: self._importance(at, adapter) for at, adapter in found.items()}
        if self.steps <= self.begin:
            return
        everything = np.concatenate([each.ravel() for each in importance.values()])
        mask, kept = np.zeros(everything.size, "float32"), self.budget(self.steps)
        mask[np.argsort(-everything, kind="stable")[:kept]] = 1.0
        start = 0
        for at, adapter in found.items():
            size = importance[at].size
            adapter.rank_mask.assign(mask[start : start + size].reshape(importance[at].shape))
            start += size

    def _found(self) -> dict[str, Any]:
        return {at: adapter for at, (_, adapter) in self.adapters_of(adapters.AdaLoRA, "AdaLoRA").items()}

    def _importance(self, address: str, adapter: Any) -> np.ndarray:
        """The importance of each term of one kernel, `(*groups, rank)`; a masked term has none."""
        total = np.zeros(tuple(adapter.rank_mask.shape), "float64")
        for key, axis in _AXES.items():
            place, now = f"{address}:{key}", _array(getattr(adapter, key))
            score = self._scores.setdefault(place, _Score())
            smooth = score.after(np.abs(now * (now - self._seen[place])), self.smoothing)
            self._seen[place] = now
            total += smooth if key == "lora_e" else smooth.mean(-2 if axis == -1 else -1)
        mask = _array(adapter.rank_mask)
        return np.where(mask > 0, total, -1.0)


class _Score:
    """A smoothed sensitivity and its uncertainty: Zhang et al., eq. 9 to 11."""

    def __init__(self) -> None:
        self.mean: Any = 0.0
        self.spread: Any = 0.0

    def after(self, sensitivity: np.ndarray, smoothing: float) -> np.ndarray:
        self.mean = smoothing * self.mean + (1 - smoothing) * sensitivity
        self.spread = smoothing * self.spread + (1 - smoothing) * np.abs(sensitivity - self.mean)
        return np.asarray(self.mean * self.spread)


def _array(variable: Any) -> np.ndarray:
    return np.array(keras.ops.convert_to_numpy(variable.value), "float64")
