"""What an adapter is as plain data, out of a model and into one: a header, and tensors by key.

This is what an adapter file holds; `docs/adapter_file.md` says what each part means. An address leads from the model to a
layer by attributes and indices (`transformer_layers/0/_feedforward_intermediate_dense`), and to one of its kernels where it
has several (`cell/recurrent_kernel`), so it is the same in every process and on every backend.

Nothing is ever unpickled, imported or called by a name that a header gives.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import warnings
from collections.abc import Iterable
from typing import Any

import keras
import numpy as np

from keras_lora import adapters
from keras_lora.applying import inject, reset_compilation
from keras_lora.compat import keras_internals
from keras_lora.files import fingerprint, huggingface, tensor_file
from keras_lora.linear_map import LinearMap
from keras_lora.swap import flags, slots
from keras_lora.swap.adapted import maps_by_address, maps_of, named_adapters
from keras_lora.swap.adapters_of_model import new_name, only_name
from keras_lora.swap.addresses import by_address, walk

Contents = tuple[dict[str, Any], dict[str, np.ndarray]]


def contents_of(model: Any, name: str | None = None, fingerprint_weights: bool = False) -> Contents:
    """The header and the tensors of an adapter of a model, and of what else was trained with it."""
    adapted = named_adapters(model)[only_name(model, name)]
    header: dict[str, Any] = {"base_structure": fingerprint.structure(model), "adapters": {}, "trained": {}}
    for address, (linear, adapter) in adapted.items():
        header["adapters"][address] = {**identity_of(linear), **described(adapter)}
    for address, layer in _trained_layers(model).items():
        trained = flags.trained_variables(layer)
        trains = [any(v is each for each in trained) for v in keras_internals.own_trainable_variables(layer)]
        header["trained"][address] = {**nothing_trained(layer), "plan": [True, trains]}
    methods = {address: adapter for address, (_, adapter) in adapted.items()}
    variables = _variables_of(methods, header["trained"], by_address(model))
    if fingerprint_weights:
        kernels = {address: linear for address, (linear, _) in adapted.items()}
        header["base_weights"] = fingerprint.weights(kernels, variables.values())
    tensors = {key: fingerprint.to_numpy(variable) for key, variable in variables.items()}
    return header, tensors


def read_contents(path: str | os.PathLike[str]) -> Contents:
    """The header and the tensors of an adapter file, on the disk or on the Hugging Face Hub."""
    file = huggingface.adapter_file(path) if huggingface.is_address(path) else tensor_file.checked_path(path)
    return tensor_file.read(file)


def put_contents(
    model: Any,
    header: dict[str, Any],
    tensors: dict[str, np.ndarray],
    source: str,
    trainable: bool = True,
    name: str | None = None,
) -> Any:
    """Put an adapter into a model, as `keras_lora.load_adapter` says, or raise and leave the model as it was.

    Args:
        model: The base model, plain or adapted.
        header, tensors: A checked header, and what it says there is.
        source: Where they come from, for messages: `"The adapter file french.safetensors"`.
        trainable, name: As for `keras_lora.load_adapter`.
    """
    named = named_adapters(model)
    name = only_name(model, name) if named and (name is None or name in named) else new_name(model, name)
    own = {address: adapter for address, (_, adapter) in named.get(name, {}).items()}
    raise_problems(source, model, misfits(model, header, own), header)
    found, maps = by_address(model), maps_by_address(model)
    started, problems = dict(own), []
    for address, entry in header["adapters"].items():
        keys = keys_at(address, tensors)
        if not own:
            adapter, misfit = _started(maps[address], address, entry, sum(tensors[key].size for key in keys.values()))
            problems += misfit
            if adapter is not None:
                started[address] = adapter
            else:
                tensors = {key: tensor for key, tensor in tensors.items() if key not in keys.values()}
        elif _is_within({name: tensors[key] for name, key in keys.items()}, own[address]):
            fitted = own[address].values_from(_made(entry), {name: tensors[key] for name, key in keys.items()})
            tensors |= {keys[name]: value for name, value in fitted.items()}
    variables = _variables_of(started, header["trained"], found)
    raise_problems(source, model, problems + _mismatched(tensors, variables), header)

    if "base_weights" in header:
        now = fingerprint.weights({address: maps[address] for address in header["adapters"]}, variables.values())
        if now != header["base_weights"]:
            warnings.warn(
                f"{source} was made from other weights than '{model.name}' has in the kernels that the adapter changes, or "
                "from the same ones in another dtype. It fits, and is loaded. Load the weights it was trained on first.",
                stacklevel=3,
            )
    if named and not own and header["trained"]:
        warnings.warn(
            f"{source} holds more than an adapter: the layers at {sorted(header['trained'])} train with it, and all "
            f"adapters of '{model.name}' share them. They have the file's values now. An adapter on a head (`head=None`) is "
            "its own.",
            stacklevel=3,
        )
    if not own:
        inject(model, [(maps[address], adapter) for address, adapter in started.items()], name)
        for address, entry in header["trained"].items():
            mark = vars(found[address])[flags.MARK]
            flags.mark(found[address], found=mark["found"], plan=entry["plan"])
        reset_compilation(model, stacklevel=4)
    of_base = {key: variable for key, variable in variables.items() if ":base." in key}
    _assign(of_base, tensors)
    for address in header["trained"] if of_base else ():
        for linear in maps_of(found[address]):  # first, so that what an adapter computes from the kernel is that of today
            for adapter in slots.adapters_of(linear):
                adapter.base_changed(linear)
    _assign({key: variable for key, variable in variables.items() if key not in of_base}, tensors)
    if not trainable:
        for layer in [layer for adapter in started.values() for layer in adapters.with_sublayers(adapter)]:
            layer.trainable = False
        for address in header["trained"]:
            trains = [False] * len(keras_internals.own_trainable_variables(found[address]))
            flags.set_flags(found[address], [found[address].trainable, trains])
    return model


def _is_within(values: dict[str, np.ndarray], own: adapters.Adapter) -> bool:
    """Whether filling `values` up to the size of `own` takes no more memory than `own` has."""
    most = {key: tuple(v.shape) for key, v in own.saved_weights.items()}
    pairs = [(value.shape, most[key]) for key, value in values.items() if key in most]
    return all(len(found) == len(each) and all(map(int.__le__, found, each)) for found, each in pairs)


def keys_at(address: str, tensors: Iterable[str]) -> dict[str, str]:
    """The keys of an adapter's tensors in a file, by their keys in the adapter."""
    own = (key.rpartition(":") for key in tensors if ":base." not in key)
    return {key: f"{place}:{key}" for place, _, key in own if place == address}


