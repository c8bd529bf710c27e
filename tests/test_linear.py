"""The linear driver: modes, tiles and inputs give one result."""

import pytest
import torch
from cases import INTERPRETED

import mtkd.functional as F
from mtkd import linear
from mtkd.testing import assert_close

DIMS = (30, 7, 64, 1, 120)
ROWS, FEATURES = 24 if INTERPRETED else 2300, 13


def inputs(modes=0, dtype=torch.float32):
    torch.manual_seed(0)
    inner = (modes,) if modes else ()
    arguments = {
        "input": torch.randn(ROWS, FEATURES),
        "linear_weight": 0.3 * torch.randn(2, *inner, sum(DIMS), FEATURES),
        "linear_bias": 0.3 * torch.randn(2, *inner, sum(DIMS)),
    }
    if modes:
        arguments["mode_weight"] = torch.randn(modes, len(DIMS), FEATURES)
        arguments["mode_bias"] = torch.randn(modes, len(DIMS))
    arguments = {name: x.to(dtype).requires_grad_() for name, x in arguments.items()}
    return arguments, torch.randn(ROWS, sum(DIMS)), torch.rand(ROWS, len(DIMS)) > 0.3


def run(arguments, target, mask, reduction, workspace):
    with linear.workspace(workspace):
        loss = F.linear_gaussian_nll(
            target=target, dims=DIMS, mask=mask, bound=1.0, reduction=reduction, **arguments
        )
    upstream = torch.linspace(0.5, 2, loss.numel()).reshape(loss.shape)
    return loss, torch.autograd.grad(loss, list(arguments.values()), upstream)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("modes", [0, 3])
def test_results_do_not_depend_on_tiles_or_mode(modes, reduction):
    arguments, target, mask = inputs(modes)
    loss, gradients = run(arguments, target, mask, reduction, 1 << 30)  # stash or stream
    for workspace in (1, 50_000, 1_000_000):  # recompute or stream, in ever larger tiles
        again, others = run(arguments, target, mask, reduction, workspace)
        assert_close(again, loss, torch.float32)
        for got, want in zip(others, gradients, strict=True):
            assert_close(got, want, torch.float32)


@pytest.mark.parametrize("modes", [0, 3])
def test_stash_equals_recompute_equals_stream(modes):
    arguments, target, mask = inputs(modes, torch.float64)
    weights = torch.rand(ROWS, len(DIMS), dtype=torch.float64)
    results = []
    for workspace, reduction in ((1 << 30, "none"), (10_000, "none"), (1 << 30, "sum")):
        with linear.workspace(workspace):
            weight = weights if reduction == "sum" else None
            loss = F.linear_gaussian_nll(
                target=target, dims=DIMS, mask=mask, weight=weight, reduction=reduction, **arguments
            )
        total = (weights * loss).sum() if reduction == "none" else loss
        results.append((total, torch.autograd.grad(total, list(arguments.values()))))
    for total, gradients in results[1:]:
        assert_close(total, results[0][0], torch.float64)
        for got, want in zip(gradients, results[0][1], strict=True):
            assert_close(got, want, torch.float64)


def test_stashed_gradients_survive_a_retained_graph():
    arguments, target, mask = inputs()
    leaves = list(arguments.values())
    loss = F.linear_gaussian_nll(target=target, dims=DIMS, mask=mask, reduction="none", **arguments)
    first = torch.autograd.grad(loss.sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(2 * loss.sum(), leaves)
    for one, two in zip(first, second, strict=True):
        assert_close(two, 2 * one, torch.float32)


def test_equals_the_layer_followed_by_the_loss():
    arguments, target, mask = inputs(dtype=torch.float64)
    x, weight, bias = arguments.values()
    mean, log_std = (torch.einsum("nh,kdh->knd", x, weight) + bias[:, None]).unbind()
    options = {"mask": mask, "bound": 1.0, "full": True}
    fused = F.linear_gaussian_nll(x, weight, target, DIMS, linear_bias=bias, **options)
    plain = F.gaussian_nll(mean, log_std, target, DIMS, **options)
    assert_close(fused, plain, torch.float64)
    leaves = list(arguments.values())
    pairs = zip(torch.autograd.grad(fused, leaves), torch.autograd.grad(plain, leaves), strict=True)
    for got, want in pairs:
        assert_close(got, want, torch.float64)


@pytest.mark.parametrize("modes", [0, 2])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_inputs_of_their_own(modes, reduction):
    torch.manual_seed(0)
    inner = (modes,) if modes else ()
    widths = (4, 9, 6)
    shapes = [(2, *inner, dim, width) for dim, width in zip((3, 70, 5), widths, strict=True)]
    xs = [torch.randn(8, width, dtype=torch.float64, requires_grad=True) for width in widths]
    weights = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    targets = [torch.randn(8, shape[-2], dtype=torch.float64) for shape in shapes]
    options = {}
    if modes:
        modes_of = [torch.randn(modes, 1, width, dtype=torch.float64) for width in widths]
        options["mode_weight"] = [weight.requires_grad_() for weight in modes_of]
    together = F.linear_gaussian_nll(xs, weights, targets, reduction=reduction, **options)
    singles = []
    for t in range(3):
        own = {name: tensors[t] for name, tensors in options.items()}
        own["reduction"] = "none"
        singles.append(F.linear_gaussian_nll(xs[t], weights[t], targets[t], **own))
    matrix = torch.cat(singles, -1)
    assert_close(together, matrix if reduction == "none" else matrix.mean(), torch.float64)
    whole = matrix.sum() if reduction == "none" else matrix.mean()
    leaves = [*xs, *weights, *options.get("mode_weight", [])]
    gradients = [torch.autograd.grad(loss, leaves) for loss in (together.sum(), whole)]
    for got, want in zip(*gradients, strict=True):
        assert_close(got, want, torch.float64)


def test_workspace_is_restored_and_checked():
    before = linear.workspace_size()
    with linear.workspace(1234):
        assert linear.workspace_size() == 1234
    assert linear.workspace_size() == before
    with (
        pytest.raises(ValueError, match="size: expected a positive number of bytes, got 0"),
        linear.workspace(0),
    ):
        pass


def test_leading_dimensions():
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 5), torch.randn(2, 8, 5)
    target = torch.randn(2, 3, 8)
    options = {"dims": (3, 5), "reduction": "none"}
    loss = F.linear_gaussian_nll(x, weight, target, **options)
    flat = F.linear_gaussian_nll(x.flatten(0, 1), weight, target.flatten(0, 1), **options)
    assert torch.equal(loss, flat.reshape(2, 3, 2))
