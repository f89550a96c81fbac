"""`register_layer`: make your own layers adaptable."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import keras

from keras_lora.layers.changed_kernel import ChangedKernelLayer
from keras_lora.layers.factored import BankMap, FactoredLayer
from keras_lora.linear_map import LinearMap
from keras_lora.swap.adapted import AdaptedLayer, adapted_class, enter_layer


def register_layer(
    layer_class: type[keras.layers.Layer] | None = None,
    *,
    like: type[keras.layers.Layer] | None = None,
    kernels: Mapping[str, str] | None = None,
    factored: bool = False,
    by_default: bool | None = None,
) -> Any:
    """Describe the kernels of your own layer class so that `apply_lora` can adapt its layers. Usable as a decorator.

    Register the class next to its definition, because the process that loads an adapted model needs it too. Then call
    `keras_lora.testing.check_layer(layer, inputs)`, which checks that the adapted layer computes with `W + ΔW`.

    Args:
        layer_class: The class. Layers of its subclasses are not included.
        like: A known class that computes the same sum, such as `keras.layers.Dense` for a subclass of `Dense`. Bias and
            activation may differ from those of the parent only through the attributes `bias` and `activation`.
        kernels: The attributes that contain kernels, and one letter per kernel axis: `i` is summed over, `o` is in the
            output, `g` is in both (one matrix per entry, as for experts). `{"w": "io"}` is a matrix. The layer's original
            code then runs with `W + ΔW` instead of the kernels.
        factored: The layer uses these kernels only in `ops.einsum(equation, x, kernel)` or `ops.matmul(x, kernel)`, with
            `from keras import ops`. The change is then computed as two thin products, and ΔW is never formed.
        by_default: Whether `apply_lora` adapts such a layer when no targets are given. Defaults to the value for `like`, or
            `True`.

    Returns:
        The class, or a decorator if no class was given.

    Raises:
        ValueError: The class is already known, or not exactly one of `like` and `kernels` was given, or axes contain other
            letters.
        TypeError: `layer_class` is not a Keras layer class, or `factored=True` and its code does not call `ops`.

    Example:

    >>> import keras, keras_lora
    >>> @keras_lora.register_layer(kernels={"w": "io"})
    ... class Scores(keras.layers.Layer):
    ...     def build(self, shape):
    ...         self.w = self.add_weight(shape=(shape[-1], 3), name="w")
    ...
    ...     def call(self, x):
    ...         return keras.ops.tanh(x @ self.w)
    >>> model = keras.Sequential([keras.Input((8,)), Scores(), keras.layers.Dense(2)])
    >>> [v.path.split("/")[-1] for v in keras_lora.apply_lora(model, rank=1).trainable_variables]
    ['lora_a', 'lora_b']
    """
    if layer_class is None:
        return _decorator(like=like, kernels=kernels, factored=factored, by_default=by_default)
    if not (isinstance(layer_class, type) and issubclass(layer_class, keras.layers.Layer)):
        raise TypeError(f"`layer_class` must be a class of Keras layers. Received: {layer_class!r}.")
    if adapted_class(layer_class) is not None:
        raise ValueError(f"{layer_class.__name__} is known already. Expected a class that was not registered before.")
    if (like is None) == (kernels is None):
        raise ValueError(
            f"Exactly one of `like` and `kernels` says what {layer_class.__name__} computes. Received: {like=}, {kernels=}."
        )
    behaviour, maps = (
        _behaviour_like(layer_class, like) if like is not None else _behaviour_of(layer_class, kernels or {}, factored)
    )
    for each in maps if by_default is not None else ():
        each.by_default = bool(by_default)
    # A class of this name, made of the adapted class and the original class, like the classes written out in `layers/`.
    enter_layer(type(layer_class.__name__, (behaviour, layer_class), {"linear_maps": maps}))
    return layer_class


def _decorator(**arguments: Any) -> Callable[[type], type]:
    return lambda layer_class: register_layer(layer_class, **arguments)


def _behaviour_like(layer_class: type, like: type) -> tuple[type[AdaptedLayer], tuple[type[LinearMap], ...]]:
    known = adapted_class(like)
    if known is None or not issubclass(layer_class, like):
        raise ValueError(
            f"`like` must be a known class, and a parent of {layer_class.__name__}. Received: like={like!r}. Name its "
            "`kernels` instead."
        )
    maps = tuple(type(each.__name__, (each,), {"layer_class": layer_class}) for each in known.linear_maps)
    # The adapted behaviour of `like` without `like`: the classes before it in the method resolution order.
    behaviours = [each for each in known.__mro__[1:] if issubclass(each, AdaptedLayer)]
    body = {"call": vars(known)["call"]} if "call" in vars(known) else {}
    return type(known.__name__, (behaviours[0],), {"linear_maps": maps, **body}), maps


def _behaviour_of(
    layer_class: type, kernels: Mapping[str, str], factored: bool
) -> tuple[type[AdaptedLayer], tuple[type[LinearMap], ...]]:
    maps = tuple(_stated_map(layer_class, name, axes, factored) for name, axes in kernels.items())
    if not maps:
        raise ValueError(f"`kernels` names no attribute of {layer_class.__name__}. Expected at least one.")
    return (FactoredLayer if factored else ChangedKernelLayer), maps


def _stated_map(layer_class: type, name: str, axes: str, factored: bool) -> type[LinearMap]:
    if not set(axes) <= set("gio") or "i" not in axes or "o" not in axes:
        raise ValueError(
            f"The axes of '{name}' must be given by one letter each, `i` (summed over), `o` (of the output) or `g` (of "
            f"both), with at least one `i` and one `o`. Received: {axes!r}."
        )
    body: dict[str, Any] = {"layer_class": layer_class, "kernel_name": name, "part": name.strip("_")}
    if factored:
        return type("BankMap", (BankMap,), {**body, "stated_axes": axes})
    reason = f"the code of {layer_class.__name__} runs with the whole changed kernel"
    return type("KernelMap", (LinearMap,), {**body, "kernel_axes": axes, "no_dropout": reason, "no_examples": reason})
