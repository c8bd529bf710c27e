"""Votes: against torch's cross-entropy and loops by definition; ties, extremes, bad input."""

from fractions import Fraction
from math import inf, nan

import pytest
import torch
import torch.nn.functional as TF
from cases import INTERPRETED

import mtkd.functional as F
from mtkd.testing import assert_close, poisoned_memory

pytestmark = [  # NumPy's, of Triton's interpreter: what is masked, or invalid, may be inf and NaN
    pytest.mark.filterwarnings(f"ignore:{words}:RuntimeWarning")
    for words in ("invalid value encountered", "All-NaN slice")
]
VOTES = ("each", "soft", "plurality", "mean")
TOGETHER = ("plurality", "mean")
DOUBLE = torch.float64


def inputs(rows=6, teachers=5, classes=7, dtype=DOUBLE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(rows, classes, generator=generator, dtype=DOUBLE)
    teacher = 2 * torch.randn(rows, teachers, classes, generator=generator, dtype=DOUBLE)
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


def decision(logits):
    """The distribution of a teacher's vote, by the definition."""
    numbers = logits.tolist()
    most = max(numbers)
    chosen = [c for c, x in enumerate(numbers) if x == most]
    return {c: Fraction(1, len(chosen)) for c in chosen}


def counted(weights, classes):
    """Votes of a row: exact fractions by class, given (distribution, integer weight) pairs."""
    votes = [Fraction(0)] * classes
    for vote, weight in weights:
        for c, share in vote.items():
            votes[c] += weight * share
    return votes


def distribution(votes):
    most = max(votes)
    share = 1 / votes.count(most)
    return [share if v == most else 0.0 for v in votes]


def targets(teacher, vote, temperature=1.0, weight=None):
    """The targets ``(N, K, C)`` by loops; weights are integers, 0 for what does not count."""
    rows, teachers, classes = teacher.shape
    if vote in ("soft", "mean"):
        q = torch.softmax(teacher.double() / temperature, -1)
        if vote == "soft":
            return q
        weight = torch.ones(rows, teachers) if weight is None else weight
        share = weight.double() / weight.sum(-1, keepdim=True)
        return (share.unsqueeze(-1) * q).sum(1, keepdim=True)
    rows_of_votes = [[decision(x) for x in row] for row in teacher]
    if vote == "each":
        q = [[[float(v.get(c, 0)) for c in range(classes)] for v in row] for row in rows_of_votes]
    else:
        weights = [[1] * teachers] * rows if weight is None else weight.int().tolist()
        pairs = zip(rows_of_votes, weights, strict=True)
        q = [[distribution(counted(zip(*pair, strict=True), classes))] for pair in pairs]
    return torch.tensor(q, dtype=DOUBLE)


def cross_entropy(student, q):
    columns = [TF.cross_entropy(student, q[:, k], reduction="none") for k in range(q.shape[1])]
    return torch.stack(columns, -1)


def value_and_grad(student, *args, upstream=None, **options):
    loss = F.majority_vote(student, *args, **options)
    upstream = torch.ones_like(loss) if upstream is None else upstream
    return loss.detach(), torch.autograd.grad(loss, student, upstream)[0]


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("classes", [2, 7, 1100])
@pytest.mark.parametrize("vote", VOTES)
def test_equals_torchs_cross_entropy(vote, classes, dtype):
    student, teacher = inputs(classes=classes, dtype=dtype)
    exact = student.detach().double().requires_grad_()
    want = cross_entropy(exact, targets(teacher, vote, 1.7))
    upstream = torch.rand(want.shape, dtype=DOUBLE)
    options = {"vote": vote, "temperature": 1.7, "reduction": "none"}
    wide = DOUBLE if dtype == DOUBLE else torch.float32
    value, grad = value_and_grad(student, teacher, upstream=upstream.to(wide), **options)
    assert value.dtype == wide
    assert_close(value, want, wide)
    assert grad.dtype == dtype
    truncated = INTERPRETED and dtype == torch.bfloat16  # rounding that the interpreter lacks
    assert_close(grad, torch.autograd.grad(want, exact, upstream)[0], dtype, 1 + truncated)


@pytest.mark.parametrize("vote", TOGETHER)
def test_weights_act_inside_the_vote(vote):
    student, teacher = inputs(rows=40, classes=3)
    weight = torch.randint(0, 4, (40, 5))
    weight[:, 0] += 1
    want = cross_entropy(student, targets(teacher, vote, weight=weight))
    got = F.majority_vote(student, teacher, vote=vote, weight=weight.double(), reduction="none")
    assert got.shape == (40, 1)
    assert_close(got, want, DOUBLE)
    scaled = F.majority_vote(student, teacher, vote=vote, weight=0.3 * weight.double())
    assert_close(scaled, want.mean(), DOUBLE)
    shared = torch.tensor([1.0, 0.0, 2.0, 1.0, 1.0])
    got = F.majority_vote(student, teacher, vote=vote, weight=shared)
    want = cross_entropy(student, targets(teacher, vote, weight=shared.expand(40, 5)))
    assert_close(got, want.mean(), DOUBLE)


@pytest.mark.parametrize("vote", ["each", "soft"])
def test_weights_of_columns_are_those_of_every_loss(vote):
    student, teacher = inputs()
    matrix = F.majority_vote(student, teacher, vote=vote, reduction="none")
    weight = torch.rand(5, dtype=DOUBLE, requires_grad=True)
    loss = F.majority_vote(student, teacher, vote=vote, weight=weight)
    assert_close(loss, (weight * matrix).sum() / (6 * weight.sum()), DOUBLE)
    assert torch.autograd.grad(loss, weight)[0].any()
    called = F.majority_vote(student, teacher, vote=vote, weight=lambda m, _: (m > 2).double())
    assert_close(called, matrix[matrix > 2].mean(), DOUBLE)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("vote", VOTES)
def test_masked_entries_count_nowhere_whatever_they_hold(vote, reduction):
    student, teacher = inputs()
    mask = torch.rand(6, 5, generator=torch.Generator().manual_seed(1)) > 0.5
    mask[2], mask[4] = False, True
    results = []
    for fill in (0.0, nan, inf, -inf):
        held = teacher.masked_fill(~mask.unsqueeze(-1), fill)
        row = torch.where(mask.any(-1, keepdim=True), student, fill).detach().requires_grad_()
        options = {"vote": vote, "mask": mask, "reduction": reduction}
        results.append(value_and_grad(row, held, **options))
    for value, grad in results:
        assert torch.equal(value, results[0][0])
        assert torch.equal(grad, results[0][1])
        assert not grad[2].any()
    kept = [n for n in range(6) if n != 2]
    rows = F.majority_vote(student[kept], teacher[kept], vote=vote, mask=mask[kept])
    if reduction == "mean":
        assert_close(results[0][0], rows, DOUBLE)


@pytest.mark.parametrize("vote", VOTES)
def test_nothing_counted_is_zero(vote):
    student, teacher = inputs()
    mask = torch.zeros(6, 5, dtype=torch.bool)
    for more in ({}, {"weight": torch.rand(5)}):
        value, grad = value_and_grad(student, teacher.fill_(nan), vote=vote, mask=mask, **more)
        assert value == 0
        assert not grad.any()
    if vote in TOGETHER:
        value, grad = value_and_grad(student, teacher, vote=vote, weight=torch.zeros(5))
        assert value == 0
        assert not grad.any()


@pytest.mark.parametrize("vote", VOTES)
def test_denominator_divides_the_sum(vote):
    student, teacher = inputs()
    loss = F.majority_vote(student, teacher, vote=vote, denominator=3)
    assert_close(loss, F.majority_vote(student, teacher, vote=vote, reduction="sum") / 3, DOUBLE)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("vote", VOTES)
def test_a_sequence_is_read_where_it_lies(vote, reduction):
    student, teacher = inputs(teachers=9)
    packed = value_and_grad(student, teacher, vote=vote, reduction=reduction)
    pieces = [x.clone() for x in teacher.unbind(1)]
    pieces[3] = pieces[3].T.contiguous().T  # of any strides
    for sequence in (pieces, tuple(pieces)):
        for got, want in zip(
            value_and_grad(student, sequence, vote=vote, reduction=reduction), packed, strict=True
        ):
            assert torch.equal(got, want)
    loss = F.majority_vote(student, pieces, vote=vote, reduction=reduction).sum()
    pieces[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("vote", VOTES)
def test_strides_and_leading_dimensions(vote):
    student, teacher = inputs(rows=6, classes=40)
    want = value_and_grad(student, teacher, vote=vote)
    stored = teacher.transpose(0, 1).contiguous().transpose(0, 1)
    spread = torch.stack((teacher, teacher), -1)[..., 0]
    columns = student.detach().T.contiguous().T.requires_grad_()
    for s, t in ((student, stored), (student, spread), (columns, teacher)):
        value, grad = value_and_grad(s, t, vote=vote)
        assert_close(value, want[0], DOUBLE)
        assert_close(grad, want[1], DOUBLE)
    matrix = F.majority_vote(student, teacher, vote=vote, reduction="none")
    tokens = F.majority_vote(
        student.unflatten(0, (2, 3)), teacher.unflatten(0, (2, 3)), vote=vote, reduction="none"
    )
    assert torch.equal(tokens.flatten(0, 1), matrix)
    alone = F.majority_vote(student[0], teacher[0], vote=vote, reduction="none")
    assert torch.equal(alone, matrix[0])


def test_a_tie_shares_the_vote_equally():
    student = torch.tensor([[1.0, 2.0, 3.0, 4.0]], requires_grad=True)
    teacher = torch.tensor([[[5.0, 0.0, 5.0, 5.0], [1.0, 1.0, 1.0, 1.0]]])
    value, grad = value_and_grad(student, teacher, reduction="none")
    normal = student.detach().logsumexp(-1)
    assert_close(value, torch.stack((normal - 8 / 3, normal - 10 / 4), -1), torch.float32)
    q = torch.tensor([1 / 3 + 1 / 4, 1 / 4, 7 / 12, 7 / 12])
    assert_close(grad, 2 * student.softmax(-1) - q, torch.float32)


def test_winners_of_a_tied_plurality_share():
    student = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True)
    eye = 4 * torch.eye(3)
    teacher = eye[[0, 0, 1, 1, 2]].unsqueeze(0)
    value, grad = value_and_grad(student, teacher, vote="plurality")
    assert_close(value, student.detach().logsumexp(-1).sum() - 1.5, torch.float32)
    assert_close(grad, student.softmax(-1) - torch.tensor([0.5, 0.5, 0.0]), torch.float32)
    # sums of weights are rounded: a tenth and two tenths are three tenths
    weight = torch.tensor([0.1, 0.2, 0.3, 0.0, 0.0])
    rounded = F.majority_vote(student, teacher, vote="plurality", weight=weight)
    assert_close(rounded, value, torch.float32)


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32], ids=str)
@pytest.mark.parametrize("vote", VOTES)
def test_large_logits(vote, dtype):
    student, teacher = inputs(rows=9, teachers=1, classes=2, dtype=dtype)
    student = (1e4 * student.detach().sign()).requires_grad_()
    teacher = 1e4 * teacher.sign()
    exact = student.detach().double().requires_grad_()
    want = cross_entropy(exact, targets(teacher, vote, 3.0))
    options = {"vote": vote, "temperature": 3.0, "reduction": "none"}
    value, grad = value_and_grad(student, teacher, **options)
    assert_close(value, want, dtype)
    assert_close(grad, torch.autograd.grad(want.sum(), exact)[0], dtype)


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("vote", VOTES)
def test_classes_that_a_side_excludes(vote, reduction, dtype):
    student, teacher = inputs(classes=40, dtype=dtype)
    both = [1, 5, 39]
    student = student.detach().index_fill(-1, torch.tensor(both), -inf).requires_grad_()
    teacher = teacher.index_fill(-1, torch.tensor([*both, 7]), -inf)
    value, grad = value_and_grad(student, teacher, vote=vote, reduction=reduction)
    kept = [c for c in range(40) if c not in both]
    small = student.detach()[:, kept].requires_grad_()
    want, kept_grad = value_and_grad(small, teacher[..., kept], vote=vote, reduction=reduction)
    assert_close(value, want, dtype)
    assert_close(grad[:, kept], kept_grad, dtype)
    assert not grad[:, both].any()


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("vote", VOTES)
def test_a_class_that_only_the_student_excludes_costs_inf(vote, reduction):
    student = torch.tensor([[-inf, 1.0, 2.0]], requires_grad=True)
    teacher = torch.tensor([[[3.0, 0.0, 0.0]]])
    value, grad = value_and_grad(student, teacher, vote=vote, reduction=reduction)
    assert value == inf
    q = targets(teacher, vote)[0]
    assert_close(grad, student.softmax(-1) - q, torch.float32)


