"""Mixtures of teachers against torch's own functions, loops from the definitions, extremes."""

import math

import pytest
import torch
import torch.nn.functional as TF
from torch.distributions import Dirichlet

import mtkd.functional as F
from mtkd import ops
from mtkd.reference import mixtures as formulas
from mtkd.testing import assert_close, relative_error

DOUBLE = torch.float64
NAN, INF = math.nan, math.inf
N, T, C = 6, 4, 7


def inputs(rows=N, teachers=T, classes=C, dtype=DOUBLE, seed=0):
    torch.manual_seed(seed)
    student = torch.randn(rows, classes, dtype=DOUBLE).to(dtype).requires_grad_()
    teacher = (2 * torch.randn(rows, teachers, classes, dtype=DOUBLE)).to(dtype)
    weight = (0.1 + torch.rand(rows, teachers, dtype=DOUBLE)).to(dtype).requires_grad_()
    return student, teacher, weight


def counted_teachers(mask, n, teachers):
    return [t for t in range(teachers) if mask is None or mask[n, t]]


def kl_by_loop(student, teacher, weight, tau, mask=None):
    rows = []
    for n in range(len(student)):
        counted = counted_teachers(mask, n, teacher.shape[1])
        if not counted:
            rows.append(student.new_zeros(()))
            continue
        total = sum(weight[n, t] for t in counted)
        q = sum(weight[n, t] / total * (teacher[n, t] / tau).softmax(-1) for t in counted)
        rows.append(tau**2 * TF.kl_div((student[n] / tau).log_softmax(-1), q, reduction="sum"))
    return torch.stack(rows).unsqueeze(-1)


def dirichlet_by_loop(student, teacher, weight, concentration, mask=None):
    rows = []
    for n in range(len(student)):
        counted = counted_teachers(mask, n, teacher.shape[1])
        if not counted:
            rows.append(student.new_zeros(()))
            continue
        total, p, terms = sum(weight[n, t] for t in counted), student[n].softmax(-1), []
        for t in counted:
            density = Dirichlet(1 + concentration[n, t] * teacher[n, t].softmax(-1)).log_prob(p)
            terms.append((weight[n, t] / total).log() + density)
        rows.append(-torch.logsumexp(torch.stack(terms), 0))
    return torch.stack(rows).unsqueeze(-1)


def some_masked():
    mask = torch.rand(N, T) > 0.4
    mask[2] = False
    mask[3] = True
    return mask


@pytest.mark.parametrize("tau", [1.0, 2.5])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32], ids=str)
def test_mixture_kl_is_torchs_kl_of_the_weighted_mean(dtype, masked, tau):
    student, teacher, weight = inputs()
    mask = some_masked() if masked else None
    want = kl_by_loop(student, teacher, weight, tau, mask)
    gradients = torch.autograd.grad(want.sum(), (student, weight))
    leaves = [x.detach().to(dtype).requires_grad_() for x in (student, weight)]
    options = {"temperature": tau, "mask": mask, "reduction": "none"}
    got = F.mixture_kl(leaves[0], teacher.to(dtype), leaves[1], **options)
    assert got.shape == (N, 1)
    assert_close(got, want, dtype)
    for grad, exact in zip(torch.autograd.grad(got.sum(), leaves), gradients, strict=True):
        assert_close(grad, exact, dtype)
    unscaled = F.mixture_kl(leaves[0], teacher, leaves[1], temperature_scale=False, **options)
    assert_close(tau**2 * unscaled, want, dtype)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32], ids=str)
