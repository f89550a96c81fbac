"""Which layers get an adapter, which train in full and which stay frozen: a list one can print before anything changes."""

from __future__ import annotations

import difflib
import fnmatch
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import keras
from rich.console import Console
from rich.table import Table

from keras_lora import adapters, keras_internals, quantization, training
from keras_lora.adapted import ADAPTED_CLASSES, AdaptedLayer
from keras_lora.linear_map import LinearMap
from keras_lora.structure import Place, walk

#: A layer or group by name or path ("query", "encoder/layer_0"), a glob over paths ("*/query"), a compiled regular
#: expression that must match the whole path, a layer class, a function from a layer to a bool, or a layer itself.
Pattern: TypeAlias = str | re.Pattern[str] | type | Callable[[Any], bool] | keras.layers.Layer
Patterns: TypeAlias = Pattern | Iterable[Pattern]


@dataclass(frozen=True)
class Target:
    """What happens to one layer that has variables.

    Attributes:
        path: The names that lead to the layer.
        layer_type: The name of its class.
        action: `"adapt"`, `"train"` (in full) or `"freeze"`.
        why: Why, in words.
        shape: Shape of its kernel as a matrix, `(in_dim, out_dim)`, or `None` where it is not a linear map we know.
        rank: Rank of the adapter, or `None`.
        parameters: How many numbers the layer has.
        trainable: How many numbers would train because of this row.
    """

    path: str
    layer_type: str
    action: str
    why: str
    shape: tuple[int, ...] | None
    rank: int | None
    parameters: int
    trainable: int
    layer: keras.layers.Layer = field(repr=False)
    adapter: adapters.Adapter | None = field(repr=False, default=None)


class TargetList(list[Target]):
    """A list of `Target`; printing it prints a table."""

    def of(self, action: str) -> list[Target]:
        """The rows with this action."""
        return [target for target in self if target.action == action]

    def __str__(self) -> str:
        table = Table()
        for column in ("layer", "type", "action", "why", "matrix", "rank", "parameters", "trainable"):
            table.add_column(
                column, overflow="fold", justify="right" if column in ("rank", "parameters", "trainable") else "left"
            )
        for row in self:
            shape = "" if row.shape is None else " × ".join(map(str, row.shape))
            rank = "" if row.rank is None else str(row.rank)
            table.add_row(
                row.path, row.layer_type, row.action, row.why, shape, rank, f"{row.parameters:,}", f"{row.trainable:,}"
            )
        console = Console(width=160)
        with console.capture() as capture:
            console.print(table)
        return f"{capture.get()}{self.total}"

    __repr__ = __str__

    @property
    def total(self) -> str:
        """One line: how much would train."""
        trainable, everything = sum(row.trainable for row in self), sum(row.parameters for row in self)
        everything += sum(row.adapter.parameter_count(row.shape) for row in self if row.adapter and row.shape)
        return f"trainable: {trainable:,} of {everything:,} ({100 * trainable / max(everything, 1):.3g} %)"


