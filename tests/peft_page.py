"""The table of `docs/peft.md`: what each KerasHub family with a Hugging Face converter has of PEFT.

    KERAS_BACKEND=jax python tests/peft_page.py          # writes the table anew

Nothing in it is typed in: small models of `tests/families/` are held against KerasHub's converters.
"""

from __future__ import annotations

import collections
import os
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")
import torch  # noqa: F401  # before TensorFlow

import keras  # isort: skip
import keras_hub
from families import MODELS, multimodal, text, vision  # noqa: F401  # entering the families
from peft_families import FAMILIES

from keras_lora.interop.checkpoints import CheckpointMap, NotAReshape
from keras_lora.interop.converters import converters, model_types_of

PAGE = Path(__file__).parents[1] / "docs" / "peft.md"
START, END = "<!-- families: written by tests/peft_page.py -->", "<!-- end of families -->"


def converted() -> dict[str, list[str]]:
    """The classes that KerasHub has converters for, and those these come from, each with its `model_type`s."""
    found: dict[str, list[str]] = {}
    for name, converter in converters().items():
        for cls in converter.backbone_cls.__mro__:
            if issubclass(cls, keras_hub.models.Backbone) and cls is not keras_hub.models.Backbone:
                found.setdefault(cls.__name__, []).append(name)
    return found


def row_of(name: str, class_name: str) -> str:
    model, _ = MODELS[name]()
    checkpoint = CheckpointMap(model)
    kinds: collections.Counter[str] = collections.Counter()
    without: collections.Counter[str] = collections.Counter()
    placed: set[str] = set()
    for address in checkpoint.maps:
        try:
            kinds[checkpoint.source_of(address).kind] += 1
            placed.add(address)
        except NotAReshape as error:
            without[str(error).split(" ('")[0].replace("|", "/")] += 1
    fused = sum(len(addresses) > 1 and addresses[0] in placed for addresses in checkpoint.modules.values())
    with_place = ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items())) or "none"
    if fused:
        with_place += f"; {fused} modules are several kernels here"
    why = "; ".join(f"{number}: {reason}" for reason, number in without.items()) or "–"
    types = ", ".join(f"`{each}`" for each in model_types_of(model))
    tested = any(class_name == cls for cls in TESTED)
    return f"| `{name.split('/')[0]}` | `{class_name}` | {types} | {with_place} | {why} | {'yes' if tested else ''} |"


#: The backbones whose logits `tests/test_peft.py` compares with PEFT's.
TESTED = {family.backbone.__name__ for family in FAMILIES.values()}


def table() -> str:
    classes = converted()
    names = [name for name in MODELS if name.split("/")[1] in classes]
    rows = [row_of(name, name.split("/")[1]) for name in names]
    missing = sorted({cls.backbone_cls.__name__ for cls in converters().values()} - {name.split("/")[1] for name in names})
    head = [
        "| family | backbone | `model_type` | kernels with a place in PEFT | kernels without, and why | run beside PEFT |",
        "|---|---|---|---|---|---|",
    ]
    end = [f"\nConverters for which there is no small model here: {', '.join(missing)}."] if missing else []
    return "\n".join([*head, *rows, *end])


def page(old: str) -> str:
    start, end = old.index(START) + len(START), old.index(END)
    return f"{old[:start]}\n\n{table()}\n\n{old[end:]}"


if __name__ == "__main__":
    keras.utils.set_random_seed(0)
    PAGE.write_text(page(PAGE.read_text()))
