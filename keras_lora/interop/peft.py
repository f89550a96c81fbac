"""`from_peft` and `to_peft`: load and save Hugging Face PEFT adapters.

PEFT names a module of a `transformers` model and stores `lora_A (rank, in)` and `lora_B (out, rank)` for its weight
`(out, in)`. Here a Keras kernel has `lora_a (in, rank)` and `lora_b (rank, out)`. The numbers are the same;
`checkpoints.py` maps kernels to modules and gives the order of inputs and outputs in both.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from keras_lora import checks, reports
from keras_lora.applying import require_adapted
from keras_lora.checks import AnyLayer
from keras_lora.files import huggingface
from keras_lora.files.adapter_state import AdapterState
from keras_lora.files.misfits import raise_problems
from keras_lora.interop import peft_folder, peft_methods
from keras_lora.interop.checkpoints import CheckpointMap
from keras_lora.interop.peft_reading import Reader
from keras_lora.interop.peft_writing import Writer
from keras_lora.interop.problems import grouped
from keras_lora.interop.transformers_names import found_by_parameter, rename_for_peft, warn_of_names


@checks.helpful
def from_peft(
    model: AnyLayer,
    folder: str | os.PathLike[str],
    *,
    name: str | None = None,
    trainable: bool = True,
    names: Mapping[str, str] | None = None,
    rename: Callable[[str], str] | None = None,
) -> AnyLayer:
    """Load a PEFT adapter (LoRA, DoRA, MiSS, IA3, LoKr, LoHa or OFT, with other trained weights) into a model, in place.

    The layers of a KerasHub model are found by their names in KerasHub's converter for `transformers` checkpoints, with any
    prefix in the file (`bert.`, `transformer.`). If several kernels here are one weight there (GPT-2's `c_attn`), each
    kernel gets its part. Ranks and alphas by pattern, rank-stabilized scales, biases,
    `modules_to_save`, embeddings, convolutions and trainable tokens are read.

    Args:
        model: The base, plain or adapted: a KerasHub backbone, a task on one, or any model with `names`. Its weights must be
            those that the adapter was trained on; the file has no information to check this.
        folder: A folder written by PEFT's `save_pretrained`, or `"hf://owner/name"`. Only safetensors is read.
        name: The name of the new adapter, or the adapter to load into, as for `keras_lora.load_adapter`.
        trainable: Whether the adapter is trainable.
        names: Module names for layers that the converter does not know, for example a head: a dict from the path or the
            address of a layer to the name of its module. The weight must have the layout of the corresponding PyTorch layer.
        rename: A function from a name in KerasHub's converter, which is the name in a checkpoint, to the name in the file.
            Without it, both the names in a checkpoint and those that `transformers` 5 has for some models are found.

    Returns:
        `model`. If an adapter was added, call `compile` before training.

    Raises:
        ValueError: The adapter is damaged, of another kind, or does not fit. Everything unknown or of another shape is
            listed, and the model is unchanged.
        FileNotFoundError: The folder does not exist, or it lacks one of its two files.

    Example:

    >>> import os, tempfile, keras_hub, keras_lora
    >>> from keras_lora.interop import from_peft, to_peft
    >>> sizes = {"num_layers": 1, "num_heads": 2, "hidden_dim": 8, "intermediate_dim": 8}
    >>> base = lambda: keras_hub.models.BertBackbone(vocabulary_size=9, max_sequence_length=5, **sizes)
    >>> folder = os.path.join(tempfile.mkdtemp(), "french")
    >>> to_peft(keras_lora.apply_lora(base(), rank=2, targets="query"), folder)
    >>> [tuple(v.shape) for v in from_peft(base(), folder).trainable_variables]
    [(8, 2), (2, 8)]

    Reference:
        [PEFT, checkpoint format](https://huggingface.co/docs/peft/developer_guides/checkpoint)
    """
    if huggingface.is_address(folder):
        folder = huggingface.local_folder(str(folder), [peft_folder.CONFIG, peft_folder.TENSORS])
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}. Expected one that PEFT's `save_pretrained` wrote.")
    config, modules = peft_folder.read(folder)
    with reports.progress(3) as step:
        step("finding the modules")
        checkpoint = CheckpointMap(model, names, rename)
        step("converting the adapter")
        reader = Reader(checkpoint, config)
        reader.take_all(modules, ask=rename is None)
        source = f"The PEFT adapter {folder}"
        raise_problems(source, model, grouped(reader.problems))
        step("loading the adapter")
        reader.state.put_into(model, source, name=name, trainable=trainable)
    if config.method and (ignored := peft_methods.ignored(config.method)):
        checks.warn(f"{source} was trained with {', '.join(ignored)}. keras_lora has none, so further training is without.")
    return model


@checks.helpful
def to_peft(
    model: Any,
    folder: str | os.PathLike[str],
    *,
    name: str | None = None,
    prefix: str = "",
    rename: Callable[[str], str] | None = None,
    names: Mapping[str, str] | None = None,
    base_model: str | None = None,
    bake_scaling: bool = False,
) -> None:
    """Save an adapter of a model, and other weights trained with it, as a PEFT adapter.

    Args:
        model: An adapted model: a KerasHub backbone, a task on one, or any model with `names`.
        folder: Where to write `adapter_config.json` and `adapter_model.safetensors`, or `"hf://owner/name"`. Other
            files in the folder are kept.
        name: The adapter to save, if the model has several.
        prefix: Text before the names of KerasHub's converter in the model that PEFT will adapt: `"bert."` for a
            `BertForSequenceClassification`, `"transformer."` for a `GPT2LMHeadModel`; nothing for a `LlamaForCausalLM`.
        rename: A function from a name in KerasHub's converter, with the prefix, to the name in the model that PEFT will
            adapt. Without it, the names are those of `transformers`, if it is installed: version 5 has other names than
            the checkpoints of some models.
        names: As for `from_peft`, with full module names.
        base_model: The value of `base_model_name_or_path`, for example `"meta-llama/Llama-3.2-1B"`.
        bake_scaling: Write a form that vLLM, llama.cpp and Ollama read correctly: one rank, scales multiplied into B,
            integers in the config. Parts that they cannot read (DoRA, biases, heads, tokens) are then refused.

    Raises:
        ValueError: The model has no adapter, or has several and you did not name one; or an adapted kernel or a trained
            variable has no place in PEFT's format. All of these are listed, and nothing is written.

    Example:

    >>> import json, os, tempfile, keras_hub, keras_lora
    >>> from pathlib import Path
    >>> from keras_lora.interop import to_peft
    >>> sizes = {"num_layers": 1, "num_heads": 2, "hidden_dim": 8, "intermediate_dim": 8}
    >>> model = keras_hub.models.BertBackbone(vocabulary_size=9, max_sequence_length=5, **sizes)
    >>> folder = os.path.join(tempfile.mkdtemp(), "french")
    >>> to_peft(keras_lora.apply_lora(model, rank=2, targets="query"), folder, prefix="bert.")
    >>> json.loads(Path(folder, "adapter_config.json").read_text())["target_modules"]
    ['bert.encoder.layer.0.attention.self.query']

    Reference:
        [PEFT, checkpoint format](https://huggingface.co/docs/peft/developer_guides/checkpoint)
    """
    if huggingface.is_address(folder):
        with tempfile.TemporaryDirectory() as local:
            own: dict[str, Any] = {"prefix": prefix, "rename": rename, "names": names, "bake_scaling": bake_scaling}
            to_peft(model, local, name=name, base_model=base_model, **own)
            card = huggingface.model_card(str(folder), f"the Keras model `{model.name}`", "peft", base_model)
            Path(local, huggingface.CARD).write_text(card, encoding="utf-8")
            huggingface.upload_folder_to(str(folder), local)
        return
    require_adapted(model, "to_peft")
    with reports.progress(3) as step:
        step("finding the modules")
        checkpoint = CheckpointMap(model, names, rename, prefix)
        if rename is None:
            rename_for_peft(checkpoint, prefix)
        step("converting the adapter")
        writer = Writer(model, checkpoint)
        writer.take(AdapterState.of(model, name))
        writer.find_by_parameter(lambda modules: found_by_parameter(checkpoint, prefix, modules))
        do = "Leave these layers out of `targets`, or give `names` for them; see docs/peft.md."
        if bake_scaling and not writer.problems:
            writer.bake()
            do = (
                "Write without `bake_scaling`, for PEFT. For the others, `keras_lora.compress_adapter` makes a LoRA of a "
                "DoRA or of trained tokens; train without heads, norms and biases."
            )
        raise_problems(f"The adapter of '{model.name}' in PEFT's format", model, grouped(writer.problems), do=do)
        step("writing the files")
        peft_folder.write(Path(folder), writer.config(base_model), writer.tensors)
    if writer.drops_dropout:
        checks.warn(
            f"The adapter of '{model.name}' was trained with dropout, and PEFT has none where it adapts parameters, such as "
            "experts and routers. The file says `lora_dropout` 0.0 for all modules. This matters for further training alone."
        )
    warn_of_names(checkpoint, prefix, writer.modules, rename is not None)
