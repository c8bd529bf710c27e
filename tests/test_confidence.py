"""Confidence weights against their definitions, teacher by teacher; extremes; masks."""

import math

import pytest
import torch
import torch.nn.functional as TF
from synchronisation import NoSynchronisation

import mtkd.functional as F
from mtkd.testing import assert_close
from mtkd.weighting import (
    confidence_weights,
    teacher_agreement,
    teacher_cross_entropy,
    teacher_entropy,
)

DOUBLE = torch.float64
NAN, INF = math.nan, math.inf
METHODS = ("ca-mkd", "ebkd", "entropy", "agreement")
N, T, C = 30, 4, 6


def logits(dtype=DOUBLE):
    torch.manual_seed(0)
    teacher, target = 2 * torch.randn(N, T, C, dtype=DOUBLE), torch.randint(0, C, (N,))
    mask = torch.rand(N, T) > 0.4
    mask[0], mask[1] = False, True
    mask[2] = torch.arange(T) == 1
    return teacher.to(dtype), target, mask


def weights_by_loop(u, mask, method):
    weights = torch.zeros(u.shape, dtype=DOUBLE)
    for n in range(len(u)):
        counted = [t for t in range(u.shape[1]) if mask is None or mask[n, t]]
        for t in counted:
            if method in ("ca-mkd", "entropy"):
                sign = 1 if method == "ca-mkd" else -1
                share = 1 / sum(math.exp(sign * (u[n, j] - u[n, t])) for j in counted)
            else:
                share = u[n, t] / sum(u[n, j] for j in counted)
            if method in ("ca-mkd", "ebkd"):
                share = (1 - share) / (len(counted) - 1) if len(counted) > 1 else 1.0
            weights[n, t] = share
    return weights


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32, torch.bfloat16], ids=str)
def test_against_the_definitions(dtype, masked, method):
    mask = logits()[2] if masked else None
    matrix = (3 * torch.rand(N, T, dtype=DOUBLE) + 0.01).to(dtype)
    got = confidence_weights(matrix.clone().requires_grad_(), mask, method=method)
    assert got.dtype == (DOUBLE if dtype == DOUBLE else torch.float32)
    assert not got.requires_grad
    assert_close(got, weights_by_loop(matrix.double(), mask, method), got.dtype)
    counted = torch.ones(N, dtype=torch.bool) if mask is None else mask.any(-1)
    assert_close(got.sum(-1), counted.double(), torch.float32)


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32], ids=str)
def test_measures_against_loops(dtype, masked, sequence):
    exact, target, some = logits()
    mask = some if masked else None
    cross, entropy, agreement = torch.zeros(3, N, T, dtype=DOUBLE)
    for n in range(N):
        counted = [t for t in range(T) if mask is None or mask[n, t]]
        q = {t: (exact[n, t] / 1.5).softmax(-1) for t in counted}
        for t in counted:
            cross[n, t] = TF.cross_entropy(exact[n, t] / 1.5, target[n])
            entropy[n, t] = torch.distributions.Categorical(q[t]).entropy()
            others = [q[j] for j in counted if j != t]
            mean = sum(others) / len(others) if others else q[t]
            agreement[n, t] = 1 - 0.5 * (q[t] - mean).abs().sum()
    teacher = exact.to(dtype)
    if mask is not None:
        teacher = teacher.masked_fill(~mask.unsqueeze(-1), NAN)
    teacher = list(teacher.unbind(1)) if sequence else teacher
    got = teacher_cross_entropy(teacher, target, mask, temperature=1.5)
    assert_close(got, cross, dtype)
    assert_close(teacher_entropy(teacher, mask, temperature=1.5), entropy, dtype)
    assert_close(teacher_agreement(teacher, mask, temperature=1.5), agreement, dtype)


def test_rows_without_a_label_weigh_their_teachers_equally():
    teacher, target, _ = logits()
    target[:2] = -100
    weights = confidence_weights(teacher_cross_entropy(teacher, target))
    assert (weights[:2] == 1 / T).all()
    assert not (weights[2:] == 1 / T).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_single_teacher_weighs_one(method):
    for value in (0.0, 2.0, INF):
        assert (confidence_weights(torch.full((5, 1), value), method=method) == 1).all()
    mask = torch.tensor([[False, True, False]])
    got = confidence_weights(torch.tensor([[NAN, 3.0, INF]]), mask, method=method)
    assert got.tolist() == [[0.0, 1.0, 0.0]]


@pytest.mark.parametrize("method", METHODS)
def test_measures_that_are_equal_weigh_the_same(method):
    for value in (0.0, 1.0, 1e30, INF):
        got = confidence_weights(torch.full((2, 4), value), method=method)
        assert_close(got, torch.full((2, 4), 0.25), torch.float32)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_counted_and_empty_batches(method):
    mask = torch.zeros(2, 3, dtype=torch.bool)
    assert not confidence_weights(torch.full((2, 3), NAN), mask, method=method).any()
    for empty in (None, mask[:0]):
        assert confidence_weights(torch.rand(0, 3), empty, method=method).shape == (0, 3)


