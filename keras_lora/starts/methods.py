"""The starting points: what each gives an adapter as its first factors. `starting.py` puts them into a model."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from keras import ops

from keras_lora import checks
from keras_lora.adapters import Adapter, LoRA
from keras_lora.compat import quantization
from keras_lora.linear_map import LinearMap
from keras_lora.starts import probes, sketches

#: The LoRAs to start, with their kernels, by address.
Places = Mapping[str, tuple[LinearMap, LoRA]]
#: Factors `(*groups, in_dim, rank)` and `(*groups, rank, out_dim)`, without the scale.
Pair = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Source:
    """What a starting point may read: the model, data for it, and float kernels of the same layers by address."""

    model: Any
    seed: int
    data: Any = None
    loss: Any = None
    batch_size: int | None = None
    kernels: Mapping[str, LinearMap] | None = None

    def rng(self, address: str) -> np.random.Generator:
        """A stream of random numbers for one kernel."""
        return np.random.default_rng([self.seed, zlib.crc32(address.encode())])


class Start:
    """A starting point."""

    #: Whether the product of the factors is taken away again by a kept pair, so that the change is zero.
    keeps: ClassVar[bool] = True
    #: The arguments of `start_from` that it needs.
    needs: ClassVar[tuple[str, ...]] = ()

    def problem_with(self, linear: LinearMap, adapter: LoRA, float_map: LinearMap | None) -> str | None:
        """Return why the LoRA of a kernel cannot start like this, or `None`. Called before anything changes."""
        return None

    def pairs(self, places: Places, source: Source) -> dict[str, Pair]:
        """Return the factors by address. A rank smaller than the adapter's leaves its other columns as they are."""
        return {address: self.pair(*place, source.rng(address)) for address, place in places.items()}

    def pair(self, linear: LinearMap, adapter: LoRA, rng: np.random.Generator) -> Pair:
        """Return the factors for one kernel, for a start that needs nothing but the kernel."""
        raise NotImplementedError

    def rank(self, address: str, adapter: LoRA, pair: Pair) -> int:
        """Return the new rank of an adapter."""
        return adapter.rank


class PiSSA(Start):
    """The largest singular triplets of the kernel, as in PEFT's `init_lora_weights="pissa"`."""

    def pair(self, linear: LinearMap, adapter: LoRA, rng: np.random.Generator) -> Pair:
        return _halved(sketches.leading(matrix_of(linear), adapter.rank, rng), adapter.scale)


class OLoRA(Start):
    """Of the QR decomposition of the kernel, the first columns of Q and rows of R, as in PEFT's `"olora"`."""

    def pair(self, linear: LinearMap, adapter: LoRA, rng: np.random.Generator) -> Pair:
        return sketches.rows_of_qr(matrix_of(linear), min(adapter.rank, *linear.matrix_shape[-2:]))


class Orthogonal(Start):
    """Two halves of an orthogonal matrix: A and B are not zero, and their product is."""

    keeps = False

    def problem_with(self, linear: LinearMap, adapter: LoRA, float_map: LinearMap | None) -> str | None:
        return "the halves need a rank of 2 or more; it has rank 1" if adapter.rank < 2 else None

    def pair(self, linear: LinearMap, adapter: LoRA, rng: np.random.Generator) -> Pair:
        *groups, in_dim, out_dim = linear.matrix_shape
        a, b = sketches.halves(tuple(groups), (in_dim, out_dim), adapter.rank, rng)
        # Each has the variance that A has by default, for its own width.
        return a / np.sqrt(3 * in_dim), b / np.sqrt(3 * out_dim)


class LoftQ(Start):
    """The largest singular triplets of what quantising took from the kernel: one step of the method, with the SVD alone."""

    keeps = False
    needs = ("base",)

    def problem_with(self, linear: LinearMap, adapter: LoRA, float_map: LinearMap | None) -> str | None:
        if quantization.mode_of(linear.layer) is None:
            return "it is not quantised, so there is no error to reduce"
        if float_map is None or quantization.mode_of(float_map.layer) is not None:
            return "`base` has no float kernel at this address"
        if float_map.matrix_shape != linear.matrix_shape:
            return f"its kernel in `base` is another: {float_map.kernel_shape}, expected {linear.kernel_shape}"
        return None

    def pairs(self, places: Places, source: Source) -> dict[str, Pair]:
        found = {}
        for address, (linear, adapter) in places.items():
            lost = matrix_of((source.kernels or {})[address]) - matrix_of(linear)
            found[address] = _halved(sketches.leading(lost, adapter.rank, source.rng(address)), adapter.scale)
        return found