def list_targets(
    model: keras.layers.Layer,
    adapter: str | dict[str, Any] | adapters.Adapter = "lora",
    *,
    rank: int | None = None,
    alpha: float | None = None,
    targets: Patterns | None = None,
    exclude: Patterns | None = None,
    head: Patterns | str | None = "auto",
    train: Patterns | None = None,
    bias: str = "none",
    rank_pattern: Mapping[Pattern, int] | None = None,
    alpha_pattern: Mapping[Pattern, float] | None = None,
) -> TargetList:
    """Show what `apply_lora` with the same arguments would do. Nothing is changed.

    Args:
        model, adapter, rank, alpha, targets, exclude, head, train, bias, rank_pattern, alpha_pattern: As for
            `keras_lora.apply_lora`.

    Returns:
        A list of `Target`, one for each layer that has variables of its own; printing it prints a table.

    Raises:
        ValueError: As `keras_lora.apply_lora` would.

    Example:

    >>> import keras, keras_lora
    >>> layers = [keras.Input((16,)), keras.layers.Dense(32, name="hidden"), keras.layers.Dense(2, name="out")]
    >>> model = keras.Sequential(layers)
    >>> [(target.path, target.action, target.trainable) for target in keras_lora.list_targets(model, rank=4)]
    [('hidden', 'adapt', 192), ('out', 'freeze', 0)]
    """
    method = adapters.get(adapter, rank=rank, alpha=alpha)
    places = [place for place in walk(model) if not isinstance(place.layer, adapters.Adapter)]
    _refuse_unfit_model(model, places, bias)
    search = _Search(model, places)

    linear = [place for place in places if type(place.layer) in ADAPTED_CLASSES]
    excluded = search.find("exclude", exclude, places)
    trained = _with_insides(search.find("train", train, places), places)
    if targets is not None:
        chosen, heads = search.find("targets", targets, linear), {}
    else:
        chosen = {id(place.layer): place for place in linear if place.layer is model or not _map_of(place).picks_rows}
        heads = {id(place.layer): place for place in find_head(model, places)} if head == "auto" else {}
        if head not in ("auto", None):
            heads = search.find("head", head, places)
        heads = _with_insides(heads, places)
        _warn_of_subclasses(places)
    excluded = _with_insides(excluded, places)
    chosen = {key: place for key, place in chosen.items() if key not in heads | excluded | trained}
    ranks = search.values("rank_pattern", rank_pattern, chosen.values())
    alphas = search.values("alpha_pattern", alpha_pattern, chosen.values())
    if not chosen:
        search.found_nothing(targets, linear)
    for place in chosen.values():
        search.problems += _problems_of(place)
    search.raise_problems()

    rows = TargetList()
    for place in places:
        key, layer = id(place.layer), place.layer
        own = keras_internals.own_variables(layer)
        if not own:
            continue
        with_bias = bias == "all" or (bias == "lora_only" and key in chosen)
        biases = sum(_size(v) for v in own if with_bias and v.name == "bias")
        row: dict[str, Any] = {
            "path": place.path,
            "layer_type": type(layer).__name__,
            "parameters": sum(map(_size, own)),
            "layer": layer,
            "shape": _map_of(place).matrix_shape if _is_readable(layer) else None,
        }
        if key in chosen:
            changed: dict[str, Any] = {}
            if key in ranks:
                changed["rank"] = ranks[key]
            if key in alphas:
                changed["alpha"] = alphas[key]
            own_method = adapters.copy_of(method, **changed)
            count = own_method.parameter_count(row["shape"])
            row |= {"rank": getattr(own_method, "rank", None), "adapter": own_method, "trainable": count + biases}
            rows.append(Target(action="adapt", why="target", **row))
        elif key in trained:
            count = sum(map(_size, keras_internals.own_trainable_variables(layer)))
            rows.append(Target(action="train", why="named in `train`", rank=None, trainable=count, **row))
        else:
            why = "excluded" if key in excluded else "output head" if key in heads else "not a target"
            why = why if type(layer) in ADAPTED_CLASSES or key in excluded else f"no adapter for {type(layer).__name__}"
            rows.append(Target(action="freeze", why=why, rank=None, trainable=biases, **row))
    return rows