def test_dirichlet_mixture_is_torchs_dirichlet(dtype, masked):
    student, teacher, weight = inputs()
    concentration = (8 * torch.rand(N, T, dtype=DOUBLE)).requires_grad_()
    mask = some_masked() if masked else None
    want = dirichlet_by_loop(student, teacher, weight, concentration, mask)
    gradients = torch.autograd.grad(want.sum(), (student, weight, concentration))
    leaves = [x.detach().to(dtype).requires_grad_() for x in (student, weight, concentration)]
    options = {"mask": mask, "reduction": "none"}
    got = F.dirichlet_mixture(leaves[0], teacher.to(dtype), *leaves[1:], **options)
    assert got.shape == (N, 1)
    assert_close(got, want, dtype)
    for grad, exact in zip(torch.autograd.grad(got.sum(), leaves), gradients, strict=True):
        assert_close(grad, exact, dtype, factor=2)  # a density's error is its posterior's


@pytest.mark.parametrize("function", [F.mixture_kl, F.dirichlet_mixture])
def test_reductions_count_rows(function):
    student, teacher, weight = inputs()
    mask = some_masked()
    rows = function(student, teacher, weight, mask=mask, reduction="none")
    total = function(student, teacher, weight, mask=mask, reduction="sum")
    assert_close(total, rows.sum(), DOUBLE)
    assert_close(function(student, teacher, weight, mask=mask), rows.sum() / (N - 1), DOUBLE)
    given = function(student, teacher, weight, mask=mask, denominator=2.0)
    assert_close(given, rows.sum() / 2, DOUBLE)


@pytest.mark.parametrize("function", [F.mixture_kl, F.dirichlet_mixture])
def test_shapes_of_teachers_weights_and_rows(function):
    student, teacher, weight = inputs(rows=12)
    each = weight.detach()[0]
    want = function(student, teacher, each.expand(12, T), reduction="none")
    assert_close(function(student, teacher, each, reduction="none"), want, DOUBLE)
    sequence = list(teacher.unbind(1))
    assert_close(function(student, sequence, 3 * each, reduction="none"), want, DOUBLE)
    grid = student.reshape(3, 4, C), teacher.reshape(3, 4, T, C)
    leading = function(*grid, weight.reshape(3, 4, T), reduction="none")
    assert leading.shape == (3, 4, 1)
    want = function(student, teacher, weight, reduction="none")
    assert_close(leading.reshape(12, 1), want, DOUBLE)
    equal = function(student, teacher, torch.full((T,), 0.3, dtype=DOUBLE))
    assert_close(function(student, teacher), equal, DOUBLE)


@pytest.mark.parametrize("shape", [(), (T,), (N, T)], ids=str)
def test_shapes_of_concentrations(shape):
    student, teacher, weight = inputs()
    concentration = torch.full(shape, 3.0, dtype=DOUBLE, requires_grad=True)
    got = F.dirichlet_mixture(student, teacher, weight, concentration)
    assert_close(got, F.dirichlet_mixture(student, teacher, weight, 3), DOUBLE)
    assert torch.autograd.grad(got, concentration)[0].shape == shape


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("function", [F.mixture_kl, F.dirichlet_mixture])
def test_masked_entries_count_nowhere_whatever_they_hold(function, poison):
    student, teacher, weight = inputs()
    mask, results = some_masked(), []
    for fill in (0.0, poison):
        leaves = [student.detach().clone(), weight.detach().masked_fill(~mask, fill)]
        leaves[0][2] = fill
        leaves = [x.requires_grad_() for x in leaves]
        teachers = teacher.masked_fill(~mask.unsqueeze(-1), fill)
        for reduction in ("none", "mean"):
            loss = function(leaves[0], teachers, leaves[1], mask=mask, reduction=reduction)
            results.append((loss, *torch.autograd.grad(loss.sum(), leaves)))
    for before, after in ((0, 2), (1, 3)):
        for a, b in zip(results[before], results[after], strict=True):
            assert torch.equal(a, b)
    assert not results[2][0][2].any()
    assert not results[2][2][~mask].any()


