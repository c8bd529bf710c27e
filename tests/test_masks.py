"""What the mask excludes counts nowhere, whatever it holds: value, denominator and gradients."""

import math

import pytest
import torch
from inputs import BOTH, DIMS, D, fused, row

import mtkd.functional as F
from mtkd import linear
from mtkd.testing import assert_close


@pytest.mark.parametrize(("function", "make"), BOTH)
def test_masked_rows_leave_numerator_and_denominator(function, make):
    first, second, target = make()
    mask = torch.zeros(6, len(DIMS), dtype=torch.bool)
    mask[:2] = True
    own = second if function is F.linear_gaussian_nll else second[:2]
    fewer = function(first[:2], own, target[:2], DIMS)
    assert_close(function(first, second, target, DIMS, mask=mask), fewer, torch.float32)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize(("function", "make"), BOTH)
def test_empty_or_all_masked_batch(function, make, reduction):
    for rows, masked in ((0, False), (5, True)):
        first, second, target = make(rows)
        mask = torch.zeros(rows, len(DIMS), dtype=torch.bool) if masked else None
        loss = function(first, second, target, DIMS, mask=mask, reduction=reduction)
        gradients = torch.autograd.grad(loss.sum(), (first, second))
        assert loss.shape == ((rows, len(DIMS)) if reduction == "none" else ())
        assert not loss.any()
        for grad, x in zip(gradients, (first, second), strict=True):
            assert grad.shape == x.shape
            assert not grad.any()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_masked_entries_count_nowhere_whatever_they_hold(reduction, poison):
    mean, log_std, target = row()
    mask = torch.rand(6, len(DIMS)) > 0.4
    columns = mask.repeat_interleave(torch.tensor(DIMS), 1)
    results = []
    for fill in (0.0, poison):
        leaves = [x.detach().masked_fill(~columns, fill).requires_grad_() for x in (mean, log_std)]
        targets = target.masked_fill(~columns, fill)
        loss = F.gaussian_nll(*leaves, targets, DIMS, mask=mask, reduction=reduction)
        results.append((loss, *torch.autograd.grad(loss.sum(), leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not results[0][1][~columns].any()


@pytest.mark.parametrize("poison", [math.nan, -math.inf])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_masked_entries_of_mixtures_count_nowhere(reduction, poison):
    torch.manual_seed(0)
    mask = torch.rand(6, len(DIMS)) > 0.4
    columns = mask.repeat_interleave(torch.tensor(DIMS), 1)
    mean, log_std = torch.randn(2, 6, 2, D)
    target, logits = torch.randn(6, D), torch.randn(6, 2, len(DIMS))
    results = []
    for fill in (0.0, poison):
        leaves = [x.masked_fill(~columns[:, None], fill).requires_grad_() for x in (mean, log_std)]
        leaves.append(logits.masked_fill(~mask[:, None], fill).requires_grad_())
        targets = target.masked_fill(~columns, fill)
        options = {"mode_logits": leaves[2], "mask": mask, "reduction": reduction}
        loss = F.gaussian_nll(*leaves[:2], targets, DIMS, bound=1.0, **options)
        results.append((loss, *torch.autograd.grad(loss.sum(), leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("size", [1, 1 << 28])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_masked_targets_of_a_linear_loss_count_nowhere(reduction, size):
    x, weight, target = fused()
    mask = torch.rand(6, len(DIMS)) > 0.4
    columns = mask.repeat_interleave(torch.tensor(DIMS), 1)
    results = []
    for fill in (0.0, math.nan):
        with linear.workspace(size):
            targets = target.masked_fill(~columns, fill)
            loss = F.linear_gaussian_nll(x, weight, targets, DIMS, mask=mask, reduction=reduction)
            results.append((loss, *torch.autograd.grad(loss.sum(), (x, weight))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_input_rows_that_count_for_no_teacher_may_hold_nan():
    x, weight, target = fused()
    mask = torch.ones(6, len(DIMS), dtype=torch.bool)
    mask[2] = False
    results = []
    for fill in (0.0, math.nan):
        rows = x.detach().clone()
        rows[2] = fill
        rows.requires_grad_()
        loss = F.linear_gaussian_nll(rows, weight, target, DIMS, mask=mask)
        results.append((loss, *torch.autograd.grad(loss, (rows, weight))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
