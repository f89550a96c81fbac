"""DoRA: a low-rank change of the kernel's direction, and a trainable magnitude for each output."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import keras
from keras import ops

from keras_lora.adapters.adapter import Adapter
from keras_lora.adapters.lora import LoRA

if TYPE_CHECKING:
    from keras_lora.linear_map import LinearMap


@keras.saving.register_keras_serializable("keras_lora")
class DoRA(Adapter):
    """Weight-decomposed low-rank adaptation: `W' = m (W + scale · A B) / ‖W + scale · A B‖`.

    The norm is taken over the inputs of each output unit and is not differentiated (section 4.3 of the paper). No
    array of the kernel's size is formed: `‖W + sAB‖² = ‖W‖² + 2 s b·(AᵀW) + s² b·(AᵀA) b` for each output, and `‖W‖²` is
    computed once. An output unit whose `W + scale · A B` is zero has no direction, and stays as it is.

    It trains closer to full fine-tuning than LoRA at low rank, at the cost of one more pass over the output.

    Args:
        rank, alpha, dropout, rank_stabilized, a_initializer, b_initializer, seed, freeze_a: As for `keras_lora.LoRA`.
        **kwargs: `name`, `dtype` and `trainable` of a Keras layer.

    Example:

    >>> import keras, keras_lora
    >>> model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(32), keras.layers.Dense(2)])
    >>> model = keras_lora.apply_lora(model, "dora", rank=4)
    >>> [v.name for v in model.trainable_variables]
    ['magnitude', 'lora_a', 'lora_b']

    References:
        - [Liu et al., 2024](https://arxiv.org/abs/2402.09353)
        - [the factored norm, 2026](https://arxiv.org/abs/2603.22276)
    """

    derived = ("kernel_norm_squared",)
    adds = False

    def __init__(
        self,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        rank_stabilized: bool = False,
        a_initializer: Any = None,
        b_initializer: Any = None,
        seed: int | None = None,
        freeze_a: bool = False,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.lora = LoRA(rank, alpha, dropout, rank_stabilized, a_initializer, b_initializer, seed, freeze_a)

    @property
    def rank(self) -> int:
        """The rank of the change in direction."""
        return self.lora.rank

    @property
    def scale(self) -> float:
        """The factor that multiplies `A B`."""
        return self.lora.scale

    def problem_with(self, linear: LinearMap) -> str | None:
        return self.lora.problem_with(linear)

    def build_for(self, linear: LinearMap) -> None:
        *groups, _, out_dim = linear.matrix_shape
        # Initializers instead of values: while a model is traced, the kernel has no value yet.
        shape = (*groups, out_dim)
        self.kernel_norm_squared = self.add_factor(
            "kernel_norm_squared", shape, lambda *_, **__: _norm_squared(linear), trainable=False, axes="go"
        )
        self.magnitude = self.add_factor("magnitude", shape, lambda *_, **__: ops.sqrt(_norm_squared(linear)), axes="go")
        with keras.name_scope(self.name):
            self.lora.create_for(linear)

    def base_changed(self, linear: LinearMap) -> None:
        old = ops.convert_to_tensor(self.kernel_norm_squared)
        new = _norm_squared(linear)
        # The magnitude keeps its ratio to the kernel's norm: an untrained one becomes the new norm itself.
        ratio = _gain(ops.convert_to_tensor(self.magnitude), ops.sqrt(old))
        self.magnitude.assign(ops.multiply(ratio, ops.sqrt(new)))
        self.kernel_norm_squared.assign(new)

    def parameter_count(self, matrix_shape: tuple[int, ...]) -> int:
        return self.lora.parameter_count(matrix_shape) + math.prod(matrix_shape[:-2]) * matrix_shape[-1]

    def size(self, matrix_shape: tuple[int, ...]) -> int:
        return self.lora.size(matrix_shape) + 2 * math.prod(matrix_shape[:-2]) * matrix_shape[-1]

    def delta_kernel(self, matrix: Any) -> Any:
        # Liu et al., eq. 5: W' = m (W + ΔV) / ‖W + ΔV‖, norms over each output unit, held constant in the gradient (4.3).
        matrix = ops.cast(matrix, "float32")
        direction = ops.add(matrix, self.lora.delta_kernel(matrix))
        norm = ops.stop_gradient(ops.sqrt(ops.sum(ops.square(direction), axis=-2, keepdims=True)))
        return ops.subtract(ops.multiply(_gain(ops.expand_dims(self.magnitude, -2), norm), direction), matrix)

    def adapted_output(self, x: Any, y: Any, linear: LinearMap, training: bool | None = None) -> Any:
        if not linear.scales_outputs:  # a tied embedding in reverse sums over the units that the magnitude scales
            return super().adapted_output(x, y, linear, training)
        return self._output(x, y, linear, training)

    def output(self, x: Any, linear: LinearMap, training: bool | None = None) -> Any:
        if not linear.scales_outputs:
            return super().output(x, linear, training)
        return self._output(x, None, linear, training)

    def _output(self, x: Any, y: Any, linear: LinearMap, training: bool | None) -> Any:
        """`W + t ΔW = c (W + (t g / c) sAB)`, with strength t, the gain g of an output unit, and `c = 1 + t (g - 1)`."""
        gain = _gain(self.magnitude, self.direction_norm(linear))
        more = ops.multiply(self.strength, ops.subtract(gain, 1.0))
        # If c is 0 the base vanishes; a tiny c avoids the division by zero and leaves a negligible part of the base.
        c = ops.add(more, 1.0)
        c = ops.where(ops.abs(c) < 1e-12, 1e-12, c)
        a, b = self.lora.current_pair()
        b = ops.multiply(b, ops.expand_dims(ops.divide(gain, c), -2))
        y = self.lora.add_product(x, y, linear, training, a, b, self.strength)
        if keras.backend.standardize_dtype(y.dtype) == "float32":
            return ops.multiply(y, linear.along_outputs(c, y))
        # Written as y + (c - 1) y because c stays close to 1, and bfloat16 has only 3 digits there.
        return ops.add(y, ops.multiply(y, linear.along_outputs(ops.cast(more, y.dtype), y)))

    def direction_norm(self, linear: LinearMap) -> Any:
        """Return `‖W + scale · A B‖` of each output, `(*groups, out_dim)`, from products no larger than `(rank, out_dim)`.

        It is a constant in the gradient (section 4.3 of the paper).
        """
        a, b = (ops.stop_gradient(ops.convert_to_tensor(factor)) for factor in self.lora.current_pair())
        b = self.lora.scale * b
        a_transposed = ops.swapaxes(a, -1, -2)
        across = ops.cast(linear.times_matrix(a_transposed), b.dtype)
        gram = ops.matmul(ops.matmul(a_transposed, a), b)
        squared = ops.add(self.kernel_norm_squared, ops.sum(ops.multiply(b, ops.add(2.0 * across, gram)), axis=-2))
        return ops.sqrt(ops.maximum(squared, 0.0))

    def misfit_with(self, other: Adapter) -> str | None:
        return self.lora.misfit_with(other.lora) if isinstance(other, DoRA) else super().misfit_with(other)

    def values_from(self, other: Adapter, values: dict[str, Any]) -> dict[str, Any]:
        return self.lora.values_from(other.lora, values) if isinstance(other, DoRA) else values

    def get_config(self) -> dict[str, Any]:
        own = super().get_config()
        return {**self.lora.get_config(), **own}


def _gain(magnitude: Any, norm: Any) -> Any:
    """Return `magnitude / norm`, or 1 if the norm is zero, as in a filter of zeros: it has no direction to scale."""
    zero = ops.equal(norm, 0.0)
    return ops.where(zero, ops.ones_like(norm), ops.divide(magnitude, ops.where(zero, ops.ones_like(norm), norm)))


def _norm_squared(linear: LinearMap) -> Any:
    """Return `‖W_j‖²` of each output unit, in float32."""
    return ops.sum(ops.square(ops.cast(linear.matrix, "float32")), axis=-2)
