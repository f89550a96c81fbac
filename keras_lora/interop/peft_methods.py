"""Methods of PEFT besides LoRA and DoRA: the tensors of one module, and the settings, in both directions.

A weight of PEFT is `(out, in)`; a matrix here is `(in, out)`. A `Source` tells where the matrix of a kernel is in the
weight: several kernels may be parts of one weight, and inputs and outputs may have another order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from keras_lora import adapters
from keras_lora.adapters.lokr import split

if TYPE_CHECKING:
    from keras_lora.interop.checkpoints import Source
    from keras_lora.interop.peft_parts import Part
    from keras_lora.linear_map import LinearMap

Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class Format:
    """How PEFT stores a method.

    Attributes:
        method: The method here.
        keys: The names of the tensors of a module.
        kinds: The kinds of weights that it is converted for.
        plain: Settings that change the meaning of the numbers, with the values that they must have.
        training: Settings that matter for further training alone, and have no counterpart here.
        read: From the settings, tensors and the place of a kernel to an adapter and its weights.
        write: From the parts of one weight to tensors.
        settings: From the adapters, by module, to settings.
    """

    method: type[adapters.Adapter]
    keys: tuple[str, ...]
    kinds: tuple[str, ...]
    plain: dict[str, tuple[Any, ...]]
    training: tuple[str, ...]
    read: Callable[[Mapping[str, Any], str, Tensors, Source], tuple[adapters.Adapter, Tensors]]
    write: Callable[[Sequence[Part]], Tensors]
    settings: Callable[[Mapping[str, Part]], dict[str, Any]]


def read(said: Mapping[str, Any], module: str, tensors: Tensors, linear: LinearMap, source: Source) -> Any:
    """Return the adapter of a kernel, and its weights. Raises a ValueError that says what is wrong with the module."""
    form = FORMATS[said["peft_type"]]
    if source.kind not in form.kinds:
        raise ValueError(f"is of the kind '{source.kind}', for which {form.method.__name__} has no form here and in PEFT")
    adapter, weights = form.read(said, module, tensors, source)
    if (problem := adapter.problem_with(linear) or _bias_problem(adapter, linear)) is not None:
        raise ValueError(f"cannot be adapted here: {problem}")
    shapes = {key: value.shape for key, value in weights.items()}
    if (wanted := _shapes(adapter, tuple(linear.matrix_shape))) != shapes:
        raise ValueError(f"has weights of the shapes {shapes}; expected are {wanted}")
    return adapter, {key: np.ascontiguousarray(value, "float32") for key, value in weights.items()}


def write(parts: Sequence[Part]) -> Tensors:
    """Return the tensors of the module that has these kernels. Raises a ValueError that says what has no place there."""
    form = FORMATS[kind_of(type(parts[0].adapter))]
    for part in parts:
        if part.source.kind not in form.kinds:
            raise ValueError(f"PEFT has no {form.method.__name__} that we write for a weight of kind '{part.source.kind}'")
        if (problem := _bias_problem(part.adapter, part.linear)) is not None:
            raise ValueError(problem)
    return {key: np.ascontiguousarray(value, "float32") for key, value in form.write(parts).items()}


def kind_of(method: type) -> str:
    """Return PEFT's name of a method, or `""` if PEFT has no form of it that is known here."""
    return next((name for name, form in FORMATS.items() if form.method is method), "")


def settings_of(parts: Mapping[str, Part]) -> dict[str, Any]:
    """Return the settings for these modules. Raises a ValueError if PEFT cannot have such adapters in one model."""
    kind = kind_of(type(next(iter(parts.values())).adapter))
    return {"peft_type": kind, **FORMATS[kind].settings(parts)}


def problems_of(said: Mapping[str, Any]) -> list[str]:
    """Return the settings that change the meaning of the numbers."""
    form = FORMATS[said["peft_type"]]
    return [f"its `{key}` is {said[key]!r}" for key, plain in form.plain.items() if said.get(key, plain[0]) not in plain]


