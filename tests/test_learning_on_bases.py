"""Tiny language models learn on a base in fewer digits as they do on a float one."""

import keras
import keras_hub
import numpy as np
import pytest

import keras_lora

pytestmark = [pytest.mark.nightly, pytest.mark.filterwarnings("ignore:The use of `x.T` on tensors:UserWarning")]
WORDS, LENGTH = 40, 12
HIDDEN = {"vocabulary_size": WORDS, "num_layers": 2, "hidden_dim": 32, "intermediate_dim": 64}
GROUPED = {**HIDDEN, "num_query_heads": 2, "num_key_value_heads": 1}


def gemma():
    backbone = keras_hub.models.GemmaBackbone(**GROUPED, head_dim=16)
    return keras_hub.models.GemmaCausalLM(backbone=backbone, preprocessor=None)


def llama():
    return keras_hub.models.LlamaCausalLM(backbone=keras_hub.models.LlamaBackbone(**GROUPED), preprocessor=None)


def gpt2():
    backbone = keras_hub.models.GPT2Backbone(**HIDDEN, num_heads=2, max_sequence_length=LENGTH)
    return keras_hub.models.GPT2CausalLM(backbone=backbone, preprocessor=None)


def fall(make, base_dtype):
    """The loss before, and how far it falls in 8 epochs, on sentences whose next word follows from the last."""
    keras.utils.set_random_seed(3)
    model = make()
    follows = np.random.default_rng(0).permutation(WORDS)
    tokens = np.random.default_rng(1).integers(0, WORDS, (64, 1))
    for _ in range(LENGTH):
        tokens = np.concatenate([tokens, follows[tokens[:, -1:]]], axis=1)
    x = {"token_ids": tokens[:, :-1], "padding_mask": np.ones((64, LENGTH), "int32")}
    targets = [lambda layer: isinstance(layer, (keras.layers.Dense, keras.layers.EinsumDense)), "token_embedding"]
    keras_lora.apply_lora(model, keras_lora.LoRA(8, seed=0), targets=targets, base_dtype=base_dtype)
    model.compile(keras.optimizers.Adam(1e-2), keras.losses.SparseCategoricalCrossentropy(from_logits=True))

    def loss():
        found = model.evaluate(x, tokens[:, 1:], batch_size=16, verbose=0)
        return found[0] if isinstance(found, list) else found

    before = loss()
    model.fit(x, tokens[:, 1:], batch_size=16, epochs=8, shuffle=False, verbose=0)
    return before, before - loss()


@pytest.mark.parametrize("make", [gemma, llama, gpt2], ids=lambda make: make.__name__)
def test_the_loss_falls_as_far_as_on_a_float_base(make):
    before, expected = fall(make, None)
    assert expected > 0.3 * before
    for base_dtype in ("int8", "int4", "nf4"):
        found = fall(make, base_dtype)[1]
        print(f"{make.__name__} {base_dtype}: falls by {found:.3f}, the float base by {expected:.3f} from {before:.3f}")
        assert abs(found - expected) < 0.1 * expected, base_dtype