def test_extremes():
    sure = confidence_weights(torch.tensor([[INF, 0.0, 0.0]]))
    assert sure.tolist() == [[0.0, 0.5, 0.5]]
    assert confidence_weights(torch.tensor([[NAN, 0.0], [0.0, 0.0]])).isnan().any(-1).tolist() == [
        True,
        False,
    ]
    teacher = 1e4 * torch.randn(5, 3, 6).sign()
    teacher[0, 0, :5] = -INF
    for measure in (teacher_entropy(teacher), teacher_agreement(teacher)):
        assert measure.isfinite().all()
        assert (measure >= 0).all()
    assert teacher_entropy(teacher)[0, 0] == 0
    assert teacher_cross_entropy(teacher, torch.zeros(5).long())[0, 0] == INF


def test_leading_dimensions_are_rows():
    teacher, target, _ = logits()
    grid = teacher.reshape(5, 6, T, C)
    for measure, grids in (
        (teacher_cross_entropy(teacher, target), teacher_cross_entropy(grid, target.reshape(5, 6))),
        (teacher_entropy(teacher), teacher_entropy(grid)),
        (teacher_agreement(teacher), teacher_agreement(grid)),
    ):
        assert torch.equal(grids.reshape(N, T), measure)
        assert torch.equal(confidence_weights(grids).reshape(N, T), confidence_weights(measure))


@pytest.mark.parametrize("masked", [False, True])
def test_nothing_looks_at_the_data(masked):
    teacher, target, mask = (x.to("meta") for x in logits(torch.float32))
    mask = mask if masked else None
    for measure in (teacher_cross_entropy(teacher, target, mask), teacher_agreement(teacher, mask)):
        assert confidence_weights(measure, mask, method="ebkd").shape == (N, T)
    teacher, target, mask = logits()
    with NoSynchronisation():
        for method in METHODS:
            confidence_weights(teacher_entropy(teacher, mask), mask, method=method)
        teacher_agreement(teacher, mask)
        teacher_cross_entropy(teacher, target, mask)


def test_as_weights_and_as_a_rule_of_a_loss_compiled():
    torch.manual_seed(0)
    student = torch.randn(N, T * C, requires_grad=True)
    embedding, (teacher, target, mask) = torch.randn(N, T * C), logits(torch.float32)

    def loss(student):
        weights = confidence_weights(teacher_cross_entropy(teacher, target, mask), mask)
        first = F.mse(student, embedding, (C,) * T, weight=weights, mask=mask)
        return first + F.mse(student, embedding, (C,) * T, weight=confidence_weights, mask=mask)

    torch._dynamo.reset()
    results = []
    for run in (loss, torch.compile(loss, fullgraph=True)):
        value = run(student)
        results.append((value, *torch.autograd.grad(value, student)))
    for want, got in zip(*results, strict=True):
        assert_close(got, want, torch.float32)
    matrix = F.mse(student, embedding, (C,) * T, mask=mask, reduction="none")
    by_hand = weights_by_loop(teacher_cross_entropy(teacher, target, mask), mask, "ca-mkd")
    by_rule = weights_by_loop(matrix.detach(), mask, "ca-mkd")
    want = sum((w * matrix).sum() / w.sum() for w in (by_hand, by_rule))
    assert_close(results[0][0], want, torch.float32)


Z = torch.zeros


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: confidence_weights([1.0]), TypeError, "matrix: expected a tensor, got list"),
        (lambda: confidence_weights(Z(2, 0)), ValueError, r"matrix: .*at least one teacher"),
        (lambda: confidence_weights(Z(2, 3), method="best"), ValueError, "method: .*got 'best'"),
        (lambda: confidence_weights(Z(2, 3), Z(2, 3)), TypeError, "mask: expected a bool tensor"),
        (lambda: teacher_entropy(Z(3)), ValueError, r"teacher: expected shape \(\*, T, C\)"),
        (lambda: teacher_entropy([]), ValueError, "teacher: expected one tensor a teacher"),
        (
            lambda: teacher_entropy([Z(2, 3), Z(2, 4)]),
            ValueError,
            r"teacher\[1\]: expected shape \(2, 3\), got \(2, 4\)",
        ),
        (lambda: teacher_entropy(Z(2, 3, 4).long()), TypeError, "teacher: .*floating.*int64"),
        (lambda: teacher_entropy(Z(2, 3, 4), temperature=0), ValueError, "temperature: .*got 0"),
        (
            lambda: teacher_cross_entropy(Z(2, 3, 4), Z(2)),
            TypeError,
            "target: .*int64 or int32 labels, got torch.float32",
        ),
        (
            lambda: teacher_cross_entropy(Z(2, 3, 4), Z(3).long()),
            ValueError,
            r"target: expected shape \(2,\) on cpu, got shape \(3,\) on cpu",
        ),
        (
            lambda: teacher_agreement(Z(2, 3, 4), Z(2, 4).bool()),
            ValueError,
            r"mask: expected shape \(2, 3\), got \(2, 4\)",
        ),
    ],
)
def test_one_clear_error(call, error, message):
    with pytest.raises(error, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)
