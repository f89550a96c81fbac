"""`start_from` gives the adapters of a model other first values. The base does not move."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from keras_lora import adapters, checks, factors
from keras_lora.applying import require_adapted
from keras_lora.checks import AnyLayer
from keras_lora.combining import replace
from keras_lora.compat import keras_internals
from keras_lora.linear_map import LinearMap
from keras_lora.starts import methods
from keras_lora.swap import slots
from keras_lora.swap.adapted import maps_by_address, named_adapters
from keras_lora.swap.adapters_of_model import only_name

#: Two pairs that cancel leave rounding of about this size, relative to either of them.
_ROUNDING = 1e-5


@checks.helpful
@keras_internals.without_tensorflow()
def start_from(
    model: AnyLayer,
    start: Any,
    data: Any = None,
    *,
    loss: Any = None,
    base: keras.layers.Layer | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
    name: str | None = None,
) -> AnyLayer:
    """Give the LoRAs of a model other first values, in place.

    The kernels are not changed, and the outputs stay as they are; only `"loftq"` moves them, towards those of the float
    model. If the first factors have a product, each LoRA keeps a frozen copy of them, of the same rank, which takes it
    away: `W + scale · (A B - A₀ B₀)`. So a file of the adapter belongs to the base that you loaded, and
    `keras_lora.interop.to_peft` and `keras_lora.compress_adapter` make a plain LoRA of twice the rank.

    Args:
        model: A model with LoRAs that are not trained yet.
        start: One of:

            - `"pissa"`: the largest singular values of the kernel, with their vectors.
            - `"olora"`: the first columns of its QR decomposition.
            - `"orthogonal"`: random `A` and `B`, both not zero, whose product is zero. Nothing is kept.
            - `keras_lora.EVA(...)` or `"eva"`: `A` from the inputs of each layer. Needs `data`. Nothing is kept.
            - `keras_lora.LoRAGA(...)` or `"lora_ga"`: from the gradients of the kernels. Needs `data` and `loss`.
            - `"loftq"`: from what quantising took from the kernel. Needs a quantised model, and `base`. Nothing is kept.
        data: What `fit` accepts: an array, a dict of arrays, a tuple `(x, y)`, a `tf.data.Dataset`, a
            `keras.utils.PyDataset`, a torch `DataLoader`, or a generator. EVA ignores the labels.
        loss: A Keras loss, by name or as an instance.
        base: For `"loftq"`, the same model before it was quantised.
        batch_size: For data in arrays, as in `fit`.
        seed: Integer, for random numbers.
        overwrite: Whether adapters that are trained already lose what they learned.
        name: The adapter's name. Needed if the model has several.

    Returns:
        `model` itself. Call `compile` after it.

    Raises:
        ValueError: An adapter is not a LoRA, is trained already or cannot start like this, or `data`, `loss` or `base` is
            missing. Nothing is changed then.

    Example:

    >>> import keras, keras_lora
    >>> model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(32), keras.layers.Dense(2)])
    >>> model = keras_lora.apply_lora(model, rank=4)
    >>> before = model(keras.ops.ones((1, 16)))
    >>> model = keras_lora.start_from(model, "pissa")
    >>> bool(keras.ops.max(keras.ops.abs(model(keras.ops.ones((1, 16))) - before)) < 1e-5)
    True

    References:
        - [Meng et al., 2024](https://arxiv.org/abs/2404.02948), for `"pissa"`
        - [Büyükakyüz, 2024](https://arxiv.org/abs/2406.01775), for `"olora"`
        - [Li et al., 2023](https://arxiv.org/abs/2310.08659), for `"loftq"`
    """
    require_adapted(model, "start_from")
    name, chosen = str(only_name(model, name)), methods.get(start)
    given = {"data": data, "loss": loss, "base": base}
    wrong = [key for key, value in given.items() if (value is None) == (key in chosen.needs)]
    if wrong:
        raise ValueError(
            f"{type(chosen).__name__} needs {' and '.join(f'`{key}`' for key in chosen.needs) or 'no data'}. Received: "
            f"{', '.join(f'{key}={checks.described(value)}' for key, value in given.items())}."
        )
    floats = None if base is None else maps_by_address(base)
    places = named_adapters(model)[name]
    methods.refuse(model, _problems(chosen, places, floats, checks.flag("overwrite", overwrite)))
    source = methods.Source(model, checks.seed(seed) or 0, data, loss, batch_size, floats)
    pairs = chosen.pairs(places, source)
    made = {
        address: _started(linear, adapter, chosen.rank(address, adapter, pairs[address]), pairs[address], chosen.keeps)
        for address, (linear, adapter) in places.items()
    }
    replace(model, name, made)
    return model


def _problems(chosen: methods.Start, places: Any, floats: Any, overwrite: bool) -> list[str]:
    problems = []
    for address, (linear, adapter) in places.items():
        problem: str | None
        if type(adapter) is not adapters.LoRA:
            problem = f"it is a {type(adapter).__name__}, and starting points are for LoRA"
        elif not overwrite and _is_trained(adapter):
            problem = "it is trained already; with overwrite=True it loses what it learned"
        else:
            problem = chosen.problem_with(linear, adapter, (floats or {}).get(address))
        if problem is not None:
            problems.append(f"'{address}': {problem}")
    return problems


def _is_trained(adapter: adapters.LoRA) -> bool:
    """Whether the change is more than what rounding leaves."""
    pair = adapter.numpy_factors()
    if pair is None:
        return True
    squared = max(0.0, factors.inner_product(pair, pair))
    lengths = np.linalg.norm(pair[0], axis=-2) * np.linalg.norm(pair[1], axis=-1)
    return bool(np.sqrt(squared) > _ROUNDING * np.linalg.norm(lengths))


def _started(linear: LinearMap, old: adapters.LoRA, rank: int, pair: methods.Pair, keeps: bool) -> adapters.LoRA:
    """A LoRA like `old` with these first factors. Another rank gets the alpha with which the scale is the same."""
    config = {**old.get_config(), "kept": pair[0].shape[-1] if keeps else 0}
    if rank != old.rank:
        config |= {"rank": rank, "alpha": old.scale * (rank**0.5 if old.rank_stabilized else rank)}
    made: adapters.LoRA = adapters.LoRA.from_config(config)
    slots.start(linear, made)
    a, b = (np.array(keras.ops.convert_to_numpy(variable.value)) for variable in (made.lora_a, made.lora_b))
    size = pair[0].shape[-1]
    a[..., :size], b[..., :size, :] = pair
    if a[..., size:].any():  # a kernel with fewer directions than the rank: the rest changes nothing yet
        b[..., size:, :] = 0.0
    made.lora_a.assign(a)
    made.lora_b.assign(b)
    if keeps:
        made.kept_a.assign(pair[0].astype("float32"))
        made.kept_b.assign((-old.scale * pair[1].astype("float32")).astype("float32"))
    return made