class EVA(Start):
    """Start `A` from the main directions of each layer's inputs over a dataset, for `keras_lora.start_from`.

    `A` gets the leading right singular vectors of the inputs, `B` stays zero. Layers whose inputs have more large directions
    can get a larger rank, and others a smaller one, under the same sum of ranks.

    The inputs are not stored: each batch is added to a sketch `xᵀx Ω`, whose columns are as many as the largest rank and
    `oversampling`. They are not centred.

    Args:
        rho: Number of at least 1. A layer gets at most `rho` times its rank, and at least 1. 1 keeps all ranks.
        oversampling: Positive integer, additional columns of the sketch.
        batches: Positive integer, how many batches are read. By default all.

    Raises:
        ValueError: An argument is outside its range.

    Example:

    >>> import keras, keras_lora, numpy as np
    >>> model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(32), keras.layers.Dense(32), keras.layers.Dense(2)])
    >>> model = keras_lora.apply_lora(model, rank=4)
    >>> x = np.random.default_rng(0).normal(size=(64, 16)).astype("float32")
    >>> model = keras_lora.start_from(model, keras_lora.EVA(rho=2.0), x)
    >>> sum(row.rank for row in keras_lora.list_adapters(model))
    8

    Reference:
        [Paischer et al., 2024](https://arxiv.org/abs/2410.07170)
    """

    keeps = False
    needs = ("data",)

    def __init__(self, rho: float = 1.0, oversampling: int = 16, batches: int | None = None):
        if not checks.is_number(rho) or rho < 1:
            raise ValueError(f"`rho` must be a number of at least 1. Received: rho={rho!r}.")
        self.rho = float(rho)
        self.oversampling = checks.positive_integer("oversampling", oversampling)
        self.batches = None if batches is None else checks.positive_integer("batches", batches)

    def problem_with(self, linear: LinearMap, adapter: LoRA, float_map: LinearMap | None) -> str | None:
        return None if linear.no_dropout is None else f"its inputs cannot be measured, because {linear.no_dropout}"

    def pairs(self, places: Places, source: Source) -> dict[str, Pair]:
        most = {address: self._most(*place) for address, place in places.items()}
        omegas = {}
        for address, (linear, _) in places.items():
            columns = min(most[address] + self.oversampling, linear.matrix_shape[-2])
            omegas[address] = source.rng(address).standard_normal((*linear.matrix_shape[:-1], columns)).astype("float32")

        def probe(address: str, linear: LinearMap) -> Adapter:
            return probes.InputProbe(omegas[address])

        maps = {address: linear for address, (linear, _) in places.items()}
        measured = probes.measure(source.model, maps, probe, source.data, None, source.batch_size, self.batches)
        sketch = {address: found["measured"] for address, found in measured.items()}
        refuse(
            source.model, [f"'{at}': no input reached it, or it was not finite" for at in sketch if not _is_seen(sketch[at])]
        )
        found = {address: sketches.eigenvectors(omegas[address], sketch[address]) for address in places}
        ranks = {address: adapter.rank for address, (_, adapter) in places.items()}
        if self.rho > 1:
            ranks = sketches.shared_out(
                {address: _explained(values, omegas[address], sketch[address]) for address, (values, _) in found.items()},
                sum(ranks.values()),
                most,
            )
        pairs = {}
        for address, (linear, _) in places.items():
            *groups, _, out_dim = linear.matrix_shape
            a = found[address][1][..., : ranks[address]]
            pairs[address] = a, np.zeros((*groups, ranks[address], out_dim))
        return pairs

    def rank(self, address: str, adapter: LoRA, pair: Pair) -> int:
        return adapter.rank if self.rho == 1 else int(pair[0].shape[-1])

    def _most(self, linear: LinearMap, adapter: LoRA) -> int:
        return min(int(self.rho * adapter.rank), *linear.matrix_shape[-2:])


