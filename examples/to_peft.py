"""Fine-tune SmolLM2 in Keras, use the adapter in Hugging Face's PEFT in PyTorch, and read it back into Keras.

    python examples/to_peft.py [--quick]       # after `make .venv/tests`, which installs what it needs

A language model of 135 million parameters learns to write film reviews, on JAX, TensorFlow or PyTorch (KERAS_BACKEND). Its
adapter is written in PEFT's format twice: with its scale in the config, and with `bake_scaling=True` in the factors, for
programs that read only a part of the config. PEFT loads both into the model of Hugging Face's transformers. Its logits and
greedily generated tokens must be the same as in Keras. Then fresh Keras models read the folders, and write them again.

A difference of logits is the largest over eight test sentences, as a share of the largest logit. The learning rate was not
tuned.
"""

import argparse
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch  # before TensorFlow, which KerasHub imports: the other order crashes in one process

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np
import peft
import smollm2
from movie_reviews_data import CACHE, keras_hub, load_texts
from rich.console import Console
from rich.table import Table

import keras_lora
from keras_lora.interop import from_peft, to_peft

warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # PEFT 0.21 asks for it
PROMPT = "This film"
NEW_TOKENS = 16
TOLERANCE = 1e-4
FILES = ["adapter_config.json", "adapter_model.safetensors"]
WAYS: dict[str, dict[str, Any]] = {"plain": {}, "baked": {"bake_scaling": True}}


def next_tokens(texts: list[str], length: int) -> tuple[dict, np.ndarray, np.ndarray]:
    """Tokens, the next token after each, and a mask that is 1 for tokens of the sentence and 0 for padding."""
    tokenizer = smollm2.load_tokenizer()
    tokenizer.enable_truncation(length + 1)
    tokenizer.enable_padding(length=length + 1)
    encoded = tokenizer.encode_batch(texts)
    ids, mask = (np.array([getattr(each, name) for each in encoded], "int32") for name in ("ids", "attention_mask"))
    return {"token_ids": ids[:, :-1], "padding_mask": mask[:, :-1]}, ids[:, 1:], mask[:, 1:]


def fine_tune(model: keras.Model, train: tuple, test: tuple, batch: int) -> tuple[float, float]:
    """Train an adapter, and return the perplexity on the test sentences before and after."""
    keras.utils.set_random_seed(0)
    keras_lora.apply_lora(model, rank=4)
    model.compile(
        optimizer=keras.optimizers.AdamW(1e-3, weight_decay=0.0),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="mean_with_sample_weight"),
        weighted_metrics=[keras_hub.metrics.Perplexity(from_logits=True)],
        sampler="greedy",
    )

    def perplexity() -> float:
        return model.evaluate(test[0], test[1], batch, sample_weight=test[2], verbose=0, return_dict=True)["perplexity"]

    before = perplexity()
    model.fit(train[0], train[1], sample_weight=train[2], batch_size=batch, shuffle=False)
    return before, perplexity()


def logits_in_keras(model: keras.Model, x: dict) -> np.ndarray:
    """The logits after each token, without those after padding."""
    return keras.ops.convert_to_numpy(model(x, training=False))[x["padding_mask"] == 1]


def logits_in_torch(model: torch.nn.Module, x: dict) -> np.ndarray:
    with torch.no_grad():
        logits = model(torch.tensor(x["token_ids"]), attention_mask=torch.tensor(x["padding_mask"])).logits
    return logits.numpy()[x["padding_mask"] == 1]


def generate_in_keras(model: keras.Model, prompt: list[int]) -> list[int]:
    ids, mask = np.zeros((2, 1, len(prompt) + NEW_TOKENS), "int32")
    ids[0, : len(prompt)], mask[0, : len(prompt)] = prompt, 1
    return model.generate({"token_ids": ids, "padding_mask": mask}, stop_token_ids=None)["token_ids"][0].tolist()


def generate_in_torch(model: torch.nn.Module, prompt: list[int]) -> list[int]:
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "eos_token_id": None}
    ids = torch.tensor([prompt])
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0].tolist()


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two blocks of thirty: shows that it runs, not how well")
    quick = parser.parse_args().quick
    blocks, length, batch, steps, tests = (2, 16, 4, 3, 8) if quick else (smollm2.BLOCKS, 48, 8, 40, 160)
    texts, _ = load_texts()
    train, test = next_tokens(texts[: steps * batch], length), next_tokens(texts[-tests:], length)
    few, tokenizer = {name: each[:8] for name, each in test[0].items()}, smollm2.load_tokenizer()
    prompt, base_model = tokenizer.encode(PROMPT).ids, str(smollm2.checkpoint())
    table = Table("logits of", "compared with", "difference", "also")
    differences: list[float] = []
    same: list[bool] = []

    def check(who: str, found: np.ndarray, other: str, expected: np.ndarray, **alike: bool) -> None:
        differences.append(difference(found, expected))
        same.extend(alike.values())
        table.add_row(
            who, other, f"{differences[-1]:.1e}", *(f"{'same' if yes else 'OTHER'} {what}" for what, yes in alike.items())
        )

    model = smollm2.load_keras(blocks)
    untuned = logits_in_keras(model, few)
    check("transformers, base", logits_in_torch(smollm2.load_torch(blocks), few), "Keras, base", untuned)
    before, after = fine_tune(model, train, test, batch)
    print(f"perplexity of {tests} test sentences: {before:.4g} before, {after:.4g} after")
    tuned, written = logits_in_keras(model, few), generate_in_keras(model, prompt)
    print(f"Keras writes:       {tokenizer.decode(written)!r}")

    with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
        folders = {way: Path(temporary) / way for way in WAYS}
        for way, folder in folders.items():
            to_peft(model, folder, prefix="", base_model=base_model, **WAYS[way])
            peft_model = peft.PeftModel.from_pretrained(smollm2.load_torch(blocks), str(folder)).eval()
            tokens = generate_in_torch(peft_model, prompt)
            print(f"PEFT writes, {way}: {tokenizer.decode(tokens)!r}")
            check(f"PEFT, {way}", logits_in_torch(peft_model, few), "Keras, tuned", tuned, tokens=tokens == written)
        for way, folder in folders.items():
            fresh, again = smollm2.load_keras(blocks), Path(temporary) / "again" / way
            from_peft(fresh, folder)
            to_peft(fresh, again, prefix="", base_model=base_model)
            alike = all((folder / file).read_bytes() == (again / file).read_bytes() for file in FILES)
            check(f"Keras, from {way}", logits_in_keras(fresh, few), "Keras, tuned", tuned, files=alike)

    Console().print(table)
    print(f"The adapter itself changes them by {difference(tuned, untuned):.1e}; {keras_lora.list_adapters(model).total}")
    if not (max(differences) <= TOLERANCE < difference(tuned, untuned) and all(same)):  # so written, NaN fails too
        raise SystemExit(f"The differences must be at most {TOLERANCE:.0e}, below that change, and all else the same.")


if __name__ == "__main__":
    main()
