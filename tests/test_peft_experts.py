"""Banks of experts from and to PEFT, with PEFT and `transformers` themselves on the other side."""

import json

import keras_hub
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
import transformers
from families import MODELS, multimodal, text  # noqa: F401  # entering the families
from helpers import covering
from peft_families import DECODER, FAMILIES, TOKENS
from test_peft import (
    RELATIVE,
    apart,
    assert_both_ways,
    assert_same_tensors,
    assert_trains_here_and_runs_in_peft,
    checkpoints,  # noqa: F401  # a fixture
    config_of,
    export,
    in_peft,
    randomized,
    taken,
    tensors_of,
)

import keras_lora
from keras_lora.interop import from_peft, serving_problems, to_peft
from keras_lora.interop.checkpoints import CheckpointMap

# PEFT compares its patterns of ranks to modules alone, and uses those of parameters all the same.
PATTERNS = "ignore:The following .*_pattern keys did not match any targeted module"
pytestmark = [pytest.mark.torch_first, pytest.mark.filterwarnings(PATTERNS)]

BANKS = [name for name, family in FAMILIES.items() if family.parameters and name != "qwen3_5_moe"]
RARE = pytest.param("qwen3_5_moe", marks=pytest.mark.nightly)
BOTH = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.mark.parametrize("name", [*covering(BANKS, []), RARE])
def test_experts_from_peft_and_back(name, checkpoints, tmp_path):  # noqa: F811
    assert_both_ways(name, checkpoints, tmp_path)
    keys = [key for key in tensors_of(tmp_path / "theirs") if ".experts." in key]
    assert len(keys) == 4 * FAMILIES[name].config.get_text_config().num_hidden_layers
    assert sum(".experts.base_layer.lora_" in key for key in keys) == len(keys) / 2


@pytest.mark.parametrize("name", [*covering(BANKS, [], pytest.mark.nightly), RARE])
def test_experts_trained_here_and_run_in_peft(name, checkpoints, tmp_path):  # noqa: F811
    assert_trains_here_and_runs_in_peft(name, checkpoints, tmp_path)


def test_the_kernels_of_one_parameter_are_stacked_if_their_factors_differ(checkpoints, tmp_path):  # noqa: F811
    """KerasHub's Mixtral has two kernels for `gate_up_proj`. Their ranks add up, and the numbers are exact."""
    family, base = FAMILIES["mixtral"], checkpoints("mixtral")
    options = {
        "targets": "*expert_feedforward*",
        "rank_pattern": {"*intermediate*": 2},
        "alpha_pattern": {"*intermediate*": 9},
    }
    model = keras_lora.apply_lora(family.ours(base), rank=3, alpha=5, **options)
    rng = np.random.default_rng(3)
    for v in model.trainable_variables:
        v.assign(0.1 * rng.normal(size=tuple(v.shape)).astype("float32"))
    export(family, model, tmp_path / "ours")
    said = config_of(tmp_path / "ours")
    assert (said["target_modules"], len(said["target_parameters"])) == ([], 2 * family.config.num_hidden_layers)
    assert {said["r"], *said["rank_pattern"].values()} == {3, 5}
    assert apart(in_peft(family, base, tmp_path / "ours"), family.our_logits(model)) < RELATIVE
    again = taken(family, base, tmp_path / "ours")
    assert apart(family.our_logits(again), family.our_logits(model)) < 1e-6


VARIANTS = {
    "one parameter and the router, by patterns": {
        "target_modules": ["v_proj"],
        "target_parameters": ["gate_up_proj", "mlp.gate.weight"],
        "use_rslora": True,
        "rank_pattern": {"gate.weight": 4, "experts.gate_up_proj": 2},
        "alpha_pattern": {"gate_up_proj": 9},
    },
    "experts alone": {"target_modules": [], "target_parameters": BOTH, "rank_pattern": {"down_proj": 7}},
    "the other parameter": {"target_modules": [], "target_parameters": ["down_proj"]},
    "a router trained itself": {"target_modules": [], "target_parameters": BOTH, "modules_to_save": ["gate"]},
    "experts trained themselves": {"target_modules": ["q_proj"], "modules_to_save": ["experts"]},
}


@pytest.mark.parametrize(
    "variant", [pytest.param(each, marks=pytest.mark.nightly if number else ()) for number, each in enumerate(VARIANTS)]
)
def test_variants_of_experts(variant, checkpoints, tmp_path):  # noqa: F811
    assert_both_ways("qwen3_moe", checkpoints, tmp_path, **VARIANTS[variant])


