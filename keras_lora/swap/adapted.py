"""Adapted layers and adapted containers, and how they are saved in a config and restored.

An **adapted layer** has an adapter. An **adapted container** contains layers that have variables: the model itself, a
block, a MultiHeadAttention. Keras rebuilds the inner layers of many containers from the container's config, which does not
include adapters or the flags of variables. So the config of a container has one extra key that describes its adapters.

Both are made by changing the class of an existing object to a subclass. That keeps its identity, name, variable paths,
graph nodes and `isinstance`, and works for layers that no wrapper can reach, such as those inside MultiHeadAttention. The
subclass keeps the name of its base: weight files name the members of a list by their class.
"""

from __future__ import annotations

import functools
import importlib
import types
from typing import Any

import keras
import numpy as np

from keras_lora import adapters
from keras_lora.compat import devices, keras_internals, quantization
from keras_lora.linear_map import LinearMap, view_of
from keras_lora.swap import beside, flags, kernels, rebuilding, refusals, slots, training_state
from keras_lora.swap.addresses import by_address, walk
from keras_lora.swap.kernel_property import ChangedKernel

#: The extra key in a config, and in the weights of an adapted layer.
KEY = "keras_lora"
_VERSION = 2
#: Set on a container once it is known to rebuild from its config.
_REBUILDS = "_keras_lora_rebuilds"
#: Set on a container that stays one without adapters, because only its config tells how kernels in it are stored.
_TELLS_STORED = "_keras_lora_tells_stored"


class AdaptedContainer:
    """Mixin for containers: it remembers which inner layers are adapted and which variables train."""

    base_class: type[keras.layers.Layer]

    @property
    def trainable(self) -> bool:
        """Whether the layer trains. Setting it to `False` and back to `True` restores the flags that `apply_lora` set."""
        return bool(super().trainable)  # type: ignore[misc]

    @trainable.setter
    def trainable(self, value: bool) -> None:
        floats = keras_internals.with_floats_only(self)  # the codes of a kernel never train
        self.base_class.trainable.fset(view_of(self, self.base_class, **floats) if floats else self, value)
        keras_internals.set_own_trainable(self, bool(value))
        if value:
            flags.follow_plan(self)

    def as_base(self) -> Any:
        """A view of this layer as its original class: Keras compares classes and methods while it writes a config."""
        return view_of(self, self.base_class, **quantization.as_float(self))

    def get_config(self) -> dict[str, Any]:
        config, description = self.as_base().get_config(), describe(self)
        if not vars(self).get(_REBUILDS):
            rebuilding.check_rebuilds(self, config, description)
            vars(self)[_REBUILDS] = True
        return {**config, KEY: description}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> Any:
        if KEY not in config:
            return super().from_config(config)  # type: ignore[misc]
        description = config[KEY]
        rebuilding.check_description(description, _VERSION)
        layer = rebuilding.rebuilt({key: value for key, value in config.items() if key != KEY}, description, custom_objects)
        if {entry["address"] for entry in description["adapters"]} & {linear.part for linear in maps_of(layer)}:
            restore(layer, description)  # an adapted layer is adapted again before it is built
        else:
            keras_internals.when_built(layer, lambda: restore(layer, description))
        return layer

    def save_own_variables(self, store: Any) -> None:
        super().save_own_variables(store)  # type: ignore[misc]
        training_state.save_into(self, store)

    def load_own_variables(self, store: Any) -> None:
        super().load_own_variables(training_state.load_from(self, store))  # type: ignore[misc]

    def __reduce__(self) -> tuple[Any, ...]:
        # Keras pickles a bound method of the class, and this class has no name to import it by.
        return keras_internals.model_from_bytes, (keras_internals.model_to_bytes(self),)


class AdaptedModel(training_state.SavedTraining, AdaptedContainer):
    """A container that is a model: its files have what training needs, including the optimizer."""

    def make_train_function(self, *args: Any, **kwargs: Any) -> Any:
        devices.check_training(self)
        return super().make_train_function(*args, **kwargs)  # type: ignore[misc]


