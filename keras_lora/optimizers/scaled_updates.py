"""`ScaledUpdates`: multiply the updates of any Keras optimizer by a factor per role, such as 16 for `lora_b`."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import keras
from keras import ops

from keras_lora import checks
from keras_lora.compat import training_internals
from keras_lora.targets.heads import trained_head
from keras_lora.targets.patterns import names_path, nearest, shown

#: A name, a path or a glob of names in the path of a variable, or a compiled regular expression for the whole path.
_Pattern = str | re.Pattern[str]


class _Variables:
    """The variables that an optimizer was built for, with their factors. Not a list, because Keras would track it."""

    def __init__(self, variables: Sequence[Any], factors: Sequence[float]):
        self.all = list(variables)
        self.factor_of = {id(v): factor for v, factor in zip(variables, factors, strict=True)}


@keras.saving.register_keras_serializable("keras_lora")
class ScaledUpdates(keras.optimizers.Optimizer):
    """Multiply the updates of another optimizer by a factor for each role: LoRA+, or a faster rate for a new head.

    A factor of 16 is a learning rate 16 times as high for these variables, whatever the optimizer and its schedule. The
    update is scaled and not the gradient, because Adam's update does not depend on the size of the gradient.

    Everything else is done by `inner`, whose arguments keep their meaning: the learning rate and its schedule, clipping
    (global over all variables), gradient accumulation, a fixed loss scale, weight decay and the moving average. Keras
    multiplies weight decay by the learning rate, so it is scaled too. The moving average is of the scaled values. In
    float16, put `keras.optimizers.LossScaleOptimizer` around this optimizer, as `compile` does by itself.

    With Adam and no weight decay, `{"lora_b": λ}` (LoRA+) is the same training as plain LoRA with `alpha · λ`, if `B` starts
    at zero. With SGD it is `alpha · sqrt(λ)`.

    Args:
        inner: A Keras optimizer, its name, or its config.
        factors: A positive number for each pattern; 1 for variables that no pattern matches. If several match, the first
            wins. A pattern is a name or path of names in the path of a variable (`"lora_b"`, `"encoder/layer_0"`), a glob
            for these (`"layer_?/*/lora_b"`), or a compiled regular expression that matches the whole path.
        model: The adapted model. With it, the patterns are checked at once, and `"head"` also means what `train="head"`
            trains, whatever its name. Without it they are checked when training begins.
        name: The name of the optimizer.

    Raises:
        ValueError: A factor is not a positive number; a pattern matches none of the variables that train (the message lists
            the nearest names); or `inner` is a `LossScaleOptimizer`.

    Example:

    >>> import keras, keras_lora
    >>> model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(32), keras.layers.Dense(2)])
    >>> model = keras_lora.apply_lora(model, rank=4, train="head")
    >>> adam = keras.optimizers.Adam(1e-3)
    >>> optimizer = keras_lora.optimizers.ScaledUpdates(adam, {"lora_b": 16, "head": 4}, model=model)
    >>> model.compile(optimizer, "mse")
    >>> [optimizer.factor_of(v) for v in model.trainable_variables]
    [1.0, 16.0, 4.0, 4.0]

    Reference:
        [Hayou et al., 2024](https://arxiv.org/abs/2402.12354), for LoRA+
    """

    def __init__(
        self,
        inner: Any,
        factors: Mapping[_Pattern, float] | Iterable[tuple[_Pattern, float]],
        *,
        model: keras.layers.Layer | None = None,
        name: str = "scaled_updates",
    ):
        inner = keras.optimizers.get(inner)
        if isinstance(inner, keras.optimizers.LossScaleOptimizer):
            raise ValueError(
                "`inner` is a LossScaleOptimizer, which has to be outside to skip a step. Write "
                "`LossScaleOptimizer(ScaledUpdates(optimizer, factors))`."
            )
        pairs = list(factors.items() if isinstance(factors, Mapping) else factors)
        if wrong := [pattern for pattern, _ in pairs if not isinstance(pattern, (str, re.Pattern))]:
            raise TypeError(
                "A pattern of `factors` must be a name, a path, a glob or a compiled regular expression for paths of "
                f"variables. Received: {', '.join(map(checks.described, wrong))}."
            )
        pairs = [(pattern, float(checks.positive_number(f"factors[{shown(pattern)}]", each))) for pattern, each in pairs]
        if model is not None:
            pairs = _with_head(pairs, model)
            _factors(pairs, model.trainable_variables)
        average = {key: getattr(inner, key) for key in ("use_ema", "ema_momentum", "ema_overwrite_frequency")}
        super().__init__(learning_rate=0.0, name=name, **average)
        self.inner = inner
        inner.use_ema = False  # the average has to be of the scaled values
        self.scaled: Any = _Scaling(pairs)

    def factor_of(self, variable: Any) -> float:
        """Return the factor of a variable that this optimizer was built for, or of one with its path."""
        built: _Variables | None = self.scaled.variables
        return _match(self.scaled.pairs, _path(variable)) if built is None else built.factor_of[id(variable)]

    def build(self, variables: Any) -> None:
        """Create the variables of `inner`, and look up the factors."""
        if self.built:
            return
        self.scaled.variables = _Variables(variables, _factors(self.scaled.pairs, variables))
        if not self.inner.built:
            self.inner.build(variables)
        super().build(variables)

    @property
    def variables(self) -> list[Any]:
        """The variables of this optimizer and of `inner`."""
        return [*super().variables, *self.inner.variables]

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        """Update variables according to their gradients, `inner` first."""
        if not self.built and trainable_variables is not None:
            with keras.name_scope(self.name):
                self.build(list(trainable_variables))
        known: _Variables | None = self.scaled.variables
        variables = known.all if trainable_variables is None and known else list(trainable_variables or ())
        # Float8 training writes its scales in place of an update.
        scaled = [v for v in variables if self.factor_of(v) != 1 and not getattr(v, "overwrite_with_gradient", False)]
        before = [ops.copy(v) for v in scaled]
        first_step = ops.equal(self.inner.iterations, 0)
        step = ops.add(self.inner.iterations, 1)
        with _without_constraints(scaled):
            self.inner.apply(grads, trainable_variables)
        for v, old in zip(scaled, before, strict=True):
            new = ops.add(old, ops.multiply(self.factor_of(v), ops.subtract(v, old)))
            constraint = getattr(v, "constraint", None)
            self.assign(v, new if constraint is None else constraint(new))
        if self.use_ema and known is not None:
            self._average(known.all, first_step, step)

    def _average(self, variables: list[Any], first_step: Any, step: Any) -> None:
        """Update the moving averages as Keras does, and write them into the variables every `ema_overwrite_frequency`."""
        for v, average in zip(variables, training_internals.averages_of(self), strict=True):
            if average is not None:
                momentum = ops.where(first_step, 0.0, ops.cast(self.ema_momentum, v.dtype))
                new = ops.add(ops.multiply(momentum, average), ops.multiply(ops.subtract(1.0, momentum), v))
                self.assign(average, new)
                if self.ema_overwrite_frequency:
                    now = ops.equal(ops.mod(step, self.ema_overwrite_frequency), 0)
                    self.assign(v, ops.where(now, new, ops.convert_to_tensor(v)))

    def finalize_variable_values(self, var_list: Any) -> None:
        """Write the moving averages into the variables, at the end of `fit`."""
        for v, average in zip(var_list, training_internals.averages_of(self) if self.use_ema else (), strict=False):
            if average is not None:  # a copy, because JAX cannot give away the same buffer twice in the next `fit`
                self.assign(v, ops.copy(average))

    # What Keras and its callbacks read from an optimizer.

    @property
    def learning_rate(self) -> Any:
        """The learning rate of `inner`, before any factor."""
        return self.inner.learning_rate

    @learning_rate.setter
    def learning_rate(self, value: Any) -> None:
        self.inner.learning_rate = value

    @property
    def iterations(self) -> Any:
        """The number of steps of `inner`."""
        return self.inner.iterations

    @property
    def loss_scale_factor(self) -> Any:
        """The fixed loss scale of `inner`."""
        return self.inner.loss_scale_factor if hasattr(self, "inner") else None

    @loss_scale_factor.setter
    def loss_scale_factor(self, value: Any) -> None:
        if hasattr(self, "inner"):
            self.inner.loss_scale_factor = value

    def scale_loss(self, loss: Any) -> Any:
        """Scale the loss as `inner` does."""
        return self.inner.scale_loss(loss)

    def get_config(self) -> dict[str, Any]:
        """Return the config, with that of `inner`."""
        inner = training_internals.with_portable_names(keras.saving.serialize_keras_object(self.inner))
        inner["config"]["use_ema"] = self.use_ema
        pairs = [[{"regex": p.pattern} if isinstance(p, re.Pattern) else p, factor] for p, factor in self.scaled.pairs]
        return {"name": self.name, "inner": inner, "factors": pairs}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> ScaledUpdates:
        """Return the optimizer that wrote `config`."""
        inner = keras.saving.deserialize_keras_object(config["inner"], custom_objects=custom_objects)
        pairs = [(re.compile(p["regex"]) if isinstance(p, dict) else p, factor) for p, factor in config["factors"]]
        return cls(inner, pairs, name=config["name"])


class _Scaling:
    """The patterns with their factors, and the variables once the optimizer is built. Hidden from Keras's tracking."""

    def __init__(self, pairs: list[tuple[_Pattern, float]]):
        self.pairs = pairs
        self.variables: _Variables | None = None


@contextlib.contextmanager
def _without_constraints(variables: list[Any]) -> Iterator[None]:
    """A constraint is for the scaled value, so the inner optimizer must not apply it."""
    found = [(v, v.constraint) for v in variables if getattr(v, "constraint", None) is not None]
    try:
        for v, _ in found:
            v.constraint = None
        yield
    finally:
        for v, constraint in found:
            v.constraint = constraint


def _path(variable: Any) -> str:
    path: str = getattr(variable, "path", None) or variable.name
    return path


def _matches(pattern: _Pattern, path: str) -> bool:
    if isinstance(pattern, re.Pattern):
        return pattern.fullmatch(path) is not None
    return names_path(pattern.strip("/"), path)


def _match(pairs: list[tuple[_Pattern, float]], path: str) -> float:
    """The factor of the first pattern that matches a path, or 1."""
    return next((factor for pattern, factor in pairs if _matches(pattern, path)), 1.0)


def _factors(pairs: list[tuple[_Pattern, float]], variables: Sequence[Any]) -> list[float]:
    """The factor of each variable. Raises an error for patterns that match none."""
    paths = [_path(v) for v in variables]
    names = sorted({name for path in paths for name in (*path.split("/"), path)})
    problems = [
        f"factors={shown(pattern)} matches no variable that trains; the nearest names are "
        f"{nearest(pattern.pattern if isinstance(pattern, re.Pattern) else pattern, names)}"
        for pattern, _ in pairs
        if not any(_matches(pattern, path) for path in paths)
    ]
    if problems:
        listed = checks.bullets(problems)
        raise ValueError(
            f"`ScaledUpdates` cannot find what to scale:{listed}\nExpected patterns for the paths of "
            "`model.trainable_variables`. For 'head' under another name, pass `model=`."
        )
    return [_match(pairs, path) for path in paths]


def _with_head(pairs: list[tuple[_Pattern, float]], model: keras.layers.Layer) -> list[tuple[_Pattern, float]]:
    """The word "head" also as the paths of the variables of the output head that was found."""
    found: list[tuple[_Pattern, float]] = []
    for pattern, factor in pairs:
        head = trained_head(model) if pattern == "head" else []
        if not head or any(_matches("head", _path(v)) for v in model.trainable_variables):
            found.append((pattern, factor))
        found += [(re.compile(re.escape(_path(v))), factor) for v in head]
    return found
