"""Write the reference: `docs/api.md`, a page for each public name in `docs/api/`, and their part of `mkdocs.yml`.

    python docs/reference.py

`GROUPS` puts each name in a group. mkdocstrings fills the pages from the docstrings when the site is built.
`tests/test_pages.py` compares the pages with what this script writes, and `GROUPS` with the names that the package has.
"""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
BEGIN, END = "  # reference: written by docs/reference.py\n", "  # /reference\n"
INTRODUCTION = """# API

Every public name of `keras_lora`, with a page for each. Functions that change a model or layer do so in place, and most of
them return it. After any function that changes which variables train, call `compile` again.
"""
#: Methods and properties that a page shows.
MEMBERS = {
    "keras_lora.Adapter": [
        *("build_for", "parameter_count", "delta_kernel", "problem_with", "size", "factors_of", "change", "live_factors"),
        *("adapted_output", "output", "base_changed", "misfit_with", "values_from", "add_factor", "saved_weights"),
        *("derived", "adds"),
    ],
    "keras_lora.AdapterPool": [
        *("capacity", "registered", "resident", "pinned", "register", "remove", "pin", "unpin"),
        *("predict_on_batch", "generate"),
    ],
    "keras_lora.AdapterServer": ["predict", "submit", "warm_up", "close", "waiting"],
    "keras_lora.AdapterList": ["total", "adapters", "data", "table"],
    "keras_lora.CombinationReport": ["error"],
    "keras_lora.LowRank": ["pair", "scale", "product_rank"],
    "keras_lora.MemoryPlan": ["peak", "data", "table"],
    "keras_lora.MultiAdapterModel": ["load", "delete", "index_of", "generate"],
    "keras_lora.TargetList": ["of", "total", "table"],
}
#: A name that has a second place.
ALIASES = {"keras_lora.LoRADense": "keras_lora.layers.LoRADense"}
#: First lines that say more to readers of the code than to those of the page.
SUMMARIES = {"keras_lora.layers": "The layers that `apply_lora` makes of those of Keras."}
#: Resolves links to a second place, and shows nothing.
ALIAS = """
::: {name}
    options:
      show_root_heading: false
      show_root_toc_entry: false
      show_signature: false
      show_docstring_description: false
      show_docstring_parameters: false
      show_docstring_raises: false
      show_docstring_examples: false
"""


class Group(NamedTuple):
    """Names that belong together.

    Attributes:
        title: The heading of the group.
        about: What a reader should know of all of them.
        names: Their full names. A module comes first.
        guides: Pages about them: titles by path.
        anchors: Earlier headings of the page, so that links to them work.
    """

    title: str
    about: str
    names: list[str]
    guides: dict[str, str]
    anchors: tuple[str, ...] = ()


def of(module: str, *names: str) -> list[str]:
    """Full names."""
    return [f"{module}.{name}" for name in names]


