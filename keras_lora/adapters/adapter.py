"""The adapter: a change of a linear map. One subclass per method, each in a file of its own beside this one."""

from __future__ import annotations

import contextlib
import contextvars
import inspect
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import ops

from keras_lora import checks
from keras_lora.compat import keras_internals

if TYPE_CHECKING:
    from keras_lora.linear_map import LinearMap

_SKIP_INIT = contextvars.ContextVar("skip_init", default=False)


@contextlib.contextmanager
def skip_init() -> Iterator[None]:
    """Start adapters whose values are read right after: their weights begin as zeros, and nothing random is drawn."""
    token = _SKIP_INIT.set(True)
    try:
        yield
    finally:
        _SKIP_INIT.reset(token)


class Adapter(keras.layers.Layer):
    """What a method must say. A new method writes `build_for`, `parameter_count` and `delta_kernel`; the rest has a default
    that is right. Whatever computes the change in another way multiplies it by `strength`.

    An adapter is a Keras layer, so it owns weights, seeds and a config. It never sees the layer it changes, only that
    layer as a linear map (`keras_lora.linear_map.LinearMap`, passed as `linear`).

    Its weights are float32 whatever the policy of the model, and are cast to the dtype of the computation where they are
    used: in bfloat16 an optimizer step of the usual size rounds to nothing.
    """

    #: Names of weights that are computed from the base and so are not saved.
    derived: tuple[str, ...] = ()
    #: Whether `adapted_output` adds to `y` and does not read it otherwise: so several add up, one after the other.
    adds = True
    #: The name under which a model knows it, which several layers share, and the part of the layer it changes.
    adapter_name = "default"
    part = ""
    #: The shape of the kernel as a matrix, once it has weights.
    matrix_shape: tuple[int, ...] = ()

    def __init__(self, name: str | None = None, dtype: Any = "float32", **kwargs: Any):
        # A fixed name: Keras's automatic one counts up through a process, and variable paths with it.
        known = inspect.signature(type(self)).parameters
        checks.unknown_keywords(type(self).__name__, kwargs, [*known, "trainable"])
        super().__init__(name=name or type(self).__name__.lower(), dtype=dtype, **kwargs)

    def add_strength(self) -> None:
        """Create `strength`, the number that multiplies the whole change: 0 is off, 1 is on.

        It is a variable, so that switching and rescaling reach functions that were compiled before.
        """
        self.strength = self.add_weight(
            shape=(), initializer="ones", name="strength", dtype="float32", trainable=False, autocast=False
        )

    def build_for(self, linear: LinearMap) -> None:
        """Create the weights for `linear` at the method's starting point, where the change is zero."""
        raise TypeError(f"{type(self).__name__} does not define `build_for(linear)`, which creates the adapter's weights.")

    def create_for(self, linear: LinearMap) -> None:
        """Create the weights for `linear`, or raise if it cannot have this adapter. The library calls this."""
        if (problem := self.problem_with(linear)) is not None:
            raise ValueError(f"Layer '{linear.layer.name}' cannot be adapted: {problem}.")
        self.matrix_shape = tuple(linear.matrix_shape)
        self.build_for(linear)
        self.built = True

    def problem_with(self, linear: LinearMap) -> str | None:
        """Why `linear` cannot have this adapter, with what to do, or `None`. Asked before anything changes."""
        return None

    def parameter_count(self, matrix_shape: tuple[int, ...]) -> int:
        """How many numbers train for a matrix of this shape."""
        raise TypeError(f"{type(self).__name__} does not define `parameter_count(matrix_shape)`.")

    def size(self, matrix_shape: tuple[int, ...]) -> int:
        """How many numbers it holds for a matrix of this shape, frozen ones too, without its strength."""
        return self.parameter_count(matrix_shape)

    def delta_kernel(self, matrix: Any) -> Any:
        """ΔW as the paper defines it, shaped like `matrix (*groups, in_dim, out_dim)`, in float32 or wider."""
        raise TypeError(f"{type(self).__name__} does not define `delta_kernel(matrix)`, the method's definition.")

    def factors_of(
        self, weights: Mapping[str, np.ndarray], matrix_shape: tuple[int, ...] | None
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """ΔW as an exact product, if it is one: `(*groups, in_dim, k)` and `(*groups, k, out_dim)` in float64.

        Args:
            weights: Saved weights by key, as NumPy arrays.
            matrix_shape: The shape of the kernel as a matrix; `None` for a file that is read without its base.
        """
        return None

    def numpy_factors(self) -> tuple[np.ndarray, np.ndarray] | None:
        """`factors_of` the weights as they are now."""
        weights = {key: np.asarray(ops.convert_to_numpy(v.value)) for key, v in self.saved_weights.items()}
        return self.factors_of(weights, self.matrix_shape)

    def live_factors(self, training: bool | None = None) -> tuple[Any, Any] | None:
        """Tensors `a` and `b` of which `strength · ΔW` is the product as it runs now, where it is one."""
        return None

    def change(self, matrix: Any) -> Any:
        """`strength · ΔW`: what is added to the kernel."""
        return ops.multiply(self.strength, self.delta_kernel(matrix))

    def adapted_output(self, x: Any, y: Any, linear: LinearMap, training: bool | None = None) -> Any:
        """`apply(x, W + strength · ΔW)`, given the input `x` and the base output `y = apply(x, W)`.

        This default computes the definition. A method with a cheaper way overrides it; the law test holds it to this one.
        """
        return ops.add(y, linear.apply(x, ops.cast(self.change(linear.matrix), y.dtype)))

    def output(self, x: Any, linear: LinearMap, training: bool | None = None) -> Any:
        """`adapted_output` from `x` alone, for a method that is faster when it computes the base output itself."""
        if type(self).adapted_output is Adapter.adapted_output and linear.is_plain_matmul:
            # One large product with `W + ΔW` and not two.
            matrix = linear.matrix
            return linear.apply(x, ops.add(matrix, ops.cast(self.change(matrix), matrix.dtype)))
        return self.adapted_output(x, linear.base_output(x), linear, training=training)

    def base_changed(self, linear: LinearMap) -> None:
        """Called when other values were loaded into the kernel: bring what was computed from it up to date."""

    def add_factor(
        self, name: str, shape: tuple[int, ...], initializer: Any, trainable: bool = True, regularizer: Any = None
    ) -> keras.Variable:
        """Add a float32 weight. `name` is also its key in files."""
        if _SKIP_INIT.get() and name not in self.derived:
            initializer = "zeros"
        return self.add_weight(
            shape=shape,
            initializer=initializer,
            name=name,
            dtype="float32",
            trainable=trainable,
            autocast=False,
            regularizer=regularizer,
        )

    def misfit_with(self, other: Adapter) -> str | None:
        """Why this adapter cannot take the values of `other`, or `None`. Asked before anything changes."""
        if type(self) is type(other) and method_of(self) == method_of(other):
            return None
        return f"this one is {_words(self)}, the other {_words(other)}"

    def values_from(self, other: Adapter, values: dict[str, Any]) -> dict[str, Any]:
        """`values`, NumPy arrays by key of an adapter configured like `other`, as this adapter would hold them."""
        return values

    @property
    def saved_weights(self) -> dict[str, keras.Variable]:
        """The weights that a file holds, by key, those of adapters inside this one included."""
        return {v.name: v for v in self.weights if v.name not in (*self.derived, "strength")}

    @property
    def _own_saved_weights(self) -> dict[str, keras.Variable]:
        own = {id(v) for v in keras_internals.own_variables(self)}
        return {key: v for key, v in self.saved_weights.items() if id(v) in own}

    def save_own_variables(self, store: Any) -> None:
        for key, variable in self._own_saved_weights.items():
            store[key] = variable

    def load_own_variables(self, store: Any) -> None:
        if not store.keys():  # a file of the base alone: the adapter keeps its values
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
    """An adapter and the layers inside it."""
    return [adapter, *(each for each in keras_internals.sublayers(adapter))]


def strength_of(adapter: Adapter) -> float:
    """The number that multiplies the adapter's change now."""
    return float(keras.ops.convert_to_numpy(adapter.strength))


#: The starting point and the Keras layer's own arguments say nothing about trained values.
INIT_ARGUMENTS = ("a_initializer", "b_initializer", "name", "dtype", "trainable", "seed")


def method_of(adapter: Adapter) -> dict[str, Any]:
    """The arguments of a method that say what its values mean: its config without its starting point."""
    return {key: value for key, value in adapter.get_config().items() if key not in INIT_ARGUMENTS}


def _words(adapter: Adapter) -> str:
    return f"{type(adapter).__name__}({', '.join(f'{key}={value!r}' for key, value in method_of(adapter).items())})"
