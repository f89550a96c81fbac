"""`apply_lora` adapts a plain model in place; `remove_lora` makes it plain again."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import keras

from keras_lora import adapters, checks
from keras_lora.checks import AnyLayer
from keras_lora.compat import devices, keras_internals, quantization, training_internals
from keras_lora.linear_map import LinearMap
from keras_lora.swap import beside, flags, kernels, reducing, slots
from keras_lora.swap.adapted import (
    adapted_maps,
    maps_by_address,
    maps_of,
    named_adapters,
    set_adapter,
    set_containers,
    set_plain,
)
from keras_lora.swap.adapters_of_model import added_in, changing_strengths, new_name
from keras_lora.swap.addresses import walk, walking_once
from keras_lora.swap.other_models import sharing, warn_of_shared
from keras_lora.targets.choosing import list_targets, method_for
from keras_lora.targets.patterns import Pattern, Patterns
from keras_lora.targets.target_list import NAMED, NORM


@checks.helpful
@walking_once()
@keras_internals.without_tensorflow()
def apply_lora(
    model: AnyLayer,
    adapter: str | dict[str, Any] | adapters.Adapter = "lora",
    *,
    rank: int | None = None,
    alpha: float | None = None,
    targets: Patterns | None = None,
    exclude: Patterns | None = None,
    head: Patterns | str | None = "auto",
    train: Patterns | None = None,
    bias: str = "none",
    rank_pattern: Mapping[Pattern, int] | None = None,
    alpha_pattern: Mapping[Pattern, float] | None = None,
    adapter_pattern: Mapping[Pattern, Any] | None = None,
    blocks: Any = None,
    base_dtype: str | None = None,
    input_shape: Any = None,
    name: str | None = None,
) -> AnyLayer:
    """Freeze a model and add adapters to its linear layers, in place.

    The layers stay the same objects with the same names, and the outputs stay the same until training changes them.
    Afterwards `model.trainable_variables` has only the adapters and what `train` and `bias` select. Call `compile` after
    it, as after every change of what trains.

    If the model is already adapted, this adds another adapter under a new `name`. It may have other targets or another
    method. Only the new adapter is then active and trainable. Use `keras_lora.activate_adapters` and
    `keras_lora.train_adapters` to choose others.

    Args:
        model: A built Keras model or layer of any kind.
        adapter: The method: `"lora"`, `"dora"`, an instance such as `keras_lora.LoRA(rank=8, dropout=0.1)`, or a config.
        rank, alpha: Arguments of the method, if `adapter` is a name. `alpha` does not depend on the rank: its default
            is 16.
        targets: Which layers get an adapter: one pattern or several. A pattern is a name or path of names (of a layer, or
            of a block, meaning the layers in it), a glob for these (`"query*"`, `"block_?/query"`), a compiled regular
            expression that matches the whole path, a layer class, a function from a layer to a bool, or a layer. If a layer
            has several kernels, add the kernel's name to the path (`"lstm/recurrent_kernel"`). The default is every linear
            layer except the output head and what `keras_lora.targets.presets` excludes in known models; `"all-linear"`
            ignores the presets. Embeddings and depthwise kernels are adapted only if you name them.
        exclude: Patterns of layers that get no adapter.
        head: The output head, which the default targets leave out: `"auto"` finds it (see
            `keras_lora.targets.heads.find_head`), patterns name it, `None` leaves nothing out.
        train: Patterns of layers or blocks that train in full and are saved with the adapter, such as a new head. `"head"`
            also means the output head that was found, whatever its name; in a KerasHub task that is every layer outside the
            backbone. `"norms"` means the scales and offsets of every normalization; the statistics of a
            `BatchNormalization` stay as they are, unless you name the layer itself.
        bias: `"none"`, `"all"`, or `"lora_only"` for the biases of the adapted layers.
        rank_pattern, alpha_pattern: Other ranks and alphas by pattern; if several match, the first wins.
        adapter_pattern: Other methods by pattern, such as `{"token_embedding": keras_lora.TrainableTokens([5, 7])}`.
            These layers are adapted even if `targets` does not name them.
        blocks: Adapt only inside these repeated blocks of the model: an index, several, or a slice of indices
            (`slice(-4, None)`, the last four) or of fractions of the depth (`slice(0.5, None)`, the upper half). Each series
            of blocks (an encoder, a decoder) is counted separately. In a model without repeated blocks, fractions count the
            adaptable layers in their order.
        base_dtype: How to store the kernels of the adapted layers; by default they keep their dtype. The adapters stay
            float32. `"bfloat16"` takes half the memory of float32. Products are computed in it, or with a float32 copy of
            one kernel on a CPU without instructions for it. `"nf4"` takes 4.13 bits a parameter
            ([QLoRA](https://arxiv.org/abs/2305.14314)); products are computed in the compute dtype of the layer.
            `remove_lora` and `merge_lora` then restore the float dtype, but the digits that were rounded away are lost.
            `int8` and `int4` (in blocks of 64) quantise the layers with Keras's own modes first; they stay quantised
            after `remove_lora`. See [Reduced bases](how_it_works.md#reduced-bases-during-a-step).
        input_shape: If the model is not built, it is built with this shape first.
        name: The adapter's name; `"default"` if the model has no adapter yet. It never appears in a file's keys.

    Returns:
        `model` itself.

    Raises:
        ValueError: There is nothing to adapt, a pattern matches nothing (the message lists the nearest names), the model
            is not built or already has an adapter of this name, or a layer cannot be adapted. The model is unchanged.

    Example:

    >>> import keras, keras_lora
    >>> model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(32), keras.layers.Dense(2, name="head")])
    >>> model = keras_lora.apply_lora(model, rank=4, train="head")
    >>> [v.path.split("/")[-1] for v in model.trainable_variables]
    ['lora_a', 'lora_b', 'kernel', 'bias']

    Reference:
        [Hu et al., 2021](https://arxiv.org/abs/2106.09685)
    """
    method = method_for(model, adapter, rank, alpha)
    reducing.check_name(base_dtype)
    name = new_name(model, name)
    if input_shape is not None and not model.built:
        model.build(input_shape)
    rows = list_targets(
        model,
        method,
        targets=targets,
        exclude=exclude,
        head=head,
        train=train,
        bias=bias,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        adapter_pattern=adapter_pattern,
        blocks=blocks,
        name=name,
    )
    kernels_of = [(row.path, row.linear) for row in rows.of("adapt") if row.linear]
    if base_dtype is not None:
        reducing.check(kernels_of, base_dtype)
    if base_dtype in quantization.MODES:
        reducing.quantize(kernels_of, str(base_dtype))
    for row in rows.of("train"):
        for each in maps_of(row.layer):
            each.store_kernel(None)  # codes cannot train
    addresses = {(id(linear.layer), linear.part): address for address, linear in maps_by_address(model).items()}
    started = [
        (linear, _started(linear, addresses[id(linear.layer), linear.part], row.adapter))
        for row in rows.of("adapt")
        if (linear := row.linear)
    ]
    new = {why: [row.layer for row in rows.of("train") if row.why == why] for why in (NAMED, NORM)}
    inject(model, started, name, trained=new[NAMED], norms=new[NORM], bias=bias)
    if base_dtype is not None and base_dtype not in quantization.MODES:
        for linear, _ in started:
            reducing.store(linear, base_dtype)
    reset_compilation(model)
    return model


@walking_once()
def remove_lora(model: AnyLayer) -> AnyLayer:
    """Remove every adapter from a model, in place.

    Classes, trainable flags, variables and outputs are again as they were before `apply_lora`.

    Args:
        model: An adapted model, or an adapted part of one.

    Returns:
        `model` itself. Call `compile` after it.

    Raises:
        ValueError: The model is not adapted.

    Example:

    >>> import keras, keras_lora
    >>> model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(32), keras.layers.Dense(2)])
    >>> model = keras_lora.remove_lora(keras_lora.apply_lora(model))
    >>> len(model.trainable_variables)
    4
    """
    require_adapted(model, "remove_lora")
    take_out(model)
    reset_compilation(model)
    return model


def inject(
    model: keras.layers.Layer,
    new_adapters: Iterable[tuple[LinearMap, adapters.Adapter]],
    name: str,
    trained: Iterable[keras.layers.Layer] = (),
    norms: Iterable[keras.layers.Layer] = (),
    bias: str = "none",
) -> None:
    """Put adapters that have weights on kernels of a model. Only they are then active and trainable; the rest is frozen."""
    devices.check(model)
    pairs = list(new_adapters)
    others = [adapter for found in named_adapters(model).values() for _, adapter in found.values()]
    if not others:
        warn_of_shared(model)
    with changing_strengths(model):
        for adapter in others:
            adapter.strength.assign(0.0)
    for linear, adapter in pairs:
        set_adapter(linear, adapter, name)
    added_in(model, [adapter for _, adapter in pairs])
    new = [layer for _, adapter in pairs for layer in adapters.with_sublayers(adapter)]
    old = [layer for adapter in others for layer in adapters.with_sublayers(adapter)]
    old += [place.layer for place in walk(model) if beside.owners(place.layer)]
    adapted = [linear.layer for linear, _ in pairs]
    flags.freeze(walk(model), adapted, [*trained, *new], norms, bias, stopped=old)
    own_beside(model, name)
    set_containers(model)


def own_beside(model: keras.layers.Layer, name: str) -> None:
    """Let the adapter `name` own the base variables that are planned to train."""
    for place in walk(model):
        if not isinstance(place.layer, adapters.Adapter):
            planned = {id(v) for v in flags.planned_variables(place.layer)}
            of_layer = keras_internals.own_trainable_variables(place.layer)
            trains = [id(v) in planned for v in of_layer]
            beside.start(place.layer, name, trains, statistics=flags.moves_statistics(place.layer))


def take_out(model: keras.layers.Layer, merged: bool = False) -> None:
    """Turn an adapted model into a plain one. Unless merged, variables that trained with adapters get their old values."""
    if not merged:
        beside.store(model)
        beside.show(model, {})
    beside.forget(model)
    for place in walk(model):
        kernels.restore_found(maps_of(place.layer))  # before its flag: codes cannot train
    flags.restore_found(model)
    for place in walk(model):
        set_plain(place.layer)


def require_adapted(model: Any, function: str) -> dict[str, tuple[LinearMap, slots.Change]]:
    """The adapted kernels of `model`, each with its change, by address. Raises an error if there are none."""
    found = adapted_maps(model) if isinstance(model, keras.layers.Layer) else {}
    if found:
        training_internals.sync_training_state(model)
        flags.check_variables(model)
    else:
        name = getattr(model, "name", model)
        raise ValueError(
            f"`{function}()` found no adapter in '{name}'. Expected a model that `keras_lora.apply_lora` adapted."
        )
    return found


def _started(linear: LinearMap, address: str, adapter: Any) -> adapters.Adapter:
    """`adapter` with weights for a kernel, and with a separate stream of random numbers if it has a seed.

    The stream depends on the address, not the name: Keras numbers layer names across the whole process.
    """
    if adapter.get_config().get("seed") is not None:
        seed = zlib.crc32(f"{adapter.get_config()['seed']}:{address}".encode()) & 0x7FFFFFFF  # torch keeps seeds in int32
        adapter = adapters.copy_of(adapter, seed=seed)
    slots.start(linear, adapter)
    made: adapters.Adapter = adapter
    return made


def reset_compilation(model: keras.layers.Layer) -> None:
    """Drop compiled functions and the compiled state, which belong to the previous variables: `fit` asks for `compile`.

    Models that share layers with `model` have compiled these layers too.
    """
    for each in (model, *sharing(model)):
        training_internals.drop_compiled_functions(each)
    keras_internals.track_torch_parameters(model)
