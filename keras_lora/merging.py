"""Merging: add the change to the kernel and leave a plain Keras model."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops
from rich.table import Table

from keras_lora import adapters, backend, checks, reports
from keras_lora.applying import require_adapted, reset_compilation, take_out
from keras_lora.checks import AnyLayer
from keras_lora.compat import quantization
from keras_lora.linear_map import LinearMap
from keras_lora.swap import beside, flags, kernels, slots
from keras_lora.swap.adapted import (
    adapted_maps,
    address_of,
    maps_by_address,
    maps_of,
    named_adapters,
    set_adapter,
    set_containers,
    tell_stored,
)
from keras_lora.swap.addresses import by_address, walk, walking_once

_KEPT = "_keras_lora_kept"


@dataclass
class _Kept:
    """What `unmerge_lora` needs. It is not a list or dict, because Keras searches those for layers."""

    adapters: list[tuple[str, str, str | None, float, adapters.Adapter]]  # address, name, slot, strength
    kernels: dict[str, list[np.ndarray]]
    base_dtypes: dict[str, str | None]
    marks: dict[str, dict[str, Any]]
    beside: dict[str, beside.Values]


@dataclass(frozen=True)
class MergedKernel:
    """What one kernel loses when its change is merged.

    Attributes:
        layer: The path of the layer, with the kernel's name if it has several.
        stored_as: How the kernel is stored: a mode of Keras such as int8, `"nf4"`, or a float dtype.
        lost: The share of the change that is lost, `‖stored - (W + ΔW)‖ / ‖ΔW‖` (Frobenius). It is more than 1 if rounding
            moves the kernel farther than the change does.
    """

    layer: str
    stored_as: str
    lost: float


class MergeLosses(reports.Printed, list[MergedKernel]):
    """A list of `MergedKernel`; printing it prints a table."""

    def table(self, width: float) -> Table:
        """The table, for this many columns of text."""
        table = reports.table_of(["layer"], ["stored as", "lost"])
        for row in self:
            table.add_row(row.layer, row.stored_as, f"{100 * row.lost:.3g} %")
        return table

    def lines(self) -> list[str]:
        """The lines below the table."""
        return [f"lost at most: {100 * max((row.lost for row in self), default=0):.3g} % of the change of a kernel"]


@checks.helpful
@walking_once()
def merge_lora(model: AnyLayer, *, keep: bool = False, requantize: bool = False) -> AnyLayer:
    """Merge the active adapters into the kernels, in place, and leave a plain Keras model.

    The sum is computed in float32 and rounded once to the kernel's dtype. The result has no adapter, takes no extra time
    to run, and its `.keras` file loads without `keras_lora` installed. If the model has several adapters, the weighted sum
    of the active ones is merged (see `keras_lora.activate_adapters`). An inactive one would be lost, so delete it first.
    If the kernels are split over processes, every process must call it.

    Args:
        model: An adapted model, or an adapted part of one.
        keep: Keep the adapters and a copy of the original kernels, so that `unmerge_lora` can restore both. The copy is
            in host memory and is not saved.
        requantize: Leave every kernel stored as it is, in int8, int4, NF4 or bfloat16: it is dequantised, changed and
            quantised again. This loses a part of the change, often most of it, and the share that each kernel lost is
            printed. `keras_lora.list_merge_losses` tells before. Without it, int8 and int4 kernels are refused, and those
            in NF4 and bfloat16 become float.

    Returns:
        `model` itself. Call `compile` before training it.

    Raises:
        ValueError: The model is not adapted, a base kernel is quantised without `requantize`, a merged kernel is not
            finite, or an adapter is not active and `keep` is False. The model is unchanged then.

    Example:

    >>> import keras, keras_lora
    >>> model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(32), keras.layers.Dense(2)])
    >>> model = keras_lora.merge_lora(keras_lora.apply_lora(model))
    >>> type(model.layers[0]) is keras.layers.Dense
    True
    """
    adapted = require_adapted(model, "merge_lora")
    _refuse_quantized(adapted, requantize)
    if not keep:
        _refuse_to_drop(model)
    with reports.progress(2 * len(adapted)) as step:
        not_finite = []
        for address, pair in adapted.items():
            step(f"checking {address}")
            if not backend.to_numpy(ops.all(ops.isfinite(_merged_kernel(*pair)))):
                not_finite.append(address)
        if not_finite:
            raise ValueError(
                f"Merging would write numbers that are not finite, and has changed nothing. Expected finite adapters and "
                f"kernels. Received: NaN or infinity in the layers at {not_finite}. Train again, perhaps more slowly."
            )
        kept, paths = None, _paths_of(model)
        if keep:
            beside.store(model)
            kept = _Kept(_placed(adapted), {}, {}, flags.marks_of(model), deepcopy(beside.taken(model)))
        were_built_so = [
            linear
            for place in walk(model)
            for linear in maps_of(place.layer)
            if linear.stored and linear.stored.found and not requantize
        ]
        losses = MergeLosses()
        for address, (linear, change) in adapted.items():
            step(f"merging {address}")
            if kept is not None:
                kept.kernels[address] = [backend.to_numpy(each) for each in linear.stored_variables]
                kept.base_dtypes[address] = kernels.describe(linear)
            if requantize:
                losses.append(_merge_as_stored(linear, change, paths[address]))
                linear.keep_stored()
            else:
                merged = _merged_kernel(linear, change)
                linear.store_kernel(None)
                linear.kernel_variable.assign(merged)
        for linear in were_built_so:
            linear.store_kernel(None)
    if requantize:
        tell_stored(model)
    take_out(model, merged=True)
    for linear in were_built_so:
        linear.kernel_variable.trainable = True  # it was a frozen variable before `apply_lora`
    reset_compilation(model)
    if kept is not None:
        vars(model)[_KEPT] = kept
    if requantize:
        print(losses)
    return model


@walking_once()
def list_merge_losses(model: AnyLayer) -> MergeLosses:
    """Tell what `merge_lora(model, requantize=True)` would lose, and change nothing.

    A kernel in int8, int4 or NF4 has steps that are often larger than an adapter's change. Quantised again, it loses the
    part of the change that is smaller than a step, and is rounded anew where the size of its steps has changed.

    Args:
        model: An adapted model, or an adapted part of one.

    Returns:
        A row for each adapted kernel, with the share of the change that would be lost.

    Raises:
        ValueError: The model is not adapted, or its kernels were quantised with data (GPTQ, AWQ).

    Example:

    >>> import keras, keras_lora
    >>> model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(64), keras.layers.Dense(2)])
    >>> model = keras_lora.apply_lora(model, keras_lora.LoRA(2, seed=0), base_dtype="nf4")
    >>> _ = model.layers[0].adapter.lora_b.assign(keras.ops.ones((2, 64)))
    >>> [(row.stored_as, row.lost < 0.5) for row in keras_lora.list_merge_losses(model)]
    [('nf4', True)]
    """
    paths, losses = _paths_of(model), MergeLosses()
    adapted = require_adapted(model, "list_merge_losses")
    _refuse_quantized(adapted, requantize=True)
    with reports.progress(len(adapted)) as step:
        for address, (linear, change) in adapted.items():
            step(f"merging {address}")
            before = [backend.to_numpy(each) for each in linear.stored_variables]
            try:
                losses.append(_merge_as_stored(linear, change, paths[address]))
            finally:
                for variable, array in zip(linear.stored_variables, before, strict=True):
                    variable.assign(array)
    return losses


def unmerge_lora(model: AnyLayer) -> AnyLayer:
    """Undo `merge_lora(model, keep=True)`.

    The kernels are restored bit for bit, with the same adapters, as trainable as before.

    Args:
        model: The merged model.

    Returns:
        `model` itself. Call `compile` after it.

    Raises:
        ValueError: The model was not merged with `keep=True`, or has been adapted again since.

    Example:

    >>> import keras, keras_lora
    >>> model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(32), keras.layers.Dense(2)])
    >>> model = keras_lora.merge_lora(keras_lora.apply_lora(model), keep=True)
    >>> len(keras_lora.unmerge_lora(model).trainable_variables)
    2
    """
    kept = vars(model).get(_KEPT) if isinstance(model, keras.layers.Layer) else None
    if kept is None or adapted_maps(model):
        raise ValueError(
            f"There is nothing to unmerge in '{getattr(model, 'name', model)}'. Expected a model merged in this process "
            "with `keras_lora.merge_lora(model, keep=True)`, and not adapted again since."
        )
    del vars(model)[_KEPT]
    maps = maps_by_address(model)
    for address, name, slot, strength, adapter in kept.adapters:
        set_adapter(maps[address], adapter, name, slot)
        adapter.strength.assign(strength)
    for address, arrays in kept.kernels.items():
        maps[address].store_kernel(None)
        kernels.store(maps[address], kept.base_dtypes[address])
        for variable, array in zip(maps[address].stored_variables, arrays, strict=True):
            variable.assign(array)
    layers = by_address(model)  # now with the adapters
    for address, mark in kept.marks.items():
        flags.mark(layers[address], **mark)
    beside.put_back(model, kept.beside)
    set_containers(model)
    reset_compilation(model)
    return model


def _placed(
    adapted: dict[str, tuple[LinearMap, slots.Change]],
) -> list[tuple[str, str, str | None, float, adapters.Adapter]]:
    """The place of every adapter, in the order in which they were added to their layers."""
    addresses = {(id(linear.layer), linear.part): address for address, (linear, _) in adapted.items()}
    layers = {id(linear.layer): linear.layer for linear, _ in adapted.values()}.values()
    return [
        (addresses[id(layer), each.part], each.adapter_name, slots.slot_of(layer, each), adapters.strength_of(each), each)
        for layer in layers
        for each in slots.adapters_in(layer)
    ]


def _merged_kernel(linear: LinearMap, change: slots.Change) -> Any:
    """The new kernel, on the devices where the old one is."""
    return ops.stop_gradient(linear.precise.changed_kernel(change))


def _merge_as_stored(linear: LinearMap, change: slots.Change, path: str) -> MergedKernel:
    """Merge into a kernel that stays as it is stored, and measure what is lost."""
    before, wanted = _float_kernel(linear), _merged_kernel(linear, change)
    size = _distance(wanted, before)
    if size:  # else rounding again would change it for nothing
        linear.store_value(wanted)
    stored_as = quantization.mode_of(linear.layer) or linear.base_dtype or linear.float_dtype
    return MergedKernel(path, stored_as, _distance(wanted, _float_kernel(linear)) / size if size else 0.0)


def _float_kernel(linear: LinearMap) -> Any:
    return ops.cast(ops.stop_gradient(linear.precise.kernel), "float32")


def _distance(a: Any, b: Any) -> float:
    return float(backend.to_numpy(ops.norm(ops.reshape(ops.cast(ops.subtract(a, b), "float32"), (-1,)))))


def _paths_of(model: keras.layers.Layer) -> dict[str, str]:
    """The path of every kernel, by address."""
    return {
        address_of(place.address, linear): address_of(place.path, linear)
        for place in walk(model)
        for linear in maps_of(place.layer)
    }


def _refuse_to_drop(model: keras.layers.Layer) -> None:
    inactive = [
        name
        for name, found in named_adapters(model).items()
        if not any(adapters.strength_of(adapter) for _, adapter in found.values())
    ]
    if inactive:
        raise ValueError(
            f"Merging into '{model.name}' would lose the adapters {inactive}, which are not active. Expected active ones "
            "alone. Delete the others with `keras_lora.delete_adapter(model, name)`, which you may save before with "
            "`keras_lora.save_adapter(model, path, name=name)`, or merge with keep=True."
        )


def _refuse_quantized(adapted: dict[str, tuple[LinearMap, slots.Change]], requantize: bool) -> None:
    modes = {address: quantization.mode_of(linear.layer) for address, (linear, _) in adapted.items()}
    if calibrated := [address for address, mode in modes.items() if mode in quantization.CALIBRATED_MODES]:
        raise ValueError(
            "Kernels that were quantised with data cannot be merged into: the data would be needed again. Expected float, "
            f"int8, int4 or NF4 kernels. Received: others at {calibrated}. Merge into the float model: load the adapter "
            "there with `keras_lora.load_adapter`, and quantise the merged model again."
        )
    if (quantized := [address for address, mode in modes.items() if mode is not None]) and not requantize:
        raise ValueError(
            "A change as small as an adapter's is mostly rounded away when it is merged into a quantised kernel, so this is "
            f"refused. Expected float kernels. Received: quantised ones at "
            f"{quantized}. Merge into the float model: load the adapter there with `keras_lora.load_adapter`. To merge here "
            "nevertheless, pass requantize=True; `keras_lora.list_merge_losses(model)` tells what is lost."
        )
