"""Every use of a Keras private name, one named function each.

Each says why no public way serves. All were checked on Keras 3.14 and 3.15; `tests/test_keras_internals.py` fails first
when Keras changes one of them.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import keras


def sublayers(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """The layers that `layer` tracks, in its own order (`Model.layers` is public, but only models have it)."""
    return list(layer._flatten_layers(include_self=False, recursive=False))


def attributes_of(layer: keras.layers.Layer) -> dict[str, Any]:
    """Every attribute of `layer` by name; on torch Keras keeps layers in torch's `_modules`."""
    return {**vars(layer), **vars(layer).get("_modules", {})}


def is_bookkeeping(attribute: str) -> bool:
    """Whether an attribute is TensorFlow's, which tracks what a layer holds a second time."""
    return attribute.startswith("_self_")


def stored_under(layer: keras.layers.Layer, name: str) -> str:
    """The attribute in which `layer` stores the variable that it shows as `name`: `Dense.kernel` is a property."""
    return f"_{name}" if isinstance(getattr(type(layer), name, None), property) else name


def with_policy(policy: keras.DTypePolicy) -> dict[str, Any]:
    """The attribute of a layer that says in which dtype it computes (the public one cannot be set on a built layer)."""
    return {"_dtype_policy": policy}


def int4_block_size(layer: keras.layers.Layer) -> int | None:
    """The rows in a group of an int4 layer; `None` or -1 if there is one scale for each column (Keras shows it nowhere)."""
    return getattr(layer, "_int4_block_size", None)


def set_past_tracking(layer: keras.layers.Layer) -> dict[str, Any]:
    """The attributes of `layer` that Keras did not track: on torch, those KerasHub gives a model before its `__init__`."""
    theirs = (cls for cls in type(layer).__mro__ if cls.__module__.partition(".")[0] == "keras_hub")
    if keras.backend.backend() != "torch" or not any("__setattr__" in vars(cls) for cls in theirs):
        return {}
    early = itertools.takewhile(lambda name: name != "_layers", vars(layer))
    return {name: vars(layer)[name] for name in early if name != "_modules"}  # torch's own, of later attributes


def own_variables(layer: keras.layers.Layer) -> list[keras.Variable]:
    """The variables `layer` itself owns, without those of its sublayers, trainable ones first."""
    return [*layer._trainable_variables, *layer._non_trainable_variables]


def own_trainable_variables(layer: keras.layers.Layer) -> list[keras.Variable]:
    """The own variables that were created trainable, frozen since or not (BatchNormalization's statistics are not)."""
    return list(layer._trainable_variables)


def set_own_trainable(layer: keras.layers.Layer, value: bool) -> None:
    """Set the flag of one layer; the public setter also sets every layer and variable below it."""
    layer._trainable = value


@contextlib.contextmanager
def unlocked(layer: keras.layers.Layer) -> Iterator[None]:
    """Let `layer` take a new sublayer: Keras locks a built layer; its own `enable_lora` unlocks it the same way."""
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
    """On torch, make `parameters()` and `state_dict()` list the variables of today, as `Model.quantize` does."""
    if keras.backend.backend() == "torch":
        for each in layer._flatten_layers():
            each._track_variables()


def dtype_in_call(layer: keras.layers.Layer, variable: keras.Variable, stored_apart: bool = False) -> str:
    """The dtype in which the code of `layer` sees `variable` while it is called, or would if it were not stored apart."""
    dtype = layer.variable_dtype if stored_apart else keras.backend.standardize_dtype(variable.dtype)
    autocast = stored_apart or getattr(variable, "_autocast", True)
    casts = layer.autocast and autocast and keras.backend.is_float_dtype(dtype)
    found: str = layer.compute_dtype if casts else dtype
    return found


class _DrawnSeed(keras.random.SeedGenerator):
    def __init__(self, generator: keras.random.SeedGenerator, drawn: Any):
        self._initial_seed, self._drawn = generator._initial_seed, drawn

    def next(self, ordered: bool = True) -> Any:
        return self._drawn


def drawn_seed(generator: keras.random.SeedGenerator, drawn: Any) -> keras.random.SeedGenerator:
    """What `generator.next()` gave, as an argument `seed` of `keras.random`, which takes no tensor: the same numbers again.

    On torch a generator without a seed leaves the drawing to torch, which `keras.remat` repeats.
    """
    return _DrawnSeed(generator, drawn)


def store_variable(variable: keras.Variable, dtype: str, autocast: bool = True) -> None:
    """Store `variable` in another dtype, in place: a new variable would change the order of the layer's weights.

    Without `autocast` a layer that is called sees it in that dtype, and not in the dtype it computes in.
    """
    value = keras.ops.cast(keras.ops.stop_gradient(keras.ops.convert_to_tensor(variable)), dtype)
    variable._dtype, variable._autocast = dtype, autocast
    variable._initialize(value)


