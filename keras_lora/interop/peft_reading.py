"""Convert the modules of a PEFT adapter to the contents of a keras_lora adapter file."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np

from keras_lora import adapters, factors, reports
from keras_lora.compat import keras_internals, quantization
from keras_lora.files.adapter_state import AdapterEntry, AdapterState, TrainedEntry
from keras_lora.interop import experts, peft_methods
from keras_lora.interop.checkpoints import HEAD, TIED_OTHERWISE, CheckpointMap, NotAReshape, Source
from keras_lora.interop.peft_folder import Config, Module
from keras_lora.interop.ports import Port
from keras_lora.interop.transformers_names import classes_with, recorded
from keras_lora.linear_map import LinearMap
from keras_lora.swap.adapted import address_of, maps_of
from keras_lora.targets.patterns import nearest

#: Why an embedding in PEFT does not match one here.
_ELSEWHERE = (
    "is an embedding that this model uses in more places than one (its way back, or an encoder and a decoder), of which "
    "PEFT changes one. With `ensure_weight_tying=True` in its config, PEFT changes a tied output projection too"
)
_USED_BACK = (
    "is the embedding of a backbone, which KerasHub's language models also use as their output projection; PEFT changes the "
    "embedding alone. With `ensure_weight_tying=True` in its config, it changes both"
)


@dataclass(frozen=True)
class _Piece:
    """Factors of a bank of experts, for all outputs of its parameter or for a half.

    Attributes:
        a, b: `(experts, rank, in)` and `(experts, out, rank)`.
        first: The first of these outputs in the parameter.
        rank, alpha: What the config says.
    """

    a: np.ndarray
    b: np.ndarray
    first: int
    rank: int
    alpha: float


class Reader:
    """Converts the modules of a PEFT adapter to the contents of an adapter file, and collects all problems."""

    def __init__(self, checkpoint: CheckpointMap, config: Config):
        self.checkpoint, self.config = checkpoint, config
        self.state = AdapterState()
        self.problems: list[str] = []
        self.head: tuple[str, Module] | None = None
        self._head_is_tied = False

    def take_all(self, modules: dict[str, Module], ask: bool) -> None:
        """Convert the contents of all modules; `ask` is for `aligned`."""
        modules, self.problems = experts.by_parameter(modules, self.config, self.checkpoint.bank_parameters)
        known = {module.rpartition(".")[2] for module in self.checkpoint.modules}
        heads = [] if HEAD in known else [name for name in modules if name.rpartition(".")[2] == HEAD]
        rest = {name: module for name, module in modules.items() if name not in heads[:1]}
        self.head = (heads[0], modules[heads[0]]) if heads else None
        with reports.progress(len(rest)) as step:
            for name, its_name in aligned(sorted(rest), self.checkpoint, ask).items():
                step(name)
                self.take(name, its_name, rest[name])
        if self.head and not self._head_is_tied:
            self.take(self.head[0], *self.head)

    def take(self, module: str, known: str, found: Module) -> None:
        """Convert the contents of one module, which is called `known` in the converter."""
        addresses = self.checkpoint.modules.get(known, [])
        if found.a is not None or found.tokens is not None or found.experts or found.method:
            if not addresses:
                near = nearest(known, sorted(self.checkpoint.modules))
                why = f"the nearest that the model has are {near}" if near else self.checkpoint.reason
                if experts.is_bank(known) and known.endswith("_bias"):
                    why = "biases of experts have no LoRA here; train the experts themselves (`modules_to_save`)"
                self.problems.append(f"the module '{module}' is no kernel of this model; {why}")
            for address in addresses:
                try:
                    source = self.checkpoint.source_of(address)
                except NotAReshape as error:
                    self.problems.append(f"the module '{module}' is the kernel at '{address}', and {error}")
                else:
                    self._take_adapter(module, address, source, found)
        for variable, tensor in found.variables.items():
            self._take_variable(module, f"{known}.{variable}", tensor)
        if found.base is not None:
            self._compare(module, f"{known}.weight", found.base)

    def _take_adapter(self, module: str, address: str, source: Source, found: Module) -> None:
        linear = self.checkpoint.maps[address]
        if source.kind == "bank":
            self._take_bank(module, address, linear, source, found)
        elif found.method:
            self._take_method(module, address, linear, source, found.method)
        elif found.a is not None and found.tokens is not None:
            self.problems.append(f"the module '{module}' has factors and trained tokens; one kernel can have one of them")
        elif found.tokens is not None:
            self._take_tokens(module, address, linear, source, found.tokens)
        elif found.a is not None and found.b is not None:
            self._take_factors(module, address, linear, source, found.a, found.b, found.magnitude)

    def _take_method(
        self, module: str, address: str, linear: LinearMap, source: Source, tensors: dict[str, np.ndarray]
    ) -> None:
        """Convert the tensors of a method other than LoRA and DoRA."""
        try:
            adapter, weights = peft_methods.read(self.config.method, module, tensors, linear, source)
        except ValueError as error:
            self.problems.append(f"the module '{module}' {error}")
        else:
            self.state.adapters[address] = AdapterEntry.of(linear, adapter, weights)

    def _take_factors(
        self,
        module: str,
        address: str,
        linear: LinearMap,
        source: Source,
        a: np.ndarray,
        b: np.ndarray,
        magnitude: np.ndarray | None,
    ) -> None:
        if self._is_shared(module, address, f"{source.module}.weight", Module(a, b, magnitude)):
            return
        parameter = f"{module}.weight"
        named = parameter if self.config.targets(parameter) else module
        if named == parameter and source.kind != "linear":
            self.problems.append(
                f"the module '{module}' has a LoRA of its parameter `weight`, as `target_parameters` says; that is read for "
                "linear layers and experts. Train it with `target_modules`"
            )
            return
        rank, said, alpha = a.shape[0], self.config.rank_of(named), self.config.alpha_of(named)
        if rank != said:
            self.problems.append(f"the module '{module}' has rank {rank}, and the config says {said}")
            return
        spatial = source.shape[2:] if source.kind == "convolution" else ()
        wanted = (rank, source.in_dim // math.prod(spatial), *spatial), (source.out_dim, rank, *(1 for _ in spatial))
        if (a.shape, b.shape) != wanted:
            self.problems.append(
                f"the module '{module}' has factors of shape {a.shape} and {b.shape}; for its weight {source.shape} "
                f"expected are {wanted[0]} and {wanted[1]}"
            )
            return
        flat_a, flat_b = a.reshape(rank, -1), b.reshape(len(b), -1)
        if (magnitude is not None) != self.config.dora or (magnitude is not None and magnitude.size != source.out_dim):
            shape = None if magnitude is None else magnitude.shape
            self.problems.append(
                f"the module '{module}' has a magnitude of shape {shape}; expected are {source.out_dim} numbers for DoRA "
                f"(`use_dora` is {self.config.dora})"
            )
            return
        method = adapters.LoRA if magnitude is None else adapters.DoRA
        dropout = 0.0 if linear.no_dropout else self.config.dropout
        adapter = method(rank, alpha, dropout, self.config.rank_stabilized)
        tensors = {"lora_a": flat_a[:, source.ins].T, "lora_b": flat_b[source.outs].T}
        if magnitude is not None:
            tensors["magnitude"] = magnitude.reshape(-1)[source.outs]
        contiguous = {key: np.ascontiguousarray(tensor) for key, tensor in tensors.items()}
        self.state.adapters[address] = AdapterEntry.of(linear, adapter, contiguous)

    def _take_bank(self, module: str, address: str, linear: LinearMap, source: Source, found: Module) -> None:
        """Convert the factors of all experts; a kernel may be a part of their parameter, with some of its outputs."""
        pieces = self._pieces(module, source, found)
        parts = []
        for piece in pieces:
            inside = (source.outs >= piece.first) & (source.outs < piece.first + piece.b.shape[1])
            if inside.any():
                b = np.zeros((len(piece.b), len(source.outs), piece.rank), "float32")
                b[:, inside] = piece.b[:, source.outs[inside] - piece.first]
                parts.append(replace(piece, b=b))
        if not parts:
            return
        rank, scales = sum(each.rank for each in parts), [self._scale(each) for each in parts]
        stacked = len(parts) > 1  # the exact sum, as PEFT makes of it
        adapter = adapters.LoRA(
            rank,
            scales[0] * rank if stacked else parts[0].alpha,
            0.0 if linear.no_dropout else self.config.dropout,
            False if stacked else self.config.rank_stabilized,
        )
        a = np.concatenate([each.a[..., source.ins] for each in parts], axis=1)
        b = np.concatenate([(s / scales[0] * p.b).astype("float32") for s, p in zip(scales, parts, strict=True)], axis=2)
        tensors = {"lora_a": np.ascontiguousarray(a.swapaxes(1, 2)), "lora_b": np.ascontiguousarray(b.swapaxes(1, 2))}
        self.state.adapters[address] = AdapterEntry.of(linear, adapter, tensors)

    def _pieces(self, module: str, source: Source, found: Module) -> list[_Piece]:
        """Return the factors of a bank, for all outputs or for each half; none if there is a problem with them."""
        number, out_dim, in_dim = source.shape
        if self.config.dora:
            self.problems.append(f"'{module}' is a bank of experts with DoRA, which PEFT has for plain matrices alone")
            return []
        if found.a is not None and found.b is not None:
            rank = self.config.rank_of(module)
            wanted = (number * rank, in_dim), (out_dim, rank * number)
            if (found.a.shape, found.b.shape) == wanted:
                a, b = experts.from_peft(found.a, found.b, number)
                return [_Piece(a, b, 0, rank, self.config.alpha_of(module))]
            self.problems.append(
                f"'{module}' has factors of shape {found.a.shape} and {found.b.shape}; for {number} experts and rank "
                f"{rank}, as the config says, expected are {wanted[0]} and {wanted[1]}"
            )
            return []
        pieces = []
        for half in dict.fromkeys(half for half, _ in found.experts):
            each = {expert: one for (of, expert), one in found.experts.items() if of == half}
            rows = out_dim if half is None else out_dim // 2
            said = {(self.config.rank_of(name), self.config.alpha_of(name)) for name, _ in each.values()}
            rank, alpha = next(iter(said))
            shapes = {(one.a.shape, one.b.shape) for _, one in each.values() if one.a is not None and one.b is not None}
            if sorted(each) != list(range(number)) or len(said) > 1 or shapes != {((rank, in_dim), (rows, rank))}:
                self.problems.append(
                    f"'{module}' has {len(each)} modules of single experts, with the ranks and alphas {sorted(said)} and "
                    f"factors of the shapes {sorted(shapes)}; expected are {number} experts with one rank and one alpha, "
                    f"and the shapes {(rank, in_dim)} and {(rows, rank)}"
                )
                return []
            a, b = (np.stack([getattr(each[expert][1], key) for expert in range(number)]) for key in ("a", "b"))
            pieces.append(_Piece(a, b, rows if half else 0, rank, alpha))
        return pieces

    def _scale(self, piece: _Piece) -> float:
        return factors.scale(piece.rank, piece.alpha, self.config.rank_stabilized)

    def _changes_head(self, module: str, address: str, key: str, found: Module) -> bool:
        """Whether the output projection in the file, which has the weight of this embedding, changes as it does."""
        linear = self.checkpoint.maps[address]
        if self.head is None or not linear.picks_rows or not getattr(linear.layer, "tie_weights", False):
            return False
        name, head = self.head
        if found.a is not None and found.b is not None and head.a is not None and head.b is not None:
            same = [found.a.shape[0], self.config.rank_of(module), self.config.alpha_of(module)]
            tied = same == [head.a.shape[0], self.config.rank_of(name), self.config.alpha_of(name)]
            tied &= np.array_equal(head.a, found.b.T) and np.array_equal(head.b, found.a.T) and not self.config.dora
        else:
            own, its = found.variables.get("weight"), head.variables.get("weight")
            tied = own is not None and its is not None and np.array_equal(own, its)
        if tied and head.base is not None:
            self._compare(name, key, head.base)
        self._head_is_tied |= tied
        return tied

    def _is_shared(self, module: str, address: str, key: str, found: Module) -> bool:
        """Whether a change of an embedding in PEFT is not its change here, which is then a problem."""
        if self._changes_head(module, address, key, found):
            return False
        if self.checkpoint.is_used_elsewhere(address, key):
            self.problems.append(f"the module '{module}' {_ELSEWHERE}")
            return True
        if self.checkpoint.is_used_back_by_tasks(address):
            self.problems.append(f"the module '{module}' {_USED_BACK}")
            return True
        return False

    def _take_tokens(self, module: str, address: str, linear: LinearMap, source: Source, tokens: np.ndarray) -> None:
        indices = self.config.tokens_of(module)
        if source.kind != "embedding" or indices is None:
            self.problems.append(
                f"the module '{module}' has trained tokens, and is no embedding or the config names no tokens"
            )
            return
        if self.checkpoint.ties_tokens_otherwise(address, source.module):
            self.problems.append(f"the module '{module}' has trained tokens, and {TIED_OTHERWISE}")
            return
        if tokens.shape != (len(indices), source.out_dim) or max(indices) >= source.in_dim:
            self.problems.append(
                f"the module '{module}' has trained tokens of shape {tokens.shape}; expected are {len(indices)} rows of "
                f"{source.out_dim} numbers, for rows below {source.in_dim}"
            )
            return
        rows = keras.ops.convert_to_numpy(keras.ops.take(linear.kernel, np.array(indices), axis=0))
        tensors = {"token_delta": tokens[:, source.outs] - rows.astype("float32")}
        self.state.adapters[address] = AdapterEntry.of(linear, adapters.TrainableTokens(indices), tensors)

    def _compare(self, module: str, key: str, tensor: np.ndarray) -> None:
        """Check that a copy of a base weight in the file, perhaps in lower precision, matches this base."""
        for port in self.checkpoint.keys.get(key, []):
            lie = self.checkpoint.placement_of(port.layer, port.attribute)
            linear = next(each for each in maps_of(port.layer) if each.kernel_name == port.attribute)
            own = keras.ops.convert_to_numpy(keras.ops.cast(linear.kernel, "float32"))
            near = (0.01 if quantization.mode_of(port.layer) is None else 0.2) * float(np.abs(own).max())
            if tensor.shape != lie.shape or not np.allclose(tensor.reshape(-1)[lie.index], own, rtol=0, atol=near):
                self.problems.append(
                    f"the module '{module}' has another weight in the file than in this base (its vocabulary may have grown "
                    "before training); give the base that weight first"
                )

    def _kernel_of(self, port: Port) -> str | None:
        """Return the address of the kernel that a variable is, or `None`."""
        address = self.checkpoint.addresses[id(port.layer)]
        found = (each for each in maps_of(port.layer) if each.kernel_name == port.attribute)
        return next((address_of(address, each) for each in found), None)

    def _take_variable(self, module: str, key: str, tensor: np.ndarray) -> None:
        ports = self.checkpoint.keys.get(key, [])
        if not ports:
            near = nearest(key, sorted(self.checkpoint.keys))
            self.problems.append(
                f"the tensor '{key}' of '{module}' is no variable of this model; the nearest are {near}. `names` says which "
                "layer it is"
            )
        for port in ports:
            try:
                lie = self.checkpoint.placement_of(port.layer, port.attribute)
            except NotAReshape as error:
                self.problems.append(f"the tensor '{key}' of '{module}' cannot be read: {error}")
                continue
            address, index = self.checkpoint.addresses[id(port.layer)], number_of(port.layer, port.attribute)
            kernel = self._kernel_of(port)
            if kernel is not None and quantization.mode_of(port.layer) is not None:
                self.problems.append(f"the tensor '{key}' of '{module}' was trained itself, and the layer is quantised here")
                continue
            if kernel is not None and self._is_shared(module, kernel, port.key, Module(variables={"weight": tensor})):
                continue
            if tensor.shape != lie.shape or index is None:
                self.problems.append(f"the tensor '{key}' of '{module}' has shape {tensor.shape}; expected is {lie.shape}")
                continue
            own = keras_internals.own_variables(port.layer)
            entry = self.state.trained.setdefault(address, TrainedEntry.of(port.layer))
            if index < len(entry.flags.variables):
                entry.flags.variables[index] = True
            entry.tensors[f"{index}.{own[index].name}"] = tensor.reshape(-1)[lie.index]


def number_of(layer: Any, attribute: str) -> int | None:
    """Return the index of a variable among the direct variables of its layer."""
    kernel = next((each for each in maps_of(layer) if each.kernel_name == attribute), None)
    variable = getattr(layer, attribute) if kernel is None else kernel.kernel_variable
    return next((index for index, each in enumerate(keras_internals.own_variables(layer)) if each is variable), None)


def aligned(modules: Iterable[str], checkpoint: CheckpointMap, ask: bool) -> dict[str, str]:
    """Map each module name in a file to its name in the model: one may have a prefix (`bert.`) that the other lacks.

    With `ask`, a file may also have the names that `transformers` has for the modules. We ask it only if the recorded
    names do not do, because importing it is slow.
    """
    modules = list(modules)
    names = {name: name for key in checkpoint.keys for name in _names_of(key)}
    found = _aligned(modules, names)
    if ask and checkpoint.config and not set(found.values()) <= set(names):
        found = _aligned(modules, names := names | _also(checkpoint, recorded(checkpoint.config["model_type"])))
        if not set(found.values()) <= set(names.values()):
            with contextlib.suppress(ImportError):
                for each in classes_with(checkpoint, ""):
                    names = _also(checkpoint, each.rename) | names
                found = _aligned(modules, names)
    return found


def _also(checkpoint: CheckpointMap, rename: Callable[[str], str]) -> dict[str, str]:
    """Return other names of modules, with their names in the converter."""
    found: dict[str, str] = {}
    for key in checkpoint.converted:
        if key.rpartition(".")[2] == rename(key).rpartition(".")[2]:
            found |= dict(zip(_names_of(rename(key)), _names_of(key), strict=True))
    return found


def _names_of(key: str) -> list[str]:
    """Return the name of a tensor's module; a parameter of experts has its own LoRA, as a module has."""
    return [key.rpartition(".")[0], *([key] if experts.is_bank(key) else [])]


