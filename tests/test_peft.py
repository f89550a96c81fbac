"""Adapters from and to PEFT, with PEFT and `transformers` themselves on the other side."""

import importlib
import json
import warnings

import keras
import keras_hub
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
import transformers
from families import MODELS, multimodal, text, vision  # noqa: F401  # entering the families
from helpers import covering, value
from peft_families import FAMILIES

import keras_lora
from keras_lora.interop import from_peft, serving_problems, to_peft, transformers_names
from keras_lora.interop.checkpoints import CheckpointMap

RELATIVE = 1e-4
# KerasHub compiles its tasks when they are made.
pytestmark = pytest.mark.torch_first
FULL = pytest.mark.full


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Where the checkpoint of each family lies, written when it is first asked for."""
    made = {}

    def of(name):
        if name not in made:
            made[name] = FAMILIES[name].checkpoint(tmp_path_factory.mktemp(name) / "base")
        return made[name]

    return of


def apart(found, wanted):
    return np.abs(found - wanted).max() / np.abs(wanted).max()


def randomized(model, size=0.1):
    """Random numbers in all that a PEFT adapter has."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, each in model.named_parameters():
            drawn = size * torch.randn(each.shape, generator=generator)
            if "magnitude" in name:
                each.mul_(1 + drawn)
            elif "lora_" in name:
                each.copy_(drawn)
            elif each.requires_grad:  # trained beside: biases, heads, tokens
                each.add_(drawn)
    return model


def tensors_of(folder):
    return safetensors.numpy.load_file(folder / "adapter_model.safetensors")


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def their_adapter(family, base, folder, **config):
    """A PEFT adapter with random numbers in `folder`, and the logits of the model that has it."""
    targets = {"target_modules": family.targets, "target_parameters": list(family.parameters), "r": 3, "lora_alpha": 5}
    targets |= {"target_parameters": None} | config if "target_modules" in config else config
    heads = {} if not family.names else {"modules_to_save": sorted({each.split(".")[0] for each in family.names.values()})}
    model = randomized(peft.get_peft_model(family.theirs(base), peft.LoraConfig(**{**heads, **targets})))
    model.save_pretrained(folder, save_embedding_layers=False)
    return family.their_logits(model)