def _assign(variables: dict[str, keras.Variable], tensors: dict[str, np.ndarray]) -> None:
    for key, variable in variables.items():
        variable.assign(tensors[key].astype(keras.backend.standardize_dtype(variable.dtype)))


# What the model has.


def _variables_of(
    methods: dict[str, adapters.Adapter], trained: dict[str, Any], layers: dict[str, keras.layers.Layer]
) -> dict[str, keras.Variable]:
    """Every variable that a file holds, by its key there: those of the adapters, and the base variables that train."""
    variables = {f"{address}:{key}": v for address, each in methods.items() for key, v in each.saved_weights.items()}
    for address, entry in trained.items():
        plan = entry["plan"][1]
        for index, v in enumerate(keras_internals.own_variables(layers[address])):
            if all(plan) or (index < len(plan) and plan[index]):  # a layer trained in full has its statistics there too
                variables[f"{address}:base.{index}.{v.name}"] = v
    return variables


def _trained_layers(model: Any) -> dict[str, keras.layers.Layer]:
    """The layers of which base variables train, by address."""
    places = [place for place in walk(model) if not isinstance(place.layer, adapters.Adapter)]
    return {place.address: place.layer for place in places if flags.trained_variables(place.layer)}


def nothing_trained(layer: Any) -> dict[str, Any]:
    """What a header says of a layer of which base variables train, with none of them chosen yet."""
    trains = [False] * len(keras_internals.own_trainable_variables(layer))
    shapes = [list(v.shape) for v in keras_internals.own_variables(layer)]
    return {"class": _class_name(layer), "plan": [True, trains], "shapes": shapes}


