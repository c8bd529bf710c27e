"""Two processes against one: every check runs in one pair of processes, launched once."""

import copy
import re
import time
import traceback
from datetime import timedelta
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

import mtkd
from mtkd.distributed import TeacherParallel, keep_apart, reduce_over_ranks, shard_evenly
from mtkd.distributed.teacher_parallel import share
from mtkd.functional import alignment
from mtkd.integrations.sentence_transformers import DistillationLoss
from mtkd.nn import GaussianHeads, Ladder, Projectors, TeacherNorm
from mtkd.reduction import reduce_matrix
from mtkd.weighting import teacher_dropping

RANKS, SECONDS = 2, 100
DIMS = {"wide": 7, "narrow": 2, "dotted.name": 5, "dims": 3, "last": 5}
WIDTHS, TEACHERS = tuple(DIMS.values()), len(DIMS)
STEPS = ((0, 5, 12), (12, 18, 18), (18, 19, 26))  # rank 0 has the rows up to the second number
PACKED = {
    "gaussian": partial(GaussianHeads, 6),
    "mixtures": partial(GaussianHeads, 6, modes=3, depth=1, hidden_features=1.4),
    "deep": partial(GaussianHeads, 6, depth=2, hidden_features=4, norm=True, bound=None),
    "linear": partial(Projectors, 6),
    "projectors": partial(Projectors, 6, depth=1, hidden_features=4),
}
LADDER = partial(Ladder, 6, blocks=2, hidden_features=4, last_hidden_features=5)
HEADS = PACKED | {"ladder": LADDER}
FULL = StateDictOptions(full_state_dict=True)
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


class Model(nn.Module):
    """A student with its heads, as DDP and FSDP wrap them: forward returns the matrix."""

    def __init__(self, heads, sync=True):
        super().__init__()
        torch.manual_seed(0)
        self.student = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
        self.norm = TeacherNorm(DIMS, sync=sync)
        self.heads = heads(DIMS)

    def forward(self, x, target, mask):
        student, options = self.student(x), {"mask": mask, "reduction": "none"}
        target = self.norm(target, mask)
        if isinstance(self.heads, Ladder):
            return alignment(self.heads([student, 2 * student]), target, WIDTHS, **options)
        loss = self.heads.alignment if isinstance(self.heads, Projectors) else self.heads
        return loss(student, target, **options)


def data():
    torch.manual_seed(1)
    mask = torch.rand(26, TEACHERS) < 0.7
    mask[:5, 0] = False
    return torch.randn(26, 6), torch.randn(26, sum(WIDTHS)), mask


def train(loss, parameters, rank=None):
    """Take the steps with this rank's rows, or with all; return losses and optimiser."""
    optimizer, losses = torch.optim.AdamW(parameters, 1e-2), []
    for start, middle, end in STEPS:
        rows = slice(*((start, end) if rank is None else ((start, middle), (middle, end))[rank]))
        optimizer.zero_grad()
        value = loss(*(each[rows] for each in data()))
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses, optimizer


@cache
def alone(heads):
    """Train in one process, with all rows."""
    model = Model(heads, sync=False)

    def loss(x, target, mask):
        return reduce_matrix(model(x, target, mask), mask=mask)

    return model, *train(loss, model.parameters())


def together(model, rank):
    def loss(x, target, mask):
        return reduce_over_ranks(model(x, target, mask), mask=mask)

    return train(loss, model.parameters(), rank)


def same(found, expected):
    assert sorted(found) == sorted(expected)
    for key, value in expected.items():
        close(found[key], value)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@check
def ddp_equals_one_process(rank, folder):
    for heads in (PACKED["mixtures"], PACKED["linear"], LADDER):
        model, losses, _ = alone(heads)
        wrapped = DistributedDataParallel(Model(heads))
        close(torch.tensor(together(wrapped, rank)[0]), torch.tensor(losses))
        same(wrapped.module.state_dict(), model.state_dict())
        same(get_model_state_dict(wrapped), model.state_dict())


@cache
def mesh():
    return distributed.init_device_mesh("cpu", (RANKS,))


def sharded(heads, **options):
    model = Model(heads)
    fully_shard(model.heads, mesh=mesh(), **options)
    if isinstance(model.heads, Projectors):
        register_fsdp_forward_method(model.heads, "alignment")
    return fully_shard(model, mesh=mesh())


