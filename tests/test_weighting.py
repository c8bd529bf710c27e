"""Teacher dropping against UNIC's rule, written image by image; and as one argument of a loss."""

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mtkd.functional as F
from mtkd import linear
from mtkd.nn import GaussianHeads
from mtkd.reduction import reduce_matrix
from mtkd.testing import assert_close
from mtkd.weighting import teacher_dropping

NAN, INF = float("nan"), float("inf")
DOUBLE = torch.float64
DIMS = (3, 5, 2)
D = sum(DIMS)


def by_loop(loss, mask, draws, p, normalize):
    """UNIC's rule from its words: keep the largest of a row, drop the others with probability p."""
    weights = torch.zeros(loss.shape, dtype=DOUBLE)
    for n in range(len(loss)):
        counted = [t for t in range(loss.shape[1]) if mask is None or mask[n, t]]
        if not counted:
            continue
        largest = counted[0]
        for t in counted[1:]:
            if loss[n, t] > loss[n, largest]:
                largest = t
        kept = [t for t in counted if t == largest or not draws[n, t] < p]
        for t in kept:
            weights[n, t] = 1 if normalize == "batch" else 1 / len(kept)
    return weights


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("normalize", ["batch", "sample"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_against_the_rule_row_by_row(dtype, p, masked, normalize):
    torch.manual_seed(0)
    loss = torch.randint(0, 4, (50, 4)).to(dtype)  # with many ties
    mask = torch.rand(50, 4) > 0.4 if masked else None
    got = teacher_dropping(loss, mask, p=p, normalize=normalize, generator=seeded())
    want = by_loop(loss, mask, torch.rand(50, 4, generator=seeded()), p, normalize)
    assert got.dtype == (DOUBLE if dtype == DOUBLE else torch.float32)
    assert_close(got, want, got.dtype)
    assert torch.equal(got > 0, want > 0)


def test_the_share_that_is_dropped_is_p():
    torch.manual_seed(0)
    kept = teacher_dropping(torch.rand(20_000, 4), p=0.25)
    assert abs((kept.sum() - 20_000) / 60_000 - 0.75) < 0.01
    assert (kept.sum(-1) >= 1).all()


def test_leading_dimensions_are_rows():
    loss = torch.rand(2, 5, 3)
    got = teacher_dropping(loss, generator=seeded())
    assert torch.equal(got.flatten(0, 1), teacher_dropping(loss.flatten(0, 1), generator=seeded()))
    assert teacher_dropping(torch.rand(3), p=1.0).sum() == 1


@pytest.mark.parametrize("normalize", ["batch", "sample"])
def test_a_single_teacher_is_never_dropped(normalize):
    assert (teacher_dropping(torch.rand(7, 1), p=1.0, normalize=normalize) == 1).all()


@pytest.mark.parametrize("normalize", ["batch", "sample"])
def test_rows_where_nothing_counts_weigh_nothing(normalize):
    mask = torch.tensor([[False, False], [True, True]])
    weights = teacher_dropping(torch.rand(2, 2), mask, p=0.0, normalize=normalize)
    assert not weights[0].any()
    assert weights[1].all()


@pytest.mark.parametrize("normalize", ["batch", "sample"])
def test_an_empty_batch(normalize):
    for mask in (None, torch.zeros(0, 3, dtype=torch.bool)):
        assert teacher_dropping(torch.rand(0, 3), mask, normalize=normalize).shape == (0, 3)


@pytest.mark.parametrize(
    ("loss", "mask", "kept"),
    [
        ([1.0, NAN, 9.0], None, 1),  # it shows
        ([NAN, 2.0, NAN], None, 0),
        ([NAN, 2.0, 1.0], [False, True, True], 1),
        ([INF, 2.0, INF], [False, True, True], 2),
        ([-INF, -INF, -INF], [False, True, True], 1),
        ([NAN, NAN, NAN], [False, False, True], 2),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_losses_that_are_not_finite(loss, mask, kept, dtype):
    mask = None if mask is None else torch.tensor([mask])
    weights = teacher_dropping(torch.tensor([loss], dtype=dtype), mask, p=1.0)
    assert weights[0].nonzero().flatten().tolist() == [kept]


def test_weights_receive_no_gradient():
    loss = torch.rand(4, 3, requires_grad=True)
    assert not teacher_dropping(loss, normalize="sample").requires_grad


@pytest.mark.parametrize("masked", [False, True])
def test_nothing_looks_at_the_data(masked):
    """On meta tensors whatever reads a value, or sizes a result by one, is an error."""
    loss = torch.empty(6, 3, device="meta")
    mask = torch.empty(6, 3, device="meta", dtype=torch.bool) if masked else None
    for normalize in ("batch", "sample"):
        assert teacher_dropping(loss, mask, normalize=normalize).shape == (6, 3)


def gaussian(weight, mask, reduction, dtype=DOUBLE):
    torch.manual_seed(1)
    leaves = [torch.randn(6, D, dtype=dtype, requires_grad=True) for _ in range(2)]
    target = torch.randn(6, D, dtype=dtype)
    loss = F.gaussian_nll(*leaves, target, DIMS, weight=weight, mask=mask, reduction=reduction)
    return loss, leaves


def linear_gaussian(weight, mask, reduction, dtype=DOUBLE):
    torch.manual_seed(1)
    shapes = ((6, 4), (2, D, 4))
    leaves = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    options = {"weight": weight, "mask": mask, "reduction": reduction}
    target = torch.randn(6, D, dtype=dtype)
    return F.linear_gaussian_nll(*leaves, target, DIMS, **options), leaves


def aligned(weight, mask, reduction, dtype=DOUBLE):
    torch.manual_seed(1)
    leaves = [torch.randn(6, d, dtype=dtype, requires_grad=True) for d in DIMS]
    target = [torch.randn(6, d, dtype=dtype) for d in DIMS]  # a call each
    return F.alignment(leaves, target, weight=weight, mask=mask, reduction=reduction), leaves


LOSSES = [gaussian, linear_gaussian, aligned]


@pytest.mark.parametrize("workspace", [1, 1 << 28])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_callable_weight_equals_what_it_returns(loss, reduction, masked, workspace):
    mask = torch.rand(6, 3, generator=seeded(0)) > 0.3 if masked else None
    matrix, _ = loss(None, mask, "none")
    weights = teacher_dropping(matrix, mask, generator=seeded())
    assert 0 < weights.count_nonzero() < weights.numel()
    with linear.workspace(workspace):
        results = []
        for weight in (weights, partial(teacher_dropping, generator=seeded())):
            value, leaves = loss(weight, mask, reduction)
            upstream = torch.linspace(0.5, 2, value.numel(), dtype=DOUBLE).reshape(value.shape)
            results.append((value, *torch.autograd.grad(value, leaves, upstream)))
    for want, got in zip(*results, strict=True):
        assert_close(got, want, DOUBLE)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_rule_sees_the_matrix_and_the_mask_once(loss):
    mask = torch.rand(6, 3) > 0.3
    matrix, _ = loss(None, mask, "none")
    calls = []

    def rule(*arguments):
        calls.append(arguments)
        return torch.ones(3)

    loss(rule, mask, "mean")
    loss(rule, None, "none")
    (seen, seen_mask), (_, no_mask) = calls
    assert torch.equal(seen, matrix)
    assert not seen.requires_grad
    assert seen_mask is mask
    assert no_mask is None


def test_leading_dimensions_reach_the_rule():
    torch.manual_seed(0)
    mean, log_std, target = torch.randn(3, 2, 5, D)
    mask, shapes = torch.rand(2, 5, 3) > 0.3, []

    def rule(matrix, mask):
        shapes.append((matrix.shape, mask.shape))
        return matrix.square()

    got = F.gaussian_nll(mean, log_std, target, DIMS, weight=rule, mask=mask)
    matrix = F.gaussian_nll(mean, log_std, target, DIMS, mask=mask, reduction="none")
    assert shapes == [((2, 5, 3), (2, 5, 3))]
    assert_close(got, matrix.pow(3).sum() / matrix.square().sum(), torch.float32)


class Record(TorchDispatchMode):
    """The operators of mtkd that run, and their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mtkd":
            self.calls.append((func.name().removeprefix("mtkd::"), args))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("loss", LOSSES)
def test_one_forward_and_one_backward(loss):
    with Record() as record:
        value, leaves = loss(teacher_dropping, None, "mean")
        torch.autograd.grad(value, leaves)
    names = [name for name, _ in record.calls if name != "advise_huge_pages"]
    stem = {gaussian: "gaussian_nll", linear_gaussian: "linear_gaussian_nll", aligned: "alignment"}
    count = names.count(stem[loss])
    assert count >= 1
    outer = [name for name in names if name.startswith(stem[loss])]  # not those that a driver calls
    assert outer == count * [stem[loss]] + count * [stem[loss] + "_backward"]


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_rule_stashes_what_fits_the_workspace(reduction):
    with Record() as record:
        linear_gaussian(teacher_dropping, None, reduction)
    assert [args[-1] for name, args in record.calls if name == "linear_gaussian_nll"] == [True]


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_rule_may_be_learned(reduction):
    torch.manual_seed(0)
    temperature = torch.tensor(0.7, dtype=DOUBLE, requires_grad=True)
    mean, log_std = (torch.randn(2, D, dtype=DOUBLE, requires_grad=True) for _ in range(2))
    target = torch.randn(2, D, dtype=DOUBLE)
    with torch.no_grad():
        fixed = F.gaussian_nll(mean, log_std, target, DIMS, reduction="none")

    def rule(matrix, mask):
        return torch.softmax(-temperature * matrix, -1)

    results = []
    for weight in (rule(fixed, None), rule):
        loss = F.gaussian_nll(mean, log_std, target, DIMS, weight=weight, reduction=reduction)
        upstream = torch.linspace(0.5, 2, loss.numel(), dtype=DOUBLE).reshape(loss.shape)
        results.append((loss, *torch.autograd.grad(loss, (mean, log_std, temperature), upstream)))
    for want, got in zip(*results, strict=True):
        assert_close(got, want, DOUBLE)


def test_float16_gradients_survive_with_a_loss_scale():
    torch.manual_seed(0)
    student, target = torch.randn(6, D), torch.randn(6, D)
    half, exact = student.half().requires_grad_(), student.half().double().requires_grad_()
    gradients = []
    for leaf, scale in ((half, 2.0**16), (exact, 1.0)):
        rule = partial(teacher_dropping, generator=seeded())
        loss = F.gaussian_nll(leaf, leaf.detach(), target, DIMS, weight=rule, denominator=1e5)
        gradients.append(torch.autograd.grad(scale * loss, leaf)[0].double() / scale)
    assert_close(gradients[0], gradients[1], torch.float16)


def test_heads_pass_a_rule_through():
    torch.manual_seed(0)
    heads, student, target = GaussianHeads(4, DIMS), torch.randn(6, 4), torch.randn(6, D)
    weights = teacher_dropping(heads(student, target, reduction="none"), generator=seeded())
    got = heads(student, target, weight=partial(teacher_dropping, generator=seeded()))
    assert_close(got, heads(student, target, weight=weights), torch.float32)


def test_images_weigh_the_same_with_sample():
    torch.manual_seed(0)
    loss = torch.rand(8, 3, dtype=DOUBLE)
    rule = partial(teacher_dropping, normalize="sample", generator=seeded())
    kept = teacher_dropping(loss, generator=seeded()).bool()
    means = torch.stack([loss[n][kept[n]].mean() for n in range(8)])
    assert_close(reduce_matrix(loss, weight=rule), means.mean(), DOUBLE)


@pytest.mark.parametrize("normalize", ["batch", "sample"])
def test_compile_without_a_graph_break(normalize):
    def loss(mean, log_std, target, mask):
        rule = partial(teacher_dropping, p=1.0, normalize=normalize)
        return F.gaussian_nll(mean, log_std, target, DIMS, weight=rule, mask=mask)

    torch._dynamo.reset()
    torch.manual_seed(0)
    mean, log_std = (torch.randn(6, D, requires_grad=True) for _ in range(2))
    target, mask = torch.randn(6, D), torch.rand(6, 3) > 0.3
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        value = function(mean, log_std, target, mask)
        results.append((value, *torch.autograd.grad(value, (mean, log_std))))
    for want, got in zip(*results, strict=True):
        assert_close(got, want, torch.float32)


Z = torch.zeros


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([1.0],), {}, TypeError, "loss: expected a tensor, got list"),
        ((Z(2, 3, dtype=torch.int64),), {}, TypeError, "loss: .*floating.*torch.int64"),
        ((Z(()),), {}, ValueError, r"loss: expected shape \(\*, T\).*got \(\)"),
        ((Z(2, 0),), {}, ValueError, r"loss: .*at least one teacher, got \(2, 0\)"),
        ((Z(2, 3), [True]), {}, TypeError, "mask: expected a tensor, got list"),
        ((Z(2, 3), Z(2, 3)), {}, TypeError, "mask: expected a bool tensor.*torch.float32"),
        ((Z(2, 3), Z(3).bool()), {}, ValueError, r"mask: expected shape \(2, 3\), got \(3,\)"),
        (
            (Z(2, 3), Z(2, 3, device="meta", dtype=torch.bool)),
            {},
            ValueError,
            "mask: expected device cpu, got meta",
        ),
        ((Z(2, 3),), {"p": 1.5}, ValueError, "p: expected a number between 0 and 1, got 1.5"),
        ((Z(2, 3),), {"p": NAN}, ValueError, "p: .*got nan"),
        ((Z(2, 3),), {"p": "half"}, TypeError, "p: .*got str"),
        ((Z(2, 3),), {"normalize": "row"}, ValueError, "normalize: .*batch or sample, got 'row'"),
        (
            (Z(2, 3, device="meta"),),
            {"generator": torch.Generator()},
            ValueError,
            "generator: expected one of device meta, got cpu",
        ),
    ],
)
def test_one_clear_error(arguments, options, error, message):
    with pytest.raises(error, match=message) as raised:
        teacher_dropping(*arguments, **options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (None, TypeError, r"weight\(matrix, mask\): expected a tensor, got NoneType"),
        (Z(2), ValueError, r"weight\(matrix, mask\): .* \(3,\) or \(4, 3\), got \(2,\)"),
        (Z(4, 3, dtype=torch.bool), TypeError, r"weight\(matrix, mask\): .*floating.*torch.bool"),
        (Z(3, device="meta"), ValueError, r"weight\(matrix, mask\): expected device cpu"),
    ],
)
def test_what_a_rule_returns_is_checked(result, error, message):
    mean, log_std, target = torch.zeros(3, 4, D)
    with pytest.raises(error, match=message):
        F.gaussian_nll(mean, log_std, target, DIMS, weight=lambda matrix, mask: result)