def _aligned(modules: list[str], names: Mapping[str, str]) -> dict[str, str]:
    """Map each module name in a file to the value of a name; only a prefix may differ."""
    votes: Counter[tuple[str, str]] = Counter({("", ""): 0})
    for module in modules:
        for name in names:
            if f".{module}".endswith(f".{name}"):
                votes[module[: len(module) - len(name)], ""] += 1
            elif f".{name}".endswith(f".{module}"):
                votes["", name[: len(name) - len(module)]] += 1
    readings = {each: _read_as(modules, names, *each) for each, _ in votes.most_common(8)}
    fits = {each: sum(name in names for name in found.values()) for each, found in readings.items()}
    best = [each for each, number in fits.items() if number == max(fits.values())]
    meant = {each: {module: names.get(name, name) for module, name in readings[each].items()} for each in best}
    if ("", "") in best:
        return meant["", ""]
    if any(each != meant[best[0]] for each in meant.values()):
        raise ValueError(
            f"The modules of the adapter fit this model in several ways: with {best[:3]} as (beginning in the file, "
            f"beginning in the model). Expected one. Received: names such as {modules[0]!r}. Load it into a part of the "
            "model."
        )
    return meant[best[0]]


def _read_as(modules: list[str], known: Mapping[str, str], of_file: str, of_model: str) -> dict[str, str]:
    found = {}
    for module in modules:
        inside = module.startswith(of_file) and module not in known  # a head is outside the backbone
        found[module] = of_model + module[len(of_file) :] if inside else module
    return found