@check
def fsdp_equals_one_process(rank, folder):
    for heads in (PACKED["gaussian"], PACKED["deep"], PACKED["projectors"], LADDER):
        model, losses, _ = alone(heads)
        wrapped = sharded(heads)
        close(torch.tensor(together(wrapped, rank)[0]), torch.tensor(losses))
        same(get_model_state_dict(wrapped, options=FULL), model.state_dict())


@check
def fsdp_shards_heads_by_another_dimension(rank, folder):
    heads = partial(GaussianHeads, 6, modes=3, depth=1, hidden_features=4)
    places = shard_evenly(4)  # as if there were four ranks
    wrapped = sharded(heads, shard_placement_fn=places)
    assert wrapped.heads.last_0_weight.to_local().shape == (2, 3, 7, 2)
    model, losses, _ = alone(heads)
    close(torch.tensor(together(wrapped, rank)[0]), torch.tensor(losses))
    same(get_model_state_dict(wrapped, options=FULL), model.state_dict())


@check
def fsdp_state_dicts_stay_sharded_and_load(rank, folder):
    for name in ("deep", "linear", "ladder"):
        heads = HEADS[name]
        model, _, optimizer = alone(heads)
        wrapped = sharded(heads)
        own = together(wrapped, rank)[1]
        state = get_model_state_dict(wrapped)
        weight = next(v for k, v in state.items() if k.startswith("heads.") and v.dim() == 2)
        assert weight.placements == (Shard(0),)
        path, states = f"{folder}/{name}", get_optimizer_state_dict(wrapped, own)
        checkpoint.save({"model": state, "optimizer": states}, checkpoint_id=path)

        fresh = sharded(heads)
        nn.init.zeros_(fresh.student[0].weight)
        for parameter in fresh.heads.parameters():
            nn.init.constant_(parameter, 3.0)
        again = torch.optim.AdamW(fresh.parameters(), 1e-2)
        state = get_model_state_dict(fresh), get_optimizer_state_dict(fresh, again)
        loaded = dict(zip(("model", "optimizer"), state, strict=True))
        checkpoint.load(loaded, checkpoint_id=path)
        set_model_state_dict(fresh, loaded["model"])
        set_optimizer_state_dict(fresh, again, loaded["optimizer"])
        same(get_model_state_dict(fresh, options=FULL), model.state_dict())
        full = get_optimizer_state_dict(fresh, again, options=FULL)["state"]
        expected = get_optimizer_state_dict(model, optimizer)["state"]
        for key, value in expected.items():
            same(full[key], value)

        other = sharded(heads)
        set_model_state_dict(other, model.state_dict(), options=FULL)  # of one process
        same(get_model_state_dict(other, options=FULL), model.state_dict())


@check
def sharded_parameters_outside_of_forward_are_a_sentence(rank, folder):
    for heads in (PACKED["linear"], PACKED["projectors"]):
        projectors = fully_shard(heads(DIMS), mesh=mesh())
        with pytest.raises(TypeError, match="register_fsdp_forward_method"):
            projectors.alignment(torch.randn(2, 6), torch.randn(2, sum(WIDTHS)))


def shared_out(heads):
    """A model whose student is in DDP and whose heads are shared out."""
    method = "forward" if heads.func is GaussianHeads else "alignment"
    model = Model(lambda dims: TeacherParallel(heads, dims, method=method))
    model.student = DistributedDataParallel(model.student)
    return model


@check
def teacher_parallel_equals_one_process(rank, folder):
    for name, heads in PACKED.items():
        model, losses, _ = alone(heads)
        parts = shared_out(heads)
        same(parts.heads.state_dict(), own_part(Model(heads).heads, parts.heads.own))
        found = together(parts, rank)[0]
        close(torch.tensor(found), torch.tensor(losses))
        same(parts.student.module.state_dict(), model.student.state_dict())
        same(parts.heads.state_dict(), own_part(model.heads, parts.heads.own))
        full = parts.heads.full_state_dict()
        assert (list(full) == list(model.heads.state_dict())) == (rank == 0), name
        same(full, model.heads.state_dict() if rank == 0 else {})


def own_part(heads, own):
    prefixes = tuple(f"teachers.{name}." for name in own)
    return {k: v for k, v in heads.state_dict().items() if k.startswith(prefixes)}


