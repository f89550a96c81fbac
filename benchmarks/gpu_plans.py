"""The ways to compute a layer with LoRA that `gpu.py` compares, on torch and JAX, and the check that they are right."""

from __future__ import annotations

import functools
import importlib.util
import time
from collections.abc import Callable
from typing import Any

import numpy as np

SCALE = 2.0
TRAINED = {"frozen": "x", "full": "xw"}  # what has a gradient; in the other plans "xab"
TOLERANCE = 1e-4

Inputs = dict[str, Any]  # x, w, a, b and dy
Plan = Callable[..., Any]  # from x, w, a and b to y
Step = Callable[[], tuple[Any, ...]]  # forward and backward: y, then the gradients of what trains


class Torch:
    """The plans on torch, eager or compiled."""

    def __init__(self, compiled: bool):
        import torch

        self.torch, self.compiled = torch, compiled
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.plans = torch_plans()

    def inputs(self, d: int, tokens: int, rank: int, dtype: str) -> Inputs:
        made = functools.partial(self.torch.randn, device=self.device, dtype=getattr(self.torch, dtype))
        return {name: made(shape) * scale for name, (shape, scale) in shapes(d, tokens, rank).items()}

    def steps(self, inputs: Inputs) -> dict[str, Step]:
        self.torch._dynamo.reset()  # otherwise the ninth shape of a function would run uncompiled
        made = {name: self.step(name, plan, inputs) for name, plan in self.plans.items()}
        return {**made, "PEFT": self.peft_step(**inputs)} if importlib.util.find_spec("peft") else made

    def step(self, name: str, plan: Plan, inputs: Inputs) -> Step:
        trained, forward = TRAINED.get(name, "xab"), self.ready(plan)
        leaves = {each: inputs[each].detach().requires_grad_(each in trained) for each in "xwab"}
        wanted = [leaves[each] for each in trained]

        def call() -> tuple[Any, ...]:
            y = forward(**leaves)
            return y, *self.torch.autograd.grad(y, wanted, inputs["dy"])

        return call

    def peft_step(self, x: Any, w: Any, a: Any, b: Any, dy: Any) -> Step:
        from peft import LoraConfig, get_peft_model

        base = self.torch.nn.Sequential(self.torch.nn.Linear(*w.shape, bias=False, device=w.device, dtype=w.dtype))
        config = LoraConfig(r=a.shape[1], lora_alpha=int(SCALE * a.shape[1]), target_modules=["0"])
        layer = get_peft_model(base, config, autocast_adapter_dtype=False).base_model.model[0]
        factors = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        with self.torch.no_grad():
            for parameter, value in zip([layer.base_layer.weight, *factors], [w, a, b], strict=True):
                parameter.copy_(value.T)
        x, forward = x.detach().requires_grad_(), self.ready(layer)

        def call() -> tuple[Any, ...]:
            y = forward(x)
            dx, da, db = self.torch.autograd.grad(y, [x, *factors], dy)
            return y, dx, da.T, db.T

        return call

    def ready(self, plan: Plan) -> Plan:
        """Compile a plan. On a CPU it is only traced, which needs no C++ compiler."""
        backend = "inductor" if self.device == "cuda" else "aot_eager"
        return self.torch.compile(plan, dynamic=False, backend=backend) if self.compiled else plan

    def seconds(self, call: Callable[[], Any], times: int) -> float:
        if self.device == "cpu":
            return wall_seconds(call, times, lambda result: None)
        start, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / times

    def numbers(self, array: Any) -> np.ndarray:
        return array.detach().cpu().double().numpy()


def torch_plans() -> dict[str, Plan]:
    import torch

    from keras_lora.backend import low_rank_sum

    class Hybrid(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any, w: Any, a: Any, b: Any) -> Any:
            changed = torch.addmm(w, a, b, alpha=SCALE)
            ctx.save_for_backward(x, changed, a, b)
            return x @ changed

        @staticmethod
        def backward(ctx: Any, dy: Any) -> tuple[Any, ...]:
            x, changed, a, b = ctx.saved_tensors
            return dy @ changed.T, None, x.T @ (dy @ (SCALE * b).T), (SCALE * (x @ a)).T @ dy

    return {
        **shared_plans(),
        "addmm": lambda x, w, a, b: torch.addmm(x @ w, x @ a, b, alpha=SCALE),
        "keras_lora": lambda x, w, a, b: low_rank_sum(x, a, b, SCALE, 1.0, kernel=w),
        "hybrid": lambda x, w, a, b: Hybrid.apply(x, w, a, b),
    }


