"""Alignment losses: torch's own functions where they overlap, zero rows, sequences, bad input."""

import pytest
import torch
import torch.nn.functional as TF

import mtkd.functional as F
from mtkd import ops
from mtkd.testing import assert_close

DIMS = (40, 3, 1100)
D = sum(DIMS)


def inputs(rows=6, dtype=torch.float64):
    torch.manual_seed(0)
    student = torch.randn(rows, D, dtype=dtype).requires_grad_()
    return student, torch.randn(rows, D, dtype=dtype)


def by_teacher(function, student, target):
    pairs = zip(student.split(DIMS, -1), target.split(DIMS, -1), strict=True)
    return torch.stack([function(s, t) for s, t in pairs], -1)


EQUAL = {
    "cosine": (F.cosine, {}, lambda s, t: 1 - TF.cosine_similarity(s, t, dim=-1)),
    "mse": (F.mse, {}, lambda s, t: TF.mse_loss(s, t, reduction="none").mean(-1)),
    "smooth_l1": (
        F.smooth_l1,
        {"beta": 0.3},
        lambda s, t: TF.smooth_l1_loss(s, t, reduction="none", beta=0.3).mean(-1),
    ),
    "l1": (
        F.smooth_l1,
        {"beta": 0.0},
        lambda s, t: TF.l1_loss(s, t, reduction="none").mean(-1),
    ),
    "angle": (F.angle, {}, lambda s, t: TF.cosine_similarity(s, t, dim=-1).arccos().square()),
}


@pytest.mark.parametrize("name", EQUAL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_equals_torchs_function(name, dtype):
    ours, options, torchs = EQUAL[name]
    student, target = inputs()
    want = by_teacher(torchs, student, target)
    exact = torch.autograd.grad(want.sum(), student)[0]
    leaf = student.detach().to(dtype).requires_grad_()
    got = ours(leaf, target.to(dtype), DIMS, reduction="none", **options)
    assert_close(got, want, dtype)
    assert_close(torch.autograd.grad(got.sum(), leaf)[0], exact, dtype)


def test_the_target_is_standardised_first():
    student, target = inputs()
    shift, scale = torch.randn(D, dtype=torch.float64), torch.rand(D, dtype=torch.float64)
    fused = F.alignment(student, target, DIMS, mse=0.3, shift=shift, scale=scale)
    plain = F.alignment(student, (target - shift) * scale, DIMS, mse=0.3)
    assert_close(fused, plain, torch.float64)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (fused, plain)]
    assert_close(*gradients, torch.float64)


def test_dispersion_divides_a_teachers_angles():
    student, target = inputs()
    dispersion = torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64)
    plain = F.angle(student, target, DIMS, reduction="none")
    spread = F.angle(student, target, DIMS, dispersion=dispersion, reduction="none")
    assert_close(spread, plain / dispersion, torch.float64)


