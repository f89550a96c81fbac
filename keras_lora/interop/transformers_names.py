"""Module names of `transformers` models, if they differ from the names in checkpoints.

`transformers` 5 renames the tensors of older checkpoints when it loads them. PEFT uses module names, and KerasHub's
converters use checkpoint names. Where `transformers` is installed, we ask it: each class of a model type is built without
weights and has its rules and its modules. `_RECORDED` has the rules of version 5.24 for where it is not installed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from keras_lora import checks
from keras_lora.interop import experts
from keras_lora.interop.checkpoints import CheckpointMap
from keras_lora.interop.problems import capped

#: Tables of `transformers` from a model type to its classes. If several classes have all names, the first is meant.
_TABLES = ("IMAGE_TEXT_TO_TEXT", "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "", "IMAGE_CLASSIFICATION", "SEQUENCE_CLASSIFICATION")

#: Classes of modules for which PEFT has a LoRA.
_LINEAR = {"Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d", "Conv1D"}

#: Models whose adapters of `transformers` 4 PEFT converts: it takes each `gate_proj` for that of the experts.
_MISTAKEN = {"mixtral", "qwen3_moe"}

_EXPERTS = re.compile(r"\.(experts|router)(\.|$)")

_VIT = {
    r"encoder\.layer\.": "layers.",
    r"attention\.attention\.(q|k|v)(uery|ey|alue)(?!\w)": r"attention.\1_proj",
    r"attention\.output\.dense(?!\w)": "attention.o_proj",
    r"intermediate\.dense(?!\w)": "mlp.fc1",
    r"output\.dense(?!\w)": "mlp.fc2",
}
_DINOV2 = {
    r"attention\.attention\.(q|k|v)(uery|ey|alue)(?!\w)": r"attention.\1_proj",
    r"attention\.output\.dense(?!\w)": "attention.o_proj",
    r"mlp\.weights_out(?!\w)": "mlp.down_proj",
}
_VISION = {
    r"^language_model\.lm_head(?!\w)": "lm_head",
    r"^language_model\.model(?!\w)": "model.language_model",
    r"^vision_tower\.(vision_model\.)?": "model.vision_tower.",
    r"^multi_modal_projector(?!\w)": "model.multi_modal_projector",
}
_RECORDED: dict[str, dict[str, str]] = {
    "vit": _VIT,
    "deit": _VIT,
    "dinov2": _DINOV2,
    "dinov2_with_registers": _DINOV2,
    "dinov3_vit": {r"(?<!model\.)layer\.": "model.layer."},
    "swin": {
        r"attention\.self\.(?=relative_position_bias_table)": "attention.relative_position_bias.",
        r"attention\.self\.(q|k|v)(uery|ey|alue)(?!\w)": r"attention.\1_proj",
        r"attention\.output\.dense(?!\w)": "attention.o_proj",
        r"intermediate\.dense(?!\w)": "mlp.fc1",
        r"output\.dense(?!\w)": "mlp.fc2",
    },
    "mixtral": {r"\.block_sparse_moe\.": ".mlp."},
    "gemma3": _VISION,
    "paligemma": _VISION,
    "t5gemma2": {
        r"^(model\.)?encoder\.(embed_tokens|norm|layers)\.": r"\1encoder.text_model.\2.",
        r"^(model\.)?encoder\.vision_tower\.vision_model\.": r"\1encoder.vision_tower.",
    },
}


def module_names(model_type: str) -> Callable[[str], str]:
    """Return a function from checkpoint names to module names of the installed version of `transformers`.

    `to_peft` and `from_peft` do this for KerasHub models themselves. Use it to see what the names become.

    Args:
        model_type: The `model_type` in the `config.json` of the checkpoint, for example `"vit"`.

    Raises:
        ImportError: `transformers` 5 or PyTorch, which it needs, is not installed.
        ValueError: `transformers` does not know this model type.

    Example:

    >>> from keras_lora.interop import module_names
    >>> module_names("vit")("vit.encoder.layer.0.attention.attention.query.weight")
    'vit.layers.0.attention.q_proj.weight'
    >>> module_names("llama")("model.layers.0.self_attn.q_proj.weight")
    'model.layers.0.self_attn.q_proj.weight'
    """
    try:
        classes = classes_of(model_type)
    except ImportError as error:
        raise ImportError(
            f"`module_names({model_type!r})` asks `transformers` for its module names. Expected version 5 and PyTorch. "
            f"Received: {error}. Run `pip install 'keras_lora[interop]'`, or pass a function of your own."
        ) from error
    if not classes:
        raise ValueError(f"`transformers` has no model of the type {model_type!r}. Expected one such as 'vit' or 'llama'.")
    return lambda name: best_of(classes, [name]).rename(name)


@dataclass(frozen=True)
class ModelClass:
    """A class of `transformers`.

    Attributes:
        name: Its name, for example `"ViTForImageClassification"`.
        rules: Its rules for the names of tensors in older checkpoints.
        modules: The names of its modules, with `#` for each number, and whether PEFT has a LoRA for each.
        prefix: Text before its names in the model that PEFT will adapt, which holds a model of this class.
    """

    name: str
    rules: tuple[Any, ...]
    modules: Mapping[str, bool]
    prefix: str = ""

    def rename(self, key: str) -> str:
        """Return the name of a tensor in a model of this class."""
        outside, key = (self.prefix, key.removeprefix(self.prefix)) if key.startswith(self.prefix) else ("", key)
        for rule in self.rules:
            key, _ = rule.rename_source_key(key)
        return outside + key

    def has(self, module: str) -> bool:
        """Whether a model of this class has a module, at any depth: the number of layers is not compared."""
        return _unnumbered(module.removeprefix(self.prefix)) in self.modules

    def may_have(self, module: str) -> bool:
        """Whether it has a module, or was built without any experts: the known config of a Gemma 4 does not say them."""
        return self.has(module) or not (_EXPERTS.search(module) is None or any(map(_EXPERTS.search, self.modules)))


def best_of(classes: Iterable[ModelClass], keys: Iterable[str]) -> ModelClass:
    """Return the first class that has the modules of most of these tensors after renaming them."""
    keys = list(keys)
    return max(classes, key=lambda each: sum(each.has(each.rename(key).rpartition(".")[0]) for key in keys))


@functools.cache
def classes_of(model_type: str, config: str = "{}") -> tuple[ModelClass, ...]:
    """Return the classes of a model type, none if `transformers` cannot build them.

    Args:
        model_type: The `model_type` of a checkpoint's config.
        config: What is known of the other entries of that config, as JSON. Only which modules exist may depend on it.

    Raises:
        ImportError: `transformers` 5 or PyTorch is not installed.
    """
    mapping: Any = importlib.import_module("transformers.conversion_mapping")
    tables = importlib.import_module("transformers.models.auto.modeling_auto")
    renaming: Any = importlib.import_module("transformers.core_model_loading").WeightRenaming
    names: dict[str, None] = {}
    for table in _TABLES:
        found = getattr(tables, f"MODEL_FOR_{table}_MAPPING_NAMES" if table else "MODEL_MAPPING_NAMES").get(model_type, ())
        names |= dict.fromkeys([found] if isinstance(found, str) else found)
    classes = []
    for name in names:
        tried: tuple[dict[str, Any], ...] = (json.loads(config), {})
        for entries in tried:  # entries that Keras calls otherwise may be refused
            with contextlib.suppress(Exception):  # foreign code, which may need further packages
                model = _built(name, model_type, entries)
                rules = [each for each in mapping.get_model_conversion_mapping(model) if isinstance(each, renaming)]
                modules = {_unnumbered(path): bool(_LINEAR & _class_names(module)) for path, module in model.named_modules()}
                classes.append(ModelClass(name, tuple(rules), modules))
                break
    return tuple(classes)


def recorded(model_type: str) -> Callable[[str], str]:
    """Return a function as `module_names` does, without `transformers`."""

    def rename(name: str) -> str:
        for pattern, replacement in _RECORDED.get(model_type, {}).items():
            name = re.sub(pattern, replacement, name)
        return name

    return rename


def classes_with(checkpoint: CheckpointMap, prefix: str) -> tuple[ModelClass, ...]:
    """Return the classes that a model for this checkpoint may be of, also inside a model that has it under a prefix.

    Raises:
        ImportError: `transformers` 5 or PyTorch is not installed.
    """
    known = {key: value for key, value in checkpoint.config.items() if key != "model_type"}
    classes = classes_of(checkpoint.config["model_type"], json.dumps(known, default=str)) if checkpoint.config else ()
    return (*classes, *(replace(each, prefix=prefix) for each in classes if prefix))


def rename_for_peft(checkpoint: CheckpointMap, prefix: str) -> None:
    """Give the tensors of a checkpoint the names that they have in a model of `transformers`, if it is installed."""
    with contextlib.suppress(ImportError):  # `warn_of_names` tells which names differ
        if classes := classes_with(checkpoint, prefix):
            checkpoint.rename(best_of(classes, checkpoint.converted).rename)


def warn_of_names(checkpoint: CheckpointMap, prefix: str, modules: set[str], renamed: bool) -> None:
    """Warn of modules in a written adapter that `transformers` does not have: PEFT leaves them out without a warning.

    Args:
        checkpoint, prefix: What was written.
        modules: The modules in it.
        renamed: Whether the caller renamed them.
    """
    modules &= {key.rpartition(".")[0] for key in checkpoint.converted}
    try:
        classes = classes_with(checkpoint, prefix)
    except ImportError:
        rename = recorded(checkpoint.config["model_type"])
        there = {module: rename(f"{module}.weight").removesuffix(".weight") for module in sorted(modules)}
        other = [f"'{module}' is '{name}'" for module, name in there.items() if module != name]
        if other and not renamed:
            checks.warn(
                f"`transformers` 5, which is not installed here, has other names for {len(other)} of the {len(modules)} "
                f"modules of this PEFT adapter: {capped(other)}. PEFT leaves out what has another name, without a warning. "
                "Install `transformers` and write the adapter again, or pass `rename`."
            )
        return
    missing = [[module for module in sorted(modules) if not each.may_have(module)] for each in classes]
    if missing and (fewest := min(missing, key=len)):
        checks.warn(
            f"`transformers` has no modules {capped(map(repr, fewest))} in {classes[missing.index(fewest)].name}, as built "
            "from the config of this model. PEFT leaves out what has another name, without a warning. Expected the names in "
            "the model that PEFT will adapt. Check `prefix`, `names` and `rename`."
        )


def found_by_parameter(checkpoint: CheckpointMap, prefix: str, modules: Iterable[str]) -> set[str]:
    """Return the adapted modules that PEFT finds by their parameter `weight` alone.

    These are modules of which PEFT has no LoRA, such as the routers of experts in `transformers` 5, and linear layers with
    names that PEFT takes for those of one expert in `transformers` 4.
    """
    mistaken = experts.LINEAR if checkpoint.config.get("model_type") in _MISTAKEN else ()
    named = {*experts.ROUTERS, *mistaken} if checkpoint.bank_parameters else ()
    found = {module for module in modules if module.rpartition(".")[2] in named}
    with contextlib.suppress(ImportError):
        has = {module: lora for each in classes_with(checkpoint, prefix) for module, lora in each.modules.items()}
        found |= {
            module
            for module in modules
            if not has.get(_unnumbered(module.removeprefix(prefix)), has.get(_unnumbered(module), True))
        }
    return found


def _class_names(module: Any) -> set[str]:
    return {each.__name__ for each in type(module).__mro__}


def _unnumbered(module: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "#", module)


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Suppress what `transformers` says of sizes, which do not matter here."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        transformers.logging.set_verbosity(level)


def _built(name: str, model_type: str, entries: dict[str, Any]) -> Any:
    """Build a model without weights."""
    transformers: Any = importlib.import_module("transformers")
    torch = importlib.import_module("transformers.modeling_utils").torch  # imported by `transformers`, never by us
    with _quiet(transformers), torch.device("meta"):
        return getattr(transformers, name)(transformers.AutoConfig.for_model(model_type, **entries))