def in_peft(family, base, folder):
    """The logits of PEFT with the adapter in a folder, which it must load without a warning about keys."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(family.theirs(base), folder)
    said = [str(each.message) for each in caught]
    # PEFT compares patterns to modules, and uses those of experts all the same.
    said = [each for each in said if not ("keys did not match any targeted module" in each and "_proj'" in each)]
    assert not [each for each in said if "key" in each.lower() or "fan_in" in each or "unexpected" in each.lower()], said
    return family.their_logits(model)


def taken(family, base, folder):
    model = family.ours(base)
    from_peft(model, folder, names=family.names)
    return model


def export(family, model, folder, **arguments):
    to_peft(model, folder, prefix=family.prefix, names=family.names, **arguments)


def assert_same_tensors(found, wanted):
    found, wanted = tensors_of(found), tensors_of(wanted)
    assert found.keys() == wanted.keys()
    for key, each in wanted.items():
        assert (found[key].dtype, found[key].shape) == (each.dtype, each.shape), key
        assert found[key].tobytes() == each.tobytes(), key


def assert_both_ways(name, checkpoints, folder, exact=True, **config):
    """From PEFT to Keras and back."""
    family, base = FAMILIES[name], checkpoints(name)
    wanted = their_adapter(family, base, folder / "theirs", **config)
    model = taken(family, base, folder / "theirs")
    assert apart(family.their_logits(family.theirs(base)), wanted) > 1e-2
    assert apart(family.our_logits(model), wanted) < RELATIVE
    export(family, model, folder / "ours")
    if exact:
        assert_same_tensors(folder / "ours", folder / "theirs")
    assert apart(in_peft(family, base, folder / "ours"), wanted) < 1e-6
    return model


#: Without mixtures of experts, which `test_peft_experts.py` has.
DENSE = [name for name, family in FAMILIES.items() if not family.parameters]


@pytest.mark.parametrize("name", covering(DENSE, [], pytest.mark.full))
def test_the_base_is_the_same(name, checkpoints):
    family, base = FAMILIES[name], checkpoints(name)
    if not family.names:  # a head that no converter knows is random here
        assert apart(family.our_logits(family.ours(base)), family.their_logits(family.theirs(base))) < RELATIVE


@pytest.mark.parametrize("name", covering(DENSE, ["bert"], FULL, quick=["gpt2", "llama", "vit"]))
def test_from_peft_and_back(name, checkpoints, tmp_path):
    assert_both_ways(name, checkpoints, tmp_path)


@pytest.mark.parametrize("name", covering(DENSE, [], pytest.mark.full))
def test_trained_here_and_run_in_peft(name, checkpoints, tmp_path):
    assert_trains_here_and_runs_in_peft(name, checkpoints, tmp_path)


def assert_trains_here_and_runs_in_peft(name, checkpoints, tmp_path):
    family, base = FAMILIES[name], checkpoints(name)
    model = family.ours(base)
    heads = list(family.names)
    keras_lora.apply_lora(model, rank=2, alpha=7, train=heads or None)
    trainer = keras.Model(model.inputs, model.outputs)  # without what KerasHub's tasks compile with
    eager = keras.backend.backend() == "tensorflow"  # where two steps take less time than compiling one
    trainer.compile(keras.optimizers.Adam(0.05), keras.losses.MeanSquaredError(), run_eagerly=eager, jit_compile=False)
    target = np.random.default_rng(2).normal(size=family.our_logits(model).shape)
    before = family.our_logits(model)
    trainer.fit(family.inputs, target, epochs=2, verbose=0)
    wanted = family.our_logits(model)
    assert apart(wanted, before) > 1e-3
    export(family, model, tmp_path / "ours")
    assert apart(in_peft(family, base, tmp_path / "ours"), wanted) < RELATIVE


# What else the format has.

VARIANTS = {
    "rank-stabilized": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"layers.0.self_attn.q_proj": 5, "down_proj": 2},
        "alpha_pattern": {"v_proj": 9, ".*gate_proj": 2},
    },
    "one pattern of a regular expression": {
        "rank_pattern": {r"model\.layers\.\d+\.self_attn\.q_proj": 6},
        "use_rslora": True,
    },
    "dora": {"use_dora": True},
    "dora, rank-stabilized": {"use_dora": True, "use_rslora": True, "rank_pattern": {"v_proj": 1}},
    "embeddings and a head": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "an embedding by DoRA": {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
    "a head trained itself": {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]},
    "embeddings and norms trained themselves": {
        "modules_to_save": ["embed_tokens", "norm", "input_layernorm"],
        "target_modules": ["q_proj"],
    },
    "dropout": {"lora_dropout": 0.25},
    "some layers": {"layers_to_transform": [1], "target_modules": ["v_proj"]},
}


@pytest.mark.parametrize(
    "variant", covering(VARIANTS, [], FULL, quick=["patterns", "dora", "embeddings and a head", "some layers"])
)
def test_variants_on_llama(variant, checkpoints, tmp_path):
    assert_both_ways("llama", checkpoints, tmp_path, **VARIANTS[variant])


NORMS = "gemma2, norms trained themselves"
OTHER_VARIANTS = {
    "gpt2, DoRA": ("gpt2", {"use_dora": True}),
    "gpt2, all biases": ("gpt2", {"bias": "all"}),
    "gpt2, biases of its layers": ("gpt2", {"bias": "lora_only", "target_modules": ["c_attn"]}),
    "bert, biases": ("bert", {"bias": "lora_only"}),
    "bert, embeddings": ("bert", {"target_modules": ["word_embeddings", "token_type_embeddings", "query"]}),
    NORMS: (
        "gemma2",
        {"modules_to_save": ["post_attention_layernorm", "pre_feedforward_layernorm"], "target_modules": ["q_proj"]},
    ),
    "mixtral, a router trained itself": ("mixtral", {"modules_to_save": ["gate"], "target_modules": ["q_proj"]}),
    "vit, DoRA of a convolution": ("vit", {"use_dora": True}),
    "vit, a convolution alone": ("vit", {"target_modules": ["projection"]}),
    "vit, head": ("vit", {"modules_to_save": ["classifier"]}),
    "vit, head by LoRA": ("vit", {"target_modules": ["classifier", "fc1"]}),
}


@pytest.mark.parametrize(
    "variant", covering(OTHER_VARIANTS, [], FULL, quick=["gpt2, DoRA", "bert, biases", NORMS, "vit, head by LoRA"])
)
def test_variants_on_others(variant, checkpoints, tmp_path):
    name, config = OTHER_VARIANTS[variant]
    assert_both_ways(name, checkpoints, tmp_path, **config)


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_trained_tokens(name, checkpoints, tmp_path):
    assert_both_ways(name, checkpoints, tmp_path, exact=False, trainable_token_indices=[3, 7], target_modules=["q_proj"])
    key = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    found, wanted = (tensors_of(tmp_path / each)[key] for each in ("ours", "theirs"))
    assert np.abs(found - wanted).max() <= np.spacing(np.abs(wanted).max())  # a difference, and added again


def test_the_weight_of_an_embedding_that_peft_adds_must_be_that_of_the_base(checkpoints, tmp_path):
    family, base = FAMILIES["llama"], checkpoints("llama")
    model = randomized(peft.get_peft_model(family.theirs(base), peft.LoraConfig(target_modules=["embed_tokens", "v_proj"])))
    model.save_pretrained(tmp_path)
    assert "base_model.model.model.embed_tokens.base_layer.weight" in tensors_of(tmp_path)
    assert apart(family.our_logits(taken(family, base, tmp_path)), family.their_logits(model)) < RELATIVE
    other = family.ours(base)
    table = other.backbone.token_embedding.embeddings
    table.assign(-value(table))
    before = family.our_logits(other)
    with pytest.raises(ValueError, match=r"embed_tokens' has another weight in the file than in this base"):
        from_peft(other, tmp_path)
    assert np.array_equal(family.our_logits(other), before)


def test_two_variables_with_one_name_are_refused_unless_names_tell_them_apart(monkeypatch, checkpoints, tmp_path):
    """As Gemma's converter reads Gemma 2, which has two norms more."""
    family, base = FAMILIES["gemma2"], checkpoints("gemma2")
    converters = importlib.import_module("keras_lora.interop.converters")
    monkeypatch.setattr(converters, "model_types_of", lambda backbone: ["gemma"])
    model = keras_lora.apply_lora(family.ours(base), rank=1, targets="*query", train="pre_ffw_norm")
    with pytest.raises(ValueError, match=r"`names` says which is which .* fills \['.*post_attention_norm/scale', "):
        export(family, model, tmp_path / "ours")
    blocks = f"{model.backbone.name}/decoder_block_"
    names = {f"{blocks}{i}/pre_ffw_norm": f"model.layers.{i}.pre_feedforward_layernorm" for i in range(2)}
    to_peft(model, tmp_path / "ours", names=names)
    assert apart(in_peft(family, base, tmp_path / "ours"), family.our_logits(model)) < RELATIVE


