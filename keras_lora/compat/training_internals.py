"""Private Keras names about compiling and training a model, in one function each, as in `keras_internals.py`.

Every function documents why no public API works. All were checked on Keras 3.15, and `tests/test_keras_internals.py` tests
each by name.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import keras

from keras_lora import backend


def with_portable_names(config: Any) -> Any:
    """Return `config` with public optimizer names: on torch, Keras writes a class that other backends cannot run."""
    if not isinstance(config, dict):
        return config
    config = {key: with_portable_names(value) for key, value in config.items()}
    if str(config.get("module")).startswith("keras.src.backend.") and ".optimizers." in config["module"]:
        config |= {"module": "keras.optimizers", "registered_name": None}
    return config


def compiled_besides(model: keras.Model) -> dict[str, Any]:
    """Return the compile arguments that the config of Keras, or of a KerasHub task, forgets.

    These are the sampler of a task, and the optimizer in a `LossScaleOptimizer` that Keras made itself: the config has the
    inner one, and loading wraps it again only if the process or the config of the model has the policy `mixed_float16`.
    """
    sampler = getattr(model, "sampler", None) if overrides_compile(model) else None
    optimizer = getattr(model, "optimizer", None)
    scaled = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    forgotten = {"sampler": sampler, "optimizer": optimizer if scaled else None}
    return {key: keras.saving.serialize_keras_object(each) for key, each in forgotten.items() if each is not None}


def overrides_compile(model: keras.Model) -> bool:
    """Whether the class of `model` overrides `compile`; Keras then does not compile it again on loading."""
    return type(model).compile is not keras.Model.compile


@contextlib.contextmanager
def whole(model: keras.Model) -> Iterator[None]:
    """Hold each variable that JAX split over processes as a whole array, which Keras can save. Each process must do it."""
    optimizer = getattr(model, "optimizer", None)
    variables = [*model.variables, *(optimizer.variables if optimizer is not None else ())]
    split = [(v, v._value) for v in variables if not getattr(v._value, "is_fully_addressable", True)]
    try:
        for variable, value in split:
            variable._value = backend.to_numpy(value)
        yield
    finally:
        for variable, value in split:
            variable._value = value


def in_a_trace() -> bool:
    """Whether a step is being traced or runs statelessly: writing a variable then has no effect outside of it."""
    from keras.src.backend.common.stateless_scope import in_stateless_scope

    found: bool = in_stateless_scope() or backend.traces()
    return found


def sync_training_state(model: keras.layers.Layer) -> None:
    """On JAX, bring the variables up to date inside a `fit`, and let it read them again before its next batch.

    On JAX, `fit` keeps the values of a model outside its variables between batches, so values written to them are lost.

    Raises:
        ValueError: `model` is a part of the model that trains, so its values cannot be reached.
    """
    if keras.backend.backend() != "jax" or in_a_trace():
        return
    for layer in model._flatten_layers():
        if getattr(layer, "_jax_state", None):
            layer.jax_state_sync()
    if any(v._value is None for v in model.variables):
        raise ValueError(
            f"The variables of '{model.name}' are in use by the `fit` of a model around it. Expected the model that trains. "
            f"Received: a part of it. Pass that model, or wait for the end of the epoch."
        )


def forget_compilation(model: keras.layers.Layer) -> None:
    """Remove the compile state of models: the optimizer has variables per trained variable, and other parts keep layers."""
    for layer in model._flatten_layers():
        if isinstance(layer, keras.Model) and getattr(layer, "optimizer", None) is not None:
            del layer.optimizer  # TensorFlow tracks it until it is deleted
            layer.optimizer = None
            for name in ("_compile_config", "_compiled_trainable_state"):
                if hasattr(layer, name):
                    delattr(layer, name)


def drop_compiled_functions(model: keras.layers.Layer) -> None:
    """Remove traced functions: Keras traces them once, and a trace made before a change would run unchanged.

    A compiled model has to be compiled again. On torch `evaluate` does not ask for that, and returns an empty list.
    """
    for layer in model._flatten_layers():
        for name in ("train_function", "test_function", "predict_function", "generate_function"):
            if isinstance(layer, keras.Model) and hasattr(layer, name):
                setattr(layer, name, None)
        if getattr(layer, "compiled", False):
            layer.compiled = False
            layer.test_function = functools.partial(ask_for_compile, layer.name)


def forget_steps(model: keras.Model) -> None:
    """Remove the traced functions that train and evaluate; the model stays compiled, because its variables are the same."""
    model.train_function = model.test_function = None


def compiled_losses(model: keras.Model, y: Any, logits: keras.KerasTensor) -> list[tuple[keras.losses.Loss, Any]]:
    """Return the losses that `compile` was given, as objects, with their weights; Keras makes them at the first batch.

    The metrics are made too. `logits` is a symbolic tensor.
    """
    for each in (model._compile_loss, model._compile_metrics):
        if each is not None and not each.built:
            each.build(y, logits)
    return [(each.loss, each.loss_weights) for each in model._compile_loss._flat_losses] if model._compile_loss else []


def compiled_metrics(model: keras.Model) -> keras.Metric | None:
    """Return the metrics that `compile` was given as one metric, or `None`; `model.metrics` has others too."""
    return model._compile_metrics


def with_added_losses(model: keras.Model, loss: Any) -> Any:
    """Add the losses of regularizers and of `add_loss`, as `Model.compute_loss` does after the loss of `compile`."""
    losses = [loss, *(model._aggregate_additional_loss(each) for each in model.losses)]
    return losses[0] if len(losses) == 1 else keras.ops.sum(losses)


def share_of_replica(loss: Any) -> Any:
    """Divide a mean loss by the number of replicas of a TensorFlow strategy, as the losses of Keras do."""
    from keras.src.losses.loss import scale_loss_for_distribution

    return scale_loss_for_distribution(loss)


def ask_for_compile(name: str, *args: Any) -> None:
    """Replaces the `test_function` of the model `name` until it is compiled again."""
    raise ValueError(f"'{name}' has other variables than when it was compiled. Call `compile()` again before `evaluate()`.")


@contextlib.contextmanager
def unallocated() -> Iterator[None]:
    """Context manager in which new variables have a shape and an initializer, but no value, for good.

    Keras defers values inside a `StatelessScope`, but no optimizer can be made there, and a later scope fills the variables.
    """
    before = vars(keras.Variable).get("_initialize_with_initializer")

    def defer(variable: Any, initializer: Any) -> None:
        variable._value, variable._initializer = None, initializer

    keras.Variable._initialize_with_initializer = defer
    try:
        yield
    finally:
        if before is None:
            del keras.Variable._initialize_with_initializer
        else:
            keras.Variable._initialize_with_initializer = before


def has_value(variable: keras.Variable) -> bool:
    """Whether a variable has a value (its public `value` makes one)."""
    return variable._value is not None


def averages_of(optimizer: Any) -> list[Any]:
    """Return the moving averages of an optimizer with `use_ema`. `SwapEMAWeights` reads them by the same private name."""
    found: list[Any] = optimizer._model_variables_moving_average
    return found


def direction_of(model: keras.Model, monitor: str) -> str:
    """Return "min" or "max", which of them is better for a metric; Keras knows it for its callbacks alone.

    Raises:
        ValueError: It is not known.
    """
    from keras.src.callbacks.monitor_callback import MonitorCallback

    callback = MonitorCallback(monitor, "auto")
    callback.set_model(model)
    try:
        callback._set_monitor_op()
    except ValueError as error:
        raise ValueError(
            f"It is not known whether '{monitor}' is better when it is larger or smaller. Pass `mode='max'` or `mode='min'`."
        ) from error
    return "max" if callback.monitor_op is keras.ops.greater else "min"
