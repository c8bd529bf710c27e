"""TeacherNorm: every mode against naive loops, masks, spoiled entries, ranks, state."""

import copy
import io
import math
import re

import numpy as np
import pytest
import torch
from torch import distributed, multiprocessing

import mtkd.functional as F
from mtkd.nn import TeacherNorm, moments
from mtkd.nn.norm import CosineMomentum
from mtkd.nn.phi_s import PhiS

DIMS = (3, 1, 4)
NAMED = {"cnn": 3, "depth": 1, "pca": 4}
BATCHES = (1, 7, 2, 40, 3)
MODES = ("cumulative", "running", "batch", "fixed")


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
    monkeypatch.setitem(moments._BLOCK, "cpu", 16)
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


@pytest.mark.parametrize("mode", MODES)
def test_a_change_of_dtype_leaves_the_statistics(mode):
    module = TeacherNorm(DIMS, mode)
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


@pytest.mark.parametrize("mode", MODES)
def test_compiles_without_a_graph_break(mode):
    eager, module = (TeacherNorm(DIMS, mode, momentum=CosineMomentum(9)) for _ in range(2))
    compiled = torch.compile(module, fullgraph=True)
    for seed in range(2):
        torch.manual_seed(seed)
        target, mask = torch.randn(6, 8), torch.rand(6, 3) < 0.6
        torch.testing.assert_close(compiled(target, mask), eager(target, mask))
    for name, buffer in module.named_buffers():
        torch.testing.assert_close(buffer, eager.get_buffer(name))


def test_repr():
    shown = "teachers=3, width=8, eps=1e-08"
    assert repr(TeacherNorm(DIMS)) == f"TeacherNorm(cumulative, {shown})"
    averaged = TeacherNorm(DIMS, "running", momentum=CosineMomentum(5))
    momentum = "CosineMomentum(steps=5, start=1.0, end=0.001)"
    assert repr(averaged) == f"TeacherNorm(running, {shown}, momentum={momentum})"


def test_arguments_that_do_not_fit():
    module, target = TeacherNorm(DIMS), torch.randn(4, 8)

    def fails(error, message, call):
        with pytest.raises(error, match=re.escape(message)):
            call()

    fails(
        ValueError, "eps: expected a positive number, got 0.0", lambda: TeacherNorm(DIMS, eps=0.0)
    )
    fails(ValueError, "dims: expected ", lambda: TeacherNorm((3, -1)))
    modes = "mode: expected one of cumulative, running, batch, fixed, got "
    fails(ValueError, f"{modes}'ema'", lambda: TeacherNorm(DIMS, "ema"))
    fails(ValueError, f"{modes}'phi_s'; phi_s is mtkd.nn.PhiS", lambda: TeacherNorm(DIMS, "phi_s"))
    fails(
        ValueError,
        "momentum: expected a number from 0 to 1, got 1.5",
        lambda: TeacherNorm(DIMS, "running", momentum=1.5),
    )
    fails(ValueError, "steps: expected a positive number, got 0", lambda: CosineMomentum(0))
    ones = torch.ones(8)
    fails(ValueError, "std: expected shape (8,)", lambda: TeacherNorm.fixed(DIMS, ones, ones[1:]))
    fails(ValueError, "std: expected no negative", lambda: TeacherNorm.fixed(DIMS, ones, -ones))
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


def cosine(step, steps):
    """UNIC's schedule of the momentum."""
    return 0.001 + 0.5 * (1.0 - 0.001) * (1 + math.cos(math.pi * step / steps))