def test_copies_of_base_weights_and_of_magnitudes_that_peft_adds_are_read(checkpoints, tmp_path):
    """With `save_embedding_layers=True`, it writes the magnitude of an embedding's DoRA twice."""
    for name, embeddings in {"bert": ["word_embeddings"], "llama": ["embed_tokens", "lm_head"]}.items():
        family, base = FAMILIES[name], checkpoints(name)
        config = peft.LoraConfig(r=2, target_modules=[*embeddings, "query", "q_proj"], use_dora=True)
        model = randomized(peft.get_peft_model(family.theirs(base), config))
        model.save_pretrained(tmp_path / name, save_embedding_layers=True)
        keys = [key for key in tensors_of(tmp_path / name) if "embed" in key and "magnitude" in key]
        assert len(keys) == (2 if name == "bert" else 1)
        ours = taken(family, base, tmp_path / name)
        export(family, ours, tmp_path / "ours")
        assert apart(in_peft(family, base, tmp_path / "ours"), family.their_logits(model)) < 1e-6


@pytest.mark.every_backend
def test_a_converter_that_computes_with_variables_is_followed_on_each_backend():
    """DINOv2's resizes its position embeddings for images of another size."""
    model = MODELS["dinov2/DINOV2Backbone"]()[0]
    config = model.get_config()
    for shape in ((28, 28), (56, 56)):
        config |= {"image_shape": (*shape, 3), "position_embedding_shape": (28, 28), "patch_size": 14}
        checkpoint = CheckpointMap(type(model).from_config(config))
        assert (checkpoint.reason, len(checkpoint.modules)) == ("", 13)


# Names of modules, which `transformers` 5 has changed for some models.


@pytest.fixture
def no_transformers(monkeypatch):
    """As where `transformers` is not installed."""

    def missing(*arguments):
        raise ImportError("No module named 'transformers'")

    monkeypatch.setattr(transformers_names, "classes_of", missing)


def test_without_transformers_both_names_are_read_and_a_warning_says_which_differ(no_transformers, checkpoints, tmp_path):
    family, base = FAMILIES["dinov2"], checkpoints("dinov2")
    wanted = their_adapter(family, base, tmp_path / "theirs")
    model = taken(family, base, tmp_path / "theirs")
    assert apart(family.our_logits(model), wanted) < RELATIVE
    said = "other names for 8 of the 13 modules .*: 'encoder.layer.0.attention.attention.key' is 'encoder.*attention.k_proj'"
    with pytest.warns(UserWarning, match=said):
        export(family, keras_lora.apply_lora(family.ours(base), rank=1), tmp_path / "all")
    with pytest.warns(UserWarning, match="Install `transformers`"):
        export(family, model, tmp_path / "old")
    assert apart(family.our_logits(taken(family, base, tmp_path / "old")), wanted) < RELATIVE
    export(family, model, tmp_path / "ours", rename=transformers_names.recorded("dinov2"))
    assert_same_tensors(tmp_path / "ours", tmp_path / "theirs")


def test_a_folder_with_names_that_the_model_lacks_warns(checkpoints, tmp_path):
    family, base = FAMILIES["vit"], checkpoints("vit")
    model = keras_lora.apply_lora(family.ours(base), rank=1)
    said = r"no modules 'vit.encoder.layer.0.attention.attention.key', .* and 9 more in ViTForImageClassification"
    with pytest.warns(UserWarning, match=said):
        to_peft(model, tmp_path / "ours", rename=lambda name: name)
    assert apart(family.our_logits(taken(family, base, tmp_path / "ours")), family.our_logits(model)) < RELATIVE


VISION = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16}
TEXT = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2} | {
    "num_key_value_heads": 1,
    "head_dim": 4,
}


@pytest.mark.full
@pytest.mark.parametrize("kind", ["gemma3", "paligemma"])
def test_a_model_of_images_and_text_has_the_names_of_transformers(kind, tmp_path):
    names = {"gemma3": "gemma3_vision/Gemma3Backbone", "paligemma": "pali_gemma/PaliGemmaBackbone"}
    model = keras_lora.apply_lora(MODELS[names[kind]]()[0], rank=2, targets=["*query*", "*value*", "*out_proj"])
    to_peft(model, tmp_path / "ours")
    parts = {"text_config": TEXT, "vision_config": VISION | {"patch_size": 4}}
    if kind == "paligemma":
        parts["text_config"]["model_type"], parts["vision_config"]["model_type"] = "gemma", "siglip_vision_model"
        parts["projection_dim"] = 8
    config = transformers.AutoConfig.for_model(kind, **parts)
    theirs = peft.PeftModel.from_pretrained(transformers.AutoModelForImageTextToText.from_config(config), tmp_path / "ours")
    loaded = {name.replace(".default", ""): each for name, each in theirs.named_parameters() if "lora_" in name}
    found = tensors_of(tmp_path / "ours")
    assert {name for name in found if "vision_tower" in name}
    assert loaded.keys() == found.keys()
    assert all(np.array_equal(loaded[name].detach().numpy(), each) for name, each in found.items())
    theirs.save_pretrained(tmp_path / "theirs")
    again = from_peft(MODELS[names[kind]]()[0], tmp_path / "theirs")
    assert len(again.trainable_variables) == len(model.trainable_variables)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["vit", "deit", "dinov2", "dinov3", "mixtral", "swin", "gemma3", "pali_gemma", "t5gemma2"])
