"""Weights, masks, denominators and reductions, against the definition."""

import itertools

import pytest
import torch

import mtkd.functional as F
from mtkd.reduction import cls_and_patches, reduce_matrix, token_mean
from mtkd.testing import assert_close

DIMS = (3, 5, 2)
DOUBLE = torch.float64


def inputs(*leading):
    torch.manual_seed(1)
    shape = (*leading, sum(DIMS))
    return [torch.randn(shape, dtype=DOUBLE, requires_grad=grad) for grad in (True, True, False)]


def expected(matrix, weight, mask, denominator, reduction):
    counted = torch.ones_like(matrix) if weight is None else weight.expand_as(matrix)
    counted = counted if mask is None else counted * mask
    if reduction == "none":
        return matrix * counted
    total = (matrix * counted).sum()
    if reduction == "sum":
        return total
    return total / (counted.sum() if denominator is None else denominator)


@pytest.mark.parametrize("leading", [(7,), (2, 3), ()])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_against_the_definition(reduction, leading):
    shape = (*leading, len(DIMS))
    torch.manual_seed(2)
    weights = (None, torch.rand(len(DIMS), dtype=DOUBLE), torch.rand(shape, dtype=DOUBLE))
    masks = (None, torch.rand(shape) > 0.4)
    denominators = (None, 3.5, torch.tensor(2.5)) if reduction == "mean" else (None,)
    mean, log_std, target = inputs(*leading)
    matrix = F.gaussian_nll(mean, log_std, target, DIMS, reduction="none")
    for weight, mask, denominator in itertools.product(weights, masks, denominators):
        weight = None if weight is None else weight.clone().requires_grad_()
        options = {"weight": weight, "mask": mask, "denominator": denominator}
        got = F.gaussian_nll(mean, log_std, target, DIMS, reduction=reduction, **options)
        want = expected(matrix, weight, mask, denominator, reduction)
        assert_close(got, want, DOUBLE)
        leaves = [mean, log_std] if weight is None else [mean, log_std, weight]
        upstream = torch.randn_like(got)
        gradients = torch.autograd.grad(got, leaves, upstream)
        for a, b in zip(
            gradients, torch.autograd.grad(want, leaves, upstream, retain_graph=True), strict=True
        ):
            assert_close(a, b, DOUBLE)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_nothing_counted_gives_zero(reduction):
    mean, log_std, target = inputs(4)
    mask = torch.zeros(4, len(DIMS), dtype=torch.bool)
    loss = F.gaussian_nll(mean, log_std, target, DIMS, mask=mask, reduction=reduction)
    gradients = torch.autograd.grad(loss.sum(), [mean, log_std])
    assert not loss.any()
    assert not any(grad.any() for grad in gradients)


@pytest.mark.parametrize("denominator", [0, 0.0, torch.tensor(0.0)])
def test_zero_denominator_gives_zero(denominator):
    mean, log_std, target = inputs(4)
    loss = F.gaussian_nll(mean, log_std, target, DIMS, denominator=denominator)
    assert loss == 0
    assert not torch.autograd.grad(loss, mean)[0].any()


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_empty_batch(reduction):
    mean, log_std, target = inputs(0)
    loss = F.gaussian_nll(mean, log_std, target, DIMS, reduction=reduction)
    assert loss.shape == ((0, len(DIMS)) if reduction == "none" else ())
    assert loss.sum() == 0
    assert torch.autograd.grad(loss.sum(), mean)[0].shape == mean.shape


def test_accumulated_halves_equal_the_whole():
    mean, log_std, target = inputs(8)
    mask = torch.rand(8, len(DIMS)) > 0.4
    whole = F.gaussian_nll(mean, log_std, target, DIMS, mask=mask)
    count = mask.sum()
    halves = [
        F.gaussian_nll(mean[h], log_std[h], target[h], DIMS, mask=mask[h], denominator=count)
        for h in (slice(0, 4), slice(4, 8))
    ]
    assert_close(halves[0] + halves[1], whole, DOUBLE)


def test_learned_weights_of_many_rows_are_exact_in_float32():
    torch.manual_seed(0)
    mean, log_std, target = (torch.randn(20_000, 10) for _ in range(3))
    weight = torch.rand(3, requires_grad=True)
    loss = F.gaussian_nll(mean, log_std, target, DIMS, weight=weight)
    double = weight.detach().double().requires_grad_()
    exact = F.gaussian_nll(mean.double(), log_std.double(), target, DIMS, weight=double)
    assert_close(loss, exact, torch.float32)
    (got,), (want,) = torch.autograd.grad(loss, weight), torch.autograd.grad(exact, double)
    # the gradient is a difference of sums of 20000 terms that nearly cancel
    assert_close(got, want, torch.float32, factor=30)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_weights_that_are_all_zero(reduction):
    mean, log_std, target = inputs(4)
    weight = torch.zeros(len(DIMS), dtype=DOUBLE, requires_grad=True)
    loss = F.gaussian_nll(mean, log_std, target, DIMS, weight=weight, reduction=reduction)
    gradients = torch.autograd.grad(loss.sum(), [mean, log_std, weight])
    assert not loss.any()
    assert not any(grad.any() for grad in gradients[:2])
    assert gradients[2].isfinite().all()