@pytest.mark.parametrize("row", [[nan, 1.0, 2.0], [2.0, nan, 1.0], [nan] * 3, [-inf] * 3])
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("vote", VOTES)
def test_a_counted_teacher_without_a_vote_shows(vote, reduction, row):
    student, teacher = inputs(rows=3, teachers=4, classes=3)
    teacher[1, 2] = torch.tensor(row)
    value, grad = value_and_grad(student, teacher, vote=vote, reduction=reduction)
    assert grad[1].isnan().all()
    assert grad[[0, 2]].isfinite().all()
    if reduction == "none":
        assert value[1].isnan().sum() == 1
        assert value[[0, 2]].isfinite().all()
    else:
        assert value.isnan()


@pytest.mark.parametrize("vote", VOTES)
def test_many_classes(vote):
    generator = torch.Generator().manual_seed(0)
    classes = 20_001 if INTERPRETED else 150_001
    student = torch.randn(2, classes, generator=generator).requires_grad_()
    teacher = torch.randn(2, 3, classes, generator=generator)
    with poisoned_memory():
        value, grad = value_and_grad(student, teacher, vote=vote, reduction="none")
    exact = student.detach().double().requires_grad_()
    want = cross_entropy(exact, targets(teacher, vote))
    assert_close(value, want, torch.float32)
    assert_close(grad, torch.autograd.grad(want.sum(), exact)[0], torch.float32)


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vote", VOTES)
def test_rows_longer_than_a_block(vote, dtype):
    """Classes far apart, no other possible: what ties, -inf, NaN and masks give in short rows."""
    student, teacher = inputs(rows=5, teachers=3, classes=9, dtype=dtype)
    student, teacher = student.detach(), teacher.round()  # many ties
    mask = torch.rand(5, 3, generator=torch.Generator().manual_seed(1)) > 0.3
    mask[0], mask[1:3, 0], mask[1, 1] = False, True, False
    teacher[1, 1] = nan  # not counted
    teacher[2, 0, 4] = nan
    student[3, 2] = -inf
    teacher[3, :, 2] = -inf
    places = torch.randperm(5000, generator=torch.Generator().manual_seed(2))[:9]
    wide_student = student.new_full((5, 5000), -inf).index_copy(1, places, student)
    wide_teacher = teacher.new_full((5, 3, 5000), -inf).index_copy(2, places, teacher)
    options = {"vote": vote, "mask": mask, "reduction": "none"}
    want, want_grad = value_and_grad(student.requires_grad_(), teacher, **options)
    value, grad = value_and_grad(wide_student.requires_grad_(), wide_teacher, **options)
    assert want[2].isnan().any()
    assert want_grad[2].isnan().all()
    assert grad[2].isnan().all()
    valid = ~want.isnan()
    assert torch.equal(value.isnan(), want.isnan())
    assert_close(value[valid], want[valid], value.dtype)
    rows = [0, 1, 3, 4]
    assert_close(grad[rows][:, places], want_grad[rows], dtype)
    assert not grad[rows].index_fill(1, places, 0.0).any()


