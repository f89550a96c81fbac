"""Methods besides LoRA from and to PEFT, with PEFT itself on the other side: the same factors give the same outputs."""

import json
import warnings

import keras
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
from helpers import value
from keras import layers

import keras_lora
from keras_lora.interop import from_peft, serving_problems, to_peft

pytestmark = pytest.mark.torch_first

NAMES = {"one": "one", "two": "two"}
X = np.random.default_rng(0).normal(size=(3, 12)).astype("float32")
#: PEFT's config of each method, and what may train in it.
THEIRS = {
    "MiSS": lambda: peft.MissConfig(r=4, target_modules=["one", "two"]),
    "MiSS, inputs no multiple of the rank": lambda: peft.MissConfig(r=5, target_modules=["one", "two"]),
    "IA3": lambda: peft.IA3Config(target_modules=["one", "two"], feedforward_modules=["two"]),
    "LoKr": lambda: peft.LoKrConfig(r=2, alpha=3, decompose_factor=2, target_modules=["one", "two"]),
    "LoKr, near the root": lambda: peft.LoKrConfig(r=1, alpha=3, target_modules=["one", "two"]),
    "LoKr, not factored": lambda: peft.LoKrConfig(r=5, alpha=3, decompose_factor=4, target_modules=["one", "two"]),
    "LoKr, both factored": lambda: peft.LoKrConfig(
        r=1, alpha=3, decompose_factor=3, decompose_both=True, target_modules=["one", "two"]
    ),
    "LoHa": lambda: peft.LoHaConfig(r=3, alpha=5, target_modules=["one", "two"], rank_pattern={"two": 2}),
    "OFT, series": lambda: peft.OFTConfig(oft_block_size=4, target_modules=["one", "two"]),
    "OFT": lambda: peft.OFTConfig(oft_block_size=4, use_cayley_neumann=False, target_modules=["one", "two"]),
}


