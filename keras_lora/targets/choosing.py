"""List which layers get an adapter, train in full or stay frozen. You can print it before anything changes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import keras
from rich.table import Table

from keras_lora import adapters, checks, reports
from keras_lora.compat import keras_internals, quantization
from keras_lora.linear_map import LinearMap
from keras_lora.swap import beside, flags, slots
from keras_lora.swap.adapted import ADAPTED_CLASSES, address_of, maps_of
from keras_lora.swap.adapters_of_model import new_name
from keras_lora.swap.addresses import Place, walk, walking_once
from keras_lora.targets import blocks as blocks_
from keras_lora.targets import presets
from keras_lora.targets.patterns import Key, Pattern, Patterns, Search

#: Why a row has the action "train" although this call did not ask for it.
ALREADY = "trains already"


@dataclass(frozen=True)
class Site(Place):
    """One kernel of a layer that can be adapted; its path ends in the kernel's name if the layer has several."""

    linear: LinearMap

    @property
    def key(self) -> Key:
        return (id(self.layer), self.linear.part)


@dataclass(frozen=True)
class Target:
    """What would happen to one layer that has variables, or to one of its kernels if it has several.

    Attributes:
        path: The path of the layer, with the kernel's name if it has several.
        layer_type: The name of its class.
        action: `"adapt"`, `"train"` (in full) or `"freeze"`.
        why: The reason, in words.
        shape: Shape of its kernel as a matrix, `(in_dim, out_dim)`, or `None` if it is not a known linear map.
        rank: Rank of the adapter, or `None`.
        parameters: The number of parameters of the layer.
        trainable: The number of parameters that would train because of this row.
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
    linear: LinearMap | None = field(repr=False, default=None)
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
        return f"{reports.text(table)}{self.total}"

    __repr__ = __str__

    @property
    def total(self) -> str:
        """One line that shows how much of the model would train."""
        trainable, everything = sum(row.trainable for row in self), sum(row.parameters for row in self)
        everything += sum(row.adapter.size(row.shape) + 1 for row in self if row.adapter and row.shape)  # strength
        return f"trainable: {trainable:,} of {everything:,} ({100 * trainable / max(everything, 1):.3g} %)"


@checks.helpful
@walking_once()
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
    adapter_pattern: Mapping[Pattern, Any] | None = None,
    blocks: Any = None,
    name: str | None = None,
) -> TargetList:
    """Show what `apply_lora` with the same arguments would do. Nothing is changed.

    Args:
        model, adapter, rank, alpha, targets, exclude, head, train, bias: As for `keras_lora.apply_lora`.
        rank_pattern, alpha_pattern, adapter_pattern, blocks, name: As for `keras_lora.apply_lora`.

    Returns:
        A list of `Target`, one for each layer that has variables itself. Printing it prints a table.

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
    new_name(model, name)
    places = [place for place in walk(model) if not isinstance(place.layer, adapters.Adapter)]
    _refuse_unfit_model(model, places, bias)
    sites = [site for place in places for site in _sites_of(place)]
    search = Search(model, places)

    kernels = [site for site in sites if site.linear.part]
    excluded = _with_insides(search.find("exclude", exclude, [*places, *kernels]), places)
    trained = _with_insides(search.find("train", train, places), places)
    named = search.find_values("adapter_pattern", adapter_pattern, sites)
    why_not = {key: "excluded" for key in excluded}
    if targets is None or targets == "all-linear":
        chosen = {site.key: site for site in sites if site.layer is model or site.linear.by_default}
        for key in _with_insides(_heads(search, model, head, places), places):
            why_not.setdefault(key, "output head")
        for place, why in presets.left_out(places) if targets is None else []:
            why_not.setdefault(place.key, why)
        _warn_of_subclasses(places)
    else:
        chosen = search.find("targets", targets, sites)
    if blocks is not None:
        found, problems = blocks_.choose(model, places, blocks)
        inside = _with_insides(found, places)
        search.problems += problems
        for key in chosen if not problems else ():
            if (key[0], "") not in inside:
                why_not.setdefault(key, "outside `blocks`")
    chosen = {key: site for key, site in chosen.items() if key not in why_not and (key[0], "") not in why_not | trained}
    chosen |= {key: site for key, site in named.sites.items() if (key[0], "") not in excluded | trained}
    ranks = search.find_values("rank_pattern", rank_pattern, chosen.values()).values
    alphas = search.find_values("alpha_pattern", alpha_pattern, chosen.values()).values
    methods = {}
    for key, site in chosen.items():
        changed = {name: by_key[key] for name, by_key in (("rank", ranks), ("alpha", alphas)) if key in by_key}
        methods[key] = adapters.copy_of(adapters.get(named.values.get(key, method)), **changed)
        search.problems += _problems_of(site, methods[key])
    for place in trained.values():
        search.problems += _problems_of_training(place)
    if not chosen:
        search.found_nothing(targets, sites)
    search.raise_problems()

    rows = TargetList()
    for place in places:
        rows += _rows_of(place, chosen, methods, trained, why_not, bias)
    return rows


