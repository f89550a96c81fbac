"""An adapter as plain data: extracted from a model, read from a file, and put into a model.

This is the content of an adapter file; `docs/adapter_file.md` documents each part. An address leads from the model to a
layer by attributes and indices (`transformer_layers/0/_feedforward_intermediate_dense`), and to one of its kernels if it
has several (`cell/recurrent_kernel`), so it is the same in every process and on every backend.

Nothing is ever unpickled, imported or called by a name from a file.
"""

from __future__ import annotations

import inspect
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_lora import adapters, checks
from keras_lora.adapters import Adapter
from keras_lora.applying import inject, reset_compilation
from keras_lora.compat import keras_internals, training_internals
from keras_lora.files import fingerprint, huggingface, misfits, tensor_file
from keras_lora.linear_map import LinearMap
from keras_lora.swap import beside, flags, slots
from keras_lora.swap.adapted import maps_by_address, named_adapters
from keras_lora.swap.adapters_of_model import new_name, only_name, show_beside
from keras_lora.swap.addresses import by_address
from keras_lora.swap.flags import Flags


@dataclass
class AdapterEntry:
    """The adapter of one kernel.

    Attributes:
        layer_class: The name of the layer's class.
        kernel_shape: The shape of the float kernel.
        method: The name of the method in the table of methods.
        config: The arguments of the method that are needed to interpret its weights.
        scale: The scale of the product of its factors; `None` in a file of format version 1.
        tensors: Its weights by key.
    """

    layer_class: str
    kernel_shape: list[int]
    method: str
    config: dict[str, Any]
    scale: float | None
    tensors: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(cls, linear: LinearMap, adapter: Adapter, tensors: dict[str, np.ndarray] | None = None) -> AdapterEntry:
        """The entry of an adapter for a kernel. It stores a method name, not a class path that a reader must import."""
        names = {cls: name for name, cls in adapters.TABLE.items()}
        if type(adapter) not in names:
            raise ValueError(
                f"An adapter file names its method, and {type(adapter).__name__} has no name. Expected one of "
                f"{sorted(names.values())}. Register it with `keras_lora.register_adapter`, in the process that loads the "
                "file too."
            )
        layer, config = type(linear.layer).__name__, adapters.method_of(adapter)
        return cls(layer, list(linear.kernel_shape), names[type(adapter)], config, scale_of(adapter), tensors or {})

    def made(self) -> Adapter:
        """The adapter that this entry describes, without weights. Raises an error if the description is not valid."""
        method, config = adapters.TABLE[self.method], self.config
        yes_or_no = [key for key, each in inspect.signature(method).parameters.items() if isinstance(each.default, bool)]
        wrong = [key for key in yes_or_no if not isinstance(config.get(key, False), bool)]
        wrong += config.keys() & set(adapters.INIT_ARGUMENTS)  # these could name an object to create
        if not wrong:
            adapter = method(**config)
            said = adapters.method_of(adapter)  # compared as JSON, where `true` is not 1
            wrong = [key for key in config if key not in said or _as_json(config[key]) != _as_json(said[key])]
        if wrong:
            raise ValueError(f"its config has a wrong {', '.join(sorted(wrong))}")
        scale = scale_of(adapter)
        if self.scale is not None and not math.isclose(self.scale, scale, rel_tol=1e-6):
            raise ValueError(f"its scale is {scale} by its config, and {self.scale} by the file")
        return adapter

    def factors(self) -> tuple[np.ndarray, np.ndarray] | None:
        """The change as an exact product, scale included, if known without the base. Raises an error if damaged."""
        return self.made().factors_of(self.tensors, None)


@dataclass
class TrainedEntry:
    """The base variables that train in one layer besides the adapters, such as a head or biases.

    Attributes:
        layer_class: The name of the layer's class.
        shapes: The shapes of all variables of the layer itself.
        flags: Which of them train.
        tensors: The values of the trained variables, by place and name: `"0.kernel"`.
    """

    layer_class: str
    shapes: list[list[int]]
    flags: Flags
    tensors: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(cls, layer: Any) -> TrainedEntry:
        """The entry of a layer with no variable selected yet."""
        trains = [False] * len(keras_internals.own_trainable_variables(layer))
        shapes = [list(v.shape) for v in keras_internals.own_variables(layer)]
        return cls(type(layer).__name__, shapes, Flags(True, trains))


