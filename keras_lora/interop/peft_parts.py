"""The adapter of one kernel here, and that of one module in PEFT, as arrays."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from keras_lora.interop.checkpoints import Source
from keras_lora.linear_map import LinearMap


@dataclass
class Part:
    """The adapter of one kernel.

    Attributes:
        address, linear, source: The kernel, and where it is in the checkpoint.
        adapter: The method, without weights.
        values: Its weights by name.
    """

    address: str
    linear: LinearMap
    source: Source
    adapter: Any
    values: dict[str, np.ndarray]

    @property
    def a(self) -> np.ndarray:
        """`(rank, in)`, with the inputs in the order of the weight; of a bank, `(experts, rank, in)`."""
        *groups, _, rank = self.values["lora_a"].shape
        found = np.empty((*groups, rank, self.source.in_dim), "float32")
        found[..., self.source.ins] = self.values["lora_a"].swapaxes(-1, -2)
        return found

    @property
    def b(self) -> np.ndarray:
        """`(out, rank)`, with the outputs in the order of the weight; zeros for outputs of other kernels."""
        *groups, rank, _ = self.values["lora_b"].shape
        found = np.zeros((*groups, self.source.out_dim, rank), "float32")
        found[..., self.source.outs, :] = self.values["lora_b"].swapaxes(-1, -2)
        return found

    def spread(self, rows: np.ndarray) -> np.ndarray:
        """Spread values for each output of the kernel over the outputs of the weight."""
        found = np.zeros((self.source.out_dim, *rows.shape[1:]), "float32")
        found[self.source.outs] = rows
        return found


@dataclass
class Written:
    """The adapter of one module.

    Attributes:
        module, kind, weight: The name of the module, or of a parameter of experts, and the kind and shape of its weight.
        rank, alpha, rank_stabilized: The values that define its scale.
        dropout: The dropout used in training.
        by_parameter: Whether PEFT finds the module only by its parameter `weight`.
    """

    module: str
    kind: str
    weight: tuple[int, ...]
    rank: int
    alpha: float
    rank_stabilized: bool
    dropout: float
    a: np.ndarray
    b: np.ndarray
    magnitude: np.ndarray | None = None
    by_parameter: bool = False

    @property
    def scale(self) -> float:
        """The factor that multiplies `b a`."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    @property
    def parameter(self) -> str | None:
        """The name of the parameter that PEFT adapts, or `None` if it adapts the module."""
        return self.module if self.kind == "bank" else f"{self.module}.weight" if self.by_parameter else None

    @property
    def pattern(self) -> str:
        """The name to which PEFT compares its patterns of ranks and alphas."""
        return self.parameter or self.module