def _rows_of(
    place: Place,
    chosen: dict[Key, Site],
    methods: dict[Key, adapters.Adapter],
    trained: dict[Key, Any],
    why_not: dict[Key, str],
    bias: str,
) -> list[Target]:
    """The rows of one layer: none if it has no variables, several if it has several kernels."""
    variables = keras_internals.own_variables(place.layer)
    if not place.layer.built and maps_of(place.layer):
        return [_row(place, [], action="freeze", why="the model does not use it: it has no weights", trainable=0)]
    if place.key in trained and variables:
        count = sum(map(_size, keras_internals.own_trainable_variables(place.layer)))
        return [_row(place, variables, action="train", why="named in `train`", trainable=count)]
    planned = [] if beside.owners(place.layer) else flags.planned_variables(place.layer)  # those of another adapter
    if planned and len(planned) == len(keras_internals.own_trainable_variables(place.layer)):
        return [_row(place, variables, action="train", why=ALREADY, trainable=sum(map(_size, planned)))]
    with_bias = bias == "all" or (bias == "lora_only" and any(id(place.layer) == key[0] for key in chosen))
    already = {id(v) for v in planned}
    biases = sum(_size(v) for v in variables if (with_bias and v.name == "bias") or id(v) in already)
    rows = []
    for each, own in _parts(place, _sites_of(place), variables):
        if each.key in chosen:
            linear, adapter = chosen[each.key].linear, methods[each.key]
            row = {
                "shape": linear.matrix_shape,
                "rank": getattr(adapter, "rank", None),
                "adapter": adapter,
                "linear": linear,
            }
            count = adapter.parameter_count(linear.matrix_shape) + biases
            rows.append(_row(each, own, action="adapt", why="target", trainable=count, **row))
        else:
            known = isinstance(each, Site)
            why = why_not.get(each.key) or why_not.get(place.key) or "not a target"
            why = why if known or why == "excluded" else f"no adapter for {type(place.layer).__name__}"
            shape = each.linear.matrix_shape if isinstance(each, Site) and _is_readable(each.linear) else None
            rows.append(_row(each, own, action="freeze", why=why, trainable=biases, shape=shape))
        biases = 0  # they are in the first row
    return rows


def _sites_of(place: Place) -> list[Site]:
    maps = maps_of(place.layer) if place.layer.built else []
    return [Site(place.layer, place.address, address_of(place.path, m), place.holder, m) for m in maps]


def _parts(place: Place, sites: list[Site], variables: list[Any]) -> list[tuple[Place, list[Any]]]:
    """A layer's rows, each with its share of the layer's variables: one for each kernel, or one for the whole layer."""
    if not variables:
        return []
    if len(sites) < 2:
        return [(sites[0] if sites else place, variables)]
    kernels = {id(site.linear.kernel_variable): site for site in sites}
    shares: list[tuple[Place, list[Any]]] = [(site, []) for site in sites]
    for v in variables:
        share = next((own for site, own in shares if site is kernels.get(id(v))), shares[0][1])
        share.append(v)
    return shares


def _row(place: Place, variables: list[Any], **more: Any) -> Target:
    size = sum(map(_size, variables))
    columns: dict[str, Any] = {"shape": None, "rank": None, **more}
    return Target(place.path, type(place.layer).__name__, parameters=size, layer=place.layer, **columns)


def _heads(search: Search, model: keras.layers.Layer, head: Any, places: list[Place]) -> dict[Key, Any]:
    if head == "auto":
        return {place.key: place for place in find_head(model, places)}
    return {} if head is None else search.find("head", head, places)


