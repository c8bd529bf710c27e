"""Overlap of shifted crops against a loop over images, positions and teachers."""

import pytest
import torch

from mtkd.functional.shifted import shifted_mse
from mtkd.testing import assert_close
from mtkd.weighting import teacher_dropping

DOUBLE = torch.float64
DIMS = (3, 5)
D = sum(DIMS)
OFFSETS = torch.tensor([[0, 0], [2, -1], [-3, 4], [1, 0], [4, 0], [0, -9], [-(2**40), 2**40]])
B = len(OFFSETS)
EMPTY = [4, 5, 6]


def maps(size=(4, 5), target_size=(4, 5), dtype=DOUBLE):
    torch.manual_seed(0)
    student = torch.randn(B, *size, D, dtype=dtype, requires_grad=True)
    return student, torch.randn(B, *target_size, D, dtype=dtype)


def by_loop(student, target):
    """The matrix (B, T) from the definition, and where there is an overlap."""
    rows, overlaps = [], []
    for b, (y, x) in enumerate(OFFSETS.tolist()):
        pairs = [
            (student[b, i, j], target[b, i + y, j + x])
            for i in range(student.shape[1])
            for j in range(student.shape[2])
            if 0 <= i + y < target.shape[1] and 0 <= j + x < target.shape[2]
        ]
        overlaps.append(len(pairs) > 0)
        errors = [(s - t).square().split(DIMS) for s, t in pairs]
        zero = (0 * student[b]).sum()
        means = [sum(e[t].mean() for e in errors) / max(len(errors), 1) + zero for t in range(2)]
        rows.append(torch.stack(means))
    return torch.stack(rows), torch.tensor(overlaps)


