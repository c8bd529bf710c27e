"""Divergences: torch's own function, loops from the definitions, classes without probability."""

import math

import pytest
import torch
import torch.nn.functional as TF
from cases import INTERPRETED

import mtkd.functional as F
from mtkd import linear, ops
from mtkd.testing import assert_close, relative_error

DOUBLE, INF = torch.float64, float("inf")
DIMS = (40, 3, 1100)
C = sum(DIMS)
KINDS = ("forward", "reverse", "jeffreys", "js")


def logits(rows=6, width=C, dtype=DOUBLE):
    torch.manual_seed(0)
    return [torch.randn(rows, width, dtype=dtype).requires_grad_() for _ in range(2)]


def by_definition(student, teacher, kind, beta, temperature):
    """One row and teacher, class after class, in Python's own numbers."""

    def probabilities(values):
        exponentials = (torch.tensor(values, dtype=DOUBLE) / temperature).softmax(0)
        return exponentials.tolist()

    def divergence(p, q):
        return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)

    p, q = probabilities(teacher), probabilities(student)
    mixed = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]
    return {
        "forward": lambda: divergence(p, q),
        "reverse": lambda: divergence(q, p),
        "jeffreys": lambda: divergence(p, q) + divergence(q, p),
        "js": lambda: beta * divergence(p, mixed) + (1 - beta) * divergence(q, mixed),
    }[kind]()


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_definition(kind, dtype):
    student, teacher = logits(rows=3, width=12, dtype=dtype)
    dims, options = (5, 1, 6), {"temperature": 1.7, "beta": 0.3, "divergence": kind}
    got = F.kl_div(student, teacher, dims, temperature_scale=False, reduction="none", **options)
    pairs = zip(student.split(dims, -1), teacher.split(dims, -1), strict=True)
    want = [
        [by_definition(s, t, kind, 0.3, 1.7) for s, t in zip(ss.tolist(), ts.tolist(), strict=True)]
        for ss, ts in pairs
    ]
    assert_close(got, torch.tensor(want, dtype=DOUBLE).T, dtype)
    scaled = F.kl_div(student, teacher, dims, reduction="none", **options)
    assert_close(scaled, 1.7**2 * got, dtype)


def torchs(student, teacher, kind, beta):
    """The same with torch's function, which gives the gradients."""
    u, v = student.log_softmax(-1), teacher.log_softmax(-1)

    def divergence(log_p, log_q):
        return TF.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)

    if kind == "js":
        m = (beta * v.exp() + (1 - beta) * u.exp()).log()
        return beta * divergence(v, m) + (1 - beta) * divergence(u, m)
    forward, reverse = divergence(v, u), divergence(u, v)
    return {"forward": forward, "reverse": reverse, "jeffreys": forward + reverse}[kind]


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_torchs_function(kind, dtype):
    exact = logits()
    tau, options = 2.0, {"divergence": kind, "beta": 0.2, "temperature": 2.0}
    pairs = zip(*((x / tau).split(DIMS, -1) for x in exact), strict=True)
    want = tau**2 * torch.stack([torchs(s, t, kind, 0.2) for s, t in pairs], -1)
    weights = torch.rand(want.shape, dtype=DOUBLE)
    leaves = [x.detach().to(dtype).requires_grad_() for x in exact]
    got = F.kl_div(*leaves, DIMS, reduction="none", **options)
    assert_close(got, want, dtype)
    total = F.kl_div(*leaves, DIMS, weight=weights, reduction="sum", **options)
    expected = torch.autograd.grad((weights * want).sum(), exact)
    for loss in ((weights * got).sum(), total):
        for grad, right in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
            assert_close(grad, right, dtype, factor=2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["stacked", "sequence", "strided"])
def test_a_shared_head_is_a_head_for_each_teacher(kind, form):
    torch.manual_seed(0)
    student = torch.randn(2, 3, 70, dtype=DOUBLE, requires_grad=True)
    teacher = torch.randn(2, 3, 5, 70, dtype=DOUBLE, requires_grad=True)
    given = {
        "stacked": teacher,
        "sequence": list(teacher.unbind(-2)),
        "strided": teacher.movedim(-2, 0).contiguous().movedim(0, -2),
    }[form]
    options = {"divergence": kind, "reduction": "none", "mask": torch.rand(2, 3, 5) > 0.3}
    got = F.kl_div(student, given, **options)
    heads = student.repeat(1, 1, 5)
    want = F.kl_div(heads, teacher.flatten(-2), (70,) * 5, **options)
    assert_close(got, want, DOUBLE)
    weights = torch.rand(2, 3, 5, dtype=DOUBLE)
    pairs = [torch.autograd.grad((weights * x).sum(), (student, teacher)) for x in (got, want)]
    for one, other in zip(*pairs, strict=True):
        assert_close(one, other, DOUBLE)


