"""What a file of an adapted model has besides Keras's: what training needs to go on as if it was not interrupted.

Keras saves the variables of layers. The state of a `SeedGenerator` is not among them, so a resumed run would drop other
entries than an uninterrupted one. Each adapted container saves the states of the layers in it, with the values of `beside`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np

from keras_lora import backend, checks
from keras_lora.compat import keras_internals, training_internals
from keras_lora.swap import beside, whole_files
from keras_lora.swap.addresses import walk

#: The key in a part of a weights file.
_STORED = "keras_lora.seeds"
#: Set on a model that has warned.
_WARNED = "_keras_lora_warned_of_seeds"


class SavedTraining:
    """Mixin for models: it saves and restores the state of a training."""

    def save(self, filepath: Any, *args: Any, **kwargs: Any) -> None:
        self.get_config()  # type: ignore[attr-defined]  # raises what is to be refused before anything is written
        warn_of_losses(self)
        beside.store(self)
        with training_internals.whole(self):
            whole_files.save(super().save, filepath, *args, **kwargs)  # type: ignore[misc]

    def save_weights(self, filepath: Any, *args: Any, **kwargs: Any) -> None:
        warn_of_losses(self)
        beside.store(self)
        with training_internals.whole(self):
            whole_files.save(super().save_weights, filepath, *args, **kwargs)  # type: ignore[misc]

    def load_weights(self, *args: Any, **kwargs: Any) -> None:
        super().load_weights(*args, **kwargs)  # type: ignore[misc]
        beside.loaded(self)

    def set_state_tree(self, state_tree: Mapping[str, Any]) -> None:
        optimizer = getattr(self, "optimizer", None)
        if "optimizer_variables" in state_tree and optimizer is not None and not optimizer.built:
            optimizer.build(self.trainable_variables)  # type: ignore[attr-defined]  # or Keras skips most of its state
        check_state_tree(self, state_tree)
        super().set_state_tree(state_tree)  # type: ignore[misc]

    def get_compile_config(self) -> dict[str, Any]:
        found = super().get_compile_config()  # type: ignore[misc]
        found = found and {**found, **training_internals.compiled_besides(self)}
        return training_internals.with_portable_names(found)  # type: ignore[no-any-return]

    def compile_from_config(self, config: dict[str, Any]) -> None:
        if not training_internals.overrides_compile(self):
            super().compile_from_config(config)  # type: ignore[misc]
            return
        # KerasHub tasks: Keras would only warn here, and resumed training would lose its optimizer.
        self.compile(**keras.saving.deserialize_keras_object(config))  # type: ignore[attr-defined]
        if self.built:  # type: ignore[attr-defined]
            self.optimizer.build(self.trainable_variables)  # type: ignore[attr-defined]


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
    """Warn once if some dropout of a compiled model has a seed and some has none: torch has the state of those.

    Without any seed nobody asked for equal runs, and most models are saved when they are finished.
    """
    if keras.backend.backend() != "torch" or not getattr(model, "compiled", False) or vars(model).get(_WARNED):
        return
    seeds = [(place.path, seed) for place in walk(model) for seed in _dropout_seeds(place.layer)]
    unseeded = sorted({path for path, seed in seeds if seed is None})
    if unseeded and any(seed is not None for _, seed in seeds):
        vars(model)[_WARNED] = True
        checks.warn(
            f"The file of '{model.name}' cannot have the random state of {len(unseeded)} layers without a seed, such as "
            f"'{unseeded[0]}': on PyTorch they draw from torch's own generator. A resumed run drops other entries than an "
            "uninterrupted one. If both must be equal, give `seed` to these layers and adapters, or save and restore "
            "`torch.get_rng_state()` yourself."
        )


def _dropout_seeds(layer: Any) -> list[int | None]:
    rates = [getattr(layer, name, None) for name in ("rate", "dropout", "recurrent_dropout")]
    drops = any(rate for rate in rates if checks.is_number(rate))
    generators = keras_internals.seed_generators(layer) if drops else []
    seeds = [each.get_config()["seed"] for each in generators]
    if hasattr(layer, "adapter_name") and all(backend.draws_bytes(each.state.value) for each in generators):
        return [seed for seed in seeds if seed is not None]  # without one, its numbers follow from the state all the same
    return seeds


def check_state_tree(model: Any, tree: Mapping[str, Any]) -> None:
    """Raise an error if variables of `model` are not in a state tree, as of an Orbax checkpoint: Keras skips them.

    Keras finds a variable by its path. The path of a layer in a nested model, and the number in that of a random generator,
    differ between a model that code made and one that was rebuilt from its config.
    """
    optimizer = getattr(model, "optimizer", None)
    kinds = {
        "trainable_variables": model.trainable_variables,
        "non_trainable_variables": model.non_trainable_variables,
        "optimizer_variables": [] if optimizer is None else optimizer.variables,
    }
    known = {kind: set(_paths_in(tree[kind])) for kind in kinds if kind in tree}
    missing = [v.path for kind, paths in known.items() for v in kinds[kind] if v.path not in paths]
    random = [path for path in missing if path.endswith("/seed_generator_state")]
    cure = "Make the model with the code that made the saved one, in a new process, compile it, and call `load_weights`."
    if others := sorted(set(missing) - set(random)):
        raise ValueError(
            f"The state to load into '{model.name}' lacks {len(others)} of its variables, which Keras would leave as they "
            f"are: {', '.join(map(repr, others[:10]))}. Expected the paths that the variables have here. {cure}"
        )
    if random:
        checks.warn(
            f"The random states of {len(random)} layers of '{model.name}' are not restored: their paths have other numbers "
            f"in the checkpoint. Dropout draws other numbers than in an uninterrupted run. {cure}"
        )


def _paths_in(tree: Mapping[str, Any], start: str = "") -> Iterator[str]:
    for key, each in tree.items():
        yield from _paths_in(each, f"{start}{key}/") if isinstance(each, Mapping) else [f"{start}{key}"]