def test_the_recorded_names_are_those_of_transformers(kind):
    """And a name of one list is never the other name of another module, so both can be read."""
    paths = {"gemma3": "gemma3_vision/Gemma3Backbone", "swin": "swin_transformer/SwinTransformerBackbone"}
    name = paths.get(kind) or next(each for each in MODELS if each.startswith(f"{kind}/") and each.endswith("Backbone"))
    checkpoint = CheckpointMap(MODELS[name]()[0])
    best = transformers_names.best_of(transformers_names.classes_with(checkpoint, ""), checkpoint.converted)
    rename = transformers_names.recorded(checkpoint.config["model_type"])
    new = {key: rename(key) for key in checkpoint.converted if "mlp.weights_in" not in key}  # two modules there
    assert new == {key: best.rename(key) for key in new}
    assert [key for key in new if new[key] != key]
    assert not [key for key, other in new.items() if other != key and other in new]


BLIP2_TARGETS = ["q_proj", "out_proj", "fc2", "query", "value", "intermediate_query.dense", "qkv", "projection"]


@pytest.mark.full
def test_blip2_of_an_image_and_text_has_the_logits_of_peft_both_ways(tmp_path):
    """In its language model, its Q-Former and its vision encoder, where one matrix is query, key and value."""
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.Blip2Config(
        vision_config={**sizes, "hidden_size": 16, "intermediate_size": 24, "image_size": 16, "patch_size": 8},
        qformer_config={**sizes, "hidden_size": 12, "intermediate_size": 20, "encoder_hidden_size": 16},
        text_config=transformers.OPTConfig(
            **sizes, vocab_size=40, hidden_size=8, word_embed_proj_dim=8, ffn_dim=20, max_position_embeddings=32
        ).to_dict(),
        num_query_tokens=3,
        image_token_index=39,
    )
    torch.manual_seed(0)
    base = transformers.Blip2ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for each in base.parameters():
            each.add_(0.2 * torch.randn_like(each))
    base.save_pretrained(tmp_path / "base")
    rng = np.random.default_rng(0)
    images, ids = rng.normal(size=(2, 16, 16, 3)).astype("float32"), rng.integers(4, 38, size=(2, 5))

    def logits(model):
        tokens = torch.tensor(np.concatenate([np.full((2, 3), config.image_token_index), ids], axis=1))
        with torch.no_grad():
            given = {"pixel_values": torch.tensor(images.transpose(0, 3, 1, 2)), "input_ids": tokens}
            return model.eval()(**given, attention_mask=torch.ones_like(tokens)).logits.numpy()[:, 3:]

    backbone = keras_hub.models.BLIP2Backbone.from_preset(str(tmp_path / "base"))
    ours = keras_hub.models.BLIP2CausalLM(backbone=backbone, preprocessor=None)
    x = {"images": images, "token_ids": ids, "padding_mask": np.ones_like(ids)}
    plain = logits(base)
    assert apart(ours.predict(x, verbose=0), plain) < RELATIVE
    lora = peft.LoraConfig(r=3, lora_alpha=5, target_modules=BLIP2_TARGETS)
    model = randomized(peft.get_peft_model(base, lora))
    model.save_pretrained(tmp_path / "theirs")
    wanted = logits(model)
    from_peft(ours, tmp_path / "theirs")
    assert apart(wanted, plain) > 1e-2
    assert apart(ours.predict(x, verbose=0), wanted) < RELATIVE
    to_peft(ours, tmp_path / "ours")
    again = transformers.Blip2ForConditionalGeneration.from_pretrained(tmp_path / "base")
    assert apart(logits(peft.PeftModel.from_pretrained(again, tmp_path / "ours")), wanted) < 1e-6


# For other readers.


def with_everything_that_has_one_scale(family, base):
    """Of several ranks, scales and rules of scaling."""
    model = family.ours(base)
    patterns = {"rank_pattern": {"*query": 3, "*feedforward*": 1}, "alpha_pattern": {"*value": 5}}
    keras_lora.apply_lora(model, keras_lora.LoRA(2, alpha=7.5, rank_stabilized=True), **patterns)
    rng = np.random.default_rng(3)
    for v in model.trainable_variables:
        v.assign(0.1 * rng.normal(size=tuple(v.shape)).astype("float32"))
    return model


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_with_baked_scales_the_numbers_are_the_same_and_there_is_one_rank(name, checkpoints, tmp_path):
    family, base = FAMILIES[name], checkpoints(name)
    model = with_everything_that_has_one_scale(family, base)
    wanted = family.our_logits(model)
    export(family, model, tmp_path / "plain")
    export(family, model, tmp_path / "baked", bake_scaling=True)
    for folder in ("plain", "baked"):
        assert apart(in_peft(family, base, tmp_path / folder), wanted) < RELATIVE
    config = config_of(tmp_path / "baked")
    most = max(tensor.shape[0] for key, tensor in tensors_of(tmp_path / "plain").items() if ".lora_A." in key)
    assert (config["r"], config["lora_alpha"]) == (most, most)
    assert type(config["lora_alpha"]) is int
    assert (config["rank_pattern"], config["alpha_pattern"], config["use_rslora"]) == ({}, {}, False)
    assert {tensor.shape[0] for key, tensor in tensors_of(tmp_path / "baked").items() if ".lora_A." in key} == {most}
    plain, baked = serving_problems(tmp_path / "plain"), serving_problems(tmp_path / "baked")
    for reader, problems in plain.items():
        assert any("`alpha_pattern` is ignored" in each for each in problems), reader
        assert len(problems) < 6, "a line for each kind of problem, not for each tensor"
        assert not any("ignored" in each for each in baked[reader]), reader
    if name == "llama":
        assert baked == {"vllm": [], "llama.cpp": [], "ollama": []}
    else:
        assert any("none of those it knows" in each for each in baked["vllm"])


