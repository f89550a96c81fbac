"""Every use of a private Keras name, in one function each.

Every function documents why no public API works. All were checked on Keras 3.15. If Keras changes one of them,
`tests/test_keras_internals.py` fails first.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import itertools
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras


def sublayers(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """Return the layers that `layer` tracks, in order (`Model.layers` is public, but only models have it)."""
    return list(layer._flatten_layers(include_self=False, recursive=False))


def with_all_sublayers(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """Return `layer` and every layer that it tracks, at any depth (`Model.layers` has neither the model nor all depths)."""
    return list(layer._flatten_layers())


def attributes_of(layer: keras.layers.Layer) -> dict[str, Any]:
    """Return every attribute of `layer` by name; on torch, Keras keeps layers in torch's `_modules`."""
    return {**vars(layer), **vars(layer).get("_modules", {})}


def is_bookkeeping(attribute: str) -> bool:
    """Whether an attribute belongs to TensorFlow, which tracks the contents of a layer a second time."""
    return attribute.startswith("_self_")


def stored_under(layer: keras.layers.Layer, name: str) -> str:
    """Return the attribute in which `layer` stores its public variable `name`; `Dense.kernel` is a property."""
    return f"_{name}" if isinstance(getattr(type(layer), name, None), property) else name


def with_policy(policy: keras.DTypePolicy) -> dict[str, Any]:
    """Return the attribute for the dtype policy of a layer (the public one cannot be set on a built layer)."""
    return {"_dtype_policy": policy}


def policy_from_float32(layer: keras.layers.Layer) -> keras.DTypePolicy:
    """Return the policy of `layer` with the same quantisation in float32 (Keras tells them apart by their names)."""
    mode, quantized, _ = own_policy(layer).name.partition("_from_")
    found: keras.DTypePolicy = keras.dtype_policies.get(f"{mode}_from_float32" if quantized else "float32")
    return found


def float_policy(layer: keras.layers.Layer) -> keras.DTypePolicy:
    """Return the policy that a quantised `layer` had before (Keras keeps it in the name of the new one)."""
    found: keras.DTypePolicy = keras.dtype_policies.get(own_policy(layer).name.partition("_from_")[2])
    return found


def int4_block_size(layer: keras.layers.Layer) -> int | None:
    """Return the rows per group of an int4 layer; `None` or -1 if there is one scale per column (not public in Keras)."""
    return getattr(layer, "_int4_block_size", None)


def set_past_tracking(layer: keras.layers.Layer) -> dict[str, Any]:
    """Return the attributes that Keras did not track: on torch, those KerasHub sets on a model before its `__init__`."""
    theirs = (cls for cls in type(layer).__mro__ if cls.__module__.partition(".")[0] == "keras_hub")
    if keras.backend.backend() != "torch" or not any("__setattr__" in vars(cls) for cls in theirs):
        return {}
    early = itertools.takewhile(lambda name: name != "_layers", vars(layer))
    return {name: vars(layer)[name] for name in early if name != "_modules"}  # torch's dict of later attributes


#: Modules of Keras with classes whose `build` makes no weights, except those of sublayers.
_WITHOUT_WEIGHTS = (
    "keras.src.layers.core.wrapper",
    "keras.src.layers.layer",
    "keras.src.layers.merging",
    "keras.src.layers.preprocessing",
    "keras.src.layers.rnn.bidirectional",
    "keras.src.layers.rnn.time_distributed",
    "keras.src.models.sequential",
)


def makes_weights(layer: keras.layers.Layer) -> bool:
    """Whether the `build` of `layer` may make weights; Keras has no way to tell before the layer is built."""
    owner = next(cls for cls in type(layer).__mro__ if "build" in vars(cls))
    return not owner.__module__.startswith(_WITHOUT_WEIGHTS)


def has_run(layer: keras.layers.Layer) -> bool:
    """Whether the `call` of `layer` has run, so that every layer it uses is built (Keras records this privately)."""
    if getattr(layer, "outputs", None) or (layer.built and layer._called):
        return True
    # Keras builds a loaded model without a `build` by running its `call`.
    return layer.built and type(layer).build is keras.layers.Layer.build and bool(layer.weights)