def naive_averages(target, masks, momentum):
    """Yield, for each batch, its rows and the averages before it: a loop over columns."""
    mean, std = torch.zeros(8, dtype=torch.float64), torch.ones(8, dtype=torch.float64)
    for step, (rows, mask) in enumerate(zip(target, masks, strict=True)):
        yield rows, mean.clone(), std.clone()
        for column, counted in enumerate(columns(mask).T):
            values = rows[counted, column]
            if len(values) > 1:
                m = momentum(step)
                mean[column] = (1 - m) * mean[column] + m * values.mean()
                std[column] = (1 - m) * std[column] + m * values.std()
    yield None, mean, std


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("schedule", [False, True])
def test_running_is_unics_loop(schedule, masked):
    target = teachers().split(BATCHES)
    masks = (torch.rand(sum(BATCHES), 3) < (0.6 if masked else 2.0)).split(BATCHES)
    momentum = CosineMomentum(6) if schedule else 0.3
    module = TeacherNorm(DIMS, "running", momentum=momentum, eps=1e-30)
    naive = naive_averages(target, masks, lambda step: cosine(step, 6) if schedule else 0.3)
    for (rows, mean, std), mask in zip(naive, (*masks, None), strict=True):
        torch.testing.assert_close(module.shift.double(), mean, rtol=1e-6, atol=0)
        torch.testing.assert_close(module.scale.double(), 1 / std, rtol=1e-6, atol=0)
        if rows is not None:
            spoiled = torch.where(columns(mask), rows, math.nan)
            out = module(spoiled, mask)
            expected = torch.where(columns(mask), (rows - mean) / std, math.nan)
            torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-9, equal_nan=True)
    assert module.updates == len(BATCHES)


def test_running_starts_from_the_raw_target_and_its_first_batch_replaces_it():
    target = teachers()
    module = TeacherNorm(DIMS, "running", momentum=CosineMomentum(100), eps=1e-30)
    torch.testing.assert_close(module(target), target)
    torch.testing.assert_close(module.mean, target.mean(0))
    torch.testing.assert_close(module.std, target.std(0))


