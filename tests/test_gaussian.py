"""What is special to the Gaussian loss: agreement with torch, strides, extremes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from implementations import IMPLEMENTATIONS
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

import mtkd.functional as F
from mtkd import ops
from mtkd.testing import assert_close, cast

DOUBLE = torch.float64
DIMS = (3, 40, 1)
# as numpy warns, in which Triton's interpreter computes
overflows = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


def inputs(*leading, modes=0, dtype=DOUBLE):
    torch.manual_seed(0)
    inner = (modes,) if modes else ()
    mean = torch.randn(*leading, *inner, sum(DIMS), dtype=dtype)
    return mean, 0.5 * torch.randn_like(mean), torch.randn(*leading, sum(DIMS), dtype=dtype)


@pytest.mark.parametrize("full", [False, True])
def test_equals_torchs_gaussian_nll_loss(full):
    mean, log_std, target = inputs(6)
    ours = F.gaussian_nll(mean, log_std, target, full=full)
    theirs = torch.nn.functional.gaussian_nll_loss(mean, target, (2 * log_std).exp(), full=full)
    assert_close(ours, theirs, DOUBLE)


def test_equals_torchs_normal_distribution():
    mean, log_std, target = inputs(2, 3)
    matrix = F.gaussian_nll(mean, log_std, target, DIMS, per_dim=False, full=True, reduction="none")
    parts = zip(*(x.split(DIMS, -1) for x in (mean, log_std, target)), strict=True)
    expected = [-Independent(Normal(m, s.exp()), 1).log_prob(t) for m, s, t in parts]
    assert_close(matrix, torch.stack(expected, -1), DOUBLE)


@pytest.mark.parametrize("bound", [None, 0.7])
def test_equals_torchs_mixture(bound):
    mean, log_std, target = inputs(5, modes=4)
    logits = torch.randn(5, 4, len(DIMS), dtype=DOUBLE)
    matrix = F.gaussian_nll(
        mean, log_std, target, DIMS, mode_logits=logits, bound=bound, full=True, reduction="none"
    )
    bounded = log_std if bound is None else bound * torch.tanh(log_std / bound)
    columns = zip(*(x.split(DIMS, -1) for x in (mean, bounded, target)), strict=True)
    for t, (m, s, x) in enumerate(columns):
        modes = Independent(Normal(m, s.exp()), 1)
        mixture = MixtureSameFamily(Categorical(logits=logits[..., t]), modes)
        assert_close(matrix[:, t], -mixture.log_prob(x) / DIMS[t], DOUBLE)


def test_a_mixture_of_one_mode_is_the_gaussian():
    mean, log_std, target = inputs(5)
    logits = torch.randn(5, 1, len(DIMS), dtype=DOUBLE, requires_grad=True)
    one = F.gaussian_nll(mean[:, None], log_std[:, None], target, DIMS, mode_logits=logits)
    assert_close(one, F.gaussian_nll(mean, log_std, target, DIMS), DOUBLE)
    assert not torch.autograd.grad(one, logits)[0].any()


@pytest.mark.parametrize("modes", [0, 2])
@pytest.mark.parametrize("rows", [6, 2000])
def test_sequences_equal_packed(rows, modes):
    mean, log_std, target = inputs(rows, modes=modes)
    mean, log_std = mean.requires_grad_(), log_std.requires_grad_()
    logits = torch.randn(rows, modes, len(DIMS), dtype=DOUBLE) if modes else None
    parts = [x.split(DIMS, -1) for x in (mean, log_std, target)]
    for reduction in ("none", "mean"):
        options = {"mode_logits": logits, "reduction": reduction}
        packed = F.gaussian_nll(mean, log_std, target, DIMS, **options)
        sequence = F.gaussian_nll(*parts, **options)
        assert_close(sequence, packed, DOUBLE)
        losses = (packed.sum(), sequence.sum())
        gradients = [torch.autograd.grad(loss, (mean, log_std)) for loss in losses]
        for got, want in zip(*gradients, strict=True):
            assert_close(got, want, DOUBLE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, DOUBLE])
def test_targets_of_another_dtype(dtype):
    mean, log_std, target = inputs(6, dtype=torch.float32)
    target = target.to(dtype)
    loss = F.gaussian_nll(mean, log_std, target, DIMS)
    assert loss.dtype == torch.float32
    assert_close(loss, F.gaussian_nll(mean.double(), log_std.double(), target, DIMS), torch.float32)


def _strided(x, kind):
    if kind == "transposed":
        return x.T.contiguous().T
    if kind == "stepped":
        return torch.stack((x, torch.full_like(x, math.nan)), -1).flatten(-2)[:, ::2]
    return x[:1].expand_as(x) if kind == "expanded" else x


KINDS = st.sampled_from(["contiguous", "transposed", "stepped", "expanded"])


@given(KINDS, KINDS, KINDS, st.sampled_from([torch.float32, torch.bfloat16, torch.float16, DOUBLE]))
def test_any_strides(first, second, third, dtype):
    mean, log_std, target = (x.to(dtype) for x in inputs(7))
    mean, log_std, target = (
        _strided(mean, first),
        _strided(log_std, second),
        _strided(target, third),
    )
    mean, log_std = mean.detach().requires_grad_(), log_std.detach().requires_grad_()
    loss = F.gaussian_nll(mean, log_std, target, DIMS, bound=1.0)
    plain = [x.detach().double().contiguous().requires_grad_() for x in (mean, log_std)]
    exact = F.gaussian_nll(*plain, target.double().contiguous(), DIMS, bound=1.0)
    assert_close(loss, exact, DOUBLE if dtype == DOUBLE else torch.float32)
    pairs = zip(
        torch.autograd.grad(loss, (mean, log_std)), torch.autograd.grad(exact, plain), strict=True
    )
    for got, want in pairs:
        # float16 gradients of a mean go down to its subnormals
        assert_close(got, want, dtype, factor=20 if dtype == torch.float16 else 1)


def test_lazily_negated_views_are_read_right():
    mean, log_std, target = inputs(5)
    negated = torch.complex(target, mean).conj().imag
    assert negated.is_neg()
    assert_close(
        F.gaussian_nll(negated, log_std, target, DIMS),
        F.gaussian_nll(-mean, log_std, target, DIMS),
        DOUBLE,
    )


DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, DOUBLE])


@given(
    orders=st.lists(st.permutations([0, 1, 2]), min_size=3, max_size=3),
    dtypes=st.lists(DTYPES, min_size=4, max_size=4),
    mixture=st.booleans(),
    widths=st.lists(st.sampled_from([1, 3, 40, 100, 1030]), min_size=1, max_size=3),
)
def test_any_order_of_dimensions_and_dtypes(orders, dtypes, mixture, widths):
    generator = torch.Generator().manual_seed(0)
    rows, modes, width = 4, 2, sum(widths)

    def numbers(order, dtype, *shape):  # laid out in the given order of dimensions
        stored = torch.randn([shape[i] for i in order], generator=generator, dtype=DOUBLE)
        return (0.5 * stored).to(dtype).permute([order.index(i) for i in range(3)])

    mean = numbers(orders[0], dtypes[0], rows, modes, width)
    log_std = numbers(orders[1], dtypes[1], rows, modes, width)
    target = numbers(orders[2], dtypes[2], rows, 1, width)[:, 0]
    logits = numbers(orders[2], dtypes[3], rows, modes, len(widths)) if mixture else None
    if not mixture:
        mean, log_std = mean[:, 1], log_std[:, 1]
    args = (None, tuple(widths), mean, log_std, target, logits, 1.5, True, False)
    exact = cast(args, DOUBLE)
    dtype = DOUBLE if DOUBLE in dtypes[:2] else torch.float32
    c = torch.full((rows, len(widths)), 50.0, dtype=dtype)
    got = ops.gaussian_nll.value_and_grad(c, *args, [True, True, mixture])
    want = (ops.gaussian_nll.formulas.matrix(*exact),)
    want += ops.gaussian_nll.formulas.gradient(c.double(), *exact)
    assert_close(got[0], want[0], dtype)
    for x, grad, expected in zip((mean, log_std, logits), got[1:], want[1:], strict=True):
        if x is not None:
            assert grad.dtype == x.dtype
            # the gradient to float64 logits of float32 means is computed in float32
            rounded = dtype if x.dtype == DOUBLE else x.dtype
            assert_close(grad, expected, rounded, factor=5 if rounded.itemsize > 2 else 1.1)


@given(st.floats(-43, 88), st.floats(-5, 5), st.sampled_from([1, 100]))
def test_extremes_agree_with_float64(deviation, distance, width):
    log_std = torch.full((2, width), deviation)
    mean, target = torch.zeros(2, width), torch.full((2, width), distance)
    args = [None, (width,), mean, log_std, target, None, None, True, False]
    exact = ops.gaussian_nll.formulas.matrix(*cast(tuple(args), DOUBLE))
    assert_close(ops.gaussian_nll.forward(*args)[0], exact, torch.float32, factor=10)


@overflows
@pytest.mark.parametrize("value", [-80.0, -1e4])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_overflow_is_infinite_and_never_nan(value, dtype):
    mean = torch.ones(3, sum(DIMS), dtype=dtype, requires_grad=True)
    log_std = torch.full_like(mean, value).requires_grad_()
    loss = F.gaussian_nll(mean, log_std, torch.zeros_like(mean), DIMS)
    formula = ops.gaussian_nll.formulas.matrix(
        None, DIMS, mean, log_std, torch.zeros_like(mean), None, None, True, False
    ).mean()
    assert loss.isposinf() == formula.isposinf()
    assert not any(grad.isnan().any() for grad in torch.autograd.grad(loss, (mean, log_std)))


@overflows
def test_a_mixture_whose_modes_all_overflow_is_infinite_not_nan():
    mean = torch.ones(3, 2, sum(DIMS))
    log_std, logits = torch.full_like(mean, -80.0), torch.zeros(3, 2, len(DIMS))
    options = {"mode_logits": logits, "reduction": "none"}
    assert F.gaussian_nll(mean, log_std, 0 * mean[:, 0], DIMS, **options).isposinf().all()


@pytest.mark.parametrize("value", [80.0, -40.0, 0.0])
def test_extreme_deviations(value):
    mean, log_std, target = inputs(4, dtype=torch.float32)
    log_std = torch.full_like(log_std, value).requires_grad_()
    loss = F.gaussian_nll(mean, log_std, target, DIMS)
    exact = log_std.detach().double().requires_grad_()
    want = F.gaussian_nll(mean.double(), exact, target.double(), DIMS)
    assert_close(loss, want, torch.float32, factor=10)
    (got,), (want,) = torch.autograd.grad(loss, log_std), torch.autograd.grad(want, exact)
    assert_close(got, want, torch.float32, factor=10)


@overflows
def test_a_bound_tames_what_would_overflow():
    mean, log_std, target = inputs(4, dtype=torch.float32)
    log_std = torch.full_like(log_std, -1e30).requires_grad_()
    loss = F.gaussian_nll(mean, log_std, target, DIMS, bound=1.0)
    assert loss.isfinite()
    assert torch.autograd.grad(loss, log_std)[0].abs().max() < 1e-30


implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=lambda i: i.name)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
@pytest.mark.parametrize("bound", [1e-3, 0.1, 1.0, 10.0, 1e4, 1e8])
@implementations
def test_any_bound(implementation, bound, dtype):
    size = torch.logspace(-6, 0.5, 131, dtype=DOUBLE)
    log_std = torch.stack((size, -size, size, -size), -1).to(dtype)
    mean, target = torch.zeros_like(log_std), torch.tensor([0.0, 0.0, 1.0, 1.0])
    args = (
        None,
        (1, 1, 2),
        mean,
        log_std,
        target.expand_as(mean).clone(),
        None,
        bound,
        True,
        False,
    )
    c = torch.ones(len(size), 3, dtype=dtype)
    matrix, *gradients = implementation(ops.gaussian_nll, "value_and_grad")(c, *args, [True] * 3)
    exact = cast(args, DOUBLE)  # the first two columns of losses are the bounded log_std
    ratios = matrix / ops.gaussian_nll.formulas.matrix(*exact)
    assert_close(ratios, torch.ones_like(ratios), dtype)
    expected = ops.gaussian_nll.formulas.gradient(c.double(), *exact)
    for got, want in zip(gradients[:2], expected[:2], strict=True):
        assert_close(got, want, dtype)


@overflows
@pytest.mark.parametrize("bound", [None, 1e4])
@pytest.mark.parametrize(("value", "dtype"), [(-45.0, torch.float32), (-360.0, DOUBLE)])
@implementations
def test_a_mode_that_overflows_gets_no_gradient(implementation, value, dtype, bound):
    log_std = torch.zeros(3, 2, sum(DIMS), dtype=dtype)
    log_std[:, 1] = value  # whose z is finite and z^2 is not
    mean, target = torch.zeros_like(log_std), torch.ones(3, sum(DIMS), dtype=dtype)
    logits, c = log_std.new_zeros(3, 2, len(DIMS)), log_std.new_ones(3, len(DIMS))
    settings = (bound, True, False)
    args = (None, DIMS, mean, log_std, target, logits, *settings)
    _, *gradients = implementation(ops.gaussian_nll, "value_and_grad")(c, *args, [True] * 3)
    one = (None, DIMS, mean[:, 0], log_std[:, 0], target, None, *settings)
    expected = ops.gaussian_nll.formulas.gradient(c, *one)
    for got, want in zip(gradients[:2], expected[:2], strict=True):
        assert_close(got[:, 0], want, dtype)
        assert not got[:, 1].any()  # NaN would count
    half = c[:, None] / torch.tensor(DIMS) / 2
    assert_close(gradients[2], torch.cat((-half, half), 1), dtype)


def test_mode_logits_of_minus_infinity_switch_a_mode_off():
    mean, log_std, target = inputs(4, modes=3)
    logits = torch.randn(4, 3, len(DIMS), dtype=DOUBLE)
    logits[:, 1] = -math.inf
    leaves = [x.requires_grad_() for x in (mean, log_std, logits)]
    loss = F.gaussian_nll(mean, log_std, target, DIMS, mode_logits=logits)
    keep = [0, 2]
    two = F.gaussian_nll(mean[:, keep], log_std[:, keep], target, DIMS, mode_logits=logits[:, keep])
    assert_close(loss, two, DOUBLE)
    pairs = zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(two, leaves), strict=True)
    for grad, want in pairs:
        assert not grad[:, 1].any()
        assert_close(grad, want, DOUBLE)


WIDTHS = [1, 2, 15, 16, 95, 96, 97, 130, 1023, 1025]  # around what kernels treat as short, a block


@given(
    rows=st.integers(1, 5),
    dims=st.lists(st.sampled_from(WIDTHS), min_size=1, max_size=6),
    modes=st.integers(0, 3),
    bound=st.sampled_from([None, 0.5]),
    data=st.data(),
)
def test_any_shape_and_mask(rows, dims, modes, bound, data):
    entries = st.lists(st.booleans(), min_size=rows * len(dims), max_size=rows * len(dims))
    mask = torch.tensor(data.draw(entries)).reshape(rows, len(dims))
    generator = torch.Generator().manual_seed(0)
    inner = (modes,) if modes else ()
    mean, log_std = torch.randn(2, rows, *inner, sum(dims), generator=generator, dtype=DOUBLE)
    target = torch.randn(rows, sum(dims), generator=generator, dtype=DOUBLE)
    logits = None
    if modes:
        logits = torch.randn(rows, modes, len(dims), generator=generator, dtype=DOUBLE)
    args = (mask, tuple(dims), mean, log_std, target, logits, bound, True, True)
    c = torch.rand(rows, len(dims), generator=generator, dtype=DOUBLE)
    matrix, *gradients = ops.gaussian_nll.value_and_grad(c, *args, [True, True, modes > 0])
    assert_close(matrix, ops.gaussian_nll.formulas.matrix(*args), DOUBLE)
    expected = ops.gaussian_nll.formulas.gradient(c, *args)
    for got, want in zip(gradients, expected, strict=True):
        if want is not None:
            assert_close(got, want, DOUBLE, factor=10)
