"""torch.compile, export, autocast, checkpointing and function transforms."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import mtkd.functional as F
from mtkd.reduction import cls_and_patches, reduce_matrix
from mtkd.testing import assert_close, relative_error
from mtkd.weighting import teacher_dropping

DIMS = (3, 100, 1)
ROWS, FEATURES, WIDTH = 6, 5, sum(DIMS)


def row_inputs(dtype=torch.float32):
    torch.manual_seed(0)
    mean, log_std = torch.randn(2, ROWS, WIDTH, dtype=dtype).unbind()
    return mean, 0.3 * log_std, torch.randn(ROWS, WIDTH, dtype=dtype)


def linear_inputs(dtype=torch.float32):
    torch.manual_seed(0)
    weight = 0.3 * torch.randn(2, WIDTH, FEATURES, dtype=dtype)
    return torch.randn(ROWS, FEATURES, dtype=dtype), weight, torch.randn(ROWS, WIDTH, dtype=dtype)


LOSSES = [
    pytest.param(F.gaussian_nll, row_inputs, id="gaussian_nll"),
    pytest.param(F.linear_gaussian_nll, linear_inputs, id="linear_gaussian_nll"),
]


def run(function, inputs, **options):
    first, second, target = inputs
    first, second = first.clone().requires_grad_(), second.clone().requires_grad_()
    value = function(first, second, target, DIMS, **options)
    weights = torch.linspace(0.5, 2, value.numel()).reshape(value.shape).to(value.dtype)
    return value.detach(), torch.autograd.grad((weights * value).sum(), (first, second))


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize(("function", "make"), LOSSES)
def test_compile_fullgraph(function, make, reduction):
    torch._dynamo.reset()
    mask = torch.rand(ROWS, len(DIMS)) > 0.3
    options = {"bound": 1.0, "mask": mask, "reduction": reduction}
    value, gradients = run(function, make(), **options)
    compiled = torch.compile(function, fullgraph=True)
    compiled_value, compiled_gradients = run(compiled, make(), **options)
    assert_close(compiled_value, value, torch.float32)
    for got, want in zip(compiled_gradients, gradients, strict=True):
        assert_close(got, want, torch.float32)


def test_compile_a_mixture_with_learned_weights_for_any_batch():
    def loss(mean, log_std, target, logits, weight):
        options = {"mode_logits": logits, "weight": weight, "bound": 1.0}
        return F.gaussian_nll(mean, log_std, target, DIMS, **options)

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for rows in (4, 7):
        torch.manual_seed(rows)
        mean, log_std = torch.randn(2, rows, 2, WIDTH)
        leaves = [mean, log_std, torch.randn(rows, 2, len(DIMS)), torch.rand(len(DIMS))]
        leaves = [x.clone().requires_grad_() for x in leaves]
        target = torch.randn(rows, WIDTH)
        results = []
        for function in (loss, compiled):
            value = function(*leaves[:2], target, *leaves[2:])
            results.append((value, *torch.autograd.grad(2 * value, leaves)))
        for want, got in zip(*results, strict=True):
            assert_close(got, want, torch.float32, factor=3)


@pytest.mark.parametrize(("function", "make"), LOSSES)
def test_compile_a_teacher_a_tensor(function, make):
    torch._dynamo.reset()
    first, second, target = make()
    shared = function is F.linear_gaussian_nll
    firsts = [first] * len(DIMS) if shared else list(first.split(DIMS, -1))
    seconds, targets = list(second.split(DIMS, 1)), list(target.split(DIMS, -1))
    compiled = torch.compile(function, fullgraph=True)(firsts, seconds, targets)
    assert_close(compiled, function(first, second, target, DIMS), torch.float32)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize(("function", "make"), LOSSES)
def test_meta_tensors_whose_data_nothing_may_look_at(function, make, reduction):
    first, second, target = (x.to("meta") for x in make())
    leaves = first.requires_grad_(), second.requires_grad_()
    options = {"mask": torch.ones(ROWS, len(DIMS), dtype=torch.bool, device="meta")}
    options["weight"] = torch.ones(len(DIMS), device="meta", requires_grad=True)
    if reduction == "mean":
        options["denominator"] = torch.ones((), device="meta")
    loss = function(*leaves, target, DIMS, reduction=reduction, **options)
    assert loss.shape == ((ROWS, len(DIMS)) if reduction == "none" else ())
    gradients = torch.autograd.grad(loss.sum(), leaves)
    assert [grad.shape for grad in gradients] == [leaf.shape for leaf in leaves]


@pytest.mark.parametrize(("function", "make"), LOSSES)
def test_inference_mode(function, make):
    inputs = make()
    with torch.inference_mode():
        assert torch.equal(function(*inputs, DIMS), function(*inputs, DIMS))


@pytest.mark.parametrize(("function", "make"), LOSSES)
def test_export(function, make):
    class Loss(torch.nn.Module):
        def forward(self, first, second, target):
            return function(first, second, target, DIMS)

    inputs = make()
    program = torch.export.export(Loss(), inputs)
    assert torch.equal(program.module()(*inputs), function(*inputs, DIMS))
    assert any("mtkd" in str(node.target) for node in program.graph.nodes)


def test_autocast_reads_rows_as_they_are():
    mean, log_std, target = row_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        inside = F.gaussian_nll(mean, log_std, target, DIMS)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, F.gaussian_nll(mean, log_std, target, DIMS))


def test_autocast_casts_the_operands_of_linear_and_nothing_else():
    x, weight, target = linear_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        inside, gradients = run(F.linear_gaussian_nll, (x, weight, target))
    rounded = run(F.linear_gaussian_nll, (x.bfloat16().float(), weight.bfloat16().float(), target))
    assert inside.dtype == torch.float32
    assert_close(inside, rounded[0], torch.float32)
    for got, want in zip(gradients, rounded[1], strict=True):
        assert got.dtype == torch.float32
        assert_close(got, want, torch.bfloat16)


def test_autocast_leaves_float64_alone():
    inputs = linear_inputs(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        inside = F.linear_gaussian_nll(*inputs, DIMS)
    assert torch.equal(inside, F.linear_gaussian_nll(*inputs, DIMS))


@pytest.mark.parametrize(("function", "make"), LOSSES)
def test_checkpointing(function, make):
    def checkpointed(*args, **options):
        return checkpoint(function, *args, use_reentrant=False, **options)

    value, gradients = run(function, make())
    again, recomputed = run(checkpointed, make())
    assert torch.equal(value, again)
    assert all(torch.equal(a, b) for a, b in zip(gradients, recomputed, strict=True))


@pytest.mark.parametrize(("function", "make"), LOSSES)
def test_function_transforms_see_the_formula(function, make):
    first, second, target = make(torch.float64)
    _, (to_first, _) = run(function, (first, second, target))

    def loss(x):
        return 0.5 * function(x, second, target, DIMS)

    assert_close(torch.func.grad(loss)(first), to_first, torch.float64)
    tangent = torch.randn_like(first)
    _, derivative = torch.func.jvp(loss, (first,), (tangent,))
    assert_close(derivative, (to_first * tangent).sum(), torch.float64)


@pytest.mark.parametrize(("function", "make"), LOSSES)
def test_gradient_of_each_sample(function, make):
    first, second, target = make(torch.float64)
    own = 0 if function is F.gaussian_nll else None  # a layer is shared by the samples

    def loss(first, second, target):
        return function(first, second, target, DIMS)

    each = torch.vmap(torch.func.grad(loss, (0, 1)), (0, own, 0))(first, second, target)
    for n in range(ROWS):
        one = second if own is None else second[n : n + 1]
        _, expected = run(function, (first[n : n + 1], one, target[n : n + 1]))
        for got, want in zip(each, expected, strict=True):
            assert_close(0.5 * got[n], want.reshape(got[n].shape), torch.float64)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_vmap_over_torchs_fallback():
    mean, log_std, target = row_inputs()
    stacked = torch.stack((mean, mean + 1))

    def loss(mean):
        return F.gaussian_nll(mean, log_std, target, DIMS)

    expected = torch.stack([loss(stacked[0]), loss(stacked[1])])
    assert relative_error(torch.vmap(loss)(stacked), expected) < 1e-6


def unic(student, target):
    tokens = F.alignment(student, target, DIMS, reduction="none")
    return reduce_matrix(cls_and_patches(tokens), weight=teacher_dropping)


SIZED = {
    "gaussian_nll": lambda x, t, w: F.gaussian_nll(x, 0.1 * x, t, DIMS),
    "linear_gaussian_nll": lambda x, t, w: F.linear_gaussian_nll(x[:, :FEATURES], w, t, DIMS),
    "alignment": lambda x, t, w: F.alignment(x, t, DIMS),
    "angle": lambda x, t, w: F.angle(x, t, DIMS, mask=t[:, : len(DIMS)] > 0),
    "linear_alignment": lambda x, t, w: F.linear_alignment(x[:, :FEATURES], w[0], t, DIMS),
    "shifted_mse": lambda x, t, w: F.shifted_mse(
        x[:, None, None], t[:, None, None], torch.zeros(x.shape[0], 2, dtype=torch.int64)
    ),
    "kl_div": lambda x, t, w: F.kl_div(x, t, DIMS),
    "majority_vote": lambda x, t, w: F.majority_vote(x, t.unsqueeze(1)),
    "mixture_kl": lambda x, t, w: F.mixture_kl(x, t.unsqueeze(1)),
    "unic": lambda x, t, w: unic(
        x.unsqueeze(1).expand(-1, 4, -1), t.unsqueeze(1).expand(-1, 4, -1)
    ),
}


@pytest.mark.parametrize("name", SIZED)
def test_a_new_number_of_rows_compiles_once_more_at_most(name):
    torch._dynamo.reset()
    torch.manual_seed(0)
    counter, weight = CompileCounter(), torch.randn(2, WIDTH, FEATURES)
    compiled = torch.compile(SIZED[name], backend=counter, fullgraph=True)
    for rows in (4, 6, 9, 11, 13):
        x = torch.randn(rows, WIDTH, requires_grad=True)
        compiled(x, torch.randn(rows, WIDTH), weight).backward()
    assert counter.frame_count <= 2