@pytest.mark.nightly
def test_a_router_by_lora_is_written_by_its_parameter(checkpoints, tmp_path):  # noqa: F811
    """It is no linear layer in `transformers` 5."""
    for name, router in {"mixtral": "*sparse_feedforward_gate_dense", "gpt_oss": "*router_dense"}.items():
        family, base = FAMILIES[name], checkpoints(name)
        model = keras_lora.apply_lora(family.ours(base), keras_lora.LoRA(2, dropout=0.1), targets=["*query*", router])
        for number, v in enumerate(model.trainable_variables):
            v.assign(np.random.default_rng(number).normal(size=tuple(v.shape)) * 0.1)
        with pytest.warns(UserWarning, match="trained with dropout, and PEFT has none where it adapts parameters"):
            export(family, model, tmp_path / name)
        named = {"mixtral": "gate", "gpt_oss": "router"}[name]
        assert f"model.layers.0.mlp.{named}.weight" in config_of(tmp_path / name)["target_parameters"]
        assert apart(in_peft(family, base, tmp_path / name), family.our_logits(model)) < RELATIVE
        assert apart(family.our_logits(taken(family, base, tmp_path / name)), family.our_logits(model)) < 1e-6
    dora = keras_lora.apply_lora(FAMILIES["mixtral"].ours(checkpoints("mixtral")), "dora", targets="*feedforward_gate_dense")
    with pytest.raises(ValueError, match=r"(?s)is a bank of experts, for which PEFT has no DoRA.*it has no DoRA for its"):
        to_peft(dora, tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.nightly
def test_experts_of_gemma4_are_those_of_the_model_that_peft_merges(tmp_path):
    """Such a small Gemma 4 has other logits in KerasHub than in `transformers`, so both sides are KerasHub's here."""
    sizes = {**DECODER, "head_dim": 4, "global_head_dim": 4, "num_global_key_value_heads": 2, "sliding_window": 8}
    sizes |= {"num_experts": 5, "top_k_experts": 2, "moe_intermediate_size": 12, "enable_moe_block": True}
    sizes |= {"layer_types": ["sliding_attention", "full_attention"], "hidden_size_per_layer_input": 0}
    torch.manual_seed(0)
    theirs = transformers.Gemma4ForCausalLM(transformers.Gemma4TextConfig(**sizes, num_kv_shared_layers=0))
    theirs.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], target_parameters=BOTH)
    model = randomized(peft.get_peft_model(theirs, config))
    model.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")

    def logits(model):
        places = np.tile(np.arange(TOKENS.shape[1], dtype="int32"), (2, 1))
        return model.predict({"token_ids": TOKENS, "padding_mask": np.ones_like(TOKENS), "position_ids": places}, verbose=0)

    def ours(name):
        return keras_hub.models.Gemma4Backbone.from_preset(str(tmp_path / name))

    wanted, adapted = logits(ours("merged")), from_peft(ours("base"), tmp_path / "theirs")
    assert apart(logits(ours("base")), wanted) > 1e-2
    assert apart(logits(adapted), wanted) < RELATIVE
    to_peft(adapted, tmp_path / "ours")
    assert_same_tensors(tmp_path / "ours", tmp_path / "theirs")


# Adapters of `transformers` 4, where each expert is a module.

OF_ONE = {
    "mixtral": ("block_sparse_moe", {"w1": ("gate_up_proj", 0), "w3": ("gate_up_proj", 1), "w2": ("down_proj", None)}),
    "qwen3_moe": (
        "mlp",
        {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1), "down_proj": ("down_proj", None)},
    ),
}