class AdaptedLayer(AdaptedContainer):
    """Mixin for adapted layers. Subclasses in `keras_lora/layers/` define their linear maps.

    The frozen base comes first, then the adapter, then the layer's bias and activation.
    """

    #: One for each kernel that can be adapted.
    linear_maps: tuple[type[LinearMap], ...]

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
        maps = maps_of(self)
        for linear in [each for each in maps if each.by_default] or maps:
            set_adapter(linear, adapters.copy_of(method))
        keras_internals.when_built(self, self._freeze_base)

    def _freeze_base(self) -> None:
        methods = [layer for adapter in slots.adapters_in(self) for layer in adapters.with_sublayers(adapter)]
        flags.freeze(walk(self), adapted=[self], trained=methods)
        keras_internals.track_torch_parameters(self)

    @property
    def linear_map(self) -> LinearMap:
        """The layer's only or main kernel as a linear map."""
        return self.linear_maps[0](self)

    def adapted_maps(self) -> list[tuple[LinearMap, slots.Change]]:
        """Return the changed kernels with their changes. Not a property, because Keras saves the values of properties."""
        return [(linear, change) for linear in maps_of(self) if (change := slots.change_of(linear)) is not None]

    def maps_in_call(self) -> list[tuple[LinearMap, slots.Change]]:
        """Return the kernels that a call has to change, with their changes."""
        return [(linear, change) for linear in maps_of(self) if (change := slots.change_in_call(linear)) is not None]

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        linear = self.linear_map
        change: Any = slots.change_in_call(linear)
        y = linear.base_output(inputs) if change is None else change.output(inputs, linear, training=training)
        return linear.finish(y)

    def quantized_call(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)

    def save_own_variables(self, store: Any) -> None:
        kernels.save_into(self, maps_of(self), store)
        training_state.save_into(self, store)
        if slots.adapters_in(self) or not quantization.waits(self):  # then a plain layer refuses the file
            store[KEY] = np.array([_VERSION])

    def load_own_variables(self, store: Any) -> None:
        rest = {key: each for key, each in training_state.load_from(self, store).items() if key != KEY}
        kernels.load_from(self, maps_of(self), rest)
        for linear, adapter in self.adapted_maps():
            if adapter.built:
                adapter.base_changed(linear)

    def __dir__(self) -> list[str]:
        # Keras's saving and loading read every attribute: a changed kernel would be computed for nothing.
        return [name for name in super().__dir__() if not isinstance(getattr(type(self), name, None), ChangedKernel)]

    def __repr__(self) -> str:
        methods = ", ".join(type(adapter).__name__ for adapter in slots.adapters_in(self))
        return f"<LoRA{self.base_class.__name__} name={self.name}, adapter={methods}>"  # type: ignore[attr-defined]


# The known layer types.

ADAPTED_CLASSES: dict[type, type[AdaptedLayer]] = {}
#: Modules that register the layer types of a package, imported when a layer of that package is first seen.
LATE_LAYERS: dict[str, str] = {}
#: Special adapted classes for containers of some classes; if several fit, the last one wins.
CONTAINER_KINDS: dict[type, type[AdaptedContainer]] = {keras.Model: AdaptedModel}


def enter_layer(cls: type[AdaptedLayer]) -> type[AdaptedLayer]:
    """Register `cls` as the adapted class for layers of exactly the class of its linear maps."""
    base = cls.linear_maps[0].layer_class
    ADAPTED_CLASSES[base] = cls
    for map_class in cls.linear_maps:
        if isinstance(getattr(base, map_class.kernel_name, None), property):
            setattr(cls, map_class.kernel_name, ChangedKernel(map_class))
    found: type[AdaptedLayer] = _named_after(cls, base)
    return found


def adapted_class(base: type) -> type[AdaptedLayer] | None:
    """Return the adapted class for layers of exactly the class `base`, or `None` if it is not known as a linear map."""
    package = base.__module__.partition(".")[0]
    if package in LATE_LAYERS:
        importlib.import_module(LATE_LAYERS.pop(package))
    return ADAPTED_CLASSES.get(base)


def maps_of(layer: keras.layers.Layer) -> list[LinearMap]:
    """Return the kernels of `layer` that can be adapted, as linear maps."""
    cls = type(layer) if isinstance(layer, AdaptedLayer) else adapted_class(getattr(layer, "base_class", type(layer)))
    return [] if cls is None else [each(layer) for each in cls.linear_maps if each.is_in(layer)]


@functools.cache
def container_class(base: Any) -> type:
    """Return the class of a container whose original class is `base`."""
    kind = next((kind for cls, kind in reversed(CONTAINER_KINDS.items()) if issubclass(base, cls)), AdaptedContainer)
    found: type = _named_after(types.new_class(base.__name__, (kind, base)), base)
    return found


def _named_after(cls: Any, base: type) -> Any:
    cls.base_class, cls.__name__, cls.__module__ = base, base.__name__, __name__
    refusals.add_refusals(cls, base)
    # One registered name for all containers: the loader needs only `from_config`, which finds the base class in the config.
    return keras.saving.register_keras_serializable(KEY, "Adapted")(cls)