def test_batch_takes_its_own_statistics_and_averages_for_evaluation():
    target = teachers().split(BATCHES)[1:]  # the first has a single row
    masks = [torch.rand(len(rows), 3) < 0.8 for rows in target]
    module = TeacherNorm(DIMS, "batch", eps=1e-30)
    naive = naive_averages(target, masks, lambda step: 0.1)
    for (rows, mean, std), mask in zip(naive, (*masks, None), strict=True):
        if rows is None:
            expected = (target[0] - mean) / std
            torch.testing.assert_close(module.eval()(target[0]), expected, rtol=1e-6, atol=1e-9)
            continue
        out, spread = module(rows, mask), columns(mask)
        for column in range(8):
            counted = spread[:, column]
            values = rows[counted, column]
            own = len(values) > 1  # else the averages
            centre, deviation = (
                (values.mean(), values.std()) if own else (mean[column], std[column])
            )
            expected = (rows[:, column] - centre) / deviation
            torch.testing.assert_close(out[:, column], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("mode", ["running", "batch"])
def test_averages_ignore_what_is_spoiled(mode):
    target = teachers()
    target[3, 0], target[5, 3], target[7, 4] = math.nan, math.inf, -math.inf
    counted = torch.ones(len(target), 3, dtype=torch.bool)
    counted[3, 0] = counted[5, 1] = counted[7, 2] = False
    module, clean = TeacherNorm(DIMS, mode), TeacherNorm(DIMS, mode)
    out = module(target)
    expected = clean(torch.where(columns(counted), target, 0.0), counted)
    torch.testing.assert_close(module.mean, clean.mean, rtol=0, atol=0)
    torch.testing.assert_close(module.std, clean.std, rtol=0, atol=0)
    torch.testing.assert_close(out[10:], expected[10:], rtol=0, atol=0)


def test_a_teacher_of_one_row_keeps_its_averages():
    for mode in ("running", "batch"):
        module = TeacherNorm(DIMS, mode)
        module(torch.randn(9, 8))
        before = module.mean.clone(), module.std.clone(), module.scale.clone()
        target, mask = torch.randn(5, 8), torch.zeros(5, 3, dtype=torch.bool)
        mask[0, 0] = mask[:, 2] = True  # one row, none, all
        out = module(target, mask)
        for old, new in zip(before, (module.mean, module.std, module.scale), strict=True):
            assert torch.equal(old[:4], new[:4])
            assert not (old[4:] == new[4:]).any()
        expected = (target - before[0].float()) * before[2]
        assert torch.equal(out[:, :4], expected[:, :4])


def test_fixed_takes_what_is_given_and_learns_nothing():
    mean, std = torch.randn(8), torch.rand(8) + 0.5
    target, parts = torch.randn(5, 8), list(DIMS)
    by_name = [dict(zip(NAMED, x.split(parts), strict=True)) for x in (mean, std)]
    for module in (
        TeacherNorm.fixed(DIMS, mean, std, eps=1e-30),
        TeacherNorm.fixed(DIMS, mean.split(parts), std.split(parts), eps=1e-30),
        TeacherNorm.fixed(NAMED, *by_name, eps=1e-30),
    ):
        torch.testing.assert_close(module(target), (target - mean) / std)
        torch.testing.assert_close(module(target), (target - mean) / std)
        torch.testing.assert_close(module.scale, 1 / std)
        resumed = TeacherNorm(DIMS, "fixed")
        resumed.load_state_dict(module.state_dict())
        assert torch.equal(resumed(target), module(target))


@pytest.mark.parametrize("mode", MODES)
def test_estimate_replaces_the_statistics_in_one_pass(mode):
    target, mask = teachers(), torch.rand(sum(BATCHES), 3) < 0.7
    module = TeacherNorm(DIMS, mode, eps=1e-12)
    module.update(torch.randn(4, 8))
    pairs = zip(target.split(BATCHES), mask.split(BATCHES), strict=True)
    assert module.estimate(pairs) is module
    mean, deviation = statistics(target, mask)
    np.testing.assert_allclose(module.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(module.scale, (deviation**2 + 1e-12) ** -0.5, rtol=1e-6)
    module.estimate([(target, None), (target, mask)])
    assert module.mean[3] == pytest.approx(torch.cat([target[:, 3], target[mask[:, 1], 3]]).mean())


def test_estimate_tells_a_mask_from_a_second_teacher():
    pair = (torch.randn(6, 3), torch.randn(6, 5))
    module = TeacherNorm((3, 5), "fixed").estimate([pair, (pair, torch.ones(6, 2).bool())])
    torch.testing.assert_close(module.shift, torch.cat(pair, 1).mean(0))


@pytest.mark.parametrize("mode", MODES)
def test_affine_is_what_a_call_applies(mode):
    called, fused = (TeacherNorm(DIMS, mode, momentum=0.4) for _ in range(2))
    student = torch.randn(9, 8, requires_grad=True)
    losses, targets = [], torch.randn(3, 9, 8) * 3 + 1
    for target in targets:
        mask = torch.rand(9, 3) < 0.8
        out = called(target, mask)
        shift, scale = fused.affine(target.split(list(DIMS), -1), mask)
        torch.testing.assert_close((target - shift) * scale, out)
        options = {"mask": mask, "reduction": "none"}
        losses.append(F.alignment(student, target, DIMS, shift=shift, scale=scale, **options))
        torch.testing.assert_close(losses[-1], F.alignment(student, out, DIMS, **options))
    torch.stack(losses).sum().backward()  # the updates since have left shift and scale alone
    torch.testing.assert_close(fused.shift, called.shift)
    assert called.eval().affine(targets[0].double())[0].dtype == torch.float64


@pytest.mark.parametrize("mode", MODES)
def test_inverse_restores_the_target(mode):
    target = torch.randn(9, 8, dtype=torch.float64)
    module = TeacherNorm(NAMED, mode).estimate([target]).eval()
    torch.testing.assert_close(module.inverse(module(target)), target)
    split = dict(zip(NAMED, target.split(list(DIMS), 1), strict=True))
    for name, part in module.inverse(module(split)).items():
        torch.testing.assert_close(part, split[name])


@pytest.mark.parametrize("mode", MODES)
def test_a_schedule_resumes(mode):
    first, second = teachers().split((20, sum(BATCHES) - 20))
    module, resumed = (TeacherNorm(DIMS, mode, momentum=CosineMomentum(4)) for _ in range(2))
    module(first)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file))
    copied = copy.deepcopy(module)
    for _ in range(3):
        expected = module(second)
        assert torch.equal(resumed(second), expected)
        assert torch.equal(copied(second), expected)
    assert torch.equal(resumed.scale, module.scale)