def test_weights_of_masked_entries_may_be_nan():
    mean, log_std, target = inputs(4)
    mask = torch.tensor([True, False, True]).expand(4, 3)
    results = []
    for fill in (0.0, float("nan")):
        weight = torch.full((4, 3), 0.5, dtype=DOUBLE).masked_fill(~mask, fill).requires_grad_()
        loss = F.gaussian_nll(mean, log_std, target, DIMS, mask=mask, weight=weight)
        results.append((loss, *torch.autograd.grad(loss, [mean, log_std, weight])))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_second_derivatives_with_learned_weights(reduction):
    torch.manual_seed(0)
    mask = torch.tensor([[True, False, True], [True, True, True]])
    leaves = [x[:2].detach().requires_grad_() for x in inputs(2)[:2]]
    weight = torch.rand(len(DIMS), dtype=DOUBLE, requires_grad=True)
    target = inputs(2)[2]

    def loss(mean, log_std, weight):
        options = {"weight": weight, "mask": mask, "reduction": reduction, "bound": 2.0}
        return F.gaussian_nll(mean, log_std, target, DIMS, **options)

    assert torch.autograd.gradcheck(loss, [*leaves, weight], fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, [*leaves, weight], fast_mode=True)


@pytest.mark.parametrize("kind", ["tensor", "rule"])
@pytest.mark.parametrize("leading", [(7,), (2, 3), ()])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_a_given_matrix_against_the_definition(reduction, leading, kind):
    torch.manual_seed(2)
    shape = (*leading, 3)
    weights = (None, torch.rand(3, dtype=DOUBLE), torch.rand(shape, dtype=DOUBLE))
    masks = (None, torch.rand(shape) > 0.4)
    denominators = (None, 3.5, torch.tensor(2.5)) if reduction == "mean" else (None,)
    for weight, mask, denominator in itertools.product(weights, masks, denominators):
        matrix = torch.randn(shape, dtype=DOUBLE, requires_grad=True)
        rule = (lambda m, k, weight=weight: weight) if kind == "rule" and weight is not None else 0
        options = {"mask": mask, "denominator": denominator, "reduction": reduction}
        got = reduce_matrix(matrix, weight=rule or weight, **options)
        want = expected(matrix, weight, mask, denominator, reduction)
        assert_close(got, want, DOUBLE)
        upstream = torch.randn_like(got)
        gradients = [torch.autograd.grad(each, matrix, upstream)[0] for each in (got, want)]
        assert_close(*gradients, DOUBLE)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_masked_entries_of_a_given_matrix_may_be_nan(reduction):
    torch.manual_seed(2)
    mask = torch.rand(4, 3) > 0.4
    results = []
    for fill in (0.0, float("nan")):
        leaves = [torch.linspace(1, 2, 12).reshape(4, 3).masked_fill(~mask, fill) for _ in range(2)]
        matrix, weight = (leaf.requires_grad_() for leaf in leaves)
        loss = reduce_matrix(matrix, weight=weight, mask=mask, reduction=reduction)
        results.append((loss, *torch.autograd.grad(loss.sum(), (matrix, weight))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert results[0][1][mask].all()


def tokens(*leading, length=5, dtype=DOUBLE):
    torch.manual_seed(3)
    loss = torch.randn(*leading, length, 3, dtype=dtype, requires_grad=True)
    mask = torch.rand(*leading, length, 3) > 0.5
    mask[0, :, 0] = False  # an image of which a teacher has nothing,
    mask[0, 0, 1], mask[0, 1:, 1] = True, False  # only the cls token,
    mask[0, 0, 2], mask[0, 1:, 2] = False, True  # only patches
    return loss, mask


def mean_by_loop(loss, mask):
    result = torch.zeros(len(loss), 3, dtype=DOUBLE)
    for b, t in itertools.product(range(len(loss)), range(3)):
        valid = [x for x, counts in zip(loss[b, :, t], mask[b, :, t], strict=True) if counts]
        if valid:
            result[b, t] = sum(valid) / len(valid)
    return result


def halves_by_loop(loss, mask):
    result = torch.zeros(len(loss), 3, dtype=DOUBLE)
    for b, t in itertools.product(range(len(loss)), range(3)):
        patches = [loss[b, i, t] for i in range(1, loss.shape[1]) if mask[b, i, t]]
        parts = [loss[b, 0, t]] if mask[b, 0, t] else []
        parts += [sum(patches) / len(patches)] if patches else []
        if parts:
            result[b, t] = sum(parts) / len(parts)
    return result


RECIPES = [(token_mean, mean_by_loop), (cls_and_patches, halves_by_loop)]


@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("recipe", "by_loop"), RECIPES)
def test_tokens_against_a_loop_over_images(recipe, by_loop, masked, length):
    loss, mask = tokens(4, length=length)
    got = recipe(loss, mask) if masked else recipe(loss)
    want = by_loop(loss, mask if masked else torch.ones_like(mask))
    assert_close(got, want, DOUBLE)
    upstream = torch.rand_like(got)
    gradients = [torch.autograd.grad(each, loss, upstream)[0] for each in (got, want)]
    assert_close(*gradients, DOUBLE)


@pytest.mark.parametrize(("recipe", "_"), RECIPES)
def test_masked_tokens_may_be_nan(recipe, _):
    loss, mask = tokens(4)
    results = []
    for fill in (0.0, float("nan")):
        leaf = loss.detach().masked_fill(~mask, fill).requires_grad_()
        value = recipe(leaf, mask)
        results.append((value, torch.autograd.grad(value.sum(), leaf)[0]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not results[0][0][0, 0]


@pytest.mark.parametrize(("recipe", "_"), RECIPES)
def test_leading_dimensions_and_dtypes_of_tokens(recipe, _):
    loss, mask = tokens(2, 3)
    got = recipe(loss, mask)
    assert_close(got.flatten(0, 1), recipe(loss.flatten(0, 1), mask.flatten(0, 1)), DOUBLE)
    assert recipe(loss[:0], mask[:0]).shape == (0, 3, 3)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        low = loss.detach().to(dtype)
        assert recipe(low, mask).dtype == torch.float32
        assert_close(recipe(low, mask), recipe(low.double(), mask), torch.float32)


def test_no_tokens_are_a_mean_of_zero():
    assert torch.equal(token_mean(torch.zeros(2, 0, 3)), torch.zeros(2, 3))


@pytest.mark.parametrize("dynamic", [False, True])
def test_tokens_compile_without_a_graph_break(dynamic):
    def loss(matrix, mask):
        images = cls_and_patches(matrix, mask)
        return reduce_matrix(images, weight=lambda m, k: m.exp(), mask=mask.any(-2))

    torch._dynamo.reset()
    matrix, mask = tokens(4, dtype=torch.float32)
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic)
    results = []
    for function in (loss, compiled):
        value = function(matrix, mask)
        results.append((value, torch.autograd.grad(value, matrix)[0]))
    for want, got in zip(*results, strict=True):
        assert_close(got, want, torch.float32)


@pytest.mark.parametrize("recipe", [reduce_matrix, token_mean, cls_and_patches])
def test_meta_tensors_of_tokens(recipe):
    loss, mask = (x.to("meta") for x in tokens(4))
    mask = mask if recipe is not reduce_matrix else None
    value = recipe(loss, mask=mask)
    assert torch.autograd.grad(value.sum(), loss)[0].shape == loss.shape


Z = torch.zeros


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: reduce_matrix([1.0]), TypeError, "loss: expected a tensor, got list"),
        (lambda: reduce_matrix(Z(())), ValueError, r"loss: expected shape \(\*, T\)"),
        (lambda: reduce_matrix(Z(2, 3), weight=Z(2)), ValueError, r"weight: .*\(3,\) or \(2, 3\)"),
        (lambda: reduce_matrix(Z(2, 3), weight=2.0), TypeError, "weight: .* callable, got float"),
        (lambda: reduce_matrix(Z(2, 3), reduction="max"), ValueError, "reduction: .*got 'max'"),
        (lambda: token_mean(Z(3)), ValueError, r"loss: expected shape \(\*, L, T\).*got \(3,\)"),
        (lambda: token_mean(Z(2, 3, dtype=torch.int32)), TypeError, "loss: .*torch.int32"),
        (lambda: token_mean(Z(2, 3), Z(2, 3)), TypeError, "mask: expected a bool tensor"),
        (lambda: token_mean(Z(2, 3), Z(3).bool()), ValueError, r"mask: .*\(2, 3\), got \(3,\)"),
        (lambda: cls_and_patches(Z(2, 0, 3)), ValueError, "loss: expected at least one token"),
        (lambda: cls_and_patches(Z(2, 4, 3), Z(2, 3).bool()), ValueError, r"mask: .*\(2, 4, 3\)"),
    ],
)
def test_one_clear_error(call, error, message):
    with pytest.raises(error, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)


def test_a_matrix_that_has_its_shape_is_no_view():
    loss = torch.rand(3, 2, requires_grad=True) * 2  # FSDP warns about modules that return views
    assert not reduce_matrix(loss, reduction="none")._is_view()
    mask = torch.ones(3, 2, dtype=torch.bool)
    assert not reduce_matrix(loss, mask=mask, reduction="none")._is_view()