def test_a_sequence_is_a_tensor_a_teacher():
    student, teacher = logits()
    pieces = [list(x.split(DIMS, -1)) for x in (student, teacher)]
    whole = F.kl_div(student, teacher, DIMS, reduction="none")
    assert_close(F.kl_div(*pieces, reduction="none"), whole, DOUBLE)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("trained", [(True, False), (False, True), (True, True)])
def test_gradients_go_where_they_are_wanted(trained, reduction):
    student, teacher = logits(width=8)
    expected = torch.autograd.grad(F.kl_div(student, teacher, (3, 5)), (student, teacher))
    sides = [
        x.detach().requires_grad_(on) for x, on in zip((student, teacher), trained, strict=True)
    ]
    loss = F.kl_div(*sides, (3, 5), reduction=reduction)
    loss.mean().backward()
    for side, on, want in zip(sides, trained, expected, strict=True):
        assert (side.grad is not None) == on
        if on:
            assert_close(side.grad, want, DOUBLE)


@pytest.mark.parametrize("width", [5, 100, 3000])
@pytest.mark.parametrize("kind", KINDS)
def test_large_logits_lose_nothing(kind, width):
    student, teacher = (1e4 * x.detach().sign() for x in logits(width=width))
    leaves = [x.requires_grad_() for x in (student.float(), teacher.float())]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    got = F.kl_div(*leaves, divergence=kind, reduction="none")
    want = F.kl_div(*exact, divergence=kind, reduction="none")
    assert_close(got, want, torch.float32)
    pairs = zip(
        torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), exact), strict=True
    )
    for one, other in pairs:
        assert_close(one + 1, other + 1, torch.float32)


@pytest.mark.parametrize("width", [7, 700, 3000])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_sides_far_apart_keep_their_gradients(kind, width, offset):
    student, teacher = (x.detach().float() for x in logits(width=width))
    leaves = [student.requires_grad_(), (teacher + offset).requires_grad_()]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    for factor in (1.0, 0.5):
        pairs = [
            torch.autograd.grad(factor * F.kl_div(*x, divergence=kind).sum(), x)
            for x in (leaves, exact)
        ]
        for got, want in zip(*pairs, strict=True):
            assert relative_error(got, want) < 3e-6


def test_a_shared_head_keeps_one_gradient_for_many_teachers(monkeypatch):
    torch.manual_seed(0)
    student = torch.randn(40, 2000, requires_grad=True)  # larger than what is joined
    teachers = [torch.randn(40, 2000) for _ in range(5)]

    def together(*_):
        raise AssertionError("gradients of all teachers would be held")

    packed = F.kl_div(student, torch.stack(teachers, 1))
    expected = torch.autograd.grad(packed, student)[0]
    monkeypatch.setattr(type(ops.kl_div), "weighted_sum", together)
    loss = F.kl_div(student, teachers)
    assert_close(loss, packed, torch.float32)
    assert_close(torch.autograd.grad(loss, student)[0], expected, torch.float32)


def test_small_teachers_of_a_shared_head_are_one_call(monkeypatch):
    student, teachers = torch.randn(4, 20), torch.randn(5, 4, 20)
    whole, calls = type(ops.kl_div).weighted_sum, []

    def count(loss, coefficient, *args):
        calls.append([x.shape for x in args if isinstance(x, torch.Tensor)])
        return whole(loss, coefficient, *args)

    monkeypatch.setattr(type(ops.kl_div), "weighted_sum", count)
    loss = F.kl_div(student, list(teachers))
    assert calls == [[(4, 20), (4, 100)]]
    assert_close(loss, F.kl_div(student, teachers.movedim(0, 1)), torch.float32)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_an_infinite_loss_of_weight_zero_adds_nothing(reduction):
    student = torch.tensor([[0.0, 1.0, -INF]], requires_grad=True)
    teacher = torch.tensor([[[0.5, 1.0, -INF], [0.0, 1.0, 2.0]]])
    alone = F.kl_div(student, teacher[:, :1], reduction="sum")
    expected = torch.autograd.grad(alone, student)[0]
    weight = torch.tensor([[1.0, 0.0]], requires_grad=True)
    for given in (weight, weight.detach(), lambda *_: weight.detach()):
        loss = F.kl_div(student, teacher, weight=given, reduction=reduction).sum()
        assert_close(loss, alone, torch.float32)
        got = torch.autograd.grad(loss, (student, weight) if given is weight else (student,))
        assert_close(got[0], expected, torch.float32)
        assert all(x.isfinite().all() for x in got)
    assert F.kl_div(student, teacher, weight=torch.ones(2)).isinf()


