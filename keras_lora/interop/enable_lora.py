"""`from_enable_lora`: convert Keras's built-in LoRA to keras_lora adapters.

Keras factors the last axis of a kernel: `ΔW = scale · A B` with `A (*kernel.shape[:-1], rank)` and `B (rank, last)`. We
factor the matrix, all inputs × all outputs. If the last axis contains all outputs (or all inputs), the factors are the same
numbers. Otherwise, as for a query kernel `(dim, heads, head)`, the matrix is `[A₁ … A_h] · blockdiag(B, …, B)`, of rank up
to `heads · rank`; its exact factors come from an SVD.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from keras_lora import adapters, checks, factors
from keras_lora.applying import own_beside, reset_compilation
from keras_lora.combining import CombinationReport, CombinedKernel
from keras_lora.compat import keras_internals, quantization
from keras_lora.linear_map import LinearMap, view_of
from keras_lora.swap import flags, slots
from keras_lora.swap.adapted import address_of, maps_of, named_adapters, set_adapter, set_containers
from keras_lora.swap.adapters_of_model import new_name
from keras_lora.swap.addresses import walk

#: The share of the change (Frobenius) that an exact adapter may leave out; it is below float32 precision.
_ZERO = 1e-6


@dataclass(frozen=True)
class LastAxisLoRA:
    """Keras's built-in LoRA of one kernel.

    Attributes:
        linear: The kernel.
        path: The names that lead to its layer.
        a, b: The factors, `(*kernel_shape[:-1], rank)` and `(rank, kernel_shape[-1])`, float64.
        alpha: The change is `alpha / rank · a b`.
    """

    linear: LinearMap
    path: str
    a: np.ndarray
    b: np.ndarray
    alpha: float

    @property
    def bare(self) -> LinearMap:
        """Return the kernel without Keras's change, which Keras computes in full whenever the kernel is read."""
        layer = self.linear.layer
        return type(self.linear)(view_of(layer, type(layer), lora_enabled=False))

    def as_matrices(self) -> factors.Factors:
        """Return `a b` as two factors of the kernel's matrix: `(*groups, in, k)` and `(*groups, k, out)`."""
        axes, (*groups, in_dim, out_dim) = self.bare.kernel_axes, self.bare.matrix_shape
        if groups and "g" not in axes:  # a grouped convolution: all groups share A, and each group has some columns of B
            a = self.a.reshape(in_dim, -1)
            return np.broadcast_to(a, (*groups, *a.shape)), self.b.reshape(-1, *groups, out_dim).swapaxes(0, 1)
        last = axes[-1]
        if last == "g":  # no low rank in any group
            order = [axis for role in "gio" for axis, each in enumerate(axes) if each == role]
            whole = (self.a @ self.b).transpose(order).reshape(*groups, in_dim, out_dim)
            return whole, np.broadcast_to(np.eye(out_dim), (*groups, out_dim, out_dim))
        other = "i" if last == "o" else "o"
        order = [axis for role in f"g{other}{last}" for axis, each in enumerate(axes[:-1]) if each == role]
        thin = self.a.transpose(*order, len(order)).reshape(*groups, in_dim if last == "o" else out_dim, -1)
        blocks = np.kron(np.eye(thin.shape[-1] // self.b.shape[0]), self.b)
        blocks = np.broadcast_to(blocks, (*groups, *blocks.shape))
        return (thin, blocks) if last == "o" else (np.swapaxes(blocks, -1, -2), np.swapaxes(thin, -1, -2))

    def started(self, rank: int | None) -> tuple[adapters.LoRA, float]:
        """Return our adapter with weights, of at most `rank`, and its relative error."""
        (a, b), error, size = self.as_matrices(), 0.0, self.b.shape[0]
        scale, same = self.alpha / size, a.shape[-1] == size <= (rank or size) and self.alpha > 0
        if not same:
            (a, b), error = factors.truncate((a, scale * b), energy=1 - _ZERO**2)
            if rank is not None and rank < a.shape[-1]:
                (a, b), error = factors.truncate((a, b), int(rank))
        if a.any() and b.any():
            adapter = adapters.LoRA(rank=a.shape[-1], alpha=self.alpha if same else a.shape[-1])
            with adapters.skip_init():
                slots.start(self.bare, adapter)
            adapter.lora_a.assign(a.astype("float32"))
            adapter.lora_b.assign(b.astype("float32"))
            return adapter, error
        size = min(size, rank or size)
        adapter = adapters.LoRA(rank=size, alpha=scale * size if scale > 0 else size)
        slots.start(self.bare, adapter)
        return adapter, 0.0


@checks.helpful
def from_enable_lora(model: Any, *, name: str | None = None, rank: int | None = None) -> CombinationReport:
    """Convert a model with Keras's built-in LoRA (`enable_lora`) to keras_lora adapters, in place, with the same outputs.

    Keras's LoRA variables are removed, the kernels are the base kernels again, and an adapter changes each of them, with
    the same alpha. Variables that were trainable stay trainable, including biases, which `enable_lora` does not freeze.
    Frozen variables stay frozen.

    If the last axis of a kernel contains all its outputs, or all its inputs, the adapter has the same factors, rank and
    alpha. Otherwise (query kernels, `(dim, heads, head)`) its rank is that of Keras's change as a matrix, up to
    `heads · rank`, and its scale is 1. A zero change, as right after `enable_lora`, becomes a LoRA with its initial values.

    Args:
        model: A model, or a part of one, with layers whose `lora_enabled` is true: Dense, EinsumDense, Embedding,
            ReversibleEmbedding, Conv1D, Conv2D, Conv3D, and classes registered with `like=` one of these.
            int8 and int4 are kept.
        rank: The largest rank of a kernel's adapter. If it is too small, the best approximation is used and its error
            reported.
        name: The name of the adapter.

    Returns:
        One row per kernel, with its rank and error, like `keras_lora.compress_adapter`. Call `compile` on the model
        before training.

    Raises:
        TypeError: `model` is not a Keras layer.
        ValueError: No layer has Keras's LoRA enabled, the model already has keras_lora adapters, or a layer cannot be
            converted exactly: its class is not known, it contains numbers that are not finite, or it is a quantised tied
            embedding, for which Keras does not change the output projection. All such layers are listed, and the
            model is unchanged.

    Example:

    >>> import keras
    >>> from keras_lora.interop import from_enable_lora
    >>> model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(32), keras.layers.Dense(2)])
    >>> model.layers[0].enable_lora(rank=4, lora_alpha=8)
    >>> [(row.rank, row.error) for row in from_enable_lora(model)]
    [(4, 0.0)]
    >>> model.layers[0].lora_enabled
    False
    """
    name = checked_arguments("from_enable_lora", model, rank, name)
    found, problems = _enabled(model)
    if not found and not problems:
        raise ValueError(
            f"`from_enable_lora()` found no layer with Keras's LoRA in '{model.name}'. Expected layers on which "
            "`enable_lora` was called. Received: none. `keras_lora.apply_lora(model)` adapts a plain model."
        )
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in problems)
        raise ValueError(
            f"`from_enable_lora()` cannot convert all layers of '{model.name}', and has changed nothing. Expected layers of "
            f"Keras's own classes, or of classes registered with `keras_lora.register_layer`. Received:{listed}\n"
            "Convert a part of the model without these layers, or build it anew with `keras_lora.apply_lora`."
        )
    started = [(each, *each.started(rank)) for each in found]
    _warn_of_regularizers(found)
    for each, adapter, _ in started:
        layer: Any = each.linear.layer
        trains = [v.trainable for v in _variables(each.linear)]
        keras_internals.forget_enabled_lora(layer)
        set_adapter(each.linear, adapter, name)
        trains = trains if each.linear.kernel_axes[-1] != "i" else trains[::-1]
        flags.set_flags(adapter, flags.Flags(any(trains), trains))
    keras_internals.forget_backbone_lora(model)
    for place in walk(model):
        if place.layer.weights:
            now = flags.flags_of(place.layer)
            flags.mark(place.layer, now, now)
    own_beside(model, name)
    set_containers(model)
    reset_compilation(model)
    return report(started)


def checked_arguments(function: str, model: Any, rank: int | None, name: str | None) -> str:
    """Return the name for the adapter, or raise an error if the arguments are wrong or the model has adapters."""
    checks.keras_layer(model)
    if rank is not None:
        checks.positive_integer("rank", rank)
    if taken := list(named_adapters(model)):
        raise ValueError(
            f"`{function}()` needs a model without keras_lora adapters. Received: '{model.name}' with the adapters "
            f"{taken}. Call `keras_lora.remove_lora(model)` or `keras_lora.merge_lora(model)` first."
        )
    return new_name(model, name)


def report(started: Iterable[tuple[LastAxisLoRA, adapters.LoRA, float]]) -> CombinationReport:
    """Return a report with one row per kernel."""
    return CombinationReport(
        CombinedKernel(address_of(each.path, each.linear), made.rank, error) for each, made, error in started
    )


def kernel_of(layer: keras.layers.Layer) -> LinearMap | None:
    """Return the kernel that Keras's LoRA changes in `layer`, or `None` if its class is not known."""
    return next((linear for linear in maps_of(layer) if linear.kernel_name in ("kernel", "embeddings")), None)


def _variables(linear: LinearMap) -> list[keras.Variable]:
    return [getattr(linear.layer, f"lora_{linear.kernel_name}_{factor}") for factor in "ab"]


def _enabled(model: keras.layers.Layer) -> tuple[list[LastAxisLoRA], list[str]]:
    """Return the kernels with Keras's LoRA, and why others cannot be converted."""
    found, problems = [], []
    for place in walk(model):
        layer: Any = place.layer
        if not getattr(layer, "lora_enabled", False):
            continue
        linear, mode = kernel_of(layer), quantization.mode_of(layer)
        if linear is None or not hasattr(layer, f"lora_{linear.kernel_name}_a"):
            problems.append(f"'{place.path}', of {type(layer).__module__}.{type(layer).__name__}, a class that is not known")
        elif mode not in (None, *quantization.MODES):
            problems.append(f"'{place.path}', quantised in the mode '{mode}'")
        elif mode is not None and getattr(layer, "tie_weights", False):
            problems.append(f"'{place.path}', quantised ('{mode}') and tied: Keras does not change its output projection")
        else:
            a, b = (np.asarray(keras.ops.convert_to_numpy(v.value), "float64") for v in _variables(linear))
            if not np.isfinite([a.sum(), b.sum(), layer.lora_alpha]).all():
                problems.append(f"'{place.path}', whose factors or alpha are not finite")
            found.append(LastAxisLoRA(linear, place.path, a, b, float(layer.lora_alpha)))
    return found, problems


def _warn_of_regularizers(found: list[LastAxisLoRA]) -> None:
    paths = [each.path for each in found if any(v.regularizer is not None for v in _variables(each.linear))]
    if paths:
        checks.warn(
            f"Keras adds the regularizers of the kernels of {paths} for A and B to the loss. Our adapters have none, so the "
            "training loss no longer has these terms; the outputs are the same."
        )
