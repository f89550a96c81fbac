"""What happens on a mesh of eight devices, as JSON: `tests/test_devices.py` runs this in a process of its own.

    python tests/devices_on_jax.py small | llama | gemma

JAX reads the number of simulated devices when it starts. All sizes are powers of two, but the tokens and the rank are
multiples of three, so the size of a gathered array shows whether it belongs to a kernel.
"""

from __future__ import annotations

import collections
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import keras
import numpy as np

import keras_lora

RANK, WORDS, WIDTH = 3, 64, 32
#: No vector of a model is as large, and every part of a kernel is larger.
LEAST = 65
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(1, WORDS, (8, 13)).astype("int32")
X, Y = TOKENS[:, :-1], TOKENS[:, 1:]


def mesh() -> keras.distribution.DeviceMesh:
    return keras.distribution.DeviceMesh((2, 4), ("batch", "model"))


def small_layouts(patterns: Any = ()) -> keras.distribution.ModelParallel:
    layouts = keras.distribution.LayoutMap(mesh())
    for pattern, axes in {**SMALL, **dict(patterns)}.items():
        layouts[pattern] = axes
    return keras.distribution.ModelParallel(layout_map=layouts)


#: One layer for each case: both axes, the first of two merged axes, the second of two, and the same for inputs.
SMALL = {
    "embedding/embeddings": ("model", "batch"),
    "up/kernel": ("batch", "model"),
    "first_out/kernel": ("batch", "model", None),
    "first_in/kernel": ("model", None, "batch"),
    "second_out/kernel": (None, None, "model"),
    "second_in/kernel": (None, "model", None),
}


def small() -> keras.Model:
    def einsum(name: str, equation: str, shape: tuple[int, ...]) -> keras.layers.Layer:
        return keras.layers.EinsumDense(equation, (None, *shape), name=name)

    x = inputs = keras.Input((12,), dtype="int32")
    x = keras.layers.Embedding(WORDS, WIDTH, name="embedding")(x)
    x = keras.layers.Dense(2 * WIDTH, activation="gelu", name="up")(x)
    for axis in ("first", "second"):
        x = einsum(f"{axis}_out", "btd,dnh->btnh", (4, 16))(x)
        x = keras.ops.tanh(x)
        x = einsum(f"{axis}_in", "btnh,nhd->btd", (2 * WIDTH,))(x)
    return keras.Model(inputs, keras.layers.Dense(WORDS, name="head")(x))


def kernel_gathers(model: keras.Model, x: Any, y: Any) -> collections.Counter[int]:
    """The sizes of the kernels, or parts of kernels, that a compiled step of training gathers."""
    trained, frozen = ([v.value for v in vs] for vs in (model.trainable_variables, model.non_trainable_variables))

    def loss(trained: Any, frozen: Any, x: Any, y: Any) -> Any:
        out, _ = model.stateless_call(trained, frozen, x, training=True)
        return keras.ops.mean(keras.losses.sparse_categorical_crossentropy(y, out, from_logits=True))

    distribution: Any = keras.distribution.distribution()
    x, y = keras.tree.map_structure(
        lambda a: jax.device_put(a, distribution.get_data_layout(a.shape).backend_layout), (x, y)
    )
    text = jax.jit(jax.grad(loss)).lower(trained, frozen, x, y).compile().as_text()
    shapes = re.findall(r"\w+\[([\d,]*)\]\S*(?:, [^=]*)? all-gather(?:-start)?\(", text)
    sizes = [math.prod(int(size) for size in shape.split(",") if size) for shape in shapes]
    return collections.Counter(size for size in sizes if size % 3 and size >= LEAST)


