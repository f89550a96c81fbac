"""What a user does first, with the wheel and one backend: `python tests/smoke.py WHEEL BACKEND`.

It makes a new environment with the wheel, its dependencies and one backend, and uses the package there, not the checkout.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

BACKENDS = ("jax", "tensorflow", "torch")
REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements"
#: Packages of the extras.
EXTRAS = ("huggingface_hub", "keras_hub", "matplotlib", "peft", "transformers")


def main(wheel: str, backend: str) -> None:
    """Install the wheel with a backend in a new environment, and use it there."""
    clean = {key: text for key, text in os.environ.items() if key not in ("PYTHONPATH", "KERAS_BACKEND", "KERAS_HOME")}
    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder, "environment", "bin", "python")
        subprocess.run([sys.executable, "-m", "venv", python.parents[1]], check=True, env=clean)
        pip = [python, "-m", "pip", "--disable-pip-version-check"]
        wanted = [Path(wheel).resolve(), "-r", REQUIREMENTS / f"{backend}.txt"]
        subprocess.run([*pip, "install", "--quiet", *wanted], check=True, env=clean)
        subprocess.run([*pip, "check"], check=True, env=clean)
        environment = {**clean, "HOME": folder, "TF_CPP_MIN_LOG_LEVEL": "3"}  # a home without a keras.json
        kept = {"cwd": folder, "env": environment}
        first = subprocess.run([python, "-c", "import keras_lora"], capture_output=True, text=True, **kept)
        if backend == "tensorflow":
            assert first.returncode == 0, first.stderr
        else:  # as the README says
            assert "No module named 'tensorflow'" in first.stderr, first.stderr
        environment["KERAS_BACKEND"] = backend
        subprocess.run([python, "-P", __file__, "--here", backend, Path(wheel).name.split("-")[1]], check=True, **kept)


def here(backend: str, version: str) -> None:
    """Use the installed package in this process, in a new folder."""
    import keras
    import numpy as np

    import keras_lora

    assert keras.backend.backend() == backend
    assert keras_lora.__version__ == importlib.metadata.version("keras_lora") == version
    assert Path(keras_lora.__file__).is_relative_to(sys.prefix), keras_lora.__file__
    others = [each for each in (*BACKENDS, *EXTRAS) if each != backend and importlib.util.find_spec(each)]
    assert not others, others

    def base():
        keras.utils.set_random_seed(0)
        hidden = keras.layers.Dense(16, activation="relu")
        return keras.Sequential([keras.Input((8,)), hidden, keras.layers.Dense(2)], name="net")

    x, y = np.ones((32, 8), "float32"), np.ones((32, 2), "float32")
    model = base()
    model.save("base.keras")
    plain = model.predict(x, verbose=0)
    keras_lora.apply_lora(model, rank=2)
    model.compile(keras.optimizers.Adam(0.1), "mse")
    model.fit(x, y, epochs=2, verbose=0)
    tuned = model.predict(x, verbose=0)
    assert np.abs(tuned - plain).max() > 1e-2

    keras_lora.save_adapter(model, "tuned.safetensors")
    other = keras_lora.load_adapter(base(), "tuned.safetensors")
    np.testing.assert_allclose(other.predict(x, verbose=0), tuned, atol=1e-5)

    model.save("tuned.keras")
    loaded = keras.saving.load_model("tuned.keras")
    np.testing.assert_allclose(loaded.predict(x, verbose=0), tuned, atol=1e-5)
    loaded.fit(x, y, verbose=0)

    keras_lora.merge_lora(model)
    assert type(model.layers[0]) is keras.layers.Dense
    np.testing.assert_allclose(model.predict(x, verbose=0), tuned, atol=1e-5)

    said = ""
    try:
        keras_lora.load_adapter(base(), "hf://owner/name")
    except ImportError as error:
        said = str(error)
    assert "pip install keras_lora[huggingface]" in said

    assert "COMMAND" in command("--help")
    assert version in command("--version")
    assert "lora" in command("inspect", "tuned.safetensors")
    assert "default" in command("inspect", "tuned.keras")
    command("merge", "base.keras", "tuned.safetensors", "merged.keras")
    script = "import keras, sys; keras.saving.load_model('merged.keras'); assert 'keras_lora' not in sys.modules"
    subprocess.run([sys.executable, "-P", "-c", script], check=True)


def command(*words: str) -> str:
    """What `keras-lora` prints."""
    program = Path(sys.executable).with_name("keras-lora")
    return subprocess.run([program, *words], check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    if sys.argv[1] == "--here":
        here(*sys.argv[2:])
    else:
        main(*sys.argv[1:])
        print(f"{Path(sys.argv[1]).name} with {sys.argv[2]}: the smoke test passed")