@pytest.mark.parametrize("sequence", ["shift", "all"])
def test_a_sequence_is_a_tensor_a_teacher(sequence):
    student, target = inputs()
    shift, scale = torch.randn(D, dtype=torch.float64), torch.rand(D, dtype=torch.float64)
    whole = F.alignment(student, target, DIMS, shift=shift, scale=scale, reduction="none")
    pieces = [list(x.split(DIMS, -1)) for x in (student, target)]
    standard = {"shift": shift, "scale": scale}
    if sequence == "all":
        standard = {name: x.split(DIMS) for name, x in standard.items()}
    assert_close(F.alignment(*pieces, **standard, reduction="none"), whole, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("zero", ["student", "target", "both"])
def test_zero_rows_are_finite(zero, dtype):
    student, target = inputs(dtype=dtype)
    with torch.no_grad():
        if zero != "target":
            student[1] = 0
        if zero != "student":
            target[1] = 0
    options = {"cosine": 0.5, "smooth_l1": 0.5, "mse": 0.5}
    for loss in (F.alignment(student, target, DIMS, **options), F.angle(student, target, DIMS)):
        assert loss.isfinite()
        assert torch.autograd.grad(loss, student)[0].isfinite().all()


def test_the_formulas_clamp_what_float32_cannot_square():
    student = torch.zeros(1, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(F.cosine(student, torch.ones(1, 4), eps=1e-30), student)
    (formula,) = ops.alignment.formulas.gradient(
        torch.ones(1, 1), None, (4,), student, torch.ones(1, 4), *(None,) * 3, 1, 0, 0, 0, 1, 1e-30
    )
    assert_close(formula, grad, torch.float32)


def test_a_masked_teachers_dispersion_may_be_zero():
    student = torch.randn(3, 8, requires_grad=True)
    mask, dispersion = torch.tensor([[True, False]] * 3), torch.tensor([1.0, 0.0])
    loss = F.angle(student, torch.randn(3, 8), (4, 4), dispersion=dispersion, mask=mask)
    for create_graph in (False, True):  # the latter takes the formula
        kept = {"retain_graph": True, "create_graph": create_graph}
        assert torch.autograd.grad(loss, student, **kept)[0].isfinite().all()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_parallel_rows_get_no_gradient_of_the_angle(sign):
    student = torch.tensor([[3.0, 4.0]], requires_grad=True)  # |student| and the cosine are exact
    loss = F.angle(student, sign * student.detach())
    assert_close(loss, torch.tensor(0.0 if sign > 0 else torch.pi**2), torch.float32)
    assert torch.equal(torch.autograd.grad(loss, student)[0], torch.zeros(1, 2))


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_the_fused_layer_equals_the_layer_and_the_loss(reduction):
    torch.manual_seed(0)
    x, layer, bias = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((6, 9), (D, 9), D)
    )
    target, mask = torch.randn(6, D, dtype=torch.float64), torch.rand(6, 3) > 0.3
    options = {"mask": mask, "mse": 0.2, "reduction": reduction}
    fused = F.linear_alignment(x, layer, target, DIMS, linear_bias=bias, **options)
    plain = F.alignment(x @ layer.T + bias, target, DIMS, **options)
    assert_close(fused, plain, torch.float64)
    leaves = (x, layer, bias)
    pairs = zip(*(torch.autograd.grad(each.sum(), leaves) for each in (fused, plain)), strict=True)
    for got, want in pairs:
        assert_close(got, want, torch.float64)


def test_tokens_are_leading_dimensions():
    torch.manual_seed(0)
    student, target = torch.randn(2, 5, D), torch.randn(2, 5, D)
    tokens = F.alignment(student, target, DIMS, reduction="none")
    assert tokens.shape == (2, 5, 3)
    flat = F.alignment(student.flatten(0, 1), target.flatten(0, 1), DIMS, reduction="none")
    assert torch.equal(tokens.flatten(0, 1), flat)


Z = torch.zeros


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: F.alignment(Z(4, 8), Z(4, 8), cosine=-1.0), ValueError, "cosine: .*got -1.0"),
        (lambda: F.alignment(Z(4, 8), Z(4, 8), eps=0.0), ValueError, "eps: .*positive.*got 0.0"),
        (lambda: F.alignment(Z(4, 8), Z(4, 8), beta="1"), TypeError, "beta: .*got str"),
        (lambda: F.alignment(Z(4, 8), Z(4, 7)), ValueError, r"target: .*\(4, 8\), got .*\(4, 7\)"),
        (lambda: F.alignment(Z(()), Z(())), ValueError, "student: .*0-dim"),
        (lambda: F.alignment(Z(4, 8), Z(4, 8), shift=Z(7)), ValueError, r"shift: .*shape \(8,\)"),
        (
            lambda: F.alignment(Z(4, 8), Z(4, 8), scale=Z(8, requires_grad=True)),
            ValueError,
            "scale: .*not require grad",
        ),
        (
            lambda: F.alignment([Z(4, 3), Z(4, 5)], [Z(4, 3), Z(4, 5)], shift=Z(7)),
            ValueError,
            r"shift, scale: expected shape \(8,\) or one tensor a teacher, got shape \(7,\)",
        ),
        (lambda: F.angle(Z(4, 8), Z(4, 8), dispersion=Z(2)), ValueError, r"dispersion: .*\(1,\)"),
        (
            lambda: F.linear_alignment(Z(4, 6), Z(8), Z(4, 8)),
            ValueError,
            r"linear_weight: .*\(D, H",
        ),
        (
            lambda: F.linear_alignment(Z(4, 6), Z(8, 6), Z(4, 8), linear_bias=Z(7)),
            ValueError,
            r"linear_bias: expected shape \(8,\)",
        ),
    ],
)
def test_one_clear_error(call, error, message):
    with pytest.raises(error, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)
