"""Probes against direct computation, and on embeddings whose scores are known."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from scipy.stats import pearsonr, rankdata
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.metrics import mutual_info_score
from sklearn.metrics.pairwise import cosine_distances
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mtkd.evaluation import (
    evaluate,
    isotropy,
    kmeans_nmi,
    knn_probe,
    linear_probe,
    logistic_probe,
    neighbour_overlap,
    pair_spearman,
    reconstruction_r2,
    ridge_probe,
    standardise,
)

CLASSIFIERS = [linear_probe, logistic_probe, knn_probe]


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def clusters(rows=120, classes=4, width=6, seed=0):
    """Well separated classes: every reader is perfect on them."""
    labels = np.arange(rows) % classes
    return draw(rows, width, seed=seed) + 30 * np.eye(classes, width)[labels], labels


# -- classifiers


@pytest.mark.parametrize("probe", CLASSIFIERS)
def test_perfect_random_and_constant_embeddings(probe):
    x, y = clusters()
    assert probe(x[:60], y[:60], x[60:], y[60:]) == 1
    noise = draw(4000, 6)
    labels = np.random.default_rng(1).integers(0, 4, 4000)
    # four standard deviations of the share of 2000 lucky guesses
    assert abs(probe(noise[:2000], labels[:2000], noise[2000:], labels[2000:]) - 0.25) < 0.04
    flat, uneven = np.ones((30, 3)), np.array([0] * 20 + [1] * 10)
    assert probe(flat, uneven, flat, uneven) == pytest.approx(2 / 3) or probe is knn_probe


@pytest.mark.parametrize("probe", CLASSIFIERS)
def test_labels_may_be_strings_tensors_and_unknown(probe):
    x, y = clusters()
    names = np.array(["ant", "bee", "cat", "dog"])[y]
    assert probe(x[:60], names[:60], x[60:], names[60:]) == 1
    half = torch.from_numpy(x).bfloat16().requires_grad_()
    assert probe(half[:60], torch.from_numpy(y)[:60], half[60:], list(y[60:])) == 1
    unseen = np.where(y == 3, 7, y)
    assert probe(x[:60], y[:60], x[60:], unseen[60:]) == pytest.approx(0.75)


def test_logistic_probe_is_the_minimum_of_its_formula():
    x, y = draw(80, 3), np.arange(80) % 2
    x[:, 0] += 2 * y
    train, test = standardise(x[:50], x[50:])
    inputs, labels = torch.from_numpy(train), torch.from_numpy(y[:50])
    weight = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=500, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        logits = inputs @ weight[1:] + weight[0]
        value = torch.nn.functional.binary_cross_entropy_with_logits(
            logits, labels.double(), reduction="sum"
        )
        value = 0.3 * value + weight[1:].square().sum() / 2
        value.backward()
        return value

    optimizer.step(loss)
    predicted = test @ weight[1:].detach().numpy() + weight[0].item() > 0
    expected = (predicted == y[50:]).mean()
    assert logistic_probe(x[:50], y[:50], x[50:], y[50:], inverse_penalty=0.3) == expected
    assert 0.6 < expected < 1


def test_linear_probe_is_least_squares_on_signs():
    x, y = draw(90, 4), np.arange(90) % 3
    x[:, :3] += 1.5 * np.eye(3)[y]
    train, test = standardise(x[:60], x[60:])
    signs = 2 * np.eye(3)[y[:60]] - 1
    by_penalty = {}
    for penalty in np.logspace(-2, 3, 6):  # leave one out, literally
        errors = [
            Ridge(penalty).fit(np.delete(train, i, 0), np.delete(signs, i, 0)).predict(train[[i]])
            - signs[[i]]
            for i in range(60)
        ]
        by_penalty[penalty] = np.square(errors).mean()
    best = Ridge(min(by_penalty, key=by_penalty.get)).fit(train, signs).predict(test)
    expected = (best.argmax(1) == y[60:]).mean()
    assert linear_probe(x[:60], y[:60], x[60:], y[60:]) == expected
    assert 0.5 < expected < 1


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_knn_probe_counts_votes(metric):
    x, y = draw(60, 3), np.random.default_rng(2).integers(0, 3, 60)
    train, test = x[:40], x[40:]
    if metric == "cosine":
        distances = cosine_distances(test, train)
    else:
        distances = np.linalg.norm(test[:, None] - train, axis=-1)
    votes = np.eye(3)[y[:40]][np.argsort(distances, axis=1)[:, :7]].sum(1)
    expected = (votes.argmax(1) == y[40:]).mean()  # argmax: the first class of a tie
    assert knn_probe(train, y[:40], test, y[40:], neighbours=7, metric=metric) == expected


# -- clusters


def test_kmeans_nmi_of_known_clusters():
    x, y = clusters()
    assert kmeans_nmi(x, y) == pytest.approx(1)
    merged = kmeans_nmi(x, y, clusters=2)
    assert 0 < merged < 1
    # classes 0 and 1 in one place, 2 and 3 in another: I = log 2, H(C) = log 2, H(Y) = log 4
    pairs = np.where(y < 2, -9.0, 9.0)[:, None] + 0.01 * x
    assert kmeans_nmi(pairs, y, clusters=2) == pytest.approx(2 / 3)
    assert mutual_info_score(y, y < 2) == pytest.approx(np.log(2))


def test_kmeans_nmi_of_nothing():
    labels = np.arange(300) % 3
    assert kmeans_nmi(draw(300, 5), labels) < 0.03
    assert kmeans_nmi(np.full((300, 5), 0.1), labels) == 0  # collapsed: no warning either
    x = draw(300, 5)
    assert kmeans_nmi(x, labels, seed=3) == kmeans_nmi(x, labels, seed=3)


# -- regressions


def test_ridge_probe_of_known_values():
    x = draw(200, 5)
    y = x @ draw(5, 3, seed=1) + 2
    split = x[:100], y[:100], x[100:], y[100:]
    assert ridge_probe(*split) == pytest.approx(1, abs=1e-6)
    noise = draw(200, 3, seed=2)
    assert ridge_probe(x[:100], noise[:100], x[100:], noise[100:]) < 0.05
    flat = np.ones_like(x)
    mean_only = 1 - np.square(y[100:] - y[:100].mean(0)).sum(0) / (100 * y[100:].var(0))
    assert ridge_probe(flat[:100], y[:100], flat[100:], y[100:]) == pytest.approx(mean_only.mean())


def test_r2_averages():
    x, y = draw(120, 2), draw(120, 2, seed=1)
    y = np.stack([10 * x[:, 0], y[:, 1]], 1)  # all of a large column, nothing of a small one
    split = x[:60], y[:60], x[60:], y[60:]
    each = [ridge_probe(x[:60], y[:60, i], x[60:], y[60:, i]) for i in range(2)]
    assert ridge_probe(*split) == pytest.approx(np.mean(each), abs=0.02)
    shares = y[60:].var(0) / y[60:].var(0).sum()
    assert reconstruction_r2(*split) == pytest.approx(np.dot(each, shares), abs=1e-3)
    turn = np.linalg.qr(draw(2, 2, seed=3))[0]
    turned = reconstruction_r2(x[:60], y[:60] @ turn, x[60:], y[60:] @ turn)
    assert turned == pytest.approx(reconstruction_r2(*split), abs=1e-9)


def test_reconstruction_of_a_teacher_wider_than_the_student():
    teacher = draw(2000, 4) * [4.0, 2.0, 1.0, 1.0]
    student = teacher[:, :1]
    score = reconstruction_r2(student[:1000], teacher[:1000], student[1000:], teacher[1000:])
    assert score == pytest.approx(16 / 22, abs=0.03)
    constant = np.concatenate([teacher, np.full((2000, 1), 0.3)], 1)  # a dead column counts not
    again = reconstruction_r2(student[:1000], constant[:1000], student[1000:], constant[1000:])
    assert again == pytest.approx(score)


@pytest.mark.parametrize("flat", [(2,), (0, 2)])
def test_r2_counts_the_errors_of_columns_that_are_constant_on_the_test_rows(flat):
    x = draw(40, 3)
    y = np.concatenate([x[:, :2], draw(40, 1, seed=1)], 1)
    y[30:, flat] = 5.0
    split = x[:30], y[:30], x[30:], y[30:]
    reader = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-2, 3, 6))).fit(x[:30], y[:30])
    errors = np.square(y[30:] - reader.predict(x[30:])).sum()
    formula = 1 - errors / np.square(y[30:] - y[30:].mean(0)).sum()
    assert formula < 0
    assert reconstruction_r2(*split) == pytest.approx(formula)
    turn = np.linalg.qr(draw(3, 3, seed=3))[0]
    turned = reconstruction_r2(x[:30], y[:30] @ turn, x[30:], y[30:] @ turn)
    assert turned == pytest.approx(reconstruction_r2(*split), rel=1e-9)
    small = reconstruction_r2(x[:30], 1e-200 * y[:30], x[30:], 1e-200 * y[30:])
    assert small == pytest.approx(turned, rel=0.05)  # of another penalty, perhaps


# -- geometry


def test_pair_spearman_with_ties_against_its_formula():
    a, b = draw(50, 4), draw(50, 4, seed=1)
    b[:20] = a[:20]  # twenty cosines of 1
    scores = np.random.default_rng(2).integers(0, 4, 50)
    cosines = 1 - np.array([cosine_distances(a[[i]], b[[i]]).item() for i in range(50)])
    cosines[:20] = 1
    expected = pearsonr(rankdata(cosines), rankdata(scores)).statistic
    # equal rows have cosine 1 but for rounding, which must not make ranks of its own
    assert pair_spearman(a, b, scores) == pytest.approx(expected, abs=1e-12)


def test_pair_spearman_of_known_pairs():
    angles = np.linspace(0, 3, 20)
    first, second = np.tile([1.0, 0.0], (20, 1)), np.stack([np.cos(angles), np.sin(angles)], 1)
    assert pair_spearman(first, second, -(angles**3)) == pytest.approx(1)
    assert pair_spearman(5 * first, second, angles) == pytest.approx(-1)
    rows = np.full((20, 7), 0.1)
    assert pair_spearman(rows, rows, angles) == 0
    assert pair_spearman(np.zeros((20, 2)), second, angles) == 0


def test_isotropy_is_iso_score():
    x = draw(300, 6) * np.arange(1, 7)
    # the published algorithm, step by step
    points = (x - x.mean(0)) @ np.linalg.eigh(np.cov(x.T))[1]
    variances = np.cov(points.T).diagonal()
    n = len(variances)
    normalised = np.sqrt(n) * variances / np.linalg.norm(variances)
    defect = np.linalg.norm(normalised - 1) / np.sqrt(2 * (n - np.sqrt(n)))
    fraction = (n - defect**2 * (n - np.sqrt(n))) ** 2 / n**2
    assert isotropy(x) == pytest.approx((n * fraction - 1) / (n - 1), abs=1e-12)


def test_isotropy_of_known_shapes():
    assert isotropy(draw(20000, 8)) > 0.99
    assert isotropy(np.outer(draw(50), [1.0, 2.0, 3.0])) == pytest.approx(0, abs=1e-12)
    assert isotropy(np.full((50, 3), 0.1)) == 0
    assert isotropy(1e-200 * draw(500, 4)) == pytest.approx(isotropy(draw(500, 4)))
    two = np.concatenate([draw(20000, 2), np.zeros((20000, 3))], 1)
    assert isotropy(two) == pytest.approx(1 / 4, abs=0.01)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_neighbour_overlap_against_all_distances(metric):
    a, b = draw(80, 5), draw(80, 3, seed=1)
    b[:, :2] += 3 * a[:, :2]

    def near(x):
        distances = (
            cosine_distances(x) if metric == "cosine" else np.linalg.norm(x[:, None] - x, axis=-1)
        )
        np.fill_diagonal(distances, np.inf)
        return np.argsort(distances, axis=1)[:, :6]

    expected = np.mean([len(set(p) & set(q)) / 6 for p, q in zip(near(a), near(b), strict=True)])
    assert neighbour_overlap(a, b, neighbours=6, metric=metric) == pytest.approx(expected)
    assert 0.1 < expected < 0.9


def test_neighbour_overlap_of_known_embeddings():
    a = draw(300, 6)
    turn = np.linalg.qr(draw(6, 6, seed=3))[0]
    assert neighbour_overlap(a, 3 * a @ turn) == 1
    assert neighbour_overlap(a, draw(300, 4, seed=1)) == pytest.approx(10 / 299, abs=0.02)
    assert neighbour_overlap(a, draw(300, 4, seed=1), neighbours=299) == 1
    assert neighbour_overlap(a, np.ones((300, 4))) < 0.1  # a collapse agrees by chance alone


# -- all at once


def test_evaluate_names_what_it_has_data_for():
    x, y = clusters(90, 3)
    teachers = {"same": x, "other": draw(90, 5, seed=4)}
    pairs = np.arange(45), np.arange(45, 90), np.random.default_rng(0).integers(0, 3, 45)
    assert evaluate(x) == {"isotropy": isotropy(x)}
    scores = evaluate(x, labels=y, values=x @ draw(6, 2), pairs=pairs, teachers=teachers)
    names = ["linear", "logistic", "knn", "nmi", "ridge", "spearman"]
    for teacher in teachers:
        names += [f"r2/{teacher}", f"overlap/{teacher}"]
    assert list(scores) == [*names, "isotropy"]
    assert all(type(value) is float for value in scores.values())
    assert scores["linear"] == scores["overlap/same"] == 1
    assert scores["r2/same"] > 0.99 > 0.2 > scores["r2/other"]
    assert scores["spearman"] == pair_spearman(x[:45], x[45:], pairs[2])


def test_evaluate_computes_what_is_asked_for():
    x, y = clusters(90, 3)
    teachers = {"same": x, "other": draw(90, 5, seed=4)}
    scores = evaluate(x, labels=y, teachers=teachers)
    some = evaluate(x, labels=y, teachers=teachers, only=("r2", "knn"))
    assert some == {name: scores[name] for name in ("knn", "r2/same", "r2/other")}


def test_evaluate_scores_the_rows_held_out():
    x, y = draw(90, 4), np.arange(90) % 3
    test = np.arange(90) >= 60
    scores = evaluate(x, labels=y, held_out=test, neighbours=3)
    part = x[:60], y[:60], x[60:], y[60:]
    assert scores["linear"] == linear_probe(*part)
    assert scores["knn"] == knn_probe(*part, neighbours=3, metric="cosine")
    assert evaluate(x, labels=y, held_out=torch.from_numpy(test), neighbours=3) == scores
    assert evaluate(x, labels=y, seed=5) == evaluate(x, labels=y, seed=5)


def test_evaluate_takes_packed_teachers_and_skips_absent_rows():
    x = draw(100, 4)
    parts = {"a": x @ draw(4, 3, seed=1), "b": draw(100, 2, seed=2)}
    mask = np.ones((100, 2), dtype=bool)
    mask[::3, 0] = False
    packed = torch.from_numpy(np.concatenate(list(parts.values()), 1))
    packed[::3, :3] = torch.nan
    test = np.arange(100) >= 50
    scores = evaluate(
        x, teachers=packed, dims={"a": 3, "b": 2}, mask=torch.from_numpy(mask), held_out=test
    )
    has = mask[:, 0]
    fit, held = has & ~test, has & test
    assert scores["r2/a"] == reconstruction_r2(x[fit], parts["a"][fit], x[held], parts["a"][held])
    assert scores["overlap/a"] == neighbour_overlap(x[has], parts["a"][has])
    numbered = evaluate(x, teachers=packed, dims=(3, 2), mask=mask, held_out=test)
    assert numbered["r2/1"] == scores["r2/b"]


def test_evaluate_of_one_column_leaves_isotropy_out():
    x, y = draw(90, 1), np.arange(90) % 3
    assert evaluate(x, labels=y).keys() == {"linear", "logistic", "knn", "nmi"}
    with pytest.raises(ValueError, match="isotropy: embeddings: expected at least 2 columns"):
        evaluate(x, labels=y, only=("isotropy",))


def test_a_teacher_that_cannot_be_scored_is_named():
    x, mask = draw(30, 3), np.ones((30, 2), dtype=bool)
    mask[:, 1] = False
    given = {"teachers": {"a": x, "b": x}, "mask": mask, "held_out": np.arange(30) >= 20}
    with pytest.raises(ValueError, match="mask: expected rows of teacher 'b', got none"):
        evaluate(x, **given)
    assert evaluate(x, **given, only=("isotropy",)).keys() == {"isotropy"}
    mask[:2, 1] = True  # none of them held out
    with pytest.raises(ValueError, match=r"r2/b: test: expected shape \(N, 3\), got shape \(0, 3"):
        evaluate(x, **given)


# -- mistakes

X, Y = draw(12, 3), np.arange(12) % 3
FULL = np.ones((12, 1), dtype=bool)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linear_probe(X[0], Y, X, Y), "train: expected shape (N, H), got shape (3,)"),
        (lambda: linear_probe(X, Y, X[:, :2], Y), "test: expected shape (N, 3), got shape (12, 2)"),
        (lambda: linear_probe(X[:0], Y, X, Y), "train: expected shape (N, H), got shape (0, 3)"),
        (
            lambda: linear_probe(X, Y[:5], X, Y),
            "train_labels: expected shape (12,), got shape (5,)",
        ),
        (
            lambda: linear_probe(X, 0 * Y, X, Y),
            "train_labels: expected at least 2 different labels",
        ),
        (lambda: logistic_probe(X, Y, X, Y / [np.nan]), "test_labels: expected labels, got NaN"),
        (
            lambda: linear_probe(X / 0.0, Y, X, Y),
            "train: expected finite numbers, got NaN or infini",
        ),
        (
            lambda: logistic_probe(X, Y, X, Y, inverse_penalty=0),
            "inverse_penalty: expected a posit",
        ),
        (lambda: knn_probe(X, Y, X, Y, neighbours=13), "neighbours: expected 1 to 12 (the rows of"),
        (lambda: knn_probe(X, Y, X, Y, metric="l1"), "metric: expected 'euclidean' or 'cosine'"),
        (lambda: kmeans_nmi(X, Y, clusters=13), "clusters: expected 1 to 12 (the rows of embeddin"),
        (lambda: kmeans_nmi(X, 0 * Y), "labels: expected at least 2 different labels, got 1"),
        (lambda: ridge_probe(X[:1], Y[:1], X, Y), "train: expected at least 2 rows, got 1"),
        (lambda: ridge_probe(X, Y, X, 0 * Y), "test_values: expected values that vary"),
        (
            lambda: ridge_probe(X, Y, X, X),
            "test_values: expected 1 columns like train_values, got 3",
        ),
        (
            lambda: ridge_probe(X, X, X, X, average="mean"),
            "average: expected 'uniform' or 'variance'",
        ),
        (lambda: reconstruction_r2(X, X, X, 0 * X), "test_values: expected values that vary"),
        (lambda: pair_spearman(X, X[:5], Y), "second: expected shape (12, 3), got shape (5, 3)"),
        (lambda: pair_spearman(X[:1], X[:1], Y[:1]), "first: expected at least 2 rows, got 1"),
        (lambda: pair_spearman(X, X, 0 * Y), "scores: expected at least 2 different"),
        (lambda: isotropy(X[:, :1]), "embeddings: expected at least 2 columns, got 1"),
        (lambda: isotropy(X[:1]), "embeddings: expected at least 2 rows, got 1"),
        (lambda: neighbour_overlap(X, X[:5]), "second: expected shape (12, H), got shape (5, 3)"),
        (lambda: neighbour_overlap(X, X, neighbours=12), "neighbours: expected 1 to 11 (the other"),
        (lambda: evaluate(X, held_out=1.5), "held_out: expected a share between 0 and 1, got 1.5"),
        (
            lambda: evaluate(X, held_out=[True]),
            "held_out: expected a share (a float) or booleans of",
        ),
        (lambda: evaluate(X, held_out=FULL[:, 0]), "held_out: expected rows in both parts, got 12"),
        (
            lambda: evaluate(X, labels=np.arange(12)),
            "labels: expected two rows or more of every cl",
        ),
        (
            lambda: evaluate(X[:4], labels=[0, 0, 1, 1], held_out=0.1),
            "embeddings: expected more row",
        ),
        (lambda: evaluate(X, labels=Y, only=["knn", "r2"]), "only: expected some of linear, log"),
        (lambda: evaluate(1e160 * X, labels=Y), "embeddings: expected magnitudes up to 1e+140, wh"),
        (
            lambda: isotropy(X - 1e300),
            "embeddings: expected magnitudes up to 1e+140, whose squares",
        ),
        (lambda: evaluate(X, teachers=X), "dims: expected the widths of packed teachers, got None"),
        (
            lambda: evaluate(X, teachers=X, dims=(2, 2)),
            "teachers: expected shape (N, 4), got shape",
        ),
        (
            lambda: evaluate(X, teachers={"a": X[:5]}),
            "teachers['a']: expected shape (12, D), got (5",
        ),
        (
            lambda: evaluate(X, teachers={"a": X / 0.0}),
            "teachers['a']: expected finite numbers, got",
        ),
        (
            lambda: evaluate(X, teachers={"a": X}, mask=FULL[:5]),
            "mask: expected booleans of shape (",
        ),
        (lambda: evaluate(X, pairs=([0], [12], [1])), "pairs[1]: expected rows from 0 to 11"),
        (
            lambda: evaluate(X, pairs=([0.5], [1], [1])),
            "pairs[0]: expected whole numbers, as many as",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
def test_mistakes_are_one_clear_error(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: isotropy([["a", "b"], ["c", "d"]]), "embeddings: expected numbers, got dtype <U1"),
        (
            lambda: knn_probe(X, Y, X, Y, neighbours=2.0),
            "neighbours: expected a whole number, got f",
        ),
        (lambda: evaluate(X, pairs=(Y, Y)), "pairs: expected three sequences"),
        (lambda: evaluate(X, labels=Y, only="knn"), "only: expected several names, such as ("),
        (lambda: evaluate(X, labels=Y, only=1), "only: expected several names, such as ("),
    ],
)
def test_wrong_types_are_one_clear_error(call, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        call()


def test_without_scikit_learn_the_error_says_what_to_install():
    code = "import sys; sys.modules['sklearn'] = None; import mtkd.functional, mtkd.evaluation"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'mtkd[evaluation]'" in result.stderr
