"""What only a GPU shows: graphs, two runs with the same bits, compiled training, streams."""

import pytest
import torch

import mtkd.functional as F
from mtkd.teachers import TeacherStore
from mtkd.testing import assert_close

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
WIDTHS = [(256, 256), (256, 144, 48), (33, 7)]


def problem(dims, dtype=torch.bfloat16):
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape, scale=1.0):
        numbers = torch.randn(*shape, generator=generator, device="cuda")
        return (scale * numbers).to(dtype).requires_grad_()

    x, layer = normal(300, 192), normal(2, sum(dims), 192, scale=0.05)
    return x, layer, normal(300, sum(dims)).detach()


def gradients(x, layer, target, dims):
    loss = F.linear_gaussian_nll(x, layer, target, dims, bound=2.0)
    rows = F.gaussian_nll(target + x[:, :1], target * 0.1 * x[:, 1:2], target, dims)
    aligned = F.linear_alignment(x, layer[0], target, dims) + F.alignment(
        target * x[:, :1], target, dims
    )
    return torch.autograd.grad(loss + rows + aligned, (x, layer))


@pytest.mark.parametrize("dims", WIDTHS, ids=str)
def test_two_runs_have_the_same_bits(dims):
    leaves = problem(dims)
    for one, two in zip(gradients(*leaves, dims), gradients(*leaves, dims), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("dims", WIDTHS, ids=str)
def test_a_captured_step_runs_again_on_new_numbers(dims):
    x, layer, target = problem(dims)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # tables of ragged teachers, and Triton's compilation
        gradients(x, layer, target, dims)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(x, layer, target, dims)
    with torch.no_grad():
        target.mul_(0.5)
    graph.replay()
    for got, want in zip(captured, gradients(x, layer, target, dims), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dims", WIDTHS, ids=str)
def test_compiled_training_agrees(dims):
    x, layer, target = problem(dims)
    compiled = torch.compile(gradients)
    for got, want in zip(
        compiled(x, layer, target, dims), gradients(x, layer, target, dims), strict=True
    ):
        assert_close(got, want, torch.bfloat16, 4)


def test_a_strided_layer_agrees_with_a_contiguous_one():
    x, layer, target = problem((256, 144))
    wide = torch.zeros(2, 400, 200, dtype=layer.dtype, device="cuda")
    strided = wide[..., :192].copy_(layer.detach()).requires_grad_()
    ours = (gradients(x, each, target, (256, 144)) for each in (layer, strided))
    for one, two in zip(*ours, strict=True):
        assert_close(one, two, torch.bfloat16)


def test_many_teachers_in_one_launch():
    dims = (16, 48) * 512
    x, layer, target = problem(dims)
    double = [tensor.detach().double().requires_grad_() for tensor in (x, layer)]
    got = gradients(x, layer, target, dims)
    want = gradients(*double, target.double(), dims)
    for ours, exact in zip(got, want, strict=True):
        assert_close(ours, exact, torch.bfloat16, 4)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_store_reads_to_the_gpu_as_to_the_cpu(tmp_path, dtype):
    store = TeacherStore.create(tmp_path / "s", {"a": 33, "b": 7}, 500, dtype=dtype)
    for name, width in store.dims.items():
        store.append(name, torch.randn(400, width))
    resident = store.to("cuda")
    for batch in torch.randint(500, (5, 64)):
        targets, mask = store[batch]
        copied = store.read(batch.cuda(), device="cuda")
        for got in (copied, resident[batch], resident[batch.cuda()]):
            assert torch.equal(got[0].cpu(), targets)
            assert torch.equal(got[1].cpu(), mask)
