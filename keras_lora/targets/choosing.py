"""List which layers get an adapter, train in full or stay frozen. You can print it before anything changes."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import keras

from keras_lora import adapters, checks
from keras_lora.compat import keras_internals, quantization
from keras_lora.linear_map import LinearMap
from keras_lora.swap import beside, flags, slots
from keras_lora.swap.adapted import ADAPTED_CLASSES, address_of, maps_of
from keras_lora.swap.adapters_of_model import new_name
from keras_lora.swap.addresses import Place, walk, walking_once
from keras_lora.targets import blocks as blocks_
from keras_lora.targets import presets
from keras_lora.targets.heads import find_head, layers_to_train, looks_new
from keras_lora.targets.norms import is_norm
from keras_lora.targets.patterns import Key, Pattern, Patterns, Search, as_list, matches
from keras_lora.targets.target_list import ALREADY, LARGE, NAMED, NO_ADAPTER, NORM, TARGET, UNUSED, Target, TargetList

#: Why the output head gets no adapter.
HEAD = "output head"
#: The word in `train` for every normalization.
NORMS = "norms"


@dataclass(frozen=True)
class Site(Place):
    """One kernel of a layer that can be adapted; its path ends in the kernel's name if the layer has several."""

    linear: LinearMap

    @property
    def key(self) -> Key:
        return (id(self.layer), self.linear.part)


