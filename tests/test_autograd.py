"""Derivatives through autograd: every subset, any upstream, any order, retained graphs."""

import itertools

import pytest
import torch
from cases import CASES, TINY_CASES
from implementations import DTYPES

from mtkd.testing import assert_close, cast, relative_error

DOUBLE = torch.float64
BY_NAME = {case.name: case for case in CASES}
SMALL = [BY_NAME[name] for name in ("gaussian-tiny", "mixture-tiny", "linear-tiny")]


def leaves_of(case, args):
    return [i for i in case.loss.differentiable if args[i] is not None]


def with_leaves(args, positions, leaves):
    replaced = dict(zip(positions, leaves, strict=True))
    return [replaced.get(i, x) for i, x in enumerate(args)]


def coefficient(case, dtype=DOUBLE):
    numbers = torch.rand(case.rows, len(case.dims), generator=torch.Generator().manual_seed(3))
    return numbers.to(dtype)


@pytest.mark.parametrize("case", TINY_CASES, ids=str)
def test_gradcheck_of_matrix_and_sum(case):
    args = case.arguments(DOUBLE)
    positions = leaves_of(case, args)
    leaves = [args[i].clone().requires_grad_() for i in positions]

    def matrix(*leaves):
        return case.loss.forward(*with_leaves(args, positions, leaves))[0]

    def weighted_sum(c, *leaves):
        return 1.5 * case.loss.sum(c, *with_leaves(args, positions, leaves))

    assert torch.autograd.gradcheck(matrix, leaves)
    assert torch.autograd.gradcheck(weighted_sum, [coefficient(case).requires_grad_(), *leaves])


@pytest.mark.parametrize("case", TINY_CASES, ids=str)
def test_second_derivatives(case):
    args = case.arguments(DOUBLE)
    positions = leaves_of(case, args)
    leaves = [args[i].clone().requires_grad_() for i in positions]

    def matrix(*leaves):
        return case.loss.forward(*with_leaves(args, positions, leaves))[0]

    def weighted_sum(c, *leaves):
        return case.loss.sum(c, *with_leaves(args, positions, leaves))

    fast = {"fast_mode": True}
    assert torch.autograd.gradgradcheck(matrix, leaves, **fast)
    c = coefficient(case).requires_grad_()
    assert torch.autograd.gradgradcheck(weighted_sum, [c, *leaves], **fast)


