"""Training steps: parts that run again for their gradient, sums in chunks, and the memory that a step needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
from keras import ops

from keras_lora.backend.products import _not_before


def tensor_of(variable: keras.Variable) -> Any:
    """The value of a variable now, as a tensor: TensorFlow would give the variable itself, and so would torch."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.convert_to_tensor(variable.value)
    if keras.backend.backend() == "torch" and not variable.trainable:
        return variable.value.detach()
    return ops.convert_to_tensor(variable)


def write(variable: keras.Variable, value: Any) -> None:
    """Assign a value, and leave what `tensor_of` gave before as it is: torch would write into the same memory."""
    if keras.backend.backend() == "torch" and not variable.trainable:
        variable.value.data = value.detach()
    else:
        variable.assign(value)


def rematerialized(
    function: Callable[..., list[Any]], inputs: list[Any], trained: list[Any], frozen: list[Any]
) -> list[Any]:
    """Return `function(inputs, trained, frozen)`, a list of tensors, which runs again when its gradient is needed.

    `frozen` has no gradient. XLA merges equal computations and would keep the first run, so `inputs` depend on the upstream
    gradient in the second, in a way that changes nothing (on a CPU it drops the barriers of `jax.checkpoint`).
    """
    if keras.backend.backend() == "torch":
        import torch

        if not torch.is_grad_enabled():
            return function(inputs, trained, frozen)
        from torch.utils.checkpoint import checkpoint

        found: list[Any] = checkpoint(function, inputs, trained, frozen, use_reentrant=False)
        return found
    with_gradient = _jax_rematerialized if keras.backend.backend() == "jax" else _tensorflow_rematerialized
    return with_gradient(function, inputs, trained, frozen)


def _tied(inputs: Iterable[Any], dys: Iterable[Any]) -> list[Any]:
    """The same tensors, which cannot be had before these gradients."""
    inputs = list(inputs)
    for dy in dys:
        numbers = [i for i, each in enumerate(inputs) if keras.backend.standardize_dtype(each.dtype) != "bool"]
        for i, tied in zip(numbers, _not_before(dy, [inputs[i] for i in numbers]), strict=True):
            inputs[i] = tied
    return inputs


def _is_float(tensor: Any) -> bool:
    found: bool = keras.backend.is_float_dtype(keras.backend.standardize_dtype(tensor.dtype))
    return found


def _jax_rematerialized(function: Any, inputs: list[Any], trained: list[Any], frozen: list[Any]) -> list[Any]:
    import jax

    run, captured = jax.closure_convert(function, inputs, trained, frozen)

    def first(*given: Any) -> Any:
        inputs, trained, frozen, captured = given
        return run(inputs, trained, frozen, *captured)

    def backward(given: Any, dys: Any) -> Any:
        inputs, trained, frozen, captured = given
        floats = [i for i, each in enumerate(inputs) if _is_float(each)]
        tied = _tied(inputs, [dy for dy in dys if dy.dtype != jax.dtypes.float0 and dy.size])

        def of(of_inputs: list[Any], trained: list[Any], captured: list[Any]) -> Any:
            given = list(tied)
            for i, each in zip(floats, of_inputs, strict=True):
                given[i] = each
            return run(given, trained, frozen, *captured)

        d_inputs, d_trained, d_captured = jax.vjp(of, [tied[i] for i in floats], trained, captured)[1](dys)
        found: list[Any] = [None] * len(inputs)
        for i, each in zip(floats, d_inputs, strict=True):
            found[i] = each
        return found, d_trained, [None] * len(frozen), d_captured

    again: Any = jax.custom_vjp(first)
    again.defvjp(lambda *given: (first(*given), given), backward)
    return list(again(inputs, trained, frozen, captured))


def _tensorflow_rematerialized(function: Any, inputs: list[Any], trained: list[Any], frozen: list[Any]) -> list[Any]:
    import tensorflow as tf

    ends = len(inputs), len(inputs) + len(trained)

    def run(given: Sequence[Any]) -> list[Any]:
        return list(function(list(given[: ends[0]]), list(given[ends[0] : ends[1]]), list(given[ends[1] :])))

    def first(*given: Any) -> Any:
        def backward(*dys: Any) -> list[Any]:
            tied = [*_tied(given[: ends[0]], [dy for dy in dys if dy is not None and _is_float(dy)]), *given[ends[0] :]]
            floats = [i for i, each in enumerate(tied[: ends[1]]) if _is_float(each)]
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch([tied[i] for i in floats])
                outputs = run(tied)
            pairs = [(y, dy) for y, dy in zip(outputs, dys, strict=True) if _is_float(y) and dy is not None]
            found: list[Any] = [None] * len(given)
            ys, upstream = zip(*pairs, strict=True)
            gradients = tape.gradient(ys, [tied[i] for i in floats], output_gradients=upstream)
            for i, each in zip(floats, gradients, strict=True):
                found[i] = each
            return found

        return run(given), backward

    return list(tf.custom_gradient(first)(*inputs, *trained, *frozen))