GROUPS = [
    Group(
        "Adapting",
        "Preview, adapt, look, merge and undo. If a layer of yours computes with a kernel, register it.",
        of(
            "keras_lora",
            *("apply_lora", "remove_lora", "merge_lora", "unmerge_lora", "chunk_logits"),
            *("list_targets", "TargetList", "Target", "list_adapters", "AdapterList", "AdapterRow", "register_layer"),
            "reduced_base",
        ),
        {"index.md": "Quickstart", "how_it_works.md": "How it works", "chunked_logits.md": "Logits in chunks"},
        ("applying", "inspecting", "merging", "your-own-layers"),
    ),
    Group(
        "Methods",
        'Pass a method to `apply_lora` by name (for example `"lora"` or `"dora"`), as an instance, or as a config. To write '
        "one, subclass `Adapter`, or `LowRank` if the change is a product of two thin factors, and register the class.",
        of(
            "keras_lora",
            *("LoRA", "DoRA", "AdaLoRA", "MiSS", "IA3", "LoKr", "OFT", "LoHa", "VeRA", "TrainableTokens"),
            *("Adapter", "LowRank", "register_adapter"),
        ),
        {"methods.md": "Methods", "how_it_works.md": "How it works"},
        ("your-own-methods",),
    ),
    Group(
        "Starting points",
        "Other first values for LoRA: from the kernels, from data, from gradients, or from what quantising lost.",
        of("keras_lora", "start_from", "EVA", "LoRAGA"),
        {"starting_points.md": "Starting points"},
    ),
    Group(
        "Many adapters",
        "Several named adapters on one base: switch, train, combine, compress and delete them.",
        of(
            "keras_lora",
            *("activate_adapters", "active_adapters", "disable_adapters", "train_adapters", "delete_adapter"),
            *("combine_adapters", "compress_adapter", "CombinationReport", "CombinedKernel"),
        ),
        {"many_adapters.md": "Many adapters"},
    ),
    Group(
        "Serving",
        "Several adapters in one batch, a pool of files that take places in the model, and a queue of requests.",
        of("keras_lora", "MultiAdapterModel", "AdapterPool", "AdapterServer"),
        {"serving.md": "Serving"},
    ),
    Group(
        "Memory",
        "How much a training step needs, and how it needs less.",
        of("keras_lora", "memory", "plan", "MemoryPlan", "rematerialize"),
        {"memory.md": "Memory"},
    ),
    Group(
        "Files",
        "These two write and read the adapter alone. Save a whole model with `model.save` and load it with "
        "`keras.saving.load_model`, as you would any Keras model.",
        of("keras_lora", "save_adapter", "load_adapter"),
        {"adapter_file.md": "The adapter file"},
    ),
    Group(
        "Callbacks",
        "Pass these to `fit`.",
        ["keras_lora.callbacks", *of("keras_lora.callbacks", "SaveAdapter", "AdaLoRABudget", "ReLoRA", "PruneRank")],
        {"long_runs.md": "Long runs", "rates.md": "Rates and schedules"},
    ),
    Group(
        "Optimizers",
        "How fast each part trains.",
        ["keras_lora.optimizers", "keras_lora.optimizers.ScaledUpdates"],
        {"rates.md": "Rates and schedules"},
    ),
    Group(
        "Layers",
        "`apply_lora` gives these classes to the layers it adapts. You can also use them directly in a new model. "
        "`LoRADense` is at the top of the package too.",
        [
            "keras_lora.layers",
            "keras_lora.LoRADense",
            *of("keras_lora.layers", "LoRAEinsumDense", "LoRAEmbedding", "LoRAReversibleEmbedding"),
            *of("keras_lora.layers", "LoRAConv1D", "LoRAConv2D", "LoRAConv3D"),
            *of("keras_lora.layers", "LoRAConv1DTranspose", "LoRAConv2DTranspose", "LoRAConv3DTranspose"),
            *of("keras_lora.layers", "LoRADepthwiseConv1D", "LoRADepthwiseConv2D"),
            *of("keras_lora.layers", "LoRASeparableConv1D", "LoRASeparableConv2D"),
            *of("keras_lora.layers", "LoRASimpleRNNCell", "LoRALSTMCell", "LoRAGRUCell"),
        ],
        {"how_it_works.md": "How it works"},
    ),
    Group(
        "Interop",
        "Adapters of PEFT, of Keras's own `enable_lora` and of KerasHub.",
        [
            "keras_lora.interop",
            *of("keras_lora.interop", "from_peft", "to_peft", "serving_problems", "module_names"),
            *of("keras_lora.interop", "from_enable_lora", "from_lora_h5"),
        ],
        {"peft.md": "PEFT, vLLM, llama.cpp", "migrating.md": "From enable_lora and KerasHub"},
        ("other-libraries",),
    ),
    Group(
        "Plots",
        'What training changed, drawn and as numbers. Those that draw need matplotlib: `pip install "keras_lora[plots]"`.',
        [
            "keras_lora.plots",
            *of("keras_lora.plots", "plot_ranks", "plot_changes", "plot_overlaps", "plot_curves"),
            *of("keras_lora.plots", "measure_adapters", "AdapterMeasure", "measure_overlaps", "Overlaps", "read_curves"),
            *of("keras_lora.plots", "LogAdapters"),
        ],
        {"plots.md": "Plots"},
    ),
    Group(
        "Testing",
        "Check a layer or a method that you registered: these run it and compare the results.",
        ["keras_lora.testing", *of("keras_lora.testing", "check_layer", "check_adapter")],
        {"how_it_works.md": "How it works"},
    ),
]


