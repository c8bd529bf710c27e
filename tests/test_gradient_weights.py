"""Gradient weights: autograd's gradients, a brute force, the conditions of the optimum."""

import pytest
import torch
import torch.nn.functional as TF
from synchronisation import NoSynchronisation

from mtkd.testing import assert_close
from mtkd.weighting import gradient_weights, gradients
from mtkd.weighting.simplex import solve

DOUBLE = torch.float64
N, C = 7, 5


def inputs(teachers=3, rows=N, classes=C, spread=2.0):
    torch.manual_seed(0)
    student = torch.randn(rows, classes, dtype=DOUBLE)
    return student, spread * torch.randn(rows, teachers, classes, dtype=DOUBLE)


def gradients_by_autograd(student, teacher, mask, tau):
    """Gradients ``(N, T, C)`` of tau^2 KL, 0 where masked."""
    columns = []
    for t in range(teacher.shape[1]):
        leaf = student.clone().requires_grad_()
        q = (teacher[:, t] / tau).softmax(-1)
        kl = tau**2 * TF.kl_div((leaf / tau).log_softmax(-1), q, reduction="none").sum(-1)
        (grad,) = torch.autograd.grad((kl if mask is None else kl * mask[:, t]).sum(), leaf)
        columns.append(grad)
    return torch.stack(columns, 1)


def brute_force(vectors, cap=1.0, steps=400):
    """The best of a fine grid of the simplex for two or three vectors ``(T, C)``."""
    line = torch.linspace(0, 1, steps + 1, dtype=DOUBLE)
    if len(vectors) == 2:
        grid = torch.stack((line, 1 - line), -1)
    else:
        first, second = torch.meshgrid(line, line, indexing="ij")
        grid = torch.stack((first, second, 1 - first - second), -1).reshape(-1, 3)
    grid = grid[(grid >= -1e-12).all(-1) & (grid <= cap + 1e-12).all(-1)]
    return (grid @ vectors).square().sum(-1).min()


def gap(gram, weights, cap=1.0):
    """How far an objective may be from the optimum: 0 just where the conditions of one hold."""
    slope, left, least = gram @ weights, 1.0, 0.0
    for value in slope.sort().values.tolist():
        part = min(cap, left)
        least, left = least + part * value, left - part
    return (weights @ slope - least) / gram.diagonal().mean()


@pytest.mark.parametrize("cap", [1.0, 0.6])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("teachers", [2, 3])
@pytest.mark.parametrize("per", ["batch", "sample"])
def test_no_grid_point_is_better(per, teachers, masked, cap):
    student, teacher = inputs(teachers)
    mask = torch.rand(N, teachers) > 0.3 if masked else None
    if masked:
        mask[0], mask[1] = True, False
    vectors = gradients_by_autograd(student, teacher, mask, 2.0)
    options = {"temperature": 2.0, "largest": cap, "per": per}
    weights = gradient_weights(student, teacher, mask, **options)
    if per == "batch":
        numbers = torch.full((teachers,), N) if mask is None else mask.sum(0)
        problems = [(vectors.sum(0) / numbers.unsqueeze(-1), weights)]
    else:
        assert weights.shape == (N, teachers)
        rows = range(N) if mask is None else mask.all(-1).nonzero().flatten().tolist()
        problems = [(vectors[n], weights[n]) for n in rows]
    for g, w in problems:
        assert w.sum().sub(1).abs() < 1e-12
        assert (w >= 0).all()
        assert (w <= cap + 1e-12).all()
        best = brute_force(g, cap)
        assert (w @ g).square().sum() <= best + 1e-12
        assert gap(g @ g.T, w, cap) < 1e-12