SIZES = [((4, 5), (4, 5)), ((2, 3), (6, 7)), ((6, 1), (3, 4))]


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("size", "target_size"), SIZES)
def test_against_the_definition(size, target_size, masked, reduction):
    student, target = maps(size, target_size)
    matrix, overlaps = by_loop(student, target)
    counted = overlaps[:, None].expand(B, 2)
    mask = torch.rand(B, 2) > 0.4 if masked else None
    counted = counted if mask is None else counted & mask
    assert counted.any()
    weight = torch.tensor([0.3, 2.0], dtype=DOUBLE, requires_grad=True)
    options = {"weight": weight, "mask": mask, "reduction": reduction}
    got = shifted_mse(student, target, OFFSETS, DIMS, **options)
    want = matrix * counted * weight
    if reduction != "none":
        want = want.sum() / ((counted * weight).sum() if reduction == "mean" else 1)
    assert_close(got, want, DOUBLE)
    upstream = torch.rand_like(got)
    leaves = (student, weight)
    gradients = torch.autograd.grad(got, leaves, upstream)
    for a, b in zip(gradients, torch.autograd.grad(want, leaves, upstream), strict=True):
        assert_close(a, b, DOUBLE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype):
    student, target = (x.detach().to(dtype) for x in maps())
    leaf, exact = student.requires_grad_(), student.detach().double().requires_grad_()
    got = shifted_mse(leaf, target, OFFSETS.clamp(-99, 99).int(), DIMS, denominator=1)
    want = shifted_mse(exact, target.double(), OFFSETS, DIMS, denominator=1)
    assert got.dtype == torch.float32
    assert_close(got, want, torch.float32)
    assert_close(torch.autograd.grad(got, leaf)[0], torch.autograd.grad(want, exact)[0], dtype)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_an_empty_overlap_counts_nowhere_whatever_the_maps_hold(reduction):
    student, target = maps()
    results = []
    for fill in (0.0, float("nan")):
        leaf, other = student.detach().clone(), target.clone()
        leaf[EMPTY] = other[EMPTY] = fill
        leaf[1, 3], leaf[1, :, 0] = fill, fill  # offset (2, -1): outside the target
        other[1, 0], other[1, :, 4] = fill, fill
        leaf.requires_grad_()
        loss = shifted_mse(leaf, other, OFFSETS, DIMS, reduction=reduction)
        results.append((loss, torch.autograd.grad(loss.sum(), leaf)[0]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not results[0][1][EMPTY].any()
    only = shifted_mse(student[EMPTY], target[EMPTY], OFFSETS[EMPTY], DIMS, reduction=reduction)
    assert not only.any()
    assert not torch.autograd.grad(only.sum(), student)[0].any()


def test_crops_of_an_image_agree_where_they_overlap():
    image = torch.randn(1, 9, 9, D)
    student, target = image[:, 2:7, 4:9], image[:, 1:6, 3:8]
    assert shifted_mse(student, target, torch.tensor([[1, 1]]), DIMS) == 0
    assert shifted_mse(student, target, torch.tensor([[1, 0]]), DIMS) > 0.1


def test_the_target_is_standardised():
    student, target = maps()
    shift, scale = torch.randn(D, dtype=DOUBLE), torch.rand(D, dtype=DOUBLE)
    got = shifted_mse(student, target, OFFSETS, DIMS, shift=shift, scale=scale)
    assert_close(got, shifted_mse(student, (target - shift) * scale, OFFSETS, DIMS), DOUBLE)


def test_a_single_teacher_and_a_rule():
    student, target = maps()
    whole = shifted_mse(student, target, OFFSETS, reduction="none")
    assert whole.shape == (B, 1)
    matrix, overlaps = by_loop(student, target)
    largest = matrix.amax(-1)[overlaps].mean()
    got = shifted_mse(
        student, target, OFFSETS, DIMS, weight=lambda m, mask: teacher_dropping(m, mask, p=1.0)
    )
    assert_close(got, largest, DOUBLE)


def test_second_derivatives():
    student, target = maps()
    leaf = student.detach()[:2].requires_grad_()

    def loss(x):
        return shifted_mse(x, target[:2], OFFSETS[:2], DIMS)

    assert torch.autograd.gradcheck(loss, (leaf,), fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, (leaf,), fast_mode=True)


def test_an_empty_batch():
    student, target = (x[:0] for x in maps())
    assert shifted_mse(student, target, OFFSETS[:0], DIMS) == 0
    assert shifted_mse(student, target, OFFSETS[:0], DIMS, reduction="none").shape == (0, 2)


def test_nothing_looks_at_the_data():
    student, target = (torch.empty(B, 4, 5, D, device="meta") for _ in range(2))
    student.requires_grad_()
    offsets = torch.empty(B, 2, dtype=torch.int64, device="meta")
    loss = shifted_mse(student, target, offsets, DIMS)
    assert torch.autograd.grad(loss, student)[0].shape == student.shape


def test_compile_without_a_graph_break():
    torch._dynamo.reset()
    student, target = maps(dtype=torch.float32)
    results = []
    for function in (shifted_mse, torch.compile(shifted_mse, fullgraph=True)):
        loss = function(student, target, OFFSETS, DIMS)
        results.append((loss, torch.autograd.grad(loss, student)[0]))
    for want, got in zip(*results, strict=True):
        assert_close(got, want, torch.float32)


Z = torch.zeros
GOOD = {"student": Z(2, 4, 5, D), "target": Z(2, 4, 5, D), "offsets": Z(2, 2, dtype=torch.int64)}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"student": Z(4, 5, D)}, ValueError, r"student: .*\(B, Hh, Ww, D\).*\(4, 5, 8\)"),
        ({"target": Z(2, 0, 5, D)}, ValueError, r"target: .*of maps, got shape \(2, 0, 5, 8\)"),
        ({"target": Z(3, 4, 5, D)}, ValueError, r"target: .*\(2, Hh, Ww, 8\), got.*\(3, 4, 5, 8\)"),
        ({"target": Z(2, 4, 5, 7)}, ValueError, r"target: .*\(2, Hh, Ww, 8\)"),
        ({"target": Z(2, 4, 5, D, requires_grad=True)}, ValueError, "target: .*not require grad"),
        ({"offsets": [[0, 0]]}, TypeError, "offsets: expected a tensor, got list"),
        ({"offsets": Z(2, 2)}, TypeError, "offsets: expected a tensor of integers.*float32"),
        ({"offsets": Z(2).long()}, ValueError, r"offsets: expected shape \(2, 2\).*\(2,\)"),
        (
            {"offsets": Z(2, 2, dtype=torch.int64, device="meta")},
            ValueError,
            "offsets: expected device cpu, got meta",
        ),
        ({"dims": (3, 4)}, ValueError, "dims: .*sum to the 8 columns of student"),
        ({"mask": Z(2, 4, dtype=torch.bool)}, ValueError, r"mask: .*\(2, 2\), got \(2, 4\)"),
        ({"weight": Z(3)}, ValueError, r"weight: .*\(2,\) or \(2, 2\), got \(3,\)"),
        ({"shift": Z(7)}, ValueError, r"shift: expected shape \(8,\)"),
        ({"reduction": "max"}, ValueError, "reduction: .*got 'max'"),
    ],
)
def test_one_clear_error(changes, error, message):
    with pytest.raises(error, match=message) as raised:
        shifted_mse(**{"dims": DIMS} | GOOD | changes)
    assert "\n" not in str(raised.value)
