"""Trace KerasHub's converters to learn which Hugging Face tensor fills which variable of a model.

Every `convert_*.py` of KerasHub fills a backbone through a loader: `loader.port_weight(variable, key, hook)`. Here a
converter runs with a loader without a file, on a read-only view of the backbone. The tensors it asks for give the map.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import textwrap
import types
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import keras
import keras_hub
import numpy as np
from keras_hub.src.utils.transformers import preset_loader

from keras_lora.compat import keras_internals
from keras_lora.interop import experts
from keras_lora.interop.ports import Port, as_it_is_now, attribute_of, shape_of
from keras_lora.linear_map import view_of
from keras_lora.swap.adapted import AdaptedContainer, maps_of
from keras_lora.targets.patterns import nearest


class ConverterError(ValueError):
    """A converter could not be followed."""


def watch(backbone: keras.Model) -> tuple[dict[str, Any], list[Port]]:
    """Return the config of a backbone's checkpoint, as far as known, and the ports of KerasHub's converter, in its order.

    The backbone is not changed. Several types of checkpoint may have one converter. We take the one that contradicts the
    fewest entries of the backbone's config, and of these the one that fills most variables from most tensors: as Gemma's,
    two norms of Gemma 2 would get one name. Values that a converter reads from the checkpoint's `config.json` are taken
    from the backbone's config.

    Args:
        backbone: A KerasHub backbone, plain or adapted.

    Raises:
        ConverterError: KerasHub has no converter for the class, or it cannot be followed.
    """
    found: list[tuple[tuple[int, int, int], dict[str, Any], list[Port]]] = []
    for model_type in model_types_of(backbone):
        config, apart = _config_of(backbone, converters()[model_type], model_type)
        for part, lacks in itertools.product((None, *_LANGUAGE_MODELS), (_MAYBE_LACKING, _OLD_NAMES)):
            loader = _Loader(lacks)
            said = config if part is None else config | {"text_config": part}
            try:
                converters()[model_type].convert_weights(_shown(backbone), loader, _Config(said))
            except Exception as error:  # the converter is foreign code that gets less than it expects
                failure = error
                continue
            variables = {(id(port.layer), port.attribute) for port in loader.ports}
            fit = (apart, -len(variables), -len({port.key for port in loader.ports}))
            found.append((fit, said, loader.ports))
            break
    if not found:
        reason = f"KerasHub's converter for {_plain_class(backbone).__name__} could not be followed"
        raise ConverterError(f"{reason} ({type(failure).__name__}: {failure})") from failure
    return min(found, key=lambda each: each[0])[1:]


def watch_head(task: Any) -> list[Port]:
    """Return the ports of KerasHub's converter for the head of a task; empty if it does not convert heads."""
    convert = getattr(_converter_of(_plain_class(task.backbone)), "convert_head", None)
    loader = _Loader(_OLD_NAMES)
    if convert is not None and isinstance(task, keras_hub.models.ImageClassifier):
        convert(_shown(task), loader, _Config())
    return loader.ports


def model_types_of(backbone: keras.Model) -> list[str]:
    """Return the `model_type` values of Hugging Face configs for the class of this backbone."""
    converter = _converter_of(_plain_class(backbone))
    return [name for name, each in converters().items() if each is converter]


def generates(backbone: keras.Model) -> bool:
    """Whether this is a backbone, and KerasHub has a language model with a tied output projection on its class."""
    tasks: list[Any] = [each for each in vars(keras_hub.models).values() if inspect.isclass(each)]
    of_language = [each for each in tasks if issubclass(each, (keras_hub.models.CausalLM, keras_hub.models.Seq2SeqLM))]
    classes = [each.backbone_cls for each in of_language if each.backbone_cls]
    return isinstance(backbone, keras_hub.models.Backbone) and isinstance(backbone, tuple(classes))


@functools.cache
def converters() -> dict[str, ModuleType]:
    """Return KerasHub's converters by the `model_type` of a Hugging Face config."""
    # KerasHub has no table, so we read the names that its loader compares with the config's.
    source = ast.parse(textwrap.dedent(inspect.getsource(preset_loader.TransformersPresetLoader.__init__)))
    found: dict[str, ModuleType] = {}
    for comparison in (node for node in ast.walk(source) if isinstance(node, ast.Compare)):
        for constant in (node for node in ast.walk(comparison) if isinstance(node, ast.Constant)):
            loader = preset_loader.TransformersPresetLoader("", {"model_type": constant.value})
            found[str(constant.value)] = loader.converter
    return found


