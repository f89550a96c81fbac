"""Read the float kernel of a quantised layer. Only this file names quantisation modes."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_lora.compat import keras_internals

MODES = ("int8", "int4")
#: Modes in which Keras finds the codes from data, for the layers inside the blocks of a model.
CALIBRATED_MODES = ("gptq", "awq")
SUPPORTED_MODES = (None, *MODES, *CALIBRATED_MODES)
#: What a layer of these modes stores. Keras's own files lack a part of it.
_CALIBRATED = ("bias", "quantized_kernel", "kernel_scale", "kernel_zero", "awq_scales", "g_idx")
#: Rows that share a scale in int4, if we quantise: as in NF4.
_INT4_BLOCK = 64


def mode_of(layer: keras.layers.Layer) -> str | None:
    """Return the name of the quantisation mode of a layer, or `None` for a float layer."""
    return getattr(layer, "quantization_mode", None)


def quantize(layer: keras.layers.Layer, mode: str) -> None:
    """Quantise a float layer with Keras."""
    layer.quantize(mode, config=keras.quantizers.Int4QuantizationConfig(block_size=_INT4_BLOCK) if mode == "int4" else None)


def problem_with(layer: keras.layers.Layer) -> str | None:
    """Why a layer cannot be adapted as it is quantised, or `None`."""
    mode = mode_of(layer)
    if mode not in SUPPORTED_MODES:
        return f"is quantised as {mode}; int8, int4, gptq and awq are supported"
    if mode in CALIBRATED_MODES and not is_calibrated(layer):
        return f"waits for its codes in {mode}; calibrate the model with `model.quantize`, or load a file of one that was"
    return None


def is_calibrated(layer: keras.layers.Layer) -> bool:
    """Whether Keras has found the codes of a layer from data."""
    return mode_of(layer) in CALIBRATED_MODES and bool(getattr(layer, f"is_{mode_of(layer)}_calibrated", False))


def waits(layer: keras.layers.Layer) -> bool:
    """Whether a layer still has its float kernel, because Keras calibrates only those inside the blocks of a model."""
    return mode_of(layer) in CALIBRATED_MODES and keras_internals.stored_under(layer, "kernel") in vars(layer)


def needs_class(layer: keras.layers.Layer) -> bool:
    """Whether a quantised layer needs a class of ours without an adapter, too.

    The way back of a quantised embedding has no gradient otherwise. Keras's files of a calibrated layer lack its zeros, and
    those of a layer that waits for it lack its kernel.
    """
    mode = mode_of(layer)
    return mode in CALIBRATED_MODES or (mode is not None and isinstance(layer, keras.layers.ReversibleEmbedding))


def calibrated_variables(layer: keras.layers.Layer) -> dict[str, keras.Variable]:
    """The variables of a layer in a calibrated mode, by attribute; none for another layer."""
    names = _CALIBRATED if mode_of(layer) in CALIBRATED_MODES and not waits(layer) else ()
    return {name: each for name in names if isinstance(each := vars(layer).get(name), keras.Variable)}


def set_calibrated(layer: Any) -> None:
    """Let a layer compute with the codes that it has, after they were loaded."""
    setattr(layer, f"is_{mode_of(layer)}_calibrated", True)


def as_float(layer: keras.layers.Layer) -> dict[str, Any]:
    """The attributes for a view of a layer in a calibrated mode that is saved as the float layer that it was.

    One that still waits is float. One that is calibrated is quantised again: Keras would call it without a kernel before.
    """
    if mode_of(layer) not in CALIBRATED_MODES:
        return {}
    return {"quantization_config": None, **keras_internals.with_policy(keras_internals.float_policy(layer))}


def shape_of(layer: Any) -> tuple[int, ...] | None:
    """The shape of the float kernel, for a layer that stores it in another shape."""
    calibrated = getattr(layer, "kernel_shape", None) if mode_of(layer) in CALIBRATED_MODES else None
    found = getattr(layer, "original_kernel_shape", None) or calibrated
    return tuple(found) if found else None


def in_float32(layer: keras.layers.Layer) -> dict[str, Any]:
    """The attribute for a view of a layer that computes in float32, quantised or not."""
    return keras_internals.with_policy(keras_internals.policy_from_float32(layer))


def try_to_quantize(layer: keras.layers.Layer, mode: str) -> None:
    """Raise the error that Keras would raise for such a layer, whatever its numbers, and leave the layer as it is."""
    quantize(_float_copy(layer, layer.dtype_policy), mode)


def _float_copy(layer: keras.layers.Layer, policy: Any) -> Any:
    """A layer with the config of `layer`, not quantised, whose weights are zeros."""
    config = {**layer.get_config(), "dtype": policy, "quantization_config": None}
    copy = type(layer).from_config({key: "zeros" if key.endswith("_initializer") else each for key, each in config.items()})
    copy.build_from_config(layer.get_build_config() or {"input_shape": None})
    return copy


def variables_of(layer: keras.layers.Layer, name: str) -> list[keras.Variable]:
    """The variables that store the kernel `name` of a quantised layer."""
    names = [keras_internals.stored_under(layer, name), f"{name}_scale", f"{name}_zero"]
    return [variable for each in names if isinstance(variable := getattr(layer, each, None), keras.Variable)]


def store(layer: keras.layers.Layer, name: str, kernel: Any) -> None:
    """Quantise a float kernel as Keras has quantised that of `layer`, and store it in the same variables.

    Keras quantises a whole layer, so it quantises a copy that has this kernel.
    """
    copy = _float_copy(layer, "float32")
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
    if mode in CALIBRATED_MODES and not waits(layer):
        return _calibrated_kernel(layer)
    stored = getattr(layer, name)  # Keras unpacks int4 here
    if mode is None or waits(layer):
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


def _calibrated_kernel(layer: Any) -> Any:
    codes, columns = ops.convert_to_tensor(layer.quantized_kernel), layer.kernel_scale.shape[0]
    if keras_internals.calibrated_bits(layer) == 4:
        codes = keras.quantizers.unpack_int4(codes, columns, axis=0, dtype="uint8")
    kernel = ops.transpose(keras_internals.dequantize_groups(codes, layer.kernel_scale, layer.kernel_zero, layer.g_idx, -1))
    if mode_of(layer) == "awq":  # scaled by the size of its inputs before it was rounded
        kernel = ops.divide(kernel, ops.expand_dims(layer.awq_scales, -1))
    return ops.cast(ops.reshape(kernel, shape_of(layer)), layer.compute_dtype)


def describe(layer: keras.layers.Layer) -> dict[str, Any] | None:
    """Return the arguments for `quantize_again` as plain data, or `None` for a float layer."""
    if mode_of(layer) is None or waits(layer):
        return None
    config = getattr(layer, "quantization_config", None)
    if mode_of(layer) in CALIBRATED_MODES:  # without its data
        config = keras_internals.calibrated_config(layer)
    return {
        "mode": mode_of(layer),
        "config": keras.saving.serialize_keras_object(config),
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
        if isinstance(policy := layer.dtype_policy, keras.dtype_policies.DTypePolicyMap):
            vars(layer).update(keras_internals.with_policy(policy[layer.path]))
        layer.quantization_config, layer.inputs_quantizer = config, inputs
    if waits(layer):  # Keras deletes the float kernel when it has the codes
        keras_internals.forget_variable(layer, keras_internals.stored_under(layer, "kernel"))
    if mode_of(layer) in CALIBRATED_MODES:
        set_calibrated(layer)
