"""Every loss x implementation x dtype against the float64 formula: values and gradients."""

import pytest
import torch
from cases import CASES, INTERPRETED, TINY_CASES
from implementations import DTYPES, FORMULA, FORMULAS_ONLY, IMPLEMENTATIONS, over

from mtkd import ops
from mtkd.testing import assert_close, cast, poisoned_memory

DOUBLE = torch.float64


def wanted(case, args):
    return [args[position] is not None for position in case.loss.differentiable]


def coefficient(case, dtype):
    generator = torch.Generator().manual_seed(7)
    numbers = torch.rand(case.rows, len(case.dims), generator=generator, dtype=DOUBLE) - 0.3
    return (numbers * max(case.dims)).to(dtype)  # keeps float16 gradients above its subnormals


def accumulate(dtype):
    return DOUBLE if dtype == DOUBLE else torch.float32


# The losses that have kernels here; Triton's interpreter has those of the losses that GPUs have.
SERVED = [
    loss
    for loss in ops.LOSSES
    if loss.name not in FORMULAS_ONLY
    and (not INTERPRETED or loss.name.removeprefix("linear_") in ops.ON_GPU)
]


@pytest.mark.parametrize("loss", SERVED, ids=lambda loss: loss.name)
def test_kernels_are_what_is_tested(loss):
    if IMPLEMENTATIONS == [FORMULA]:  # built without the extension
        assert ("gaussian_nll", "cpu") not in ops.served
        return
    for role in ("", "_backward", "_value_and_grad"):  # else the formula is compared with itself
        name = f"mtkd::{loss.name}{role}"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU"), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@over(CASES)
def test_against_float64(case, implementation, dtype):
    args, loss = case.arguments(dtype), case.loss
    exact = cast(args, DOUBLE)  # the same rounded numbers
    c = coefficient(case, accumulate(dtype))
    masks = wanted(case, args)
    expected = loss.formulas.matrix(*exact)
    gradients = loss.formulas.gradient(c.double(), *exact)
    with poisoned_memory():
        matrix, saved = implementation(loss, "forward")(*args)
        backward = implementation(loss, "backward")(c, saved, *args, masks)
        both = implementation(loss, "value_and_grad")(c, *args, masks)
    factor = case.float32_factor if dtype.itemsize > 2 else implementation.half_factor
    for value in (matrix, both[0]):
        assert value.dtype == accumulate(dtype)
        assert_close(value, expected, accumulate(dtype))
    for got in (backward, both[1:]):
        for grad, want, position in zip(got, gradients, loss.differentiable, strict=True):
            if args[position] is None:
                assert grad.numel() == 0
                continue
            assert grad.dtype == dtype
            assert grad.shape == args[position].shape
            assert_close(grad, want, dtype, factor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@over(CASES)
def test_gradients_into_given_tensors(case, implementation, dtype):
    args, loss = case.arguments(torch.float32), case.loss
    c = coefficient(case, torch.float32)
    matrix, *gradients = implementation(loss, "value_and_grad")(c, *args, wanted(case, args))
    before = [x.clone() if isinstance(x, torch.Tensor) else x for x in args]
    outputs = [
        torch.full_like(args[position], torch.nan, dtype=dtype) if grad.numel() else None
        for grad, position in zip(gradients, loss.differentiable, strict=True)
    ]
    again = implementation(loss, "value_and_grad_out")(c, *args, *outputs)
    assert_close(again, matrix, torch.float32)
    for got, want in zip(outputs, gradients, strict=True):
        if got is not None:
            assert_close(got, want, dtype, case.float32_factor)
    for now, then in zip(args, before, strict=True):
        assert torch.equal(now, then) if isinstance(now, torch.Tensor) else now is then


@over(CASES)
def test_gradients_over_the_arguments(case, implementation):
    args, loss = case.arguments(torch.float32), case.loss
    c = coefficient(case, torch.float32)
    matrix, *gradients = implementation(loss, "value_and_grad")(c, *args, wanted(case, args))
    outputs = [args[position] for position in loss.differentiable]
    again = implementation(loss, "value_and_grad_out")(c, *args, *outputs)
    assert_close(again, matrix, torch.float32)
    for got, want in zip(outputs, gradients, strict=True):
        if got is not None:
            assert_close(got, want, torch.float32, case.float32_factor)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_unwanted_gradients_are_left_out(case):
    args, loss = case.arguments(torch.float32), case.loss
    c, everything = coefficient(case, torch.float32), wanted(case, args)
    _, *all_gradients = loss.value_and_grad(c, *args, everything)
    for index in range(len(everything)):
        mask = [i == index and everything[i] for i in range(len(everything))]
        _, *gradients = loss.value_and_grad(c, *args, mask)
        for grad, full, want in zip(gradients, all_gradients, mask, strict=True):
            if want:
                assert torch.equal(grad, full)
            else:
                assert grad.numel() == 0


@pytest.mark.parametrize("case", TINY_CASES, ids=str)
def test_opcheck(case):
    args, loss = case.arguments(DOUBLE), case.loss
    c, masks, positions = coefficient(case, DOUBLE), wanted(case, args), case.loss.differentiable
    trained = tuple(
        x.requires_grad_() if i in positions and x is not None else x for i, x in enumerate(args)
    )
    plain = cast(args, DOUBLE)
    saved = loss.forward(*plain)[1]
    operators = (getattr(torch.ops.mtkd, name).default for name in loss.operators)
    forward, backward, value_and_grad, into, weighted_sum = operators
    torch.library.opcheck(forward, trained)
    torch.library.opcheck(backward, (c, saved, *trained, masks))
    torch.library.opcheck(value_and_grad, (c, *plain, masks))
    outputs = [None if x is None else torch.empty_like(x) for x in (plain[i] for i in positions)]
    torch.library.opcheck(into, (c, *plain, *outputs))
    torch.library.opcheck(weighted_sum, (c, *trained))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", [1.0, -0.5])
def test_scaling_in_place(dtype, factor):
    large = torch.linspace(-2, 2, (1 << 20) + 5).to(dtype)  # more than takes a pass at once
    small = torch.linspace(-2, 2, 99).to(dtype)
    tensors = [large, small, large.new_empty(0), torch.ones(6, 4, dtype=dtype).T]
    expected = [factor * x for x in tensors]
    torch.ops.mtkd.scale_(tensors, torch.tensor(factor, dtype=accumulate(dtype)))
    for got, want in zip(tensors, expected, strict=True):
        assert torch.equal(got, want)