def test_a_thousand_teachers():
    student, teacher = inputs(rows=3, teachers=1024, classes=5)
    mask = torch.rand(3, 1024, generator=torch.Generator().manual_seed(0)) > 0.4
    mask[1] = False
    for vote in VOTES:
        want = cross_entropy(student, targets(teacher, vote)).mean()
        assert_close(F.majority_vote(student, teacher, vote=vote), want, DOUBLE)
        options = {"vote": vote, "mask": mask, "reduction": "none"}
        value, grad = value_and_grad(student, teacher, **options)
        for row in (0, 2):
            picked = teacher[row : row + 1, mask[row]]
            alone = student[row : row + 1].detach().requires_grad_()
            want, want_grad = value_and_grad(alone, picked, vote=vote, reduction="none")
            kept = value[row][mask[row]] if vote in ("each", "soft") else value[row]
            assert_close(kept, want[0], DOUBLE)
            assert_close(grad[row], want_grad[0], DOUBLE)
        assert not value[1].any()
        assert not grad[1].any()


@pytest.mark.parametrize("vote", VOTES)
def test_empty_batch(vote):
    student, teacher = inputs(rows=0)
    value, grad = value_and_grad(student, teacher, vote=vote)
    assert value == 0
    assert grad.shape == (0, 7)


