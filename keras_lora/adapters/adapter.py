"""`Adapter`, the base class of all methods: a change of a linear map. Each method is a subclass in a separate file."""

from __future__ import annotations

import contextlib
import contextvars
import inspect
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import ops

from keras_lora import backend, checks
from keras_lora.adapters import initial
from keras_lora.compat import devices, keras_internals

if TYPE_CHECKING:
    from keras_lora.linear_map import LinearMap

_SKIP_INIT = contextvars.ContextVar("skip_init", default=False)
#: How many numbers the weights of an adapter may have, and how many they have so far.
_LIMIT: contextvars.ContextVar[list[int]] = contextvars.ContextVar("limit")


@contextlib.contextmanager
def skip_init() -> Iterator[None]:
    """Create adapter weights as zeros, without random draws, because their values are loaded right after."""
    token = _SKIP_INIT.set(True)
    try:
        yield
    finally:
        _SKIP_INIT.reset(token)


class TooLarge(ValueError):
    """An adapter's weights would have more numbers than allowed."""


@contextlib.contextmanager
def at_most(numbers: int) -> Iterator[None]:
    """Limit the weights of one adapter to this many numbers, trained or not, because a file can ask for any number."""
    outer = _LIMIT.get([numbers])[0]
    token = _LIMIT.set([min(numbers, outer), 0])
    try:
        yield
    finally:
        _LIMIT.reset(token)


