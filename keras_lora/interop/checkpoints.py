"""Where the variables of a model are in a Hugging Face checkpoint: names and layouts.

For KerasHub models both come from KerasHub's converters (see `converters.py`). For any other layer, the caller gives the
name of a module, and the layout is that of the corresponding PyTorch layer.

A converter has a function that turns a tensor into a variable. We run that function on the numbers 0, 1, 2, ... instead of
the tensor: the result is, for each entry of the variable, the index of its entry in the tensor.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np

from keras_lora.compat import keras_internals
from keras_lora.interop import experts
from keras_lora.interop.ports import Port, shape_of
from keras_lora.linear_map import LinearMap
from keras_lora.swap.adapted import address_of, maps_of
from keras_lora.swap.addresses import Place, walk
from keras_lora.targets.patterns import nearest

#: Names of variables in Keras and in PyTorch; a kernel is called `weight` there.
_NAMES = {"bias": "bias", "beta": "bias", "gamma": "weight", "scale": "weight", "moving_mean": "running_mean"} | {
    "moving_variance": "running_var"
}


#: Why trained tokens of an encoder or a decoder differ.
TIED_OTHERWISE = "its rows are used in other places here than in PEFT, which ties trained tokens to the encoder's embedding"
#: The output projection of the language models of `transformers`.
HEAD = "lm_head"
#: The kind of a weight, and for each input and output of a matrix its index there.
_Layout = tuple[str, np.ndarray, np.ndarray]


class NotAReshape(ValueError):
    """A variable is not a tensor of the checkpoint in another order."""


@dataclass(frozen=True)
class Placement:
    """Where one variable is in a tensor of a checkpoint.

    Attributes:
        key: The name of the tensor, for example `"model.layers.0.self_attn.q_proj.weight"`.
        shape: Its shape there.
        index: For each entry of the variable, in the variable's shape, the index of its entry in the tensor.
    """

    key: str
    shape: tuple[int, ...]
    index: np.ndarray


@dataclass(frozen=True)
class Source:
    """Where the matrix of a kernel is in the weight of a module.

    Attributes:
        module: The name of the module, for example `"model.layers.0.self_attn.q_proj"`, or of a parameter of experts.
        kind: `"linear"`, `"transposed"` (GPT-2's Conv1D, whose weight is `(in, out)`), `"embedding"`, `"convolution"` or
            `"bank"`.
        shape: The shape of its weight; of a bank, `(experts, out, in)`.
        ins, outs: For each input and output of our matrix, its index in the weight. Several kernels may
            be parts of one weight; each kernel then has some of its outputs and all its inputs.
    """

    module: str
    kind: str
    shape: tuple[int, ...]
    ins: np.ndarray
    outs: np.ndarray

    @property
    def out_dim(self) -> int:
        """The number of outputs of the weight."""
        return self.shape[1 if self.kind in ("transposed", "embedding", "bank") else 0]

    @property
    def in_dim(self) -> int:
        """The number of inputs of the weight."""
        return self.shape[2] if self.kind == "bank" else math.prod(self.shape) // self.out_dim


class CheckpointMap:
    """Maps a model to a checkpoint of Hugging Face's `transformers`.

    Args:
        model: A KerasHub backbone, a task on one, or any model with `names`.
        names: Module names for layers without a KerasHub converter, or replacements for its names: a dict from the path of
            a layer (as `keras_lora.list_targets` prints it) or its address to the name of the module.
        prefix: Text before the names that KerasHub's converter has for the backbone.
        rename: A function from such a name with its prefix, for example `"encoder.layer.0.output.dense.weight"`, to a
            new name.

    Attributes:
        keys: The tensors, with the variables that each contains.
        converted: The names of those that KerasHub's converter named, and `names` did not.
        config: The config of the checkpoint, as far as it is known, with its `model_type`; empty without a converter.
        head: The name of the output projection of a language model.
        reason: Why there is no map from KerasHub's converter for this model, or `""`.
    """

    def __init__(
        self,
        model: keras.layers.Layer,
        names: Mapping[str, str] | None = None,
        rename: Callable[[str], str] | None = None,
        prefix: str = "",
    ):
        self.model, places = model, walk(model)
        self.head = HEAD
        self.addresses = {id(place.layer): place.address for place in places}
        self.maps = {address_of(place.address, each): each for place in places for each in maps_of(place.layer)}
        self.config, ports, self.reason = _converted(model, prefix)
        named = list(_named(places, names or {}))
        renamed = {(id(port.layer), port.attribute) for port in named}
        by_variable = {(id(port.layer), port.attribute): port for port in ports}  # a shared layer is filled several times
        self._several = {
            (id(port.layer), port.attribute) for port in ports if by_variable[id(port.layer), port.attribute].key != port.key
        } - renamed
        alike: dict[Any, set[tuple[int, str]]] = {}
        for port in ports:
            as_filled = (port.key, port.meaning, shape_of(port.layer, port.attribute))
            alike.setdefault(as_filled, set()).add((id(port.layer), port.attribute))
        self._copies = {variable for each in alike.values() if len(each) > 1 for variable in each}
        kept = [port for variable, port in by_variable.items() if variable not in renamed]
        self.converted = [port.key for port in kept]
        self.keys: dict[str, list[Port]] = {}
        for port in [*kept, *named]:
            if id(port.layer) in self.addresses:
                self.keys.setdefault(port.key, []).append(port)
        self._layouts: dict[Any, _Layout | None] = {}
        self._ports = {(id(port.layer), port.attribute): port for each in self.keys.values() for port in each}
        if rename is not None:
            self.rename(rename)

    def rename(self, function: Callable[[str], str]) -> None:
        """Give the tensors that the converter named new names."""
        self.head = function(f"{self.head}.weight").removesuffix(".weight")
        new = {key: function(key) for key in self.converted}
        self.converted = list(new.values())
        keys, self.keys = self.keys, {}
        for key, ports in keys.items():
            name = new.get(key, key)
            self.keys.setdefault(name, []).extend(replace(port, key=name) for port in ports)
        self._ports = {(id(port.layer), port.attribute): port for each in self.keys.values() for port in each}

    @property
    def modules(self) -> dict[str, list[str]]:
        """The modules whose weights contain kernels, and the parameters of experts, with the addresses of these kernels."""
        found: dict[str, list[str]] = {}
        for address, linear in self.maps.items():
            port = self._ports.get((id(linear.layer), linear.kernel_name))
            if port is not None and (port.key.endswith(".weight") or experts.is_bank(port.key)):
                found.setdefault(port.key.removesuffix(".weight"), []).append(address)
        return found

    @property
    def bank_parameters(self) -> list[str]:
        """The parameters of modules of experts, in their order there; empty for a model without banks."""
        return [each for each in experts.PARAMETERS if any(key.endswith(f".experts.{each}") for key in self.keys)]

    def source_of(self, address: str) -> Source:
        """Return where the matrix of the kernel at an address is.

        Raises:
            NotAReshape: The matrix is in no tensor, or differs in more than the order of inputs and outputs.
        """
        linear = self.maps[address]
        port = self._port(linear.layer, linear.kernel_name)
        bank = experts.is_bank(port.key) and linear.kernel_axes == "gio"
        if not bank and not port.key.endswith(".weight"):
            raise NotAReshape(f"it comes from what is no weight of a module ('{port.key}')")
        if not bank and len(linear.matrix_shape) > 2:
            raise NotAReshape("its kernel has groups, and PEFT changes plain matrices")
        for shape in self._shapes(port, linear):
            if (found := self._layout(port, shape, linear)) is not None:
                self._refuse_overlap(port, shape)
                kind, ins, outs = found
                if kind == "bank":
                    number, in_dim, _ = linear.matrix_shape
                    shape = (number, math.prod(shape) // (number * in_dim), in_dim)
                return Source(port.key.removesuffix(".weight"), kind, shape, ins, outs)
        raise NotAReshape(f"its matrix is not the inputs and outputs of a weight in another order ('{port.key}')")

    def is_used_elsewhere(self, address: str, key: str) -> bool:
        """Whether an embedding is used in more places here than its module in `transformers`.

        In `transformers`, the output projection, or the second embedding of an encoder and a decoder, is a separate module
        with the same weight, which PEFT does not adapt.
        """
        linear = self.maps[address]
        if not linear.picks_rows:
            return False
        back = getattr(linear.layer, "tie_weights", False) and (
            keras_internals.is_called_in_reverse(linear.layer) or _is_output(self.model, linear.layer)
        )
        return bool(back) or key.removeprefix("model.") == "shared.weight"

    def head_tied_to(self, address: str) -> str | None:
        """Return the module in `transformers` that is the output projection with the weight of this embedding, if known."""
        of_text = any(
            cls.__name__ == "CausalLM" and cls.__module__.startswith("keras_hub.") for cls in type(self.model).__mro__
        )
        return self.head if of_text and getattr(self.maps[address].layer, "tie_weights", False) else None

    def is_used_back_by_tasks(self, address: str) -> bool:
        """Whether this is a backbone alone, and the language models on it use this embedding as their output projection."""
        if not self.config or not getattr(self.maps[address].layer, "tie_weights", False):
            return False
        return bool(importlib.import_module("keras_lora.interop.converters").generates(self.model))

    def ties_tokens_otherwise(self, address: str, module: str) -> bool:
        """Whether trained tokens of an embedding of an encoder and decoder change other places here than in PEFT."""
        linear = self.maps[address]
        tied = self.is_used_elsewhere(address, f"{module}.weight") or self.is_used_back_by_tasks(address)
        return (tied and "decoder" in module.split(".")) or (id(linear.layer), linear.kernel_name) in self._copies

    def placement_of(self, layer: keras.layers.Layer, attribute: str) -> Placement:
        """Return where a variable is.

        Raises:
            NotAReshape: The variable is in no tensor, or differs in more than the order of its entries.
        """
        port = self._port(layer, attribute)
        plain = (each for each in maps_of(layer) if len(each.matrix_shape) == 2 or experts.is_bank(port.key))
        linear = next((each for each in plain if each.kernel_name == attribute), None)
        for shape in self._shapes(port, linear):
            index = _index(port, shape, shape_of(layer, attribute))
            if index is not None and (linear is None or self._layout(port, shape, linear) is not None):
                self._refuse_overlap(port, shape)
                return Placement(port.key, shape, index)
        raise NotAReshape(f"its numbers are not those of a tensor in another order ('{port.key}')")

    def _port(self, layer: keras.layers.Layer, attribute: str) -> Port:
        port = self._ports.get((id(layer), attribute))
        if port is None:
            raise NotAReshape(self.reason or "KerasHub's converter fills it from several tensors, or from none")
        if (id(layer), attribute) in self._several:
            raise NotAReshape(f"KerasHub's converter fills it from several tensors ('{port.key}' is one)")
        return port

    def _refuse_overlap(self, port: Port, shape: tuple[int, ...]) -> None:
        """Raise `NotAReshape` if several variables are the same numbers of a tensor: not each can be that module."""
        others = [each for each in self.keys[port.key] if each is not port]
        sizes = [math.prod(shape_of(each.layer, each.attribute)) for each in (port, *others)]
        if sum(sizes) > math.prod(shape):
            addresses = sorted(f"{self.addresses[id(each.layer)]}/{each.attribute}" for each in (port, *others))
            raise NotAReshape(
                f"its tensor fills several variables, which are separate modules there; `names` says which is which "
                f"('{port.key}' fills {addresses})"
            )

    def _layout(self, port: Port, shape: tuple[int, ...], linear: LinearMap) -> _Layout | None:
        """Return the result of `_matrix`, cached for equal kernels: a large model has many, and each takes seconds."""
        alike = (port.meaning, shape, linear.kernel_shape, linear.kernel_axes, linear.picks_rows)
        if alike not in self._layouts:
            own, is_bank = linear.kernel_shape, linear.kernel_axes == "gio"
            if is_bank:  # two experts show how all are laid out, in less memory
                shape, own = (min(shape[0], 2), *shape[1:]), (min(own[0], 2), *own[1:])
            index = _index(port, shape, own)
            found = None if index is None else _bank(index, shape) if is_bank else _matrix(index, shape, linear)
            self._layouts[alike] = found
        return self._layouts[alike]

    def _shapes(self, port: Port, linear: LinearMap | None) -> Iterator[tuple[int, ...]]:
        """Yield the shapes that the tensor may have; the converter does not tell which is right."""
        own = shape_of(port.layer, port.attribute)
        sizes = [math.prod(shape_of(each.layer, each.attribute)) for each in self.keys[port.key]]
        for whole in dict.fromkeys([sum(sizes), math.prod(own)]):  # parts of one tensor, or all of it
            shapes = [own, own[::-1]]
            if linear is not None and linear.kernel_axes == "gio":
                number, in_dim, _ = linear.matrix_shape
                out_dim = whole // (number * in_dim)
                shapes = [(number, out_dim, in_dim), (number, in_dim, out_dim)]
            elif linear is not None:
                in_dim = linear.matrix_shape[-2]
                shapes = [(whole // in_dim, in_dim), (in_dim, whole // in_dim), *shapes]
            elif port.key.endswith(".bias"):
                shapes = [(whole,), *shapes]
            if len(own) > 2:
                shapes.append((own[-1], own[-2], *own[:-2]))
            yield from (shape for shape in dict.fromkeys(shapes) if math.prod(shape) == whole)


class _Numbers(np.ndarray):
    """An array that ignores casts, because some converters round to float16."""

    def astype(self, *args: Any, **kwargs: Any) -> Any:
        return self


def _index(port: Port, shape: tuple[int, ...], own: tuple[int, ...]) -> np.ndarray | None:
    """Return, for each entry of a variable, its index in a tensor of `shape`, or `None` if there is no such index."""
    size = math.prod(shape)
    numbers = np.arange(size, dtype="int32" if size < 2**31 else "int64").reshape(shape).view(_Numbers)
    try:
        found = np.asarray(numbers if port.hook is None else port.hook(numbers, list(own)))
    except Exception:  # the hook is foreign code, written for another shape
        return None
    if found.shape != own or found.dtype.kind not in "iu":
        return None
    seen = np.zeros(numbers.size, bool)
    if found.size and (found.min() < 0 or found.max() >= numbers.size):
        return None
    seen[found.reshape(-1)] = True
    return found.view(np.ndarray) if seen.sum() == found.size else None


def _matrix(index: np.ndarray, shape: tuple[int, ...], linear: LinearMap) -> _Layout | None:
    """Return the kind of a weight and its inputs and outputs in our order, or `None` if more than the order differs."""
    order = [axis for role in "io" for axis, each in enumerate(linear.kernel_axes) if each == role]
    matrix = index.transpose(order).reshape(linear.matrix_shape)
    first, rest = np.divmod(matrix, math.prod(shape[1:]))
    if (first == first[:1]).all() and (rest == rest[:, :1]).all():  # (out, in) or (out, in, height, width)
        kind, ins, outs = "convolution" if len(shape) > 2 else "linear", rest[:, 0], first[0]
    elif len(shape) == 2 and (first == first[:, :1]).all() and (rest == rest[:1]).all():
        kind, ins, outs = "embedding" if linear.picks_rows else "transposed", first[:, 0], rest[0]
    else:
        return None
    whole = len(np.unique(ins)) == (math.prod(shape[1:]) if kind in ("linear", "convolution") else shape[0])
    return (kind, ins, outs) if whole and (kind == "embedding") == linear.picks_rows else None


def _bank(index: np.ndarray, shape: tuple[int, ...]) -> _Layout | None:
    """Return what `_matrix` does for a kernel of one matrix for each expert, which are all laid out alike."""
    number, (expert, one) = len(index), np.divmod(index, math.prod(shape[1:]))
    if len(shape) != 3 or shape[0] != number or (expert != np.arange(number)[:, None, None]).any() or (one != one[:1]).any():
        return None
    first, rest = np.divmod(one[0], shape[2])
    if (first == first[:1]).all() and (rest == rest[:, :1]).all():  # (experts, out, in)
        ins, outs, whole = rest[:, 0], first[0], shape[2]
    elif (first == first[:, :1]).all() and (rest == rest[:1]).all():  # (experts, in, out)
        ins, outs, whole = first[:, 0], rest[0], shape[1]
    else:
        return None
    return ("bank", ins, outs) if len(np.unique(ins)) == whole else None


def _is_output(model: Any, layer: keras.layers.Layer) -> bool:
    """Whether an output of a model comes directly from a layer, or from a layer that contains it."""
    made = [keras_internals.producer_of(each)[0] for each in keras.tree.flatten(getattr(model, "outputs", None) or [])]
    held = [keras_internals.sublayers(each) if isinstance(each, keras.layers.Layer) else [] for each in made]
    return any(layer is each or any(layer is one for one in inside) for each, inside in zip(made, held, strict=True))


def _converted(model: Any, prefix: str) -> tuple[dict[str, Any], list[Port], str]:
    """Return the checkpoint's config and the ports of KerasHub's converter for a model, or why there are none."""
    backbone = getattr(model, "backbone", None) or model
    if not any(cls.__module__.partition(".")[0] == "keras_hub" for cls in type(backbone).__mro__):
        return {}, [], "it is no layer of a KerasHub model, and `names` gives no module for it"
    converters = importlib.import_module("keras_lora.interop.converters")  # which imports KerasHub
    try:
        config, ports = converters.watch(backbone)
        head = converters.watch_head(model) if backbone is not model else []
    except converters.ConverterError as error:
        return {}, [], str(error)
    of_head = "lm_head."  # outside the backbone, although its converter fills it
    named = [port if port.key.startswith(of_head) else replace(port, key=prefix + port.key) for port in ports]
    return config, [*named, *head], ""


def _named(places: list[Place], names: Mapping[str, str]) -> Iterator[Port]:
    """Yield the ports of layers for which the caller names the modules."""
    by_name: dict[str, list[Place]] = {}
    for place in places:
        for name in {place.path, place.address, place.layer.name}:
            by_name.setdefault(name, []).append(place)
    wrong = [name for name in names if len(by_name.get(name, [])) != 1]
    if wrong:
        known = sorted({part for place in places[1:] for part in (*place.path.split("/"), place.path)})
        near = {name: nearest(name, known) for name in wrong}
        raise ValueError(
            f"`names` must have the path or the address of one layer as each key. Received: {wrong}. The nearest paths are "
            f"{near}. `keras_lora.list_targets(model)` prints them."
        )
    for name, module in names.items():
        layer: Any = by_name[name][0].layer
        kernels = {each.kernel_name: each for each in maps_of(layer)}
        for attribute, linear in kernels.items():
            yield Port(layer, attribute, f"{module}.weight", _hook_of(linear))
        for variable in keras_internals.own_variables(layer):
            attribute = next((each for each, value in vars(layer).items() if value is variable), variable.name)
            if attribute.lstrip("_") not in kernels:
                flat = (lambda tensor, shape: np.reshape(tensor, shape)) if variable.name == "bias" else None
                yield Port(layer, attribute, f"{module}.{_NAMES.get(variable.name, variable.name)}", flat)


_CONVOLUTIONS = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)


def _not_known(weight: Any, shape: Any) -> Any:
    raise NotAReshape("PyTorch's layout for this kind of layer is not known here")


def _hook_of(linear: LinearMap) -> Any:
    """Return the function from the PyTorch weight of such a layer to the kernel."""
    if linear.picks_rows:
        return None
    axes = linear.kernel_axes
    if isinstance(linear.layer, _CONVOLUTIONS):
        return lambda weight, shape: np.moveaxis(weight, (0, 1), (-1, -2))
    if hasattr(linear.layer, "kernel_size"):
        return _not_known
    order = [axis for role in "io" for axis, each in enumerate(axes) if each == role]
    back = [order.index(axis) for axis in range(len(axes))]
    sizes = [linear.kernel_shape[axis] for axis in order]
    return lambda weight, shape: weight.T.reshape(sizes).transpose(back)