@dataclass
class AdapterState:
    """An adapter, and everything that was trained with it, as plain data.

    Attributes:
        adapters: The adapters by the address of their kernel.
        trained: The base variables that were trained, by the address of the layer.
        base_structure, base_weights: Fingerprints of the base, if known.
        unplaced: Tensors of a file that belong to neither, by their full key.
        version: The version of the file format.
    """

    adapters: dict[str, AdapterEntry] = field(default_factory=dict)
    trained: dict[str, TrainedEntry] = field(default_factory=dict)
    base_structure: str | None = None
    base_weights: str | None = None
    unplaced: dict[str, np.ndarray] = field(default_factory=dict)
    version: int = tensor_file.VERSION

    # From a model or a file, and into a model or a file.

    @classmethod
    def of(cls, model: Any, name: str | None = None, *, fingerprint_weights: bool = False) -> AdapterState:
        """The state of an adapter of a model, and of everything that was trained with it."""
        name = only_name(model, name)
        adapted = named_adapters(model)[name]
        state = cls(base_structure=fingerprint.structure(model))
        for address, (linear, adapter) in adapted.items():
            tensors = {key: fingerprint.to_numpy(v) for key, v in adapter.saved_weights.items()}
            state.adapters[address] = AdapterEntry.of(linear, adapter, tensors)
        beside.store(model)
        for layer in by_address(model).values():
            if not isinstance(layer, adapters.Adapter):
                beside.start_what_trains(layer, name)
        for address, (layer, values) in beside.owned(model, name).items():
            state.trained[address] = entry = TrainedEntry.of(layer)
            entry.flags = Flags(beside.moves_statistics(layer, [name]), beside.trains(layer, [name]) or [])
            entry.tensors = dict(values)
        if fingerprint_weights:
            layers = by_address(model)
            chosen = [
                v
                for at, each in state.trained.items()
                for v in beside.variables(layers[at], list(each.flags.variables), each.flags.layer).values()
            ]
            state.base_weights = fingerprint.weights({at: linear for at, (linear, _) in adapted.items()}, chosen)
        return state

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> AdapterState:
        """The state in an adapter file, on disk or on the Hugging Face Hub."""
        file = huggingface.adapter_file(path) if huggingface.is_address(path) else tensor_file.checked_path(path)
        return cls.parse(*tensor_file.read(file))

    def write(self, path: Path) -> None:
        """Write an adapter file atomically."""
        tensor_file.write(path, self.header, self.tensors)

    @classmethod
    def parse(cls, header: dict[str, Any], tensors: dict[str, np.ndarray]) -> AdapterState:
        """The state that a checked header and the tensors of a file describe."""
        state = cls(
            base_structure=header.get("base_structure"), base_weights=header.get("base_weights"), version=header["version"]
        )
        found = tensor_file.by_place(header, tensors)
        for address, entry in header["adapters"].items():
            said = entry["class"], entry["kernel"], entry["method"], entry["config"], entry.get("scale")
            state.adapters[address] = AdapterEntry(*said, found["adapters"][address])
        for address, entry in header["trained"].items():
            own = found["trained"][address]
            state.trained[address] = TrainedEntry(entry["class"], entry["shapes"], Flags(*entry["plan"]), own)
        state.unplaced = found["unplaced"]
        return state

    @property
    def header(self) -> dict[str, Any]:
        """Everything but the tensors, as the header of a file."""
        header: dict[str, Any] = {"version": self.version, "adapters": {}, "trained": {}}
        for name in ("base_structure", "base_weights"):
            if (value := getattr(self, name)) is not None:
                header[name] = value
        for address, each in self.adapters.items():
            entry = {"class": each.layer_class, "kernel": each.kernel_shape, "method": each.method, "config": each.config}
            header["adapters"][address] = entry if each.scale is None else {**entry, "scale": each.scale}
        for address, trained in self.trained.items():
            plan = [trained.flags.layer, list(trained.flags.variables)]
            header["trained"][address] = {"class": trained.layer_class, "plan": plan, "shapes": trained.shapes}
        return header

    @property
    def tensors(self) -> dict[str, np.ndarray]:
        """The tensors by their keys in a file."""
        found = {f"{at}:{key}": tensor for at, entry in self.adapters.items() for key, tensor in entry.tensors.items()}
        of_base = {
            f"{at}{tensor_file.BASE}{key}": each for at, entry in self.trained.items() for key, each in entry.tensors.items()
        }
        return {**found, **of_base, **self.unplaced}

    def put_into(self, model: Any, source: str, *, name: str | None = None, trainable: bool = True) -> None:
        """Put the adapter into a model, as `keras_lora.load_adapter` does, or raise and leave the model as it was.

        Args:
            model: The base model, plain or adapted.
            source: Its origin, for messages: `"The adapter file french.safetensors"`.
            name, trainable: As for `keras_lora.load_adapter`.
        """
        training_internals.sync_training_state(model)
        named = named_adapters(model)
        name = only_name(model, name) if named and (name is None or name in named) else new_name(model, name)
        own = {address: adapter for address, (_, adapter) in named.get(name, {}).items()}
        misfits.raise_problems(source, model, self.misfits(model, own), self.base_structure)
        found, maps = by_address(model), maps_by_address(model)
        started, problems, tensors = dict(own), [], self.tensors
        for address, entry in self.adapters.items():
            if not own:
                adapter, misfit = _started(maps[address], address, entry)
                problems += misfit
                if adapter is not None:
                    started[address] = adapter
                else:
                    left_out = {f"{address}:{key}" for key in entry.tensors}
                    tensors = {key: tensor for key, tensor in tensors.items() if key not in left_out}
            elif _is_within(entry.tensors, own[address]):
                fitted = own[address].values_from(entry.made(), entry.tensors)
                tensors |= {f"{address}:{key}": value for key, value in fitted.items()}
        for address in own.keys() - self.adapters.keys():  # as before training, which changes nothing
            adapter = adapters.copy_of(own[address])
            slots.start(maps[address], adapter)
            tensors |= {f"{address}:{key}": fingerprint.to_numpy(v) for key, v in adapter.saved_weights.items()}
        of_base = {
            f"{address}{tensor_file.BASE}{key}": v
            for address, trained in self.trained.items()
            for key, v in beside.variables(found[address], list(trained.flags.variables), trained.flags.layer).items()
        }
        of_adapters = {f"{at}:{key}": v for at, adapter in started.items() for key, v in adapter.saved_weights.items()}
        misfits.raise_problems(
            source, model, problems + misfits.of_tensors(tensors, {**of_adapters, **of_base}), self.base_structure
        )
        self._warn(model, source, {address: maps[address] for address in self.adapters}, of_base)
        if not own:
            inject(model, [(maps[address], adapter) for address, adapter in started.items()], name)
            for address, trained in self.trained.items():
                before = vars(found[address])[flags.MARK]["found"]
                flags.mark(found[address], found=before, plan=trained.flags)
                beside.start(found[address], name, list(trained.flags.variables), trained.flags.layer)
            reset_compilation(model)
        beside.store(model)
        beside.give(model, name, {address: trained.tensors for address, trained in self.trained.items()})
        show_beside(model)  # first, so that values computed from a kernel are up to date
        _assign(of_adapters, tensors)
        if not trainable:
            for layer in [layer for adapter in started.values() for layer in adapters.with_sublayers(adapter)]:
                layer.trainable = False
            for address in self.trained:
                trains = [False] * len(keras_internals.own_trainable_variables(found[address]))
                flags.set_flags(found[address], Flags(found[address].trainable, trains))

    def _warn(self, model: Any, source: str, kernels: dict[str, LinearMap], of_base: dict[str, keras.Variable]) -> None:
        """Warn if the base has other weights."""
        if self.base_weights is not None and fingerprint.weights(kernels, of_base.values()) != self.base_weights:
            checks.warn(
                f"{source} was made from other weights than '{model.name}' has in the kernels that the adapter changes, or "
                "from the same ones in another dtype. It fits, and is loaded. Load the weights it was trained on first."
            )

    # Problems.

    def misfits(self, model: Any, own: dict[str, Adapter], partly: bool = False, view: ModelView | None = None) -> list[str]:
        """The problems with loading into the adapters `own`, or, if there are none, into a model without that adapter.

        With `partly` the file need not have everything that the model has. A `view` saves the time to make one.
        """
        view, problems = view or ModelView(model), []
        layers, maps = view.layers, view.maps
        for address, entry in self.adapters.items():
            layer = maps[address].layer if address in maps else layers.get(address)
            misfit = misfits.of_layer(address, layer, entry.layer_class)
            if not misfit and address not in maps:
                misfit = [f"the layer at '{address}', a {type(layer).__name__}, cannot be adapted"]
            if not misfit and own and address not in own:
                misfit = [f"the file has an adapter at '{address}'; the model has none"]
            problems += misfit or misfits.of_adapter(address, maps[address], own.get(address), entry, view.made)
        for address, trained in self.trained.items():
            misfit = misfits.of_layer(address, layers.get(address), trained.layer_class)
            problems += misfit or misfits.of_variables(address, layers[address], trained)
        if own and not partly:
            in_model = beside.owned(model, next(iter(own.values())).adapter_name)
            for address in in_model.keys() - self.trained.keys():
                problems.append(f"the model trains variables of '{address}'; the file has none")
            for address in self.trained.keys() - in_model.keys():
                problems.append(f"the file has trained variables of '{address}'; the model does not train them")
        return problems


