"""Where a layer keeps its adapters: in slots, attributes named after the kernel they change.

The first adapter of a kernel is in the slot `adapter` (`kernel_adapter` if the layer has several kernels), the next in
`adapter_2`. So the name you give an adapter never appears in the keys of a file.
"""

from __future__ import annotations

import contextlib
import itertools
import math

import keras

from keras_lora import adapters
from keras_lora.compat import devices, keras_internals
from keras_lora.linear_map import LinearMap
from keras_lora.swap import kernels
from keras_lora.swap.addresses import forget_walks

#: The change of a kernel: one adapter, or several.
Change = adapters.Adapter | adapters.Sum
#: An adapter may have this many numbers (a gigabyte), or 100 times those of its kernel. No useful rank needs more.
_MOST = 2**28


def adapters_in(layer: keras.layers.Layer) -> list[adapters.Adapter]:
    """Return the adapters of a layer, in the order they were added."""
    return [each for each in keras_internals.sublayers(layer) if isinstance(each, adapters.Adapter)]


def adapters_of(linear: LinearMap) -> list[adapters.Adapter]:
    """Return the adapters of a kernel, in the order they were added."""
    return [each for each in adapters_in(linear.layer) if each.part == linear.part]


def change_of(linear: LinearMap) -> Change | None:
    """Return the change of a kernel, or `None` if it has no adapter."""
    return _sum(adapters_of(linear))


def change_in_call(linear: LinearMap) -> Change | None:
    """Return the change of a kernel for a call, without the adapters that are off, or `None` if there is none."""
    return _sum([each for each in adapters_of(linear) if not each.off])


def _sum(found: list[adapters.Adapter]) -> Change | None:
    return adapters.Sum(found) if len(found) > 1 else found[0] if found else None


def put(linear: LinearMap, adapter: adapters.Adapter, name: str, slot: str | None = None) -> None:
    """Give a kernel an adapter under a name, in the first free slot or in `slot`."""
    adapter.adapter_name, adapter.part = name, linear.part
    with keras_internals.unlocked(linear.layer):
        setattr(linear.layer, slot or _free_slot(linear), adapter)
    forget_walks()


def start(linear: LinearMap, adapter: adapters.Adapter) -> None:
    """Create the weights of `adapter` for a kernel of a layer, named after the layer and, if there are several, the slot."""
    layer = linear.layer
    devices.check(layer)
    slot = slot_of(layer, adapter) or _free_slot(linear)
    names = [*(layer.path or layer.name).split("/"), *filter(None, (linear.part, slot if slot != linear.slot else ""))]
    with contextlib.ExitStack() as scopes:
        for name in names:
            scopes.enter_context(keras.name_scope(name))
        scopes.enter_context(adapters.at_most(max(_MOST, 100 * math.prod(linear.matrix_shape))))
        adapter.add_strength()
        adapter.create_for(linear)


def take(linear: LinearMap, adapter: adapters.Adapter) -> None:
    """Remove an adapter from a kernel. If it was the last one, the kernel gets back the dtype that it was found in.

    Its strength becomes 0, so that functions already compiled, of a larger model that contains the layer, run without it.
    """
    if adapter.built:
        adapter.strength.assign(0.0)
    keras_internals.forget_sublayer(linear.layer, slot_of(linear.layer, adapter) or "")
    forget_walks()
    if not adapters_of(linear):
        kernels.restore_found([linear])


def set_strength(layer: keras.layers.Layer, slot: str, strength: float) -> None:
    """Set the strength of the adapter in a slot."""
    getattr(layer, slot).strength.assign(strength)


def slot_of(layer: keras.layers.Layer, adapter: adapters.Adapter) -> str | None:
    """Return the attribute of `layer` that contains `adapter`, or `None`."""
    return next((name for name, value in keras_internals.attributes_of(layer).items() if value is adapter), None)


def _free_slot(linear: LinearMap) -> str:
    slots = (linear.slot if number == 1 else f"{linear.slot}_{number}" for number in itertools.count(1))
    return next(slot for slot in slots if not hasattr(linear.layer, slot))
