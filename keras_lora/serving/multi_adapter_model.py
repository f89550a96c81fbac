"""Serve many adapters of one base in one batch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from keras_lora import adapters
from keras_lora.adapters import per_example
from keras_lora.adapters.per_example import INDEX, put_all
from keras_lora.applying import apply_lora
from keras_lora.files.adapter_state import AdapterState, ModelView
from keras_lora.files.misfits import raise_problems
from keras_lora.swap.adapted import named_adapters
from keras_lora.targets.patterns import Patterns


@dataclass
class _Served:
    """What a served model consists of, found once. Keras would track a dict of layers, but does not look into this."""

    places: dict[str, adapters.PerExample]
    view: ModelView


@keras.saving.register_keras_serializable("keras_lora")
class MultiAdapterModel(keras.Model):
    """A model in which each example of a batch may use a different adapter, or none.

    Each layer stacks the factors of all loaded adapters, and each example picks one with an index, an ordinary input. So a
    batch may mix any adapters, and loading, deleting and mixing never compile again. Memory is always used for `capacity`
    adapters of rank `rank`, loaded or not.

    Args:
        model: A plain built model. It is adapted in place, but still gives its base outputs if you call it directly.
        capacity: How many adapters can be loaded at a time.
        rank: The largest rank of an adapter.
        targets, exclude, head: Which layers an adapter may change, as for `keras_lora.apply_lora`.
        names: The places in use, by name. Only needed to rebuild a saved model.
        **kwargs: The `name` of the Keras model.

    Call arguments:
        inputs: A dict of the model's own inputs (under `"inputs"` if it takes no dict) and `"adapter_index"`, integers
            `(batch,)`: 0 for the base, or an index that `load` returned. See `index_of`.

    Raises:
        ValueError: As for `keras_lora.apply_lora`, or a layer cannot use a different adapter for each example.

    Example:

    >>> import keras, keras_lora, numpy as np, os, tempfile
    >>> base = lambda: keras.Sequential([keras.Input((16,)), keras.layers.Dense(32), keras.layers.Dense(2)])
    >>> path = os.path.join(tempfile.mkdtemp(), "french.safetensors")
    >>> keras_lora.save_adapter(keras_lora.apply_lora(base(), rank=2), path)
    >>> served = keras_lora.MultiAdapterModel(base(), capacity=64, rank=8)
    >>> served.load(path, "french")
    1
    >>> index = served.index_of(["french", None, "french"])
    >>> served.predict({"inputs": np.ones((3, 16)), "adapter_index": index}, verbose=0).shape
    (3, 2)

    Reference:
        [Chen et al., 2023](https://arxiv.org/abs/2310.18547)
    """

    def __init__(
        self,
        model: keras.Model,
        *,
        capacity: int = 8,
        rank: int = 8,
        targets: Patterns | None = None,
        exclude: Patterns | None = None,
        head: Patterns | str | None = "auto",
        names: dict[str, int] | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if _places_of(model):
            if names is None:
                raise ValueError(
                    f"'{model.name}' has places for adapters already. Expected a plain model, or the MultiAdapterModel that "
                    "made them. Received: a model that another one serves."
                )
        else:
            apply_lora(model, adapters.PerExample(rank, capacity), targets=targets, exclude=exclude, head=head)
        self.model = model
        self._served = _Served(_places_of(model), ModelView(model))
        self.capacity = capacity
        self.names: dict[str, int] = dict(names or {})
        self.built = True

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        if not isinstance(inputs, dict) or INDEX not in inputs:
            raise ValueError(
                f"The inputs must be a dict with the key '{INDEX}'. Received: "
                f"{sorted(inputs) if isinstance(inputs, dict) else type(inputs).__name__}."
            )
        rest = {key: value for key, value in inputs.items() if key != INDEX}
        with per_example.using(inputs[INDEX]):
            return self.model(rest["inputs"] if rest.keys() == {"inputs"} else rest, training=training)

    def load(self, path: str | os.PathLike[str], name: str) -> int:
        """Load an adapter file into a free place, or replace the adapter that is called `name`.

        Args:
            path: A file of `keras_lora.save_adapter`, or its address `hf://owner/name` on the Hugging Face Hub. It must
                have a LoRA of at most this model's rank, with nothing else trained.
            name: The adapter's name.

        Returns:
            The adapter's index.

        Raises:
            ValueError: There is no free place, or the file does not fit. Nothing is changed then.
            FileNotFoundError: There is no such file.
        """
        values = self.read(path)
        index = self.names.get(name) or self._free_place()
        self.put(index, values)
        self.names = {**self.names, name: index}
        return index

    def read(self, path: str | os.PathLike[str]) -> dict[str, Any]:
        """Read and check an adapter file without loading it: the values for the places, by address."""
        state, places = AdapterState.read(path), self._served.places
        problems = state.misfits(self.model, dict(places), partly=True, view=self._served.view)
        problems += [f"the file has trained variables of '{address}' with its adapter" for address in state.trained]
        raise_problems(f"The adapter file {path}", self.model, problems)
        values = {}
        for address, entry in state.adapters.items():
            values[address] = found = places[address].values_from(self._served.view.made(entry), entry.tensors)
            problems += [f"'{address}:{problem}" for problem in places[address].misshapen(found)]
        raise_problems(f"The adapter file {path}", self.model, problems)
        return values

    def put(self, index: int, values: dict[str, Any]) -> None:
        """Write the result of `read` into a place; layers that it leaves out, and all of `{}`, get zeros."""
        put_all(index, [(adapter, values.get(address)) for address, adapter in self._served.places.items()])

    def delete(self, name: str) -> None:
        """Delete an adapter and free its place. Examples that still use its index get the base.

        Raises:
            ValueError: There is no adapter of that name.
        """
        self.put(int(self.index_of([name])[0]), {})
        self.names = {each: place for each, place in self.names.items() if each != name}

    def index_of(self, names: Iterable[str | None]) -> np.ndarray:
        """Return the input `"adapter_index"` for examples that use the named adapters, `None` for the base.

        Raises:
            ValueError: There is no adapter of a given name.
        """
        wanted = list(names)
        unknown = sorted({name for name in wanted if name is not None and name not in self.names})
        if unknown:
            raise ValueError(f"'{self.name}' has no adapter {unknown}. Expected some of {sorted(self.names)}, or None.")
        return np.array([0 if name is None else self.names[name] for name in wanted], "int32")

    def generate(self, inputs: Any, adapters: Sequence[str | None], **kwargs: Any) -> Any:
        """Call `generate` of a KerasHub model, with an adapter for each prompt.

        Args:
            inputs: A batch of prompts, as for the model's `generate`.
            adapters: The name of an adapter for each prompt, `None` for the base.
            **kwargs: The other arguments of the model's `generate`.

        Raises:
            ValueError: The model does not generate, or there is no adapter of a given name.
        """
        model: Any = self.model
        if not hasattr(model, "make_generate_function"):
            raise ValueError(f"'{model.name}' does not generate. Expected a KerasHub CausalLM or Seq2SeqLM.")
        index, function = self.index_of(adapters), model.make_generate_function()
        model.generate_function = lambda x, **more: function({**x, INDEX: index}, **more)
        try:
            return model.generate(inputs, **kwargs)
        finally:
            model.generate_function = function

    def _free_place(self) -> int:
        free = sorted(set(range(1, self.capacity + 1)) - set(self.names.values()))
        if not free:
            raise ValueError(
                f"All {self.capacity} places of '{self.name}' are taken, by {sorted(self.names)}. `delete` one, or build "
                "the model with a larger `capacity`."
            )
        return free[0]

    def get_config(self) -> dict[str, Any]:
        config = {"name": self.name, "capacity": self.capacity, "names": self.names}
        return {**config, "model": keras.saving.serialize_keras_object(self.model)}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> Any:
        model = keras.saving.deserialize_keras_object(config["model"], custom_objects=custom_objects)
        return cls(model, **{key: value for key, value in config.items() if key != "model"})


def _places_of(model: Any) -> dict[str, adapters.PerExample]:
    """The stacked factors of a model by address."""
    return {
        address: adapter
        for found in named_adapters(model).values()
        for address, (_, adapter) in found.items()
        if isinstance(adapter, adapters.PerExample)
    }