@pytest.mark.parametrize("shape", ["random", "near", "scaled", "softmax"])
@pytest.mark.parametrize(("teachers", "width"), [(1, 5), (10, 4), (40, 300), (200, 50)])
def test_the_conditions_of_an_optimum_hold(teachers, width, shape):
    torch.manual_seed(0)
    vectors = torch.randn(teachers, width, dtype=DOUBLE)
    if shape == "near":
        vectors = vectors[:1] + 1e-4 * vectors
    if shape == "scaled":
        vectors *= torch.logspace(-3, 3, teachers, dtype=DOUBLE).unsqueeze(-1)
    if shape == "softmax":
        common = torch.randn(width, dtype=DOUBLE)
        vectors = common.softmax(-1) - (common + 3 * vectors).softmax(-1)
    gram, present = vectors @ vectors.T, torch.ones(1, teachers, dtype=torch.bool)
    for cap in (1.0, 3.0 / max(teachers, 3)):
        whole = torch.full((1, 1), 2.0 if cap == 1.0 else cap, dtype=DOUBLE)
        weights = solve(gram.unsqueeze(0), present, whole)[0]
        assert weights.sum().sub(1).abs() < 1e-12
        assert weights.min() >= 0
        assert weights.max() <= cap + 1e-12
        assert gap(gram, weights, cap) < 1e-12


def test_no_problem_of_a_thousand_runs_in_circles():
    torch.manual_seed(31)  # the predictor and corrector alone never end one of these
    vectors = torch.randn(1000, 6, 5, dtype=DOUBLE)
    common = (3 * torch.randn(1000, 1, 5, dtype=DOUBLE)).softmax(-1)
    vectors = common - (10 * vectors).softmax(-1)
    grams, present = vectors @ vectors.mT, torch.ones(1000, 6, dtype=torch.bool)
    weights = solve(grams, present, torch.full((1000, 1), 2.0, dtype=DOUBLE))
    assert max(gap(g, w) for g, w in zip(grams, weights, strict=True)) < 1e-12


def test_against_scipys_solver():
    from scipy import optimize  # which scikit-learn brings

    student, teacher = inputs(6)
    vectors = gradients_by_autograd(student, teacher, None, 1.0).mean(0).numpy()
    found = optimize.minimize(
        lambda w: ((w @ vectors) ** 2).sum(),
        [1 / 6] * 6,
        jac=lambda w: 2 * vectors @ (w @ vectors),
        bounds=[(0, 0.4)] * 6,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        options={"ftol": 1e-15, "maxiter": 1000},
    )
    weights = gradient_weights(student, teacher, largest=0.4)
    assert ((weights.numpy() @ vectors) ** 2).sum() <= found.fun + 1e-12


def test_a_step_lowers_every_teachers_loss():
    student, teacher = inputs(3)
    vectors = gradients_by_autograd(student, teacher, None, 1.0).mean(0)
    weights = gradient_weights(student, teacher)
    combined = weights @ vectors
    assert (vectors @ combined >= combined.square().sum() - 1e-12).all()


def test_degenerate_problems_have_the_even_answer():
    student, teacher = inputs(1)
    same = student.unsqueeze(1).expand(N, 4, C)
    assert_close(gradient_weights(student, same), torch.full((4,), 0.25), torch.float32)
    equal = teacher.expand(N, 3, C)
    for per in ("batch", "sample"):
        got = gradient_weights(student, equal, per=per)
        assert_close(got, torch.full_like(got, 1 / 3), torch.float32)
        assert (gradient_weights(student, teacher, per=per) == 1).all()
    forced = gradient_weights(*inputs(4), largest=0.25)
    assert torch.equal(forced, torch.full((4,), 0.25, dtype=DOUBLE))


@pytest.mark.parametrize("per", ["batch", "sample"])
def test_masked_teachers_take_no_part(per):
    student, teacher = inputs(4)
    mask = torch.tensor([True, False, True, True]).expand(N, 4)
    poisoned = teacher.clone()
    poisoned[:, 1] = torch.nan
    for largest in (1.0, 0.4):
        options = {"per": per, "largest": largest}
        got = gradient_weights(student, poisoned, mask, **options)
        assert not got[..., 1].any()
        rest = gradient_weights(student, teacher[:, [0, 2, 3]], **options)
        assert_close(got[..., [0, 2, 3]], rest, DOUBLE, factor=10)
    nothing = torch.zeros(N, 4, dtype=torch.bool)
    assert not gradient_weights(student, poisoned, nothing, per=per).any()
    one = torch.tensor([False, False, True, False]).expand(N, 4)
    assert (gradient_weights(student, poisoned, one, per=per)[..., 2] == 1).all()


