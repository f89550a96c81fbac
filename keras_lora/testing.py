"""Checks for your own layers and methods: they run what you registered and raise an error if a result is wrong.

The main check is the rule that `keras_lora.linear_map` defines: the adapted layer must give the same outputs as a plain
layer with the changed kernel.
"""

from __future__ import annotations

import math
import os
import tempfile
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_lora import adapters
from keras_lora.applying import apply_lora, remove_lora
from keras_lora.files.saving import load_adapter, save_adapter
from keras_lora.merging import merge_lora, unmerge_lora
from keras_lora.swap.adapted import maps_by_address, maps_of, named_adapters
from keras_lora.switching import activate_adapters


def check_layer(
    layer: keras.layers.Layer,
    *inputs: Any,
    methods: tuple[Any, ...] = ("lora", "dora"),
    tolerance: float = 1e-5,
    **call: Any,
) -> dict[str, float]:
    """Check, by running it, that a registered layer gives correct results with every method.

    For each method:

    - a new adapter changes nothing;
    - with changed adapter weights and another strength, the outputs equal those of a plain layer with the changed kernels;
    - merging gives the same outputs;
    - removing the adapter, or a second layer made from the config, gives the original outputs.

    The layer is restored afterwards.

    Args:
        layer: A built layer of a class that `keras_lora.register_layer` knows.
        *inputs, **call: The arguments to call it with.
        methods: The methods to check, each as the `adapter` of `keras_lora.apply_lora`.
        tolerance: The largest difference allowed, relative to the largest output if that exceeds one; for float32.

    Returns:
        The largest difference measured, by method.

    Raises:
        AssertionError: The layer gives a wrong result. The message names what was compared.
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
            # Not 1, to catch a method that ignores its strength.
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


def check_adapter(adapter: adapters.Adapter, *, tolerance: float = 1e-5) -> dict[str, float]:
    """Check your own method by running it on every kind of layer that it can change.

    On each layer it checks:

    - everything that `check_layer` checks, with all saved weights changed, frozen ones too;
    - the parameter counts that the method reports;
    - a second adapter on the same layer;
    - an adapter file and a `.keras` file, which must give the same outputs.

    Every kind of layer that `problem_with` refuses is skipped; at least one must remain.

    Args:
        adapter: An instance of a class that `keras_lora.register_adapter` knows.
        tolerance: The largest difference allowed, relative to the largest output if that exceeds one; for float32.

    Returns:
        The largest difference measured, by kind of layer.

    Raises:
        AssertionError: A result is wrong. The message names what was compared.
        ValueError: The class is not registered, or its `problem_with` refuses every kind of layer.

    Example:

    >>> import keras_lora
    >>> seen = keras_lora.testing.check_adapter(keras_lora.LoRA(rank=2))
    >>> sorted(seen)
    ['conv', 'dense', 'depthwise', 'einsum', 'embedding', 'experts', 'tied_embedding']
    """
    if type(adapter) not in adapters.TABLE.values():
        raise ValueError(
            f"`check_adapter` needs an adapter of a registered class. Received: {type(adapter).__name__}. Put "
            "`@keras_lora.register_adapter(name)` before its class."
        )
    seen = {}
    for kind, (layer, x, call) in _layers().items():
        layer(ops.convert_to_tensor(x), **call)
        maps = [linear for linear in maps_of(layer) if linear.part == ""]
        if any(adapter.problem_with(linear) is not None for linear in maps):
            continue
        seen[kind] = _check_method(layer, adapters.copy_of(adapter), type(adapter).__name__, (x,), call, tolerance)
        _check_counts(layer, adapters.copy_of(adapter))
        if not call:
            _check_files(layer, x, adapters.copy_of(adapter), tolerance)
    if not seen:
        raise ValueError(f"{type(adapter).__name__} refuses every kind of layer. Expected one that it can change.")
    return seen


def _layers() -> dict[str, tuple[Any, np.ndarray, dict[str, Any]]]:
    """A layer of each kind that a method can meet, with an input and its call arguments."""
    rng, layers = np.random.default_rng(0), keras.layers
    ids = rng.integers(0, 9, (2, 5)).astype("int32")

    def numbers(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype("float32")

    return {
        "dense": (layers.Dense(5, activation="relu"), numbers(3, 4, 6), {}),
        "einsum": (layers.EinsumDense("abc,cde->abde", (None, 3, 4), bias_axes="de"), numbers(2, 5, 6), {}),
        "experts": (layers.EinsumDense("ebd,edh->ebh", (None, 7)), numbers(3, 5, 6), {}),
        "conv": (layers.Conv2D(6, 3, groups=2, data_format="channels_last"), numbers(2, 6, 5, 4), {}),
        "depthwise": (layers.DepthwiseConv2D(3, data_format="channels_last"), numbers(2, 6, 5, 4), {}),
        "embedding": (layers.Embedding(9, 6), ids, {}),
        "tied_embedding": (layers.ReversibleEmbedding(9, 6), numbers(2, 5, 6), {"reverse": True}),
    }


def _check_counts(layer: Any, adapter: adapters.Adapter) -> None:
    """Check that the parameter counts that a method reports are correct."""
    apply_lora(layer, adapter, targets=lambda each: True)
    try:
        ((linear, made),) = named_adapters(layer)["default"].values()
        held = sum(math.prod(v.shape) for v in made.weights) - 1  # without the strength
        trained = sum(math.prod(v.shape) for v in made.trainable_variables)
        said = made.parameter_count(linear.matrix_shape), made.size(linear.matrix_shape)
        if said != (trained, held):
            raise AssertionError(
                f"{type(made).__name__} for a matrix {linear.matrix_shape}: `parameter_count` and `size` are {said}; it has "
                f"{trained} numbers that train, of {held}."
            )
    finally:
        remove_lora(layer)


def _check_files(layer: Any, x: np.ndarray, adapter: adapters.Adapter, tolerance: float) -> None:
    """Check that a model with the adapter and a LoRA gives the same outputs after loading it from both kinds of file."""
    keras.utils.clear_session()
    config, weights = layer.get_config(), layer.get_weights()

    def model() -> Any:
        inputs = keras.Input(x.shape[1:], batch_size=x.shape[0], dtype=x.dtype.name)
        made = type(layer).from_config(config)
        whole = keras.Model(inputs, made(inputs))
        made.set_weights(weights)
        return whole

    def moved(whole: Any, method: Any, name: str, number: int) -> None:
        apply_lora(whole, method, targets=lambda each: bool(maps_of(each)), name=name)
        for _, each in named_adapters(whole)[name].values():
            _move(each, number)

    def run(whole: Any) -> np.ndarray:
        return np.asarray(whole.predict(x, verbose=0), "float64")

    name, whole = type(adapter).__name__, model()
    moved(whole, adapter, "own", 1)
    alone = run(whole)
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "own.safetensors")
        save_adapter(whole, file, name="own")
        if np.abs(run(load_adapter(model(), file)) - alone).max() > tolerance:
            raise AssertionError(f"{name} on {type(layer).__name__}: an adapter file gives other outputs.")
        moved(whole, "lora", "beside", 2)
        activate_adapters(whole, {"own": 0.75, "beside": -0.5})
        both = run(whole)
        whole.save(os.path.join(folder, "both.keras"))
        found = run(keras.saving.load_model(os.path.join(folder, "both.keras")))
        if np.abs(found - both).max() > tolerance:
            raise AssertionError(f"{name} on {type(layer).__name__}: a `.keras` file gives other outputs.")
        if np.abs(run(merge_lora(whole)) - both).max() > tolerance * max(1.0, np.abs(both).max()):
            raise AssertionError(f"{name} on {type(layer).__name__}: merged with a LoRA it gives other outputs.")


def _move(adapter: adapters.Adapter, number: int) -> None:
    """Change the saved weights of an adapter, frozen ones too, from their initial values."""
    rng = np.random.default_rng(number)
    for v in adapter.saved_weights.values():
        v.assign(ops.add(v.value, ops.convert_to_tensor(0.3 * rng.normal(size=tuple(v.shape)).astype("float32"))))