@pytest.mark.parametrize("kind", KINDS)
def test_a_vocabulary(kind):
    exact = logits(rows=1, width=20_000 if INTERPRETED else 150_000)
    leaves = [x.detach().float().requires_grad_() for x in exact]
    pairs = []
    for each in (leaves, exact):
        loss = F.kl_div(*each, divergence=kind, temperature=2.0)
        pairs.append((loss, *torch.autograd.grad(loss, each)))
    for got, want in zip(*pairs, strict=True):
        assert_close(got, want, torch.float32)


HOLES = {  # which divergences are infinite where a side has classes of probability 0
    "teacher": ("reverse", "jeffreys"),
    "student": ("forward", "jeffreys"),
    "both": (),
}


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [7, 300, 3000])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", HOLES)
def test_a_class_without_probability(side, kind, width, dtype):
    student, teacher = (x.detach() for x in logits(rows=4, width=width))
    holes = torch.arange(width) % 3 == 1
    kept = [x[:, ~holes].clone().requires_grad_() for x in (student, teacher)]
    if side in ("student", "both"):
        student[1:, holes] = -INF
    if side in ("teacher", "both"):
        teacher[1:, holes] = -INF
    leaves = [x.to(dtype).requires_grad_() for x in (student, teacher)]
    loss = F.kl_div(*leaves, divergence=kind, reduction="none")
    gradients = torch.autograd.grad(loss.sum(), leaves)
    assert all(grad.isfinite().all() for grad in gradients)
    assert loss[0].isfinite()
    if kind in HOLES[side]:
        assert torch.equal(loss[1:], torch.full_like(loss[1:], INF))
        assert not any(grad[1:].any() for grad in gradients)
        return
    assert loss.isfinite().all()
    for own, grad, name in zip((student, teacher), gradients, ("student", "teacher"), strict=True):
        assert not grad[own == -INF].any(), name
        assert grad[own != -INF].any()
    if side == "both" and dtype == DOUBLE:  # the others are all the classes there are
        rest = F.kl_div(*kept, divergence=kind, reduction="none")
        assert_close(loss[1:], rest[1:], DOUBLE)
        for grad, want in zip(gradients, torch.autograd.grad(rest.sum(), kept), strict=True):
            assert_close(grad[1:][:, ~holes], want[1:], DOUBLE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["teacher", "student", "both"])