def single_experts(family, names, base, folder, rank=3, alpha=5, **config):
    """Write such an adapter, and return the model of `transformers` with the change added to its weights."""
    module, of = names
    rng, model, tensors = np.random.default_rng(0), family.theirs(base), {}
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    for i, layer in enumerate(model.model.layers):
        for name, (parameter, half) in of.items():
            weight = getattr(layer.mlp.experts, parameter).data
            number, out_dim, in_dim = weight.shape
            rows = slice(None) if half is None else slice(half * out_dim // 2, (half + 1) * out_dim // 2)
            for expert in range(number):
                a = rng.normal(size=(rank, in_dim)).astype("float32")
                b = 0.1 * rng.normal(size=(weight[expert, rows].shape[0], rank)).astype("float32")
                weight[expert, rows] += torch.tensor(scale * b @ a)
                key = f"base_model.model.model.layers.{i}.{module}.experts.{expert}.{name}.lora_"
                tensors |= {f"{key}A.weight": a, f"{key}B.weight": b}
    folder.mkdir()
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    said = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": list(of), **config}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return model


@pytest.mark.parametrize("stabilized", [True, pytest.param(False, marks=pytest.mark.nightly)], ids=["rslora", "lora"])
@pytest.mark.parametrize("name", ["qwen3_moe", *covering(["mixtral"], [], pytest.mark.nightly)])
def test_an_adapter_of_single_experts_is_read_and_written_as_one_of_banks(name, stabilized, checkpoints, tmp_path):  # noqa: F811
    family, base = FAMILIES[name], checkpoints(name)
    model = single_experts(family, OF_ONE[name], base, tmp_path / "old", use_rslora=stabilized)
    wanted = family.their_logits(model)
    ours = taken(family, base, tmp_path / "old")
    assert apart(family.our_logits(ours), wanted) < 1e-5
    fused = {"mixtral": 3, "qwen3_moe": 6}[name]  # two halves with a rank each
    assert {v.shape[-1] for v in ours.trainable_variables if v.name == "lora_a"} == {3, fused}
    export(family, ours, tmp_path / "new")
    assert apart(in_peft(family, base, tmp_path / "new"), wanted) < 1e-5
    if not stabilized:  # PEFT 0.21 doubles rank and alpha, which is another scale with a square root
        assert apart(in_peft(family, base, tmp_path / "old"), wanted) < 1e-5


def test_what_is_no_whole_bank_is_refused_and_nothing_changes(checkpoints, tmp_path):  # noqa: F811
    family, base = FAMILIES["qwen3_moe"], checkpoints("qwen3_moe")
    single_experts(family, OF_ONE["qwen3_moe"], base, tmp_path / "old")
    model, said, tensors = family.ours(base), config_of(tmp_path / "old"), tensors_of(tmp_path / "old")
    before = family.our_logits(model)

    def refused(match, more, kept):
        folder = tmp_path / "bad"
        folder.mkdir(exist_ok=True)
        safetensors.numpy.save_file(kept, folder / "adapter_model.safetensors", {"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps({**said, **more}))
        with pytest.raises(ValueError, match=match):
            from_peft(model, folder)

    some = {key: each for key, each in tensors.items() if ".experts.2.up_proj" not in key}
    refused(r"has 4 modules of single experts.*expected are 5 experts with one rank", {}, some)
    refused(r"with the ranks and alphas \[\(3, 5\), \(4, 5\)\]", {"rank_pattern": {"experts.1.up_proj": 4}}, tensors)
    refused("is a bank of experts with DoRA", {"use_dora": True}, tensors)
    one = {"base_model.model.model.layers.0.mlp.experts.lora_A.weight": np.ones((15, 16), "float32")}
    one["base_model.model.model.layers.0.mlp.experts.lora_B.weight"] = np.ones((24, 15), "float32")
    targets = {"target_parameters": ["experts.gate_up_proj"]}
    refused(
        r"has 1 LoRA, one around the other, and .* names \['gate_up_proj', 'down_proj'\]", {"target_parameters": BOTH}, one
    )
    refused("'model.layers.0.mlp.experts' is no kernel of this model", {}, one)
    refused(r"for 5 experts and rank 4, .* expected are \(20, 16\) and \(24, 20\)", {**targets, "r": 4}, one)
    refused("has a LoRA for all experts, and others for single ones", targets, tensors | one)
    named = {key.replace("experts.", "experts.down_proj."): each for key, each in one.items()}
    refused("is a parameter of experts, whose LoRA has the name of its module", {}, named)
    assert np.array_equal(family.our_logits(model), before)


def test_serving_programs_do_not_read_experts(checkpoints, tmp_path):  # noqa: F811
    family = FAMILIES["qwen3_moe"]
    model = keras_lora.apply_lora(family.ours(checkpoints("qwen3_moe")), rank=1, targets="*expert*")
    with pytest.raises(ValueError, match="it has adapted parameters"):
        to_peft(model, tmp_path / "ours", bake_scaling=True)
    to_peft(model, tmp_path / "ours")
    assert all("it has adapted parameters" in str(each) for each in serving_problems(tmp_path / "ours").values())


@pytest.mark.parametrize(
    "name",
    covering(
        ["gpt_oss/GptOssBackbone", "mixtral/MixtralBackbone", "qwen_moe/QwenMoeBackbone", "qwen3_moe/Qwen3MoeBackbone"]
        + ["qwen3_5_moe/Qwen3_5MoeBackbone", "gemma4_moe/Gemma4Backbone"],
        ["gpt_oss/GptOssBackbone"],
        pytest.mark.nightly,
    ),
)
def test_every_kernel_of_a_mixture_has_a_place(name):
    checkpoint = CheckpointMap(MODELS[name]()[0])
    assert checkpoint.bank_parameters[0] == "gate_up_proj"
    assert {checkpoint.source_of(address).kind for address in checkpoint.maps} <= {"bank", "linear", "embedding"}