def find_head(model: keras.layers.Layer, places: list[Place]) -> list[Place]:
    """The output head: what `apply_lora` leaves out when no targets are given.

    - A model with a `backbone` (a KerasHub task): every linear layer outside the backbone.
    - A model with a graph (Functional, Sequential): from each output back through layers without variables that have one
      input, up to the first `Dense` or `EinsumDense`, which is a head. A normalization, a merge or a block on the way: none.
    - Another model: the last layer with variables among its own, if that is a `Dense` or `EinsumDense`.
    - A single layer has no head.
    """
    backbone = getattr(model, "backbone", None)
    if isinstance(backbone, keras.layers.Layer):
        inside = {id(place.layer) for place in walk(backbone)}
        return [place for place in places if id(place.layer) not in inside and type(place.layer) in ADAPTED_CLASSES]
    if not isinstance(model, keras.Model):
        return []
    if getattr(model, "outputs", None):
        heads = {id(layer) for tensor in model.outputs for layer in _heads_behind(tensor)}
    else:
        own = [layer for layer in keras_internals.sublayers(model) if layer.weights]
        heads = {id(own[-1])} if own and _is_dense(own[-1]) else set()
    return [place for place in places if id(place.layer) in heads]


def _heads_behind(tensor: Any) -> list[keras.layers.Layer]:
    operation, inputs = keras_internals.producer_of(tensor)
    if _is_dense(operation):
        return [operation]
    if getattr(operation, "outputs", None) and isinstance(operation, keras.Model):
        return [layer for output in operation.outputs for layer in _heads_behind(output)]
    if len(inputs) != 1 or getattr(operation, "weights", None):
        return []
    return _heads_behind(inputs[0])


def _is_dense(layer: Any) -> bool:
    return isinstance(layer, (keras.layers.Dense, keras.layers.EinsumDense))


class _Search:
    """Finds places by pattern, and collects what is wrong with the patterns so that one error says it all."""

    def __init__(self, model: keras.layers.Layer, places: list[Place]):
        self.model, self.places = model, places
        self.problems: list[str] = []

    def find(self, argument: str, patterns: Any, among: Iterable[Place]) -> dict[int, Place]:
        found: dict[int, Place] = {}
        among = list(among)
        for pattern in _as_list(patterns):
            matched = {id(place.layer): place for place in among if matches(pattern, place)}
            if not matched:
                self._unmatched(argument, pattern, among)
            found |= matched
        return found

    def values(self, argument: str, by_pattern: Mapping[Any, Any] | None, among: Iterable[Place]) -> dict[int, Any]:
        """The value of each place: that of the first pattern that matches it."""
        values: dict[int, Any] = {}
        for pattern, value in (by_pattern or {}).items():
            for key in self.find(argument, pattern, among):
                values.setdefault(key, value)
        return values

    def _unmatched(self, argument: str, pattern: Any, among: list[Place]) -> None:
        elsewhere = sorted({type(place.layer).__name__ for place in self.places if matches(pattern, place)})
        if elsewhere:
            self.problems.append(
                f"{argument}={_shown(pattern)} matches only layers that cannot be chosen here: {', '.join(elsewhere)}"
            )
            return
        names = sorted({name for place in among for name in (*place.path.split("/"), place.path)})
        near = difflib.get_close_matches(str(pattern), names, n=4, cutoff=0.4) or names[:4]
        self.problems.append(f"{argument}={_shown(pattern)} matches no layer; the nearest names are {near}")

    def found_nothing(self, targets: Any, linear: list[Place]) -> None:
        kinds = ", ".join(sorted(base.__name__ for base in ADAPTED_CLASSES))
        names = ", ".join(place.path for place in linear[:8])
        self.problems.append(
            f"nothing is left to adapt (targets={_shown(targets)}); adaptable are {kinds}, and the model has "
            f"{len(linear)} of them{': ' + names if names else ''} (an Embedding is adapted only when `targets` names it)"
        )

    def raise_problems(self) -> None:
        if self.problems:
            listed = "".join(f"\n  - {problem}" for problem in self.problems)
            raise ValueError(
                f"`apply_lora()` cannot adapt '{self.model.name}', and has changed nothing:{listed}\n"
                "Call `keras_lora.list_targets(model)` to see every layer and what would happen to it."
            )