# Changing a layer, and changing it back.


def set_adapter(
    linear: LinearMap, adapter: adapters.Adapter, name: str = adapters.Adapter.adapter_name, slot: str | None = None
) -> None:
    """Adapt a kernel of a layer. An adapter without weights gets them as soon as the layer is built.

    Args:
        linear: The kernel.
        adapter: The adapter.
        name: The name of the adapter in the model.
        slot: The attribute of the layer for the adapter; by default the first free one.
    """
    layer: Any = linear.layer
    _become_adapted(layer)
    slots.put(linear, adapter, name, slot)
    if not adapter.built:
        keras_internals.when_built(layer, lambda: slots.start(linear, adapter))


def set_containers(model: keras.layers.Layer) -> None:
    """Make an adapted container of every layer with a mark and sublayers, and change layers with a quantised way back."""
    for layer in by_address(model).values():
        if flags.MARK in vars(layer):
            _become_container(layer)
        use_frozen_product(layer)


def use_frozen_product(layer: keras.layers.Layer) -> None:
    """Make an adapted layer, without an adapter, of some quantised layers; it computes the same numbers."""
    # Keras gives the way back of an int8 embedding no gradient, and its files of calibrated layers are incomplete.
    if quantization.needs_class(layer) and maps_of(layer):
        _become_adapted(layer)


def tell_stored(model: keras.layers.Layer) -> None:
    """Let the files of a model without adapters tell how kernels are stored: its containers stay adapted ones."""
    for layer in by_address(model).values():
        if not isinstance(layer, AdaptedLayer) and _needs_telling(layer):
            _become_container(layer)
            vars(layer)[_TELLS_STORED] = True


def _needs_telling(layer: keras.layers.Layer) -> bool:
    # Keras rebuilds layers inside a MultiHeadAttention or a KerasHub model without their quantisers.
    return any(
        linear.stored
        or (quantization.mode_of(place.layer) and not keras_internals.rebuilds_each_layer(place.holder or layer))
        for place in walk(layer)
        for linear in maps_of(place.layer)
    )


def store_reduced(linear: LinearMap, word: str) -> None:
    """Store a kernel in fewer digits; its layer gets the class that reads them."""
    _become_adapted(linear.layer)
    kernels.store(linear, word)


def set_plain(layer: Any) -> None:
    """Restore the original class of one adapted layer or container; an adapted layer loses its adapter."""
    if isinstance(layer, AdaptedLayer):
        for linear in maps_of(layer):
            for adapter in slots.adapters_of(linear):
                slots.take(linear, adapter)
    if isinstance(layer, AdaptedContainer):
        vars(layer).pop(_REBUILDS, None)
        if any(linear.stored for linear in maps_of(layer)) or (vars(layer).get(_TELLS_STORED) and _needs_telling(layer)):
            return  # it needs the class to read its kernels, or to save how those in it are stored
        vars(layer).pop(_TELLS_STORED, None)
        _become(layer, layer.base_class)
        keras_internals.forget_call_signature(layer)


def adapted_maps(model: keras.layers.Layer) -> dict[str, tuple[LinearMap, slots.Change]]:
    """Return the adapted kernels at or below `model`, with their changes, by address (layer address and kernel part)."""
    pairs = {}
    for place in walk(model):
        if isinstance(place.layer, AdaptedLayer):
            for linear, change in place.layer.adapted_maps():
                pairs[address_of(place.address, linear)] = (linear, change)
    return pairs


def named_adapters(model: keras.layers.Layer) -> dict[str, dict[str, tuple[LinearMap, adapters.Adapter]]]:
    """Return, by adapter name, the adapters and kernels at or below `model` by address, in the order of the layers."""
    named: dict[str, dict[str, tuple[LinearMap, adapters.Adapter]]] = {}
    for place in walk(model):
        for linear in maps_of(place.layer) if isinstance(place.layer, AdaptedLayer) else ():
            for adapter in slots.adapters_of(linear):
                named.setdefault(adapter.adapter_name, {})[address_of(place.address, linear)] = (linear, adapter)
    return named


def address_of(layer_address: str, linear: LinearMap) -> str:
    """Return the address or path of a kernel: that of its layer, plus the part if the layer has several kernels."""
    return "/".join(each for each in (layer_address, linear.part) if each)


