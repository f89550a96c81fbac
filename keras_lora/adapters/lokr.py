"""LoKr: the Kronecker product of a small matrix and a low-rank one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import keras
from keras import ops

from keras_lora import backend, checks
from keras_lora.adapters import initial
from keras_lora.adapters.low_rank import LowRank

if TYPE_CHECKING:
    from keras_lora.linear_map import LinearMap


@keras.saving.register_keras_serializable("keras_lora")
class LoKr(LowRank):
    """Low-rank Kronecker product: `W' = W + scale · C ⊗ (A B)`.

    `in_dim = m · p` and `out_dim = n · q`, with `m` and `n` the divisors nearest to `factor`; `C` is `(m, n)`, `A` is
    `(p, rank)` and `B` is `(rank, q)`. All blocks of the kernel change alike, up to a number for each block. So it has
    about `factor` times fewer parameters than a LoRA of this rank, and the change has a rank of up to `m · rank`. The
    Kronecker product is never formed in training or inference if the layer is a product of rows and a matrix; in other
    layers, the change is a product of factors of `m · rank` columns. It needs a higher learning rate than LoRA: start at
    three times its rate.

    Args:
        rank: Positive integer.
        alpha: Positive number. The scale is `alpha / rank`.
        factor: Positive integer, the wanted size of `C` on each side; `-1` makes `C` and `A B` about equally large.
        dropout: Number in `[0, 1)`, the share of the entries of the input dropped on the way to `A` in training.
        rank_stabilized: Use the scale `alpha / sqrt(rank)`.
        seed: Integer, for the initial values and the dropout. Each layer uses a separate random stream.
        **kwargs: `name`, `dtype` and `trainable` of a Keras layer.

    Raises:
        ValueError: An argument is outside its range.

    Example:

    >>> import keras, keras_lora
    >>> model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(32), keras.layers.Dense(2)])
    >>> model = keras_lora.apply_lora(model, keras_lora.LoKr(rank=2, factor=4))
    >>> [(v.name, tuple(v.shape)) for v in model.trainable_variables]
    [('lokr_c', (4, 4)), ('lokr_a', (4, 2)), ('lokr_b', (2, 8))]

    Reference:
        [Yeh et al., 2023](https://arxiv.org/abs/2309.14859)
    """

    def __init__(
        self,
        rank: int = 8,
        alpha: float = 16.0,
        factor: int = 8,
        dropout: float = 0.0,
        rank_stabilized: bool = False,
        seed: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(rank, alpha, dropout, rank_stabilized, seed, **kwargs)
        self.factor = factor if factor == -1 else checks.positive_integer("factor", factor)

    def shapes(self, matrix_shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the weights by key."""
        *groups, in_dim, out_dim = matrix_shape
        (m, p), (n, q) = split(in_dim, self.factor), split(out_dim, self.factor)
        return {"lokr_c": (*groups, m, n), "lokr_a": (*groups, p, self.rank), "lokr_b": (*groups, self.rank, q)}

    def build_for(self, linear: LinearMap) -> None:
        shapes = self.shapes(linear.matrix_shape)
        of_a, of_b = initial.uniform(shapes["lokr_a"][-2] ** -0.5, self.seed), initial.uniform(self.rank**-0.5, self.seed)
        self.lokr_c = self.add_factor("lokr_c", shapes["lokr_c"], initial.zeros)
        self.lokr_a = self.add_factor("lokr_a", shapes["lokr_a"], of_a)
        self.lokr_b = self.add_factor("lokr_b", shapes["lokr_b"], of_b)

    def pair(self, weights: Mapping[str, Any], matrix_shape: tuple[int, ...] | None) -> tuple[Any, Any]:
        # C ⊗ (A B) = (I ⊗ A) (C ⊗ B), an exact product of thin factors.
        c, a, b = (ops.convert_to_tensor(weights[key]) for key in ("lokr_c", "lokr_a", "lokr_b"))
        eye = ops.eye(c.shape[-2], dtype=a.dtype)
        return _kronecker(ops.broadcast_to(eye, (*c.shape[:-2], *eye.shape)), a), _kronecker(c, b)

    def product_rank(self, matrix_shape: tuple[int, ...]) -> int:
        return self.shapes(matrix_shape)["lokr_c"][-2] * self.rank

    def delta_kernel(self, matrix: Any) -> Any:
        # Yeh et al., section 3.2: ΔW = scale · C ⊗ (A B).
        return self.scale * _kronecker(self.lokr_c, ops.matmul(self.lokr_a, self.lokr_b))

    def adapted_output(self, x: Any, y: Any, linear: LinearMap, training: bool | None = None) -> Any:
        if not (linear.is_matmul or linear.picks_rows) or (self.seed_generator is not None and training):
            return super().adapted_output(x, y, linear, training)
        y = linear.base_output(x) if y is None else y
        if linear.is_matmul:
            rows = linear.as_rows(ops.cast(x, y.dtype))
            return backend.kronecker_sum(rows, self.lokr_c, self.lokr_a, self.lokr_b, self.scale, self.strength, y)
        c, a = (ops.cast(factor, y.dtype) for factor in (self.lokr_c, self.lokr_a))
        b = ops.cast(ops.multiply(ops.multiply(self.scale, self.strength), self.lokr_b), y.dtype)
        x, p = ops.cast(x, "int32"), a.shape[0]
        h = ops.expand_dims(ops.matmul(ops.take(a, x % p, axis=0), b), -2)
        h = ops.multiply(ops.expand_dims(ops.take(c, x // p, axis=0), -1), h)
        return ops.add(y, ops.reshape(h, ops.shape(y)))

    def parameter_count(self, matrix_shape: tuple[int, ...]) -> int:
        return sum(math.prod(shape) for shape in self.shapes(matrix_shape).values())

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "factor": self.factor}


def split(size: int, factor: int) -> tuple[int, int]:
    """Return two divisors of `size` with this product: the smaller one near `factor`, or near the root if it is `-1`.

    It is the same rule as in LyCORIS and PEFT, so that files fit.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    least, found = size + 1, (1, size)
    for m in range(2, math.isqrt(size) + 1):
        if size % m == 0 and (factor == -1 or m <= factor) and m + size // m <= least:
            least, found = m + size // m, (m, size // m)
    return found


def _kronecker(a: Any, b: Any) -> Any:
    """The Kronecker product of the last two axes."""
    *groups, rows, columns = a.shape
    product = ops.multiply(ops.expand_dims(ops.expand_dims(a, -1), -3), ops.expand_dims(ops.expand_dims(b, -2), -4))
    return ops.reshape(product, (*groups, rows * b.shape[-2], columns * b.shape[-1]))