def own_variables(layer: keras.layers.Layer) -> list[keras.Variable]:
    """Return the variables of `layer` without those of its sublayers, trainable ones first.

    `SpectralNormalization` tracks the kernel of the layer in it a second time.
    """
    own = [*layer._trainable_variables, *layer._non_trainable_variables]
    inside = layer._flatten_layers(include_self=False) if own and layer._layers else ()
    theirs = {id(v) for each in inside for v in (*each._trainable_variables, *each._non_trainable_variables)}
    return [v for v in own if id(v) not in theirs]


def variables_of(layers: Iterable[keras.layers.Layer]) -> list[keras.Variable]:
    """Return the own variables of these layers, each once; `weights` of a model lacks those that Keras does not track."""
    return list({id(v): v for layer in layers for v in own_variables(layer)}.values())


def own_trainable_variables(layer: keras.layers.Layer) -> list[keras.Variable]:
    """Return the direct variables that were created trainable, even if frozen now (so no BatchNormalization statistics)."""
    created = {id(v) for v in layer._trainable_variables}
    return [v for v in own_variables(layer) if id(v) in created]


def seed_generators(layer: keras.layers.Layer) -> list[keras.random.SeedGenerator]:
    """Return the random generators of `layer` itself; `layer.variables` has their states among those of all sublayers."""
    return list(layer._seed_generators)


def set_own_trainable(layer: keras.layers.Layer, value: bool) -> None:
    """Set the flag of one layer; the public setter also sets every layer and variable below it."""
    layer._trainable = value


@contextlib.contextmanager
def without_tensorflow() -> Iterator[None]:
    """Keep Keras from importing TensorFlow on another backend, which it does for every config to check for its types."""
    from keras.src.utils.module_utils import tensorflow

    before = tensorflow._available
    if keras.backend.backend() != "tensorflow" and "tensorflow" not in sys.modules:
        tensorflow._available = False
    try:
        yield
    finally:
        tensorflow._available = before


def called_first(method: str) -> str:
    """Return what to override to refuse a method of a layer: Keras wraps `quantize` of each layer when it is created."""
    return "_check_quantize_args" if method == "quantize" else method


@contextlib.contextmanager
def unlocked(layer: keras.layers.Layer) -> Iterator[None]:
    """Let `layer` take a new sublayer: Keras locks a built layer, and `enable_lora` unlocks it the same way."""
    locked = layer._tracker.locked
    layer._tracker.unlock()
    try:
        yield
    finally:
        if locked:
            layer._tracker.lock()


def forget_sublayer(layer: keras.layers.Layer, name: str) -> None:
    """Delete the sublayer `name`; plain `del` leaves it among the tracked layers."""
    sublayer = getattr(layer, name)
    with unlocked(layer):
        layer._tracker.untrack(sublayer)
        delattr(layer, name)


def forget_call_signature(layer: keras.layers.Layer) -> None:
    """Read the signature of `call` again: Keras reads it once, in the constructor, before the class was swapped."""
    layer._call_signature = inspect.signature(layer.call)
    layer.call_signature_parameters = list(layer._call_signature.parameters)
    layer._call_has_training_arg = "training" in layer.call_signature_parameters
    layer._call_has_mask_arg = "mask" in layer.call_signature_parameters
    layer._call_has_context_arg = {name: name in layer.call_signature_parameters for name in layer._call_context_args}


def track_torch_parameters(layer: keras.layers.Layer) -> None:
    """On torch, make `parameters()` and `state_dict()` list the current variables, as `Model.quantize` does."""
    if keras.backend.backend() == "torch":
        for each in layer._flatten_layers():
            each._track_variables()


def store_variable(
    variable: keras.Variable, dtype: str, autocast: bool = True, value: Any = None, shape: Any = None
) -> None:
    """Store `variable` in another dtype, in place: a new variable would change the order of the layer's weights.

    Without `autocast`, a called layer sees the variable in that dtype instead of its compute dtype. A `value` may have
    another shape; `shape` is that of a variable without a value.
    """
    if variable._value is None and value is None:  # of a model that is only planned
        variable._dtype, variable._autocast = dtype, autocast
        if shape is not None:
            variable._shape, variable._ndim = tuple(shape), len(shape)
            variable._initializer = keras.initializers.Zeros()  # the one it had may draw floats alone
        return
    value = keras.ops.convert_to_tensor(variable) if value is None else value
    value = keras.ops.cast(keras.ops.stop_gradient(value), dtype)
    variable._dtype, variable._autocast = dtype, autocast
    variable._initialize(value)
    variable._shape, variable._ndim = tuple(value.shape), len(value.shape)