def losses(model: keras.Model, x: Any, y: Any) -> list[float]:
    model.compile(keras.optimizers.Adam(1e-2), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    history: Any = model.fit(x, y, batch_size=8, epochs=3, shuffle=False, verbose=0)
    return [float(loss) for loss in history.history["loss"]]


def layouts_of(model: keras.Model) -> dict[str, list[str | None]]:
    """The layout of every weight of an adapter, by the last parts of its path."""
    of_adapters = [v for v in model.variables if "/lora" in v.path or "/dora" in v.path]
    return {v.path: [*v.value.sharding.spec, *[None] * (v.value.ndim - len(v.value.sharding.spec))] for v in of_adapters}


def bytes_of(model: keras.Model) -> list[int]:
    """The bytes of what trains, in all and on one device."""
    arrays = [v.value for v in model.trainable_variables]
    return [sum(a.nbytes for a in arrays), sum(a.addressable_shards[0].data.nbytes for a in arrays)]


def adapted(make: Callable[[], Any], method: str) -> Any:
    keras.utils.set_random_seed(0)
    adapter = {"lora": keras_lora.LoRA, "dora": keras_lora.DoRA}[method](rank=RANK, seed=1)
    extra = {"targets": [keras.layers.Dense, keras.layers.EinsumDense, "embedding"], "head": None} if make is small else {}
    return keras_lora.apply_lora(make(), adapter, **extra)


def compared(make: Callable[[], Any], method: str, distribution: Any, x: Any, y: Any) -> dict[str, Any]:
    keras.distribution.set_distribution(None)
    one = losses(adapted(make, method), x, y)
    keras.distribution.set_distribution(distribution)
    model = adapted(make, method)
    base = {v.path: np.asarray(v.value) for v in model.non_trainable_variables}
    found = {"layouts": layouts_of(model), "bytes": bytes_of(model), "gathers": kernel_gathers(model, x, y)}
    many = losses(model, x, y)
    same = all(np.array_equal(base[v.path], v.value) for v in model.non_trainable_variables if "norm_squared" not in v.path)
    return found | {"one": one, "many": many, "base_unchanged": same}


def message(function: Callable[[], Any]) -> str:
    try:
        function()
    except ValueError as error:
        return str(error)
    return ""


def cases_of_small() -> dict[str, Any]:
    distribution = small_layouts()
    found = {"dora": compared(small, "dora", distribution, X, Y), "plain": {"gathers": kernel_gathers(small(), X, Y)}}
    model = adapted(small, "lora")
    model.get_layer("up").adapter.lora_b.assign(RNG.normal(size=(RANK, 2 * WIDTH)))
    found["lora"] = layouts_of(model)
    with tempfile.TemporaryDirectory() as folder:
        keras_lora.save_adapter(model, f"{folder}/a.safetensors")
        model.save(f"{folder}/model.keras")
        loaded = keras.saving.load_model(f"{folder}/model.keras")
        filled = keras_lora.load_adapter(small(), f"{folder}/a.safetensors")
    found["loaded"], found["filled"] = layouts_of(loaded), layouts_of(filled)
    equal = [np.array_equal(v.value, w.value) for v, w in zip(model.weights, loaded.weights, strict=True)]
    found["loaded_equal"] = all(equal)
    merged = keras_lora.merge_lora(loaded)
    found["merged"] = list(merged.get_layer("up").kernel.value.sharding.spec)
    keras.distribution.set_distribution(small_layouts({".*up/lora/lora_b": (None, "batch")}))
    found["own"] = layouts_of(adapted(small, "lora"))
    found["late"] = late(distribution)
    return found


def late(distribution: Any) -> dict[str, str]:
    """The errors about a distribution that was set at the wrong time, and the adapters in the model after it."""
    keras.distribution.set_distribution(None)
    model = small()
    of_adapted = adapted(small, "lora")
    of_adapted.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    keras.distribution.set_distribution(distribution)
    found = {"before_apply": message(lambda: keras_lora.apply_lora(model))}
    found["class"] = type(model.layers[2]).__module__
    found["before_fit"] = message(lambda: of_adapted.fit(X, Y, verbose=0))
    laid_out = small()
    keras.distribution.set_distribution(None)
    found["gone"] = message(lambda: keras_lora.apply_lora(laid_out))
    return found


def cases_of_hub(name: str) -> dict[str, Any]:
    import keras_hub

    backbone_class = getattr(keras_hub.models, f"{name}Backbone")
    heads = {"num_query_heads": 4, "num_key_value_heads": 4} | ({"head_dim": 8} if name == "Gemma" else {})

    def make() -> Any:
        size = {"vocabulary_size": WORDS, "num_layers": 2, "hidden_dim": WIDTH, "intermediate_dim": 2 * WIDTH}
        backbone = backbone_class(**size, **heads)
        return getattr(keras_hub.models, f"{name}CausalLM")(backbone=backbone, preprocessor=None)

    x = {"token_ids": X, "padding_mask": np.ones_like(X)}
    parallel = keras.distribution.ModelParallel(layout_map=backbone_class.get_layout_map(mesh()))
    found: dict[str, Any] = {method: compared(make, method, parallel, x, Y) for method in ("lora", "dora")}
    found["plain"] = {"gathers": kernel_gathers(make(), x, Y)}
    found["data"] = compared(make, "lora", keras.distribution.DataParallel(), x, Y)
    return found


if __name__ == "__main__":
    which = sys.argv[1]
    print(json.dumps(cases_of_small() if which == "small" else cases_of_hub(which.capitalize())))