@pytest.mark.parametrize("role", ["matrix", "sum"])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_every_subset_of_requires_grad(case, role):
    args = case.arguments(DOUBLE)
    positions = leaves_of(case, args)
    c = coefficient(case)
    gradients = case.loss.formulas.gradient(c, *args)
    expected = dict(zip(case.loss.differentiable, gradients, strict=True))
    for trained in itertools.product((False, True), repeat=len(positions)):
        pairs = zip(positions, trained, strict=True)
        leaves = [args[i].clone().requires_grad_(on) for i, on in pairs]
        now = with_leaves(args, positions, leaves)
        value = case.loss.sum(c, *now) if role == "sum" else (c * case.loss.forward(*now)[0]).sum()
        assert value.requires_grad == any(trained)
        if any(trained):
            value.backward()
        for position, leaf, on in zip(positions, leaves, trained, strict=True):
            assert (leaf.grad is not None) == on
            if on:
                assert_close(leaf.grad, expected[position], DOUBLE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("role", ["matrix", "sum"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_against_float64(case, role, dtype):
    args = case.arguments(dtype)
    positions = leaves_of(case, args)
    leaves = [args[i].requires_grad_() for i in positions]
    # 64 keeps gradients between float16's subnormals and its largest number
    c = 64 * coefficient(case, DOUBLE if dtype == DOUBLE else torch.float32)
    if role == "sum":
        value = 2.5 * case.loss.weighted_sum(c, *args)
    else:
        value = (2.5 * c * case.loss.matrix(*args)).sum()
    gradients = torch.autograd.grad(value, leaves)
    expected = case.loss.formulas.gradient(2.5 * c.double(), *cast(args, DOUBLE))
    expected = [grad for grad in expected if grad is not None]
    # a stored gradient in bfloat16 is rounded twice: before and after the upstream scales it
    factor = {DOUBLE: 10, torch.float32: case.float32_factor, torch.bfloat16: 2}.get(dtype, 1)
    for got, want in zip(gradients, expected, strict=True):
        assert got.dtype == dtype
        assert_close(got, want, dtype, factor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("role", ["matrix", "sum"])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_retained_graph_gives_the_same_gradients_again(case, role, dtype):
    args = case.arguments(dtype)
    positions = leaves_of(case, args)
    leaves = [args[i].clone().requires_grad_() for i in positions]
    now, c = with_leaves(args, positions, leaves), coefficient(case, torch.float32)
    value = case.loss.sum(c, *now) if role == "sum" else (c * case.loss.forward(*now)[0]).sum()
    value.backward(retain_graph=True)
    first = [leaf.grad.clone() for leaf in leaves]
    for times in (2, 3):
        value.backward(retain_graph=True)
        for leaf, grad in zip(leaves, first, strict=True):
            assert_close(leaf.grad, times * grad, dtype)
    assert all(
        torch.equal(again, grad)
        for again, grad in zip(torch.autograd.grad(value, leaves), first, strict=True)
    )


@pytest.mark.parametrize("upstream", [0.0, 1.0, -2.5])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_upstream_of_the_sum_scales_gradients(case, upstream):
    args = case.arguments(DOUBLE)
    positions = leaves_of(case, args)
    leaves = [args[i].clone().requires_grad_() for i in positions]
    c = coefficient(case).requires_grad_()
    value = case.loss.sum(c, *with_leaves(args, positions, leaves))
    scale = torch.tensor(upstream, dtype=DOUBLE)
    *gradients, to_c = torch.autograd.grad(value, [*leaves, c], scale)
    expected = case.loss.formulas.gradient(upstream * c.detach(), *args)
    expected = [grad for grad in expected if grad is not None]
    for grad, want in zip(gradients, expected, strict=True):
        assert relative_error(grad + 1, want + 1) < 1e-12
    assert relative_error(to_c + 1, upstream * case.loss.formulas.matrix(*args) + 1) < 1e-12


@pytest.mark.parametrize("case", TINY_CASES, ids=str)
def test_graph_of_the_backward_pass_does_not_use_stored_gradients(case):
    args = case.arguments(DOUBLE)
    positions = leaves_of(case, args)
    leaves = [args[i].clone().requires_grad_() for i in positions]
    c = coefficient(case).requires_grad_()
    value = case.loss.sum(c, *with_leaves(args, positions, leaves))
    gradients = torch.autograd.grad(value, leaves, create_graph=True)
    penalty = sum(grad.square().sum() for grad in gradients)
    second = torch.autograd.grad(penalty, [c, *leaves])
    exact = (c * case.loss.formulas.matrix(*with_leaves(args, positions, leaves))).sum()
    gradients = torch.autograd.grad(exact, leaves, create_graph=True)
    penalty = sum(grad.square().sum() for grad in gradients)
    for got, want in zip(second, torch.autograd.grad(penalty, [c, *leaves]), strict=True):
        assert_close(got, want, DOUBLE)


@pytest.mark.parametrize("case", TINY_CASES, ids=str)
def test_batched_gradients_of_the_sum(case):
    args = case.arguments(torch.float64)
    leaves = [args[i].requires_grad_() for i in case.loss.differentiable if args[i] is not None]
    coefficient = torch.rand(case.rows, len(case.dims), dtype=torch.float64)
    upstreams = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    loss = case.loss.weighted_sum(coefficient, *args)
    single = torch.autograd.grad(loss, leaves, retain_graph=True)
    batched = torch.autograd.grad(loss, leaves, upstreams, is_grads_batched=True)
    for one, many in zip(single, batched, strict=True):
        assert_close(many, torch.stack([u * one for u in upstreams]), torch.float64)
