"""More than one device: the layouts of an adapter's weights, and whether a model is where it will train.

On JAX `keras.distribution` distributes a model, on TensorFlow `tf.distribute`, on torch `DistributedDataParallel`. The first
two decide where a variable is when it is created, so most mistakes are about the order of calls.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import keras

from keras_lora import backend
from keras_lora.compat import keras_internals

#: For the weights of one adapter: the mesh axis that splits each role of its kernel's axes, and the sizes of its matrix.
_KERNEL: contextvars.ContextVar[tuple[dict[str, str | None], tuple[int, ...]]] = contextvars.ContextVar("kernel")


@contextlib.contextmanager
def following(kernel: Any, kernel_axes: str, matrix_shape: tuple[int, ...]) -> Iterator[None]:
    """Let `lay_out` lay out weights like this kernel, whose axes have the roles `kernel_axes` (`LinearMap.kernel_axes`).

    A matrix merges the axes of a role, and its first entries come first. So it can be split where the first of these axes
    is split. If only another one is, the entries of one device are not next to each other, and the role is not split.
    """
    distribution = _distribution()
    axes = () if distribution is None or kernel is None else getattr(distribution.get_variable_layout(kernel), "axes", ())
    split: dict[str, str | None] = {}
    if len(axes) == len(kernel_axes):  # a packed kernel has other axes
        for role, axis in zip(kernel_axes, axes, strict=True):
            split.setdefault(role, axis)
    token = _KERNEL.set((split, matrix_shape))
    try:
        yield
    finally:
        _KERNEL.reset(token)


def lay_out(variable: keras.Variable, roles: str | None = None) -> None:
    """Lay out a new weight of an adapter like the kernel that `following` names, unless the user's layout map has it.

    Args:
        variable: The weight.
        roles: A letter for each of its last axes: `g`, `i` and `o` as in `LinearMap.kernel_axes`, any other letter for an
            axis that is never split, such as the rank. By default the sizes of the axes tell.
    """
    split, matrix_shape = _KERNEL.get(({}, ()))
    distribution = _distribution()
    if distribution is None or not any(split.values()):
        return
    if distribution.get_tensor_layout(variable.path) is not None:
        return
    roles = roles if roles is not None else _roles_by_size(tuple(variable.shape), matrix_shape)
    rank = len(variable.shape)
    axes = [split.get(role) for role in (" " * rank + roles)[len(roles) :]]
    keras_internals.set_layout(variable, keras.distribution.TensorLayout(axes, distribution.device_mesh))


def _roles_by_size(shape: tuple[int, ...], matrix_shape: tuple[int, ...]) -> str:
    """The roles of axes in the order of the matrix, where the sizes are those of the matrix."""
    own = list(zip("gio"[-len(matrix_shape) :], matrix_shape, strict=True))[-len(shape) :]
    return "".join(role if size == each else "." for (role, each), size in zip(own, shape[-len(own) :], strict=True))


def _distribution() -> keras.distribution.Distribution | None:
    return keras.distribution.distribution() if keras.backend.backend() == "jax" else None


def check(layer: keras.layers.Layer) -> None:
    """Raise an error if weights created now would not be on the devices of the weights of `layer`."""
    _raise(layer, _of_tensorflow(layer) if keras.backend.backend() == "tensorflow" else None)
    check_training(layer)


def check_training(layer: keras.layers.Layer) -> None:
    """Raise an error if the weights of `layer` are not on the devices where it would train now."""
    _raise(layer, {"jax": _of_jax, "torch": _of_torch}.get(keras.backend.backend(), _elsewhere)(layer))


def _raise(layer: keras.layers.Layer, problem: str | None) -> None:
    if problem is not None:
        raise ValueError(f"'{layer.name}' {problem}")


def _of_jax(layer: keras.layers.Layer) -> str | None:
    distribution = keras.distribution.distribution()
    now = None if distribution is None else distribution.device_mesh
    for variable in layer.variables:
        layout = keras_internals.layout_of(variable)
        if keras_internals.value_now(variable) is None or (layout is not None and not hasattr(layout, "device_mesh")):
            continue  # it is laid out later, or by hand
        then = None if layout is None else layout.device_mesh
        if _devices(then) != _devices(now):
            return (
                "is not on the devices of the distribution that is set now. Expected one distribution, set before the model "
                "is built or loaded, and still set when it is adapted and trained. Received: "
                f"'{variable.path}', created with {then or 'no distribution'}, and {now or 'no distribution'} now. Call "
                "`keras.distribution.set_distribution(...)` first and build the model after it, or do all of it inside "
                "`with distribution.scope():`."
            )
    return None


def _of_tensorflow(layer: keras.layers.Layer) -> str | None:
    now = backend.strategy_now()
    for variable in layer.variables:
        value = keras_internals.value_now(variable)
        then = getattr(value, "distribute_strategy", None)
        if value is not None and then is not now:
            then, now = ("no strategy" if each is None else f"a {type(each).__name__}" for each in (then, now))
            return (
                "was not created with the `tf.distribute` strategy that is in scope now. Expected one strategy for all "
                f"variables. Received: '{variable.path}', created with {then}, and {now} now. Build or load the "
                "model, adapt it and compile it inside one `with strategy.scope():`."
            )
    return None


def _of_torch(layer: keras.layers.Layer) -> str | None:
    if any(cls.__name__ == "FSDPModule" for each in keras_internals.with_all_sublayers(layer) for cls in type(each).__mro__):
        return (
            "is wrapped by `fully_shard` (FSDP2), with which no Keras model trains: Keras keeps the parameters from before. "
            "Expected a model that is not wrapped. Build it again, and use torch's `DistributedDataParallel`, or the JAX "
            "backend with `keras.distribution.ModelParallel` if it does not fit on one device."
        )
    return _elsewhere(layer)


def _elsewhere(layer: keras.layers.Layer) -> str | None:
    if (distribution := keras.distribution.distribution()) is None:
        return None
    name = keras.backend.backend()
    use = {"tensorflow": "`tf.distribute.MirroredStrategy`", "torch": "torch's `DistributedDataParallel`"}
    return (
        f"would run on one device, because `keras.distribution` does nothing on the backend '{name}'. Expected no "
        f"distribution, or the JAX backend. Received: {distribution}. Call `keras.distribution.set_distribution(None)`, and "
        f"use {use.get(name, 'one device')} for several devices."
    )


def _devices(mesh: Any) -> list[str]:
    """The devices of a mesh; a mesh of one device is no mesh."""
    return [] if mesh is None or mesh.devices.size == 1 else [str(device) for device in mesh.devices.flatten()]
