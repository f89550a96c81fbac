"""A callback that logs the size and the effective rank of each adapter."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import keras
import numpy as np

from keras_lora.plots.measuring import chosen_names, measure_adapters


class LogAdapters(keras.callbacks.Callback):
    """Log the effective rank and the relative change of each adapter at the end of each epoch.

    The `logs` get `effective_rank` and `relative_change`, each the mean over the kernels of the adapter. If the callback
    follows several adapters, their names come first: `french_effective_rank`. `History` gets them always. `CSVLogger`,
    `TensorBoard` and others that come after this callback in `callbacks=[...]` get them too.
    `keras_lora.plots.AdapterMeasure` defines both numbers.

    Args:
        names: The name of an adapter, or several. All of them by default.

    Raises:
        ValueError: When training begins: the model is not adapted, or a name is unknown.

    Example:

    >>> import keras, keras_lora, numpy as np
    >>> model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(32), keras.layers.Dense(2)])
    >>> keras_lora.apply_lora(model, rank=4).compile("adam", "mse")
    >>> x, y = np.ones((8, 16)), np.ones((8, 2))
    >>> history = model.fit(x, y, verbose=0, callbacks=[keras_lora.plots.LogAdapters()]).history
    >>> sorted(history)
    ['effective_rank', 'loss', 'relative_change']
    """

    def __init__(self, names: str | Iterable[str] | None = None):
        super().__init__()
        self.names = names if names is None or isinstance(names, str) else list(names)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        measure_adapters(self.model, names=self.names)  # an error comes before the first epoch

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if logs is None:
            return
        rows = measure_adapters(self.model, names=self.names)
        names = chosen_names(self.model, self.names)
        for name in names:
            own = [row for row in rows if row.name == name]
            start = f"{name}_" if len(names) > 1 else ""
            logs[f"{start}effective_rank"] = float(np.mean([row.effective_rank for row in own]))
            logs[f"{start}relative_change"] = float(np.mean([row.relative_change for row in own]))
