"""TeacherNorm: exact running statistics of ragged batches, masks and spoiled entries."""

import copy
import io
import math
import re

import numpy as np
import pytest
import torch

from mtkd.nn import TeacherNorm, norm

DIMS = (3, 1, 4)
NAMED = {"cnn": 3, "depth": 1, "pca": 4}
BATCHES = (1, 7, 2, 40, 3)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def teachers():
    """Columns of quite different means and deviations."""
    scale = torch.logspace(-3, 3, sum(DIMS), dtype=torch.float64)
    return 1e3 * scale.flip(0) + scale * torch.randn(sum(BATCHES), sum(DIMS), dtype=torch.float64)


def columns(of):
    """Spread (rows, T) over columns."""
    return of.repeat_interleave(torch.tensor(DIMS), 1)


def statistics(target, counted):
    """Mean and deviation of the counted entries of every column, by numpy in float64."""
    data, counted = target.double().numpy(), columns(counted).numpy()
    picked = [data[counted[:, column], column] for column in range(data.shape[1])]
    return np.array([x.mean() for x in picked]), np.array([x.std() for x in picked])


def feed(module, target, mask=None):
    masks = [None] * len(BATCHES) if mask is None else mask.split(BATCHES)
    for part, of_part in zip(target.split(BATCHES), masks, strict=True):
        module(part, of_part)
    return module


def assert_statistics(module, target, counted):
    mean, deviation = statistics(target, counted)
    np.testing.assert_array_equal(module.count, counted.sum(0))
    np.testing.assert_allclose(module.mean, mean, rtol=1e-12)
    variance = module.deviations / columns(counted.sum(0)[None])[0]
    np.testing.assert_allclose(variance.sqrt(), deviation, rtol=1e-6)
    np.testing.assert_allclose(module.shift, mean, rtol=1e-6)
    np.testing.assert_allclose(module.scale, (deviation**2 + module.eps) ** -0.5, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_ragged_batches_give_the_statistics_of_all_rows(dtype):
    target = (teachers() / 1e3).to(dtype)
    target = target.clamp(-1e4, 1e4)
    module = feed(TeacherNorm(DIMS, eps=1e-12), target)
    assert_statistics(module, target, torch.ones(len(target), 3, dtype=torch.bool))


def test_masked_and_spoiled_entries_stay_out():
    target = teachers()
    mask = torch.rand(len(target), 3) < 0.7
    counted = mask.clone()
    for row, (column, teacher) in enumerate([(0, 0), (3, 1), (7, 2)]):
        target[row, column] = (math.nan, math.inf, -math.inf)[row]
        mask[row, teacher], counted[row, teacher] = True, False  # spoiled although it counts
    spoiled = torch.where(columns(mask), target, math.nan)
    assert_statistics(feed(TeacherNorm(DIMS), spoiled, mask), target, counted)


def test_blocks_of_a_large_batch_merge_exactly(monkeypatch):
    target, mask = teachers(), torch.rand(sum(BATCHES), 3) < 0.7
    whole = TeacherNorm(DIMS)
    whole(target, mask)
    monkeypatch.setitem(norm._BLOCK, "cpu", 16)
    blocks = TeacherNorm(DIMS)
    blocks(target, mask)
    for name, buffer in whole.named_buffers():
        torch.testing.assert_close(blocks.get_buffer(name), buffer)
    assert_statistics(blocks, target, mask)


def test_large_means_lose_no_digits():
    target = 1e6 + torch.randn(1000, 1, dtype=torch.float64)
    module = TeacherNorm((1,))
    for part in target.split(10):
        module(part)
    variance = module.deviations.item() / 1000
    assert variance == pytest.approx(target.numpy().var(), rel=1e6 * 2**-52)  # a mean's last bit


def test_output_is_standardised():
    target = teachers()
    out = TeacherNorm(DIMS, eps=1e-30)(target)
    torch.testing.assert_close(
        out.std(0, correction=0), torch.ones(8, dtype=torch.float64), rtol=1e-5, atol=0
    )
    module = TeacherNorm(DIMS)
    out = module(target.float())
    torch.testing.assert_close(out, (target.float() - module.shift) * module.scale)


def test_training_learns_first_and_evaluation_learns_nothing():
    first, second = teachers().split((20, sum(BATCHES) - 20))
    module = TeacherNorm(DIMS)
    module(first)
    before = copy.deepcopy(module).eval()
    learned = module(second)
    module.eval()
    assert torch.equal(module(second), learned)
    state = {name: buffer.clone() for name, buffer in module.named_buffers()}
    module(first)
    assert all(torch.equal(module.get_buffer(name), value) for name, value in state.items())
    assert not torch.equal(before(second), learned)


@pytest.mark.parametrize(
    ("dtype", "out"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32)]
    + [(dtype, dtype) for dtype in (torch.float32, torch.float64)],
)
def test_output_dtype(dtype, out):
    assert TeacherNorm(DIMS)(torch.randn(5, 8, dtype=dtype)).dtype == out


def test_sequences_and_mappings_return_the_same_structure():
    target, mask = teachers().float(), torch.rand(sum(BATCHES), 3) < 0.7
    packed, sequence, mapping = TeacherNorm(NAMED), TeacherNorm(DIMS), TeacherNorm(NAMED)
    expected = packed(target, mask).split(list(DIMS), -1)
    parts = target.split(list(DIMS), -1)
    by_name = dict(zip(reversed(NAMED), reversed(parts), strict=True))
    as_list, as_dict = sequence(parts, mask), mapping(by_name, mask)
    assert isinstance(as_list, list)
    assert list(as_dict) == list(NAMED)
    for out, of_list, of_dict in zip(expected, as_list, as_dict.values(), strict=True):
        torch.testing.assert_close(of_list, out)
        torch.testing.assert_close(of_dict, out)
    for other in (sequence, mapping):
        for name, buffer in packed.named_buffers():
            torch.testing.assert_close(other.get_buffer(name), buffer)


