"""Private Keras names about the calls of layers: masks, scopes, losses and random numbers. As in `keras_internals.py`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras

_CALL_STATE = ("current_call_ctx", "autocast_scope")


def dtype_in_call(layer: keras.layers.Layer, variable: keras.Variable, stored_apart: bool = False) -> str:
    """Return the dtype of `variable` inside a call of `layer`, or the one it would have if it were not stored apart."""
    dtype = layer.variable_dtype if stored_apart else keras.backend.standardize_dtype(variable.dtype)
    autocast = stored_apart or getattr(variable, "_autocast", True)
    casts = layer.autocast and autocast and keras.backend.is_float_dtype(dtype)
    found: str = layer.compute_dtype if casts else dtype
    return found


def is_rematerialized(layer: keras.layers.Layer) -> bool:
    """Whether `layer` was made in a `keras.RematScope`, so that its call runs a second time for the gradient."""
    return getattr(layer, "_remat_mode", None) is not None


class _DrawnSeed(keras.random.SeedGenerator):
    def __init__(self, generator: keras.random.SeedGenerator, drawn: Any):
        self._initial_seed, self._drawn = generator._initial_seed, drawn

    def next(self, ordered: bool = True) -> Any:
        return self._drawn


def drawn_seed(generator: keras.random.SeedGenerator, drawn: Any) -> keras.random.SeedGenerator:
    """Turn the result of `generator.next()` into a `seed` for `keras.random`, which takes no tensor, to repeat the numbers.

    On torch, a generator without a seed leaves the random numbers to torch, and `keras.remat` repeats them.
    """
    return _DrawnSeed(generator, drawn)


def copy_mask(source: Any, to: Any) -> Any:
    """Give the tensor `to` the Keras mask of `source`, and return it (there is no public way to set one)."""
    from keras.src.backend import get_keras_mask

    mask = get_keras_mask(source)
    return to if mask is None else with_mask(to, mask)


def mask_of(tensor: Any) -> Any:
    """Return the Keras mask of a tensor, or `None` (Keras exports no way to read one)."""
    from keras.src.backend import get_keras_mask

    return get_keras_mask(tensor)


def with_mask(tensor: Any, mask: Any) -> Any:
    """Give a tensor a Keras mask, and return it (there is no public way to set one)."""
    from keras.src.backend import set_keras_mask

    set_keras_mask(tensor, mask)
    return tensor


def seed_states(layer: keras.layers.Layer) -> list[keras.Variable]:
    """Return the states of the seed generators of `layer` and its sublayers, which Keras tracks privately."""
    return [each.state for part in layer._flatten_layers() for each in part._seed_generators]


def applied_again(tensor: keras.KerasTensor, x: Any, training: bool | None = None) -> Any:
    """Apply the operation that made a symbolic tensor from another one to `x`, as a functional model would."""
    operation, node_index, _ = tensor._keras_history
    node = operation._inbound_nodes[node_index]
    args, kwargs = node.arguments.fill_in({id(each): x for each in node.input_tensors})
    if training is not None and "training" in getattr(operation, "_call_context_args", {}):
        kwargs["training"] = training
    return operation(*args, **kwargs)


@contextlib.contextmanager
def with_global_state(values: dict[str, Any]) -> Iterator[None]:
    """Context manager in which entries of Keras's global state have these values (Keras exports no setter)."""
    from keras.src.backend.common import global_state

    before = {name: global_state.get_global_attribute(name) for name in values}
    for name, value in values.items():
        global_state.set_global_attribute(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            global_state.set_global_attribute(name, value)


def call_context() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Return a maker of contexts like the present one: what layers read of an outer call (training) and of its dtypes.

    A layer's code that runs outside of the layer's call, for a gradient, would not find them.
    """
    from keras.src.backend.common import global_state

    values = {name: global_state.get_global_attribute(name) for name in _CALL_STATE}
    return lambda: with_global_state(values)


def runs_inference() -> bool:
    """Whether a layer runs, and not for training: then it may be for another runtime, as in an export."""
    from keras.src.backend.common import global_state

    found = global_state.get_global_attribute("current_call_ctx")
    return found is not None and not found.training


def as_stored() -> contextlib.AbstractContextManager[None]:
    """Context manager in which variables have the dtype in which they are stored (Keras's own scope always casts)."""
    return with_global_state({"autocast_scope": None})


def scope_within(pairs: list[tuple[keras.Variable, Any]]) -> keras.StatelessScope:
    """Return a scope in which variables have these values, and all others those of the scope around it.

    Keras's own inner scope shows the stored values of the others, not those of the outer scope.
    """
    from keras.src.backend.common.stateless_scope import get_stateless_scope

    scope = keras.StatelessScope(pairs, collect_losses=True, initialize_variables=False)
    outer = get_stateless_scope()
    scope.state_mapping = {**(outer.state_mapping if outer is not None else {}), **scope.state_mapping}
    return scope


def forget_losses(layer: keras.layers.Layer, losses: Iterable[Any]) -> None:
    """Let the layers below forget losses of a call in a scope, which Keras finds again by their addresses in memory."""
    keys = {id(each) for each in losses}
    for each in layer._flatten_layers() if keys else ():
        each._loss_ids -= keys