# The rest of PyTorch


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("vote", VOTES)
def test_compile_fullgraph(vote, reduction, sequence):
    torch._dynamo.reset()
    compiled = torch.compile(F.majority_vote, fullgraph=True, dynamic=True)
    for rows in (4, 7):
        student, teacher = inputs(rows, dtype=torch.float32, seed=rows)
        teacher = list(teacher.unbind(1)) if sequence else teacher
        mask = torch.rand(rows, 5) > 0.3
        options = {"vote": vote, "reduction": reduction, "mask": mask}
        want, grad = value_and_grad(student, teacher, **options)
        got = compiled(student, teacher, **options)
        assert_close(got, want, torch.float32)
        assert_close(torch.autograd.grad(got.sum(), student)[0], grad, torch.float32)


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("vote", VOTES)
def test_function_transforms_see_the_formula(vote, sequence):
    student, teacher = inputs()
    teacher = list(teacher.unbind(1)) if sequence else teacher
    _, grad = value_and_grad(student, teacher, vote=vote)

    def loss(student):
        return F.majority_vote(student, teacher, vote=vote)

    assert_close(torch.func.grad(loss)(student.detach()), grad, DOUBLE)


def test_autocast_and_meta_tensors():
    student, teacher = inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = F.majority_vote(student, teacher)
    assert torch.equal(inside, F.majority_vote(student, teacher))
    for vote in VOTES:
        leaf = student.detach().to("meta").requires_grad_()
        for each in (teacher.to("meta"), list(teacher.to("meta").unbind(1))):
            assert value_and_grad(leaf, each, vote=vote)[1].shape == student.shape