def _converter_of(cls: type) -> ModuleType:
    """Return the converter for `cls`, or for its nearest parent class, or for a subclass."""
    by_class: dict[type, ModuleType] = {}
    for converter in converters().values():
        by_class.setdefault(converter.backbone_cls, converter)
    for each in inspect.getmro(cls):
        if each in by_class:
            return by_class[each]
    for each in by_class:
        if issubclass(each, cls) and cls is not keras_hub.models.Backbone:
            return by_class[each]
    near = nearest(cls.__name__, sorted(each.__name__ for each in by_class))
    raise ConverterError(f"KerasHub has no converter for {cls.__name__}; the nearest of its {len(by_class)} are {near}")


def _plain_class(layer: Any) -> type:
    return getattr(type(layer), "base_class", type(layer))


# The config of a checkpoint, derived from that of a backbone.


def _config_of(backbone: Any, converter: ModuleType, model_type: str) -> tuple[dict[str, Any], int]:
    """Return the checkpoint config of this backbone, as far as `convert_backbone_config` only renames entries.

    Also return the number of entries that show that this backbone has another `model_type`.
    """
    own = (
        view_of(backbone, _plain_class(backbone)).get_config()
        if isinstance(backbone, AdaptedContainer)
        else backbone.get_config()
    )
    asked: Any = _Asked(("model_type",), model_type)
    convert = converter.convert_backbone_config
    blind = {name: _Part() for name, value in vars(converter).items() if inspect.isclass(value)}
    try:  # without building parts of the model, or rounding
        made = types.FunctionType(convert.__code__, {**vars(converter), **blind, "int": lambda value: value})(asked)
    except Exception:  # more than renaming; `watch` reports the missing entry, if any
        return {"model_type": model_type}, len(own)
    apart = sum(_contradicts(value, own[key]) for key, value in made.items() if key in own)
    config: dict[str, Any] = {"model_type": model_type}
    for key, value in made.items():
        if isinstance(value, _Unknown) and value.place and key in own:
            entry = config
            for name in value.place[:-1]:
                entry = entry.setdefault(name, {})
            entry[value.place[-1]] = own[key]
    return config, apart


def _contradicts(made: Any, own: Any) -> int:
    """Return how much speaks against an entry that a converter makes being that of a backbone; a whole part counts most."""
    if (made is None) != (own is None):
        return 10 if isinstance(made, _Part) or isinstance(own, dict) else 1
    return int(isinstance(made, bool) and made != own)


