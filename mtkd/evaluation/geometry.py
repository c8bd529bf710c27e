"""The shape of an embedding without a reader: pairs, neighbours, directions."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.stats import spearmanr
from sklearn.neighbors import NearestNeighbors

from .checks import Array, check_count, check_rows, to_columns, to_labels
from .probes import check_metric


def pair_spearman(first: Any, second: Any, scores: Any) -> float:
    r"""Return the rank correlation of cosines with scores of pairs, as benchmarks of similarity do.

    .. math:: \rho = \mathrm{corr}\big(\mathrm{rank}(\cos(a_n, b_n)), \; \mathrm{rank}(y_n)\big)

    with mean ranks for ties.

    Args:
        first: embeddings ``(N, H)`` of one side, two rows or more.
        second: embeddings ``(N, H)`` of the other side.
        scores: how alike people find them, or any graded relation, ``(N,)``, two or more values.

    Returns:
        Spearman's :math:`\rho`, in [-1, 1], higher is better. 0 where all cosines are equal, as
        for a collapsed embedding, which is not a rank at all.

    Raises:
        ValueError: shapes that do not fit, numbers that are not finite, fewer than two pairs,
            scores that are all equal.
        TypeError: not numbers.

    Note:
        A row of zeros has cosine 0 with everything. :math:`O(N H)`.

    Source:
        Cer et al., "SemEval-2017 Task 1: Semantic Textual Similarity", arXiv 1708.00055;
        scipy's `spearmanr`.

    Example:
        >>> first, second = [[1.0, 0.0]] * 3, [[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]
        >>> round(pair_spearman(first, second, [5.0, 3.0, 0.0]), 6)
        1.0
    """
    first = to_columns("first", first)
    second = to_columns("second", second, *first.shape)
    check_rows("first", first, 2)
    scores = to_columns("scores", to_labels("scores", scores, len(first))[:, None])[:, 0]
    to_labels("scores", scores, len(first), least=2)
    # rounded, so that what is equal but for the last bits is a tie
    cosines = np.round((_unit(first) * _unit(second)).sum(1), 12)
    if np.ptp(cosines) == 0:
        return 0.0
    return float(spearmanr(cosines, scores).statistic)


def isotropy(embeddings: Any) -> float:
    r"""Return how evenly an embedding uses its directions: IsoScore.

    .. math:: \frac{P - 1}{H - 1}, \qquad
        P = \frac{\big(\sum_i \lambda_i\big)^2}{\sum_i \lambda_i^2}

    with the eigenvalues :math:`\lambda` of the covariance of the columns; P, the participation
    ratio, is the number of directions in use.

    Args:
        embeddings: ``(N, H)``, two rows and two columns or more.

    Returns:
        In [0, 1]: 1 for a covariance that is a multiple of the identity, 0 for a line or for a
        constant. Neither is good as such: a fall towards 0 while training is a collapse.

    Raises:
        ValueError: shapes that do not fit, numbers that are not finite.
        TypeError: not numbers.

    Note:
        At most :math:`(N - 2) / (H - 1)` for N up to H rows. :math:`O(N H \min(N, H))`.

    Source:
        Rudman et al., "IsoScore: Measuring the Uniformity of Embedding Space Utilization",
        Findings of ACL 2022, arXiv 2108.07344, algorithm 1, which simplifies to the above.

    Example:
        >>> isotropy([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        1.0
    """
    columns = to_columns("embeddings", embeddings)
    check_rows("embeddings", columns, 2)
    if columns.shape[1] < 2:
        raise ValueError("embeddings: expected at least 2 columns, got 1")
    centred = columns - columns.mean(0)
    largest = np.abs(centred).max()
    # a constant column differs from its mean by rounding
    if largest <= 1e-12 * np.abs(columns).max():
        return 0.0
    variances = np.linalg.svd(centred / largest, compute_uv=False) ** 2
    participation = variances.sum() ** 2 / (variances**2).sum()
    return float((participation - 1) / (columns.shape[1] - 1))


def neighbour_overlap(
    first: Any, second: Any, *, neighbours: int = 10, metric: str = "cosine"
) -> float:
    r"""Return the share of nearest neighbours that two embeddings of the same rows agree on.

    .. math:: \frac{1}{N} \sum_n \frac{\lvert A_k(n) \cap B_k(n) \rvert}{k}

    with the k rows nearest to row n, itself left out, in each embedding.

    Args:
        first: embeddings ``(N, H)``, for example the student's.
        second: embeddings ``(N, D)`` of the same rows, for example a teacher's.
        neighbours: k, at most N - 1.
        metric: "cosine" or "euclidean".

    Returns:
        In [0, 1], higher is more alike; two unrelated embeddings give about k / (N - 1).

    Raises:
        ValueError: shapes that do not fit, numbers that are not finite, more neighbours than
            other rows, an unknown metric.
        TypeError: not numbers.

    Note:
        Symmetric; rotations and scales change nothing. Which of several rows at the same distance
        counts as nearer is arbitrary. :math:`O(N^2 (H + D))`; the distances are never held at
        once.

    Source:
        Huh et al., "The Platonic Representation Hypothesis", ICML 2024, arXiv 2405.07987,
        mutual k-nearest-neighbour metric.

    Example:
        >>> rows = [[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]]
        >>> neighbour_overlap(
        ...     rows, [[x] for x in (0.0, 0.1, 5.0, 5.1)], neighbours=1, metric="euclidean"
        ... )
        1.0
    """
    check_metric(metric)
    first = to_columns("first", first)
    second = to_columns("second", second, rows=len(first))
    check_rows("first", first, 2)
    check_count("neighbours", neighbours, len(first) - 1, "the other rows")
    near = [_neighbours(each, neighbours, metric) for each in (first, second)]
    both = np.sort(np.concatenate(near, axis=1), axis=1)
    return float((both[:, 1:] == both[:, :-1]).sum() / near[0].size)


def _neighbours(columns: Array, count: int, metric: str) -> Array:
    """Indices ``(N, k)`` of the rows nearest to each row, without itself."""
    model = NearestNeighbors(n_neighbors=count, metric=metric, algorithm="brute").fit(columns)
    indices: Array = model.kneighbors(return_distance=False)  # without X: rows are not their own
    return indices


def _unit(columns: Array) -> Array:
    """Rows at length 1; rows of zeros stay."""
    lengths = np.linalg.norm(columns, axis=1, keepdims=True)
    unit: Array = columns / np.where(lengths > 0, lengths, 1)
    return unit