def find_head(model: keras.layers.Layer, places: list[Place]) -> list[Place]:
    """Find the output head, which `apply_lora` leaves out by default.

    - A model with a `backbone` (a KerasHub task): every linear layer outside the backbone.
    - A model with a graph (Functional, Sequential): the search goes back from each output through layers with one input
      and no variables. The first `Dense` or `EinsumDense` is a head. If a normalization, a merge or a block comes first,
      that output has no head.
    - Any other model: the last of its direct sublayers with variables, if that is a `Dense` or `EinsumDense`.
    - A single layer has no head.
    """
    backbone = getattr(model, "backbone", None)
    if isinstance(backbone, keras.layers.Layer):
        inside = {id(place.layer) for place in walk(backbone)}
        return [place for place in places if id(place.layer) not in inside and maps_of(place.layer)]
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


def _with_insides(found: dict[Key, Any], places: list[Place]) -> dict[Key, Any]:
    """`found`, and every layer inside one of them."""
    held = dict(found)
    for place in places:
        if place.holder is not None and (id(place.holder), "") in held:
            held[place.key] = place
    return held


def _is_readable(linear: LinearMap) -> bool:
    """Whether the layer is not quantised, or quantised in a supported mode."""
    return quantization.mode_of(linear.layer) in quantization.SUPPORTED_MODES


def _problems_of(site: Site, adapter: adapters.Adapter) -> list[str]:
    """The reasons why this kernel cannot be adapted."""
    if getattr(site.layer, "lora_enabled", False):
        return [f"'{site.path}' has Keras's own `enable_lora` on; convert it with `interop.from_enable_lora`"]
    if not _is_readable(site.linear):
        return [f"'{site.path}' is quantised as {quantization.mode_of(site.layer)}; int8 and int4 are supported"]
    if len(site.linear.kernel_axes) != len(site.linear.kernel_shape):
        stated, shape = site.linear.kernel_axes, site.linear.kernel_shape
        return [f"'{site.path}' was registered with the axes '{stated}', and its kernel has the shape {shape}"]
    if site.linear.constraint is not None:
        return [f"'{site.path}' has a kernel constraint, which an adapted kernel would not keep; exclude it"]
    if adapter.derived and any(v is site.linear.kernel_variable for v in flags.planned_variables(site.layer)):
        return [f"'{site.path}' trains in full, and a {type(adapter).__name__} measures the kernel once; exclude it"]
    problem = adapter.problem_with(site.linear)
    return [f"'{site.path}': {problem}"] if problem else []


def _problems_of_training(place: Place) -> list[str]:
    """The reasons why this layer cannot train in full: an adapter has computed something from its kernel."""
    bound = [adapter.adapter_name for adapter in slots.adapters_in(place.layer) if adapter.derived]
    return [f"'{place.path}' cannot train in full beside its adapters {bound}, which measured its kernel"] if bound else []


def _refuse_unfit_model(model: Any, places: list[Place], bias: str) -> None:
    if bias not in flags.BIAS_OPTIONS:
        raise ValueError(f"`bias` must be one of {flags.BIAS_OPTIONS}. Received: bias={bias!r}.")
    unused = _inside_graphs(places)
    unbuilt = [place.path for place in places if not place.layer.built and place.key not in unused]
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


def _inside_graphs(places: list[Place]) -> set[Key]:
    """Every layer at or below a model with a graph. Making the graph builds all layers it uses; unbuilt ones are unused."""
    inside: set[Key] = set()
    for place in places:
        if getattr(place.layer, "outputs", None) or (place.holder is not None and (id(place.holder), "") in inside):
            inside.add(place.key)
    return inside


def _warn_of_subclasses(places: list[Place]) -> None:
    known = tuple(cls for cls, adapted in ADAPTED_CLASSES.items() if adapted.linear_maps[0].by_default)
    guessed = [
        f"{place.path} ({type(place.layer).__name__})"
        for place in places
        if isinstance(place.layer, known) and not maps_of(place.layer)
    ]
    if guessed:
        checks.warn(
            f"Left frozen, because a subclass may compute something else than its parent: {', '.join(guessed)}. "
            "`keras_lora.register_layer` declares what it computes."
        )


def _size(variable: keras.Variable) -> int:
    return math.prod(variable.shape)
