"""Four questions to an embedding: what a simple reader, fitted on training images, gets from it."""

from __future__ import annotations

import numpy as np

from ..evaluation import kmeans_nmi, knn_probe, logistic_probe, ridge_probe, standardise
from .teachers import Array

PROBES = {
    "linear": "linear probe, accuracy",
    "knn": "5-NN, accuracy",
    "nmi": "k-means clusters, NMI",
    "shape": "slant and stretch, R²",
}


def ink_shape(images: Array) -> Array:
    """Slant and stretch of the ink, a ratio of second central moments of images `(N, 64)`.

    With C the covariance of the ink's position, the two columns are
    `(C_xx - C_yy) / (C_xx + C_yy)` and `2 C_xy / (C_xx + C_yy)`: the length and the double angle
    of the stroke's long axis in Cartesian form, defined for round digits too.
    """
    ink = images.reshape(-1, 8, 8) / images.sum(1).reshape(-1, 1, 1)
    y, x = np.mgrid[:8, :8]
    dx = x - (ink * x).sum((1, 2), keepdims=True)
    dy = y - (ink * y).sum((1, 2), keepdims=True)
    xx, yy, xy = ((ink * moment).sum((1, 2)) for moment in (dx * dx, dy * dy, dx * dy))
    return np.stack([(xx - yy) / (xx + yy), 2 * xy / (xx + yy)], axis=1)


def probe(
    train: Array, test: Array, labels: tuple[Array, Array], shapes: tuple[Array, Array], seed: int
) -> dict[str, float]:
    """Score an embedding on held-out images.

    Args:
        train: embeddings of the training images `(N, D)`; readers are fitted on these.
        test: embeddings of the held-out images.
        labels: digits of the training and of the held-out images.
        shapes: `ink_shape` of the training and of the held-out images.
        seed: seed of k-means, which clusters the held-out embeddings.

    Returns:
        One score for each entry of `PROBES`; higher is better.
    """
    train, test = standardise(train, test)
    classes = train, labels[0], test, labels[1]
    return {
        "linear": logistic_probe(*classes, inverse_penalty=0.1),
        "knn": knn_probe(*classes),
        "nmi": kmeans_nmi(test, labels[1], clusters=10, seed=seed),
        "shape": ridge_probe(train, shapes[0], test, shapes[1]),
    }
