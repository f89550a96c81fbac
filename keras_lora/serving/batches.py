"""Examples of separate requests as one batch, and the outputs of a batch as separate results."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import keras
import numpy as np


def as_example(inputs: Any) -> Any:
    """A copy of the inputs of one example: arrays without a batch axis, and strings."""
    return keras.tree.map_structure(lambda leaf: leaf if isinstance(leaf, str) else np.array(leaf), inputs)


def signature(example: Any) -> Hashable:
    """What examples of one batch have in common: the structure, and the shape and dtype of each array."""
    paths = keras.tree.flatten_with_path(example)
    return tuple((path, "str") if isinstance(leaf, str) else (path, leaf.shape, leaf.dtype.str) for path, leaf in paths)


def stacked(examples: Sequence[Any], size: int) -> Any:
    """A batch of `size`, the last example repeated; a list if the examples are strings."""
    examples = [*examples, *[examples[-1]] * (size - len(examples))]
    if isinstance(examples[0], str):
        return examples
    return keras.tree.map_structure(lambda *leaves: np.stack(leaves), *examples)


def row(outputs: Any, number: int) -> Any:
    """The result of one example, copied so that it does not keep the whole batch in memory."""
    if isinstance(outputs, list) and all(isinstance(each, str) for each in outputs):
        return outputs[number]
    return keras.tree.map_structure(lambda each: np.array(each[number]), outputs)