# Decisions


def test_disagreement_is_how_often_decisions_differ():
    student, teacher = inputs(rows=50, classes=3)
    want = (student.argmax(-1, keepdim=True) != teacher.argmax(-1)).float()
    assert torch.equal(F.disagreement(student, teacher), want)
    assert torch.equal(F.disagreement(student, list(teacher.unbind(1))), want)
    tokens = F.disagreement(student.unflatten(0, (5, 10)), teacher.unflatten(0, (5, 10)))
    assert torch.equal(tokens.flatten(0, 1), want)
    assert 0 < want.mean() < 1


def test_disagreement_in_ties_and_without_a_decision():
    student = torch.tensor([[2.0, 2.0, 0.0]])
    teacher = torch.tensor([[[1.0, 1.0, 0.0], [0.0, 3.0, 3.0], [0.0, 0.0, 1.0], [nan, 1.0, 0.0]]])
    assert F.disagreement(student, teacher).tolist() == [[0.0, 0.0, 1.0, 1.0]]
    assert F.disagreement(torch.full((1, 3), -inf), teacher).tolist() == [[1.0] * 4]


@pytest.mark.parametrize("sequence", [False, True])
def test_consensus_labels_count_votes(sequence):
    _, teacher = inputs(rows=60, classes=3)
    teacher = teacher.round()  # ties
    weight = torch.randint(0, 3, (60, 5))
    mask = torch.rand(60, 5, generator=torch.Generator().manual_seed(0)) > 0.3
    mask[7] = False
    given = list(teacher.unbind(1)) if sequence else teacher
    labels, share, margin = F.consensus_labels(given, weight.double(), mask)
    assert labels.dtype == torch.int64
    for n in range(60):
        weights = [w * m for w, m in zip(weight[n].tolist(), mask[n].tolist(), strict=True)]
        if not sum(weights):
            assert (labels[n], share[n], margin[n]) == (-100, 0, 0)
            continue
        votes = counted(zip(map(decision, teacher[n]), weights, strict=True), 3)
        best, second, _ = sorted(votes, reverse=True)
        assert labels[n] == votes.index(best)
        assert share[n].item() == pytest.approx(float(best / sum(weights)), rel=1e-12)
        assert margin[n].item() == pytest.approx(float((best - second) / sum(weights)), rel=1e-9)


def test_consensus_labels_ignore_what_is_masked_and_show_what_is_not():
    _, teacher = inputs(rows=4)
    want = F.consensus_labels(teacher[:, 1:])
    teacher[:, 0] = nan
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[:, 0] = False
    for got, expected in zip(F.consensus_labels(teacher, mask=mask), want, strict=True):
        assert torch.equal(got, expected)
    labels, share, margin = F.consensus_labels(teacher)
    assert labels.tolist() == [-100] * 4
    assert share.isnan().all()
    assert margin.isnan().all()