def short(name: str) -> str:
    """The last part of a full name, which is also the name of its page."""
    return name.rpartition(".")[2]


def is_module(name: str) -> bool:
    """Whether this public name is a module."""
    return name.removeprefix("keras_lora.") in ("callbacks", "interop", "layers", "optimizers", "plots", "testing")


def summary(name: str) -> str:
    """The first line of a docstring."""
    if name in SUMMARIES:
        return SUMMARIES[name]
    path, _, last = name.rpartition(".")
    found = importlib.import_module(name) if is_module(name) else getattr(importlib.import_module(path), last)
    return (inspect.getdoc(found) or "").partition("\n")[0]


def table(group: Group, folder: str, anchors: bool) -> str:
    """The names of a group with links and first lines."""
    rows = ["| name | what it is |", "| --- | --- |"]
    for name in group.names:
        places = [
            name,
            *(f"{name}.{member}" for member in MEMBERS.get(name, [])),
            *([ALIASES[name]] if name in ALIASES else []),
        ]
        spans = "".join(f'<span id="{place}"></span>' for place in places) if anchors else ""
        rows.append(f"| {spans}[`{short(name)}`]({folder}{short(name)}.md) | {summary(name)} |")
    return "\n".join(rows) + "\n"


def overview() -> str:
    """The page with all names."""
    parts = [INTRODUCTION]
    for group in GROUPS:
        spans = "".join(f'<span id="{each}"></span>' for each in group.anchors)
        parts.append("\n".join(filter(None, [f"\n## {group.title}\n", spans and f"{spans}\n", f"{group.about}\n"])))
        parts.append(f"\n{table(group, 'api/', anchors=True)}")
    return "".join(parts)


def page(name: str, group: Group) -> str:
    """The page of a name."""
    description = summary(name).replace('"', "'").replace("`", "")
    lines = ["---", f"title: {short(name)}", f'description: "{description}"', "---", "", f"::: {name}", "    options:"]
    lines += ["      heading_level: 1", "      show_root_full_path: true"]
    if name in SUMMARIES:
        lines.append("      show_docstring_description: false")
    if name in MEMBERS:
        lines += ["      members:", *(f"        - {member}" for member in MEMBERS[name])]
    text = "\n".join(lines) + "\n"
    if name in SUMMARIES:
        text += f"\n{SUMMARIES[name]}\n"
    if name in ALIASES:
        text += ALIAS.format(name=ALIASES[name]) + f"\nIt is also `{ALIASES[name]}`.\n"
    if is_module(name):
        rest = group._replace(names=[each for each in group.names if each != name])
        text += f"\n{table(rest, '', anchors=False)}"
    guides = ", ".join(f"[{title}](../{path})" for path, title in group.guides.items())
    return f"{text}\nSee also: {guides}, [all names](../api.md).\n{{ data-search-exclude }}\n"


def navigation() -> str:
    """The part of `mkdocs.yml` that lists these pages."""
    lines = ["  - Reference:", "      - All names: api.md"]
    for group in GROUPS:
        lines.append(f"      - {group.title}:")
        lines += [f"          - {short(name)}: api/{short(name)}.md" for name in group.names]
    return "\n".join(lines) + "\n"


def pages() -> dict[str, str]:
    """All pages: text by path in `docs/`."""
    return {"api.md": overview()} | {f"api/{short(name)}.md": page(name, group) for group in GROUPS for name in group.names}


def with_navigation(config: str) -> str:
    """`mkdocs.yml` with the list of these pages."""
    before, _, rest = config.partition(BEGIN)
    return before + BEGIN + navigation() + END + rest.partition(END)[2]


def write() -> None:
    """Write the pages and their part of `mkdocs.yml`, and remove old pages."""
    docs = ROOT / "docs"
    for old in (docs / "api").glob("*.md"):
        old.unlink()
    (docs / "api").mkdir(exist_ok=True)
    for path, text in pages().items():
        (docs / path).write_text(text)
    config = ROOT / "mkdocs.yml"
    config.write_text(with_navigation(config.read_text()))


if __name__ == "__main__":
    write()