def test_a_reader_that_knows_one_scale_and_the_rank_of_a_tensor_gets_the_right_change(checkpoints, tmp_path):
    family, base = FAMILIES["llama"], checkpoints("llama")
    model = with_everything_that_has_one_scale(family, base)
    export(family, model, tmp_path, bake_scaling=True)
    config, tensors = config_of(tmp_path), tensors_of(tmp_path)
    theirs = family.theirs(base)
    with torch.no_grad():  # as llama.cpp does: alpha / rank of the tensor, whatever else the config says
        for key, a in tensors.items():
            if key.endswith("lora_A.weight"):
                b = tensors[key.replace("lora_A", "lora_B")]
                module = theirs.get_submodule(key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
                module.weight += config["lora_alpha"] / a.shape[0] * torch.tensor(b @ a)
    assert apart(family.their_logits(theirs), family.our_logits(model)) < RELATIVE


BAKED_REFUSALS = {
    "DoRA": ({"adapter": "dora", "rank": 2}, "DoRA, which is refused .vllm, llama.cpp, ollama"),
    "biases": ({"rank": 2, "bias": "all"}, "trained biases"),
    "a norm": ({"rank": 2, "train": "sequence_output_layernorm"}, "trained themselves"),
    "tokens": ({"rank": 2, "adapter_pattern": {"token_embedding": keras_lora.TrainableTokens([1])}}, "trained tokens"),
}


@pytest.mark.parametrize("kind", BAKED_REFUSALS)
def test_what_other_readers_cannot_read_is_refused_and_nothing_is_written(kind, checkpoints, tmp_path):
    family, base = FAMILIES["qwen2"], checkpoints("qwen2")
    arguments, match = BAKED_REFUSALS[kind]
    model = keras_lora.apply_lora(family.ours(base), **arguments)
    with pytest.raises(ValueError, match=f"{match}(.|\n)*compress_adapter` makes a LoRA of a DoRA"):
        export(family, model, tmp_path / "baked", bake_scaling=True)
    assert not list(tmp_path.iterdir())
    export(family, model, tmp_path / "plain")
    assert all(serving_problems(tmp_path / "plain").values())


def test_the_largest_rank_that_vllm_serves(checkpoints, tmp_path):
    family, base = FAMILIES["llama"], checkpoints("llama")
    for rank, problems in ((512, []), (513, ["its rank 513 is over 512, the largest that is served"])):
        model = keras_lora.apply_lora(family.ours(base), rank=rank, targets="query")
        export(family, model, tmp_path / str(rank))
        assert serving_problems(tmp_path / str(rank)) == {"vllm": problems, "llama.cpp": [], "ollama": []}


def test_what_the_refusal_of_baking_a_dora_says_helps(checkpoints, tmp_path):
    family, base = FAMILIES["llama"], checkpoints("llama")
    model = keras_lora.apply_lora(family.ours(base), "dora", rank=2)
    keras_lora.compress_adapter(model, rank=2)
    export(family, model, tmp_path / "baked", bake_scaling=True)
    assert not any(serving_problems(tmp_path / "baked").values())


# Merged, as a whole model of `transformers`.


@pytest.mark.full
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "gemma", "gemma3", "gpt2"])
def test_a_merged_model_is_exported_by_keras_hub_itself(name, checkpoints, tmp_path):
    family = FAMILIES[name]
    model = keras_lora.apply_lora(family.ours(checkpoints(name)), rank=2)
    rng = np.random.default_rng(3)
    for v in model.trainable_variables:
        v.assign(0.1 * rng.normal(size=tuple(v.shape)).astype("float32"))
    wanted = family.our_logits(model)
    with pytest.raises(ValueError, match="without its adapters"):
        model.export_to_transformers(str(tmp_path / "whole"))
    keras_lora.merge_lora(model)
    model.export_to_transformers(str(tmp_path / "whole"))
    assert apart(family.their_logits(family.theirs(tmp_path / "whole")), wanted) < RELATIVE


# Models that are not of KerasHub.


