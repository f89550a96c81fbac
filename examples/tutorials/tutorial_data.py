"""What the tutorials share with the examples: a pretrained model and its data, from packages on PyPI.

`examples/requirements.txt` lists what to install. The examples' modules are in the folder above this one.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from movie_reviews import build_classifier
from movie_reviews_data import load_minilm, load_sentences

__all__ = ["build_classifier", "load_minilm", "load_sentences"]