def matches(pattern: Any, place: Place) -> bool:
    """Whether `pattern` names this layer, or a layer that holds it."""
    if isinstance(pattern, str):
        if any(character in pattern for character in "*?["):
            return fnmatch.fnmatchcase(place.path, pattern)
        return f"/{pattern.strip('/')}/" in f"/{place.path}/"
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
        f"Received: {pattern!r} of type {type(pattern).__name__}."
    )


def _as_list(patterns: Any) -> list[Any]:
    if patterns is None:
        return []
    if isinstance(patterns, (str, re.Pattern, type, keras.layers.Layer)) or not isinstance(patterns, Iterable):
        return [patterns]
    return list(patterns)


def _with_insides(found: dict[int, Place], places: list[Place]) -> dict[int, Place]:
    """`found`, and every layer held by one of them."""
    held: dict[int, Place] = {}
    for place in places:
        if id(place.layer) in found or (place.holder is not None and id(place.holder) in held):
            held[id(place.layer)] = place
    return held


def _map_of(place: Place) -> LinearMap:
    return ADAPTED_CLASSES[type(place.layer)].linear_map_class(place.layer)


def _is_readable(layer: keras.layers.Layer) -> bool:
    """Whether we know `layer` as a linear map, quantised in a way we can read or not at all."""
    return type(layer) in ADAPTED_CLASSES and quantization.mode_of(layer) in quantization.SUPPORTED_MODES


def _problems_of(place: Place) -> list[str]:
    """What stands against adapting this layer."""
    linear = _map_of(place)
    if getattr(place.layer, "lora_enabled", False):
        return [f"'{place.path}' has Keras's own `enable_lora` on; adapt a model without it"]
    if quantization.mode_of(place.layer) not in quantization.SUPPORTED_MODES:
        return [f"'{place.path}' is quantised as {quantization.mode_of(place.layer)}; int8 and int4 are supported"]
    if linear.constraint is not None:
        return [f"'{place.path}' has a kernel constraint, which an adapted kernel would not keep; exclude it"]
    return []


def _refuse_unfit_model(model: Any, places: list[Place], bias: str) -> None:
    if bias not in training.BIAS_OPTIONS:
        raise ValueError(f"`bias` must be one of {training.BIAS_OPTIONS}. Received: bias={bias!r}.")
    if any(isinstance(place.layer, AdaptedLayer) or training.MARK in vars(place.layer) for place in places):
        raise ValueError(
            f"'{model.name}' is adapted already. Expected a plain model. Call `keras_lora.remove_lora(model)` or "
            "`keras_lora.merge_lora(model)` first."
        )
    unbuilt = [place.path for place in places if not place.layer.built]
    if unbuilt:
        raise ValueError(
            f"'{model.name}' is not built: {', '.join(unbuilt[:8])} have no weights yet. Expected a built model. Call the "
            "model on data once, or pass `input_shape=` to `apply_lora`."
        )
    rewritten = [place.path for place in places if isinstance(place.layer, keras.layers.SpectralNormalization)]
    if rewritten:
        raise ValueError(
            f"'{model.name}' cannot be kept frozen: SpectralNormalization rewrites the kernel inside it in every training "
            f"step, frozen or not. Expected a model without it. Received: {rewritten}."
        )


def _warn_of_subclasses(places: list[Place]) -> None:
    default = tuple(cls for cls, adapted in ADAPTED_CLASSES.items() if not adapted.linear_map_class.picks_rows)
    guessed = [
        f"{place.path} ({type(place.layer).__name__})"
        for place in places
        if isinstance(place.layer, default) and type(place.layer) not in ADAPTED_CLASSES
    ]
    if guessed:
        warnings.warn(
            f"Left frozen, because a subclass may compute something else than its parent: {', '.join(guessed)}.",
            stacklevel=4,
        )


def _size(variable: keras.Variable) -> int:
    size = 1
    for dimension in variable.shape:
        size *= dimension
    return size


def _shown(pattern: Any) -> str:
    return repr(pattern.pattern) if isinstance(pattern, re.Pattern) else repr(pattern)