class Plain(torch.nn.Module):
    """With a layer of each kind, and a name that is the end of another."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(9, 6)
        self.fold = torch.nn.Conv1d(6, 5, 3, padding=1)
        self.fc = torch.nn.Linear(5, 4)
        self.inner = torch.nn.ModuleDict({"fc": torch.nn.Linear(4, 3)})

    def forward(self, x):
        y = torch.relu(self.fold(self.table(x).transpose(1, 2))).transpose(1, 2)
        return self.inner["fc"](torch.tanh(self.fc(y)))


PLAIN_NAMES = {"table": "table", "fold": "fold", "fc": "fc", "inner_fc": "inner.fc"}


def plain_pair():
    """One model on both sides."""
    torch.manual_seed(0)
    theirs = Plain().eval()
    x = keras.Input((7,), dtype="int32")
    y = keras.layers.Embedding(9, 6, name="table")(x)
    y = keras.layers.Conv1D(5, 3, padding="same", activation="relu", name="fold")(y)
    y = keras.layers.Dense(4, activation="tanh", name="fc")(y)
    ours = keras.Model(x, keras.layers.EinsumDense("abc,cd->abd", (None, 3), bias_axes="d", name="inner_fc")(y))
    state = {name: each.numpy() for name, each in theirs.state_dict().items()}
    for name, module in PLAIN_NAMES.items():
        weight = state[f"{module}.weight"]
        weights = [weight if name == "table" else np.moveaxis(weight, (0, 1), (-1, -2))]
        ours.get_layer(name).set_weights([*weights, *([state[f"{module}.bias"]] if f"{module}.bias" in state else [])])
    return theirs, ours


@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"bias": "all"}], ids=["LoRA", "DoRA", "biases"])
def test_any_model_with_names(config, tmp_path):
    theirs, ours = plain_pair()
    ids = np.random.default_rng(0).integers(0, 9, size=(2, 7))

    def run(model):
        with torch.no_grad():
            return model(torch.tensor(ids)).numpy()

    assert apart(ours.predict(ids, verbose=0), run(theirs)) < 1e-5
    adapted = randomized(
        peft.get_peft_model(theirs, peft.LoraConfig(target_modules=list(PLAIN_NAMES.values()), **config)), 0.3
    )
    adapted.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    from_peft(ours, tmp_path / "theirs", names=PLAIN_NAMES)
    assert apart(ours.predict(ids, verbose=0), run(adapted)) < 1e-5
    to_peft(ours, tmp_path / "ours", names=PLAIN_NAMES)
    assert_same_tensors(tmp_path / "ours", tmp_path / "theirs")
    again = peft.PeftModel.from_pretrained(plain_pair()[0], tmp_path / "ours")
    assert apart(run(again), run(adapted)) < 1e-6


def test_a_name_that_is_the_end_of_another_is_written_so_that_it_matches_alone(tmp_path):
    _, ours = plain_pair()
    keras_lora.apply_lora(ours, rank=2, targets=["fc", "fold"], rank_pattern={"fc": 3}, head=None)
    to_peft(ours, tmp_path, names=PLAIN_NAMES)
    model = peft.PeftModel.from_pretrained(plain_pair()[0], tmp_path)
    adapted = {
        name.split(".lora_")[0].removeprefix("base_model.model.") for name, _ in model.named_parameters() if "lora_" in name
    }
    assert adapted == {"fc", "fold"}


@pytest.mark.full
def test_several_adapters_and_names_of_them(checkpoints, tmp_path):
    family, base = FAMILIES["llama"], checkpoints("llama")
    wanted = their_adapter(family, base, tmp_path / "theirs")
    model = keras_lora.apply_lora(family.ours(base), rank=1, name="own")
    before = family.our_logits(model)
    from_peft(model, tmp_path / "theirs", name="french", trainable=False)
    assert keras_lora.active_adapters(model) == {"french": 1.0}
    assert apart(family.our_logits(model), wanted) < RELATIVE
    keras_lora.activate_adapters(model, "own")
    assert apart(family.our_logits(model), before) < 1e-6
    with pytest.raises(ValueError, match=r"several adapters.*'own', 'french'"):
        to_peft(model, tmp_path / "none")
    to_peft(model, tmp_path / "ours", name="french", base_model="some/base")
    assert_same_tensors(tmp_path / "ours", tmp_path / "theirs")
    assert config_of(tmp_path / "ours")["base_model_name_or_path"] == "some/base"
    assert not (tmp_path / "none").exists()


def test_a_fused_module_of_which_a_part_is_adapted_or_differs(checkpoints, tmp_path):
    family, base = FAMILIES["gpt2"], checkpoints("gpt2")
    model = keras_lora.apply_lora(family.ours(base), rank=2, targets=["query", "value"], alpha_pattern={"value": 3})
    rng = np.random.default_rng(3)
    for v in model.trainable_variables:
        v.assign(0.1 * rng.normal(size=tuple(v.shape)).astype("float32"))
    export(family, model, tmp_path / "ours")
    assert {tensor.shape[0] for key, tensor in tensors_of(tmp_path / "ours").items() if "lora_A" in key} == {4}  # stacked
    assert apart(in_peft(family, base, tmp_path / "ours"), family.our_logits(model)) < RELATIVE
    again = taken(family, base, tmp_path / "ours")
    assert apart(family.our_logits(again), family.our_logits(model)) < RELATIVE


# What a module of PEFT is not here.


EMBEDDINGS = {"qwen2": "embed_tokens", "gemma": "embed_tokens", "gemma3": "embed_tokens", "gpt2": "wte"}
TIED = {
    "adapted": {"target_modules": ["lm_head", "q_proj"], "r": 2, "use_rslora": True},
    "trained itself": {"target_modules": ["q_proj", "c_attn"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("way", TIED)
@pytest.mark.parametrize("name", ["qwen2", *covering(list(EMBEDDINGS)[1:], [], pytest.mark.nightly)])
def test_an_embedding_that_is_the_output_projection_too(name, way, checkpoints, tmp_path):
    """PEFT writes it twice, transposed the second time. (Of GPT-2, its config loses `lm_head`, and PEFT itself the tie.)"""
    family, base = FAMILIES[name], checkpoints(name)
    config = {key: list(each) if isinstance(each, list) else each for key, each in TIED[way].items()}
    config["target_modules" if way == "adapted" else "modules_to_save"].append(EMBEDDINGS[name])
    wanted = their_adapter(family, base, tmp_path / "theirs", ensure_weight_tying=True, **config)
    model = taken(family, base, tmp_path / "theirs")
    assert apart(family.our_logits(model), wanted) < RELATIVE
    export(family, model, tmp_path / "ours")
    assert_same_tensors(tmp_path / "ours", tmp_path / "theirs")
    assert apart(in_peft(family, base, tmp_path / "ours"), wanted) < 1e-6
    said = config_of(tmp_path / "ours")
    assert said["ensure_weight_tying"] is True
    assert "lm_head" in said["target_modules" if way == "adapted" else "modules_to_save"]
    bare = from_peft(type(model.backbone).from_config(model.backbone.get_config()), tmp_path / "ours")
    assert len(bare.trainable_variables) == len(model.trainable_variables)


def test_a_tied_embedding_trained_here_and_run_in_peft(checkpoints, tmp_path):
    family, base = FAMILIES["qwen2"], checkpoints("qwen2")
    for number, arguments in enumerate([{"targets": "token_embedding"}, {"train": "token_embedding", "targets": "*query*"}]):
        model = keras_lora.apply_lora(family.ours(base), rank=3, alpha=5, head=None, **arguments)
        for v in model.trainable_variables:
            v.assign(v + 0.1 * np.random.default_rng(3).normal(size=tuple(v.shape)).astype("float32"))
        folder = tmp_path / str(number)
        export(family, model, folder)
        assert apart(in_peft(family, base, folder), family.our_logits(model)) < RELATIVE
        assert apart(family.our_logits(taken(family, base, folder)), family.our_logits(model)) < 1e-6
        assert all("an output projection that is the embedding" in str(each) for each in serving_problems(folder).values())
    dora = keras_lora.apply_lora(family.ours(base), "dora", targets="token_embedding", head=None)
    with pytest.raises(ValueError, match="tied to the output projection, and PEFT has a DoRA of another size for each"):
        export(family, dora, tmp_path / "dora")


def test_a_change_of_an_embedding_and_not_of_the_output_projection_tied_to_it_is_refused(checkpoints, tmp_path):
    family, base = FAMILIES["qwen2"], checkpoints("qwen2")
    configs = [{"target_modules": ["embed_tokens"]}, {"modules_to_save": ["embed_tokens"]}]
    configs += [{"target_modules": ["embed_tokens", "lm_head"]}]  # two changes
    for number, config in enumerate(configs):
        their_adapter(family, base, tmp_path / str(number), **{"target_modules": ["q_proj"], **config})
        model = family.ours(base)
        before = family.our_logits(model)
        for part in (model, model.backbone):
            with pytest.raises(ValueError, match=r"uses in more places than one .* With `ensure_weight_tying=True`"):
                from_peft(part, tmp_path / str(number))
        assert np.array_equal(family.our_logits(model), before)


@pytest.mark.full
def test_an_embedding_of_a_bare_backbone_is_refused_if_its_language_model_uses_it_again(checkpoints, tmp_path):
    for name, embedding in {"gemma": "embed_tokens", "t5gemma": "decoder.embed_tokens"}.items():
        family, base, model = FAMILIES[name], checkpoints(name), FAMILIES[name].ours(checkpoints(name)).backbone
        for number, config in enumerate([{"target_modules": [embedding]}, {"modules_to_save": [embedding]}]):
            their_adapter(family, base, tmp_path / f"{name} {number}", **{"target_modules": ["q_proj"]} | config)
            bare = type(model).from_config(model.get_config())  # no task has called it
            with pytest.raises(ValueError, match="also use as their output projection"):
                from_peft(bare, tmp_path / f"{name} {number}")


@pytest.mark.full
def test_trained_tokens_of_an_encoder_and_not_of_its_decoder(checkpoints, tmp_path):
    """PEFT ties the rows of the first embedding to others, and no other's."""
    family, base = FAMILIES["t5gemma"], checkpoints("t5gemma")
    options = {"exact": False, "target_modules": ["q_proj"]}
    assert_both_ways("t5gemma", checkpoints, tmp_path / "encoder", trainable_token_indices=[3, 7], **options)
    their_adapter(family, base, tmp_path / "decoder", trainable_token_indices={"decoder.embed_tokens": [3]})
    with pytest.raises(ValueError, match="its rows are used in other places here than in PEFT"):
        taken(family, base, tmp_path / "decoder")
    tokens = {"*decoder_token_embedding": keras_lora.TrainableTokens([3])}
    model = keras_lora.apply_lora(family.ours(base), rank=1, targets=["*query", "*embedding"], adapter_pattern=tokens)
    with pytest.raises(ValueError, match="its rows are used in other places here than in PEFT"):
        export(family, model, tmp_path / "ours")


