"""Write the table of properties in `docs/methods.md`, from the classes of the methods.

    KERAS_BACKEND=torch python docs/methods_table.py

`tests/test_methods_page.py` compares the page with what this script writes. No cell is entered by hand: each
asks a method, or runs it on a small layer.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import layers

import keras_lora
from keras_lora import adapters
from keras_lora.interop import peft_methods
from keras_lora.swap.adapted import maps_of

PAGE = Path(__file__).with_name("methods.md")
BEGIN, END = "<!-- table -->\n", "<!-- /table -->\n"
METHODS: dict[str, Any] = {
    "LoRA": keras_lora.LoRA,
    "DoRA": keras_lora.DoRA,
    "AdaLoRA": keras_lora.AdaLoRA,
    "MiSS": keras_lora.MiSS,
    "IA3": keras_lora.IA3,
    "LoKr": keras_lora.LoKr,
    "OFT": keras_lora.OFT,
    "LoHa": keras_lora.LoHa,
    "VeRA": keras_lora.VeRA,
    "TrainableTokens": lambda **given: keras_lora.TrainableTokens([1], **given),
}
HEADER = [
    "method",
    "trains for 512 × 512",
    "merges",
    "dropout",
    "one for each example",
    "PEFT",
    "int8, int4, bfloat16",
    "layers",
]
#: A layer of each kind, with an input.
KINDS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "Dense": (lambda: layers.Dense(6), (2, 8)),
    "EinsumDense": (lambda: layers.EinsumDense("abc,cde->abde", (None, 2, 4)), (2, 3, 8)),
    "experts": (lambda: layers.EinsumDense("ebd,edh->ebh", (None, 6)), (2, 3, 8)),
    "convolutions": (lambda: layers.Conv2D(4, 3, groups=2), (2, 6, 6, 4)),
    "depthwise": (lambda: layers.DepthwiseConv2D(3), (2, 6, 6, 4)),
    "recurrent": (lambda: layers.LSTMCell(4), (2, 8)),
    "embeddings": (lambda: layers.Embedding(9, 4), (2, 3)),
}


def refused(make: Any, kind: str, **given: Any) -> bool:
    """Whether a method refuses a layer of a kind."""
    layer = KINDS[kind][0]()
    layer.build(KINDS[kind][1])
    method = make(**given)
    return any(method.problem_with(linear) is not None for linear in maps_of(layer))


def merges(make: Any, kind: str) -> bool:
    """Whether merging keeps the outputs."""
    layer = KINDS[kind][0]()
    shape = KINDS[kind][1]
    x = np.ones(shape, "int32" if kind == "embeddings" else "float32")
    layer.build(shape)
    keras_lora.apply_lora(layer, make(), targets=lambda each: True)
    for v in layer.trainable_variables:
        v.assign(keras.ops.add(v.value, 0.1))
    before = keras.ops.convert_to_numpy(layer(x))
    return bool(np.abs(keras.ops.convert_to_numpy(keras_lora.merge_lora(layer)(x)) - before).max() < 1e-4)


def on_reduced_bases(make: Any, kind: str) -> bool:
    """Whether an adapted layer runs on a base in int8, int4 and bfloat16."""
    for mode in ("int8", "int4", "bfloat16"):
        layer = KINDS[kind][0]()
        layer.build(KINDS[kind][1])
        if mode != "bfloat16":
            layer.quantize(mode)
        base_dtype = "bfloat16" if mode == "bfloat16" else None
        keras_lora.apply_lora(layer, make(), targets=lambda each: True, base_dtype=base_dtype)
        layer(np.ones(KINDS[kind][1], "int32" if kind == "embeddings" else "float32"))
    return True


def row(name: str) -> list[str]:
    """The cells of a method."""
    make = METHODS[name]
    method = make()
    main = "embeddings" if name == "TrainableTokens" else "Dense"
    cls = type(method)
    thin = isinstance(method, adapters.LowRank)
    own = bool(peft_methods.kind_of(cls)) or name in ("LoRA", "DoRA", "TrainableTokens")
    kinds = [kind for kind in KINDS if not refused(make, kind)]
    layers_of = "all" if len(kinds) == len(KINDS) else ", ".join(kinds)
    if len(kinds) == len(KINDS) - 1:
        layers_of = f"all but {next(kind for kind in KINDS if kind not in kinds)}"
    return [
        f"`{name}`",
        f"{method.parameter_count((512, 512)):,}",
        "yes" if merges(make, main) else "no",
        "yes" if "dropout" in inspect.signature(cls).parameters else "no",
        "yes" if thin else "after `compress_adapter`",
        "both ways" if own else "as an exact LoRA, by `compress_adapter`" if thin else "as a LoRA, by `compress_adapter`",
        "yes" if on_reduced_bases(make, main) else "no",
        layers_of,
    ]


def table() -> str:
    """The table as Markdown."""
    rows = [HEADER, ["---"] * len(HEADER), *(row(name) for name in METHODS)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows) + "\n"


def page() -> str:
    """The page with the table."""
    text = PAGE.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return f"{before}{BEGIN}{table()}{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page())
