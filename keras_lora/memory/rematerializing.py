"""`rematerialize` lets blocks of a model run a second time for their gradients, so that a step keeps only their inputs."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import keras
from keras import ops

from keras_lora import backend
from keras_lora.applying import reset_compilation
from keras_lora.checks import AnyLayer
from keras_lora.compat import call_internals
from keras_lora.swap.addresses import walk, walking_once
from keras_lora.targets import blocks as repeated


@walking_once()
def rematerialize(model: AnyLayer, blocks: Any = slice(None), *, undo: bool = False) -> AnyLayer:
    """Compute the insides of a model's blocks again for the gradient, instead of keeping them, in place.

    A training step then keeps the inputs of each block, and the insides of one block at a time. It computes the forward
    pass of the blocks twice. Outputs and gradients stay the same: a block that runs again draws the same dropout.

    It works before or after `apply_lora`, on all backends, compiled or not. `keras.RematScope` must be there when the
    layers are made, and gives wrong gradients or errors if they have dropout. A `.keras` file does not store it:
    call it again after loading.

    Args:
        model: A built model.
        blocks: Which of the model's repeated blocks: an index, several, or a slice, as in `apply_lora`; or layers of your
            choice. By default all repeated blocks.
        undo: True makes these blocks keep their insides again.

    Returns:
        `model` itself. Call `compile` after it.

    Raises:
        ValueError: The model is not built, or has no such blocks. The model is unchanged.

    Reference:
        [Chen et al., 2016](https://arxiv.org/abs/1604.06174)

    Example:

    >>> import keras, keras_lora
    >>> def block(i):
    ...     return keras.Sequential([keras.layers.Dense(64, "gelu"), keras.layers.Dense(8)], name=f"block_{i}")
    >>> model = keras.Sequential([keras.Input((8,)), *(block(i) for i in range(3)), keras.layers.Dense(2)])
    >>> model = keras_lora.rematerialize(keras_lora.apply_lora(model, rank=4))
    >>> keras_lora.memory.rematerialized(model)
    ['block_0', 'block_1', 'block_2']
    """
    chosen = _chosen(model, blocks)
    unbuilt = [layer.name for layer in chosen if not layer.built]
    if unbuilt:
        raise ValueError(f"`rematerialize()` needs built layers. Received: {unbuilt}. Call '{model.name}' on data once.")
    for layer in chosen:
        vars(layer).pop("call", None)
        if not undo:
            vars(layer)["call"] = RematerializedCall(layer)
    reset_compilation(model)
    return model


def rematerialized(model: keras.layers.Layer) -> list[str]:
    """List the paths of the blocks that `rematerialize` has changed."""
    return [place.path for place in walk(model) if isinstance(vars(place.layer).get("call"), RematerializedCall)]


def _chosen(model: keras.layers.Layer, blocks: Any) -> list[keras.layers.Layer]:
    """The layers that `blocks` names."""
    places = walk(model)
    given = list(blocks) if isinstance(blocks, Iterable) and not isinstance(blocks, str) else [blocks]
    if given and all(isinstance(each, keras.layers.Layer) for each in given):
        inside = {id(place.layer) for place in places}
        if strangers := [each.name for each in given if id(each) not in inside]:
            raise ValueError(f"`blocks` must be layers of '{model.name}'. Received: {strangers}, which are not in it.")
        return given
    if not repeated.series_of(places):
        raise ValueError(
            f"`rematerialize()` found no repeated blocks in '{model.name}'. Expected layers of one class with numbered "
            f"names that contain adaptable layers. Received: blocks={blocks!r}. Pass the layers themselves in `blocks`."
        )
    chosen, problems = repeated.choose(model, places, [], blocks)
    if problems:
        raise ValueError(f"`rematerialize()` cannot choose blocks: {'; '.join(problems)}.")
    return [place.layer for place in chosen.values()]


class RematerializedCall:
    """Takes the place of the `call` of one layer, on the instance: the class may change meanwhile.

    The second run is in the same context as the first (training or not, the dtypes), and starts from the same values of the
    variables, states of random numbers included. What it writes into them is dropped.
    """

    def __init__(self, layer: keras.layers.Layer):
        self.layer = layer

    @property
    def plain(self) -> Any:
        """The method that this replaces."""
        return type(self.layer).call.__get__(self.layer)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.plain)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves = keras.tree.flatten((args, kwargs))
        if any(isinstance(each, keras.KerasTensor) for each in leaves):
            return self.plain(*args, **kwargs)
        run = _Run(self.layer, self.plain, (args, kwargs), leaves)
        return run.finish(backend.rematerialized(run, *run.inputs()))


class _Run:
    """One call of a layer as a function from lists of tensors to a list of tensors."""

    def __init__(self, layer: keras.layers.Layer, call: Any, structure: Any, leaves: list[Any]):
        self.layer, self.call, self.structure, self.leaves = layer, call, structure, leaves
        self.at = [place for place, each in enumerate(leaves) if ops.is_tensor(each)]
        masks = {place: call_internals.mask_of(leaves[place]) for place in self.at}
        self.masks = {place: mask for place, mask in masks.items() if mask is not None}
        weights = layer.weights
        self.trained, self.frozen = ([v for v in weights if v.trainable is flag] for flag in (True, False))
        self.seeds = [v for v in layer.variables if all(v is not weight for weight in weights)]
        self.context = call_internals.call_context()
        self.outputs: Any = None
        self.written: list[keras.Variable] = []
        self.losses = 0

    def inputs(self) -> tuple[list[Any], list[Any], list[Any]]:
        """What the first run gets: the tensors of this call, the trained variables and the frozen ones."""
        tensors = [self.leaves[place] for place in self.at] + list(self.masks.values())
        with call_internals.as_stored():
            seeds, trained, frozen = (
                [backend.tensor_of(variable) for variable in group] for group in (self.seeds, self.trained, self.frozen)
            )
        return tensors + seeds, trained, frozen

    def __call__(self, tensors: list[Any], trained: list[Any], frozen: list[Any]) -> list[Any]:
        leaves, rest = list(self.leaves), tensors[len(self.at) :]
        masks = dict(zip(self.masks, rest, strict=False))
        for place, tensor in zip(self.at, tensors, strict=False):
            leaves[place] = call_internals.with_mask(tensor, masks[place]) if place in masks else tensor
        args, kwargs = keras.tree.pack_sequence_as(self.structure, leaves)
        variables = [*self.seeds, *self.trained, *self.frozen]
        values = [*rest[len(self.masks) :], *trained, *frozen]
        with call_internals.as_stored():
            scope = call_internals.scope_within(list(zip(variables, values, strict=True)))
        before = dict(scope.state_mapping)
        with self.context(), scope:
            self.outputs = self.call(*args, **kwargs)
        after = {key: value for key, value in scope.state_mapping.items() if value is not before.get(key)}
        self.written = [v for v in variables if id(v) in after]
        if len(self.written) < len(after):
            raise ValueError(
                f"`rematerialize()` cannot run '{self.layer.name}' again: its call writes a variable that belongs to "
                f"another layer or is a metric. Leave it out of `blocks`."
            )
        call_internals.forget_losses(self.layer, scope.losses)
        self.losses = len(scope.losses)
        found = [each for each in keras.tree.flatten(self.outputs) if ops.is_tensor(each)]
        found_masks = [mask for each in found if (mask := call_internals.mask_of(each)) is not None]
        return [*found, *found_masks, *scope.losses, *(after[id(v)] for v in self.written)]

    def finish(self, tensors: list[Any]) -> Any:
        """The outputs of the call, after its losses and what it wrote are where a plain call puts them."""
        rest = iter(tensors)
        leaves = keras.tree.flatten(self.outputs)
        has_mask = [ops.is_tensor(each) and call_internals.mask_of(each) is not None for each in leaves]
        leaves = [next(rest) if ops.is_tensor(each) else each for each in leaves]
        for place, masked in enumerate(has_mask):
            if masked:
                call_internals.with_mask(leaves[place], next(rest))
        for _ in range(self.losses):
            self.layer.add_loss(next(rest))
        for variable in self.written:
            backend.write(variable, next(rest))
        outputs, self.outputs = keras.tree.pack_sequence_as(self.outputs, leaves), None
        return outputs
