"""LoRA on a mesh of eight devices with `keras.distribution`: the losses are those of one device.

    python examples/devices_jax.py

The eight devices are simulated on a CPU. Two of them share the batch, four the kernels, as KerasHub's layout map says; the
factors follow their kernels. The model is a tiny Llama with random weights. JAX only.
"""

import math
import os

os.environ["KERAS_BACKEND"] = "jax"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import keras
import keras_hub
import numpy as np

import keras_lora

RNG = np.random.default_rng(0)
TOKENS = RNG.integers(1, 64, (8, 17))


def train(distribution) -> tuple[list[float], int]:
    """Return the losses of a few steps and the bytes of the factors on one device."""
    keras.distribution.set_distribution(distribution)  # before the model is built
    keras.utils.set_random_seed(0)
    backbone = keras_hub.models.LlamaBackbone(
        vocabulary_size=64, num_layers=2, num_query_heads=4, num_key_value_heads=4, hidden_dim=32, intermediate_dim=64
    )
    model = keras_hub.models.LlamaCausalLM(backbone=backbone, preprocessor=None)
    keras_lora.apply_lora(model, keras_lora.DoRA(rank=4, dropout=0.1, seed=0))
    model.compile(keras.optimizers.Adam(1e-2), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x = {"token_ids": TOKENS[:, :-1], "padding_mask": np.ones((8, 16), "int32")}
    losses = model.fit(x, TOKENS[:, 1:], batch_size=8, epochs=4, shuffle=False, verbose=0).history["loss"]
    shards = [v.value.addressable_shards[0].data for v in model.trainable_variables]
    return losses, sum(4 * math.prod(shard.shape) for shard in shards)


def main() -> None:
    mesh = keras.distribution.DeviceMesh((2, 4), ("batch", "model"))
    layout_map = keras_hub.models.LlamaBackbone.get_layout_map(mesh)
    one, bytes_on_one = train(None)
    eight, bytes_on_each = train(keras.distribution.ModelParallel(layout_map=layout_map))
    print("one device:   ", *(f"{loss:.6f}" for loss in one), f"({bytes_on_one:,} bytes of factors)")
    print("eight devices:", *(f"{loss:.6f}" for loss in eight), f"({bytes_on_each:,} bytes of factors on each)")
    if not np.allclose(one, eight, rtol=0, atol=1e-5) or bytes_on_each >= bytes_on_one / 2:
        raise SystemExit("The losses must be equal, and the factors of a device must be smaller.")
    print("The losses are equal.")


if __name__ == "__main__":
    main()
