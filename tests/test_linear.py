"""The linear driver: modes, tiles and inputs give one result."""

import re

import pytest
import torch
from cases import INTERPRETED

import mtkd.functional as F
from mtkd import linear, ops
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
@pytest.mark.parametrize(("dims", "widths"), [((3, 70, 5), (4, 9, 6)), ((7, 7, 7), (5, 5, 5))])
def test_inputs_of_their_own(modes, reduction, dims, widths):
    torch.manual_seed(0)
    inner = (modes,) if modes else ()
    shapes = [(2, *inner, dim, width) for dim, width in zip(dims, widths, strict=True)]
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


def test_equal_teachers_with_inputs_of_their_own_take_one_call(monkeypatch):
    torch.manual_seed(0)
    xs = [torch.randn(6, 4, requires_grad=True) for _ in range(50)]
    weights = [torch.randn(2, 3, 4, requires_grad=True) for _ in range(50)]
    targets = [torch.randn(6, 3) for _ in range(50)]
    calls, run = [], ops.linear_gaussian_nll.eager["sum"]
    monkeypatch.setitem(
        ops.linear_gaussian_nll.eager, "sum", lambda *args: calls.append(args) or run(*args)
    )
    mask = torch.rand(6, 50) > 0.3
    for teacher, row in (~mask).T.nonzero():
        xs[teacher].data[row] = float("nan")
    loss = F.linear_gaussian_nll(xs, weights, targets, mask=mask)
    loss.backward()
    assert len(calls) == 1
    assert all(x.grad.isfinite().all() and x.grad.any() for x in (*xs, *weights))


def test_the_stash_of_a_sequence_fits_the_workspace_as_a_whole():
    xs = [torch.randn(8, width) for width in (4, 5, 6)]
    weights = [torch.randn(2, 32, width, requires_grad=True) for width in (4, 5, 6)]
    targets = [torch.randn(8, 32)] * 3
    stashed = []
    room = 3 * (3 * 8 * 64 * 4)  # of all the teachers, with what backward has beside
    for size in (room, room - 1):
        with linear.workspace(size):
            loss = F.linear_gaussian_nll(xs, weights, targets, reduction="none")
        nodes, saved = [loss.grad_fn], 0
        while nodes:
            node = nodes.pop()
            nodes += [parent for parent, _ in node.next_functions if parent is not None]
            if "Forward" in type(node).__name__:
                saved += node.saved_tensors[-1].numel()
        stashed.append(saved)
    assert stashed == [3 * 8 * 64, 0]


def test_what_a_masked_entry_is_weighted_by_reaches_no_gradient_from_a_stash():
    torch.manual_seed(0)
    x, layer = torch.randn(5, 4, requires_grad=True), torch.randn(2, 6, 4, requires_grad=True)
    mask = torch.rand(5, 2) > 0.5
    weight = torch.ones(5, 2).masked_fill(~mask, float("nan"))
    loss = F.linear_gaussian_nll(
        x, layer, torch.randn(5, 6), (2, 4), mask=mask, weight=weight, reduction="none"
    )
    loss.backward(torch.ones_like(loss).masked_fill(~mask, float("inf")))
    assert x.grad.isfinite().all()
    assert layer.grad.isfinite().all()


def test_a_workspace_is_an_integer_number_of_bytes():
    expected = re.escape("size: expected an integer number of bytes, got 64000000.0")
    with pytest.raises(TypeError, match=expected):
        linear.workspace(6.4e7).__enter__()


@pytest.mark.skipif(not INTERPRETED, reason="Triton serves GPUs, or under its interpreter a CPU")
@pytest.mark.parametrize(
    ("changes", "fused"),
    [({}, True), ({"dtype": torch.float32}, False), ({"dims": (96, 17)}, False)],
)
def test_the_loss_is_in_the_epilogue_where_it_fits(monkeypatch, changes, fused):
    settings = {"dtype": torch.bfloat16, "dims": (96, 64)} | changes
    runs, tile = [], linear.gaussian._fused_tile
    monkeypatch.setattr(linear.gaussian, "_fused_tile", lambda *a: runs.append(a) or tile(*a))
    x, layer = torch.randn(9, 32), torch.randn(2, sum(settings["dims"]), 32, requires_grad=True)
    x, layer = (tensor.to(settings["dtype"]) for tensor in (x, layer))
    target = torch.randn(9, sum(settings["dims"]))
    F.linear_gaussian_nll(x, layer, target, settings["dims"]).backward()
    assert len(runs) == fused