def test_leading_dimensions_are_rows():
    target, mask = torch.randn(4, 5, 8), torch.rand(4, 5, 3) < 0.5
    flat, deep = TeacherNorm(DIMS), TeacherNorm(DIMS)
    expected = flat(target.flatten(0, 1), mask.flatten(0, 1))
    assert torch.equal(deep(target, mask).flatten(0, 1), expected)
    assert torch.equal(deep.eval()(target[0, 0]), deep(target)[0, 0])


def test_nothing_seen_changes_nothing():
    module = TeacherNorm(DIMS)
    target = torch.randn(4, 8)
    mask = torch.ones(4, 3, dtype=torch.bool)
    mask[:, 1] = False
    out = module(target, mask)
    assert torch.equal(out[:, 3], target[:, 3])  # that teacher has not been seen
    fresh = TeacherNorm(DIMS)
    assert fresh(torch.zeros(0, 8)).shape == (0, 8)
    assert torch.equal(fresh.eval()(target), target)
    before = module.shift.clone()
    module(torch.full((3, 8), math.nan))
    assert torch.equal(module.shift, before)


def test_a_constant_column_has_a_finite_scale():
    module = TeacherNorm((2,), eps=1e-4)
    out = module(torch.full((5, 2), 0.3))
    torch.testing.assert_close(module.scale, torch.full((2,), 100.0))
    assert torch.equal(out, torch.zeros(5, 2))


def test_statistics_are_saved_and_resume():
    first, second = teachers().split((20, sum(BATCHES) - 20))
    module = TeacherNorm(DIMS)
    module(first)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    resumed = TeacherNorm(DIMS)
    resumed.load_state_dict(torch.load(file))
    assert torch.equal(resumed(second), module(second))
    assert {"shift", "scale"} <= set(module.state_dict())
    assert module.shift.shape == module.scale.shape == (8,)
    assert not list(module.parameters())


def test_a_change_of_dtype_leaves_the_statistics():
    module = TeacherNorm(DIMS)
    module(teachers())
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    for change in (torch.nn.Module.bfloat16, torch.nn.Module.half, torch.nn.Module.double):
        change(module)
        for name, buffer in module.named_buffers():
            assert torch.equal(buffer, before[name])
            assert buffer.dtype == before[name].dtype
    assert module.to("meta", torch.float16).mean.device.type == "meta"


def test_no_gradient_flows_into_the_statistics():
    target = torch.randn(5, 8, requires_grad=True)
    module = TeacherNorm(DIMS)
    module(target).sum().backward()
    torch.testing.assert_close(target.grad, module.scale.expand(5, 8))
    assert not any(buffer.requires_grad for buffer in module.buffers())


def test_compiles_without_a_graph_break():
    eager, module = TeacherNorm(DIMS), TeacherNorm(DIMS)
    compiled = torch.compile(module, fullgraph=True)
    for seed in range(2):
        torch.manual_seed(seed)
        target, mask = torch.randn(6, 8), torch.rand(6, 3) < 0.6
        torch.testing.assert_close(compiled(target, mask), eager(target, mask))
    torch.testing.assert_close(module.deviations, eager.deviations)


def test_repr():
    assert repr(TeacherNorm(DIMS)) == "TeacherNorm(teachers=3, width=8, eps=1e-08)"


def test_arguments_that_do_not_fit():
    module, target = TeacherNorm(DIMS), torch.randn(4, 8)

    def fails(error, message, call):
        with pytest.raises(error, match=re.escape(message)):
            call()

    fails(
        ValueError, "eps: expected a positive number, got 0.0", lambda: TeacherNorm(DIMS, eps=0.0)
    )
    fails(ValueError, "dims: expected ", lambda: TeacherNorm((3, -1)))
    fails(
        ValueError, "target: expected shape (4, 8), got shape (4, 7)", lambda: module(target[:, 1:])
    )
    fails(TypeError, "target: expected a floating-point tensor", lambda: module(target.long()))
    fails(ValueError, "target: expected 3 tensors", lambda: module([target]))
    fails(ValueError, "target: expected device cpu, got meta", lambda: module(target.to("meta")))
    mask = torch.ones(4, 3)
    fails(TypeError, "mask: expected a bool tensor (True counts)", lambda: module(target, mask))
    fails(ValueError, "mask: expected shape (4, 3)", lambda: module(target, mask.bool()[:2]))
    meta = mask.bool().to("meta")
    fails(ValueError, "mask: expected device cpu, got meta", lambda: module(target, meta))
    assert module.count.sum() == 0


def test_an_empty_batch_with_a_mask_is_fine():
    norm = TeacherNorm((3, 1, 4))
    assert norm(torch.zeros(0, 8), torch.zeros(0, 3, dtype=torch.bool)).shape == (0, 8)
    assert norm.count.tolist() == [0, 0, 0]


def test_float64_targets_far_from_zero_are_centred():
    torch.manual_seed(0)
    target = 1e6 + 0.03 + torch.randn(1000, 2, dtype=torch.float64)
    assert TeacherNorm((2,))(target).mean(0).abs().max() < 1e-6