def test_consensus_labels_are_the_targets_of_plurality():
    student, teacher = inputs(rows=30, teachers=7)
    labels, _, margin = F.consensus_labels(teacher)
    clear = margin > 0
    want = TF.cross_entropy(student[clear], labels[clear])
    assert_close(F.majority_vote(student[clear], teacher[clear], vote="plurality"), want, DOUBLE)


Z = torch.zeros
S, T = Z(4, 8), Z(4, 3, 8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: F.majority_vote(S, T, vote="all"), ValueError, "vote: .*each.*mean, got 'all'"),
        (lambda: F.majority_vote(S, T, temperature=0.0), ValueError, "temperature: .*got 0.0"),
        (lambda: F.majority_vote(3, T), TypeError, "student: expected a tensor, got int"),
        (lambda: F.majority_vote(S.long(), T), TypeError, "student: .*torch.int64"),
        (lambda: F.majority_vote(Z(4, 1), Z(4, 3, 1)), ValueError, r"student: .*C at least 2"),
        (lambda: F.majority_vote(S, S), ValueError, r"teacher: .*\(8, 4, 8\)|teacher: .*\(4, 8\)"),
        (lambda: F.majority_vote(S, Z(4, 0, 8)), ValueError, "teacher: .*T at least 1"),
        (lambda: F.majority_vote(S, []), ValueError, "teacher: .*got none"),
        (
            lambda: F.majority_vote(S, [S, Z(4, 7)]),
            ValueError,
            r"teacher\[1\]: expected shape \(4, 8\), got shape \(4, 7\)",
        ),
        (
            lambda: F.majority_vote(S, T.clone().requires_grad_()),
            ValueError,
            "teacher: .*not require grad",
        ),
        (
            lambda: F.majority_vote(S, [S, S.clone().requires_grad_()]),
            ValueError,
            r"teacher\[1\]: .*not require grad",
        ),
        (lambda: F.majority_vote(S, T, mask=Z(4, 2) > 0), ValueError, r"mask: .*\(4, 3\)"),
        (
            lambda: F.majority_vote(S, T, vote="mean", mask=Z(4, 1) > 0),
            ValueError,
            r"mask: expected shape \(4, 3\), got \(4, 1\)",
        ),
        (
            lambda: F.majority_vote(S, T, vote="mean", weight=Z(2)),
            ValueError,
            r"weight: expected shape \(3,\) or \(4, 3\), got \(2,\)",
        ),
        (
            lambda: F.majority_vote(S, T, vote="mean", weight=Z(3, requires_grad=True)),
            ValueError,
            "weight: expected no gradient",
        ),
        (
            lambda: F.majority_vote(S, T, vote="plurality", weight=lambda m, _: m),
            TypeError,
            "weight: expected a tensor inside a vote, got function",
        ),
        (lambda: F.disagreement(S, Z(4, 3, 7)), ValueError, r"teacher: .*\(4, T, 8\) beside"),
        (lambda: F.disagreement([S], T), TypeError, "student: expected a tensor, got list"),
        (lambda: F.consensus_labels(Z(8)), ValueError, r"teacher: expected shape \(\*, T, C\)"),
        (lambda: F.consensus_labels([]), TypeError, r"teacher\[0\]: |teacher: "),
        (lambda: F.consensus_labels(T, weight=Z(2)), ValueError, "weight: expected shape"),
    ],
)
def test_one_clear_error(call, error, message):
    with pytest.raises(error, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)


def test_a_sequence_of_one_teacher():
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 3), torch.randn(5, 1, 3)
    alone = [teacher[:, 0]]
    assert torch.equal(F.disagreement(student, alone), F.disagreement(student, teacher))
    for got, want in zip(F.consensus_labels(alone), F.consensus_labels(teacher), strict=True):
        assert torch.equal(got, want)
    for vote in VOTES:
        assert F.majority_vote(student, alone, vote=vote) == F.majority_vote(
            student, teacher, vote=vote
        )
    flat = F.disagreement(student[0], [teacher[0, 0]])
    assert torch.equal(flat, F.disagreement(student, teacher)[0])
