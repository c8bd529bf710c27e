"""Mistakes seen in comparable libraries: each is a test here, named after the mistake.

Held elsewhere: any order and subset of derivatives in test_autograd.py, results that depend on
chunk size in test_linear.py, empty batches and masked rows in test_masks.py, strides and -inf
logits in test_gaussian.py, autocast in test_compile.py, DTensor in test_errors.py, surprises at
import in test_import.py.
"""

import re
from pathlib import Path

import pytest
import torch
from cases import CASES
from inputs import BOTH, DIMS, D, fused, row

import mtkd
import mtkd.functional as F
from mtkd import linear
from mtkd.testing import assert_close, poisoned_memory, relative_error

ROOT = Path(mtkd.__file__).parent


@pytest.mark.parametrize("leading", [(6,), (2, 3)], ids=str)  # a view of what is stored, or that
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize(("function", "make"), BOTH)
def test_second_backward_is_neither_stale_nor_tripled(function, make, reduction, leading):
    first, second, target = make()
    arguments = [x.reshape(*leading, -1) if len(x) == 6 else x for x in (first, second, target)]
    loss = function(*arguments, DIMS, reduction=reduction)
    gradients = []
    for upstream in (torch.ones_like(loss), torch.ones_like(loss), torch.full_like(loss, 3.0)):
        first.grad = second.grad = None
        loss.backward(upstream, retain_graph=True)
        gradients.append((first.grad.clone(), second.grad.clone()))
        first.grad.zero_(), second.grad.zero_()  # as an optimiser might, in place
    for once, again, thrice in zip(*gradients, strict=True):
        assert once.any()
        assert torch.equal(once, again)
        assert_close(thrice, 3 * once, torch.float32)


@pytest.mark.parametrize(("function", "make"), BOTH)
def test_stale_arguments_are_an_error(function, make):
    first, second, target = make()
    for changed in (first, second, target):
        loss = function(first, second, target, DIMS)
        with torch.no_grad():
            changed.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_frozen_input_does_not_freeze_the_weight(reduction):
    x, weight, target = fused()
    bias = torch.randn(2, D, requires_grad=True)

    def gradients(x, weight, bias):
        options = {"linear_bias": bias, "reduction": reduction}
        loss = F.linear_gaussian_nll(x, weight, target, DIMS, **options)
        leaves = [leaf for leaf in (x, weight, bias) if leaf.requires_grad]
        return torch.autograd.grad(loss.sum(), leaves)

    expected = gradients(x, weight, bias)
    assert all(grad.any() for grad in expected)
    of_layer = gradients(x.detach(), weight, bias)
    of_input = gradients(x, weight.detach(), bias.detach())
    for frozen, whole in zip((*of_input, *of_layer), expected, strict=True):
        assert torch.equal(frozen, whole)


def test_bias_is_added_once_whatever_the_tiles():
    x, weight, target = fused(rows=5000)
    bias = torch.randn(2, D)
    with linear.workspace(100_000):
        loss = F.linear_gaussian_nll(x, weight, target, DIMS, linear_bias=bias, bound=1.0)
    mean, log_std = (torch.einsum("nh,kdh->knd", x, weight) + bias[:, None]).unbind()
    assert_close(loss, F.gaussian_nll(mean, log_std, target, DIMS, bound=1.0), torch.float32)


def test_weight_gradient_of_bfloat16_is_accumulated_in_float32():
    torch.manual_seed(0)
    x, weight = torch.randn(9000, 4).bfloat16(), (0.1 * torch.randn(2, 8, 4)).bfloat16()
    target = torch.randn(9000, 8)
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        leaf = weight.to(dtype).requires_grad_()
        with linear.workspace(64 * 100):  # thousands of tiles
            loss = F.linear_gaussian_nll(x.to(dtype), leaf, target, (3, 5), bound=1.0)
        results.append(torch.autograd.grad(loss, leaf)[0])
    assert relative_error(results[0], results[1]) < 2**-8


@pytest.mark.parametrize(("function", "make"), BOTH)
def test_none_with_non_uniform_and_stride_zero_upstream(function, make):
    first, second, target = make()
    matrix = function(first, second, target, DIMS, reduction="none")
    upstream = torch.rand_like(matrix)
    parts = [
        torch.autograd.grad(matrix[n, t], (first, second), upstream[n, t], retain_graph=True)
        for n in range(6)
        for t in range(3)
    ]
    gradients = torch.autograd.grad(matrix, (first, second), upstream, retain_graph=True)
    for grad, pieces in zip(gradients, zip(*parts, strict=True), strict=True):
        assert_close(grad, sum(pieces), torch.float32)
    ones = torch.autograd.grad(matrix, first, torch.ones_like(matrix), retain_graph=True)
    assert torch.equal(torch.autograd.grad(matrix.sum(), first)[0], ones[0])


