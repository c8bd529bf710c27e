"""Stores while processes are killed, write together, or run out of room."""

import multiprocessing
import os
import random
import signal

import pytest
import teacher_workers as workers
import torch

from mtkd.teachers import TeacherStore

# One process imports torch; the others are its forks.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["mtkd.teachers"])
ROUNDS = int(os.environ.get("MTKD_KILLS", "4"))  # 20 for a thorough run


def run(target, *args):
    process = CONTEXT.Process(target=target, args=args)
    process.start()
    return process


def finish(*processes):
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


@pytest.fixture
def empty(tmp_path):
    dims = dict.fromkeys(workers.DTYPES, workers.WIDTH)
    return TeacherStore.create(
        tmp_path / "store", dims, workers.ROWS, dtype={name: name for name in dims}
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    dims = dict.fromkeys(workers.DTYPES, workers.WIDTH)
    path = tmp_path_factory.mktemp("whole") / "store"
    store = TeacherStore.create(path, dims, workers.ROWS, dtype={name: name for name in dims})
    assert finish(run(workers.fill, path)) == [0]
    return store


def files(store):
    return {file.relative_to(store.path): file.read_bytes() for file in store.path.rglob("*.npy")}


def check_part(store, whole):
    """What is there is whole, and is what the run that was not killed has."""
    store = TeacherStore.open(store.path)
    assert store.verify() == {}
    targets, mask = store[:]
    expected, everywhere = whole[:]
    assert everywhere.all()
    columns = mask.repeat_interleave(workers.WIDTH, 1)
    torch.testing.assert_close(targets, expected.where(columns, 0), rtol=0, atol=0)


def test_killed_at_random_moments_loses_nothing(empty, whole):
    moments, kills = random.Random(5), 0
    while kills < ROUNDS:
        ready = CONTEXT.Event()
        process = run(workers.fill, empty.path, 0, 1, ready)
        assert ready.wait(60)
        process.join(moments.uniform(0, 0.2))
        process.kill()
        kills += finish(process) == [-signal.SIGKILL]
        check_part(empty, whole)
        if empty[:][1].all():  # it ended before, or is done: begin anew
            assert files(empty) == files(whole)
            for name in empty.names:
                empty.discard(name, slice(None))
    assert finish(run(workers.fill, empty.path)) == [0]
    assert files(empty) == files(whole)


def test_killed_in_the_middle_of_any_write_loses_nothing(empty, whole):
    # A block is values, checksums, presence; with scales for int8, which comes last.
    in_part = 0
    for calls in [1, 2, 3, 5, 27, 1, 2, 3, 4, 5]:
        assert finish(run(workers.die_while_writing, empty.path, calls)) == [-signal.SIGKILL]
        check_part(empty, whole)
        batches = empty[:][1].unflatten(0, (-1, workers.BATCH))
        in_part += int((batches.any(1) & ~batches.all(1)).sum())
    assert in_part > 0
    assert finish(run(workers.fill, empty.path)) == [0]
    assert files(empty) == files(whole)


@pytest.mark.parametrize("calls", range(1, 12))
def test_renames_that_a_kill_cut_short_are_finished_by_the_next_create(tmp_path, calls):
    # Six make a store without rows in the folder aside; the seventh says that it is whole.
    assert finish(run(workers.die_while_moving, tmp_path, calls)) == [-signal.SIGKILL]
    options = {"dims": {"a": 4, "b": 3}, "rows": workers.ROWS}
    store = TeacherStore.create(tmp_path, **options, exist_ok=True)
    assert store[:][1].all().item() == (calls > 7)
    assert store.verify() == {}
    with pytest.raises(ValueError, match="path: expected a new or an empty folder"):
        TeacherStore.create(tmp_path, **options)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "b", "index.json"]


@pytest.mark.parametrize("name", ["b", "index.json"])
def test_a_file_that_is_in_the_way_of_the_renames_stays(tmp_path, name):
    assert finish(run(workers.die_while_moving, tmp_path, 8)) == [-signal.SIGKILL]
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"path: expected .*{name} to take its name, got .*{name}"):
        TeacherStore.create(tmp_path, {"a": 4, "b": 3}, workers.ROWS)
    assert (tmp_path / name).read_text() == "mine"
    assert [file.name for file in tmp_path.glob("[!.]*")] == [name]  # nothing was moved
    (tmp_path / name).unlink()
    options = {"dims": {"a": 4, "b": 3}, "rows": workers.ROWS, "exist_ok": True}
    assert TeacherStore.create(tmp_path, **options)[:][1].all()


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_the_rows(empty, whole, world_size):
    ranks = [run(workers.fill, empty.path, rank, world_size) for rank in range(world_size)]
    assert finish(*ranks) == [0] * world_size
    assert empty.verify() == {}
    assert files(empty) == files(whole)


def test_writers_of_the_same_rows_take_turns(empty):
    begun = CONTEXT.Event()
    writers = [run(each, empty.path, begun) for each in (workers.write_slowly, workers.write_after)]
    assert finish(*writers) == [0, 0]
    assert empty.verify() == {}
    targets, mask = empty.subset(["int8"])[:]
    assert mask.all()
    assert (targets == 1).all()


def test_a_full_disk_is_an_error_and_what_was_there_stays(tmp_path):
    queue = CONTEXT.Queue()
    assert finish(run(workers.run_out_of_room, tmp_path, queue)) == [0]
    messages = dict(iter(queue.get, ("end", "")))
    assert list(messages) == ["create", "add", "merge", "append"]
    assert "expected room for 102400 bytes" in messages["create"]
    assert "wide/values.npy" in messages["append"]
    assert [file.name for file in tmp_path.iterdir()] == ["there"]
    store = TeacherStore.open(tmp_path / "there")
    assert sorted(file.name for file in store.path.iterdir()) == ["index.json", "wide"]
    assert store.verify() == {}
    assert store.present("wide").tolist() == [True] * 40 + [False] * 60
    assert (store[:40][0] == 1).all()
