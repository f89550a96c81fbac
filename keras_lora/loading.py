"""`reduced_base`: build or load a model that does not fit into memory in float."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import keras

from keras_lora.compat import keras_internals
from keras_lora.swap.adapted import AdaptedLayer, maps_of, store_reduced
from keras_lora.swap.kernels import FOUND

#: What can be stored as soon as it is built. Keras's int8 and int4 layers do not load a float file.
BASE_DTYPES = ("nf4", "bfloat16")
_LAYERS = (keras.layers.Dense, keras.layers.EinsumDense)


@contextlib.contextmanager
def reduced_base(
    base_dtype: str = "nf4", *, layers: type[keras.layers.Layer] | tuple[type[keras.layers.Layer], ...] = _LAYERS
) -> Iterator[None]:
    """Build or load a model whose kernels are stored in fewer digits from the start.

    Inside this context, the kernels of a layer are quantised as soon as the layer is built. If a file of float weights is
    loaded into the layer, inside the context or later, each kernel is quantised when it is read. So one kernel at a time is
    in float, never the whole model. It works for everything that builds Keras layers: `from_preset` of KerasHub with
    Keras weights, `keras.saving.load_model`, a function of yours followed by `load_weights`.

    The layers keep their names and paths, and adapter files fit. Call `keras_lora.apply_lora` afterwards, without
    `base_dtype`. `remove_lora` leaves the kernels as they are here, and `merge_lora` makes all of them float. A layer
    that `apply_lora(train=...)` trains in full becomes float, too. A `.keras` file of the model loads inside this context,
    and outside it, with a whole float model for a moment, if the model was adapted when it was saved.

    Args:
        base_dtype: `"nf4"`, 4.13 bits a parameter, or `"bfloat16"`.
        layers: The classes of layers whose kernels are reduced. Add `keras.layers.ReversibleEmbedding` or
            `keras.layers.Embedding` for a large vocabulary. Subclasses are included if `apply_lora` can adapt them.

    Raises:
        ValueError: `base_dtype` is another word, or a class cannot be stored in it.

    Example:

    >>> import keras, keras_lora
    >>> with keras_lora.reduced_base("nf4"):
    ...     model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(64), keras.layers.Dense(2)])
    >>> model = keras_lora.apply_lora(model, rank=2)
    >>> model.layers[0].linear_map.base_dtype
    'nf4'

    Reference:
        [Dettmers et al., 2023](https://arxiv.org/abs/2305.14314)
    """
    if base_dtype not in BASE_DTYPES:
        raise ValueError(
            f"`base_dtype` must be one of {BASE_DTYPES} here, because Keras loads float weights into no layer that it has "
            f"quantised. Received: base_dtype={base_dtype!r}. For a model that fits into memory, load it and call "
            "`keras_lora.apply_lora(model, base_dtype=...)`."
        )
    classes = layers if isinstance(layers, tuple) else (layers,)
    if wrong := [each for each in classes if not (isinstance(each, type) and issubclass(each, keras.layers.Layer))]:
        raise ValueError(f"`layers` must be layer classes, such as `keras.layers.Dense`. Received: {wrong}.")

    def reduce(layer: keras.layers.Layer) -> None:
        if isinstance(layer, classes) and (isinstance(layer, AdaptedLayer) or not vars(layer).get("lora_enabled")):
            for linear in maps_of(layer):
                if linear.stored is None and (linear.packs or base_dtype != "nf4"):
                    store_reduced(linear, base_dtype + FOUND)

    with keras_internals.when_any_is_built(reduce):
        yield