def forget_variable(layer: Any, name: str) -> None:
    """Delete the variable `name`. Keras's own deletion runs the garbage collector each time: seconds for a large model."""
    layer._untrack_variable(vars(layer)[name])
    super(keras.layers.Layer, layer).__delattr__(name)


def without_variables(layer: Any, names: Iterable[str]) -> dict[str, Any]:
    """Return the attribute for a view of `layer` that Keras saves and loads without these non-trainable variables."""
    left_out = {id(vars(layer)[name]) for name in names}
    return {"_non_trainable_variables": [v for v in layer._non_trainable_variables if id(v) not in left_out]}


def with_floats_only(layer: Any) -> dict[str, Any]:
    """Return the attribute for a view of `layer` whose setter of `trainable` leaves out integers, which torch refuses.

    It is empty if there are none.
    """
    floats = [v for v in layer._trainable_variables if keras.backend.is_float_dtype(v.dtype)]
    return {} if len(floats) == len(layer._trainable_variables) else {"_trainable_variables": floats}


@contextlib.contextmanager
def when_any_is_built(then: Callable[[keras.layers.Layer], None]) -> Iterator[None]:
    """Inside, run `then(layer)` after the `build` of each layer that this thread builds (Keras has no hook for it)."""
    own, thread = vars(keras.layers.Layer).get("_post_build"), threading.get_ident()
    before = keras.layers.Layer._post_build

    def post_build(self: Any) -> None:
        before(self)
        if threading.get_ident() == thread:
            then(self)

    keras.layers.Layer._post_build = post_build
    try:
        yield
    finally:
        if own is None:
            del keras.layers.Layer._post_build
        else:
            keras.layers.Layer._post_build = own


def value_now(variable: keras.Variable) -> Any:
    """Return the value of a variable, or `None` if Keras gives it one later (the public `value` would draw one)."""
    return variable._value


def layout_of(variable: keras.Variable) -> Any:
    """Return the layout with which JAX created `variable`, or `None` if no distribution was set (there is no public way)."""
    return variable._layout


def set_layout(variable: keras.Variable, layout: Any) -> None:
    """Give a variable of JAX a layout: Keras takes it from the distribution, by path, and `add_weight` takes none."""
    variable._layout = layout
    if variable._value is not None:  # else it gets its value later, in this layout
        variable._direct_assign(variable._value)


def conv_lstm_cell() -> type[keras.layers.Layer]:
    """Return the class of the cells inside ConvLSTM layers, which Keras does not export."""
    from keras.src.layers.rnn.conv_lstm import ConvLSTMCell

    found: type[keras.layers.Layer] = ConvLSTMCell
    return found


def when_built(layer: keras.layers.Layer, then: Callable[[], None]) -> None:
    """Run `then` once `layer` is built: now, or right after its `build`, which Keras stores on the instance."""
    if layer.built:
        then()
        return
    build = layer.build
    waiting = [then]

    @functools.wraps(build)
    def build_then(*args: Any, **kwargs: Any) -> None:
        build(*args, **kwargs)
        while waiting:
            waiting.pop()()

    vars(layer)["build"] = build_then


def public_name(cls: type) -> dict[str, str | None]:
    """Return the name of `cls` in a `.keras` file, as `serialize_keras_object` would write it for an instance."""
    from keras.src.api_export import get_name_from_symbol

    exported = get_name_from_symbol(cls)
    if exported is not None:
        module, _, class_name = exported.rpartition(".")
        return {"module": module, "class_name": class_name, "registered_name": None}
    return {
        "module": None if cls.__module__ == "__main__" else cls.__module__,
        "class_name": cls.__name__,
        "registered_name": keras.saving.get_registered_name(cls),
    }


def model_to_bytes(model: keras.layers.Layer) -> bytes:
    """Return a whole `.keras` file as bytes; the public saver needs a path and accepts only models."""
    from keras.src.saving import saving_lib

    buffer = io.BytesIO()
    saving_lib._save_model_to_fileobj(model, buffer, "h5")
    return buffer.getvalue()


def model_from_bytes(data: bytes) -> Any:
    """The inverse of `model_to_bytes`. Like Keras's unpickling, it trusts the data."""
    from keras.src.saving import saving_lib

    return saving_lib._load_model_from_fileobj(io.BytesIO(data), custom_objects=None, compile=True, safe_mode=False)


