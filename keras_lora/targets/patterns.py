"""Patterns, which name layers and kernels in arguments, and one error that lists everything wrong with them."""

from __future__ import annotations

import difflib
import fnmatch
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import keras

from keras_lora import checks
from keras_lora.swap import adapted
from keras_lora.swap.addresses import Place, walk

#: A layer or group by name or path ("query", "encoder/layer_0"), a glob for these ("layer_?/query*"), a compiled regular
#: expression that must match the whole path, a layer class, a function from a layer to a bool, or a layer itself.
Pattern: TypeAlias = str | re.Pattern[str] | type | Callable[[Any], bool] | keras.layers.Layer
Patterns: TypeAlias = Pattern | Iterable[Pattern]
#: Identifies a place: the layer, and the part if the place is one kernel of several.
Key: TypeAlias = tuple[int, str]


class Found(NamedTuple):
    """Places that patterns matched, and their values."""

    sites: dict[Key, Any]
    values: dict[Key, Any]


class Search:
    """Finds places by pattern, and collects all problems with the patterns so that one error lists them."""

    def __init__(self, model: keras.layers.Layer, places: list[Place], unused: set[Key]):
        self.model, self.places, self.unused = model, places, unused
        self.problems: list[str] = []

    def find(self, argument: str, patterns: Any, among: Iterable[Any]) -> dict[Key, Any]:
        found: dict[Key, Any] = {}
        among = list(among)
        for pattern in as_list(patterns):
            inside = self._inside(pattern)
            matched = {place.key: place for place in among if id(place.layer) in inside or matches(pattern, place)}
            if not matched:
                self._unmatched(argument, pattern, among)
            found |= matched
        return found

    def find_values(self, argument: str, by_pattern: Mapping[Any, Any] | None, among: Iterable[Any]) -> Found:
        """For each place, the value of the first pattern that matches it."""
        found, among = Found({}, {}), list(among)
        for pattern, value in (by_pattern or {}).items():
            for key, place in self.find(argument, pattern, among).items():
                found.sites.setdefault(key, place)
                found.values.setdefault(key, value)
        return found

    def _inside(self, pattern: Any) -> set[int]:
        """The layers inside those of a class, such as the cell of an LSTM."""
        of_class = isinstance(pattern, type) and issubclass(pattern, keras.layers.Layer)
        holders = [place.layer for place in self.places if of_class and isinstance(place.layer, pattern)]
        return {id(each.layer) for holder in holders for each in walk(holder)}

    def _unmatched(self, argument: str, pattern: Any, among: list[Place]) -> None:
        elsewhere = [place for place in self.places if matches(pattern, place)]
        if elsewhere:
            unused = all(place.key in self.unused for place in elsewhere)
            which = "that the model does not use" if unused else "that cannot be chosen here"
            kinds = ", ".join(sorted({type(place.layer).__name__ for place in elsewhere}))
            self.problems.append(f"{argument}={shown(pattern)} matches only layers {which}: {kinds}")
            return
        names = sorted({name for place in among for name in (*place.path.split("/"), place.path)})
        near = nearest(str(pattern), names)
        self.problems.append(f"{argument}={shown(pattern)} matches no layer; the nearest names are {near}")

    def found_nothing(self, sites: Sequence[Place], why_not: Mapping[str, int]) -> None:
        if sites:
            names = ", ".join([*(site.path for site in sites[:8]), *(["…"] if len(sites) > 8 else [])])
            reasons = ", ".join(f"{count} {why}" for why, count in why_not.items())
            problem = f"the kernels that could be ({names}) are: {reasons}"
            if "not a target" in why_not:
                problem += ". Embeddings and depthwise kernels are adapted only when `targets` names them"
        else:
            kinds = ", ".join(sorted(base.__name__ for base in adapted.ADAPTED_CLASSES))
            problem = f"the model has no layer that could be. Adaptable are {kinds}"
        self.problems.append(f"nothing is left to adapt: {problem}")

    def raise_problems(self) -> None:
        if self.problems:
            listed = "".join(f"\n  - {problem}" for problem in self.problems)
            raise ValueError(
                f"`apply_lora()` cannot adapt '{self.model.name}', and has changed nothing:{listed}\n"
                "Call `keras_lora.list_targets(model)` to see every layer and what would happen to it."
            )


def matches(pattern: Any, place: Place) -> bool:
    """Whether `pattern` matches this layer, or by name a layer that contains it."""
    if isinstance(pattern, str):
        return any(names_path(pattern.strip("/"), path) for path in _paths(place))
    if isinstance(pattern, re.Pattern):
        return pattern.fullmatch(place.path) is not None
    if isinstance(pattern, type):
        return isinstance(place.layer, pattern)
    if isinstance(pattern, keras.layers.Layer):
        return any(place.layer is inside.layer for inside in walk(pattern))
    if callable(pattern):
        return bool(pattern(place.layer))
    raise TypeError(
        "A pattern must be a name, a path, a glob, a compiled regular expression, a layer class, a function or a layer. "
        f"Received: {checks.described(pattern)}."
    )


def _paths(place: Any) -> list[str]:
    """The path of a place. For one kernel of several, also without its layer: "gru/kernel" for "gru/gru_cell/kernel"."""
    part = getattr(getattr(place, "linear", None), "part", "")
    return [place.path, "/".join([*place.path.split("/")[:-2], part])] if part else [place.path]


def names_path(pattern: str, path: str) -> bool:
    """Whether a name, a path or a glob matches consecutive whole names in `path`."""
    if not any(character in pattern for character in "*?["):
        return f"/{pattern}/" in f"/{path}/"
    names = path.split("/")
    runs = itertools.combinations(range(len(names) + 1), 2)
    return any(fnmatch.fnmatchcase("/".join(names[start:end]), pattern) for start, end in runs)


#: The Keras and KerasHub names of the modules that PEFT users know by these names.
SYNONYMS = {
    "q_proj": ("query", "query_dense"),
    "k_proj": ("key", "key_dense"),
    "v_proj": ("value", "value_dense"),
    "o_proj": ("attention_output", "output_dense"),
    "out_proj": ("attention_output", "output_dense"),
    "c_attn": ("query", "key", "value"),
    "c_proj": ("attention_output", "feedforward_output_dense"),
    "gate_proj": ("feedforward_gate_dense", "ffw_gating"),
    "up_proj": ("feedforward_intermediate_dense", "ffw_gating_2"),
    "down_proj": ("feedforward_output_dense", "ffw_linear"),
    "fc1": ("feedforward_intermediate_dense",),
    "fc2": ("feedforward_output_dense",),
    "embed_tokens": ("token_embedding",),
    "lm_head": ("token_embedding", "reverse_embeddings"),
}


def nearest(name: str, names: Sequence[str]) -> list[str]:
    """Names to suggest for `name`: those that mean the same, or else the most similar ones, or else the first ones."""
    if same := [each for each in SYNONYMS.get(name.rpartition("/")[2], ()) if each in names]:
        return same
    return difflib.get_close_matches(name, names, n=4, cutoff=0.4) or list(names[:4])


def as_list(patterns: Any) -> list[Any]:
    """One pattern or several, as a list."""
    if patterns is None:
        return []
    if isinstance(patterns, (str, re.Pattern, type, keras.layers.Layer)) or not isinstance(patterns, Iterable):
        return [patterns]
    return list(patterns)


def shown(pattern: Any) -> str:
    """A pattern as an error shows it."""
    return repr(pattern.pattern) if isinstance(pattern, re.Pattern) else repr(pattern)