@check
def ddp_must_leave_shared_out_heads_alone(rank, folder):
    equal = {"one": 4, "other": 4}  # so that DDP sees no difference

    def model():
        heads = TeacherParallel(PACKED["linear"], equal, method="alignment")
        return nn.ModuleDict({"student": nn.Linear(6, 6), "heads": heads})

    x, target = torch.randn(5, 6), torch.randn(5, 8)
    spoilt = DistributedDataParallel(model()).module
    with pytest.raises(RuntimeError, match=r"got rank 0's on all; .*keep_apart\(model\)"):
        spoilt["heads"](x, target)
    apart = model()
    before = {key: value.clone() for key, value in apart["heads"].state_dict().items()}
    keep_apart(apart)
    wrapped = DistributedDataParallel(apart)
    same(wrapped.module["heads"].state_dict(), before)
    assert wrapped.module["heads"](x, target).isfinite()


@check
def teacher_parallel_gradients_equal_one_process(rank, folder):
    x, target, mask = data()
    own = slice(0, 9) if rank == 0 else slice(9, 26)
    weight = torch.rand(26, TEACHERS)
    for options in ({}, {"weight": weight}, {"denominator": 17.0}, {"reduction": "sum"}):
        heads, parts = PACKED["mixtures"](DIMS), shared_out(PACKED["mixtures"]).heads
        parts.load_state_dict(heads.state_dict())  # its own of all
        whole, mine = x.clone().requires_grad_(), x[own].clone().requires_grad_()
        loss = heads(whole, target, mask=mask, **options)
        loss.backward()
        if "weight" in options:
            options = {"weight": weight[own]}
        found = parts(mine, target[own], mask=mask[own], **options)
        found.backward()
        close(found, loss)
        close(mine.grad / RANKS, whole.grad[own])  # as DDP averages
        gradients = {k: heads.get_parameter(p).grad[at] for k, p, at in heads.pieces()}
        for key, parameter, at in parts.heads.pieces():
            close(parts.heads.get_parameter(parameter).grad[at], gradients[key])


@check
def teacher_parallel_matrix_is_that_of_ones_own_rows(rank, folder):
    x, target, mask = data()
    x, target, mask = x.view(2, 13, 6), target.view(2, 13, -1), mask.view(2, 13, -1)
    heads, parts = PACKED["gaussian"](DIMS), shared_out(PACKED["gaussian"]).heads
    parts.load_state_dict(heads.state_dict())
    end = 13 - 4 * rank
    batch = x[rank, :end, None], list(target[rank, :end, None].split(WIDTHS, -1))
    expected = heads(*batch, mask=mask[rank, :end, None], reduction="none")
    close(parts(*batch, mask=mask[rank, :end, None], reduction="none"), expected)
    with torch.no_grad():
        close(parts(*batch, reduction="none"), heads(*batch, reduction="none"))
    named = dict(zip(DIMS, batch[1], strict=True))
    close(parts(batch[0].bfloat16(), named), parts(batch[0].bfloat16(), batch[1]))