def maps_by_address(model: keras.layers.Layer) -> dict[str, LinearMap]:
    """Return every kernel at or below `model` that is or can be adapted, by address."""
    return {address_of(place.address, linear): linear for place in walk(model) for linear in maps_of(place.layer)}


def _become_adapted(layer: Any) -> None:
    if not isinstance(layer, AdaptedLayer):
        if getattr(vars(layer).get("call"), "__func__", None) is type(layer).call:  # left there by Keras's calibration
            del layer.call
        _become(layer, adapted_class(getattr(layer, "base_class", type(layer))))
        keras_internals.forget_call_signature(layer)


def _become_container(layer: Any) -> None:
    cls: Any = type(layer)
    if not issubclass(cls, (AdaptedContainer, adapters.Adapter)) and keras_internals.sublayers(layer):
        _become(layer, container_class(cls))


def _become(layer: keras.layers.Layer, cls: Any) -> None:
    """Change the class of `layer`. No other code in this package assigns to `__class__`."""
    layer.__class__ = cls


# Into a config and back.


def describe(owner: Any) -> dict[str, Any]:
    """Return the extra data for the config of `owner`, a container or adapted layer, as plain data."""
    description: dict[str, Any] = {
        "version": _VERSION,
        "base": keras_internals.public_name(owner.base_class),
        "build_config": owner.get_build_config(),
        "adapters": [],
        "base_dtypes": {},
        "quantized": {},
        "training": flags.marks_of(owner),
        "tells_stored": bool(vars(owner).get(_TELLS_STORED)),
        "beside": beside.describe(owner),
        "fixed_statistics": beside.describe_fixed(owner),
    }
    for place in walk(owner):
        if isinstance(place.layer, AdaptedLayer):
            maps = {linear.part: linear for linear in maps_of(place.layer)}
            stored = [linear for linear in maps.values() if linear.stored]
            description["base_dtypes"] |= {address_of(place.address, each): kernels.describe(each) for each in stored}
            for adapter in slots.adapters_in(place.layer):
                linear = maps[adapter.part]
                address = address_of(place.address, linear)
                description["adapters"].append(
                    {
                        "address": address,
                        "name": adapter.adapter_name,
                        "slot": slots.slot_of(place.layer, adapter),
                        "strength": adapters.strength_of(adapter) if adapter.built else 1.0,
                        "adapter": keras.saving.serialize_keras_object(adapter),
                    }
                )
        if (quantized := quantization.describe(place.layer)) is not None:
            description["quantized"][place.address] = quantized
    return description


def restore(owner: keras.layers.Layer, description: dict[str, Any]) -> None:
    """Adapt `owner`, just rebuilt from its config, as described in `description`. Parts already adapted stay unchanged."""
    layers, maps = by_address(owner), maps_by_address(owner)
    rebuilding.check_addresses(owner, layers, maps, description)
    for address, quantized in description["quantized"].items():
        _when_built(layers[address], quantization.quantize_again, layers[address], quantized)
        _when_built(layers[address], use_frozen_product, layers[address])
    for entry in description["adapters"]:
        linear = maps[entry["address"]]
        if not hasattr(linear.layer, entry["slot"]):
            set_adapter(linear, adapters.get(entry["adapter"]), entry["name"], entry["slot"])
        _when_built(linear.layer, slots.set_strength, linear.layer, entry["slot"], entry["strength"])
    for address, dtype in description.get("base_dtypes", {}).items():
        _when_built(maps[address].layer, store_reduced, maps[address], dtype)
    holder = owner
    for place in walk(owner):
        if not isinstance(place.layer, adapters.Adapter):
            holder = place.layer  # an adapter belongs to a layer and gets its weights once that layer is built
        if place.address in description["training"]:
            _when_built(holder, functools.partial(flags.mark, place.layer, **description["training"][place.address]))
    for address, names in description.get("beside", {}).items():
        for name, trains in names.items():
            statistics = name not in description.get("fixed_statistics", {}).get(address, [])
            _when_built(layers[address], beside.start, layers[address], name, trains, statistics)
    for layer in layers.values():
        if isinstance(layer, AdaptedLayer) and description["adapters"] and not description["training"]:  # saved unbuilt
            _when_built(layer, layer._freeze_base)
    if description.get("tells_stored"):
        _when_built(owner, tell_stored, owner)
    set_containers(owner)
    _when_built(owner, keras_internals.track_torch_parameters, owner)


def _when_built(layer: keras.layers.Layer, function: Any, *args: Any) -> None:
    keras_internals.when_built(layer, functools.partial(function, *args))
