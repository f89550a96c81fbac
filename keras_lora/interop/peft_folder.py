"""Read, check and write the folder of a PEFT adapter: `adapter_config.json` and `adapter_model.safetensors`.

A pickled `adapter_model.bin` is never opened.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from keras_lora.files import tensor_file
from keras_lora.interop import peft_methods
from keras_lora.interop.problems import grouped

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
#: The prefix of every module name in PEFT's keys.
PREFIX = "base_model.model."
#: The longest config that is read, in bytes, and the longest name of a tensor.
_LONGEST_CONFIG, _LONGEST_NAME = 4_000_000, 500
#: Alpha must be below it, so that every scale is finite in float32.
_LARGEST = 1e30

_FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(\.(?!weight$|bias$)[^.]+)?(\.(?P<variable>weight|bias))?"
)
_METHOD = re.compile(
    rf"(?P<module>.+)\.(?P<key>{'|'.join(key for form in peft_methods.FORMATS.values() for key in form.keys)})"
    r"(\.(?!weight$)[^.]+)?(\.weight)?"
)
_TOKENS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta(\.[^.]+)?")
_BASE = re.compile(r"(?P<module>.+?)(\.base_layer)?\.(?P<variable>[^.]+)")

#: Settings that change the meaning of the numbers, with the values they have for a plain LoRA or DoRA.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "lora_bias": (False,),
    "use_qalora": (False,),
    "use_bdlora": (None, False),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "megatron_config": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
}
#: Initializations that do not change the base, so we can ignore them.
_STARTS = (True, False, "gaussian", "orthogonal", "eva")


@dataclass
class Module:
    """The contents of a PEFT adapter for one module.

    Attributes:
        a, b: The factors as stored in the file.
        magnitude: The magnitude of a DoRA.
        tokens: Rows that replace rows of the embedding.
        variables: Variables of the base that were trained, by name (`"weight"`, `"bias"`).
        base: A copy of the base weight under an adapter, which PEFT adds for embeddings.
        method: The tensors of a method other than LoRA and DoRA, by their names in the file.
        experts: For a bank of experts that are modules of their own in the file: by half of the outputs (`None` for all) and
            number of the expert, the name of its module there and the contents.
    """

    a: np.ndarray | None = None
    b: np.ndarray | None = None
    magnitude: np.ndarray | None = None
    tokens: np.ndarray | None = None
    variables: dict[str, np.ndarray] = field(default_factory=dict)
    base: np.ndarray | None = None
    method: dict[str, np.ndarray] = field(default_factory=dict)
    experts: dict[tuple[int | None, int], tuple[str, Module]] = field(default_factory=dict)


@dataclass
class Config:
    """The settings of a PEFT adapter that define the meaning of its tensors.

    `parameters` are the names, or ends of names, of the parameters that are adapted themselves. `method` is the whole config
    of a method other than LoRA and DoRA, else empty.
    """

    r: int
    alpha: float
    rank_stabilized: bool
    dora: bool
    dropout: float
    rank_pattern: dict[str, Any]
    alpha_pattern: dict[str, Any]
    tokens: Any
    parameters: frozenset[str] = frozenset()
    method: dict[str, Any] = field(default_factory=dict)

    def targets(self, parameter: str) -> bool:
        """Whether a parameter is adapted itself, and not the module that it is the weight of."""
        parts = parameter.split(".")
        return any(".".join(parts[place:]) in self.parameters for place in range(len(parts)))

    def rank_of(self, module: str) -> Any:
        """Return the rank of a module in the config."""
        return _by_pattern(self.rank_pattern, module, self.r)

    def alpha_of(self, module: str) -> Any:
        """Return the alpha of a module in the config."""
        return _by_pattern(self.alpha_pattern, module, self.alpha)

    def tokens_of(self, module: str) -> Any:
        """Return the rows of an embedding that are in the file, or `None`."""
        if isinstance(self.tokens, dict):
            return next((each for name, each in self.tokens.items() if f".{module}".endswith(f".{name}")), None)
        return self.tokens


def _by_pattern(patterns: dict[str, Any], module: str, otherwise: Any) -> Any:
    """Return the value of the first pattern that matches the module's name or its end, as PEFT does."""
    return next((value for pattern, value in patterns.items() if _matches(pattern, module)), otherwise)


