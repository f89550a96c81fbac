"""`plan` says how much memory a training step of a model needs, before it runs or even has weights."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import keras
from keras import ops
from rich.table import Table

from keras_lora import backend, checks, reports
from keras_lora.applying import apply_lora
from keras_lora.compat import keras_internals, training_internals
from keras_lora.memory.rematerializing import rematerialize, rematerialized

#: The rows of a plan: what each is.
ROWS = {
    "frozen": "weights, frozen",
    "trained": "weights, trained",
    "optimizer": "optimizer",
    "batch": "batch",
    "gradients": "gradients",
    "kept": "kept for the backward pass",
    "logits": "outputs of the model",
    "temporary": "temporary in the step, these three included",
    "peak": "peak of a step",
}
#: These are parts of "temporary": they are not added to the peak, and XLA may need less than their sum.
INSIDE = ("gradients", "kept", "logits")


@dataclass(repr=False)
class MemoryPlan(reports.Printed):
    """The memory of a training step, in bytes on one device. Printing it prints a table.

    Attributes:
        bytes: By part: `"frozen"` and `"trained"` weights, `"optimizer"`, `"batch"`, and `"temporary"`, which add up to
            `"peak"`. `"gradients"`, `"kept"` (for the backward pass) and `"logits"` (the outputs of the model) are within
            `"temporary"`.
        weights: The bytes of the weights by dtype.
        parameters: The number of parameters, and of those that train.
        setting: What was planned, in words.
    """

    bytes: dict[str, int]
    weights: dict[str, int] = field(default_factory=dict)
    parameters: tuple[int, int] = (0, 0)
    setting: str = ""

    @property
    def peak(self) -> int:
        """The bytes that a training step holds at most."""
        return self.bytes["peak"]

    def data(self) -> dict[str, Any]:
        """The plan as plain data that JSON can store."""
        total, trained = self.parameters
        sizes = {"bytes": self.bytes, "weights": self.weights}
        return {**sizes, "parameters": total, "trained parameters": trained, "setting": self.setting}

    def table(self, width: float) -> Table:
        """The table."""
        table = reports.table_of(("on each device",), ("bytes", "of the peak"))
        for key, label in ROWS.items():
            if key == "peak":
                table.add_section()
            inside = "  " if key in INSIDE else ""
            table.add_row(inside + label, readable(self.bytes[key]), f"{100 * self.bytes[key] / self.peak:.0f} %")
        return table

    def lines(self) -> list[str]:
        dtypes = ", ".join(f"{readable(size)} in {dtype}" for dtype, size in sorted(self.weights.items()))
        total, trained = self.parameters
        return [f"{self.setting}; weights: {dtypes}", reports.total(trained, total)]


def readable(size: int) -> str:
    """A number of bytes in a few characters: "512 B", "5.24 MB"."""
    number, unit = float(size), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if number < 1000:
            break
        number, unit = number / 1000, larger
    return f"{number:.3g} {unit}"


def plan(
    model: keras.Model,
    *,
    batch_size: int = 1,
    sequence_length: int | None = None,
    input_shape: Any = None,
    optimizer: Any = "adam",
    loss: Any = None,
    rank: int | None = None,
    base_dtype: str | None = None,
    remat: bool = False,
    mesh: Any = None,
    layout_map: Any = None,
    **adapter: Any,
) -> MemoryPlan:
    """Plan the memory of a training step: weights, optimizer, activations, and the peak.

    XLA compiles the step that Keras would run, for arrays that do not exist, and counts its bytes; nothing is computed or
    allocated. It works on JAX; a plan on a CPU is a good estimate for other devices, not an exact one, because each
    compiler fuses other operations.

    By default it plans the model as it is: full fine-tuning if everything trains, or its adapters. With `rank` or another
    argument of `apply_lora`, it plans what the model would need after `apply_lora`, on a copy that has no weights.

    Args:
        model: A Keras model with known inputs.
        batch_size: Examples in a step. With gradient accumulation, those of one part.
        sequence_length: The size of input axes that are open in the model.
        input_shape: The shape of an input without the batch, or a table of them by name, if the model does not say it.
        optimizer: A Keras optimizer or its name. Its slots, gradient accumulation and moving average are counted.
        loss: A loss or its name. By default that of the compiled model, else sparse categorical crossentropy of logits if
            the output has several units, else the mean squared error.
        rank, base_dtype, adapter: Arguments of `apply_lora`: plan what the model would need with them.
        remat: Plan it after `rematerialize`.
        mesh: The sizes of the axes of a mesh of devices, such as `{"batch": 4, "model": 2}`, or a
            `keras.distribution.DeviceMesh`. The first axis splits the batch. The plan is for one device.
        layout_map: Which axis of the mesh splits which axis of a variable: a `keras.distribution.LayoutMap`, or tuples by
            regular expression, such as `{"dense.*kernel": (None, "model")}`. What is temporary is planned as if only the
            batch were split, so it is too large where a map splits activations too.

    Returns:
        A `MemoryPlan`.

    Raises:
        ValueError: An input has an open size, the batch cannot be split, or the model has no config to make a copy from.
        NotImplementedError: The backend is not JAX.

    Example:

    >>> import keras, keras_lora
    >>> model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(32), keras.layers.Dense(2)])
    >>> if keras.backend.backend() == "jax":
    ...     full = keras_lora.plan(model, batch_size=8)
    ...     lora = keras_lora.plan(model, batch_size=8, rank=2)
    ...     assert lora.bytes["optimizer"] < full.bytes["optimizer"]
    """
    if not backend.traces_memory():
        raise NotImplementedError(
            f"`plan()` counts bytes with XLA through JAX. Expected the backend jax. Received: {keras.backend.backend()}. "
            "Set the environment variable KERAS_BACKEND=jax for the plan; the weights and the optimizer are as large on "
            "every backend."
        )
    axes = mesh_axes(mesh)
    changes = {"rank": rank, "base_dtype": base_dtype, **adapter}
    changes = {key: value for key, value in changes.items() if value is not None}
    if changes or remat:
        model = changed_copy(model, changes, remat)
    data_axis = next(iter(axes), None)
    parts = axes[data_axis] if data_axis is not None else 1
    if checks.positive_integer("batch_size", batch_size) % parts:
        raise ValueError(f"`batch_size` must be a multiple of the {parts} devices that split it. Received: {batch_size}.")
    x = inputs_of(model, batch_size // parts, sequence_length, input_shape)
    with training_internals.unallocated():
        optimizer = _own(optimizer)
        optimizer.build(model.trainable_variables)
    sizes = _sizes(model, optimizer, x, _loss_for(model, loss))
    split = shards(layout_map, axes)
    for key, variables in _groups(model, optimizer).items():
        of = _as_references(split, model.trainable_variables) if key == "optimizer" else split
        sizes[key] = sum(bytes_of(v) // of(v) for v in variables)
    sizes["gradients"] = sum(bytes_of(v) // split(v) for v in model.trainable_variables)
    sizes["peak"] = sum(sizes[key] for key in ("frozen", "trained", "optimizer", "batch", "temporary"))
    dtypes: dict[str, int] = {}
    for v in model.weights:
        dtype = keras.backend.standardize_dtype(v.dtype)
        dtypes[dtype] = dtypes.get(dtype, 0) + bytes_of(v) // split(v)
    return MemoryPlan(
        {key: sizes[key] for key in ROWS},
        dtypes,
        (_count(model.weights), _count(model.trainable_variables)),
        _in_words(model, optimizer, batch_size, x, axes),
    )


def _sizes(model: keras.Model, optimizer: Any, x: Any, loss: Any) -> dict[str, int]:
    """The bytes of the batch, and of what a step holds for a while."""
    trained, fixed = model.trainable_variables, model.non_trainable_variables
    forward = _forward(model)
    outputs = backend.shapes_of(lambda *given: forward(*given)[0], trained, fixed, x)
    if loss is None:
        units = max(each.shape[-1] for each in keras.tree.flatten(outputs))
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True) if units > 1 else keras.losses.MeanSquaredError()
    y = _targets_for(loss, outputs)

    def total(trained: Any, fixed: Any, x: Any, y: Any) -> tuple[Any, Any]:
        found, fixed, losses = forward(trained, fixed, x)
        return sum(losses, start=_sum_of(loss, y, found)), fixed

    def step(state: Any, data: Any) -> Any:
        (trained, fixed, slots), (x, y) = state, data
        (value, fixed), gradients = backend.value_and_gradient(total, trained, fixed, x, y)
        trained, slots = optimizer.stateless_apply(slots, gradients, trained)
        return (trained, fixed, slots), value

    found = backend.step_memory(step, (trained, fixed, optimizer.variables), (x, y))
    batch = sum(map(bytes_of, keras.tree.flatten((x, y))))
    return {
        "batch": batch,
        "temporary": found["temporary"] + found["outputs"],
        "kept": backend.kept_bytes(lambda *given: total(*given)[0], trained, fixed, x, y),
        "logits": sum(map(bytes_of, keras.tree.flatten(outputs))),
    }


def _forward(model: keras.Model) -> Callable[..., Any]:
    def forward(trained: Any, fixed: Any, x: Any) -> Any:
        return model.stateless_call(trained, fixed, x, training=True, return_losses=True)

    return forward


def _sum_of(loss: Any, y: Any, outputs: Any) -> Any:
    """The loss of all outputs."""
    pairs = zip(keras.tree.flatten(y), keras.tree.flatten(outputs), strict=True)
    return sum(ops.mean(loss(each, found)) for each, found in pairs)


def _loss_for(model: keras.Model, loss: Any) -> Any:
    if loss is None and model.compiled and isinstance(getattr(model, "loss", None), str | keras.losses.Loss):
        loss = model.loss
    return keras.losses.get(loss)


def _targets_for(loss: Any, outputs: Any) -> Any:
    """Shapes of the targets of each output."""

    def target(output: Any) -> keras.KerasTensor:
        sparse = "sparse" in re.sub(r"(?<!^)(?=[A-Z])", "_", getattr(loss, "__name__", type(loss).__name__)).lower()
        shape = output.shape[:-1] if sparse else output.shape
        return keras.KerasTensor(shape, "int32" if sparse else "float32")

    return keras.tree.map_structure(target, outputs)


# The model, the optimizer and the batch.


def changed_copy(model: keras.Model, changes: Mapping[str, Any], remat: bool) -> keras.Model:
    """A copy of `model` that has shapes but no values, adapted and rematerialised as told."""
    with training_internals.unallocated():
        copy = type(model).from_config(model.get_config())
        shapes = [[(tuple(v.shape), v.trainable) for v in each.weights] for each in (copy, model)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"'{model.name}' made from its own config has other weights, so there is no copy to plan with. Expected a "
                "`get_config` that returns all that the constructor needs. Use `apply_lora` and `rematerialize` first, and "
                "plan the model as it is."
            )
        change(copy, changes, remat)
    return copy


def change(model: keras.Model, changes: Mapping[str, Any], remat: bool) -> None:
    """Adapt a model as told by arguments of `apply_lora`, and rematerialise its blocks."""
    if changes:
        apply_lora(model, **changes)
    if remat:
        rematerialize(model)


def _own(optimizer: Any) -> Any:
    """A fresh optimizer with the settings of `optimizer`."""
    optimizer = keras.optimizers.get(optimizer)
    return type(optimizer).from_config(optimizer.get_config())


def inputs_of(model: keras.Model, batch: int, sequence_length: int | None, input_shape: Any) -> Any:
    """The inputs of a model as symbols with a shape and a dtype."""
    graph: Any = keras_internals.graph_of(model) or model
    spec = graph.input if getattr(graph, "inputs", None) else None
    if spec is None and input_shape is None:
        raise ValueError(f"'{model.name}' does not say its inputs. Pass `input_shape`, without the batch.")
    if spec is None:
        named = input_shape if isinstance(input_shape, Mapping) else {"": input_shape}
        spec = {name: keras.KerasTensor((None, *shape), "float32") for name, shape in named.items()}
        spec = spec if isinstance(input_shape, Mapping) else spec[""]

    def closed(tensor: Any) -> keras.KerasTensor:
        given = input_shape.get(tensor.name) if isinstance(input_shape, Mapping) else input_shape
        shape = tuple(given) if given is not None else tuple(sequence_length if n is None else n for n in tensor.shape[1:])
        if None in shape:
            raise ValueError(
                f"Input '{tensor.name}' of '{model.name}' has the shape {tuple(tensor.shape)}, with an open size. Pass "
                "`sequence_length` or `input_shape`."
            )
        return keras.KerasTensor((batch, *shape), tensor.dtype)

    return keras.tree.map_structure(closed, spec)


def _groups(model: keras.Model, optimizer: Any) -> dict[str, list[Any]]:
    return {
        "frozen": list(model.non_trainable_variables),
        "trained": list(model.trainable_variables),
        "optimizer": list(optimizer.variables),
    }


def _in_words(model: keras.Model, optimizer: Any, batch_size: int, x: Any, axes: Mapping[str, int]) -> str:
    shapes = ", ".join(str((batch_size, *each.shape[1:])) for each in keras.tree.flatten(x)[:1])
    words = [f"'{model.name}'", f"a batch of {shapes}", type(optimizer).__name__]
    if optimizer.gradient_accumulation_steps:
        words.append(f"{optimizer.gradient_accumulation_steps} parts")
    if blocks := rematerialized(model):
        words.append(f"{len(blocks)} rematerialised blocks")
    if axes:
        words.append(f"a mesh of {' × '.join(f'{size} {name}' for name, size in axes.items())}")
    return ", ".join(words)


# Bytes.


def bytes_of(tensor: Any) -> int:
    """The bytes of a variable or a symbol."""
    bits = re.search(r"\d+", keras.backend.standardize_dtype(tensor.dtype))
    size: int = math.prod(tensor.shape) * (max(int(bits.group()) // 8, 1) if bits else 1)
    return size


def _count(variables: Iterable[Any]) -> int:
    return sum(math.prod(v.shape) for v in variables)


# Devices.


def mesh_axes(mesh: Any) -> dict[str, int]:
    """The sizes of the axes of a mesh, by name."""
    if mesh is None:
        return {}
    if hasattr(mesh, "axis_names"):
        return dict(zip(mesh.axis_names, mesh.shape, strict=True))
    if not isinstance(mesh, Mapping):
        raise TypeError(f"`mesh` must be a table of sizes or a `DeviceMesh`. Received: mesh={mesh!r}.")
    return {str(name): checks.positive_integer(f"mesh[{name!r}]", size) for name, size in mesh.items()}


def shards(layout_map: Any, axes: Mapping[str, int]) -> Callable[[Any], int]:
    """A function from a variable to the number of parts in which its bytes lie on different devices."""
    rules: dict[str, Any] = {key: getattr(each, "axes", each) for key, each in dict(layout_map or {}).items()}
    unknown = sorted({str(a) for each in rules.values() for a in each if a is not None} - axes.keys())
    if unknown:
        raise ValueError(f"`layout_map` names axes {unknown} that `mesh` does not have. Received: mesh={dict(axes)}.")

    def split(variable: Any) -> int:
        for key, layout in rules.items():
            if re.search(key, variable.path) and len(layout) == len(variable.shape):
                return math.prod(axes[str(axis)] for axis in layout if axis is not None)
        return 1

    return split


def _as_references(split: Callable[[Any], int], trained: Iterable[Any]) -> Callable[[Any], int]:
    """`split` for the slots of an optimizer, which lie where their variables lie. Keras names a slot after its variable."""
    split_ones = [v for v in trained if split(v) > 1]

    def of(slot: Any) -> int:
        own = (v for v in split_ones if v.path.replace("/", "_") in slot.path and tuple(v.shape) == tuple(slot.shape))
        return next((split(v) for v in own), 1)

    return of
