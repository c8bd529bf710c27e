"""Eleven teachers, fitted on the training images: networks, forests, kernels, factorisations.

Each function fits one teacher on images `(N, 64)` in [0, 1] and labels `(N,)`, and returns the
function that embeds images, `(N, 64) -> (N, D_t)`. About half of them never look at a label.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.decomposition import NMF, PCA, TruncatedSVD
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.ensemble import RandomForestClassifier, RandomTreesEmbedding
from sklearn.kernel_approximation import Nystroem
from sklearn.pipeline import make_pipeline
from sklearn.svm import SVC
from torch import Tensor, nn
from torch.nn import functional as F

from .networks import encoder, train

Array: TypeAlias = NDArray[Any]
Embed: TypeAlias = Callable[[Array], Array]


def _network(
    images: Array,
    width: int,
    outputs: int,
    loss: Callable[[Tensor, Tensor], Tensor],
    targets: Tensor,
    epochs: int,
) -> Embed:
    """Train an encoder with a linear head on `targets`; the embedding is what the head reads."""
    body = nn.Sequential(encoder(16, width), nn.ReLU())
    model = nn.Sequential(body, nn.Linear(width, outputs))
    inputs = torch.from_numpy(images)
    train(
        lambda rows: loss(model(inputs[rows]), targets[rows]),
        model.parameters(),
        rows=len(inputs),
        epochs=epochs,
    )
    return _embed(body)


def _embed(model: nn.Module) -> Embed:
    def embed(images: Array) -> Array:
        with torch.no_grad():
            output: Array = model(torch.from_numpy(images)).numpy()
        return output

    return embed


def digit_network(images: Array, labels: Array, seed: int, epochs: int) -> Embed:
    """A convolutional network that tells the ten digits apart (128)."""
    return _network(images, 128, 10, F.cross_entropy, torch.from_numpy(labels), epochs)


def rotation_network(images: Array, labels: Array, seed: int, epochs: int) -> Embed:
    """A convolutional network that tells by which quarter turn an image was rotated (64)."""
    square = images.reshape(-1, 8, 8)
    turned = np.concatenate([np.rot90(square, turn, (1, 2)) for turn in range(4)])
    turns = torch.arange(4).repeat_interleave(len(images))
    # Four times the images: a quarter of the epochs keeps the number of steps.
    return _network(turned.reshape(-1, 64), 64, 4, F.cross_entropy, turns, max(1, epochs // 4))


def parity_network(images: Array, labels: Array, seed: int, epochs: int) -> Embed:
    """A convolutional network that answers: is the digit odd, is it at least five? (64)."""
    answers = torch.from_numpy(np.stack([labels % 2, labels >= 5], axis=1)).float()
    return _network(images, 64, 2, F.binary_cross_entropy_with_logits, answers, epochs)


def autoencoder(images: Array, labels: Array, seed: int, epochs: int) -> Embed:
    """The bottleneck of a convolutional autoencoder (24)."""
    body = encoder(16, 24)
    model = nn.Sequential(body, nn.Linear(24, 256), nn.ReLU(), nn.Linear(256, 64))
    inputs = torch.from_numpy(images)
    train(
        lambda rows: F.mse_loss(model(inputs[rows]), inputs[rows]),
        model.parameters(),
        rows=len(inputs),
        epochs=epochs,
    )
    return _embed(body)


def forest(images: Array, labels: Array, seed: int, epochs: int) -> Embed:
    """Class probabilities of a random forest (10)."""
    model = RandomForestClassifier(100, min_samples_leaf=3, random_state=seed)
    return _float(model.fit(images, labels).predict_proba)


def tree_leaves(images: Array, labels: Array, seed: int, epochs: int) -> Embed:
    """Leaves that images reach in random trees, compressed by a truncated SVD (96)."""
    trees = RandomTreesEmbedding(100, max_depth=5, random_state=seed)
    svd = TruncatedSVD(96, random_state=seed)
    return _float(make_pipeline(trees, svd).fit(images).transform)


def kernel(images: Array, labels: Array, seed: int, epochs: int) -> Embed:
    """Nystroem features of a Gaussian kernel (256)."""
    model = Nystroem(gamma=0.1, n_components=256, random_state=seed)
    return _float(model.fit(images).transform)


def principal_components(images: Array, labels: Array, seed: int, epochs: int) -> Embed:
    """Principal components (32)."""
    return _float(PCA(32, random_state=seed).fit(images).transform)


def nonnegative_parts(images: Array, labels: Array, seed: int, epochs: int) -> Embed:
    """Activations of the parts of a non-negative matrix factorisation (16)."""
    model = NMF(16, init="nndsvda", max_iter=2000, tol=1e-3, random_state=seed)
    return _float(model.fit(images).transform)


def discriminants(images: Array, labels: Array, seed: int, epochs: int) -> Embed:
    """Linear discriminants of the ten digits (9)."""
    return _float(LinearDiscriminantAnalysis().fit(images, labels).transform)


def support_vectors(images: Array, labels: Array, seed: int, epochs: int) -> Embed:
    """Decision values of a support vector machine with a Gaussian kernel (10)."""
    return _float(SVC(C=10.0).fit(images, labels).decision_function)


def _float(transform: Embed) -> Embed:
    return lambda images: np.asarray(transform(images), dtype=np.float32)


TEACHERS: dict[str, Callable[[Array, Array, int, int], Embed]] = {
    "digit CNN": digit_network,
    "rotation CNN": rotation_network,
    "parity CNN": parity_network,
    "autoencoder": autoencoder,
    "random forest": forest,
    "tree leaves": tree_leaves,
    "RBF kernel": kernel,
    "PCA": principal_components,
    "NMF": nonnegative_parts,
    "LDA": discriminants,
    "SVM": support_vectors,
}