class _Unknown:
    """An unknown value; everything computed from it is unknown too, and comes from the same tensors.

    Attributes:
        loader: The loader that was asked for these tensors, if any.
        names: The names of the tensors, in the order in which they were put together.
    """

    place: tuple[Any, ...] = ()
    loader: _Loader | None = None
    names: tuple[str, ...] = ()
    __array_priority__ = 1e6

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _from(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _from(self, args)

    def __getitem__(self, key: Any) -> Any:
        return _from(self)

    def __setitem__(self, key: Any, value: Any) -> None:
        """Ignore the assignment."""

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        return _from(args)

    def __array_ufunc__(self, function: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        return _from(args)

    def __eq__(self, other: object) -> Any:
        return _Unequal()

    def __ne__(self, other: object) -> Any:
        return _Different()

    __hash__ = None  # type: ignore[assignment]

    def __bool__(self) -> bool:
        raise TypeError("it asks for more than the names of tensors")

    def __iter__(self) -> Iterator[Any]:
        raise TypeError("it asks for more than the names of tensors")


class _Part(_Unknown):
    """An unknown object: a part of a model, such as its vision encoder."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _Part()


class _Unequal(_Unknown):
    """An unknown comparison, taken as false."""

    def __bool__(self) -> bool:
        return False


class _Different(_Unknown):
    """An unknown comparison, taken as true."""

    def __bool__(self) -> bool:
        return True


def _from(*values: Any) -> _Unknown:
    """Return what was computed from these values."""
    made = _Unknown()
    names: list[str] = []
    for each in _unknowns(values):
        made.loader = made.loader or each.loader
        names += each.names
    made.names = tuple(dict.fromkeys(names))
    return made


def _unknowns(value: Any) -> Iterator[_Unknown]:
    if isinstance(value, _Unknown):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _unknowns(each)


def _unknown(self: Any, *args: Any) -> Any:
    return _from(self, args)


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "rshift", "and", "invert"):
    setattr(_Unknown, f"__{_name}__", _unknown)
    setattr(_Unknown, f"__r{_name}__", _unknown)


class _Asked(_Unknown):
    """A config that returns the location of the requested entry."""

    def __init__(self, known: tuple[Any, ...] = (), value: Any = None, place: tuple[Any, ...] = ()):
        self.known, self.value, self.place = known, value, place

    def __getitem__(self, key: Any) -> Any:
        place = (*self.place, key)
        return self.value if place == self.known else _Asked(self.known, self.value, place)

    def get(self, key: Any, default: Any = None) -> Any:
        return self.value if (*self.place, key) == self.known else default

    def __contains__(self, key: Any) -> bool:
        return (*self.place, key) == self.known


class _Config(dict[str, Any]):
    """A config that reports the name of a missing entry."""

    def __missing__(self, key: Any) -> Any:
        raise ConverterError(f"it reads '{key}' of the checkpoint's config.json, which the model does not say")

    def __getitem__(self, key: Any) -> Any:
        value = super().__getitem__(key)
        return _Config(value) if isinstance(value, dict) else value


# The arguments for a converter.

#: Names of the first checkpoints, which transformers renames.
_OLD_NAMES = (".gamma", ".beta")
#: Names that a converter looks up to tell two kinds of norm apart.
_MAYBE_LACKING = (*_OLD_NAMES, ".running_mean")
#: The kinds of language model in BLIP-2, which its config does not say; only the right one can be followed.
_LANGUAGE_MODELS = ({"model_type": "opt"}, {"model_type": "t5", "feed_forward_proj": "gated-gelu"})


class _Loader:
    """A loader without a file."""

    safetensor_config = None

    def __init__(self, lacks: tuple[str, ...]):
        self.ports: list[Port] = []
        self.lacks = lacks

    def port_weight(self, keras_variable: Any, hf_weight_key: str, hook_fn: Any = None) -> None:
        if isinstance(keras_variable, _Slot):
            self.ports.append(Port(keras_variable.layer, keras_variable.attribute, hf_weight_key, as_it_is_now(hook_fn)))

    def get_tensor(self, hf_weight_key: str) -> Any:
        if hf_weight_key.endswith(self.lacks):
            raise KeyError(hf_weight_key)
        return _Tensor(self, hf_weight_key)

    def assigned(self, slot: _Slot, names: tuple[str, ...]) -> None:
        """Note that a converter filled a variable itself; only what becomes of a bank of experts is known."""
        if (port := experts.port_of(slot.layer, slot.attribute, names)) is not None:
            self.ports.append(port)

    def get_prefixed_key(self, hf_weight_key: str, dict_like: Any) -> str:
        return hf_weight_key


class _Tensor(_Unknown):
    """A tensor of a checkpoint. GPT-OSS's packed tensors have four axes, which the converter asks for."""

    def __init__(self, loader: _Loader, name: str):
        self.loader, self.names = loader, (name,)

    @property
    def shape(self) -> Any:
        return (_Unknown(),) * 4 if self.names[0].endswith("_blocks") else _Unknown()


class _Slot(_Unknown):
    """A placeholder for a variable of a layer: it has a shape and accepts any value."""

    def __init__(self, layer: keras.layers.Layer, attribute: str, value: Any):
        self.layer, self.attribute, self.value = layer, attribute, value

    @property
    def shape(self) -> tuple[int, ...]:
        return shape_of(self.layer, self.attribute)

    dtype = "float32"

    def assign(self, value: Any) -> None:
        if isinstance(value, _Unknown) and value.loader is not None:
            value.loader.assigned(self, value.names)

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return np.broadcast_to(np.float32(0), self.shape)  # for code that computes one variable from another


class _View:
    """A read-only view of a layer: its variables are slots and its sublayers are views."""

    def __init__(self, layer: keras.layers.Layer):
        vars(self)["_layer"] = layer

    @property  # type: ignore[misc]  # for `isinstance`
    def __class__(self) -> Any:
        return _plain_class(vars(self)["_layer"])

    def __getattr__(self, name: str) -> Any:
        layer = vars(self)["_layer"]
        plain = view_of(layer, layer.base_class) if isinstance(layer, AdaptedContainer) else layer
        if not layer.built and (name == "build" or not hasattr(plain, name)):  # it is not part of this model
            return _Unknown()
        if name == "weights":
            return [_Slot(layer, attribute_of(layer, each), each) for each in keras_internals.own_variables(layer)]
        value = getattr(plain, name)
        if isinstance(value, keras.Variable) or (
            _is_tensor(value) and name in {each.kernel_name for each in maps_of(layer)}
        ):
            return _Slot(layer, name, value)
        return _shown(value)

    def __setattr__(self, name: str, value: Any) -> None:
        """Ignore the assignment."""


def _is_tensor(value: Any) -> bool:
    return keras.ops.is_tensor(value) or isinstance(value, np.ndarray)


def _called(method: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a method of a layer, unless it computes with variables: what the converter assigns is ignored anyway."""
    if any(isinstance(each, _Unknown) for each in (*args, *kwargs.values())):
        return _Unknown()
    return method(*args, **kwargs)


def _shown(value: Any) -> Any:
    if type(value) is _View:
        return value
    if isinstance(value, keras.layers.Layer):
        return _View(value)
    if isinstance(value, (list, tuple)):
        return type(value)(map(_shown, value))
    if isinstance(value, dict):
        return {key: _shown(each) for key, each in value.items()}
    if inspect.ismethod(value) or inspect.isfunction(value):
        return lambda *args, **kwargs: _shown(_called(value, *args, **kwargs))
    return value