@pytest.mark.parametrize("function", [F.mixture_kl, F.dirichlet_mixture])
def test_where_nothing_counts(function):
    for rows, masked in ((0, False), (3, True)):
        student, teacher, weight = inputs(rows)
        mask = torch.zeros(rows, T, dtype=torch.bool) if masked else None
        loss = function(student, teacher, weight, mask=mask)
        assert loss == 0
        gradients = torch.autograd.grad(loss, (student, weight))
        assert [grad.shape for grad in gradients] == [(rows, C), (rows, T)]
        assert not any(grad.any() for grad in gradients)
    student, teacher, _ = inputs()
    weight = torch.zeros(T, dtype=DOUBLE, requires_grad=True)
    loss = function(student, teacher, weight)
    assert loss == 0
    assert not any(grad.any() for grad in torch.autograd.grad(loss, (student, weight)))


@pytest.mark.parametrize("function", [F.mixture_kl, F.dirichlet_mixture])
def test_one_teacher_and_two_classes(function):
    student, teacher, weight = inputs(teachers=1, classes=2)
    loop = {F.mixture_kl: kl_by_loop, F.dirichlet_mixture: dirichlet_by_loop}[function]
    third = 1.0 if function is F.mixture_kl else torch.ones(N, 1, dtype=DOUBLE)
    got = function(student, teacher, weight, reduction="none")
    assert_close(got, loop(student, teacher, weight, third), DOUBLE)
    assert torch.autograd.grad(got.sum(), weight)[0].abs().max() < 1e-14


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("function", [F.mixture_kl, F.dirichlet_mixture])
def test_extreme_logits_are_finite(function, dtype):
    torch.manual_seed(0)
    signs = torch.randn(N, T + 1, C).sign()
    leaf = (1e4 * signs[:, 0]).to(dtype).requires_grad_()
    weight = torch.tensor([1.0, 0.0, 1e-30, 2.0], requires_grad=True)
    loss = function(leaf, (1e4 * signs[:, 1:]).to(dtype), weight)
    assert loss.isfinite()
    for grad in torch.autograd.grad(loss, (leaf, weight)):
        assert grad.isfinite().all()


def test_a_logit_of_minus_infinity_is_probability_zero():
    student, teacher, weight = inputs()
    with torch.no_grad():
        student[:, 1] = -INF
    teacher[:, :, 1] = -INF
    teacher[0, 0, 2] = -INF
    keep = [0, 2, 3, 4, 5, 6]
    for function in (F.mixture_kl, F.dirichlet_mixture):
        got = function(student, teacher, weight)
        grads = torch.autograd.grad(got, (student, weight))
        assert not grads[0][:, 1].any()
        assert all(grad.isfinite().all() for grad in grads)
        if function is F.mixture_kl:  # the density of a simplex counts its classes
            assert_close(got, function(student[:, keep], teacher[..., keep], weight), DOUBLE)


def test_a_class_that_the_student_lacks_is_infinite_and_never_nan():
    student, teacher, weight = inputs()
    with torch.no_grad():
        student[0, 1] = -INF
    kl = F.mixture_kl(student, teacher, weight, reduction="none")
    dirichlet = F.dirichlet_mixture(student, teacher, weight, reduction="none")
    for loss in (kl, dirichlet):
        assert loss[0] == INF
        assert loss[1:].isfinite().all()
        for grad in torch.autograd.grad(loss.sum(), (student, weight)):
            assert grad.isfinite().all()
    some = teacher.clone()
    some[0, 2, 1] = -INF  # one teacher lacks it too: its density alone is left
    got = F.dirichlet_mixture(student, some, weight, reduction="none")[0]
    assert got.isfinite()
    only = torch.zeros(N, T, dtype=torch.bool)
    only[0, 2] = True
    alone = F.dirichlet_mixture(student, some, weight, mask=only, reduction="none")[0]
    share = weight[0, 2] / weight[0].sum()
    assert_close(got, alone - share.log(), DOUBLE)