def sum_of_chunks(
    chunk: Callable[..., Any], size: int, trained: list[Any], state: list[Any], rows: list[Any], train: bool
) -> Any:
    """Return the sum of `chunk` over chunks of `size` rows, and the state after the last chunk.

    Args:
        chunk: `chunk(trained, state, rows) -> (sum, state)`. The sum is a float32 scalar.
        size: Rows of a chunk. The last chunk has what is left.
        trained: Tensors that the sum depends on.
        state: Tensors that each chunk changes; they have no gradients.
        rows: Tensors with the same first axis. The sum depends on the first.
        train: Whether the gradients of `trained` and `rows[0]` are needed.

    The gradients are computed together with the sum, in one pass: nothing of a chunk is kept for a backward pass, and
    nothing is computed twice. So gradients of these gradients are not defined.
    """
    inputs = [rows[0], *trained]
    x, *trained = (ops.stop_gradient(each) for each in inputs)
    state = [ops.stop_gradient(each) for each in state]
    zeros = [ops.zeros(ops.shape(each), "float32") for each in trained] if train else []

    def step(carry: tuple[Any, ...], rows: list[Any]) -> tuple[Any, Any]:
        total, gradients, state = carry
        if not train:
            value, state = chunk(trained, list(state), rows)
            return (ops.add(total, value), gradients, state), None
        value, state, dx, found = _with_gradients(chunk, trained, list(state), rows)
        gradients = [ops.add(each, ops.cast(more, "float32")) for each, more in zip(gradients, found, strict=True)]
        return (ops.add(total, value), gradients, state), dx

    (total, gradients, state), dx = _fold(step, (ops.zeros((), "float32"), zeros, state), [x, *rows[1:]], size)
    return (_with_given_gradients(total, inputs, [dx, *gradients]) if train else total), state


def _with_gradients(chunk: Callable[..., Any], trained: list[Any], state: list[Any], rows: list[Any]) -> tuple[Any, ...]:
    """The sum and the state of a chunk, and the gradients of `rows[0]` and of `trained`."""
    x, *others = rows
    if keras.backend.backend() == "jax":
        import jax

        function = jax.value_and_grad(lambda x, trained: chunk(trained, state, [x, *others]), (0, 1), has_aux=True)
        (value, state), (dx, gradients) = function(x, trained)
        return value, state, dx, gradients
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch([x, *trained])
            value, state = chunk(trained, state, rows)
        dx, *gradients = tape.gradient(value, [x, *trained], unconnected_gradients="zero")
        return value, state, dx, [tf.convert_to_tensor(each) for each in gradients]
    import torch

    with torch.enable_grad():
        inputs = [each.detach().requires_grad_() for each in (x, *trained)]
        value, state = chunk(inputs[1:], state, [inputs[0], *others])
        found = torch.autograd.grad(value, inputs, allow_unused=True)
    dx, *gradients = (torch.zeros_like(i) if g is None else g for i, g in zip(inputs, found, strict=True))
    return value.detach(), state, dx, gradients


def _fold(step: Callable[..., Any], carry: Any, rows: list[Any], size: int) -> tuple[Any, Any]:
    """Run `step(carry, rows) -> (carry, y)` on each chunk in turn; return the last carry and the `y` one after another."""
    if keras.backend.backend() == "tensorflow":
        return _tensorflow_fold(step, carry, rows, size)
    count = rows[0].shape[0]
    whole, found = count // size, []
    if keras.backend.backend() == "jax" and whole:
        import jax

        parts = [each[: whole * size].reshape(whole, size, *each.shape[1:]) for each in rows]
        carry, y = jax.lax.scan(step, carry, parts)
        found.append(None if y is None else y.reshape(whole * size, *y.shape[2:]))
    first = whole * size if keras.backend.backend() == "jax" else 0
    for start in range(first, count, size):
        carry, y = step(carry, [each[start : start + size] for each in rows])
        found.append(y)
    return carry, None if found[0] is None else ops.concatenate(found) if len(found) > 1 else found[0]


