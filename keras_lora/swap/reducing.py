"""`base_dtype`: which kernels can be stored in fewer digits, and how."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import keras

from keras_lora.compat import quantization
from keras_lora.linear_map import LinearMap
from keras_lora.swap import slots

#: The allowed values of `base_dtype`: two of our own, and two modes of Keras.
BASE_DTYPES = ("bfloat16", "nf4", *quantization.MODES)
_LAYERS = (keras.layers.Dense, keras.layers.EinsumDense, keras.layers.Embedding, keras.layers.ReversibleEmbedding)


def check_name(base_dtype: Any) -> None:
    """Raise an error unless `base_dtype` is one of the allowed values."""
    if base_dtype not in (None, *BASE_DTYPES):
        raise ValueError(f"`base_dtype` must be None or one of {BASE_DTYPES}. Received: base_dtype={base_dtype!r}.")


def check(kernels: Sequence[tuple[str, LinearMap]], base_dtype: str) -> None:
    """Raise an error unless these kernels, each with its path, can be stored as `base_dtype`."""
    quantized = [path for path, linear in kernels if quantization.mode_of(linear.layer) not in (None, base_dtype)]
    if quantized:
        raise ValueError(
            f"`base_dtype` stores float kernels in another dtype. Expected float kernels, or base_dtype=None. Received: "
            f"base_dtype={base_dtype!r} and quantised kernels at {quantized}, which are smaller already."
        )
    floats = [(path, linear) for path, linear in kernels if quantization.mode_of(linear.layer) is None]
    if base_dtype == "nf4" and (refused := [path for path, linear in floats if not linear.packs]):
        raise ValueError(
            f"base_dtype='nf4' cannot store the kernels at {refused}: the code of these layers reads them as they are "
            "stored. Expected kernels of Dense, EinsumDense, Embedding, ReversibleEmbedding or a convolution. Leave the "
            "others out with `exclude`, or use base_dtype='bfloat16'."
        )
    if base_dtype not in quantization.MODES:
        return
    if refused := [path for path, linear in floats if type(linear.plain) not in _LAYERS]:
        raise ValueError(
            f"base_dtype={base_dtype!r} needs layers that Keras can quantise: Dense, EinsumDense, Embedding or "
            f"ReversibleEmbedding. Received: others at {refused}. Leave these out with `exclude`, or use "
            "base_dtype='bfloat16'."
        )
    if refused := [path for path, linear in floats if slots.adapters_in(linear.layer) or linear.stored]:
        raise ValueError(
            f"base_dtype={base_dtype!r} quantises layers before they are adapted. Expected layers without an adapter, with "
            f"float kernels. Received: others at {refused}. Remove the adapters first with `keras_lora.remove_lora`."
        )


def quantize(kernels: Iterable[tuple[str, LinearMap]], mode: str) -> None:
    """Quantise layers with Keras, each once.

    What Keras refuses is found on copies, one of each kind, before any layer is changed. An error that depends on the
    numbers of a layer leaves those before it quantised, and says so.
    """
    floats = {id(linear.layer): (path, linear) for path, linear in kernels if quantization.mode_of(linear.layer) is None}
    kinds = {_kind(linear): (path, linear) for path, linear in floats.values()}
    done: list[str] = []
    try:
        for path, linear in kinds.values():  # noqa: B007  # the error names it
            quantization.try_to_quantize(linear.plain, mode)
        for path, linear in floats.values():
            quantization.quantize(linear.layer, mode)
            done.append(path)
    except Exception as error:
        raise ValueError(
            f"Keras could not quantise '{path}' in {mode}: {error} Expected layers that it can quantise. Received: "
            f"base_dtype={mode!r}. Quantised already: {done}. Leave the layer out with `exclude`, or use "
            "base_dtype='bfloat16' or 'nf4'."
        ) from error


def _kind(linear: LinearMap) -> str:
    """The same for layers that differ only in their name and numbers."""
    config = {key: each for key, each in linear.plain.get_config().items() if key != "name"}
    return repr((type(linear.layer), linear.kernel_shape, linear.layer.compute_dtype, config))


def store(linear: LinearMap, base_dtype: str) -> None:
    """Store a kernel, and tell its adapters."""
    linear.store_kernel(base_dtype)
    for adapter in slots.adapters_of(linear):
        adapter.base_changed(linear)
