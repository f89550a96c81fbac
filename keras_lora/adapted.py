"""The two things a layer of an adapted model becomes, and how they are written into a config and come back.

An **adapted layer** has an adapter. An **owner** holds layers that have variables: the model itself, a block, a
MultiHeadAttention. Keras rebuilds the insides of many owners from the owner's own config, which knows nothing of adapters,
and loses the flags of variables; so an owner's config carries one extra key that says how its insides were adapted.

Both are made by giving an existing object a subclass of its own class. That keeps its identity, name, variable paths,
graph nodes and `isinstance`, and reaches layers that no wrapper can, such as those inside MultiHeadAttention. The subclass
keeps the name of its base: weight files name the members of a list after their class.
"""

from __future__ import annotations

import contextlib
import functools
import random
import types
from typing import Any

import keras
import numpy as np

from keras_lora import adapters, keras_internals, quantization, training
from keras_lora.linear_map import LinearMap, seen_with
from keras_lora.structure import by_address, walk

#: The extra key in a config, and in the weights of an adapted layer.
KEY = "keras_lora"
_VERSION = 1
#: Set on an owner that was seen to rebuild from its config.
_REBUILDS = "_keras_lora_rebuilds"


class Owner:
    """What an owner has beside its own class: it remembers how its insides were adapted, and what trains."""

    base_class: type[keras.layers.Layer]

    @property
    def trainable(self) -> bool:
        """Whether anything in it may train. Switched off and on, an adapted model returns to what `apply_lora` set."""
        return super().trainable  # type: ignore[misc]

    @trainable.setter
    def trainable(self, value: bool) -> None:
        self.base_class.trainable.fset(self, value)
        if value:
            training.follow_plan(self)

    def get_config(self) -> dict[str, Any]:
        # Asked through a view of the base class: Keras compares classes and methods while it writes a config.
        config, description = seen_with(self, self.base_class).get_config(), describe(self)
        if not vars(self).get(_REBUILDS):
            _check_rebuilds(self, config, description)
            vars(self)[_REBUILDS] = True
        return {**config, KEY: description}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> Any:
        if KEY not in config:
            return super().from_config(config)  # type: ignore[misc]
        description = config[KEY]
        layer = _rebuilt({key: value for key, value in config.items() if key != KEY}, description, custom_objects)
        keras_internals.when_built(layer, lambda: restore(layer, description))
        return layer

    def __reduce__(self) -> tuple[Any, ...]:
        # Keras pickles a bound method of the class, and this class has no name to import it by.
        return keras_internals.model_from_bytes, (keras_internals.model_to_bytes(self),)


class ModelOwner(Owner):
    """An owner that is a model: what it was compiled with is saved and restored, optimizer included."""

    def save(self, *args: Any, **kwargs: Any) -> None:
        self.get_config()  # raises what is to be refused before Keras has emptied the old file
        super().save(*args, **kwargs)  # type: ignore[misc]

    def get_compile_config(self) -> dict[str, Any]:
        return _portable(super().get_compile_config())  # type: ignore[misc]

    def compile_from_config(self, config: dict[str, Any]) -> None:
        if not keras_internals.overrides_compile(self):
            return super().compile_from_config(config)  # type: ignore[misc]
        # KerasHub tasks: Keras would return with a warning here, and a resumed training would lose its optimizer.
        self.compile(**keras.saving.deserialize_keras_object(config))  # type: ignore[attr-defined]
        if self.built:  # type: ignore[attr-defined]
            self.optimizer.build(self.trainable_variables)  # type: ignore[attr-defined]


def _portable(config: Any) -> Any:
    """`config` with optimizers under their public name: on torch Keras writes a class that no other backend can run."""
    if not isinstance(config, dict):
        return config
    config = {key: _portable(value) for key, value in config.items()}
    if str(config.get("module")).startswith("keras.src.backend.") and ".optimizers." in config["module"]:
        config |= {"module": "keras.optimizers", "registered_name": None}
    return config