@pytest.mark.full
def test_an_embedding_that_fills_an_encoder_and_a_decoder_is_refused_unless_names_tell_them_apart(tmp_path):
    """T5Gemma 2 ties them; in PEFT they are two modules, of which it changes one."""
    names = {f"{part}coder_token_embedding": f"{part}coder.embed_tokens" for part in ("en", "de")}

    def adapted():
        return keras_lora.apply_lora(MODELS["t5gemma2/T5Gemma2Backbone"]()[0], rank=1, targets="encoder_token_embedding")

    with pytest.raises(ValueError, match=r"`names` says which .* fills .*_token_embedding.*, 'decoder_token_embedding"):
        to_peft(adapted(), tmp_path / "ours")
    to_peft(adapted(), tmp_path / "ours", names=names)
    assert config_of(tmp_path / "ours")["target_modules"] == ["encoder.embed_tokens"]
    model = from_peft(MODELS["t5gemma2/T5Gemma2Backbone"]()[0], tmp_path / "ours", names=names)
    assert [each.shape for each in model.trainable_variables] == [each.shape for each in adapted().trainable_variables]
    for_decoder = {"adapter": keras_lora.TrainableTokens([3]), "targets": "decoder_token_embedding"}
    with pytest.raises(ValueError, match="its rows are used in other places"):
        to_peft(keras_lora.apply_lora(model, name="b", **for_decoder), tmp_path / "b", name="b", names=names)