def test_a_cap_that_few_teachers_cannot_meet_makes_them_equal():
    student, teacher = inputs(4)
    mask = torch.tensor([True, False, True, False]).expand(N, 4)
    got = gradient_weights(student, teacher, mask, largest=0.3, per="sample")
    assert torch.equal(got, mask.double() / 2)


@pytest.mark.parametrize("per", ["batch", "sample"])
def test_shapes_dtypes_and_chunks(per, monkeypatch):
    student, teacher = inputs(3, rows=12)
    want = gradient_weights(student, teacher, per=per)
    monkeypatch.setattr(gradients, "CHUNK", 40)
    grid = student.reshape(3, 4, C), [x.reshape(3, 4, C) for x in teacher.unbind(1)]
    got = gradient_weights(*grid, per=per)
    assert got.shape == ((3,) if per == "batch" else (3, 4, 3))
    assert_close(got.reshape(want.shape), want, DOUBLE)
    half = [x.bfloat16() for x in (student, teacher)]
    got = gradient_weights(*half, per=per)
    assert got.dtype == torch.float32
    exact = gradient_weights(*(x.double() for x in half), per=per)
    assert (got - exact).abs().max() < 1e-4
    empty = gradient_weights(student[:0], teacher[:0], per=per)
    assert empty.shape == ((3,) if per == "batch" else (0, 3))
    assert not empty.requires_grad


def test_the_host_never_waits():
    student, teacher = inputs(3)
    mask = torch.rand(N, 3) > 0.3
    with NoSynchronisation():
        for per in ("batch", "sample"):
            gradient_weights(student, teacher, mask, per=per, largest=0.5)
        gram = torch.eye(3, dtype=DOUBLE).expand(2, 3, 3)
        solve(gram, mask[:2], torch.full((2, 1), 0.5, dtype=DOUBLE))
    shapes = ((2, 3, 3), DOUBLE), ((2, 3), torch.bool), ((2, 1), DOUBLE)
    made = solve(*(torch.empty(shape, dtype=kind, device="meta") for shape, kind in shapes))
    assert made.shape == (2, 3)


@pytest.mark.parametrize("per", ["batch", "sample"])
def test_compile_fullgraph(per):
    torch._dynamo.reset()
    student, teacher = (x.float() for x in inputs(3))
    compiled = torch.compile(gradient_weights, fullgraph=True)
    got, want = (run(student, teacher, per=per) for run in (compiled, gradient_weights))
    assert (got - want).abs().max() < 1e-5


def test_opcheck():
    arguments = torch.eye(3, dtype=DOUBLE)[None], torch.ones(1, 3, dtype=torch.bool)
    cap = torch.full((1, 1), 2.0, dtype=DOUBLE)
    torch.library.opcheck(torch.ops.mtkd.capped_simplex_qp.default, (*arguments, cap))


Z = torch.zeros


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([1.0], Z(2, 3, 4)), {}, TypeError, "student: expected a tensor, got list"),
        ((Z(2, 5), Z(2, 3, 4)), {}, ValueError, r"student: expected shape \(2, 4\) on cpu.*\(2, 5"),
        ((Z(2, 4), Z(4)), {}, ValueError, r"teacher: expected shape \(\*, T, C\)"),
        ((Z(2, 4), Z(2, 3, 4)), {"largest": 0.3}, ValueError, "largest: .*1 / 3 and 1, got 0.3"),
        ((Z(2, 4), Z(2, 3, 4)), {"largest": 1.5}, ValueError, "largest: .*got 1.5"),
        ((Z(2, 4), Z(2, 3, 4)), {"largest": "1"}, TypeError, "largest: .*got str"),
        ((Z(2, 4), Z(2, 3, 4)), {"temperature": -1}, ValueError, "temperature: .*got -1"),
        ((Z(2, 4), Z(2, 3, 4)), {"per": "row"}, ValueError, "per: .*batch or sample, got 'row'"),
        ((Z(2, 4), Z(2, 3, 4), Z(3).bool()), {}, ValueError, r"mask: expected shape \(2, 3\)"),
    ],
)
def test_one_clear_error(arguments, options, error, message):
    with pytest.raises(error, match=message) as raised:
        gradient_weights(*arguments, **options)
    assert "\n" not in str(raised.value)