class AdaptedLayer(Owner):
    """What an adapted layer has beside its own class. Subclasses in `keras_lora/layers/` name their linear map.

    The frozen base comes first, then the adapter, then the layer's bias and activation.
    """

    linear_map_class: type[LinearMap]
    adapter: adapters.Adapter

    def __init__(
        self,
        *args: Any,
        rank: int | None = None,
        alpha: float | None = None,
        adapter: str | dict[str, Any] | adapters.Adapter = "lora",
        **kwargs: Any,
    ):
        method = adapters.copy_of(adapters.get(adapter, rank=rank, alpha=alpha))
        super().__init__(*args, **kwargs)
        set_adapter(self, method)
        keras_internals.when_built(self, self._freeze_base)

    def _freeze_base(self) -> None:
        training.freeze(walk(self), adapted=[self], trained=[self.adapter, *keras_internals.sublayers(self.adapter)])

    @property
    def linear_map(self) -> LinearMap:
        return self.linear_map_class(self)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        linear = self.linear_map
        y = linear.base_output(inputs)
        y = self.adapter.adapted_output(inputs, y, linear, training=training)
        return linear.finish(y)

    def quantized_call(self, inputs: Any, training: bool | None = None) -> Any:
        return self.call(inputs, training)

    def save_own_variables(self, store: Any) -> None:
        super().save_own_variables(store)  # type: ignore[misc]
        store[KEY] = np.array([_VERSION])  # a plain layer that meets this entry refuses the file; it would lose the adapter

    def load_own_variables(self, store: Any) -> None:
        super().load_own_variables({key: store[key] for key in store.keys() if key != KEY})  # type: ignore[misc]  # noqa: SIM118
        if self.adapter.built:
            self.adapter.base_changed(self.linear_map)

    def __repr__(self) -> str:
        return f"<LoRA{self.base_class.__name__} name={self.name}, adapter={type(self.adapter).__name__}>"  # type: ignore[attr-defined]


ADAPTED_CLASSES: dict[type, type[AdaptedLayer]] = {}


def register_layer(cls: type[AdaptedLayer]) -> type[AdaptedLayer]:
    """Enter `cls` as what layers of exactly the class `cls.linear_map_class.layer_class` become."""
    base = cls.linear_map_class.layer_class
    ADAPTED_CLASSES[base] = cls
    return _named_after(cls, base)


@functools.cache
def owner_class(base: Any) -> type:
    """The class of an owner whose own class is `base`."""
    refused = {name: _refusal(name) for name in ("save_to_preset", "export_to_transformers") if hasattr(base, name)}
    kind = ModelOwner if issubclass(base, keras.Model) else Owner
    return _named_after(types.new_class(base.__name__, (kind, base), exec_body=lambda body: body.update(refused)), base)


def _named_after(cls: Any, base: type) -> Any:
    cls.base_class, cls.__name__, cls.__module__ = base, base.__name__, __name__
    # One registered name for all of them: the loader needs only `from_config`, which finds the base class in the config.
    return keras.saving.register_keras_serializable(KEY, "Adapted")(cls)


def _refusal(name: str) -> Any:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        raise ValueError(
            f"`{name}` would write '{self.name}' without its adapters, in silence. Expected a plain model. Received: an "
            "adapted one. Call `keras_lora.merge_lora(model)` first, or keep the adapter apart with "
            "`keras_lora.save_adapter(model, path)`."
        )

    return refuse


# Changing a layer, and changing it back.


def set_adapter(layer: Any, adapter: adapters.Adapter) -> None:
    """Adapt `layer`. An adapter that has no weights yet gets them as soon as the layer has its own."""
    if not isinstance(layer, AdaptedLayer):
        _become(layer, ADAPTED_CLASSES[type(layer)])
        keras_internals.forget_call_signature(layer)
    with keras_internals.unlocked(layer):
        layer.adapter = adapter
    if not adapter.built:
        keras_internals.when_built(layer, lambda: start_adapter(layer, layer.linear_map, adapter))


def start_adapter(layer: keras.layers.Layer, linear: LinearMap, adapter: adapters.Adapter) -> None:
    """Create the weights of `adapter` for `layer`, named after the layer's own."""
    with contextlib.ExitStack() as scopes:
        for name in (layer.path or layer.name).split("/"):
            scopes.enter_context(keras.name_scope(name))
        adapter.start(linear)


def set_owners(model: keras.layers.Layer) -> None:
    """Make an owner of every layer at or below `model` that has a training mark and holds other layers."""
    for place in walk(model):
        layer = place.layer
        plain = not isinstance(layer, (Owner, adapters.Adapter))
        if plain and training.MARK in vars(layer) and keras_internals.sublayers(layer):
            cls: Any = type(layer)
            _become(layer, owner_class(cls))


def set_plain(layer: Any) -> None:
    """Give one adapted layer or owner its own class back; an adapted layer loses its adapter."""
    if isinstance(layer, AdaptedLayer):
        keras_internals.forget_sublayer(layer, "adapter")
    if isinstance(layer, Owner):
        vars(layer).pop(_REBUILDS, None)
        _become(layer, layer.base_class)
        keras_internals.forget_call_signature(layer)


def adapted_layers(model: keras.layers.Layer) -> dict[str, AdaptedLayer]:
    """The adapted layers at or below `model`, by address."""
    return {place.address: place.layer for place in walk(model) if isinstance(place.layer, AdaptedLayer)}


def _become(layer: keras.layers.Layer, cls: type) -> None:
    """The only assignment to a class in this package."""
    layer.__class__ = cls


# Into a config and back.


