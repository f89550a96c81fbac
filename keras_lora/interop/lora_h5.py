"""`from_lora_h5`: load the `.lora.h5` files that KerasHub's `save_lora_weights` writes.

Such a file contains `lora/vars/rank`, and `lora/<index>/vars/lora_kernel_a` and `lora_kernel_b` for each layer: the index
counts the layers of the backbone that have weights. It has no alpha, no names and no biases.
"""

from __future__ import annotations

import math
import os
from typing import Any

import h5py
import numpy as np

from keras_lora import checks
from keras_lora.applying import inject, reset_compilation
from keras_lora.combining import CombinationReport
from keras_lora.compat import keras_internals, quantization
from keras_lora.interop.enable_lora import LastAxisLoRA, checked_arguments, kernel_of, report
from keras_lora.swap.addresses import walk

_TENSORS = ("lora_kernel_a", "lora_kernel_b")


@checks.helpful
def from_lora_h5(
    backbone: Any,
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    rank: int | None = None,
    alpha: float | None = None,
) -> CombinationReport:
    """Load a KerasHub `.lora.h5` file into a plain backbone, in place, as keras_lora adapters.

    It loads files for any targets, including those that KerasHub's `load_lora_weights` cannot load. As with KerasHub, the
    adapters and the biases of the adapted layers are trainable afterwards and everything else is frozen. The file contains
    no biases: if they were trained (`enable_lora` does not freeze them), they are lost, and the outputs differ from those of
    the saved model.

    The factors are converted as in `from_enable_lora`; a query kernel's adapter has a rank of up to `heads · rank`.

    Args:
        backbone: The backbone, with the same architecture as the saved one, because the file numbers its layers. For a task,
            pass `task.backbone`.
        path: A file written by `backbone.save_lora_weights`.
        alpha: The change is `alpha / rank` times the product of the factors. It is not in the file. The default is the rank
            in the file, which is what `backbone.enable_lora` uses.
        rank: The largest rank of a kernel's adapter, as in `from_enable_lora`.
        name: The name of the adapter.

    Returns:
        One row per kernel, with its rank and error. Call `compile` on the model before training.

    Raises:
        TypeError: `backbone` is not a Keras layer.
        ValueError: An argument is out of range, the model already has keras_lora adapters or Keras's LoRA enabled, or the
            file is damaged, of another kind or does not fit. Everything missing, unexpected or of another shape is listed,
            and the model is unchanged.
        FileNotFoundError: The file does not exist.

    Example:

    >>> import os, tempfile, keras_hub
    >>> from keras_lora.interop import from_lora_h5
    >>> sizes = {"num_layers": 1, "num_heads": 2, "hidden_dim": 8, "intermediate_dim": 8}
    >>> base = lambda: keras_hub.models.BertBackbone(vocabulary_size=9, max_sequence_length=5, **sizes)
    >>> path, tuned = os.path.join(tempfile.mkdtemp(), "french.lora.h5"), base()
    >>> tuned.enable_lora(rank=1)
    >>> tuned.save_lora_weights(path)
    >>> [row.layer.split("/")[-1] for row in from_lora_h5(base(), path)]
    ['value', 'query']
    """
    name = checked_arguments("from_lora_h5", backbone, rank, name)
    alpha = None if alpha is None else checks.positive_number("alpha", alpha)
    paths = {id(place.layer): place.path for place in walk(backbone)}
    if enabled := [place.path for place in walk(backbone) if getattr(place.layer, "lora_enabled", False)]:
        raise ValueError(
            f"`from_lora_h5()` needs a backbone without Keras's own LoRA. Received: '{backbone.name}', where it is enabled "
            f"at {enabled}. Read the file into a new backbone, or call `from_enable_lora` on this one."
        )
    rank_in_file, tensors, problems = _read(path)
    layers = {str(index): layer for index, layer in enumerate(keras_internals.layers_with_weights(backbone))}
    found = []
    for key, (a, b) in tensors.items():
        if (layer := layers.get(key)) is None:
            problems.append(f"the file has an entry 'lora/{key}'; the backbone has {len(layers)} layers with weights")
            continue
        place, linear = paths[id(layer)], kernel_of(layer)
        quantized = quantization.problem_with(layer) is not None
        if linear is None or linear.kernel_name != "kernel" or quantized:
            problems.append(f"the layer 'lora/{key}', '{place}', is a {type(layer).__name__} that cannot take its factors")
            continue
        shapes = (*linear.kernel_shape[:-1], rank_in_file), (rank_in_file, linear.kernel_shape[-1])
        for tensor, array, shape in zip(_TENSORS, (a, b), shapes, strict=True):
            if array is not None and rank_in_file and array.shape != shape:
                problems.append(f"'lora/{key}/vars/{tensor}' has shape {array.shape}; '{place}' expects {shape}")
        found.append(LastAxisLoRA(linear, place, a, b, float(alpha or rank_in_file)))
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in problems)
        raise ValueError(
            f"The file {path} does not fit '{backbone.name}', and nothing was changed:{listed}\n"
            "Expected a file of KerasHub's `save_lora_weights`, and a backbone of the same class and sizes as was saved."
        )
    started = [(each, *each.started(rank)) for each in found]
    inject(backbone, [(each.linear, adapter) for each, adapter, _ in started], name, bias="lora_only")
    reset_compilation(backbone)
    return report(started)