class Pair(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.one = torch.nn.Linear(12, 16, bias=False)
        self.two = torch.nn.Linear(16, 6)

    def forward(self, x):
        return self.two(torch.tanh(self.one(x)))


def bases():
    """One model on both sides."""
    torch.manual_seed(0)
    theirs = Pair().eval()
    ours = keras.Sequential(
        [keras.Input((12,)), layers.Dense(16, activation="tanh", use_bias=False, name="one"), layers.Dense(6, name="two")]
    )
    ours.get_layer("one").set_weights([theirs.one.weight.detach().numpy().T])
    ours.get_layer("two").set_weights([theirs.two.weight.detach().numpy().T, theirs.two.bias.detach().numpy()])
    return theirs, ours


def trained(config):
    """A PEFT model with random numbers in its adapter."""
    generator = torch.Generator().manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(bases()[0], config)
    with torch.no_grad():
        for each in model.parameters():
            if each.requires_grad:
                each.add_(0.2 * torch.randn(each.shape, generator=generator))
    return model.eval()


def run(model):
    with torch.no_grad():
        return model(torch.tensor(X)).numpy()


def in_peft(folder):
    return run(peft.PeftModel.from_pretrained(bases()[0], folder).eval())


@pytest.mark.parametrize("kind", THEIRS)
def test_from_peft_and_back(kind, tmp_path):
    theirs = trained(THEIRS[kind]())
    theirs.save_pretrained(tmp_path / "theirs")
    wanted = run(theirs)
    model = bases()[1]
    assert np.abs(wanted - model.predict(X, verbose=0)).max() > 1e-2
    from_peft(model, tmp_path / "theirs", names=NAMES)
    assert np.abs(model.predict(X, verbose=0) - wanted).max() < 1e-5
    to_peft(model, tmp_path / "ours", names=NAMES)
    assert np.abs(in_peft(tmp_path / "ours") - wanted).max() < 1e-5
    if "factored" not in kind:
        found, same = (
            safetensors.numpy.load_file(tmp_path / each / "adapter_model.safetensors") for each in ("ours", "theirs")
        )
        assert found.keys() == same.keys()
        assert all(found[key].tobytes() == same[key].tobytes() for key in found)
    merged = keras_lora.merge_lora(model)
    assert np.abs(merged.predict(X, verbose=0) - wanted).max() < 1e-5


OURS = {
    "MiSS": lambda: keras_lora.MiSS(5),
    "IA3": lambda: keras_lora.IA3(side="inputs"),
    "LoKr": lambda: keras_lora.LoKr(2, factor=2, rank_stabilized=True),
    "LoHa": lambda: keras_lora.LoHa(2),
    "OFT": lambda: keras_lora.OFT(4),
    "OFT, series": lambda: keras_lora.OFT(4, terms=6),
}


@pytest.mark.parametrize("kind", OURS)
def test_trained_here_and_run_in_peft(kind, tmp_path):
    model = keras_lora.apply_lora(bases()[1], OURS[kind](), head=None)
    rng = np.random.default_rng(0)
    for v in model.trainable_variables:
        v.assign(value(v) + 0.2 * rng.normal(size=tuple(v.shape)))
    to_peft(model, tmp_path, names=NAMES)
    assert np.abs(in_peft(tmp_path) - model.predict(X, verbose=0)).max() < 1e-5
    problems = serving_problems(tmp_path)
    assert all(problems.values()), "no server reads another method than LoRA"


@pytest.mark.full
def test_vera_computes_what_peft_does_with_the_same_frozen_factors():
    theirs = trained(peft.VeraConfig(r=5, target_modules=["one"]))
    model = keras_lora.apply_lora(bases()[1], keras_lora.VeRA(5), targets="one")
    adapter, other = model.get_layer("one").adapter, theirs.base_model.model.one
    for variable, numbers in [
        (adapter.vera_frozen_a, other.vera_A["default"][:, :12].T),
        (adapter.vera_frozen_b, other.vera_B["default"][:16].T),
        (adapter.vera_d, other.vera_lambda_d["default"]),
        (adapter.vera_b, other.vera_lambda_b["default"]),
    ]:
        variable.assign(numbers.detach().numpy())
    assert np.abs(model.predict(X, verbose=0) - run(theirs)).max() < 1e-5


def refused(folder, change=None, **settings):
    """The reason why a changed MiSS folder is refused."""
    trained(THEIRS["MiSS"]()).save_pretrained(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    if change:
        tensors = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
        safetensors.numpy.save_file(change(tensors), folder / "adapter_model.safetensors")
    model = bases()[1]
    with pytest.raises(ValueError) as caught:
        from_peft(model, folder, names=NAMES)
    assert len(model.trainable_variables) == 3
    return str(caught.value)


def test_what_cannot_be_read_is_refused_by_its_reason(tmp_path):
    assert "its `init_weights` is 'bat'" in refused(tmp_path, init_weights="bat")
    assert "tensors of another method than its `peft_type`" in refused(tmp_path, peft_type="OFT")
    assert "the tensor" in refused(tmp_path, lambda each: {**each, "base_model.model.one.lora_Q": X})
    renamed = refused(tmp_path, lambda each: {key.replace("one", "three"): found for key, found in each.items()})
    assert "the module 'three' is no kernel of this model" in renamed
    wide = refused(tmp_path, lambda each: {key: np.pad(found, [(0, 0), (0, 1)]) for key, found in each.items()})
    assert "has a tensor `miss_block` of shape (4, 17); expected is ('any', 16)" in wide


def test_what_cannot_be_written_is_refused_by_its_reason(tmp_path):
    model = keras_lora.apply_lora(bases()[1], "ia3", head=None)
    model.get_layer("two").bias.assign(np.ones(6))
    with pytest.raises(ValueError, match="PEFT multiplies the bias by the gains too"):
        to_peft(model, tmp_path / "ours", names=NAMES)
    model = keras_lora.apply_lora(bases()[1], "miss", head=None, rank_pattern={"two": 3})
    with pytest.raises(ValueError, match=r"different values of `rank`"):
        to_peft(model, tmp_path / "ours", names=NAMES)
    model = keras_lora.apply_lora(bases()[1], keras_lora.VeRA(4), head=None)
    with pytest.raises(ValueError, match=r"\['VeRA'\] have no place there; `keras_lora.compress_adapter` makes LoRA"):
        to_peft(model, tmp_path / "ours", names=NAMES)
    assert not (tmp_path / "ours").exists()
    keras_lora.compress_adapter(model, energy=1)
    to_peft(model, tmp_path / "ours", names=NAMES)
    assert np.abs(in_peft(tmp_path / "ours") - model.predict(X, verbose=0)).max() < 1e-5