def producer_of(tensor: keras.KerasTensor) -> tuple[keras.Operation, list[keras.KerasTensor]]:
    """Return the operation that made a symbolic tensor, and its input tensors (Keras has no public access to the graph)."""
    operation, node_index, _ = tensor._keras_history
    return operation, list(operation._inbound_nodes[node_index].input_tensors)


def is_called_in_reverse(layer: keras.layers.Layer) -> bool:
    """Whether a graph calls `layer` with `reverse=True` (Keras has no public list of calls)."""
    return any(node.arguments.kwargs.get("reverse") for node in layer._inbound_nodes)


def graph_of(layer: keras.layers.Layer) -> keras.Model | None:
    """Return the functional model that a `Sequential` runs (Keras hides it)."""
    return getattr(layer, "_functional", None)


def rebuilds_each_layer(layer: keras.layers.Layer) -> bool:
    """Whether the config of `layer` has those of its layers: a `Sequential` or functional model (whose class is private)."""
    from keras.src.models.functional import Functional

    return getattr(layer, "base_class", type(layer)) in (Functional, keras.Sequential)


def is_in_other_graphs(model: keras.layers.Layer) -> bool:
    """Whether a layer of `model` is also called in a graph that is no part of `model` (Keras has no list of graphs)."""
    from keras.src.ops.function import make_node_key

    layers = list(model._flatten_layers())
    graphs: list[Any] = [each for layer in layers for each in (layer, graph_of(layer)) if hasattr(each, "_nodes")]
    inside = {id(each) for graph in graphs for each in graph._operations} | {id(layer) for layer in layers}
    nodes = {key for graph in graphs for key in graph._nodes}
    return any(
        any(make_node_key(layer, number) not in nodes for number in range(len(layer._inbound_nodes)))
        or any(id(node.operation) not in inside for node in layer._outbound_nodes)
        for layer in layers
        if layer is not model
    )


def dequantize_groups(values: Any, scale: Any, zero: Any, group: Any, axis: int) -> Any:
    """Return the float values of an int4 tensor quantised in groups (Keras exports the quantiser, but not its inverse)."""
    from keras.src.quantizers import dequantize_with_sz_map

    return dequantize_with_sz_map(values, scale, zero, group, group_axis=axis)


def calibrated_bits(layer: keras.layers.Layer) -> int:
    """Return the bits a number of a GPTQ or AWQ layer takes; its policy, whose class is private, knows them."""
    return int(own_policy(layer).weight_bits)


def calibrated_config(layer: keras.layers.Layer) -> Any:
    """Return a config without data that gives a layer the GPTQ or AWQ variables that this one has."""
    policy = own_policy(layer)
    made = keras.quantizers.GPTQConfig if policy.quantization_mode == "gptq" else keras.quantizers.AWQConfig
    return made(None, None, weight_bits=policy.weight_bits, group_size=policy.group_size)


def own_policy(layer: keras.layers.Layer) -> Any:
    """Return the dtype policy of `layer` itself, where it is one of a map by path (Keras keeps this rule in its layers)."""
    policy = layer.dtype_policy
    return policy[layer.path] if isinstance(policy, keras.dtype_policies.DTypePolicyMap) else policy


def scale_in_kernel_layout(layer: keras.layers.EinsumDense, scale: Any) -> Any:
    """Return the int8 scale of an EinsumDense in the layout of its kernel (it is stored in the layout of the output)."""
    return layer._adjust_scale_for_dequant(scale)


def forget_enabled_lora(layer: Any) -> None:
    """Undo `layer.enable_lora`: its two variables are removed, and its kernel is the base again (Keras cannot undo it)."""
    for name in [name for name in vars(layer) if name.startswith("lora_") and isinstance(vars(layer)[name], keras.Variable)]:
        forget_variable(layer, name)
    layer.lora_enabled, layer.lora_rank, layer.lora_alpha = False, None, None


def forget_backbone_lora(model: keras.layers.Layer) -> None:
    """Clear KerasHub's list of layers that `backbone.enable_lora` changed, because `save_lora_weights` reads it."""
    for layer in model._flatten_layers():
        for name in ("_lora_enabled_layers", "_lora_rank"):
            if hasattr(layer, name):
                delattr(layer, name)


def layers_with_weights(model: keras.layers.Layer) -> list[keras.layers.Layer]:
    """Return the layers of `model` in the order in which KerasHub numbers them in `.lora.h5` files."""
    return [layer for layer in model._flatten_layers(include_self=False) if layer.weights]
