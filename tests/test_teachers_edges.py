"""The teacher store where folders change under it, disks are full and arguments are unusual."""

import errno
import os
import pickle
import shutil

import pytest
import torch

from mtkd.teachers import TeacherStore


def ones(rows, width):
    return torch.ones(rows, width)


def test_a_handle_of_a_folder_that_was_replaced_writes_nothing(tmp_path):
    old = TeacherStore.create(tmp_path / "s", {"a": 4}, 10)
    shutil.rmtree(tmp_path / "s")
    with pytest.raises(ValueError, match=r"present\.npy: expected the file that was opened.*No su"):
        old.append("a", ones(10, 4))
    new = TeacherStore.create(tmp_path / "s", {"a": 8}, 10)
    new.append("a", 2 * ones(10, 8))
    for write in (lambda: old.append("a", ones(10, 4)), lambda: old.discard("a", [1])):
        with pytest.raises(ValueError, match=r"present\.npy: expected the file.*got another one"):
            write()
    assert new.verify() == {}
    assert (new[:][0] == 2).all()


@pytest.mark.parametrize("link", [os.symlink, os.link, shutil.copyfile])
@pytest.mark.parametrize("name", ["values.npy", "checksums.npy", "present.npy"])
def test_nothing_is_written_through_a_file_that_was_swapped(tmp_path, name, link):
    store = TeacherStore.create(tmp_path / "s", {"a": 4}, 10)
    other = TeacherStore.create(tmp_path / "other", {"a": 4}, 10)
    (tmp_path / "s/a" / name).unlink()
    link(tmp_path / "other/a" / name, tmp_path / "s/a" / name)
    before = (tmp_path / "other/a" / name).read_bytes()
    with pytest.raises(ValueError, match=f"{name}: expected the file that was opened"):
        store.append("a", ones(10, 4))
    assert (tmp_path / "other/a" / name).read_bytes() == before
    assert not other.present("a").any()


@pytest.mark.parametrize("change", [{"dims": {"a": 8}}, {"rows": 9}, {"dims": {"b": 4}}])
def test_a_store_of_another_shape_is_not_unpickled(tmp_path, change):
    options = {"dims": {"a": 4}, "rows": 10}
    store = TeacherStore.create(tmp_path / "s", **options)
    sent = pickle.dumps(store)
    store.add({"more": 2})
    assert pickle.loads(sent).names == ("a",)
    shutil.rmtree(tmp_path / "s")
    TeacherStore.create(tmp_path / "s", **options | change)
    for attempt in (lambda: pickle.loads(sent), store.subset, lambda: store.add({"new": 3})):
        with pytest.raises(ValueError, match="path: expected a store of Index"):
            attempt()
    assert not (tmp_path / "s/new").exists()


def test_a_relative_path_is_that_of_the_moment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = TeacherStore.create("s", {"a": 4}, 10)
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "deep")
    store.append("a", ones(10, 4))
    assert store.subset(rows=[1])[:][1].all()
    assert pickle.loads(pickle.dumps(store)).path == tmp_path / "s"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space"), KeyboardInterrupt()])
def test_add_adds_every_teacher_or_none(tmp_path, monkeypatch, error):
    store = TeacherStore.create(tmp_path / "s", {"a": 4}, 10)
    allocate, left = os.posix_fallocate, [5]

    def fail(*args):
        left[0] -= 1
        if not left[0]:
            raise error
        allocate(*args)

    monkeypatch.setattr(os, "posix_fallocate", fail)
    with pytest.raises(type(error)):
        store.add({"b": 2, "c": 3})
    assert sorted(file.name for file in store.path.iterdir()) == ["a", "index.json"]
    assert store.add({"b": 2, "c": 3}).names == ("a", "b", "c")


def test_sizes_that_no_disk_has_are_an_error_of_the_disk(tmp_path):
    store = TeacherStore.create(tmp_path / "s", {"a": 4}, 10**6)
    for attempt in (
        lambda: store.add({"b": 2, "huge": 2**47}),
        lambda: TeacherStore.create(tmp_path / "t", {"huge": 2**47}, 10**6),
    ):
        with pytest.raises(OSError, match=r"expected room for \d+ bytes: .*huge/values\.npy"):
            attempt()
    assert sorted(file.name for file in tmp_path.rglob("*") if file.is_dir()) == ["a", "s"]


def test_keep_needs_row_numbers(tmp_path):
    one = TeacherStore.create(tmp_path / "s", {"a": 4}, 10)
    with pytest.raises(ValueError, match="rows: expected row numbers with present='keep', got No"):
        one.append("a", ones(3, 4), present="keep")
    assert not one.present("a").any()


@pytest.mark.parametrize("rows", [slice(5, 2), slice(-1, -3), slice(2, 5, -1), slice(20, 30)])
def test_a_slice_of_no_rows_is_empty(tmp_path, rows):
    store = TeacherStore.create(tmp_path / "s", {"a": 4}, 10)
    for reader in (store, store.subset(rows=range(10)), store.to("cpu")):
        targets, mask = reader[rows]
        assert (targets.shape, mask.shape) == ((0, 4), (0, 1))


def test_merge_takes_an_iterator(tmp_path):
    for name in "ab":
        TeacherStore.create(tmp_path / name, {name: 3}, 4).append(name, ones(4, 3))
    merged = TeacherStore.merge(tmp_path / "m", (TeacherStore(tmp_path / name) for name in "ab"))
    assert merged[:][1].all()


@pytest.mark.parametrize(
    ("names", "message"),
    [([], "at least one, got none"), (["a", "a"], "differ, got a"), (["b"], "one of a, got 'b'")],
)
def test_views_have_teachers_that_differ(tmp_path, names, message):
    store = TeacherStore.create(tmp_path / "s", {"a": 4}, 10)
    with pytest.raises(ValueError, match=message):
        store.subset(names)
