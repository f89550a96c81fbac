"""For a layer type of one's own: the law as a check that raises."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_lora import adapters
from keras_lora.applying import apply_lora, remove_lora
from keras_lora.merging import merge_lora, unmerge_lora
from keras_lora.swap.adapted import maps_by_address, maps_of, named_adapters


def check_layer(
    layer: keras.layers.Layer,
    *inputs: Any,
    methods: tuple[Any, ...] = ("lora", "dora"),
    tolerance: float = 1e-5,
    **call: Any,
) -> dict[str, float]:
    """Check that a layer is the linear map it is registered as, with every method, by running it.

    For each method: a fresh adapter changes nothing; with the adapter moved and at another strength, what runs equals the
    plain layer with the changed kernels in the place of its own; merging gives those same numbers; removing, and a second
    layer made from the config, give the layer as it was. The layer is as it was afterwards.

    Args:
        layer: A built layer of a class that `keras_lora.register_layer` knows.
        *inputs, **call: What it is called on.
        methods: Which methods, each as the `adapter` of `keras_lora.apply_lora`.
        tolerance: The largest difference allowed, relative to the largest output where that exceeds one; for float32.

    Returns:
        The largest difference seen, by method.

    Raises:
        AssertionError: The layer breaks the law, with what was compared.
        ValueError: The layer is not registered, or not built.

    Example:

    >>> import keras, keras_lora
    >>> class Wide(keras.layers.Dense):
    ...     "Computes what Dense does."
    >>> Wide = keras_lora.register_layer(Wide, like=keras.layers.Dense)
    >>> layer = Wide(3, activation="relu")
    >>> layer.build((None, 4))
    >>> seen = keras_lora.testing.check_layer(layer, keras.ops.ones((2, 4)))
    >>> max(seen.values()) < 1e-5
    True
    """
    if not layer.built or not maps_of(layer):
        raise ValueError(
            f"`check_layer` needs a built layer of a registered class. Received: '{layer.name}', a {type(layer).__name__}, "
            f"{'not registered' if layer.built else 'not built'}. Call `keras_lora.register_layer` on its class first, and "
            "the layer on its input."
        )
    seen = {}
    for method in methods:
        name = method if isinstance(method, str) else type(method).__name__
        seen[name] = _check_method(layer, method, name, inputs, call, tolerance)
    return seen


def _check_method(
    layer: keras.layers.Layer, method: Any, name: str, inputs: tuple[Any, ...], call: dict[str, Any], tolerance: float
) -> float:
    def run(each: Any) -> list[np.ndarray]:
        tensors = [ops.convert_to_tensor(x) for x in inputs]
        return [ops.convert_to_numpy(ops.cast(y, "float32")) for y in keras.tree.flatten(each(*tensors, **call))]

    def compare(found: list[np.ndarray], expected: list[np.ndarray], what: str) -> float:
        scale = max(1.0, *(float(np.abs(y).max()) for y in expected))
        worst = max(float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=True)) / scale
        if not worst <= tolerance:
            raise AssertionError(
                f"{type(layer).__name__} with {name}: {what} differ by {worst:.2g}; at most {tolerance:.2g} is right. "
                "Expected a layer that computes with its kernels what it was registered for, with axes as registered."
            )
        return worst

    before, weights = run(layer), layer.get_weights()
    twin = type(layer).from_config(layer.get_config())
    twin(*[ops.convert_to_tensor(x) for x in inputs], **call)
    twin.set_weights(weights)
    compare(run(twin), before, "a layer made from the config, and this one,")

    for linear in maps_of(twin):
        kernel = linear.kernel
        linear.kernel_variable.assign(ops.add(kernel, 1.0))
        if all(np.array_equal(a, b) for a, b in zip(run(twin), before, strict=True)):
            raise AssertionError(
                f"{type(layer).__name__}: its call does not use '{linear.kernel_name}': changing that kernel changes nothing"
            )
        linear.kernel_variable.assign(kernel)
    apply_lora(layer, method, targets=lambda each: True)
    try:
        fresh = compare(run(layer), before, "outputs with a fresh adapter, and without,")
        (found,) = named_adapters(layer).values()
        maps = maps_by_address(twin)
        for number, (address, (linear, adapter)) in enumerate(found.items()):
            _move(adapter, number)
            # Not 1, so that a method that forgets its strength is found.
            adapter.strength.assign(0.75)
            changed = linear.as_kernel(ops.add(linear.matrix, 0.75 * adapter.delta_kernel(linear.matrix)))
            maps[address].kernel_variable.assign(changed)
        expected = run(twin)
        worst = compare(run(layer), expected, "what runs, and the plain layer with the changed kernels,")
        merge_lora(layer, keep=True)
        merged = compare(run(layer), expected, "the merged layer, and the plain layer with the changed kernels,")
        unmerge_lora(layer)
    finally:
        if named_adapters(layer):
            remove_lora(layer)
        layer.set_weights(weights)
    compare(run(layer), before, "outputs after removing the adapter, and before,")
    return max(fresh, worst, merged)


def _move(adapter: adapters.Adapter, number: int) -> None:
    """Move the weights of an adapter away from their start."""
    rng = np.random.default_rng(number)
    for v in adapter.trainable_variables:
        v.assign(ops.add(v.value, ops.convert_to_tensor(0.3 * rng.normal(size=tuple(v.shape)).astype("float32"))))
