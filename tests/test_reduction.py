"""Weights, masks, denominators and reductions, against the definition."""

import itertools

import pytest
import torch

import mtkd.functional as F
from mtkd.testing import assert_close

DIMS = (3, 5, 2)
DOUBLE = torch.float64


def inputs(*leading):
    torch.manual_seed(1)
    shape = (*leading, sum(DIMS))
    return [torch.randn(shape, dtype=DOUBLE, requires_grad=grad) for grad in (True, True, False)]


def expected(matrix, weight, mask, denominator, reduction):
    counted = torch.ones_like(matrix) if weight is None else weight.expand_as(matrix)
    counted = counted if mask is None else counted * mask
    if reduction == "none":
        return matrix * counted
    total = (matrix * counted).sum()
    if reduction == "sum":
        return total
    return total / (counted.sum() if denominator is None else denominator)


@pytest.mark.parametrize("leading", [(7,), (2, 3), ()])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_against_the_definition(reduction, leading):
    shape = (*leading, len(DIMS))
    torch.manual_seed(2)
    weights = (None, torch.rand(len(DIMS), dtype=DOUBLE), torch.rand(shape, dtype=DOUBLE))
    masks = (None, torch.rand(shape) > 0.4)
    denominators = (None, 3.5, torch.tensor(2.5)) if reduction == "mean" else (None,)
    mean, log_std, target = inputs(*leading)
    matrix = F.gaussian_nll(mean, log_std, target, DIMS, reduction="none")
    for weight, mask, denominator in itertools.product(weights, masks, denominators):
        weight = None if weight is None else weight.clone().requires_grad_()
        options = {"weight": weight, "mask": mask, "denominator": denominator}
        got = F.gaussian_nll(mean, log_std, target, DIMS, reduction=reduction, **options)
        want = expected(matrix, weight, mask, denominator, reduction)
        assert_close(got, want, DOUBLE)
        leaves = [mean, log_std] if weight is None else [mean, log_std, weight]
        upstream = torch.randn_like(got)
        gradients = torch.autograd.grad(got, leaves, upstream)
        for a, b in zip(
            gradients, torch.autograd.grad(want, leaves, upstream, retain_graph=True), strict=True
        ):
            assert_close(a, b, DOUBLE)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_nothing_counted_gives_zero(reduction):
    mean, log_std, target = inputs(4)
    mask = torch.zeros(4, len(DIMS), dtype=torch.bool)
    loss = F.gaussian_nll(mean, log_std, target, DIMS, mask=mask, reduction=reduction)
    gradients = torch.autograd.grad(loss.sum(), [mean, log_std])
    assert not loss.any()
    assert not any(grad.any() for grad in gradients)


@pytest.mark.parametrize("denominator", [0, 0.0, torch.tensor(0.0)])
def test_zero_denominator_gives_zero(denominator):
    mean, log_std, target = inputs(4)
    loss = F.gaussian_nll(mean, log_std, target, DIMS, denominator=denominator)
    assert loss == 0
    assert not torch.autograd.grad(loss, mean)[0].any()


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_empty_batch(reduction):
    mean, log_std, target = inputs(0)
    loss = F.gaussian_nll(mean, log_std, target, DIMS, reduction=reduction)
    assert loss.shape == ((0, len(DIMS)) if reduction == "none" else ())
    assert loss.sum() == 0
    assert torch.autograd.grad(loss.sum(), mean)[0].shape == mean.shape


def test_accumulated_halves_equal_the_whole():
    mean, log_std, target = inputs(8)
    mask = torch.rand(8, len(DIMS)) > 0.4
    whole = F.gaussian_nll(mean, log_std, target, DIMS, mask=mask)
    count = mask.sum()
    halves = [
        F.gaussian_nll(mean[h], log_std[h], target[h], DIMS, mask=mask[h], denominator=count)
        for h in (slice(0, 4), slice(4, 8))
    ]
    assert_close(halves[0] + halves[1], whole, DOUBLE)


def test_learned_weights_of_many_rows_are_exact_in_float32():
    torch.manual_seed(0)
    mean, log_std, target = (torch.randn(20_000, 10) for _ in range(3))
    weight = torch.rand(3, requires_grad=True)
    loss = F.gaussian_nll(mean, log_std, target, DIMS, weight=weight)
    double = weight.detach().double().requires_grad_()
    exact = F.gaussian_nll(mean.double(), log_std.double(), target, DIMS, weight=double)
    assert_close(loss, exact, torch.float32)
    (got,), (want,) = torch.autograd.grad(loss, weight), torch.autograd.grad(exact, double)
    # the gradient is a difference of sums of 20000 terms that nearly cancel
    assert_close(got, want, torch.float32, factor=30)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_weights_that_are_all_zero(reduction):
    mean, log_std, target = inputs(4)
    weight = torch.zeros(len(DIMS), dtype=DOUBLE, requires_grad=True)
    loss = F.gaussian_nll(mean, log_std, target, DIMS, weight=weight, reduction=reduction)
    gradients = torch.autograd.grad(loss.sum(), [mean, log_std, weight])
    assert not loss.any()
    assert not any(grad.any() for grad in gradients[:2])
    assert gradients[2].isfinite().all()


def test_weights_of_masked_entries_may_be_nan():
    mean, log_std, target = inputs(4)
    mask = torch.tensor([True, False, True]).expand(4, 3)
    results = []
    for fill in (0.0, float("nan")):
        weight = torch.full((4, 3), 0.5, dtype=DOUBLE).masked_fill(~mask, fill).requires_grad_()
        loss = F.gaussian_nll(mean, log_std, target, DIMS, mask=mask, weight=weight)
        results.append((loss, *torch.autograd.grad(loss, [mean, log_std, weight])))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_second_derivatives_with_learned_weights(reduction):
    torch.manual_seed(0)
    mask = torch.tensor([[True, False, True], [True, True, True]])
    leaves = [x[:2].detach().requires_grad_() for x in inputs(2)[:2]]
    weight = torch.rand(len(DIMS), dtype=DOUBLE, requires_grad=True)
    target = inputs(2)[2]

    def loss(mean, log_std, weight):
        options = {"weight": weight, "mask": mask, "reduction": reduction, "bound": 2.0}
        return F.gaussian_nll(mean, log_std, target, DIMS, **options)

    assert torch.autograd.gradcheck(loss, [*leaves, weight], fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, [*leaves, weight], fast_mode=True)