def keys_of(said: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the tensors that a module may have, by the settings."""
    return FORMATS[said["peft_type"]].keys if said else ()


def ignored(said: Mapping[str, Any]) -> list[str]:
    """Return the settings for training that are not kept."""
    return [f"{key}={said[key]!r}" for key in FORMATS[said["peft_type"]].training if said.get(key)]


def _bias_problem(adapter: adapters.Adapter, linear: LinearMap) -> str | None:
    if not isinstance(adapter, adapters.IA3) or adapter.side != "outputs":
        return None
    bias = getattr(linear.layer, "bias", None)
    if bias is None or not np.any(keras.ops.convert_to_numpy(bias)):
        return None
    return "PEFT multiplies the bias by the gains too, and here they act before it; adapt the inputs or a layer without bias"


def _shapes(adapter: Any, matrix_shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    in_dim, out_dim = matrix_shape[-2:]
    if isinstance(adapter, adapters.MiSS):
        return {"miss_d": (adapter.rank, out_dim)}
    if isinstance(adapter, adapters.IA3):
        return {"ia3_gain": (out_dim if adapter.side == "outputs" else in_dim,)}
    if isinstance(adapter, adapters.LoKr):
        return adapter.shapes(matrix_shape)
    if isinstance(adapter, adapters.LoHa):
        a, b = (in_dim, adapter.rank), (adapter.rank, out_dim)
        return {"loha_a1": a, "loha_b1": b, "loha_a2": a, "loha_b2": b}
    size = adapter.block_of(matrix_shape)
    return {"oft_q": (in_dim // size, size * (size - 1) // 2)}


def _tensor(tensors: Tensors, key: str, rows: int | None = None, columns: int | None = None) -> np.ndarray:
    """A matrix with this number of rows and columns, if given."""
    if key not in tensors:
        raise ValueError(f"lacks its tensor `{key}`")
    found = tensors[key]
    if found.ndim != 2 or rows not in (None, found.shape[0]) or columns not in (None, found.shape[1]):
        raise ValueError(f"has a tensor `{key}` of shape {found.shape}; expected is {(rows or 'any', columns or 'any')}")
    return found


def _in_order(source: Source, inputs: bool = True, outputs: bool = True) -> None:
    """Raise an error unless the matrix is the whole transposed weight, in the same order."""
    same = not inputs or np.array_equal(source.ins, np.arange(source.in_dim))
    if not (same and (not outputs or np.array_equal(source.outs, np.arange(source.out_dim)))):
        raise ValueError("has its inputs or outputs in another order here, or is a part of a weight there")


def _whole(parts: Sequence[Part]) -> Part:
    """The only part of a weight, in the same order."""
    if len(parts) > 1 or len(parts[0].source.outs) < parts[0].source.out_dim:
        raise ValueError("is a part of one weight there, for which there is one adapter of all of it")
    return parts[0]


def _one(values: Mapping[str, Any], what: str) -> Any:
    """The value that all modules have."""
    if len(set(values.values())) > 1:
        raise ValueError(f"its layers have different values of `{what}`, {sorted(set(values.values()))}; PEFT has one")
    return next(iter(values.values()))


# MiSS: `miss_block (rank, out)`; input i is in group i % rank.


def _read_miss(said: Mapping[str, Any], module: str, tensors: Tensors, source: Source) -> tuple[adapters.Adapter, Tensors]:
    block = _tensor(tensors, "miss_block", columns=source.out_dim)
    adapter = adapters.MiSS(block.shape[0], dropout=said.get("miss_dropout") or 0.0)
    _same_groups(source, adapter.rank)
    return adapter, {"miss_d": block[:, source.outs]}


def _same_groups(source: Source, rank: int) -> None:
    if not np.array_equal(source.ins % rank, np.arange(source.in_dim) % rank):
        raise ValueError("has its inputs in another order here, so that other inputs would be summed")


def _write_miss(parts: Sequence[Part]) -> Tensors:
    rank = _one({part.address: part.adapter.rank for part in parts}, "rank")
    block = np.zeros((rank, parts[0].source.out_dim), "float32")
    for part in parts:
        _same_groups(part.source, rank)
        block[:, part.source.outs] = part.values["miss_d"]
    return {"miss_block": block}


def _miss_settings(parts: Mapping[str, Part]) -> dict[str, Any]:
    rank = _one({module: part.adapter.rank for module, part in parts.items()}, "rank")
    dropout = max(part.adapter.dropout for part in parts.values())
    return {"r": rank, "miss_dropout": dropout, "init_weights": True, "bias": "none"}


# IA3: `ia3_l`, `(out, 1)` or, for the inputs, `(1, in)`; of a convolution `(1, channels, 1, 1)` for both.


def _read_ia3(said: Mapping[str, Any], module: str, tensors: Tensors, source: Source) -> tuple[adapters.Adapter, Tensors]:
    gains = tensors["ia3_l"]
    if gains.ndim != len(source.shape):
        raise ValueError(f"has gains of shape {gains.shape}; its weight has the shape {source.shape}")
    of_inputs = said.get("feedforward_modules") or []
    if source.kind != "convolution":
        inputs = gains.shape == (1, source.in_dim) and gains.shape != (source.out_dim, 1)
    elif isinstance(of_inputs, str):
        raise ValueError("is a convolution, and a pattern in `feedforward_modules` says on which side its gains are")
    else:
        inputs = any(module.endswith(str(each)) for each in of_inputs)
    gains = gains.reshape(-1)
    if inputs and source.kind == "convolution":  # here every position of the window has a gain
        gains = np.repeat(gains, math.prod(source.shape[2:]))
    index = source.ins if inputs else source.outs
    if len(gains) != (source.in_dim if inputs else source.out_dim):
        raise ValueError(f"has {len(gains)} gains; its weight has the shape {source.shape}")
    return adapters.IA3("inputs" if inputs else "outputs"), {"ia3_gain": gains[index]}


def _write_ia3(parts: Sequence[Part]) -> Tensors:
    source = parts[0].source
    side = _one({part.address: part.adapter.side for part in parts}, "side")
    gains = np.ones(source.out_dim if side == "outputs" else source.in_dim, "float32")
    for part in parts:
        gains[part.source.outs if side == "outputs" else part.source.ins] = part.values["ia3_gain"]
    if side == "inputs" and any(not np.array_equal(gains[each.source.ins], each.values["ia3_gain"]) for each in parts):
        raise ValueError("is one weight there, and its kernels have different gains of the inputs here")
    if source.kind != "convolution":
        return {"ia3_l": gains.reshape((-1, 1) if side == "outputs" else (1, -1))}
    if side == "inputs":
        by_channel = gains.reshape(source.shape[1], -1)
        if (by_channel != by_channel[:, :1]).any():
            raise ValueError("has a gain for each position of the window, and PEFT has one for each channel")
        gains = np.asarray(by_channel[:, 0])
    return {"ia3_l": gains.reshape(1, -1, *(1 for _ in source.shape[2:]))}


def _ia3_settings(parts: Mapping[str, Part]) -> dict[str, Any]:
    of_inputs = sorted(module for module, part in parts.items() if part.adapter.side == "inputs")
    outputs = [module for module in parts if module not in of_inputs]
    if wrong := [each for each in outputs if any(each.endswith(end) for end in of_inputs)]:
        raise ValueError(f"PEFT takes the modules {wrong} for those with gains of the inputs, by the ends of their names")
    transposed = all(part.source.kind == "transposed" for part in parts.values())
    return {"feedforward_modules": of_inputs, "fan_in_fan_out": transposed, "init_ia3_weights": True}


# LoKr: `kron(lokr_w1, lokr_w2)` with `lokr_w1 (n, m)` and `lokr_w2 (q, p)`, or `lokr_w2_a @ lokr_w2_b` if that is smaller.


def _read_lokr(said: Mapping[str, Any], module: str, tensors: Tensors, source: Source) -> tuple[adapters.Adapter, Tensors]:
    _in_order(source)
    if "lokr_t2" in tensors:
        raise ValueError("has the form of a convolution with a core tensor (`use_effective_conv2d`)")
    factor = said.get("decompose_factor", -1)
    if type(factor) is not int or not (factor > 0 or factor == -1):
        raise ValueError(f"has the `decompose_factor` {factor!r}")
    (n, q), (m, p) = split(source.out_dim, factor), split(source.in_dim, factor)
    if "lokr_w1" in tensors:
        one = _tensor(tensors, "lokr_w1", n, m)
    else:
        left = _tensor(tensors, "lokr_w1_a", n)
        one = left @ _tensor(tensors, "lokr_w1_b", left.shape[1], m)
    said_rank, alpha = _rank_and_alpha(said, module)
    if "lokr_w2" in tensors:  # not factored: one of our factors is the identity
        two = _tensor(tensors, "lokr_w2", q, p).T
        eye = np.eye(min(two.shape), dtype="float32")
        a, b = (two, eye) if two.shape[1] <= two.shape[0] else (eye, two)
    else:
        a, b = _tensor(tensors, "lokr_w2_b", said_rank, p).T, _tensor(tensors, "lokr_w2_a", q, said_rank).T
    return adapters.LoKr(a.shape[1], alpha / said_rank * a.shape[1], factor), {"lokr_c": one.T, "lokr_a": a, "lokr_b": b}


def _write_lokr(parts: Sequence[Part]) -> Tensors:
    part = _whole(parts)
    _in_order(part.source)
    c, a, b = (part.values[key] for key in ("lokr_c", "lokr_a", "lokr_b"))
    if part.adapter.rank >= max(len(a), b.shape[1]) / 2:  # as PEFT decides
        return {"lokr_w1": c.T, "lokr_w2": (a.astype("float64") @ b).T}
    return {"lokr_w1": c.T, "lokr_w2_a": b.T, "lokr_w2_b": a.T}


def _lokr_settings(parts: Mapping[str, Part]) -> dict[str, Any]:
    factor = _one({module: part.adapter.factor for module, part in parts.items()}, "factor")
    return {**_ranks_and_alphas(parts), "decompose_factor": factor, "decompose_both": False, "use_effective_conv2d": False}


def _rank_and_alpha(said: Mapping[str, Any], module: str) -> tuple[int, float]:
    found = []
    for key, patterns in (("r", "rank_pattern"), ("alpha", "alpha_pattern")):
        given = said.get(patterns) or {}
        number = next((each for name, each in given.items() if f".{module}".endswith(f".{name}")), said.get(key, 8))
        if type(number) not in (int, float) or not 0 < number < 1e30:
            raise ValueError(f"has the `{key}` {number!r}")
        found.append(number)
    return int(found[0]), float(found[1])


def _ranks_and_alphas(parts: Mapping[str, Part]) -> dict[str, Any]:
    ranks = {module: part.adapter.rank for module, part in parts.items()}
    alphas = {module: part.adapter.scale * part.adapter.rank for module, part in parts.items()}
    first = next(iter(parts))
    return {
        "r": ranks[first],
        "alpha": alphas[first],
        "rank_pattern": {module: each for module, each in ranks.items() if each != ranks[first]},
        "alpha_pattern": {module: each for module, each in alphas.items() if each != alphas[first]},
        "init_weights": True,
    }


# LoHa: `(hada_w1_a @ hada_w1_b) * (hada_w2_a @ hada_w2_b)`, each `(out, rank) @ (rank, in)`.


def _read_loha(said: Mapping[str, Any], module: str, tensors: Tensors, source: Source) -> tuple[adapters.Adapter, Tensors]:
    if {"hada_t1", "hada_t2"} & tensors.keys():
        raise ValueError("has the form of a convolution with a core tensor (`use_effective_conv2d`)")
    rank, alpha = _rank_and_alpha(said, module)
    weights: Tensors = {}
    for n in (1, 2):
        out = _tensor(tensors, f"hada_w{n}_a", source.out_dim, rank)
        into = _tensor(tensors, f"hada_w{n}_b", rank, source.in_dim)
        weights |= {f"loha_a{n}": into[:, source.ins].T, f"loha_b{n}": out[source.outs].T}
    return adapters.LoHa(rank, alpha), weights


def _write_loha(parts: Sequence[Part]) -> Tensors:
    part = _whole(parts)
    found: Tensors = {}
    for n in (1, 2):
        a, b = part.values[f"loha_a{n}"], part.values[f"loha_b{n}"]
        into, out = np.empty_like(a.T), np.empty_like(b.T)
        into[:, part.source.ins], out[part.source.outs] = a.T, b.T
        found |= {f"hada_w{n}_a": out, f"hada_w{n}_b": into}
    return found


def _loha_settings(parts: Mapping[str, Part]) -> dict[str, Any]:
    return {**_ranks_and_alphas(parts), "use_effective_conv2d": False}


# OFT: `oft_R.weight (blocks, size (size - 1) / 2)`, the entries above the diagonal. PEFT's series is that of Q, and its
# inverse is that of -Q.


def _read_oft(said: Mapping[str, Any], module: str, tensors: Tensors, source: Source) -> tuple[adapters.Adapter, Tensors]:
    _in_order(source, outputs=False)
    q = _tensor(tensors, "oft_R")
    size = (1 + math.isqrt(1 + 8 * q.shape[1])) // 2
    terms = said.get("num_cayley_neumann_terms", 5) if said.get("use_cayley_neumann", True) else None
    terms = 4 if terms == 3 else terms  # as PEFT computes it
    return adapters.OFT(size, terms), {"oft_q": q if terms else -q}


def _write_oft(parts: Sequence[Part]) -> Tensors:
    if any(not np.array_equal(part.values["oft_q"], parts[0].values["oft_q"]) for part in parts):
        raise ValueError("is one weight there, and its kernels have different rotations here")
    if sum(len(part.source.outs) for part in parts) < parts[0].source.out_dim:
        raise ValueError("is a part of one weight there, whose inputs would be rotated for all of it")
    for part in parts:
        _in_order(part.source, outputs=False)
    q = parts[0].values["oft_q"]
    return {"oft_R.weight": q if parts[0].adapter.terms else -q}


def _oft_settings(parts: Mapping[str, Part]) -> dict[str, Any]:
    size = _one({m: part.adapter.block_of(tuple(part.linear.matrix_shape)) for m, part in parts.items()}, "block_size")
    terms = _one({module: part.adapter.terms or 0 for module, part in parts.items()}, "terms")
    series = {"use_cayley_neumann": bool(terms), "num_cayley_neumann_terms": terms or 5}
    return {
        "r": 0,
        "oft_block_size": size,
        "coft": False,
        "block_share": False,
        "init_weights": True,
        **series,
        "bias": "none",
    }


_LINEAR = ("linear",)
FORMATS: dict[str, Format] = {
    "MISS": Format(
        adapters.MiSS,
        ("miss_block",),
        _LINEAR,
        {"init_weights": (True, False)},
        (),
        *(_read_miss, _write_miss, _miss_settings),
    ),
    "IA3": Format(
        adapters.IA3, ("ia3_l",), (*_LINEAR, "transposed", "convolution"), {}, (), _read_ia3, _write_ia3, _ia3_settings
    ),
    "LOKR": Format(
        adapters.LoKr,
        ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
        _LINEAR,
        {},
        ("rank_dropout", "module_dropout"),
        *(_read_lokr, _write_lokr, _lokr_settings),
    ),
    "LOHA": Format(
        adapters.LoHa,
        ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
        (*_LINEAR, "convolution"),
        {},
        ("rank_dropout", "module_dropout"),
        *(_read_loha, _write_loha, _loha_settings),
    ),
    "OFT": Format(
        adapters.OFT,
        ("oft_R",),
        _LINEAR,
        {"coft": (False,), "block_share": (False,)},
        ("module_dropout",),
        *(_read_oft, _write_oft, _oft_settings),
    ),
}