def _matches(pattern: str, module: str) -> bool:
    """PEFT's regular expression `(.*\\.)?(pattern)$`, matched without compiling it: a dot is any character."""
    name = pattern.replace("\\.", "\0")  # an escaped dot is a dot
    if not re.fullmatch(r"[\w.\-\0]+", name):
        return re.match(rf"(.*\.)?({pattern})$", module) is not None
    before, end = module[: len(module) - len(name)], module[len(module) - len(name) :]
    if len(name) > len(module) or (before and not before.endswith(".")):
        return False
    return all(
        each == "." or (each == "\0" and letter == ".") or each == letter for each, letter in zip(name, end, strict=True)
    )


# Reading.


def read(folder: Path) -> tuple[Config, dict[str, Module]]:
    """Read the settings and the modules of a PEFT adapter, by their names in the file.

    Raises:
        FileNotFoundError: The folder lacks one of the two files.
        ValueError: One of them is damaged, or is not a plain LoRA or DoRA; all reasons are listed.
    """
    missing = [name for name in (CONFIG, TENSORS) if not (folder / name).is_file()]
    if missing:
        inside = sorted(each.parent.name for each in folder.glob(f"*/{CONFIG}"))
        named = f" Its folders {inside[:8]} have one each: adapters with names of their own." if inside else ""
        pickled = " A pickled adapter_model.bin is not read; PEFT's `save_pretrained` writes safetensors."
        raise FileNotFoundError(
            f"The folder {folder} lacks {' and '.join(missing)}. Expected a folder that PEFT's `save_pretrained` wrote."
            f"{pickled if (folder / 'adapter_model.bin').exists() else ''}{named}"
        )
    try:
        config, problems = _config(_json(folder / CONFIG))
        modules, more = _modules(tensors_of(folder / TENSORS))
        kinds = {key for module in modules.values() for key in module.method} - set(peft_methods.keys_of(config.method))
        factors = config.method and any(module.a is not None for module in modules.values())
        more += ["it has tensors of another method than its `peft_type`"] if kinds or factors else []
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RecursionError, OSError) as error:
        said = str(error)
        raise ValueError(
            f"{folder} is not a whole PEFT adapter ({type(error).__name__}: {said[:500]}{'…' * (len(said) > 500)}). "
            "Expected a folder that PEFT's `save_pretrained` wrote. It may be cut off, damaged or of another kind."
        ) from error
    if problems := problems + more:
        listed = "".join(f"\n  - {each[:1000]}" for each in grouped(problems))
        raise ValueError(
            f"The PEFT adapter {folder} is not one that keras_lora can read:{listed}\nExpected a LoRA or DoRA of plain "
            "matrices, embeddings, convolutions or banks of experts, with what was trained beside it, or "
            f"{', '.join(peft_methods.FORMATS)}."
        )
    return config, modules


