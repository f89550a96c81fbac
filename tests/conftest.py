"""What every test shares: the backend, the three speeds, packages that may be missing, and the CPU time of each file.

The backend comes from `KERAS_BACKEND`. The speed says how much runs:

- `--speed=quick`, what `make quick` runs: without tests marked `full`, `nightly` or `sweep`;
- `--speed=test`, the default and what `make test` runs on each backend: without those marked `nightly` or `sweep`;
- `--speed=all`, what `make test-all` runs: everything.

Two more marks say on which backends a test runs. `once`: it runs no code of a backend (files, the network, the terminal), so
it runs on torch alone, whatever the speed. `torch_first`: JAX and TensorFlow compile each small function that it runs, so
there it waits for `--speed=all`; what is marked `every_backend` in such a file does not wait. A closing line of each run
says how many tests were left out, and why.
"""

from __future__ import annotations

import collections
import gc
import importlib.util
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "jax")


def missing(*packages: str) -> list[str]:
    """Those of `packages` that are not installed."""
    return [each for each in packages if importlib.util.find_spec(each) is None]


if not missing("torch"):
    import torch  # noqa: F401  # before TensorFlow, which KerasHub imports: the other order crashes in one process

import keras  # noqa: E402
import pytest  # noqa: E402

SPEEDS = ("quick", "test", "all")
#: Files that import more than Keras, one backend and pytest. Without these packages they are not collected.
NEEDS = {
    "test_cli_convert.py": ("keras_hub",),
    "test_coverage_page.py": ("keras_hub",),
    "test_factors.py": ("hypothesis",),
    "test_families.py": ("keras_hub",),
    "test_hostile_files.py": ("huggingface_hub", "keras_hub"),
    "test_huggingface.py": ("huggingface_hub", "keras_hub"),
    "test_migration.py": ("keras_hub",),
    "test_nf4.py": ("keras_hub",),
    "test_pages.py": ("yaml",),
    "test_peft.py": ("keras_hub", "peft", "torch", "transformers"),
    "test_peft_experts.py": ("keras_hub", "peft", "torch", "transformers"),
    "test_peft_methods.py": ("peft", "torch"),
    "test_peft_page.py": ("keras_hub", "peft", "torch", "transformers"),
    "test_peft_refusals.py": ("keras_hub",),
    "test_real_files.py": ("pip", "scipy"),
    "test_reduced_bases.py": ("keras_hub",),
    "test_release.py": ("hatchling",),
    "test_site.py": ("yaml",),
    "test_tutorials.py": ("jupytext",),
}
NOT_COLLECTED = {name: packages for name, needed in NEEDS.items() if (packages := missing(*needed))}
collect_ignore = sorted(NOT_COLLECTED)

#: Why tests were left out, and how many.
_left_out: collections.Counter[str] = collections.Counter()
#: By file, the CPU seconds of its tests and how many ran.
_times: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0])


def pytest_addoption(parser):
    parser.addoption("--speed", choices=SPEEDS, default="test", help="how much runs: see tests/conftest.py")


def pytest_report_header(config):
    lines = [f"keras {keras.__version__} on {keras.backend.backend()}, speed {config.getoption('speed')}"]
    return lines + [f"not collected: {name}, needs {', '.join(packages)}" for name, packages in NOT_COLLECTED.items()]


def why_left_out(item, speed: str, backend: str) -> str | None:
    """Why a test is left out at this speed on this backend, or `None`."""
    marks = {mark.name for mark in item.iter_markers()}
    if backend != "torch" and "once" in marks:
        return "run on torch alone: they run no code of a backend"
    if speed != "all" and marks & {"nightly", "sweep"}:
        return "run by `make test-all` alone"
    if speed != "all" and backend != "torch" and "torch_first" in marks and "every_backend" not in marks:
        return f"run on torch by `make test`, on {backend} by `make test-all`"
    if speed == "quick" and "full" in marks:
        return "run by `make test`"
    return None


def pytest_collection_modifyitems(config, items):
    whys = [why_left_out(item, config.getoption("speed"), keras.backend.backend()) for item in items]
    _left_out.update(why for why in whys if why)
    config.hook.pytest_deselected(items=[item for item, why in zip(items, whys, strict=True) if why])
    items[:] = [item for item, why in zip(items, whys, strict=True) if not why]


_frozen = 0


def _freeze_imports() -> None:
    """Keep what was imported out of garbage collection: Keras collects at each deletion, which takes 0.7 s otherwise."""
    global _frozen
    if len(sys.modules) > _frozen + 50:
        gc.collect()
        gc.freeze()
        _frozen = len(sys.modules)


def pytest_collection_finish(session):
    _freeze_imports()


def pytest_terminal_summary(terminalreporter):
    for why, count in _left_out.most_common():
        terminalreporter.write_line(f"{count} left out: {why}")


#: Packages that single tests import. One that is not installed skips these tests, by name.
OPTIONAL = missing("keras_hub", "matplotlib", "onnxruntime", "openvino", "peft", "tensorflow", "torch", "transformers")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    error = call.excinfo.value if call.excinfo is not None else None
    if isinstance(error, ModuleNotFoundError) and str(error.name).partition(".")[0] in OPTIONAL:
        report.outcome = "skipped"
        report.longrepr = (str(item.path), item.location[1], f"needs {error.name}, which is not installed")
    return report


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item, nextitem):
    before = _cpu_seconds()
    try:
        return (yield)
    finally:
        times = _times[item.path.name]
        times[0] += _cpu_seconds() - before
        times[1] += 1
        if nextitem is None or nextitem.path != item.path:  # no test's model is alive here
            _freeze_imports()


def pytest_sessionfinish(session):
    if path := os.environ.get("CPU_TIMES"):  # `tests/cpu.py` asks for it
        Path(path).write_text(json.dumps(_times))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """The same numbers every time. Not a fixture: those of a module are set up before those of a test."""
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy("float32")
