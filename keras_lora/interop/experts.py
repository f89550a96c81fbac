"""Banks of experts: KerasHub's kernels `(experts, in, out)`, and the parameters of `transformers` that hold them.

In `transformers` 5, the experts of a layer are one module with two parameters, `gate_up_proj` and `down_proj`. PEFT adapts
a parameter (`target_parameters`) with one LoRA for each expert, in two matrices: A `(experts · rank, in)`, expert after
expert, and B `(out, rank · experts)`, where the expert changes fastest. If both parameters of a module are adapted, one
wrapper is inside the other, and the names in the file say `base_layer` instead of the parameter: the module's last
parameter is outermost.

In `transformers` 4, each expert is a module of its own with linear layers, such as `experts.3.gate_proj`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import keras
import numpy as np

from keras_lora.interop.peft_folder import Config, Module
from keras_lora.interop.ports import Port

#: The parameters of a module of experts, in the order in which it has them.
PARAMETERS = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
#: Linear layers of one expert in `transformers` 4, with their parameter in 5, and which half of its outputs they are.
LINEAR: dict[str, tuple[str, int | None]] = {
    "w1": ("gate_up_proj", 0),
    "w3": ("gate_up_proj", 1),
    "w2": ("down_proj", None),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
    "down_proj": ("down_proj", None),
}
#: Names of routers, which are no linear layers in `transformers` 5.
ROUTERS = ("gate", "router")

_TENSOR = re.compile(r"(?P<module>.+\.experts)\.((?P<number>\d+)\.)?(?P<name>\w+?)(?P<packed>_blocks|_scales)?(\.weight)?")
_OF_ONE = re.compile(rf"(?P<module>.+\.experts)\.(?P<number>\d{{1,4}})\.(?P<name>{'|'.join(LINEAR)})")


def port_of(layer: keras.layers.Layer, attribute: str, names: tuple[str, ...]) -> Port | None:
    """Return the port of a bank that a converter puts together from these tensors, or `None` if it is no known bank."""
    found = [match for match in map(_TENSOR.fullmatch, names) if match]
    modules = {match["module"] for match in found}
    asked = tuple(dict.fromkeys(match["name"] for match in found))
    numbers = [int(match["number"]) for match in found if match["number"]]
    if len(modules) != 1 or len(found) != len(names) or numbers != sorted(numbers):
        return None
    halves = {LINEAR[name] for name in asked if name in LINEAR and numbers}
    if not numbers and len(asked) == 1 and asked[0] in PARAMETERS:
        parameter, half = asked[0], None
    elif len(asked) == 1 and len(halves) == 1:
        ((parameter, half),) = halves
    elif [LINEAR.get(name) for name in asked] == [("gate_up_proj", 0), ("gate_up_proj", 1)]:
        parameter, half = "gate_up_proj", None
    else:
        return None
    as_it_is = parameter.endswith("_bias") or any(match["packed"] for match in found)
    return Port(layer, attribute, f"{modules.pop()}.{parameter}", None if as_it_is else _HOOKS[half])


def _whole(tensor: Any, shape: Any) -> Any:
    return np.transpose(tensor, (0, 2, 1))


def _first_half(tensor: Any, shape: Any) -> Any:
    return np.transpose(tensor[:, : tensor.shape[1] // 2], (0, 2, 1))


def _second_half(tensor: Any, shape: Any) -> Any:
    return np.transpose(tensor[:, tensor.shape[1] // 2 :], (0, 2, 1))


_HOOKS = {None: _whole, 0: _first_half, 1: _second_half}


def is_bank(key: str) -> bool:
    """Whether a name in a checkpoint is that of a parameter of experts."""
    module, _, parameter = key.rpartition(".")
    return parameter in PARAMETERS and module.rpartition(".")[2] == "experts"


# The two layouts of factors.


def as_in_peft(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """From A `(experts, rank, in)` and B `(experts, out, rank)` to PEFT's two matrices."""
    return a.reshape(-1, a.shape[-1]), b.transpose(1, 2, 0).reshape(b.shape[1], -1)


def from_peft(a: np.ndarray, b: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
    """From PEFT's two matrices to A `(experts, rank, in)` and B `(experts, out, rank)`, for a number of experts."""
    return a.reshape(number, -1, a.shape[-1]), b.reshape(len(b), -1, number).transpose(2, 0, 1)


def levels(parameters: Collection[str]) -> dict[str, int]:
    """Return how many wrappers are around that of each parameter of a module that has these adapted."""
    ordered = [each for each in PARAMETERS if each in parameters]
    return {each: len(ordered) - 1 - place for place, each in enumerate(ordered)}


def by_parameter(
    modules: Mapping[str, Module], config: Config, parameters: Collection[str]
) -> tuple[dict[str, Module], list[str]]:
    """Return the modules of a file with those of experts under the names of their parameters, and problems.

    Args:
        modules: The modules by their names in the file.
        config: The settings in the file, which say the parameters.
        parameters: The parameters that modules of experts have in the model; none if it has no such modules.
    """
    found: dict[str, Module] = {}
    problems = [
        f"the module '{name}' has a LoRA, and is a parameter of experts, whose LoRA has the name of its module"
        for name, module in modules.items()
        if parameters and is_bank(name) and module.a is not None
    ]
    wrapped: dict[str, dict[int, Module]] = {}
    for name, module in modules.items():
        inside = re.sub(r"(\.base_layer)+$", "", name)
        one = _OF_ONE.fullmatch(name) if parameters else None
        if module.a is None or not parameters:
            found[name] = module
        elif one is not None:
            parameter, half = LINEAR[one["name"]]
            bank = found.setdefault(f"{one['module']}.{parameter}", Module())
            bank.experts[half, int(one["number"])] = (name, module)
        elif inside != name or any(is_bank(f"{name}.{each}") and config.targets(f"{name}.{each}") for each in parameters):
            wrapped.setdefault(inside, {})[name.count(".base_layer")] = module
        else:
            found[name] = module
    for name, inner in wrapped.items():
        targeted = [each for each in parameters if config.targets(f"{name}.{each}")]
        if any(f"{name}.{each}" in found for each in targeted):
            problems.append(f"the module '{name}' has a LoRA for all experts, and others for single ones")
        elif sorted(inner) == list(range(len(targeted))):
            found |= {f"{name}.{each}": inner[level] for each, level in levels(targeted).items()}
        else:
            problems.append(
                f"the module '{name}' has {len(inner)} LoRA, one around the other, and `target_parameters` in the config "
                f"names {targeted} of its parameters"
            )
    return found, problems