def describe(owner: Any) -> dict[str, Any]:
    """What the config of `owner`, an owner or an adapted layer, says beside its own arguments; plain data."""
    description: dict[str, Any] = {
        "version": _VERSION,
        "base": keras_internals.public_name(owner.base_class),
        "build_config": owner.get_build_config(),
        "adapters": {},
        "quantized": {},
        "training": training.marks_of(owner),
    }
    for place in walk(owner):
        if isinstance(place.layer, AdaptedLayer):
            description["adapters"][place.address] = keras.saving.serialize_keras_object(place.layer.adapter)
        if (quantized := quantization.describe(place.layer)) is not None:
            description["quantized"][place.address] = quantized
    return description


def restore(owner: keras.layers.Layer, description: dict[str, Any]) -> None:
    """Adapt `owner`, just rebuilt from its own config, as `description` says. What is so already is left as it is."""
    layers = by_address(owner)
    _check_addresses(owner, layers, description)
    for address, quantized in description["quantized"].items():
        _when_built(layers[address], quantization.quantize_again, layers[address], quantized)
    for address, config in description["adapters"].items():
        if not isinstance(layers[address], AdaptedLayer):
            set_adapter(layers[address], adapters.get(config))
    holder = owner
    for place in walk(owner):
        if not isinstance(place.layer, adapters.Adapter):
            holder = place.layer  # an adapter follows the layer it belongs to, and has its weights once that is built
        if place.address in description["training"]:
            _when_built(holder, functools.partial(training.mark, place.layer, **description["training"][place.address]))
    set_owners(owner)
    keras_internals.track_torch_parameters(owner)


def _when_built(layer: keras.layers.Layer, function: Any, *args: Any) -> None:
    keras_internals.when_built(layer, functools.partial(function, *args))


def _rebuilt(config: dict[str, Any], description: dict[str, Any], custom_objects: dict[str, Any] | None) -> Any:
    """The plain object that `config` describes."""
    whole = {**description["base"], "config": config, "build_config": description["build_config"]}
    return keras.saving.deserialize_keras_object(whole, custom_objects=custom_objects)


def _check_rebuilds(owner: Any, config: dict[str, Any], description: dict[str, Any]) -> None:
    """Refuse to save an owner whose class, rebuilt from its config, has other layers than this one: it would load wrong.

    Classes of Keras and KerasHub are trusted; a user's class is rebuilt once, in memory, and compared.
    """
    if owner.base_class.__module__.partition(".")[0] in ("keras", "keras_hub"):
        return
    layers = by_address(owner)
    classes = {type(layer).__name__: getattr(layer, "base_class", type(layer)) for layer in layers.values()}
    own = {name: cls for name, cls in classes.items() if cls.__module__.partition(".")[0] not in ("keras", "keras_hub")}
    state = random.getstate()  # Keras draws the seeds of new layers from it
    try:
        copy = _rebuilt(config, description, own)
    except Exception as error:
        raise ValueError(
            f"'{owner.name}' cannot be saved: its class {type(owner).__name__} cannot be rebuilt from its own config "
            f"({error}). Expected a `get_config` that says all that the constructor needs."
        ) from error
    finally:
        random.setstate(state)
    found = {address: _fingerprint(layer) for address, layer in by_address(copy).items()}
    wrong = [
        f"{address or 'itself'} ({type(layer).__name__})"
        for address, layer in layers.items()
        if address in description["training"] and not isinstance(layer, adapters.Adapter)
        # A layer that Keras builds only when it is called has no variables to compare yet.
        if found.get(address) not in (_fingerprint(layer), (type(layer).__name__, None))
    ]
    if copy.built and wrong:
        raise ValueError(
            f"'{owner.name}' cannot be saved: rebuilt from its config, a {type(owner).__name__} has other layers than this "
            f"one. Expected a `get_config` that says all that the constructor needs. Received: nothing, or other variables, "
            f"at {wrong}. Write `get_config`, or keep the adapter apart with `keras_lora.save_adapter`."
        )


def _fingerprint(layer: keras.layers.Layer) -> tuple[str, list[tuple[int, ...]] | None]:
    shapes = [tuple(v.shape) for v in keras_internals.own_variables(layer)] if layer.built else None
    return type(layer).__name__, shapes


def _check_addresses(owner: keras.layers.Layer, layers: dict[str, Any], description: dict[str, Any]) -> None:
    needed = {*description["quantized"], *description["adapters"]}
    missing = sorted(address for address in needed if address not in layers)
    if missing:
        raise ValueError(
            f"'{owner.name}' cannot be restored as it was saved: rebuilt from its config, it has no layer at {missing}. "
            f"Expected a class whose `get_config` says all that its constructor needs. Received: class "
            f"{type(owner).__name__}, with layers at {sorted(layers)}."
        )