def copy_mask(source: Any, to: Any) -> Any:
    """Give the tensor `to` the Keras mask of `source`, and return it (`keras.layers` shows no way to set one)."""
    from keras.src.backend import get_keras_mask, set_keras_mask

    if (mask := get_keras_mask(source)) is not None:
        set_keras_mask(to, mask)
    return to


def conv_lstm_cell() -> type[keras.layers.Layer]:
    """The class of the cells inside ConvLSTM layers, which Keras does not export."""
    from keras.src.layers.rnn.conv_lstm import ConvLSTMCell

    found: type[keras.layers.Layer] = ConvLSTMCell
    return found


def when_built(layer: keras.layers.Layer, then: Callable[[], None]) -> None:
    """Run `then` once `layer` is built: now, or right after its `build`, which Keras keeps on the instance."""
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
    """How a `.keras` file names `cls`: the words `serialize_keras_object` would write for an instance of it."""
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
    """A whole `.keras` file in memory; the public saver takes a path, and only models."""
    from keras.src.saving import saving_lib

    buffer = io.BytesIO()
    saving_lib._save_model_to_fileobj(model, buffer, "h5")
    return buffer.getvalue()


def model_from_bytes(data: bytes) -> Any:
    """The inverse of `model_to_bytes`. Like Keras's own unpickling it trusts the data."""
    from keras.src.saving import saving_lib

    return saving_lib._load_model_from_fileobj(io.BytesIO(data), custom_objects=None, compile=True, safe_mode=False)


def producer_of(tensor: keras.KerasTensor) -> tuple[keras.Operation, list[keras.KerasTensor]]:
    """The operation that made a symbolic tensor, and the tensors it was made from (Keras shows the graph nowhere else)."""
    operation, node_index, _ = tensor._keras_history
    return operation, list(operation._inbound_nodes[node_index].input_tensors)


def is_called_in_reverse(layer: keras.layers.Layer) -> bool:
    """Whether a graph calls `layer` with `reverse=True` (Keras shows the calls of a layer nowhere else)."""
    return any(node.arguments.kwargs.get("reverse") for node in layer._inbound_nodes)


def overrides_compile(model: keras.Model) -> bool:
    """Whether the class of `model` has a `compile` of its own: Keras then does not compile it again on loading."""
    return type(model).compile is not keras.Model.compile


def dequantize_groups(values: Any, scale: Any, zero: Any, group: Any, axis: int) -> Any:
    """Float values of an int4 tensor that was quantised in groups (Keras exports the quantiser, not its inverse)."""
    from keras.src.quantizers import dequantize_with_sz_map

    return dequantize_with_sz_map(values, scale, zero, group, group_axis=axis)


def scale_in_kernel_layout(layer: keras.layers.EinsumDense, scale: Any) -> Any:
    """The int8 scale of an EinsumDense, laid out to divide its kernel (it is stored to divide the output)."""
    return layer._adjust_scale_for_dequant(scale)


def forget_compilation(model: keras.layers.Layer) -> None:
    """Drop what models were compiled with: the optimizer has variables for each that trained, other parts hold layers."""
    for layer in model._flatten_layers():
        if isinstance(layer, keras.Model) and getattr(layer, "optimizer", None) is not None:
            del layer.optimizer  # TensorFlow tracks it until it is deleted
            layer.optimizer = None
            for name in ("_compile_config", "_compiled_trainable_state"):
                if hasattr(layer, name):
                    delattr(layer, name)


def drop_compiled_functions(model: keras.layers.Layer) -> None:
    """Forget what was traced: Keras traces these once, and a trace made before a change would run unchanged."""
    for layer in model._flatten_layers():
        for name in ("train_function", "test_function", "predict_function", "generate_function"):
            if isinstance(layer, keras.Model) and hasattr(layer, name):
                setattr(layer, name, None)


def forget_enabled_lora(layer: Any) -> None:
    """Undo `layer.enable_lora`: its two variables go, and its kernel is the base again (Keras can only switch it on).

    Keras's own deletion of a variable collects garbage each time, which takes seconds for a large model.
    """
    for name in [name for name in vars(layer) if name.startswith("lora_") and isinstance(vars(layer)[name], keras.Variable)]:
        layer._untrack_variable(vars(layer)[name])
        super(keras.layers.Layer, layer).__delattr__(name)
    layer.lora_enabled, layer.lora_rank, layer.lora_alpha = False, None, None


def forget_backbone_lora(model: keras.layers.Layer) -> None:
    """Let KerasHub's backbones forget which layers `backbone.enable_lora` changed: `save_lora_weights` would look there."""
    for layer in model._flatten_layers():
        for name in ("_lora_enabled_layers", "_lora_rank"):
            if hasattr(layer, name):
                delattr(layer, name)


def layers_with_weights(model: keras.layers.Layer) -> list[keras.layers.Layer]:
    """The layers of `model` in the order by which KerasHub counts them in its `.lora.h5` files."""
    return [layer for layer in model._flatten_layers(include_self=False) if layer.weights]