@check
def teacher_parallel_memory_falls_with_the_ranks(rank, folder):
    dims = {str(teacher): 16 + teacher % 3 for teacher in range(20)}
    heads = partial(GaussianHeads, 6, hidden_features=1.5, depth=2)
    parts, whole = TeacherParallel(heads, dims), heads(dims)
    optimizer = torch.optim.AdamW(parts.parameters())
    parts(torch.randn(3, 6), torch.randn(3, sum(dims.values()))).backward()
    optimizer.step()
    numbers = {
        "parameters": sum(p.untyped_storage().nbytes() // 8 for p in parts.parameters()),
        "gradients": sum(p.grad.numel() for p in parts.parameters()),
        "moments": sum(s["exp_avg"].numel() for s in optimizer.state.values()),
    }
    every = [None] * RANKS
    distributed.all_gather_object(every, numbers)
    total = sum(p.numel() for p in whole.parameters())
    for kind in numbers:
        assert sum(each[kind] for each in every) == total
        assert max(each[kind] for each in every) < 0.51 * total


@check
def teacher_parallel_checkpoints_load_in_one_process(rank, folder):
    parts = nn.ModuleDict({"heads": shared_out(PACKED["deep"]).heads})
    checkpoint.save(get_model_state_dict(parts), checkpoint_id=f"{folder}/parts")
    names = [None] * RANKS
    distributed.all_gather_object(names, [name for name, _ in parts.named_parameters()])
    assert not set(names[0]) & set(names[1])  # an optimiser's state is saved by these
    heads = nn.ModuleDict({"heads": PACKED["deep"](DIMS)})
    state = heads.state_dict()
    checkpoint.load(state, checkpoint_id=f"{folder}/parts", no_dist=True)
    same(parts.state_dict(), {f"heads.{k}": v for k, v in own_part_of(state, parts).items()})
    with pytest.raises(RuntimeError, match=f"Missing.*teachers.{parts['heads'].own[0]}"):
        parts.load_state_dict({})
    with pytest.raises(RuntimeError, match=r"Unexpected.*teachers\.other"):
        parts.load_state_dict(state | {"heads.teachers.other.mean.weight": torch.ones(1)})


def own_part_of(state, parts):
    heads = PACKED["deep"](DIMS)
    heads.load_state_dict({key.removeprefix("heads."): value for key, value in state.items()})
    return own_part(heads, parts["heads"].own)


@check
def teacher_parallel_training_goes_on_from_a_checkpoint(rank, folder):
    x, target, _ = data()

    def begin():
        parts = nn.ModuleDict({"heads": shared_out(PACKED["deep"]).heads})
        return parts, torch.optim.AdamW(parts.parameters(), 1e-2)

    def step(parts, optimizer):
        parts["heads"](x[rank:], target[rank:]).backward()
        optimizer.step()
        optimizer.zero_grad()

    def state(parts, optimizer):
        return {
            "model": get_model_state_dict(parts),
            "optimizer": get_optimizer_state_dict(parts, optimizer, options=FLAT),
        }

    parts, optimizer = begin()
    step(parts, optimizer)
    checkpoint.save(state(parts, optimizer), checkpoint_id=f"{folder}/going")
    step(parts, optimizer)
    again, fresh = begin()
    loaded = state(again, fresh)
    checkpoint.load(loaded, checkpoint_id=f"{folder}/going")
    set_model_state_dict(again, loaded["model"])
    set_optimizer_state_dict(again, fresh, loaded["optimizer"], options=FLAT)
    step(again, fresh)
    for key, value in parts.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)


@check
def ranks_that_differ_get_the_same_sentence(rank, folder):
    heads = shared_out(PACKED["linear"]).heads
    x, target, mask = data()
    with pytest.raises(ValueError, match="a mask: expected the same on all ranks, got 0, 1"):
        heads(x, target, mask=mask if rank else None)
    with pytest.raises(ValueError, match=r"target's dtype: .*torch.float64, torch.float16"):
        heads(x, target.to((torch.float64, torch.float16)[rank]))
    with pytest.raises(ValueError, match="whether the student requires grad"):
        heads(x.requires_grad_(rank == 0), target)


@check
def losses_are_reduced_over_uneven_ranks(rank, folder):
    matrix, weight, (_, _, mask) = torch.rand(26, TEACHERS), torch.rand(26, TEACHERS), data()
    own = slice(0, 3) if rank == 0 else slice(3, 26)

    def compare(rows, **options):
        loss, learned = matrix.clone().requires_grad_(), weight.clone().requires_grad_()
        part, mine = matrix[rows].clone().requires_grad_(), weight[rows].clone().requires_grad_()
        expected = reduce_matrix(loss, weight=learned, mask=mask, **options)
        expected.backward()
        found = reduce_over_ranks(part, weight=mine, mask=mask[rows], **options)
        found.backward()
        close(found, expected)
        close(part.grad / RANKS, loss.grad[rows])
        close(mine.grad / RANKS, learned.grad[rows])

    for options in ({}, {"reduction": "sum"}, {"denominator": 9.0}):
        compare(own, **options)
    empty = reduce_over_ranks(part := matrix[own].requires_grad_(), mask=mask[own] & False)
    empty.backward()
    assert empty == 0
    assert not part.grad.any()
    rule = partial(teacher_dropping, generator=torch.Generator().manual_seed(rank))
    weights = teacher_dropping(matrix[own], generator=torch.Generator().manual_seed(rank))
    close(reduce_over_ranks(part, weight=rule), reduce_over_ranks(part, weight=weights))


@check
def a_group_of_ones_own_is_one_process(rank, folder):
    groups = [distributed.new_group([each]) for each in range(RANKS)]
    x, target, _ = data()
    torch.manual_seed(rank)
    heads = PACKED["gaussian"](DIMS)
    parts = TeacherParallel(PACKED["gaussian"], DIMS, group=groups[rank])
    parts.load_state_dict(heads.state_dict())
    close(parts(x[rank:], target[rank:]), heads(x[rank:], target[rank:]))
    same(parts.full_state_dict(), heads.state_dict())
    with pytest.raises(ValueError, match="group: expected a process group that this process is in"):
        TeacherParallel(PACKED["gaussian"], DIMS, group=groups[1 - rank])


