"""A callback that makes an adapter as small as its energy allows, at the end of training."""

from __future__ import annotations

from typing import Any

import keras

from keras_lora import checks
from keras_lora.applying import require_adapted
from keras_lora.combining import CombinationReport, compress_adapter
from keras_lora.swap.adapters_of_model import only_name


class PruneRank(keras.callbacks.Callback):
    """At the end of `fit`, give each kernel the smallest rank that keeps a share of the energy of its change.

    It calls `keras_lora.compress_adapter`. Other ranks are other variables, so this is done once, at the end, and the model
    has to be compiled again before it trains on. To lower ranks during training, use `AdaLoRABudget`. Put callbacks that
    save the optimizer before this one.

    Args:
        energy: Number in `(0, 1]`, the share of the sum of the squared singular values of ΔW that is kept.
        name: The name of the adapter, if the model has several.

    Raises:
        ValueError: `energy` is outside its range. When training begins: the model is not adapted.

    Example:

    >>> import keras, keras_lora, numpy as np
    >>> model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(32), keras.layers.Dense(2)])
    >>> keras_lora.apply_lora(model, rank=8).compile("adam", "mse")
    >>> prune = keras_lora.callbacks.PruneRank(0.9)
    >>> history = model.fit(np.ones((8, 16)), np.ones((8, 2)), verbose=0, callbacks=[prune])
    >>> [row.rank for row in prune.report]
    [1]
    """

    @checks.helpful
    def __init__(self, energy: float = 0.99, *, name: str | None = None):
        super().__init__()
        self.energy, self.name = checks.share("energy", energy), name
        #: The rank and the error of each kernel, once training has ended.
        self.report: CombinationReport | None = None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        require_adapted(self.model, "PruneRank")
        only_name(self.model, self.name)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        self.report = compress_adapter(self.model, name=self.name, energy=self.energy)
