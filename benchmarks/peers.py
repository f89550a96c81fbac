"""Hugging Face PEFT and loralib on torch, with the weights of a Keras model, and the check that they compute the same."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from cases import Case

ALPHA = 16  # the default of keras_lora
TOLERANCE = 1e-5


def available() -> bool:
    """Whether PEFT and loralib are installed. Prints what is missing."""
    if keras.backend.backend() != "torch":
        return False
    missing = [name for name in ("peft", "loralib") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"LEFT OUT: PEFT and loralib, because {', '.join(missing)} is not installed (requirements/bench.txt).")
    return not missing


def give_b_values(model: keras.Model) -> None:
    """Give every B values other than zero; otherwise half of the gradients are zero."""
    rng = np.random.default_rng(3)
    for v in model.trainable_variables:
        if v.name == "lora_b":
            v.assign(rng.normal(0, 0.01, v.shape).astype("float32"))


class Peer:
    """A torch module and its factors, A `(in, rank)` and B `(rank, out)` being the transposes of its parameters."""

    def __init__(self, module: Any, factors: list[tuple[Any, Any]], adapted: keras.Model):
        import torch

        self.module, self.factors = module, factors
        with torch.no_grad():
            for (a, b), layer in zip(factors, adapted.layers, strict=True):
                of_keras = {v.name: v.value for v in layer.trainable_variables}
                a.copy_(of_keras["lora_a"].T)
                b.copy_(of_keras["lora_b"].T)
        self.trained = [p for p in module.parameters() if p.requires_grad]


def linears(model: keras.Model) -> list[Any]:
    """A torch `Linear` for each Dense layer, with its weights."""
    import torch

    made = []
    for layer in model.layers:
        base = {v.name: v.value for v in layer.variables}  # `layer.kernel` would be the changed kernel
        linear = torch.nn.Linear(*base["kernel"].shape)
        with torch.no_grad():
            linear.weight.copy_(base["kernel"].T)
            linear.bias.copy_(base["bias"])
        made.append(linear)
    return made


def stack(modules: list[Any]) -> Any:
    import torch

    return torch.nn.Sequential(*(each for module in modules for each in (module, torch.nn.ReLU())))


def with_peft(adapted: keras.Model, rank: int, dora: bool = False) -> Peer:
    from peft import LoraConfig, get_peft_model

    base = stack(linears(adapted))
    names = [str(2 * index) for index in range(len(adapted.layers))]
    module = get_peft_model(base, LoraConfig(r=rank, lora_alpha=ALPHA, target_modules=names, use_dora=dora))
    adapters = [module.base_model.model[int(name)] for name in names]
    return Peer(module, [(each.lora_A["default"].weight, each.lora_B["default"].weight) for each in adapters], adapted)


def with_loralib(adapted: keras.Model, rank: int) -> Peer:
    import loralib

    made = []
    for linear in linears(adapted):
        each = loralib.Linear(linear.in_features, linear.out_features, r=rank, lora_alpha=ALPHA)
        each.load_state_dict(linear.state_dict(), strict=False)
        made.append(each)
    module = stack(made)
    loralib.mark_only_lora_as_trainable(module)
    return Peer(module, [(each.lora_A, each.lora_B) for each in made], adapted)


def layers_call(module: Any, parameters: list[Any], x: Any) -> Callable[[], Any]:
    """Forward and backward, and nothing else."""

    def call() -> Any:
        for parameter in parameters:
            parameter.grad = None
        y = module(x)
        (y * y).mean().backward()
        return y

    return call


def keras_layers_call(model: keras.Model, x: Any) -> Callable[[], Any]:
    return layers_call(lambda x: model(x, training=True), [v.value for v in model.trainable_variables], x)


def step_call(peer: Peer, case: Case) -> Callable[[], Any]:
    """A training step in plain torch: arrays go in, and the loss comes out as a number."""
    import torch

    optimizer = torch.optim.Adam(peer.trained, 1e-4)

    def call() -> float:
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(peer.module(torch.from_numpy(case.x)), torch.from_numpy(case.y))
        loss.backward()
        optimizer.step()
        return loss.item()

    return call


def predict_call(peer: Peer, case: Case) -> Callable[[], Any]:
    import torch

    peer.module.eval()

    def call() -> np.ndarray:
        with torch.inference_mode():
            return peer.module(torch.from_numpy(case.x)).numpy()

    return call


def check_equal(adapted: keras.Model, peer: Peer, case: Case) -> None:
    """Raise an error unless the outputs and the gradients of A and B are those of the Keras model."""
    import torch

    x = torch.from_numpy(case.x)
    pairs = {"outputs": (layers_call(peer.module, peer.trained, x)(), keras_layers_call(adapted, x)())}
    for (a, b), layer in zip(peer.factors, adapted.layers, strict=True):
        of_keras = {v.name: v.value.grad for v in layer.trainable_variables}
        pairs[f"{layer.name} A"] = a.grad.T, of_keras["lora_a"]
        pairs[f"{layer.name} B"] = b.grad.T, of_keras["lora_b"]
    for what, (found, expected) in pairs.items():
        difference = float((found - expected).detach().abs().max() / expected.detach().abs().max())
        if not difference <= TOLERANCE:  # written so that NaN fails too
            raise AssertionError(f"{type(peer.module).__name__}, {what}: {difference:.1e} from keras_lora, relative.")


def checked(case: Case, models: dict[str, keras.Model]) -> dict[str, Peer]:
    """The peers of the Keras models "keras_lora" and "keras_lora DoRA" of a Dense stack, after checking that they agree."""
    found = {}
    for name, of_keras, make in [
        ("PEFT", "keras_lora", with_peft),
        ("PEFT DoRA", "keras_lora DoRA", lambda adapted, rank: with_peft(adapted, rank, dora=True)),
        ("loralib", "keras_lora", with_loralib),
    ]:
        if of_keras in models:
            give_b_values(models[of_keras])
            found[name] = make(models[of_keras], case.rank)
            check_equal(models[of_keras], found[name], case)
    return found