class ModelView:
    """What checking files needs of a model, found once: its layers and kernels, and the adapters that files describe."""

    def __init__(self, model: Any):
        self.layers = {at: layer for at, layer in by_address(model).items() if not isinstance(layer, adapters.Adapter)}
        self.maps = maps_by_address(model)
        self._made: dict[str, Adapter] = {}

    def made(self, entry: AdapterEntry) -> Adapter:
        """`entry.made()`, one for all entries with the same description. Making one takes longer than any check."""
        key = _as_json([entry.method, entry.config, entry.scale])
        if key not in self._made:
            if len(self._made) >= 256:
                self._made.clear()
            self._made[key] = entry.made()
        return self._made[key]


def scale_of(adapter: Adapter) -> float:
    """The scale of the product of an adapter's factors."""
    return float(getattr(adapter, "scale", 1.0))


def _as_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


# The model's variables and adapters.


def _is_within(values: dict[str, np.ndarray], own: Adapter) -> bool:
    """Whether padding `values` to the size of `own` takes no more memory than `own`."""
    most = {key: tuple(v.shape) for key, v in own.saved_weights.items()}
    pairs = [(value.shape, most[key]) for key, value in values.items() if key in most]
    return all(len(found) == len(each) and all(map(int.__le__, found, each)) for found, each in pairs)


def _started(linear: LinearMap, address: str, entry: AdapterEntry) -> tuple[Adapter | None, list[str]]:
    """An adapter with weights for a kernel, or the reasons why it cannot be made."""
    adapter, held = entry.made(), sum(tensor.size for tensor in entry.tensors.values())
    try:
        with adapters.skip_init(), adapters.at_most(max(2 * held, 2 * math.prod(linear.matrix_shape), 10_000)):
            slots.start(linear, adapter)
    except adapters.TooLarge as error:  # the header asks for too much memory
        return None, [f"the adapter at '{address}' cannot be made: {error} The file has {held}"]
    return adapter, []


def _assign(variables: dict[str, keras.Variable], tensors: dict[str, np.ndarray]) -> None:
    for key, variable in variables.items():
        variable.assign(tensors[key].astype(keras.backend.standardize_dtype(variable.dtype)))