def probabilities_that_underflow(dtype):
    """Arguments of the operator: logits far apart, weights of 0, classes that somebody lacks."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        300 * torch.randn(*shape, generator=generator, dtype=DOUBLE)
        for shape in ((N, C), (N, T, C))
    )
    weight = torch.rand(N, T, generator=generator, dtype=DOUBLE)
    weight[:, 1] = 0.0  # all their gradient is a class that the mixture gives nothing
    counted = torch.ones(N, T, dtype=torch.bool)
    student[0, 2], teacher[0, :, 2] = -INF, -INF
    teacher[1, 0, 3] = -INF
    student[2, 4], teacher[2, 3, 4] = -INF, 2000.0
    counted[3, 2], teacher[3, 2], weight[3, 2] = False, NAN, NAN
    teacher[4, 1, 5] = NAN  # of weight 0, but counted
    mask = torch.ones(N, 1, dtype=torch.bool)
    mask[5], student[5], teacher[5], weight[5] = False, NAN, INF, NAN
    tensors = student.to(dtype), [teacher.to(dtype)], weight.to(dtype)
    return mask, (C,), *tensors, counted, 0.7, 2.5


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32], ids=str)
def test_what_serves_follows_the_formula_where_probabilities_end(dtype):
    rtol = 1e-7 if dtype == DOUBLE else 2e-5  # an exponent of 87, rounded once on either side
    args, c = probabilities_that_underflow(dtype), torch.ones(N, 1, dtype=dtype)
    matrix = formulas.mixture_kl(*args)
    gradients = formulas.mixture_kl_gradient(c, *args)
    assert matrix[2].isposinf().all()
    assert matrix[4].isnan().all()
    got = ops.mixture_kl.value_and_grad(c, *args, [True, True])
    again = ops.mixture_kl.backward(c, ops.mixture_kl.forward(*args)[1], *args, [True, True])
    for want, have in zip((matrix, *gradients, *gradients), (*got, *again), strict=True):
        torch.testing.assert_close(have, want, rtol=rtol, atol=rtol, equal_nan=True)
    assert gradients[1][:3, 1].abs().min() > 10  # a probability's logarithm, not 0
    assert not got[1][5].any()
    assert not got[2][5].any()


def test_a_small_divergence_keeps_its_digits():
    torch.manual_seed(0)
    teacher = torch.randn(50, 1, 2000)
    student = teacher[:, 0] + 0.01 * torch.randn(50, 2000)
    exact = F.mixture_kl(student.double(), teacher.double(), reduction="none")
    got = F.mixture_kl(student, teacher, reduction="none")
    torchs = TF.kl_div(student.log_softmax(-1), teacher[:, 0].softmax(-1), reduction="none")
    error = relative_error(got, exact)
    assert error < 1e-4
    assert error < 0.1 * relative_error(torchs.sum(-1, keepdim=True), exact)


@pytest.mark.parametrize(("teachers", "classes"), [(300, 30), (3, 5000)])
def test_no_temporary_of_all_teachers(teachers, classes):
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **kwargs or {})
            if isinstance(result, torch.Tensor) and not result._is_view():
                self.most = max(self.most, result.numel())
            return result

    student, teacher, weight = inputs(rows=8, teachers=teachers, classes=classes)
    student, weight = student.detach(), weight.detach()
    rows, c = (None, (classes,), student, [teacher], weight, None), torch.ones(8, 1, dtype=DOUBLE)
    with Largest() as largest:
        formulas.mixture_kl(*rows, 1.0, 1.0)
        formulas.mixture_kl_gradient(c, *rows, 1.0, 1.0)
        formulas.dirichlet_mixture(*rows, weight)
        formulas.dirichlet_mixture_gradient(c, *rows, weight)
    together = formulas.TOGETHER // classes * classes  # classes of several teachers
    assert largest.most == 8 * max(together, classes)


@pytest.mark.parametrize("function", [F.mixture_kl, F.dirichlet_mixture])
def test_compile_fullgraph(function):
    torch._dynamo.reset()
    mask = some_masked()

    def loss(student, teacher, gate):
        return function(student, teacher, gate.softmax(-1), mask=mask)

    student, teacher, weight = inputs(dtype=torch.float32)
    results = []
    for run in (loss, torch.compile(loss, fullgraph=True)):
        value = run(student, list(teacher.unbind(1)), weight)
        results.append((value, *torch.autograd.grad(value, (student, weight))))
    for want, got in zip(*results, strict=True):
        assert_close(got, want, torch.float32)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("function", [F.mixture_kl, F.dirichlet_mixture])
def test_meta_tensors_whose_data_nothing_may_look_at(function, reduction):
    student, weight = (torch.empty(N, k, device="meta", requires_grad=True) for k in (C, T))
    teacher = torch.empty(N, T, C, device="meta")
    mask = torch.ones(N, T, dtype=torch.bool, device="meta")
    loss = function(student, teacher, weight, mask=mask, reduction=reduction)
    assert loss.shape == ((N, 1) if reduction == "none" else ())
    grads = torch.autograd.grad(loss.sum(), (student, weight))
    assert [grad.shape for grad in grads] == [(N, C), (N, T)]


@pytest.mark.parametrize("function", [F.mixture_kl, F.dirichlet_mixture])
def test_function_transforms_see_weights_of_zero(function):
    student, teacher, weight = inputs()
    with torch.no_grad():
        weight[:, 1] = 0.0
    mask = some_masked()
    got = torch.func.grad(lambda s, w: function(s, teacher, w, mask=mask), (0, 1))
    want = torch.autograd.grad(function(student, teacher, weight, mask=mask), (student, weight))
    for a, b in zip(got(student.detach(), weight.detach()), want, strict=True):
        assert_close(a, b, DOUBLE)


Z = torch.zeros


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: F.mixture_kl([1.0], Z(2, 3, 4)), TypeError, "student: expected a tensor"),
        (lambda: F.mixture_kl(Z(()), Z(2, 3)), ValueError, r"student: expected shape \(\*, C\)"),
        (lambda: F.mixture_kl(Z(2, 4), Z(2, 3, 5)), ValueError, r"teacher: .*\(2, T, 4\) beside"),
        (lambda: F.mixture_kl(Z(2, 4), Z(2, 0, 4)), ValueError, r"teacher: .*T at least 1"),
        (lambda: F.mixture_kl(Z(2, 4), []), ValueError, "teacher: expected one tensor a teacher"),
        (
            lambda: F.mixture_kl(Z(2, 4), [Z(2, 4), Z(3, 4)]),
            ValueError,
            r"teacher\[1\]: expected shape \(2, 4\), got shape \(3, 4\)",
        ),
        (
            lambda: F.mixture_kl(Z(2, 4), Z(2, 3, 4, requires_grad=True)),
            ValueError,
            "teacher: .*not require grad",
        ),
        (
            lambda: F.mixture_kl(Z(2, 4), Z(2, 3, 4), Z(2)),
            ValueError,
            r"weight: expected shape \(3,\) or \(2, 3\), got \(2,\)",
        ),
        (
            lambda: F.mixture_kl(Z(2, 4), Z(2, 3, 4), lambda m, k: m),
            TypeError,
            "weight: .*got function",
        ),
        (
            lambda: F.mixture_kl(Z(2, 4), Z(2, 3, 4), mask=Z(2, 1).bool()),
            ValueError,
            r"mask: expected shape \(2, 3\)",
        ),
        (
            lambda: F.mixture_kl(Z(2, 4), Z(2, 3, 4), temperature=0.0),
            ValueError,
            "temperature: expected a positive",
        ),
        (
            lambda: F.dirichlet_mixture(Z(2, 4), Z(2, 3, 4), None, -1.0),
            ValueError,
            "concentration: .*got -1.0",
        ),
        (
            lambda: F.dirichlet_mixture(Z(2, 4), Z(2, 3, 4), None, Z(2)),
            ValueError,
            r"concentration: expected shape \(\), \(3,\) or \(2, 3\), got \(2,\)",
        ),
    ],
)
def test_one_clear_error(call, error, message):
    with pytest.raises(error, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)