def test_offsets_beyond_32_bits():
    step = 2**31 + 64  # elements between rows, in memory that is never touched in between
    storage = torch.empty(step + 2048, dtype=torch.bfloat16)
    mean = storage.as_strided((2, 1500), (step, 1))
    mean.copy_(torch.randn(2, 1500))
    log_std, target = torch.zeros(2, 1500), torch.randn(2, 1500)
    dims = (1000, 40, 60, 400)
    results = []
    for x in (mean, mean.contiguous()):
        leaf = x.detach().requires_grad_()
        for arguments in ((leaf, log_std, target), (log_std, log_std, leaf.detach())):
            results.append(F.gaussian_nll(*arguments, dims, reduction="none"))
        results.append(torch.autograd.grad(F.gaussian_nll(leaf, log_std, target, dims), leaf)[0])
    assert all(torch.equal(far, near) for far, near in zip(results[:3], results[3:], strict=True))


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize(("function", "make"), BOTH)
def test_every_output_slot_is_written(function, make, reduction):
    first, second, target = make()
    mask = torch.rand(6, len(DIMS)) > 0.5
    with poisoned_memory():
        loss = function(first, second, target, DIMS, mask=mask, reduction=reduction)
        gradients = torch.autograd.grad(loss.sum(), (first, second))
    assert loss.isfinite().all()
    assert all(grad.isfinite().all() for grad in gradients)


def test_no_host_synchronisation_in_the_hot_path():
    words = re.compile(r"\.item\(|\.tolist\(|\.nonzero\(|\.cpu\(|\.numpy\(")
    rooms = ("functional", "reference", "reduction", "triton", "linear", "weighting")
    files = [file for room in rooms for file in (ROOT / room).glob("*.py")]
    files += [ROOT / f"{name}.py" for name in ("dispatch", "plan", "packing")]
    code = {file: re.sub(r'""".*?"""', "", file.read_text(), flags=re.DOTALL) for file in files}
    assert not [file.name for file, text in code.items() if words.search(text)]


def test_trainable_targets_are_an_error():
    mean, log_std, target = row()
    with pytest.raises(ValueError, match="target"):
        F.gaussian_nll(mean, log_std, target.requires_grad_(), DIMS)


def test_float16_gradients_survive_with_a_loss_scale():
    mean, log_std, target = row(rows=2000)
    half = [x.detach().half().requires_grad_() for x in (mean, log_std)]
    unscaled = torch.autograd.grad(F.gaussian_nll(*half, target, DIMS), half)
    assert (unscaled[0] == 0).float().mean() > 0.05  # the case is one that underflows
    scaled = torch.autograd.grad(2.0**16 * F.gaussian_nll(*half, target, DIMS), half)
    exact = [x.detach().double().requires_grad_() for x in half]
    for got, want in zip(
        scaled, torch.autograd.grad(F.gaussian_nll(*exact, target, DIMS), exact), strict=True
    ):
        assert_close(got.double() / 2**16, want, torch.float16)


@pytest.mark.parametrize(("function", "make"), BOTH)
def test_gradients_changed_in_place_are_never_stale(function, make):
    first, second, target = make()
    loss = function(first, second, target, DIMS)
    (grad,) = torch.autograd.grad(loss, first, retain_graph=True)
    kept = grad.clone()
    grad.mul_(100)
    assert torch.equal(torch.autograd.grad(loss, first)[0], kept)


def test_gradients_given_away_are_not_shared():
    mean, log_std, target = row()
    loss = F.gaussian_nll(mean, log_std, target, DIMS)
    first, _ = torch.autograd.grad(loss, (mean, log_std), retain_graph=True)
    kept = first.clone()
    mean.grad = None
    loss.backward(retain_graph=True)
    mean.grad.mul_(100)  # as an optimiser might, in place
    assert torch.equal(torch.autograd.grad(loss, mean)[0], kept)


@pytest.mark.parametrize("case", [c for c in CASES if "ragged" in c.name], ids=str)
def test_arguments_are_never_written(case):
    args = case.arguments(torch.float32)
    before = [x.clone() if isinstance(x, torch.Tensor) else x for x in args]
    c = torch.ones(case.rows, len(case.dims))
    wanted = [args[i] is not None for i in case.loss.differentiable]
    _, saved = case.loss.forward(*args)
    case.loss.backward(c, saved, *args, wanted)
    case.loss.value_and_grad(c, *args, wanted)
    for now, then in zip(args, before, strict=True):
        assert torch.equal(now, then) if isinstance(now, torch.Tensor) else now is then
