"""Readers fitted on some rows and scored on others: what can be read from an embedding."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression, RidgeClassifierCV, RidgeCV
from sklearn.metrics import normalized_mutual_info_score, r2_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from .checks import Array, check_count, check_rows, to_columns, to_labels, to_values

_PENALTIES = np.logspace(-2, 3, 6)  # of ridge readers; leave-one-out errors choose among them


def standardise(train: Any, test: Any) -> tuple[Array, Array]:
    """Return both parts with the columns of `train` at mean 0 and deviation 1.

    Args:
        train: embeddings ``(N, H)`` that give means and deviations.
        test: embeddings ``(M, H)``. A column that is constant in `train` is only centred.

    Returns:
        Two float64 arrays of the same shapes.

    Raises:
        ValueError: shapes that do not fit, or numbers that are not finite.

    Note:
        The linear readers of this module do it by themselves; neighbours and clusters are looked
        for in the embedding as it is given.

    Example:
        >>> train, test = standardise([[0.0, 5.0], [2.0, 5.0]], [[4.0, 6.0]])
        >>> train.tolist(), test.tolist()
        ([[-1.0, 0.0], [1.0, 0.0]], [[3.0, 1.0]])
    """
    train, test = _parts(train, test)
    scaler = StandardScaler().fit(train)
    return scaler.transform(train), scaler.transform(test)


def linear_probe(train: Any, train_labels: Any, test: Any, test_labels: Any) -> float:
    r"""Return the accuracy of a least-squares classifier.

    .. math:: \hat y(x) = \arg\max_c \; w_c^\top x + b_c, \qquad
        w, b = \arg\min \sum_n \lVert e_{y_n} - W x_n - b \rVert^2 + \alpha \lVert W \rVert^2

    with targets :math:`\pm 1` for :math:`e`, columns standardised, and :math:`\alpha` in
    0.01 ... 1000 by leave-one-out errors on `train`.

    Args:
        train: embeddings ``(N, H)`` on which the classifier is fitted.
        train_labels: their classes ``(N,)``, at least two; numbers or strings.
        test: embeddings ``(M, H)`` on which it is scored.
        test_labels: their classes ``(M,)``; one that `train` has not got counts as missed.

    Returns:
        Accuracy on `test`, in [0, 1], higher is better. A constant embedding gives the share of
        the most frequent class of `train`.

    Raises:
        ValueError: shapes that do not fit, numbers that are not finite, fewer than two classes.
        TypeError: embeddings that are not numbers.

    Note:
        Closed form, :math:`O(N H \min(N, H))` for any number of classes: the quickest reader.

    Source:
        Alain and Bengio, "Understanding intermediate layers using linear classifier probes",
        ICLR workshop 2017, arXiv 1610.01644; scikit-learn's `RidgeClassifierCV`.

    Example:
        >>> linear_probe([[0.0], [1.0], [9.0], [8.0]], ["a", "a", "b", "b"], [[0.5]], ["a"])
        1.0
    """
    return _accuracy(RidgeClassifierCV(_PENALTIES), train, train_labels, test, test_labels, True)


def logistic_probe(
    train: Any, train_labels: Any, test: Any, test_labels: Any, *, inverse_penalty: float = 1.0
) -> float:
    r"""Return the accuracy of a multinomial logistic regression.

    .. math:: p(c \mid x) \propto \exp(w_c^\top x + b_c), \qquad
        \min_{W, b} \; - C \sum_n \log p(y_n \mid x_n) + \tfrac12 \lVert W \rVert^2

    on standardised columns.

    Args:
        train: embeddings ``(N, H)`` on which the classifier is fitted.
        train_labels: their classes ``(N,)``, at least two; numbers or strings.
        test: embeddings ``(M, H)`` on which it is scored.
        test_labels: their classes ``(M,)``; one that `train` has not got counts as missed.
        inverse_penalty: C, positive; smaller is smoother.

    Returns:
        Accuracy on `test`, in [0, 1], higher is better. A constant embedding gives the share of
        the most frequent class of `train`.

    Raises:
        ValueError: shapes that do not fit, numbers that are not finite, fewer than two classes,
            a penalty that is not positive.
        TypeError: embeddings that are not numbers.

    Note:
        Some hundreds of passes over `train`; slower than `linear_probe`, often a little better.

    Source:
        The usual "linear evaluation", as in Radford et al., "Learning Transferable Visual Models
        From Natural Language Supervision", ICML 2021, arXiv 2103.00020, section 3.2;
        scikit-learn's `LogisticRegression`.

    Example:
        >>> logistic_probe([[0.0], [1.0], [9.0], [8.0]], [0, 0, 1, 1], [[0.5], [8.5]], [0, 1])
        1.0
    """
    if not (isinstance(inverse_penalty, (int, float)) and 0 < inverse_penalty < np.inf):
        raise ValueError(
            f"inverse_penalty: expected a positive finite number, got {inverse_penalty!r}"
        )
    model = LogisticRegression(C=inverse_penalty, max_iter=5000)
    return _accuracy(model, train, train_labels, test, test_labels, True)


def knn_probe(
    train: Any,
    train_labels: Any,
    test: Any,
    test_labels: Any,
    *,
    neighbours: int = 5,
    metric: str = "euclidean",
) -> float:
    r"""Return the accuracy of the vote of the nearest rows.

    .. math:: \hat y(x) = \arg\max_c \; \lvert \{ n \in N_k(x) : y_n = c \} \rvert

    Args:
        train: embeddings ``(N, H)`` among which neighbours are looked for.
        train_labels: their classes ``(N,)``, at least two; numbers or strings.
        test: embeddings ``(M, H)`` on which the vote is scored.
        test_labels: their classes ``(M,)``; one that `train` has not got counts as missed.
        neighbours: k, at most N. A tie goes to the first class in sorted order.
        metric: "euclidean" or "cosine", on the embedding as it is.

    Returns:
        Accuracy on `test`, in [0, 1], higher is better.

    Raises:
        ValueError: shapes that do not fit, numbers that are not finite, fewer than two classes,
            more neighbours than rows, an unknown metric.
        TypeError: embeddings that are not numbers.

    Note:
        :math:`O(N M H)`; the distances are never held at once.

    Source:
        Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination",
        CVPR 2018, arXiv 1805.01978 (there with weights); scikit-learn's `KNeighborsClassifier`.

    Example:
        >>> rows, labels = [[0.0], [1.0], [9.0], [8.0]], ["a", "a", "b", "b"]
        >>> knn_probe(rows, labels, [[0.4], [8.4]], ["a", "a"], neighbours=1)
        0.5
    """
    check_metric(metric)
    train, test = _parts(train, test)
    check_count("neighbours", neighbours, len(train), "the rows of train")
    model = KNeighborsClassifier(neighbours, metric=metric)
    return _accuracy(model, train, train_labels, test, test_labels, False)


def kmeans_nmi(
    embeddings: Any, labels: Any, *, clusters: int | None = None, seed: int = 0
) -> float:
    r"""Return how much k-means clusters and classes say about each other.

    .. math:: \frac{2 \, I(C; Y)}{H(C) + H(Y)}

    Args:
        embeddings: ``(N, H)``, clustered as they are.
        labels: classes ``(N,)``, at least two; k-means does not see them.
        clusters: how many; None: as many as classes.
        seed: of k-means, the best of ten starts.

    Returns:
        Normalised mutual information, in [0, 1], higher is better. Clusters at random are a
        little above 0, the more so the more there are.

    Raises:
        ValueError: shapes that do not fit, numbers that are not finite, fewer than two classes,
            more clusters than rows.
        TypeError: embeddings that are not numbers.

    Note:
        Ten starts of some tens of passes, :math:`O(N H k)` each.

    Source:
        Strehl and Ghosh, "Cluster Ensembles", JMLR 3 (2002), with the arithmetic mean of
        entropies; scikit-learn's `KMeans` and `normalized_mutual_info_score`.

    Example:
        >>> kmeans_nmi([[0.0], [1.0], [9.0], [8.0]], ["a", "a", "b", "b"])
        1.0
    """
    columns = to_columns("embeddings", embeddings)
    classes = to_labels("labels", labels, len(columns), least=2)
    clusters = len(np.unique(classes)) if clusters is None else clusters
    # k-means makes no more clusters than rows that differ, and warns: a collapsed embedding may
    distinct = len(np.unique(columns, axis=0))
    check_count("clusters", clusters, len(columns), "the rows of embeddings")
    model = KMeans(min(clusters, distinct), n_init=10, random_state=seed)
    return float(normalized_mutual_info_score(classes, model.fit_predict(columns)))


def ridge_probe(
    train: Any,
    train_values: Any,
    test: Any,
    test_values: Any,
    *,
    average: str = "uniform",
) -> float:
    r"""Return the R² of a ridge regression.

    .. math:: R^2_j = 1 - \frac{\sum_n (y_{nj} - \hat y_{nj})^2}{\sum_n (y_{nj} - \bar y_j)^2},
        \qquad \hat y = W x + b, \quad
        \min_{W, b} \sum_n \lVert y_n - W x_n - b \rVert^2 + \alpha \lVert W \rVert^2

    on standardised columns, :math:`\alpha` in 0.01 ... 1000 by leave-one-out errors on `train`.

    Args:
        train: embeddings ``(N, H)`` on which the regression is fitted, two rows or more.
        train_values: what to read, ``(N,)`` or ``(N, K)``.
        test: embeddings ``(M, H)`` on which it is scored, two rows or more.
        test_values: what to read there, ``(M,)`` or ``(M, K)``.
        average: over K: "uniform" is the mean of :math:`R^2_j`; "variance" adds the numerators
            and the denominators first, those of constant columns too, so that a rotation of the
            values changes nothing.

    Returns:
        R² on `test`, in (-inf, 1], higher is better; 0 is what the mean of `test_values` gives.

    Raises:
        ValueError: shapes that do not fit, numbers that are not finite, fewer than two rows,
            values that do not vary on `test` (any column; for "variance": all columns).
        TypeError: not numbers.

    Note:
        Closed form, :math:`O(N H \min(N, H))` and :math:`O(N K)` a penalty.

    Source:
        Hoerl and Kennard, "Ridge Regression", Technometrics 12 (1970); scikit-learn's `RidgeCV`
        and, for "uniform", `r2_score`.

    Example:
        >>> rows = [[0.0], [1.0], [2.0], [3.0]]
        >>> round(ridge_probe(rows, [1.0, 3.0, 5.0, 7.0], [[4.0], [5.0]], [9.0, 11.0]), 2)
        1.0
    """
    if average not in ("uniform", "variance"):
        raise ValueError(f"average: expected 'uniform' or 'variance', got {average!r}")
    train, test = _parts(train, test)
    check_rows("train", train, 2)
    check_rows("test", test, 2)
    train_values = to_values("train_values", train_values, len(train))
    test_values = to_values("test_values", test_values, len(test))
    if train_values.shape[1] != test_values.shape[1]:
        raise ValueError(
            f"test_values: expected {train_values.shape[1]} columns like train_values,"
            f" got {test_values.shape[1]}"
        )
    varies = np.ptp(test_values, axis=0) > 0
    if not (varies.all() if average == "uniform" else varies.any()):
        raise ValueError("test_values: expected values that vary, got a constant column")
    model = make_pipeline(StandardScaler(), RidgeCV(_PENALTIES)).fit(train, train_values)
    predicted = model.predict(test).reshape(test_values.shape)
    if average == "uniform":
        return float(r2_score(test_values, predicted))
    # not r2_score's own "variance_weighted": it drops the errors of constant columns
    deviations = test_values - test_values.mean(0)
    largest = np.abs(deviations).max()  # squares of small numbers stay above 0
    errors = np.square((test_values - predicted) / largest).sum()
    return float(1 - errors / np.square(deviations / largest).sum())


def reconstruction_r2(train: Any, train_teacher: Any, test: Any, test_teacher: Any) -> float:
    r"""Return the share of a teacher's variance that is a linear function of the embedding.

    .. math:: 1 - \frac{\sum_n \lVert t_n - W s_n - b \rVert^2}{\sum_n \lVert t_n - \bar t \rVert^2}

    Args:
        train: the student's embeddings ``(N, H)`` on which :math:`W, b` are fitted.
        train_teacher: the teacher's of the same rows, ``(N, D)``.
        test: the student's embeddings ``(M, H)`` on which it is scored.
        test_teacher: the teacher's of the same rows, ``(M, D)``.

    Returns:
        R² on `test`, in (-inf, 1], higher is better; a rotation of the teacher changes nothing.

    Raises:
        ValueError: shapes that do not fit, numbers that are not finite, fewer than two rows, a
            teacher that does not vary on `test`.
        TypeError: not numbers.

    Note:
        `ridge_probe` with ``average="variance"``. A student of width H reads at most the H
        principal directions of a wider teacher.

    Source:
        `ridge_probe`; the share of explained variance of principal component analysis.

    Example:
        >>> student = [[0.0], [1.0], [2.0], [3.0]]
        >>> teacher = [[0.0, 0.0], [2.0, -1.0], [4.0, -2.0], [6.0, -3.0]]
        >>> round(reconstruction_r2(student, teacher, student, teacher), 3)
        1.0
    """
    return ridge_probe(train, train_teacher, test, test_teacher, average="variance")


def check_metric(metric: Any) -> None:
    """Raise ValueError unless `metric` is one that neighbours can be looked for in."""
    if metric not in ("euclidean", "cosine"):
        raise ValueError(f"metric: expected 'euclidean' or 'cosine', got {metric!r}")


def _parts(train: Any, test: Any) -> tuple[Array, Array]:
    """Return both parts as arrays of the same width."""
    train = to_columns("train", train)
    return train, to_columns("test", test, width=train.shape[1])


def _accuracy(
    model: Any, train: Any, train_labels: Any, test: Any, test_labels: Any, scaled: bool
) -> float:
    """Fit a classifier, on standardised columns if `scaled`, and return its share of hits."""
    train, test = _parts(train, test)
    train_labels = to_labels("train_labels", train_labels, len(train), least=2)
    test_labels = to_labels("test_labels", test_labels, len(test))
    model = make_pipeline(StandardScaler(), model) if scaled else model
    return float((model.fit(train, train_labels).predict(test) == test_labels).mean())