class LoRAGA(Start):
    """Start from the gradient of the kernels in the frozen base, for `keras_lora.start_from` with data and a loss.

    The gradient is summed over the data. With its singular vectors `U` and `V`, `A` starts as the first `rank` columns of
    `U`, and `B` as the next `rank` columns of `V`, both times `out_dim^¼ / √gamma` (the paper's stable scale). So the first
    step changes the kernel in nearly the direction of its gradient.

    The gradient itself, as large as the kernel, is not computed for layers with a fast path: two thin products with it are.
    The model runs as at inference, without dropout.

    Args:
        gamma: Positive number. Larger values start smaller.
        oversampling: Positive integer, additional columns of the products.
        batches: Positive integer, how many batches are read. By default all; the paper uses a few.

    Raises:
        ValueError: An argument is outside its range.

    Example:

    >>> import keras, keras_lora, numpy as np
    >>> model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(32), keras.layers.Dense(2)])
    >>> model = keras_lora.apply_lora(model, rank=4)
    >>> x, y = np.random.default_rng(0).normal(size=(64, 18)).astype("float32")[:, :16], np.zeros((64, 2))
    >>> model = keras_lora.start_from(model, keras_lora.LoRAGA(batches=2), (x, y), loss="mse")
    >>> [(v.name, tuple(v.shape)) for v in model.layers[0].weights][-2:]
    [('kept_a', (16, 4)), ('kept_b', (4, 32))]

    Reference:
        [Wang et al., 2024](https://arxiv.org/abs/2407.05000)
    """

    needs = ("data", "loss")

    def __init__(self, gamma: float = 16.0, oversampling: int = 16, batches: int | None = None):
        self.gamma = checks.positive_number("gamma", gamma)
        self.oversampling = checks.positive_integer("oversampling", oversampling)
        self.batches = None if batches is None else checks.positive_integer("batches", batches)

    def pairs(self, places: Places, source: Source) -> dict[str, Pair]:
        drawn: dict[str, Pair] = {}
        for address, (linear, adapter) in places.items():
            *groups, in_dim, out_dim = linear.matrix_shape
            right = min(2 * adapter.rank + self.oversampling, in_dim, out_dim)
            left = min(right + self.oversampling, in_dim)  # wider, so that its pseudoinverse is stable
            rng = source.rng(address)
            omega, psi = rng.standard_normal((*groups, in_dim, left)), rng.standard_normal((*groups, right, out_dim))
            drawn[address] = omega.astype("float32"), psi.astype("float32")

        def probe(address: str, linear: LinearMap) -> Adapter:
            return probes.GradientProbe(*drawn[address])

        maps = {address: linear for address, (linear, _) in places.items()}
        seen = probes.measure(source.model, maps, probe, source.data, source.loss, source.batch_size, self.batches)
        dead = [address for address, each in seen.items() if not all(_is_seen(array) for array in each.values())]
        refuse(source.model, [f"'{address}': its gradient is zero or not finite" for address in dead])
        found = {}
        for address, (linear, adapter) in places.items():
            u, _, v = sketches.from_both_sides(drawn[address][0], seen[address]["left"], seen[address]["right"])
            rank = min(adapter.rank, u.shape[-1])
            first = min(rank, v.shape[-2] - rank)  # a narrow kernel has too few directions for two sets
            size = linear.matrix_shape[-1] ** 0.25 / self.gamma**0.5
            found[address] = size * u[..., :rank], size * v[..., first : first + rank, :]
        return found


#: The starting points by name.
TABLE: dict[str, type[Start]] = {
    "eva": EVA,
    "loftq": LoftQ,
    "lora_ga": LoRAGA,
    "olora": OLoRA,
    "orthogonal": Orthogonal,
    "pissa": PiSSA,
}


def get(start: Any) -> Start:
    """Return the starting point for a name or an instance."""
    if isinstance(start, str) and start.lower() in TABLE:
        return TABLE[start.lower()]()
    if isinstance(start, Start):
        return start
    raise ValueError(
        f"`start` must be one of {sorted(TABLE)}, or an instance such as keras_lora.EVA(rho=2.0). Received: "
        f"start={checks.described(start)}."
    )


def refuse(model: Any, problems: list[str]) -> None:
    """Raise an error with these problems, if there are any."""
    if problems:
        raise ValueError(
            f"{len(problems)} adapters of '{model.name}' cannot start like this. Nothing was changed."
            f"{checks.bullets(problems)}"
        )


def matrix_of(linear: LinearMap) -> np.ndarray:
    """Return the kernel as a matrix in NumPy, dequantised if need be."""
    found: np.ndarray = np.asarray(ops.convert_to_numpy(ops.cast(linear.matrix, "float32")))
    return found


def _halved(found: sketches.Triplets, scale: float) -> Pair:
    """Factors of `u s v / scale`, each with the square roots of the singular values."""
    u, s, v = found
    root = np.sqrt(s / scale)
    return u * root[..., None, :], root[..., :, None] * v


def _is_seen(array: np.ndarray) -> bool:
    return bool(np.isfinite(array).all() and array.any())


def _explained(values: np.ndarray, omega: np.ndarray, sketch: np.ndarray) -> np.ndarray:
    """The share of each direction in the sum of the squares of the inputs; of a kernel with groups, on average."""
    total = np.maximum(np.einsum("...ik,...ik->...", omega, sketch) / omega.shape[-1], values.sum(axis=-1))
    shares = values / np.where(total > 0, total, 1.0)[..., None]
    found: np.ndarray = shares.reshape(-1, shares.shape[-1]).mean(axis=0)
    return found