def identity_of(linear: LinearMap) -> dict[str, Any]:
    """What a header says of a kernel."""
    return {"class": _class_name(linear.layer), "kernel": list(linear.kernel_shape)}


def _class_name(layer: Any) -> str:
    return type(layer).__name__


def described(adapter: adapters.Adapter) -> dict[str, Any]:
    """The method as plain words: no class path that a reader would have to import."""
    names = {cls: name for name, cls in adapters.TABLE.items()}
    if type(adapter) not in names:
        raise ValueError(
            f"An adapter file names its method, and {type(adapter).__name__} has no name. Expected one of "
            f"{sorted(names.values())}. Enter it in `keras_lora.adapters.TABLE`, in the process that loads the file too."
        )
    return {"method": names[type(adapter)], "config": adapters.method_of(adapter), "scale": _scale_of(adapter)}


def _made(entry: dict[str, Any]) -> adapters.Adapter:
    """The adapter that an entry of a file describes, without weights; an error where it is none that is ever written."""
    method, config = adapters.TABLE[entry["method"]], entry["config"]
    yes_or_no = [key for key, each in inspect.signature(method).parameters.items() if isinstance(each.default, bool)]
    wrong = [key for key in yes_or_no if not isinstance(config.get(key, False), bool)]
    wrong += config.keys() & set(adapters.INIT_ARGUMENTS)  # these could name an object to be made
    if not wrong:
        adapter = method(**config)
        said = adapters.method_of(adapter)  # in which an argument is of its own kind: true is no 1
        wrong = [key for key in config if key not in said or _as_json(config[key]) != _as_json(said[key])]
    if wrong:
        raise ValueError(f"its config has a wrong {', '.join(sorted(wrong))}")
    if not math.isclose(entry.get("scale", _scale_of(adapter)), _scale_of(adapter), rel_tol=1e-6):
        raise ValueError(f"its scale is {_scale_of(adapter)} by its config, and {entry['scale']} by the file")
    return adapter


def _as_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _scale_of(adapter: adapters.Adapter) -> float:
    """What multiplies the product of an adapter's factors."""
    return float(getattr(adapter, "scale", 1.0))


def _started(linear: LinearMap, address: str, entry: dict[str, Any], held: int) -> tuple[adapters.Adapter | None, list[str]]:
    """An adapter with weights for a kernel, or what stands against making one."""
    adapter = _made(entry)
    wanted = adapter.parameter_count(linear.matrix_shape)
    if wanted > held and wanted > max(2 * math.prod(linear.matrix_shape), 10_000):  # a header that asks for all memory
        return None, [f"the adapter at '{address}' would have {wanted} numbers; the file has {held}"]
    with adapters.skip_init():
        slots.start(linear, adapter)
    return adapter, []


# What does not fit.


def misfits(model: Any, header: dict[str, Any], own: dict[str, adapters.Adapter], partly: bool = False) -> list[str]:
    """What stands against loading into the adapters `own`, or, where there are none, into a model without that adapter.

    With `partly` the file need not have all that the model has.
    """
    layers = {address: layer for address, layer in by_address(model).items() if not isinstance(layer, adapters.Adapter)}
    maps, problems = maps_by_address(model), []
    for address, entry in header["adapters"].items():
        layer = maps[address].layer if address in maps else layers.get(address)
        misfit = _layer_misfits(address, layer, entry)
        if not misfit and address not in maps:
            misfit = [f"the layer at '{address}', a {_class_name(layer)}, cannot be adapted"]
        if not misfit and own and address not in own:
            misfit = [f"the file has an adapter at '{address}'; the model has none"]
        problems += misfit or _adapter_misfits(address, maps[address], own.get(address), entry)
    for address, entry in header["trained"].items():
        misfit = _layer_misfits(address, layers.get(address), entry)
        problems += misfit or _variable_misfits(address, layers[address], entry)
    if own and not partly:
        for address in own:
            if address not in header["adapters"]:
                problems.append(f"the model has an adapter at '{address}'; the file has none")
        trained = _trained_layers(model)
        for address in trained.keys() - header["trained"].keys():
            problems.append(f"the model trains variables of '{address}'; the file has none")
        for address in header["trained"].keys() - trained.keys():
            problems.append(f"the file has trained variables of '{address}'; the model does not train them")
    return problems