@pytest.mark.parametrize("width", [4, 2500])
def test_a_side_without_any_class_is_infinitely_far(width, side, kind):
    leaves = logits(width=width, dtype=torch.float32)
    with torch.no_grad():
        for x, name in zip(leaves, ("student", "teacher"), strict=True):
            if side in (name, "both"):
                x[2] = -INF
    loss = F.kl_div(*leaves, divergence=kind, reduction="none")
    assert loss[2] == INF
    assert loss.isfinite().sum() == len(loss) - 1
    for grad in torch.autograd.grad(loss.sum(), leaves):
        assert grad.isfinite().all()
        assert not grad[2].any()
    mask = torch.arange(len(loss)).unsqueeze(-1) != 2
    assert F.kl_div(*leaves, divergence=kind, mask=mask).isfinite()


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_of_finite_numbers_is_as_good_as_infinity(kind):
    student, teacher = (x.detach() for x in logits(width=50, dtype=torch.float32))
    losses = []
    for value in (-INF, torch.finfo(torch.float32).min, -1e9):
        for x in (student, teacher):
            x[:, 10:20] = value
        tau = 2.0 if INTERPRETED else 0.5  # the interpreter warns of the least number's overflow
        losses.append(F.kl_div(student, teacher, divergence=kind, temperature=tau))
    assert torch.equal(*losses[:2])
    assert torch.equal(*losses[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_class_is_known(kind):
    student, teacher = (x.reshape(-1, 1) for x in logits(rows=1, width=6))
    loss = F.kl_div(student, teacher, divergence=kind, reduction="none")
    assert torch.equal(loss, torch.zeros_like(loss))
    for grad in torch.autograd.grad(loss.sum(), (student, teacher)):
        assert not grad.any()


@pytest.mark.parametrize("kind", KINDS)
def test_nan_is_not_hidden(kind):
    student, teacher = (x.detach() for x in logits(width=70, dtype=torch.float32))
    student[1, 3], teacher[2, 60] = float("nan"), float("nan")
    loss = F.kl_div(student, teacher, divergence=kind, reduction="none")[:, 0]
    assert loss.isnan().tolist() == [False, True, True, False, False, False]


@pytest.mark.parametrize("kind", KINDS)
def test_no_row_and_nothing_counted(kind):
    student = torch.randn(0, 8, requires_grad=True)
    loss = F.kl_div(student, torch.randn(0, 8), (3, 5), divergence=kind)
    loss.backward()
    assert loss == 0
    leaves = logits(width=8)
    with torch.no_grad():
        leaves[0][:], leaves[1][:] = float("nan"), -INF
    loss = F.kl_div(*leaves, (3, 5), divergence=kind, mask=torch.zeros(6, 2, dtype=torch.bool))
    assert loss == 0
    assert not any(grad.any() for grad in torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_and_expanded_logits(dtype):
    torch.manual_seed(0)
    student = torch.randn(C, 6).to(dtype).T.requires_grad_()
    teacher = torch.randn(1, 2 * C).to(dtype).expand(6, -1)[:, ::2]
    for kind in KINDS:
        loss = F.kl_div(student, teacher, DIMS, divergence=kind, reduction="none")
        plain = student.detach().contiguous().requires_grad_()
        want = F.kl_div(plain, teacher.contiguous(), DIMS, divergence=kind, reduction="none")
        assert_close(loss, want, torch.float32)
        pairs = [torch.autograd.grad(x.sum(), y)[0] for x, y in ((loss, student), (want, plain))]
        assert_close(*pairs, dtype)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("layers", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_fused_heads_equal_the_heads_and_the_loss(kind, layers, reduction):
    torch.manual_seed(0)
    x, heads, bias = (
        torch.randn(shape, dtype=DOUBLE, requires_grad=True) for shape in ((2, 3, 9), (C, 9), C)
    )
    teacher = torch.randn(2, 3, C, dtype=DOUBLE)
    if layers:  # of the first teacher with a bias
        given = [
            (torch.randn(2, 3, 5, dtype=DOUBLE), torch.randn(n, 5, dtype=DOUBLE)) for n in DIMS
        ]
        given[0] = (*given[0], torch.randn(DIMS[0], dtype=DOUBLE))
        teacher = torch.cat([TF.linear(*layer) for layer in given], -1)
    options = {"mask": torch.rand(2, 3, 3) > 0.3, "divergence": kind, "reduction": reduction}
    plain = F.kl_div(TF.linear(x, heads, bias), teacher, DIMS, **options)
    leaves = (x, heads, bias)
    expected = torch.autograd.grad(plain.sum(), leaves)
    for workspace in (1 << 28, 20_000):
        with linear.workspace(workspace):
            taught = (given,) if layers else (teacher, DIMS)
            fused = F.linear_kl_div(x, heads, *taught, linear_bias=bias, **options)
            assert_close(fused, plain, DOUBLE)
            gradients = torch.autograd.grad(fused.sum(), leaves)
        for got, want in zip(gradients, expected, strict=True):
            assert_close(got, want, DOUBLE)


def test_inputs_of_their_own_and_layers_beside_logits():
    torch.manual_seed(0)
    xs = [torch.randn(4, n, dtype=DOUBLE) for n in (5, 6)]
    heads = [torch.randn(n, k, dtype=DOUBLE, requires_grad=True) for n, k in ((7, 5), (3, 6))]
    logits, layer = torch.randn(4, 7, dtype=DOUBLE), torch.randn(3, 8, dtype=DOUBLE)
    features = torch.randn(4, 8, dtype=DOUBLE)
    got = F.linear_kl_div(xs, heads, [logits, (features, layer)], reduction="none")
    students = [x @ head.T for x, head in zip(xs, heads, strict=True)]
    want = F.kl_div(students, [logits, features @ layer.T], reduction="none")
    assert_close(got, want, DOUBLE)
    pairs = zip(*(torch.autograd.grad(x.sum(), heads) for x in (got, want)), strict=True)
    for one, other in pairs:
        assert_close(one, other, DOUBLE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_students_layers_decide_the_precision(dtype):
    torch.manual_seed(0)
    x, head = torch.randn(4, 6).to(dtype), torch.randn(5, 6).to(dtype).requires_grad_()
    teacher = torch.randn(4, 5, dtype=DOUBLE)
    layers = [(teacher, torch.eye(5, dtype=DOUBLE))]
    for given in (teacher, layers):
        loss = F.linear_kl_div(x, head, given)
        assert loss.dtype == torch.float32
        want = F.kl_div(x.double() @ head.detach().double().T, teacher)
        assert_close(loss, want, torch.float32)
        loss.backward()


Z = torch.zeros


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: F.kl_div(Z(4, 8), Z(4, 8), divergence="kl"), ValueError, "divergence: .*'kl'"),
        (lambda: F.kl_div(Z(4, 8), Z(4, 8), beta=1.0), ValueError, "beta: .*0 and 1, got 1.0"),
        (lambda: F.kl_div(Z(4, 8), Z(4, 8), beta=0.0), ValueError, "beta: .*positive.*got 0.0"),
        (lambda: F.kl_div(Z(4, 8), Z(4, 8), temperature=0), ValueError, "temperature: .*got 0"),
        (lambda: F.kl_div(Z(4, 8), Z(4, 8), temperature="1"), TypeError, "temperature: .*got str"),
        (lambda: F.kl_div(Z(4, 8), Z(4, 7)), ValueError, r"teacher: .*\(4, 8\), got .*\(4, 7\)"),
        (lambda: F.kl_div(Z(()), Z(())), ValueError, "student: .*0-dim"),
        (
            lambda: F.kl_div(Z(4, 8), Z(4, 5, 7)),
            ValueError,
            r"teacher: expected shape \(4, 5, 8\), got shape \(4, 5, 7\)",
        ),
        (
            lambda: F.kl_div(Z(4, 8), Z(4, 5, 8), (3, 5)),
            ValueError,
            r"teacher: expected shape \(4, 8\), got shape \(4, 5, 8\)",
        ),
        (lambda: F.kl_div(Z(4, 8), [Z(4, 8), Z(4, 7)]), ValueError, r"teacher\[1\]: .*\(4, 8\)"),
        (lambda: F.kl_div(Z(4, 8), []), ValueError, "student: expected one tensor a teacher"),
        (lambda: F.kl_div(Z(4, 8).int(), Z(4, 8)), TypeError, "student: .*torch.int32"),
        (lambda: F.kl_div(Z(4, 0), Z(4, 0)), ValueError, "dims: expected a positive width"),
        (lambda: F.kl_div(Z(4, 8), Z(4, 0, 8)), ValueError, "dims: expected a positive width"),
        (lambda: F.linear_kl_div(Z(4, 6), Z(8), Z(4, 8)), ValueError, r"linear_weight: .*\(C, H"),
        (
            lambda: F.linear_kl_div(Z(4, 6), Z(8, 6), Z(4, 8, requires_grad=True)),
            ValueError,
            "teacher: .*not require grad",
        ),
        (
            lambda: F.linear_kl_div(Z(4, 6), Z(8, 6), [Z(4, 8)]),
            TypeError,
            r"teacher\[0\]: expected \(features, weight\).*got Tensor",
        ),
        (
            lambda: F.linear_kl_div(Z(4, 6), Z(8, 6), [(Z(4, 2), Z(8, 3))]),
            ValueError,
            r"teacher\[0\]\[1\]: expected shape \(C, 2\), got shape \(8, 3\)",
        ),
        (
            lambda: F.linear_kl_div(Z(4, 6), Z(8, 6), [(Z(4, 2), Z(7, 2))]),
            ValueError,
            r"dims: .*sum to the 8 columns of linear_weight, got \(7,\)",
        ),
        (
            lambda: F.linear_kl_div(Z(4, 6), Z(8, 6), [(Z(4, 2), Z(8, 2))], (3, 5)),
            ValueError,
            r"dims: expected \(8,\) like teacher, got \(3, 5\)",
        ),
    ],
)
def test_one_clear_error(call, error, message):
    with pytest.raises(error, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)