@checks.helpful
@walking_once()
@keras_internals.without_tensorflow()
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
        A list of `Target`, one for each layer that has variables itself. Printing it prints a table that fits the
        terminal. In the table equal blocks share one row ("× 12"), and so do the layers of a type that has no adapter.
        `total` is a one-line summary, and `notes` lists what to look at, such as a new head that stays frozen.

    Raises:
        ValueError: As `keras_lora.apply_lora` would.

    Example:

    >>> import keras, keras_lora
    >>> layers = [keras.Input((16,)), keras.layers.Dense(32, name="hidden"), keras.layers.Dense(2, name="out")]
    >>> model = keras.Sequential(layers)
    >>> [(target.path, target.action, target.trainable) for target in keras_lora.list_targets(model, rank=4)]
    [('hidden', 'adapt', 192), ('out', 'freeze', 0)]
    """
    method = method_for(model, adapter, rank, alpha)
    new_name(model, name)
    places = [place for place in walk(model) if not isinstance(place.layer, adapters.Adapter)]
    unused = _unused(places)
    _refuse_unfit_model(model, places, unused, bias)
    used = [place for place in places if place.key not in unused]
    sites = [site for place in used for site in _sites_of(place)]
    search = Search(model, places, unused)

    kernels = [site for site in sites if site.linear.part]
    excluded = _with_insides(search.find("exclude", exclude, [*places, *kernels]), places)
    heads = _heads(search, model, head, places)
    norms = {p.key: p for p in used if is_norm(p.layer)} if NORMS in as_list(train) else {}
    in_full = _with_insides(_trained(search, model, train, heads, norms, used), used)
    trained = norms | in_full
    named = search.find_values("adapter_pattern", adapter_pattern, sites)
    why_not = {key: "excluded" for key in excluded}
    if targets is None or targets == "all-linear":
        chosen = {site.key: site for site in sites if site.layer is model or site.linear.by_default}
        for key in _with_insides({place.key: place for place in heads}, places):
            why_not.setdefault(key, HEAD)
        for place, why in presets.left_out(places) if targets is None else []:
            why_not.setdefault(place.key, why)
        _warn_of_subclasses(places)
    else:
        chosen = search.find("targets", targets, sites)
    if blocks is not None:
        chosen_blocks, problems = blocks_.choose(model, places, sites, blocks)
        inside = _with_insides(chosen_blocks, places)
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
    for place in in_full.values():
        search.problems += _problems_of_training(place)
    if not chosen and not search.problems:
        search.found_nothing(sites, Counter(_why_not(site, why_not, trained) for site in sites))
    search.raise_problems()

    whys = dict.fromkeys(norms, NORM) | dict.fromkeys(in_full, NAMED)
    rows = [row for place in places for row in _rows_of(place, unused, chosen, methods, whys, why_not, bias)]
    variables = keras_internals.variables_of(place.layer for place in walk(model))
    new = [row.adapter.size(row.shape) + 1 for row in rows if row.adapter and row.shape]  # one more for the strength
    return TargetList(rows, sum(map(_size, variables)) + sum(new), _notes(heads, rows))


def method_for(model: Any, adapter: Any, rank: int | None, alpha: float | None) -> adapters.Adapter:
    """The method given by the first arguments of `apply_lora`. Raises an error that names a wrong argument."""
    checks.keras_layer(model, adapter, no=(adapters.Adapter,))
    cls = adapters.TABLE.get(adapter.lower()) if isinstance(adapter, str) else type(adapter)
    if cls is not None and issubclass(cls, adapters.Adapter):
        known = inspect.signature(cls).parameters
        given = {word: value for word, value in (("rank", rank), ("alpha", alpha)) if value is not None}
        if unknown := [word for word in given if word not in known]:
            own = ", ".join(f"`{word}`" for word in known if word not in ("name", "dtype", "trainable", "kwargs"))
            raise TypeError(
                f"`{cls.__name__}()` has no argument `{unknown[0]}`: this method takes {own or 'no arguments'}. Received: "
                f"{unknown[0]}={given[unknown[0]]!r}. Leave it out."
            )
    return adapters.get(adapter, rank=rank, alpha=alpha)


def _why_not(site: Site, why_not: dict[Key, str], trained: dict[Key, Any]) -> str:
    """Why a kernel that could be adapted is not."""
    if (site.key[0], "") in trained:
        return NAMED
    return why_not.get(site.key) or why_not.get((site.key[0], "")) or "not a target"


def _notes(heads: list[Place], rows: list[Target]) -> list[str]:
    """What to look at before training."""
    large = sum(row.why == LARGE for row in rows)
    unused = sum(row.why == UNUSED for row in rows)
    frozen = {id(row.layer) for row in rows if row.action == "freeze"}
    new = [f"'{head.path}'" for head in heads if id(head.layer) in frozen and looks_new(head.layer)]
    notes = {
        f"{large} marked large: the adapter has more parameters than its kernel. A lower rank is enough.": large,
        f"{unused} not used: they stay frozen. If training uses them, call the model with training=True first.": unused,
        f"The output head {', '.join(new[:4])} looks new (its bias is zero) and stays frozen: add train='head'.": new,
    }
    return [note for note, holds in notes.items() if holds]


def _rows_of(
    place: Place,
    unused: set[Key],
    chosen: dict[Key, Site],
    methods: dict[Key, adapters.Adapter],
    trained: dict[Key, str],
    why_not: dict[Key, str],
    bias: str,
) -> list[Target]:
    """The rows of one layer: none if it has no variables, several if it has several kernels."""
    variables = keras_internals.own_variables(place.layer)
    if place.key in unused and _makes_own_weights(place.layer):
        return [_row(place, variables, action="freeze", why=UNUSED, trainable=0)]
    if place.key in trained and variables:
        count = sum(map(_size, keras_internals.own_trainable_variables(place.layer)))
        return [_row(place, variables, action="train", why=trained[place.key], trainable=count)]
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
            shape = linear.matrix_shape
            row = {
                "shape": shape,
                "rank": getattr(adapter, "rank", None),
                "adapter": adapter,
                "linear": linear,
            }
            count = adapter.parameter_count(shape) + biases
            why = LARGE if adapter.size(shape) > math.prod(shape) else TARGET
            rows.append(_row(each, own, action="adapt", why=why, trainable=count, **row))
        else:
            known = isinstance(each, Site)
            why = why_not.get(each.key) or why_not.get(place.key) or "not a target"
            why = why if known or why == "excluded" else f"{NO_ADAPTER} {type(place.layer).__name__}"
            readable = each.linear.matrix_shape if isinstance(each, Site) and _is_readable(each.linear) else None
            rows.append(_row(each, own, action="freeze", why=why, trainable=biases, shape=readable))
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


def _heads(search: Search, model: keras.layers.Layer, head: Any, places: list[Place]) -> list[Place]:
    if head == "auto":
        return find_head(model, places)
    return [] if head is None else list(search.find("head", head, places).values())


def _trained(
    search: Search, model: Any, train: Patterns | None, heads: list[Place], norms: Mapping[Key, Place], places: list[Place]
) -> dict[Key, Place]:
    """The places that `train` names; the word "head" also means the output head that was found."""
    patterns = as_list(train)
    # "norms" is a name only if no normalization was found.
    found = search.find("train", [each for each in patterns if each != "head" and not (each == NORMS and norms)], places)
    if "head" in patterns:
        named = [place for place in places if matches("head", place)]
        head = {place.key: place for place in [*layers_to_train(model, heads, places), *named]}
        if not head:
            search.problems.append("train='head': no layer has this name, and no output head was found; name a layer")
        found |= head
    return found


def _with_insides(found: dict[Key, Any], places: list[Place]) -> dict[Key, Any]:
    """`found`, and every layer inside one of them."""
    held = dict(found)
    for place in places:
        if place.holder is not None and (id(place.holder), "") in held:
            held[place.key] = place
    return held


def _is_readable(linear: LinearMap) -> bool:
    """Whether the layer is not quantised, or quantised in a supported mode."""
    return quantization.problem_with(linear.layer) is None


def _problems_of(site: Site, adapter: adapters.Adapter) -> list[str]:
    """The reasons why this kernel cannot be adapted."""
    if getattr(site.layer, "lora_enabled", False):
        return [f"'{site.path}' has Keras's own `enable_lora` on; convert it with `interop.from_enable_lora`"]
    if (unreadable := quantization.problem_with(site.layer)) is not None:
        return [f"'{site.path}' {unreadable}"]
    if len(site.linear.kernel_axes) != len(site.linear.kernel_shape):
        stated, shape = site.linear.kernel_axes, site.linear.kernel_shape
        return [f"'{site.path}' was registered with the axes '{stated}', and its kernel has the shape {shape}"]
    if site.linear.constraint is not None:
        return [f"'{site.path}' has a kernel constraint, which an adapted kernel would not keep; exclude it"]
    if adapter.derived and any(v is site.linear.kernel_variable for v in flags.planned_variables(site.layer)):
        return [f"'{site.path}' trains in full, but a {type(adapter).__name__} reads the kernel only once; exclude it"]
    problem = adapter.problem_with(site.linear)
    return [f"'{site.path}': {problem}"] if problem else []


def _problems_of_training(place: Place) -> list[str]:
    """The reasons why this layer cannot train in full: an adapter has computed something from its kernel."""
    bound = [adapter.adapter_name for adapter in slots.adapters_in(place.layer) if adapter.derived]
    return [f"'{place.path}' cannot train in full: its adapters {bound} have read its kernel once"] if bound else []


def _refuse_unfit_model(model: Any, places: list[Place], unused: set[Key], bias: str) -> None:
    if bias not in flags.BIAS_OPTIONS:
        raise ValueError(f"`bias` must be one of {flags.BIAS_OPTIONS}. Received: bias={bias!r}.")
    waiting = [place for place in places if not place.layer.built and place.key not in unused]
    unbuilt = [place.path for place in waiting if _makes_own_weights(place.layer)]
    if unbuilt:
        raise ValueError(
            f"'{model.name}' is not built: {', '.join(unbuilt[:8])} have no weights yet. Expected a built model. Call the "
            "model on data once, or pass `input_shape=` to `apply_lora`."
        )


def _unused(places: list[Place]) -> set[Key]:
    """The layers that are not built, at or below one whose `call` has run: it has built every layer that it uses."""
    ran: set[Key] = set()
    for place in places:
        if (place.holder is not None and (id(place.holder), "") in ran) or keras_internals.has_run(place.layer):
            ran.add(place.key)
    return {place.key for place in places if place.key in ran and not place.layer.built}


def _makes_own_weights(layer: keras.layers.Layer) -> bool:
    """Whether a layer that is not built may get weights of its own, besides those of its sublayers."""
    inside = any(keras_internals.makes_weights(each) for each in keras_internals.sublayers(layer))
    return bool(maps_of(layer)) or (keras_internals.makes_weights(layer) and not inside)


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
