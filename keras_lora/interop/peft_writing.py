"""Convert the contents of a keras_lora adapter file to the tensors and the config of a PEFT adapter."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np

from keras_lora import adapters, reports
from keras_lora.compat import keras_internals
from keras_lora.files.adapter_state import AdapterState, TrainedEntry
from keras_lora.interop import experts, peft_methods
from keras_lora.interop.checkpoints import TIED_OTHERWISE, CheckpointMap, NotAReshape
from keras_lora.interop.peft_folder import PREFIX
from keras_lora.interop.peft_parts import Part, Written
from keras_lora.interop.peft_reading import number_of
from keras_lora.interop.ports import Port
from keras_lora.interop.serving_rules import unread

#: PEFT's task type for a model, by the end of its class name. Not `SEQ_CLS`: PEFT then expects a whole head.
_TASKS = {"CausalLM": "CAUSAL_LM", "Seq2SeqLM": "SEQ_2_SEQ_LM"}


@dataclass
class Writer:
    """Converts a keras_lora adapter to PEFT tensors, and collects all problems.

    Attributes:
        model, checkpoint: The adapted model, and its map to `transformers`.
        written: The factors, by module.
        tokens, rows: The token ids and the rows of embeddings with trained tokens.
        variables, saved: The other trained variables, by key, and the modules that were trained as a whole.
        methods, method_settings: The tensors of a method other than LoRA and DoRA, by module, and its settings.
        tied: Whether an embedding changed that is the output projection too.
        problems: The reasons why it cannot be converted.
    """

    model: Any
    checkpoint: CheckpointMap
    written: list[Written] = field(default_factory=list)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    rows: dict[str, np.ndarray] = field(default_factory=dict)
    variables: dict[str, np.ndarray] = field(default_factory=dict)
    saved: set[str] = field(default_factory=set)
    methods: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    method_settings: dict[str, Any] = field(default_factory=dict)
    tied: bool = False
    problems: list[str] = field(default_factory=list)

    def take(self, state: AdapterState) -> None:
        """Convert everything in an adapter."""
        parts: dict[str, list[Part]] = {}
        with reports.progress(len(state.adapters)) as step:
            for address, entry in state.adapters.items():
                step(address)
                try:
                    source = self.checkpoint.source_of(address)
                except NotAReshape as error:
                    self.problems.append(f"the adapter at '{address}' has no place there: {error}")
                    continue
                adapter, values = _without_kept(entry.made(), entry.tensors)
                part = Part(address, self.checkpoint.maps[address], source, adapter, values)
                parts.setdefault(source.module, []).append(part)
        kinds = {type(part.adapter) for each in parts.values() for part in each} - {adapters.TrainableTokens}
        every = {type(part.adapter) for each in parts.values() for part in each}
        if len(every) == 1 and peft_methods.kind_of(*every):
            self._take_methods(parts)
        elif unknown := kinds - {adapters.LoRA, adapters.DoRA}:
            names = sorted(each.__name__ for each in unknown)
            self.problems.append(
                f"its methods {names} have no place there; `keras_lora.compress_adapter` makes LoRA of them"
            )
        elif len(kinds) > 1:
            self.problems.append(
                "it has both LoRA and DoRA; PEFT has one of them in all layers. `keras_lora.compress_adapter` makes LoRA"
            )
        else:
            for module, each in parts.items():
                self._take_module(module, each)
        if self.tokens and not self.written:
            self.problems.append("it has trained tokens alone, and PEFT reads them beside a LoRA only; adapt a layer too")
        self._take_variables(state.trained)
        if self.methods and self._bias != "none":
            self.problems.append("it has trained biases, which PEFT's format has beside a LoRA or DoRA alone")

    def _take_methods(self, parts: dict[str, list[Part]]) -> None:
        """Convert adapters of one method other than LoRA and DoRA."""
        for module, each in parts.items():
            try:
                self.methods[module] = peft_methods.write(each)
            except ValueError as error:
                self.problems.append(f"the module '{module}' {error}; `keras_lora.compress_adapter` makes LoRA of it")
        if not self.problems:
            try:
                self.method_settings = peft_methods.settings_of({module: each[0] for module, each in parts.items()})
            except ValueError as error:
                self.problems.append(str(error))

    def _take_module(self, module: str, parts: list[Part]) -> None:
        if isinstance(parts[0].adapter, adapters.TrainableTokens):
            self._take_tokens(module, parts)
            return
        back = [part.address for part in parts if self.checkpoint.is_used_elsewhere(part.address, f"{module}.weight")]
        head = self.checkpoint.head_tied_to(parts[0].address) if back else None
        if head and isinstance(parts[0].adapter, adapters.DoRA):
            self.problems.append(
                f"the embedding at {back} is tied to the output projection, and PEFT has a DoRA of another size for each; "
                "`keras_lora.compress_adapter` makes LoRA of it"
            )
            return
        if back and not head:
            self.problems.append(
                f"the embedding at {back} is used in more places than one (the way back, or an encoder and a decoder), and "
                "so is its change; in PEFT these are other modules. Leave it out of `targets`"
            )
            return
        taken = np.sort(np.concatenate([part.source.outs for part in parts]))
        same_a = all(np.array_equal(part.a, parts[0].a) and part.adapter.scale == parts[0].adapter.scale for part in parts)
        if len(np.unique(taken)) < len(taken):  # several layers share one weight
            if not same_a or not all(np.array_equal(part.b, parts[0].b) for part in parts):
                self.problems.append(f"{[part.address for part in parts]} are one module there, '{module}', and differ here")
                return
            parts, taken = parts[:1], parts[0].source.outs
        magnitude = None
        if isinstance(parts[0].adapter, adapters.DoRA) and parts[0].source.kind == "bank":
            self.problems.append(
                f"{[part.address for part in parts]} is a bank of experts, for which PEFT has no DoRA; "
                "`keras_lora.compress_adapter` makes LoRA of it"
            )
            return
        if isinstance(parts[0].adapter, adapters.DoRA):
            if len(taken) < parts[0].source.out_dim:
                self.problems.append(
                    f"{[part.address for part in parts]} are a part of one module there, '{module}', which has one DoRA or "
                    "none; adapt all of it"
                )
                return
            magnitude = np.sum([part.spread(part.values["magnitude"]) for part in parts], axis=0, dtype="float32")
        one, source = parts[0].adapter, parts[0].source
        said = one.get_config()
        rank, alpha, stabilized = said["rank"], said["alpha"], said["rank_stabilized"]
        a, b = parts[0].a, np.sum([part.b for part in parts], axis=0, dtype="float32") if same_a else parts[0].b
        if not same_a:  # the factors stacked: the exact sum
            ratios = [part.adapter.scale / one.scale for part in parts]
            a = np.concatenate([part.a for part in parts], axis=-2)
            b = np.concatenate(
                [(ratio * part.b).astype("float32") for ratio, part in zip(ratios, parts, strict=True)], axis=-1
            )
            rank = a.shape[-2]
            alpha, stabilized = one.scale * rank, False
        shape = source.shape
        self.written.append(Written(module, source.kind, shape, rank, alpha, stabilized, said["dropout"], a, b, magnitude))
        if head:  # as `ensure_weight_tying` of PEFT writes it
            self.tied = True
            self.written.append(Written(head, "linear", shape, rank, alpha, stabilized, said["dropout"], b.T, a.T))

    def find_by_parameter(self, choose: Callable[[list[str]], set[str]]) -> None:
        """Note which modules PEFT finds by their parameter `weight` alone; `choose` returns them."""
        chosen = choose([each.module for each in self.written if each.kind != "bank"])
        for each in (each for each in self.written if each.module in chosen):
            each.by_parameter = True
            if each.kind != "linear" or each.magnitude is not None:
                what = "DoRA" if each.magnitude is not None else "LoRA"
                self.problems.append(
                    f"the module '{each.module}' is none that PEFT adapts as a linear layer, and it has no {what} for its "
                    "parameter; leave it out of `targets`, or use `train=` for it"
                )

    @property
    def drops_dropout(self) -> bool:
        """Whether dropout was used, and PEFT refuses it for these modules."""
        return any(each.parameter for each in self.written) and any(each.dropout for each in self.written)

    def _take_tokens(self, module: str, parts: list[Part]) -> None:
        part = parts[0]
        if len(parts) > 1 or part.source.kind != "embedding":
            self.problems.append(f"the trained tokens of {[each.address for each in parts]} have no place there")
            return
        if self.checkpoint.ties_tokens_otherwise(part.address, module):
            self.problems.append(f"the trained tokens of '{part.address}' have no place there: {TIED_OTHERWISE}")
            return
        rows = keras.ops.take(part.linear.kernel, np.array(part.adapter.tokens), axis=0)
        self.tokens[module] = list(part.adapter.tokens)
        self.rows[module] = part.spread((keras.ops.convert_to_numpy(rows) + part.values["token_delta"]).T).T

    # Other trained variables.

    def _take_variables(self, trained: dict[str, TrainedEntry]) -> None:
        by_layer: dict[int, list[Port]] = {}
        for ports in self.checkpoint.keys.values():
            for port in ports:
                by_layer.setdefault(id(port.layer), []).append(port)
        layers = {address: key for key, address in self.checkpoint.addresses.items()}
        adapted = self._adapted
        keys: dict[str, bool] = {}
        for address, entry in trained.items():
            found = {number_of(port.layer, port.attribute): port for port in by_layer.get(layers[address], [])}
            for index, trains in enumerate(entry.flags.variables):
                if trains and index not in found:
                    self.problems.append(
                        f"variable {index} of '{address}' was trained, and KerasHub's converter fills it from no tensor; "
                        "`names` says which module a layer is"
                    )
                elif trains:
                    keys[found[index].key] = True
        for key in list(keys):  # a module is saved as a whole, with its frozen variables
            module, _, variable = key.rpartition(".")
            if variable != "bias":  # PEFT matches all modules whose names end like this
                keys |= {each: True for each in self.checkpoint.keys if each.rpartition(".")[0].endswith(module)}
        for key in keys:
            module, _, variable = key.rpartition(".")
            is_saved = any(each in keys for each in self._others(module))
            if is_saved and module in adapted:
                self.problems.append(f"the module '{module}' has an adapter and was trained itself; PEFT has one of them")
            try:
                tensor = self._tensor(key)
            except NotAReshape as error:
                self.problems.append(f"'{key}' was trained, and has no place there: {error}")
                continue
            kernels = {address for address in self.checkpoint.modules.get(module, ()) if variable == "weight"}
            back = [address for address in kernels if self.checkpoint.is_used_elsewhere(address, key)]
            head = self.checkpoint.head_tied_to(back[0]) if back else None
            if head:
                self.tied, self.variables[f"{head}.weight"] = True, tensor
                self.saved.add(head)
            elif back:
                self.problems.append(
                    f"the embedding '{module}' was trained itself, and is used in more places than one here; in PEFT "
                    "these are other modules"
                )
            inside = ".base_layer" if module in adapted else ""
            self.variables[f"{module}{inside}.{variable}"] = tensor
            if is_saved:
                self.saved.add(module)

    def _others(self, module: str) -> list[str]:
        """Return the tensors of a module that are not a bias."""
        return [key for key in self.checkpoint.keys if key.rpartition(".")[0] == module and not key.endswith(".bias")]

    def _tensor(self, key: str) -> np.ndarray:
        """Return the current value of a checkpoint tensor, built from all variables in it."""
        tensor: np.ndarray | None = None
        for port in self.checkpoint.keys[key]:
            lie = self.checkpoint.placement_of(port.layer, port.attribute)
            index = number_of(port.layer, port.attribute)
            if index is None:
                raise NotAReshape("it is no variable of its layer")
            tensor = np.zeros(math.prod(lie.shape), "float32") if tensor is None else tensor
            value = keras_internals.own_variables(port.layer)[index].value
            tensor[lie.index.reshape(-1)] = keras.ops.convert_to_numpy(keras.ops.cast(value, "float32")).reshape(-1)
            shape = lie.shape
        if tensor is None:
            raise NotAReshape("no variable lies there")
        return tensor.reshape(shape)

    # For readers other than PEFT.

    def bake(self) -> None:
        """Use one rank and move the scales into B, for readers that support only one scale, `alpha / rank`."""
        rank = max((each.rank for each in self.written), default=1)
        for each in (each for each in self.written if each.kind != "bank"):
            more = rank - each.rank
            each.b = np.pad((each.scale * each.b).astype("float32"), [(0, 0), (0, more)])
            each.a = np.pad(each.a, [(0, more), (0, 0)])
            each.rank, each.alpha, each.rank_stabilized = rank, rank, False
        self.problems += unread(self.config(None), self.tensors)

    # The written files.

    @property
    def modules(self) -> set[str]:
        """Return the names of all modules in the file."""
        beside = {key.removesuffix(".base_layer") for key in (each.rpartition(".")[0] for each in self.variables)}
        return self._adapted | set(self.tokens) | beside

    @property
    def _adapted(self) -> set[str]:
        own = {each.module.rpartition(".")[0] if each.kind == "bank" else each.module for each in self.written}
        return own | self.methods.keys()

    @property
    def tensors(self) -> dict[str, np.ndarray]:
        """Return the tensors by their keys in the file."""
        found: dict[str, np.ndarray] = {}
        for each in self.written:
            if each.kind == "bank":
                key = f"{PREFIX}{self._wrapped(each.module)}.lora_"
                found[f"{key}A.weight"], found[f"{key}B.weight"] = experts.as_in_peft(each.a, each.b)
                continue
            key, embedding = f"{PREFIX}{each.module}.lora_", each.kind == "embedding"
            spatial = each.weight[1:] if each.kind == "convolution" else ()
            a = each.a.reshape(each.rank, *spatial) if spatial else each.a
            b = each.b.reshape(*each.b.shape, *(1 for _ in spatial[1:]))
            found[f"{key}embedding_A" if embedding else f"{key}A.weight"] = a
            found[f"{key}embedding_B" if embedding else f"{key}B.weight"] = b
            if each.magnitude is not None:
                whole = (1, -1, *(1 for _ in spatial[1:])) if spatial else (-1,)
                found[f"{key}magnitude_vector"] = each.magnitude.reshape(whole)
        for module, tensors in self.methods.items():
            found |= {f"{PREFIX}{module}.{key}": tensor for key, tensor in tensors.items()}
        for module, rows in self.rows.items():
            found[f"{PREFIX}{module}.token_adapter.trainable_tokens_delta"] = rows
        found |= {f"{PREFIX}{key}": tensor for key, tensor in self.variables.items()}
        found = {key: np.ascontiguousarray(tensor, "float32") for key, tensor in found.items()}
        for key in [key for key in found if key.endswith(".running_mean")]:  # PyTorch counts batches and requires the count
            found[key.replace(".running_mean", ".num_batches_tracked")] = np.zeros((), "int64")
        return dict(sorted(found.items()))

    def config(self, base_model: str | None) -> dict[str, Any]:
        """Return the settings, only those that every version of PEFT knows."""
        stabilized = bool(self.written) and all(each.rank_stabilized for each in self.written)
        alphas = {
            each.pattern: each.alpha if each.rank_stabilized == stabilized else each.scale * each.rank
            for each in self.written
        }
        ranks = {each.pattern: each.rank for each in self.written}
        parameters = sorted(each.parameter for each in self.written if each.parameter)
        rank, alpha = _most_common(ranks.values(), 8), _most_common(map(_whole, alphas.values()), 8)
        named = type(self.model).__name__
        common: dict[str, Any] = {
            "peft_type": "LORA",
            "task_type": next((task for end, task in _TASKS.items() if named.endswith(end)), None),
            "base_model_name_or_path": base_model,
            "inference_mode": True,
            "modules_to_save": sorted(self.saved) or None,
        }
        if self.methods:
            return {**common, "target_modules": self._targets(sorted(self.methods)), **self.method_settings}
        found: dict[str, Any] = {
            **common,
            "r": rank,
            "lora_alpha": alpha,
            "lora_dropout": 0.0 if parameters else max((each.dropout for each in self.written), default=0.0),
            "bias": self._bias,
            "target_modules": self._targets(sorted(ranks.keys() - set(parameters))),
            "use_rslora": stabilized,
            "use_dora": any(each.magnitude is not None for each in self.written),
            "rank_pattern": {self._exactly(module): each for module, each in ranks.items() if each != rank},
            "alpha_pattern": {self._exactly(m): _whole(each) for m, each in alphas.items() if _whole(each) != alpha},
            "fan_in_fan_out": bool(self.written) and all(each.kind == "transposed" for each in self.written),
            "init_lora_weights": True,
        }
        if self.tokens:
            found["trainable_token_indices"] = self.tokens
        if parameters:
            found["target_parameters"] = parameters
        if self.tied:
            found["ensure_weight_tying"] = True
        return found

    def _wrapped(self, parameter: str) -> str:
        """Return the module with the LoRA of a parameter of experts: a wrapper around or inside that of another one."""
        module, _, name = parameter.rpartition(".")
        beside = [each.module.rpartition(".")[2] for each in self.written if each.module.rpartition(".")[0] == module]
        return module + ".base_layer" * experts.levels(beside)[name]

    def _targets(self, modules: list[str]) -> list[str] | str:
        """Return the module names, or one regular expression if a name is the end of another and would match both."""
        return "|".join(map(re.escape, modules)) if any(map(self._ends_another, modules)) else modules

    def _exactly(self, module: str) -> str:
        """Return a pattern for the rank or alpha of only this module."""
        return f"^{module}" if self._ends_another(module) else module

    def _ends_another(self, module: str) -> bool:
        return any(each.endswith(f".{module}") for each in self.checkpoint.modules)

    @property
    def _bias(self) -> str:
        names = {key.removesuffix(".bias") for key in self.variables if key.endswith(".bias")} - self.saved
        if not names:
            return "none"
        return "lora_only" if all(name.endswith(".base_layer") for name in names) else "all"


def _most_common(values: Any, otherwise: Any) -> Any:
    counted = Counter(values).most_common(1)
    return counted[0][0] if counted else otherwise


def _whole(number: float) -> float | int:
    return int(number) if float(number).is_integer() else float(number)


def _without_kept(adapter: Any, values: dict[str, np.ndarray]) -> tuple[Any, dict[str, np.ndarray]]:
    """A LoRA and its values, where a kept pair has become a part of the trained one: PEFT has no kept pair."""
    if not isinstance(adapter, adapters.LoRA) or not adapter.kept:
        return adapter, values
    a, b = adapter.pair(values, None)
    rank = adapter.rank + adapter.kept
    config = {**adapter.get_config(), "rank": rank, "rank_stabilized": False, "kept": 0}
    plain = adapters.LoRA.from_config({**config, "alpha": adapter.scale * rank})
    return plain, {"lora_a": keras.ops.convert_to_numpy(a), "lora_b": keras.ops.convert_to_numpy(b)}
