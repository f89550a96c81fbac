"""Measure inputs and gradients of kernels on any backend: thin adapters in a `fit` that changes no variable of the model."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_lora.adapters import Adapter, LowRank
from keras_lora.compat import keras_internals
from keras_lora.linear_map import LinearMap
from keras_lora.swap import slots
from keras_lora.swap.adapted import set_adapter

#: The kernels to measure, by address.
Maps = Mapping[str, LinearMap]


class InputProbe(Adapter):
    """Adds nothing to the output, and a loss whose gradient is `xᵀ x Ω`, with `x` as the rows that the kernel is used on."""

    def __init__(self, omega: np.ndarray, **kwargs: Any):
        super().__init__(**kwargs)
        self.omega = omega

    def build_for(self, linear: LinearMap) -> None:
        self.drawn = self.add_factor("drawn", self.omega.shape, "zeros", trainable=False)
        self.drawn.assign(self.omega)
        self.measured = self.add_factor("measured", self.omega.shape, "zeros")

    def adapted_output(self, x: Any, y: Any, linear: LinearMap, training: bool | None = None) -> Any:
        x = ops.cast(x, "float32")
        fixed = ops.stop_gradient(linear.contract(x, ops.convert_to_tensor(self.drawn)))
        self.add_loss(ops.sum(ops.multiply(fixed, linear.contract(x, ops.convert_to_tensor(self.measured)))))
        return y

    def delta_kernel(self, matrix: Any) -> Any:
        return ops.zeros_like(matrix)


class GradientProbe(LowRank):
    """Adds `Ω Z + Y Ψ` with Z = 0 and Y = 0, whose gradients are `Ωᵀ G` and `G Ψᵀ`, with `G` as the kernel's gradient."""

    def __init__(self, omega: np.ndarray, psi: np.ndarray, **kwargs: Any):
        super().__init__(rank=omega.shape[-1], alpha=omega.shape[-1], **kwargs)
        self.omega, self.psi = omega, psi

    def build_for(self, linear: LinearMap) -> None:
        *groups, in_dim, out_dim = linear.matrix_shape
        self.left_drawn = self.add_factor("left_drawn", self.omega.shape, "zeros", trainable=False)
        self.right_drawn = self.add_factor("right_drawn", self.psi.shape, "zeros", trainable=False)
        self.left_drawn.assign(self.omega)
        self.right_drawn.assign(self.psi)
        self.left = self.add_factor("left", (*groups, self.omega.shape[-1], out_dim), "zeros")
        self.right = self.add_factor("right", (*groups, in_dim, self.psi.shape[-2]), "zeros")

    def pair(self, weights: Mapping[str, Any], matrix_shape: tuple[int, ...] | None) -> tuple[Any, Any]:
        a = ops.concatenate([weights["left_drawn"], weights["right"]], axis=-1)
        return a, ops.concatenate([weights["left"], weights["right_drawn"]], axis=-2)


class _Accumulate(keras.optimizers.Optimizer):
    """Adds up the gradients and changes no variable."""

    def __init__(self) -> None:
        super().__init__(learning_rate=1.0, name="accumulate")
        self.sums: dict[int, keras.Variable] = {}

    def build(self, variables: Any) -> None:
        if self.built:
            return
        super().build(variables)
        for variable in variables:
            self.sums[id(variable)] = made = self.add_variable_from_reference(variable, name="sum")
            if keras.backend.backend() == "tensorflow":  # it passes its own variables to `update_step`
                self.sums[id(variable.value)] = made

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        self.assign_add(self.sums[id(variable)], ops.cast(gradient, variable.dtype))


class _AtInference(keras.Model):
    """A model that is called as at inference: no dropout, and the statistics of BatchNormalization stay as they are."""

    def __init__(self, model: keras.layers.Layer):
        super().__init__(name="measured")
        self.model = model
        self.built = True

    def call(self, inputs: Any) -> Any:
        return self.model(inputs, training=False)


def measure(
    model: Any,
    maps: Maps,
    make: Callable[[str, LinearMap], Adapter],
    data: Any,
    loss: Any,
    batch_size: int | None,
    batches: int | None,
) -> dict[str, dict[str, np.ndarray]]:
    """Return the gradients of what trains in the probes that `make` makes, summed over the data, by address and name."""
    optimizer = _Accumulate()
    with _probes(model, {address: (linear, make(address, linear)) for address, linear in maps.items()}) as probes:
        whole = _AtInference(model)
        whole.compile(optimizer, loss=loss, auto_scale_loss=False)
        x, y, weight = keras.utils.unpack_x_y_sample_weight(data) if isinstance(data, tuple) else (data, None, None)
        given = {"y": y, "sample_weight": weight, "batch_size": batch_size}
        given = {key: value for key, value in given.items() if value is not None}
        with warnings.catch_warnings():
            if batches is None:  # the end of a generator is what is wanted
                warnings.filterwarnings("ignore", "Your input ran out of data")
            whole.fit(x, **given, steps_per_epoch=batches, shuffle=False, verbose=0)
        return {
            address: {
                v.name: np.asarray(ops.convert_to_numpy(optimizer.sums[id(v)].value)) for v in probe.trainable_variables
            }
            for address, probe in probes.items()
        }


@contextlib.contextmanager
def _probes(model: Any, made: Mapping[str, tuple[LinearMap, Adapter]]) -> Iterator[dict[str, Adapter]]:
    """Put probes beside the adapters of a model, as all that trains; take them away again."""
    trained = [v for v in model.variables if v.trainable]
    placed: list[tuple[LinearMap, Adapter]] = []
    try:
        for linear, probe in made.values():
            slots.start(linear, probe)
            set_adapter(linear, probe, "probe")
            placed.append((linear, probe))
        for variable in trained:
            variable.trainable = False
        keras_internals.track_torch_parameters(model)  # the functions that it has compiled see neither probe nor flag
        yield {address: probe for address, (_, probe) in made.items()}
    finally:
        for variable in trained:
            variable.trainable = True
        for linear, probe in placed:
            slots.take(linear, probe)
        keras_internals.track_torch_parameters(model)