def test_a_head_stands_beside_what_has_the_prefix(tmp_path):
    sizes = {"num_layers": 1, "num_query_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "hidden_dim": 8}
    backbone = keras_hub.models.Qwen3Backbone(vocabulary_size=9, intermediate_dim=8, tie_word_embeddings=False, **sizes)
    model = keras_hub.models.Qwen3CausalLM(backbone, preprocessor=None)
    keras_lora.apply_lora(model, rank=1, targets=["query", "reverse_embeddings"], head=None)
    to_peft(model, tmp_path, prefix="model.")
    assert config_of(tmp_path)["target_modules"] == ["lm_head", "model.layers.0.self_attn.q_proj"]


def test_a_module_whose_name_ends_with_that_of_a_saved_one_is_saved_too(checkpoints, tmp_path):
    family, base = FAMILIES["distilbert"], checkpoints("distilbert")
    model = keras_lora.apply_lora(family.ours(base), rank=1, train="logits")
    export(family, model, tmp_path)
    assert config_of(tmp_path)["modules_to_save"] == ["classifier", "pre_classifier"]
    assert apart(in_peft(family, base, tmp_path), family.our_logits(model)) < RELATIVE


def test_trained_tokens_alone_are_refused_as_peft_would(tmp_path):
    ids = keras.Input((5,), dtype="int32")
    model = keras.Model(ids, keras.layers.Dense(2)(keras.layers.Embedding(9, 4, name="tokens")(ids)))
    keras_lora.apply_lora(model, keras_lora.TrainableTokens([3]), targets="tokens")
    with pytest.raises(ValueError, match="trained tokens alone"):
        to_peft(model, tmp_path / "ours", names={"tokens": "tokens"})


@pytest.mark.full
def test_biases_beside_a_head_that_was_trained_itself(checkpoints, tmp_path):
    """PEFT then writes some of them twice, under the names of its wrappers."""
    for name in ("bert", "roberta"):
        family, base = FAMILIES[name], checkpoints(name)
        wanted = their_adapter(family, base, tmp_path / name, bias="all")
        assert [key for key in tensors_of(tmp_path / name) if ".modules_to_save." in key or ".original_module." in key]
        assert apart(family.our_logits(taken(family, base, tmp_path / name)), wanted) < RELATIVE


def test_batch_normalization_has_its_count_of_batches(tmp_path):
    class Normed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.norm = torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3)

        def forward(self, x):
            return self.norm(self.fc(x))

    names = {"fc": "fc", "norm": "norm"}

    def build():
        layers = [keras.layers.Dense(3, name="fc"), keras.layers.BatchNormalization(epsilon=1e-5, name="norm")]
        return keras.Sequential([keras.Input((4,)), *layers])

    ours, rng = keras_lora.apply_lora(build(), rank=1, train="norm", head=None), np.random.default_rng(0)
    kernel = value(ours.get_layer("fc").linear_map.kernel_variable)
    for v in ours.get_layer("norm").weights:
        v.assign(1 + rng.random(3).astype("float32"))
    to_peft(ours, tmp_path / "ours", names=names)
    theirs = Normed()
    with torch.no_grad():
        theirs.fc.weight.copy_(torch.tensor(kernel.T))
        theirs.fc.bias.zero_()
    model = peft.PeftModel.from_pretrained(theirs, tmp_path / "ours").eval()
    x = rng.normal(size=(5, 4)).astype("float32")
    with torch.no_grad():
        wanted = model(torch.tensor(x)).numpy()
    assert apart(ours.predict(x, verbose=0), wanted) < 1e-5
    model.save_pretrained(tmp_path / "theirs")
    again = build()
    again.get_layer("fc").set_weights([kernel, np.zeros(3)])
    from_peft(again, tmp_path / "theirs", names=names)
    assert apart(again.predict(x, verbose=0), wanted) < 1e-5


def test_layouts_that_are_not_known_have_no_place(tmp_path):
    x = keras.Input((8, 8, 3))
    y = keras.layers.Conv2DTranspose(4, 3, name="up")(keras.layers.DepthwiseConv2D(3, name="deep")(x))
    for each in ("up", "deep"):
        model = keras_lora.apply_lora(keras.Model(x, keras.layers.Dense(2)(y)), rank=1, targets=each, head=None)
        with pytest.raises(ValueError, match="has no place there"):
            to_peft(model, tmp_path / "ours", names={each: "module"})
        keras_lora.remove_lora(model)
        del model  # another model with the same layers


@pytest.mark.parametrize("mode", ["bfloat16", pytest.param("int8", marks=pytest.mark.full)])
def test_on_a_base_in_fewer_digits_the_copy_of_an_embedding_is_known_again(mode, checkpoints, tmp_path):
    family, base = FAMILIES["llama"], checkpoints("llama")
    model = randomized(peft.get_peft_model(family.theirs(base), peft.LoraConfig(target_modules=["embed_tokens", "v_proj"])))
    model.save_pretrained(tmp_path)
    if mode == "bfloat16":
        keras.config.set_dtype_policy("bfloat16")
    ours = family.ours(base).backbone
    if mode == "int8":
        ours.quantize("int8")
    from_peft(ours, tmp_path)
    to_peft(ours, tmp_path / "ours")
    wanted = {key: each for key, each in tensors_of(tmp_path).items() if ".base_layer." not in key}
    assert all(np.array_equal(tensors_of(tmp_path / "ours")[key], each) for key, each in wanted.items())


def test_a_start_with_a_kept_pair_is_a_plain_lora_of_twice_the_rank(tmp_path):
    _, ours = plain_pair()
    ids = np.random.default_rng(0).integers(0, 9, size=(2, 7))
    method = keras_lora.LoRA(rank=2, alpha=6, rank_stabilized=True)
    keras_lora.apply_lora(ours, method, targets=list(PLAIN_NAMES), head=None)
    keras_lora.start_from(ours, "pissa")
    for number, variable in enumerate(ours.trainable_variables):
        variable.assign_add(0.1 * np.random.default_rng(number).normal(size=tuple(variable.shape)).astype("float32"))
    to_peft(ours, tmp_path, names=PLAIN_NAMES)
    assert config_of(tmp_path)["r"] == 4
    theirs = peft.PeftModel.from_pretrained(plain_pair()[0], tmp_path)
    with torch.no_grad():
        found = theirs(torch.tensor(ids)).numpy()
    assert apart(found, ours.predict(ids, verbose=0)) < 1e-5
    assert apart(found, plain_pair()[1].predict(ids, verbose=0)) > 1e-2