def test_the_schedule_is_a_cosine():
    momentum = CosineMomentum(50)
    for step in range(51):
        value = momentum(torch.tensor(step, dtype=torch.float64))
        assert value.item() == pytest.approx(cosine(step, 50), rel=1e-12)
    assert momentum(torch.tensor(80.0)).item() == pytest.approx(0.001)
    assert CosineMomentum(10, 0.5, 0.2)(torch.tensor(0.0)) == 0.5


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_read_by_the_host(mode):
    module = TeacherNorm(DIMS, mode, momentum=CosineMomentum(9)).to("meta")
    target, mask = torch.randn(6, 8, device="meta"), torch.ones(6, 3, device="meta").bool()
    assert module(target, mask).shape == (6, 8)  # a tensor without memory cannot be read
    module.update(list(target.split(list(DIMS), 1)), mask)


def run_ranks(rank, file):
    """What both ranks do: learn from their rows, and compare with one process that has all."""
    distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    torch.manual_seed(0)
    target = teachers()[:40]
    mask = torch.rand(40, 3) < 0.7
    steps = [(0, 9, 20), (20, 20, 28), (28, 33, 40)]  # rank 0 has no rows in the second
    sizes, all_reduce = [], distributed.all_reduce

    def recorded(tensor, *args, **options):
        sizes.append(tensor.numel())
        return all_reduce(tensor, *args, **options)

    distributed.all_reduce = recorded
    for mode in ("cumulative", "running", "batch"):
        alone, module = (TeacherNorm(DIMS, mode, sync=sync) for sync in (False, True))
        for start, middle, end in steps:
            own = slice(*((start, middle), (middle, end))[rank])
            first = 0 if rank == 0 else middle - start
            expected = alone(target[start:end], mask[start:end])[first:][: own.stop - own.start]
            out = module(target[own], mask[own])
            torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
        for name, buffer in alone.named_buffers():
            torch.testing.assert_close(module.get_buffer(name), buffer)
    assert sizes == [3 + 8, 8] * 9  # counts and sums, then squares: never rows
    own, eigh = slice(0, 11) if rank == 0 else slice(11, 40), torch.linalg.eigh
    torch.linalg.eigh = lambda matrix: (eigh(matrix)[0], eigh(matrix)[1] * (1 - 2 * rank))
    batches = [(target[own], mask[own])]
    for kind in (lambda sync: TeacherNorm(DIMS, "fixed", sync=sync), phi_s):
        alone, module = (kind(sync) for sync in (False, True))
        alone.estimate([(target, mask)])
        module.estimate(batches)
        torch.testing.assert_close(module.mean, alone.mean)
    variance = module(target)[mask[:, 2], 4:].var(0, correction=0)
    torch.testing.assert_close(variance, torch.ones(4).double(), rtol=1e-6, atol=0)
    rotations = [torch.empty_like(module.rotation) for _ in range(2)]
    distributed.all_gather(rotations, module.rotation)
    assert torch.equal(*rotations)
    distributed.destroy_process_group()


def phi_s(sync):
    return PhiS(DIMS, fallback="hartley", sync=sync)


def test_ranks_learn_what_one_process_with_all_rows_would(tmp_path):
    multiprocessing.spawn(run_ranks, (str(tmp_path / "rendezvous"),), nprocs=2)


def test_a_single_row_without_leading_dimensions():
    norm = TeacherNorm((3, 5))
    norm(torch.randn(8), torch.tensor([True, False]))
    assert norm.count.tolist() == [1, 0]