def _read(path: str | os.PathLike[str]) -> tuple[int, dict[str, tuple[Any, Any]], list[str]]:
    """Return the rank in a file, its two tensors by layer, and the problems of the file."""
    try:
        with h5py.File(os.fspath(path), "r") as file:
            found, problems = _data_sets(file)
            declared, held = (
                sum(math.prod(each.shape) * each.dtype.itemsize for each in found.values()),
                os.path.getsize(path),
            )
            if declared > held:
                return (
                    0,
                    {},
                    [*problems, f"its data sets declare {declared} bytes of numbers, and the whole file has {held}"],
                )
            entries = {key: np.asarray(each[()]) for key, each in found.items()}
    except FileNotFoundError:
        raise
    except Exception as error:  # each damage gives an error of another kind
        return 0, {}, [f"it cannot be read as HDF5: {type(error).__name__}: {str(error)[:500]}"]
    rank = entries.pop("lora/vars/rank", None)
    size = int(rank) if rank is not None and rank.shape == () and rank.dtype.kind in "iu" else 0
    if size < 1:
        problems.append(f"the file has no rank, a positive integer, at 'lora/vars/rank'; received {rank!r}")
    tensors: dict[str, dict[str, np.ndarray]] = {}
    for key, value in entries.items():
        match key.split("/"):
            case ["lora", index, "vars", tensor] if tensor in _TENSORS and value.dtype.kind == "f":
                tensors.setdefault(index, {})[tensor] = value.astype("float64")
                if not np.isfinite(value).all():
                    problems.append(f"'{key}' has numbers that are not finite")
            case _:
                problems.append(f"the file has an entry '{key}', {value.dtype} of shape {value.shape}, that fits nothing")
    for index, pair in tensors.items():
        problems += [f"the file lacks 'lora/{index}/vars/{tensor}'" for tensor in _TENSORS if tensor not in pair]
    if not tensors:
        problems.append("the file has no layer with LoRA")
    ordered = sorted(tensors, key=lambda index: (len(index), index))
    return size, {index: (tensors[index].get(_TENSORS[0]), tensors[index].get(_TENSORS[1])) for index in ordered}, problems


def _data_sets(file: Any) -> tuple[dict[str, Any], list[str]]:
    """Return the data sets of numbers in a file by key, unread, and the problems with everything else in it.

    HDF5 can take the numbers of a data set from another file (external storage, virtual data sets, links), compress them, or
    name them many times. KerasHub does none of this, and a file that does may read or allocate what its sender wants.
    """
    found: dict[str, Any] = {}
    problems: list[str] = []
    seen, groups = set(), [("", file)]
    while groups:
        prefix, group = groups.pop()
        for name in group:
            key, link = prefix + name, group.get(name, getlink=True)
            if not isinstance(link, h5py.HardLink):
                problems.append(f"'{key}' is a {type(link).__name__} to another place, which is not followed")
                continue
            item = group[name]
            address = h5py.h5o.get_info(item.id).addr
            if address in seen:
                problems.append(f"'{key}' is another name of what the file has already")
            elif isinstance(item, h5py.Group):
                groups.append((f"{key}/", item))
            elif not isinstance(item, h5py.Dataset) or item.dtype.kind not in "fiu":
                problems.append(f"the file has an entry '{key}', a {_kind(item)}, that fits nothing")
            elif (stored := _storage(item)) != "plain":
                problems.append(f"'{key}' is {stored}, which is not read; KerasHub writes plain numbers")
            else:
                found[key] = item
            seen.add(address)
    return found, problems


def _storage(item: Any) -> str:
    plan = item.id.get_create_plist()
    layout = {h5py.h5d.CHUNKED: "stored in chunks, perhaps compressed", h5py.h5d.VIRTUAL: "made of data sets elsewhere"}
    return layout.get(plan.get_layout(), "stored in another file" if plan.get_external_count() else "plain")


def _kind(item: Any) -> str:
    return f"{type(item).__name__} of {item.dtype}" if isinstance(item, h5py.Dataset) else type(item).__name__
