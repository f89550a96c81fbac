"""Read the float kernel of a quantised layer. Only this file names quantisation modes."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops
from keras.dtype_policies import DTypePolicyMap

from keras_lora.compat import keras_internals

MODES = ("int8", "int4")
SUPPORTED_MODES = (None, *MODES)
#: Rows that share a scale in int4, if we quantise: as in NF4.
_INT4_BLOCK = 64


def mode_of(layer: keras.layers.Layer) -> str | None:
    """Return the name of the quantisation mode of a layer, or `None` for a float layer."""
    return getattr(layer, "quantization_mode", None)


def quantize(layer: keras.layers.Layer, mode: str) -> None:
    """Quantise a float layer with Keras."""
    layer.quantize(mode, config=keras.quantizers.Int4QuantizationConfig(block_size=_INT4_BLOCK) if mode == "int4" else None)


def quantizes_way_back(layer: keras.layers.Layer) -> bool:
    """Whether a layer is an embedding whose quantised table also gives the logits."""
    return isinstance(layer, keras.layers.ReversibleEmbedding) and mode_of(layer) is not None


def in_float32(layer: keras.layers.Layer) -> dict[str, Any]:
    """The attribute for a view of a layer that computes in float32, quantised or not."""
    policy = layer.dtype_policy[layer.path] if isinstance(layer.dtype_policy, DTypePolicyMap) else layer.dtype_policy
    return keras_internals.with_policy(keras_internals.policy_from_float32(policy))


def variables_of(layer: keras.layers.Layer, name: str) -> list[keras.Variable]:
    """The variables that store the kernel `name` of a quantised layer."""
    names = [keras_internals.stored_under(layer, name), f"{name}_scale", f"{name}_zero"]
    return [variable for each in names if isinstance(variable := getattr(layer, each, None), keras.Variable)]


def store(layer: keras.layers.Layer, name: str, kernel: Any) -> None:
    """Quantise a float kernel as Keras has quantised that of `layer`, and store it in the same variables.

    Keras quantises a whole layer, so it quantises a copy that has this kernel.
    """
    config = {**layer.get_config(), "dtype": "float32", "quantization_config": None}
    copy = type(layer).from_config({key: "zeros" if key.endswith("_initializer") else each for key, each in config.items()})
    copy.build_from_config(layer.get_build_config() or {"input_shape": None})
    getattr(copy, keras_internals.stored_under(layer, name)).assign(kernel)
    how = layer.quantization_config
    if mode_of(layer) == "int4" and how is None:  # a loaded layer may know its blocks from its dtype policy alone
        how = keras.quantizers.Int4QuantizationConfig(block_size=keras_internals.int4_block_size(layer) or -1)
    copy.quantize(mode_of(layer), config=how)
    for variable, value in zip(variables_of(layer, name), variables_of(copy, name), strict=True):
        variable.assign(value)


def float_kernel(layer: keras.layers.Layer, name: str) -> Any:
    """Return the kernel of `layer` as a float tensor, in the shape of the kernel.

    Args:
        layer: A built Dense, EinsumDense, Embedding or convolution.
        name: The attribute with the kernel: `"kernel"`, `"embeddings"` or `"reverse_embeddings"`.
    """
    mode = mode_of(layer)
    stored = getattr(layer, name)  # Keras unpacks int4 here
    if mode is None:
        return ops.convert_to_tensor(stored)
    if mode == "int4" and name == "reverse_embeddings":
        stored = keras.quantizers.unpack_int4(ops.convert_to_tensor(stored), layer.output_dim, axis=0)
    scale = getattr(layer, f"{name}_scale")
    is_table = name == "embeddings"
    block_size = keras_internals.int4_block_size(layer)
    if mode == "int4" and block_size not in (None, -1):
        zero = getattr(layer, f"{name}_zero")
        rows = stored if is_table else ops.reshape(stored, (ops.shape(layer.g_idx)[0], -1))
        values = keras_internals.dequantize_groups(
            ops.cast(rows, layer.compute_dtype), scale, zero, layer.g_idx, -1 if is_table else 0
        )
        return ops.cast(ops.reshape(values, ops.shape(stored)), layer.compute_dtype)
    values = ops.cast(stored, layer.compute_dtype)
    if is_table:
        return ops.divide(values, ops.expand_dims(scale, -1))
    if isinstance(layer, keras.layers.EinsumDense):
        if mode == "int4":  # one scale per column of the packed (rows, columns) matrix
            columns = ops.shape(scale)[-1]
            return ops.reshape(ops.divide(ops.reshape(values, (-1, columns)), scale), ops.shape(stored))
        scale = keras_internals.scale_in_kernel_layout(layer, scale)
    return ops.divide(values, scale)


def describe(layer: keras.layers.Layer) -> dict[str, Any] | None:
    """Return the arguments for `quantize_again` as plain data, or `None` for a float layer."""
    if mode_of(layer) is None:
        return None
    return {
        "mode": mode_of(layer),
        "config": keras.saving.serialize_keras_object(getattr(layer, "quantization_config", None)),
        "inputs": keras.saving.serialize_keras_object(getattr(layer, "inputs_quantizer", None)),
    }


def quantize_again(layer: keras.layers.Layer, description: dict[str, Any]) -> None:
    """Give a layer the quantised variables it had when it was saved; loading then fills them.

    If its config says so, Keras has done that already (KerasHub's models). But then it rounds inputs that were not rounded
    before, and the policy of the layer is a table of policies, with which Keras cannot save an embedding.
    """
    config = keras.saving.deserialize_keras_object(description["config"])
    if mode_of(layer) is None:
        layer.quantize(description["mode"], config=config)
    elif "inputs" in description and hasattr(layer, "inputs_quantizer"):
        inputs = keras.saving.deserialize_keras_object(description["inputs"])
        if not isinstance(inputs, keras.quantizers.Quantizer | None):
            raise ValueError(f"The quantiser of the inputs of '{layer.name}' in this file is none: {description['inputs']}.")
        if isinstance(policy := layer.dtype_policy, DTypePolicyMap):
            vars(layer).update(keras_internals.with_policy(policy[layer.path]))
        layer.quantization_config, layer.inputs_quantizer = config, inputs
