"""Blocks: the repeated parts of a model, such as the layers of a transformer, chosen by index, range or depth."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable
from typing import Any

import keras

from keras_lora import checks
from keras_lora.swap.adapted import maps_of
from keras_lora.swap.addresses import Place, walk


def series_of(places: list[Place]) -> list[list[Place]]:
    """The series of blocks of a model: layers of one class in one parent, with the same name except for a number.

    A block contains layers that can be adapted. Only the outermost blocks count. An encoder and a decoder are two series.
    """
    groups: dict[Any, list[Place]] = {}
    for place in places:
        if place.holder is not None and any(maps_of(inside.layer) for inside in walk(place.layer)[1:]):
            stem = re.sub(r"_?\d+", "", place.layer.name)
            groups.setdefault((id(place.holder), type(place.layer), stem), []).append(place)
    found = [group for group in groups.values() if len(group) > 1]
    inside = {id(each.layer) for group in found for block in group for each in walk(block.layer)[1:]}
    return [group for group in found if id(group[0].layer) not in inside]


def choose(
    model: keras.layers.Layer, places: list[Place], sites: Iterable[Place], blocks: Any
) -> tuple[dict[tuple[int, str], Place], list[str]]:
    """The blocks that `blocks` selects, by key, and a list of problems. Each series is indexed separately.

    Args:
        model: The model.
        places: The places of its layers.
        sites: The places of its adaptable kernels: the depth of a model without series of blocks.
        blocks: As for `keras_lora.apply_lora`.
    """
    chosen_by = _checked(blocks)
    series = series_of(places)
    if not series:
        adaptable = {id(site.layer) for site in sites}
        series = [[place for place in places if id(place.layer) in adaptable]]
        ends = (chosen_by.start, chosen_by.stop) if isinstance(chosen_by, slice) else (0,)
        if any(checks.is_integer(end) for end in ends):
            problem = "has no repeated blocks, so select a fraction of its depth, as slice(0.5, None)"
            return {}, [f"blocks={blocks!r}: '{model.name}' {problem}; or use patterns in `targets` instead"]
    chosen = {group[index].key: group[index] for group in series for index in _indices(chosen_by, len(group))}
    asked = set(chosen_by) if isinstance(chosen_by, list) else set()
    missing = sorted(index for index in asked if not any(-len(group) <= index < len(group) for group in series))
    if missing or not chosen:
        lengths = ", ".join(f"{len(group)} named like '{group[0].path}'" for group in series if group)
        at = f" at {missing}" if missing else ""
        return {}, [f"blocks={blocks!r} names no block{at}; the model has {lengths or 'none'}"]
    return chosen, []


def _checked(blocks: Any) -> Any:
    """`blocks` as a list of indices or a slice of Python numbers, or an error."""
    if isinstance(blocks, Iterable) and not isinstance(blocks, str):
        blocks = list(blocks)
    if isinstance(blocks, slice):
        ends, step = (blocks.start, blocks.stop), blocks.step
        if all(end is None or checks.is_number(end) for end in ends) and (step is None or checks.is_integer(step)):
            start, stop = (end if end is None or checks.is_integer(end) else float(end) for end in ends)
            return slice(start, stop, step)
    elif all(map(checks.is_integer, indices := blocks if isinstance(blocks, list) else [blocks])):
        return [operator.index(index) for index in indices]
    raise TypeError(
        "`blocks` must be an index, several, or a slice of indices or of fractions of the depth, as slice(-4, None) "
        f"or slice(0.5, None). Received: blocks={blocks!r}."
    )


def _indices(blocks: slice | list[int], count: int) -> list[int]:
    """The indices that `blocks` selects in a series of `count` blocks."""
    if isinstance(blocks, slice):
        ends = [round(end * count) if isinstance(end, float) else end for end in (blocks.start, blocks.stop)]
        return list(range(count)[ends[0] : ends[1] : blocks.step])
    return [index for index in blocks if -count <= index < count]