class Sentences(nn.Module):
    """What stands for a SentenceTransformer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(6, 6)

    def forward(self, features):
        return {"sentence_embedding": self.linear(features["x"])}


@check
def sentence_transformers_loss_equals_one_process(rank, folder):
    for name in ("mixtures", "projectors"):
        torch.manual_seed(0)
        heads = PACKED[name](DIMS)
        method = "alignment" if isinstance(heads, Projectors) else "forward"
        one, model = copy.deepcopy(heads), Sentences()
        call = getattr(one, method)

        def loss(x, target, mask, model=model, call=call):
            return call(model({"x": x})["sentence_embedding"], target, mask=mask)

        losses, _ = train(loss, [*model.parameters(), *one.parameters()])
        with torch.no_grad():
            for parameter in heads.parameters():
                parameter.add_(rank)  # ranks begin as rank 0 does, whatever their seeds
        torch.manual_seed(0)
        parts = TeacherParallel(PACKED[name], DIMS, method=method)
        for each in (heads, parts):
            wrapped = DistributedDataParallel(Sentences())
            distilled = DistillationLoss(wrapped, each)

            def labelled(x, target, mask, distilled=distilled):
                columns = torch.tensor(WIDTHS)
                target = target.masked_fill(~mask.repeat_interleave(columns, 1), torch.nan)
                return distilled([{"x": x}], target)

            found = train(labelled, distilled.parameters(), rank)[0]
            close(torch.tensor(found), torch.tensor(losses))
            same(each.state_dict(), {k: one.state_dict()[k] for k in each.state_dict()})
            same(wrapped.module.state_dict(), model.state_dict())


@check
def the_page_runs(rank, folder):
    page = (Path(mtkd.__file__).parents[1] / "docs/distributed.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "docs/distributed.md", "exec"), {})


@check
def more_ranks_than_teachers_are_an_error(rank, folder):
    with pytest.raises(ValueError, match="dims: expected at least 2 teachers, one a rank, got 1"):
        TeacherParallel(PACKED["gaussian"], {"only": 4})


def run(rank, folder):
    """Run all checks, each in a file of its own result."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=20),
    )
    for name, function in CHECKS.items():
        try:
            function(rank, folder)
            result = ""
        except BaseException:
            result = traceback.format_exc()
        (folder / f"{name}.{rank}").write_text(result)
        if result:  # the ranks are no longer in step
            break
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    processes = multiprocessing.spawn(run, (folder,), nprocs=RANKS, join=False)
    end = time.monotonic() + SECONDS
    try:
        while not processes.join(timeout=max(0.0, end - time.monotonic())):
            assert time.monotonic() < end, f"the ranks did not end within {SECONDS} s"
    finally:
        for process in processes.processes:
            process.kill()
    return folder


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("rank", range(RANKS))
def test_two_processes(results, name, rank):
    result = results / f"{name}.{rank}"
    report = result.read_text() if result.exists() else "not run: an earlier check failed"
    if report:
        pytest.fail(report, pytrace=False)


@pytest.mark.parametrize(
    ("dims", "ranks", "expected"),
    [
        ((5,), 1, ((0,),)),
        ((1, 1, 1), 3, ((0,), (1,), (2,))),
        ((9, 1, 1, 1, 1, 1), 2, ((0,), (1, 2, 3, 4, 5))),
        ((768, 1024, 384, 1024, 768, 512), 3, ((1, 5), (2, 3), (0, 4))),
    ],
)
def test_teachers_are_shared_out_by_size(dims, ranks, expected):
    assert share(dims, ranks) == expected


@pytest.mark.parametrize(
    ("shape", "ranks", "expected"),
    [
        ((16, 12), 8, None),
        ((2, 21, 768), 8, Shard(2)),
        ((2, 64, 768), 8, Shard(2)),
        ((2, 64, 20), 8, Shard(1)),
        ((2, 3, 5), 8, None),
        ((2, 64, 20), 2, None),
    ],
)
def test_parameters_are_sharded_where_all_ranks_get_a_part(shape, ranks, expected):
    assert shard_evenly(ranks)(nn.Parameter(torch.empty(shape))) == expected