class Jax:
    """The plans on JAX, under jit."""

    def __init__(self) -> None:
        import jax

        self.jax, self.plans = jax, jax_plans()
        self.jitted = functools.cache(self.jitted_step)

    def inputs(self, d: int, tokens: int, rank: int, dtype: str) -> Inputs:
        keys, normal = self.jax.random.split(self.jax.random.key(0), 5), self.jax.random.normal
        pairs = zip(keys, shapes(d, tokens, rank).items(), strict=True)
        return {name: normal(key, shape, dtype) * scale for key, (name, (shape, scale)) in pairs}

    def steps(self, inputs: Inputs) -> dict[str, Step]:
        return {name: self.step(name, plan, inputs) for name, plan in self.plans.items()}

    def step(self, name: str, plan: Plan, inputs: Inputs) -> Step:
        trained = TRAINED.get(name, "xab")
        used = {each: inputs[each] for each in ("xw" if name in TRAINED else "xwab")}  # else each rank compiles "full" again
        return functools.partial(self.jitted(plan, trained), used, inputs["dy"])

    def jitted_step(self, plan: Plan, trained: str) -> Callable[..., Any]:
        def step(inputs: Inputs, dy: Any) -> tuple[Any, ...]:
            y, pull = self.jax.vjp(
                lambda *wanted: plan(**{"a": None, "b": None, **inputs, **dict(zip(trained, wanted, strict=True))}),
                *(inputs[each] for each in trained),
            )
            return y, *pull(dy)  # without y, XLA would leave the forward pass out

        return self.jax.jit(step)

    def seconds(self, call: Callable[[], Any], times: int) -> float:
        return wall_seconds(call, times, self.jax.block_until_ready)

    def numbers(self, array: Any) -> np.ndarray:
        return np.asarray(array, "float64")


def jax_plans() -> dict[str, Plan]:
    import jax

    from keras_lora.backend import low_rank_sum

    @jax.custom_vjp
    def hybrid(x: Any, w: Any, a: Any, b: Any) -> Any:
        return x @ (w + SCALE * (a @ b))

    def forward(x: Any, w: Any, a: Any, b: Any) -> tuple[Any, Any]:
        changed = w + SCALE * (a @ b)
        return x @ changed, (x, changed, a, b)

    def backward(saved: Any, dy: Any) -> tuple[Any, ...]:
        x, changed, a, b = saved
        return dy @ changed.T, None, x.T @ (dy @ (SCALE * b).T), (SCALE * (x @ a)).T @ dy

    hybrid.defvjp(forward, backward)
    return {
        **shared_plans(),
        "keras_lora": lambda x, w, a, b: low_rank_sum(x, a, b, SCALE, 1.0, y=x @ w),
        "hybrid": lambda x, w, a, b: hybrid(x, w, a, b),
    }


def shared_plans() -> dict[str, Plan]:
    """What is written the same way for torch and JAX."""
    return {
        "frozen": lambda x, w, a, b: x @ w,
        "full": lambda x, w, a, b: x @ w,
        "built-in": lambda x, w, a, b: x @ (w + SCALE * (a @ b)),
        "plain": lambda x, w, a, b: x @ w + SCALE * ((x @ a) @ b),
    }


def shapes(d: int, tokens: int, rank: int) -> dict[str, tuple[tuple[int, int], float]]:
    """The shapes of the inputs, and the factors of their normally distributed numbers."""
    few = {"a": ((d, rank), d**-0.5), "b": ((rank, d), rank**-0.5)}
    return {"x": ((tokens, d), 1.0), "w": ((d, d), d**-0.5), **few, "dy": ((tokens, d), 1.0)}


def wall_seconds(call: Callable[[], Any], times: int, wait: Callable[[Any], Any]) -> float:
    start = time.perf_counter()
    for _ in range(times):
        result = call()
    wait(result)
    return (time.perf_counter() - start) / times


def expected(plan: str, x: Any, w: Any, a: Any, b: Any, dy: Any) -> dict[str, np.ndarray]:
    """The output and the gradients of a plan, by the formulas."""
    changed = w if plan in TRAINED else w + SCALE * a @ b
    found = {"x": dy @ changed.T, "w": x.T @ dy, "a": SCALE * x.T @ (dy @ b.T), "b": SCALE * (x @ a).T @ dy}
    return {"y": x @ changed} | {each: found[each] for each in TRAINED.get(plan, "xab")}


def check(engine: Torch | Jax) -> None:
    """Raise unless every plan has the right output and gradients, in float32."""
    inputs = engine.inputs(16, 24, 4, "float32")
    numbers = {name: engine.numbers(each) for name, each in inputs.items()}
    for plan, step in engine.steps(inputs).items():
        for (what, right), found in zip(expected(plan, **numbers).items(), step(), strict=True):
            difference = np.abs(engine.numbers(found) - right).max() / np.abs(right).max()
            if not difference <= TOLERANCE:  # written so that NaN fails too
                raise AssertionError(f"The plan {plan!r} has a wrong {what}: relative error {difference:.1e}.")