class Adapter(keras.layers.Layer):
    """Base class of all adapter methods.

    A new method defines `build_for`, `parameter_count` and `delta_kernel`. Every other method has a correct default. If you
    override a method that computes the change in another way, multiply the change by `strength`.

    An adapter is a Keras layer, so it has weights, seeds and a config. It does not see the layer it changes, only that
    layer as a linear map (`keras_lora.linear_map.LinearMap`, passed as `linear`).

    Its weights are float32 for every dtype policy of the model, and are cast to the compute dtype when they are used. In
    bfloat16, an optimizer step of the usual size would be lost to rounding.
    """

    #: Names of weights that are computed from the base. They are not saved.
    derived: tuple[str, ...] = ()
    #: Whether `adapted_output` only adds to `y`. Several such adapters can then be applied one after the other.
    adds = True
    #: The adapter's name in the model, shared by several layers, and the part of the layer it changes.
    adapter_name = "default"
    part = ""
    #: Whether the adapter is left out of every call, whatever its strength: see `keras_lora.disable_adapters`.
    off = False
    #: The shape of the kernel as a matrix, set when the weights are created.
    matrix_shape: tuple[int, ...] = ()

    def __init__(self, name: str | None = None, dtype: Any = "float32", **kwargs: Any):
        # A fixed name: Keras numbers automatic names across the whole process, so variable paths would change.
        if kwargs:
            known = inspect.signature(type(self)).parameters
            checks.unknown_keywords(type(self).__name__, kwargs, [*known, "trainable"])
        super().__init__(name=name or type(self).__name__.lower(), dtype=dtype, **kwargs)

    def add_weight(self, shape: Any = None, *args: Any, **kwargs: Any) -> Any:
        if limit := _LIMIT.get([]):
            limit[1] += math.prod(shape or ())
            if limit[1] > limit[0]:
                raise TooLarge(f"{type(self).__name__} would have {limit[1]} numbers and more. Expected at most {limit[0]}.")
        return super().add_weight(shape, *args, **kwargs)

    def add_strength(self) -> None:
        """Create `strength`, the number that multiplies the change: 0 is off, 1 is on.

        It is a variable, so switching and rescaling also affect functions that are already compiled.
        """
        self.strength = self.add_weight(
            shape=(), initializer=initial.ones, name="strength", dtype="float32", trainable=False, autocast=False
        )

    def build_for(self, linear: LinearMap) -> None:
        """Create the weights for `linear`, with initial values that make the change zero."""
        raise TypeError(f"{type(self).__name__} does not define `build_for(linear)`, which creates the adapter's weights.")

    def create_for(self, linear: LinearMap) -> None:
        """Create the weights for `linear`, or raise an error if it cannot have this adapter. Called by the library."""
        if (problem := self.problem_with(linear)) is not None:
            raise ValueError(f"Layer '{linear.layer.name}' cannot be adapted: {problem}.")
        self.matrix_shape = tuple(linear.matrix_shape)
        with devices.following(linear.stored_kernel, linear.kernel_axes, self.matrix_shape):
            self.build_for(linear)
        self.built = True

    def problem_with(self, linear: LinearMap) -> str | None:
        """Return why `linear` cannot have this adapter and what to do, or `None`. Called before anything changes."""
        return None

    def parameter_count(self, matrix_shape: tuple[int, ...]) -> int:
        """Return the number of trainable parameters for a matrix of this shape."""
        raise TypeError(f"{type(self).__name__} does not define `parameter_count(matrix_shape)`.")

    def size(self, matrix_shape: tuple[int, ...]) -> int:
        """Return the number of all parameters for a matrix of this shape, frozen ones included, without the strength."""
        return self.parameter_count(matrix_shape)

    def delta_kernel(self, matrix: Any) -> Any:
        """Return ΔW as the paper defines it, shaped like `matrix (*groups, in_dim, out_dim)`, in float32 or wider."""
        raise TypeError(f"{type(self).__name__} does not define `delta_kernel(matrix)`, the method's definition.")

    def factors_of(
        self, weights: Mapping[str, np.ndarray], matrix_shape: tuple[int, ...] | None
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Return exact factors of ΔW, `(*groups, in_dim, k)` and `(*groups, k, out_dim)` in float64, or `None`.

        Args:
            weights: Saved weights by key, as NumPy arrays.
            matrix_shape: The shape of the kernel as a matrix; `None` for a file that is read without its base.
        """
        return None

    def numpy_factors(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Return `factors_of` for the current weights."""
        weights = {key: np.asarray(backend.to_numpy(v)) for key, v in self.saved_weights.items()}
        return self.factors_of(weights, self.matrix_shape)

    def live_factors(self, training: bool | None = None) -> tuple[Any, Any] | None:
        """Return tensors `a` and `b` whose product is the current `strength · ΔW`, or `None` if it is not a product."""
        return None

    def change(self, matrix: Any) -> Any:
        """Return `strength · ΔW`, which is added to the kernel."""
        return ops.multiply(self.strength, self.delta_kernel(matrix))

    def adapted_output(self, x: Any, y: Any, linear: LinearMap, training: bool | None = None) -> Any:
        """Return `apply(x, W + strength · ΔW)`, given the input `x` and the base output `y = apply(x, W)`.

        This default computes the definition. A method with a cheaper way overrides it; `tests/test_law.py` compares the two.
        """
        return ops.add(y, linear.apply(x, ops.cast(self.change(linear.matrix), y.dtype)))

    def output(self, x: Any, linear: LinearMap, training: bool | None = None) -> Any:
        """Return `adapted_output` from `x` alone, for methods that are faster if they compute the base output too."""
        if type(self).adapted_output is Adapter.adapted_output and linear.is_plain_matmul:
            # One large product with `W + ΔW` instead of two.
            matrix = linear.matrix
            return linear.apply(x, ops.add(matrix, ops.cast(self.change(matrix), matrix.dtype)))
        return self.adapted_output(x, linear.base_output(x), linear, training=training)

    def base_changed(self, linear: LinearMap) -> None:
        """Update what was computed from the kernel. Called after other values were loaded into it."""

    def add_factor(
        self,
        name: str,
        shape: tuple[int, ...],
        initializer: Any,
        trainable: bool = True,
        regularizer: Any = None,
        axes: str | None = None,
    ) -> keras.Variable:
        """Add a float32 weight.

        Args:
            name: Its name, which is also its key in files.
            shape: Its shape.
            initializer: A Keras initializer, or a function of the shape.
            trainable: Whether it trains.
            regularizer: A Keras regularizer.
            axes: A letter for each of its last axes, for models on several devices: `g`, `i` or `o` for one that is split as
                the kernel's groups, inputs or outputs are, and any other letter for one that is never split, such as the
                rank. By default the sizes of the axes tell.
        """
        if _SKIP_INIT.get() and name not in self.derived:
            initializer = "zeros"
        factor = self.add_weight(
            shape=shape,
            initializer=initial.NAMED.get(initializer, initializer) if isinstance(initializer, str) else initializer,
            name=name,
            dtype="float32",
            trainable=trainable,
            autocast=False,
            regularizer=regularizer,
        )
        devices.lay_out(factor, axes)
        return factor

    def misfit_with(self, other: Adapter) -> str | None:
        """Return why this adapter cannot take the values of `other`, or `None`. Called before anything changes."""
        if type(self) is type(other) and _meaning(self) == _meaning(other):
            return None
        return f"this one is {_words(self)}, the other {_words(other)}"

    def values_from(self, other: Adapter, values: dict[str, Any]) -> dict[str, Any]:
        """Convert `values`, NumPy arrays by key of an adapter configured like `other`, to values for this adapter."""
        return values

    @property
    def saved_weights(self) -> dict[str, keras.Variable]:
        """The weights that are saved in a file, by key, including those of adapters inside this one."""
        return {v.name: v for v in self.weights if v.name not in (*self.derived, "strength")}

    @property
    def _own_saved_weights(self) -> dict[str, keras.Variable]:
        own = {id(v) for v in keras_internals.own_variables(self)}
        return {key: v for key, v in self.saved_weights.items() if id(v) in own}

    def save_own_variables(self, store: Any) -> None:
        for key, variable in self._own_saved_weights.items():
            store[key] = variable

    def load_own_variables(self, store: Any) -> None:
        if not store.keys():  # a file with only the base: the adapter keeps its values
            return
        weights = self._own_saved_weights
        missing = sorted(set(weights) - set(store.keys()))
        unexpected = sorted(set(store.keys()) - set(weights))
        if missing or unexpected:
            raise ValueError(
                f"The file does not fit adapter '{self.path}'. Expected the weights {sorted(weights)}. "
                f"Received: missing {missing}, unexpected {unexpected}. Load it into a model adapted with the same method."
            )
        for key, variable in weights.items():
            variable.assign(store[key])


def with_sublayers(adapter: Adapter) -> list[keras.layers.Layer]:
    """Return the adapter and the layers inside it."""
    return [adapter, *(each for each in keras_internals.sublayers(adapter))]


def strength_of(adapter: Adapter) -> float:
    """Return the number that currently multiplies the adapter's change."""
    return float(keras.ops.convert_to_numpy(adapter.strength))


#: Arguments that do not affect trained values: the initial values, and the arguments of every Keras layer.
INIT_ARGUMENTS = ("a_initializer", "b_initializer", "name", "dtype", "trainable", "seed", "d_initial")


def method_of(adapter: Adapter) -> dict[str, Any]:
    """Return the arguments that define what the values mean: the config without those that set initial values."""
    return {key: value for key, value in adapter.get_config().items() if key not in INIT_ARGUMENTS}


def _meaning(adapter: Adapter) -> dict[str, Any]:
    """The arguments that define what the values mean, without those that define how they train."""
    return {key: value for key, value in method_of(adapter).items() if key not in ("dropout", "freeze_a")}


def _words(adapter: Adapter) -> str:
    return f"{type(adapter).__name__}({', '.join(f'{key}={value!r}' for key, value in method_of(adapter).items())})"
