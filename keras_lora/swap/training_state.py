"""What training needs besides weights and optimizer, and Keras does not save: the states of random seeds.

Keras saves the variables of layers. The state of a `SeedGenerator` is not among them, so a resumed run would drop other
entries than an uninterrupted one. Each adapted container saves the states of the layers in it, with the values of `beside`.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from keras_lora import checks
from keras_lora.compat import keras_internals
from keras_lora.swap import beside
from keras_lora.swap.addresses import walk

#: The key in a part of a weights file.
_STORED = "keras_lora.seeds"
#: Set on a model that has warned.
_WARNED = "_keras_lora_warned_of_seeds"


def save_into(container: keras.layers.Layer, saved: Any) -> None:
    """Add what Keras does not save of a container to its part of a weights file."""
    beside.save_into(container, saved)
    if states := [generator.state for generator in _generators_of(container)]:
        saved[_STORED] = np.stack([np.asarray(keras.ops.convert_to_numpy(state.value)) for state in states])


def load_from(container: keras.layers.Layer, saved: Any) -> dict[str, Any]:
    """Load these values from a part of a weights file, and return the rest of that part."""
    rest = beside.load_from(container, saved)
    stored, generators = rest.pop(_STORED, None), _generators_of(container)
    if stored is None:  # a file of the base alone, or of a version that did not save them
        return rest
    # The shape is compared before anything is read: a damaged file can declare any.
    if tuple(stored.shape) != (len(generators), 2) or np.dtype(stored.dtype).kind not in "iu":
        checks.warn(
            f"The random states in this file do not fit '{container.name}': it has {len(generators)} random generators, the "
            f"file has an array of shape {tuple(stored.shape)}. They keep their states, so dropout draws other numbers than "
            "in the run that wrote the file. Load into a model with the same dropout layers and rates."
        )
        return rest
    for generator, state in zip(generators, np.asarray(stored), strict=True):
        generator.state.assign(_in_dtype(state, keras.backend.standardize_dtype(generator.state.dtype)))
    return rest


def _in_dtype(state: np.ndarray, dtype: str) -> np.ndarray:
    """A state in the dtype of this backend; all of them use its lower 32 bits."""
    return state if state.dtype == dtype else (state.astype("int64") & 0xFFFFFFFF).astype("uint32").astype(dtype)


def _generators_of(container: keras.layers.Layer) -> list[keras.random.SeedGenerator]:
    """The random generators of a container and of the layers in it, without those that another container in it saves."""
    generators: dict[int, keras.random.SeedGenerator] = {}
    others: set[int] = set()
    for place in walk(container):
        if place.holder is not None and (id(place.holder) in others or hasattr(place.layer, "base_class")):
            others.add(id(place.layer))
        else:
            generators |= {id(each): each for each in keras_internals.seed_generators(place.layer)}
    return list(generators.values())


def warn_of_losses(model: Any) -> None:
    """Warn once if a resumed run of a compiled model would draw other random numbers: torch has them, not the model."""
    if keras.backend.backend() != "torch" or not getattr(model, "compiled", False) or vars(model).get(_WARNED):
        return
    unseeded = [
        place.path
        for place in walk(model)
        if any(each.get_config()["seed"] is None for each in keras_internals.seed_generators(place.layer))
    ]
    if unseeded:
        vars(model)[_WARNED] = True
        checks.warn(
            f"The file of '{model.name}' cannot have the random state of {len(unseeded)} layers without a seed, such as "
            f"'{unseeded[0]}': on PyTorch they draw from torch's own generator. A resumed run drops other entries than an "
            "uninterrupted one. If both must be equal, give `seed` to these layers and adapters, or save and restore "
            "`torch.get_rng_state()` yourself."
        )