def _tensorflow_fold(step: Callable[..., Any], carry: Any, rows: list[Any], size: int) -> tuple[Any, Any]:
    """`_fold` in TensorFlow, where the number of rows may be unknown while a function is traced."""
    import tensorflow as tf

    count = tf.shape(rows[0])[0] if rows[0].shape[0] is None else rows[0].shape[0]
    whole, left = count // size, count % size
    shapes = [tuple(each.shape[1:]) for each in rows]
    parts = tf.TensorArray(rows[0].dtype, size=whole, element_shape=(size, *shapes[0]))

    def body(number: Any, carry: Any, parts: Any) -> tuple[Any, ...]:
        at = [tf.slice(each, [number * size] + [0] * len(s), [size, *s]) for each, s in zip(rows, shapes, strict=True)]
        carry, y = step(carry, at)
        return number + 1, carry, parts if y is None else parts.write(number, y)

    _, carry, parts = tf.while_loop(lambda number, *_: number < whole, body, (0, carry, parts), parallel_iterations=1)
    rest = [each[whole * size :] for each in rows]
    if isinstance(left, int) and left == 0:
        return carry, tf.reshape(parts.stack(), (-1, *shapes[0]))

    def last() -> tuple[Any, Any]:
        after, y = step(carry, rest)
        return after, tf.zeros_like(rest[0]) if y is None else y

    known = isinstance(left, int)
    carry, y = last() if known else tf.cond(left > 0, last, lambda: (carry, tf.zeros_like(rest[0])))
    return carry, tf.concat([tf.reshape(parts.stack(), (-1, *shapes[0])), y], 0)


def _with_given_gradients(value: Any, inputs: list[Any], gradients: list[Any]) -> Any:
    """`value`, whose gradients with respect to `inputs` are `gradients`."""
    count = len(inputs)

    def with_gradient(value: Any, *tensors: Any) -> tuple[Any, Callable[..., Any]]:
        def grad(*args: Any, upstream: Any = None) -> tuple[Any, ...]:
            dy = ops.cast(args[-1] if upstream is None else upstream, "float32")
            pairs = zip(tensors[:count], tensors[count:], strict=True)
            # In float32: the scale of a float16 loss times a gradient can be larger than any float16.
            return None, *(ops.cast(ops.multiply(ops.cast(g, "float32"), dy), i.dtype) for i, g in pairs), *[None] * count

        return ops.add(value, 0.0), grad

    return ops.custom_gradient(with_gradient)(value, *inputs, *gradients)


def traces_memory() -> bool:
    """Whether `step_memory` works here: XLA can count the bytes of a program that it does not run."""
    found: bool = keras.backend.backend() == "jax"
    return found


def shapes_of(function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function` returns, as shapes. Arguments are anything with a shape and a dtype."""
    import jax

    return jax.eval_shape(function, *_as_shapes(arguments))


def value_and_gradient(function: Callable[..., Any], variables: Any, *others: Any) -> Any:
    """The value of `function`, a pair of a loss and more, and the gradient of `variables`, on JAX."""
    import jax

    return jax.value_and_grad(function, has_aux=True)(variables, *others)


def kept_bytes(function: Callable[..., Any], variables: Any, *others: Any) -> int:
    """The bytes that JAX keeps from `function(variables, *others)` for the gradient of `variables`, beside its arguments.

    Arguments are anything with a shape and a dtype. Nothing is computed.
    """
    import jax

    variables, others = _as_shapes((variables, others))

    def residuals(variables: Any, others: Any) -> Any:
        return jax.tree.leaves(jax.vjp(lambda each: function(each, *others), variables)[1])

    traced = jax.make_jaxpr(residuals)(variables, others).jaxpr
    given = {id(each) for each in (*traced.invars, *traced.constvars)}
    kept = {id(each): each.aval for each in traced.outvars if id(each) not in given and not hasattr(each, "val")}
    return sum(each.size * each.dtype.itemsize for each in kept.values())


def step_memory(step: Callable[..., Any], state: Any, data: Any) -> dict[str, int]:
    """The bytes of `state, results = step(state, data)` as XLA compiles it, with the memory of the old state reused.

    Arguments are anything with a shape and a dtype. Nothing is computed and no array is made.
    """
    import jax

    compiled = jax.jit(step, donate_argnums=0).lower(*_as_shapes((state, data))).compile()
    found: Any = compiled.memory_analysis()
    held, more = found.argument_size_in_bytes, found.output_size_in_bytes - found.alias_size_in_bytes
    return {"arguments": held, "temporary": found.temp_size_in_bytes, "outputs": more}


def _as_shapes(tree: Any) -> Any:
    import jax

    def shape_of(each: Any) -> Any:
        return jax.ShapeDtypeStruct(tuple(each.shape), keras.backend.standardize_dtype(each.dtype))

    return jax.tree.map(shape_of, tree, is_leaf=lambda each: isinstance(each, keras.Variable | keras.KerasTensor))