def _json(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _LONGEST_CONFIG:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes")
    config = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise TypeError(f"{path.name} holds a {type(config).__name__}, no table")
    return config


def _config(said: dict[str, Any]) -> tuple[Config, list[str]]:
    def number(value: Any) -> bool:
        return type(value) in (int, float) and 0 < value < _LARGEST

    kind = said.get("peft_type")
    if isinstance(kind, str) and kind in peft_methods.FORMATS:
        config = Config(8, 8, False, False, 0.0, {}, {}, None, method=said)
        fits = all(_are_patterns(said.get(key) or {}, number) for key in ("rank_pattern", "alpha_pattern"))
        return config, peft_methods.problems_of(said) + ([] if fits else ["its patterns of ranks or alphas are not numbers"])
    problems = [f"its `{key}` is {said[key]!r}" for key, plain in _PLAIN.items() if said.get(key, plain[0]) not in plain]
    if "peft_type" not in said:
        problems.append("its config has no `peft_type`")
    start = said.get("init_lora_weights", True)
    if start not in _STARTS:
        problems.append(
            f"it was started by {start!r}, which changes the base, and the file does not hold that change; let PEFT "
            "convert it to a LoRA on `save_pretrained` (`path_initial_model_for_weight_conversion`)"
        )
    fields: dict[str, Any] = {
        "r": (8, lambda value: type(value) is int and value > 0),
        "lora_alpha": (8, number),
        "lora_dropout": (0.0, lambda value: type(value) in (int, float) and 0 <= value < 1),
        "use_rslora": (False, lambda value: type(value) is bool),
        "use_dora": (False, lambda value: type(value) is bool),
        "rank_pattern": ({}, lambda value: _are_patterns(value, lambda each: type(each) is int and each > 0)),
        "alpha_pattern": ({}, lambda value: _are_patterns(value, number)),
        "trainable_token_indices": (None, _are_tokens),
        "target_parameters": ([], _are_names),
    }
    found = {key: default if said.get(key) is None else said[key] for key, (default, _) in fields.items()}
    problems += [f"its `{key}` is {found[key]!r}"[:300] for key, (_, fits) in fields.items() if not fits(found[key])]
    return Config(
        r=found["r"],
        alpha=found["lora_alpha"],
        rank_stabilized=found["use_rslora"],
        dora=found["use_dora"],
        dropout=found["lora_dropout"],
        rank_pattern=found["rank_pattern"],
        alpha_pattern=found["alpha_pattern"],
        tokens=found["trainable_token_indices"],
        parameters=frozenset(map(str, found["target_parameters"])),
    ), problems


def _are_patterns(value: Any, fits: Callable[[Any], bool]) -> bool:
    """Whether the patterns in `value` can be matched quickly: names, and a few patterns with one or two wildcards."""
    if not isinstance(value, dict) or len(value) > 20_000 or not all(map(fits, value.values())):
        return False
    wild = [each for each in value if not re.fullmatch(r"(?:[\w.\-]|\\\.)+", each)]
    simple = re.compile(r"\^?(?:[\w.\-]|\\[.\-_d]|\.\*|\\d\+|\[[\w\-]+\]|[|()])*\$?")
    few = all(len(each) < 1000 and each.count("*") + each.count("+") < 3 and simple.fullmatch(each) for each in wild)
    return few and len(wild) <= 16 and all(map(_compiles, wild))


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 20_000 and all(isinstance(each, str) and each for each in value)


def _are_tokens(value: Any) -> bool:
    tables = value.values() if isinstance(value, dict) else [] if value is None else [value]
    return all(isinstance(each, list) and each and all(type(row) is int and row >= 0 for row in each) for each in tables)


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a file as NumPy arrays; bfloat16, which NumPy lacks, becomes float32."""
    found = {}
    for key, said in safetensors.deserialize(path.read_bytes()):  # type: ignore[no-untyped-call]
        kind, shape, data = said["dtype"], said["shape"], said["data"]
        if kind not in _KINDS or 0 in shape:
            raise TypeError(f"the tensor '{key}' of dtype {kind} and shape {shape} is none that PEFT writes")
        array = np.frombuffer(data, _KINDS[kind]).reshape(shape)
        if kind == "BF16":
            array = (array.astype("<u4") << 16).view("<f4")
        with np.errstate(over="ignore"):
            found[key] = array if kind == "I64" else array.astype("float32", copy=False)
        if not np.isfinite(found[key]).all():
            raise ValueError(f"the tensor '{key}' has numbers that are not finite in float32")
    return found


_KINDS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8"}
_FIELDS = {"lora_A": "a", "lora_embedding_A": "a", "lora_B": "b", "lora_embedding_B": "b"}


def _unwrapped(key: str, keys: set[str]) -> str | None:
    """Return a key without the parts added by PEFT's wrappers; `None` for copies and batch counts, which are not needed."""
    if ".original_module." in key or key.endswith(".num_batches_tracked"):
        return None
    for wrapper in (r"\.modules_to_save\.[^.]+(?=\..)", r"\.modules_to_save"):
        inside = re.sub(wrapper, "", key)
        if inside != key and inside in keys:
            return None
    return re.sub(r"\.modules_to_save(\.default)?", "", key)


def _modules(tensors: dict[str, np.ndarray]) -> tuple[dict[str, Module], list[str]]:
    """Return the tensors by module, and the problems with those that cannot be read."""
    modules: dict[str, Module] = {}
    problems = [f"the tensor '{key[:100]}…' has a name of {len(key)} letters" for key in tensors if len(key) > _LONGEST_NAME]
    plain_keys = {key.removeprefix(PREFIX) for key in tensors}
    for key, tensor in tensors.items():
        plain = _unwrapped(key.removeprefix(PREFIX), plain_keys)
        if plain is None:
            continue
        if tensor.dtype.kind != "f":
            problems.append(f"the tensor '{key}' has whole numbers; weights have fractions")
        elif match := _FACTOR.fullmatch(plain):
            part, place = match["part"], modules.setdefault(match["module"], Module())
            name = _FIELDS.get(part, "magnitude")
            if match["variable"] == "bias":
                problems.append(f"the tensor '{key}' is a bias of the change itself (`lora_bias`)")
            elif name != "magnitude" and tensor.ndim < 2:
                problems.append(f"the tensor '{key}' has shape {tensor.shape}; a factor has two axes or more")
            elif (same := getattr(place, name)) is not None and not np.array_equal(same, tensor):
                problems.append(f"the tensor '{key}' is there twice, with other numbers")  # PEFT may write a magnitude twice
            else:
                setattr(place, name, tensor)
        elif match := _METHOD.fullmatch(plain):
            modules.setdefault(match["module"], Module()).method[match["key"]] = tensor
        elif match := _TOKENS.fullmatch(plain):
            modules.setdefault(match["module"], Module()).tokens = tensor
        elif ".lora_" in plain or not (match := _BASE.fullmatch(plain)):
            problems.append(f"the tensor '{key}' is none that a LoRA has")
        elif plain.endswith(".base_layer.weight"):
            modules.setdefault(match["module"], Module()).base = tensor
        else:
            variables = modules.setdefault(match["module"], Module()).variables
            if match["variable"] in variables:
                problems.append(f"the tensor '{key}' is there twice")
            variables[match["variable"]] = tensor
    for name, module in modules.items():
        if (module.a is None) != (module.b is None):
            problems.append(f"the module '{name}' has only one of its two factors")
        if module.magnitude is not None and module.a is None:
            problems.append(f"the module '{name}' has a magnitude and no factors")
    if not any(module.a is not None or module.tokens is not None or module.method for module in modules.values()):
        problems.append(f"none of its {len(tensors)} tensors is of an adapter")
    return modules, problems


# Writing.


def write(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    """Write the two files next to `folder`, then replace it in one step; other files in the folder are kept."""
    folder = Path(os.path.realpath(folder))
    if Path.cwd().is_relative_to(folder):
        raise ValueError(f"{folder} is the folder that this process works in, and cannot be replaced. Name a folder in it.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".unfinished"))
    try:
        mode = 0o777 & ~tensor_file.umask()
        if folder.exists():
            mode = folder.stat().st_mode
            shutil.copytree(folder, aside, dirs_exist_ok=True, symlinks=True, copy_function=_link)
        tensor_file.write_bytes(aside / TENSORS, safetensors.numpy.save(tensors, {"format": "pt"}))
        tensor_file.write_bytes(aside / CONFIG, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
        aside.chmod(mode)
        _put(aside, folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _link(old: str, new: str) -> str:
    """Hard-link a file into another folder, or copy it if the disk does not support links."""
    try:
        os.link(old, new, follow_symlinks=False)
    except OSError:
        shutil.copy2(old, new, follow_symlinks=False)
    return new


def _put(aside: Path, folder: Path) -> None:
    if not folder.exists():
        os.rename(aside, folder)
        return
    old = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".old"))
    try:
        os.rename(folder, old)
    except BaseException:
        old.rmdir()
        raise
    try:
        os.rename(aside, folder)
    except BaseException:
        os.rename(old, folder)
        raise
    gone = old.with_suffix(".unfinished")  # what is called `.old` is whole, however this process ends
    os.rename(old, gone)
    shutil.rmtree(gone)