def _layer_misfits(address: str, layer: Any, entry: dict[str, Any]) -> list[str]:
    if layer is None:
        return [f"the model has no layer at '{address}'; the file has a {entry['class']} there"]
    if _class_name(layer) != entry["class"]:
        return [f"the layer at '{address}' is a {_class_name(layer)}; in the file it is a {entry['class']}"]
    return []


def _variable_misfits(address: str, layer: Any, entry: dict[str, Any]) -> list[str]:
    shapes = [list(v.shape) for v in keras_internals.own_variables(layer)]
    if shapes != entry["shapes"]:
        return [f"the variables of '{address}' have shapes {shapes}; in the file they have {entry['shapes']}"]
    if len(keras_internals.own_trainable_variables(layer)) != len(entry["plan"][1]):
        return [f"the file says of {len(entry['plan'][1])} variables of '{address}' whether they train"]
    return []


def _adapter_misfits(address: str, linear: LinearMap, own: adapters.Adapter | None, entry: dict[str, Any]) -> list[str]:
    if not linear.layer.built:
        return [f"the layer at '{address}' is not built"]
    identity = identity_of(linear)
    if identity["kernel"] != entry["kernel"]:
        return [f"the kernel at '{address}' has shape {identity['kernel']}; in the file it has {entry['kernel']}"]
    if entry["method"] not in adapters.TABLE:
        return [f"the adapter at '{address}' has the method '{entry['method']}'; known are {sorted(adapters.TABLE)}"]
    try:
        in_file = _made(entry)  # with arguments that are newer than the file
    except (TypeError, ValueError, ArithmeticError) as error:
        return [f"the adapter at '{address}' cannot be made: {error}"]
    if own is None:
        problem = in_file.problem_with(linear)
        return [] if problem is None else [f"the adapter at '{address}' cannot be made: {problem}"]
    misfit = own.misfit_with(in_file)
    return [] if misfit is None else [f"the adapter at '{address}' cannot take that of the file: {misfit}"]


def _mismatched(tensors: dict[str, np.ndarray], variables: dict[str, keras.Variable]) -> list[str]:
    problems = [f"the file lacks the tensor '{key}'" for key in sorted(variables.keys() - tensors.keys())]
    problems += [f"the file has a tensor '{key}' that fits nothing" for key in sorted(tensors.keys() - variables.keys())]
    for key in sorted(variables.keys() & tensors.keys()):
        if tuple(variables[key].shape) != tensors[key].shape:
            expected = tuple(variables[key].shape)
            problems.append(f"the tensor '{key}' has shape {tensors[key].shape}; expected is {expected}")
        dtype = keras.backend.standardize_dtype(variables[key].dtype)
        if (tensors[key].dtype.kind == "f") != keras.backend.is_float_dtype(dtype):
            problems.append(f"the tensor '{key}' is of {tensors[key].dtype}; expected is {dtype}")
    return problems


def raise_problems(
    source: str,
    model: Any,
    problems: list[str],
    header: dict[str, Any] | None = None,
    do: str = "Load it into the base model it was trained on, plain or adapted in the same way.",
) -> None:
    """Raise with the list of problems and with what to `do`, if there are any."""
    if problems:
        listed = "".join(f"\n  - {problem if len(problem) <= 1000 else problem[:1000] + '…'}" for problem in problems)
        found = (header or {}).get("base_structure")
        same = found is None or found == fingerprint.structure(model)
        other = "" if same else "The file was made from a base of another structure. "
        raise ValueError(f"{source} does not fit '{model.name}', and nothing was changed:{listed}\n{other}{do}")
