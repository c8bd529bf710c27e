"""The teacher store where somebody else's files are in the way, and arguments are mistaken."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from mtkd.teachers import TeacherStore, from_arrays, from_dataset
from mtkd.teachers import folder as folders

HEX = "0" * 32


@pytest.fixture
def store(tmp_path):
    made = TeacherStore.create(tmp_path / "s", {"a": 4, "b": 2}, 10)
    made.append("a", torch.arange(40.0).view(10, 4))
    return made


# -- what others have put into the folder


def put_text(folder):
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")


def put_rows(folder):
    folder.mkdir()
    np.save(folder / "values.npy", np.ones((10, 2), np.float16))


def put_text_of_a_known_name(folder):
    folder.mkdir()
    (folder / "present.npy").write_text("mine")


def put_folder(folder):
    (folder / "values.npy").mkdir(parents=True)


def put_file(folder):
    folder.write_text("mine")


def put_link(folder):
    elsewhere = folder.parent.parent / "elsewhere"
    elsewhere.mkdir()
    folder.symlink_to(elsewhere)


def tree(folder):
    return {
        path: path.read_bytes() if path.is_file() else path.is_symlink()
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize(
    "put", [put_text, put_rows, put_text_of_a_known_name, put_folder, put_file, put_link]
)
def test_add_leaves_what_others_have_put_there(tmp_path, store, put):
    put(store.path / "mine")
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=r"path: expected no .*s/mine before mine is added, got"):
        store.add({"new": 3, "mine": 2})
    assert tree(tmp_path) == before


@pytest.mark.parametrize("kept", [b"", b"\x93NUM", None])
def test_add_goes_on_where_a_killed_one_stopped(store, kept, monkeypatch):
    class Killed(BaseException):
        """Nothing is cleared up, as after a kill."""

    def kill(*_):
        monkeypatch.setattr(folders.shutil, "rmtree", lambda *_, **__: None)
        raise Killed

    with monkeypatch.context() as patch:  # killed before the index is written
        patch.setattr(folders, "replace_file", kill)
        with pytest.raises(Killed):
            store.add({"c": 2}, dtype="int8")
    monkeypatch.undo()
    assert sorted(path.name for path in (store.path / "c").iterdir())[-1] == "values.npy"
    if kept is not None:  # killed earlier still
        (store.path / "c/scales.npy").unlink()
        (store.path / "c/present.npy").write_bytes(kept)
    added = store.add({"c": 3})
    assert added.dims == {"a": 4, "b": 2, "c": 3}
    assert not added.present("c").any()


@pytest.mark.parametrize("begin", [".making.", ".moving."])
@pytest.mark.parametrize("kind", ["file", "link", "link to a folder", "dangling link"])
def test_foreign_files_of_our_names_are_in_the_way_and_stay(tmp_path, begin, kind):
    there, elsewhere = tmp_path / "s", tmp_path / "elsewhere"
    there.mkdir()
    entry = there / f"{begin}{HEX}"
    if kind == "file":
        entry.write_text("mine")
    else:
        if kind == "link to a folder":
            elsewhere.mkdir()
            (elsewhere / "a").write_text("mine")
        elif kind == "link":
            elsewhere.write_text("mine")
        entry.symlink_to(elsewhere)
    before = tree(tmp_path)
    for exist_ok in (True, False):
        with pytest.raises(ValueError, match=f"path: expected a new or an empty .* with {begin}0"):
            TeacherStore.create(there, {"a": 2}, 3, exist_ok=exist_ok)
    assert tree(tmp_path) == before


def test_an_index_that_is_nested_as_deep_as_json_reads_is_refused(store):
    file = store.path / "index.json"
    content = json.loads(file.read_text()) | {"ids": None}
    text = json.dumps(content)
    for depth in range(300, 1000):
        file.write_text(text.replace('"ids": null', '"ids": ' + "[" * depth + "]" * depth))
        with pytest.raises(ValueError, match=r"index\.json: "):
            TeacherStore.open(store.path)


def test_of_two_that_make_the_same_store_one_is_told(tmp_path, monkeypatch):
    make, path = folders.make_folder, tmp_path / "s"

    def slowly(aside, index):
        make(aside, index)
        monkeypatch.setattr(folders, "make_folder", make)
        TeacherStore.create(path, {"a": 2}, 3)  # the other is faster

    monkeypatch.setattr(folders, "make_folder", slowly)
    with pytest.raises(
        ValueError, match=r"path: expected a new .*s, which was made in the meantim"
    ):
        TeacherStore.create(path, {"a": 2}, 3)
    assert [entry.name for entry in tmp_path.iterdir()] == ["s"]
    assert TeacherStore.open(path).dims == {"a": 2}


def test_create_on_a_store_says_how_it_is_opened(store):
    with pytest.raises(ValueError, match=r"path: .* got .*; TeacherStore\.open .* exist_ok=True"):
        TeacherStore.create(store.path, {"a": 4, "b": 2}, 10)


def test_a_store_of_more_files_than_descriptors(tmp_path):
    rows = torch.arange(6.0).view(3, 2)
    many = from_arrays(tmp_path / "s", {f"t{n}": rows + n for n in range(40)}, dtype="float32")
    code = (
        "import resource, sys; from mtkd.teachers import TeacherStore\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))\n"
        "store = TeacherStore.open(sys.argv[1])\n"
        "store.discard('t39', [0])\n"
        "print(store[[2]][0].tolist()[0], store.present('t39').tolist(), store.verify())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(many.path)], capture_output=True, text=True
    )
    told = (many[[2]][0].tolist()[0], [False, True, True], {})
    assert done.stdout.split("\n")[0] == " ".join(map(str, told)), done.stderr
    assert not many.present("t39")[0]  # maps are live


def test_a_map_ends_with_the_last_that_reads_it(store):
    def mapped():
        with open("/proc/self/maps") as file:
            return sum(str(store.path) in line for line in file)

    before = mapped()
    view = store.subset(["a"])
    values = view._columns[0].values
    assert mapped() == before + 3
    del view
    assert values[3].tolist() == [12, 13, 14, 15]
    assert mapped() == before + 1
    with pytest.raises(ValueError, match="read-only"):
        store._columns[0].arrays["values.npy"][0] = 1
    del values
    assert mapped() == before


# -- arguments


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (torch.tensor([1j]), TypeError, "rows: expected integers, got torch.complex64"),
        ([2**63], ValueError, f"got some from {2**63} to {2**63}"),
        ([2**70, 1], ValueError, f"got some from 1 to {2**70}"),
        (np.array([2**64 - 1], np.uint64), ValueError, f"got some from {2**64 - 1} to"),
        (torch.tensor([2**63], dtype=torch.uint64), ValueError, f"from {2**63} to {2**63}"),
        ([None], TypeError, "rows: expected integers, got object"),
        ([[0]], ValueError, r"rows: expected shape \(n,\), got shape \(1, 1\)"),
    ],
)
def test_row_numbers_that_are_none(store, rows, error, message):
    for reader in (store, store.to("cpu")):
        with pytest.raises(error, match=message):
            reader[rows]


def test_row_numbers_of_every_integer_type(store):
    expected = store[[3, 1]][0]
    for kind in ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"):
        numbers = np.array([3, 1], kind)
        assert torch.equal(store[numbers][0], expected)
        assert torch.equal(store[torch.from_numpy(numbers)][0], expected)


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        (lambda x, m: (x,), TypeError, "out: expected two tensors, targets and mask"),
        (lambda x, m: x, TypeError, "out: expected two tensors, targets and mask"),
        (lambda x, m: (x.numpy(), m), TypeError, "out: expected two tensors, targets and mask"),
        (lambda x, m: (x[:1].expand(2, 6), m), ValueError, "expected targets whose numbers each"),
        (lambda x, m: (x, m[:, :1].expand(2, 2)), ValueError, "out: expected mask whose numbers"),
        (
            lambda x, m: (x.view(-1).as_strided((2, 6), (1, 1)), m),
            ValueError,
            r"own memory, got strides \(1, 1\)",
        ),
        (lambda x, m: (x.requires_grad_(), m), ValueError, "cpu with requires_grad"),
        (lambda x, m: (x.to("meta"), m), ValueError, "out: expected targets on the CPU .* meta"),
    ],
)
def test_memory_that_cannot_be_filled(store, out, error, message):
    with pytest.raises(error, match=message):
        store.read([1, 2], out=out(*store[[0, 0]]))


def test_memory_of_any_layout_is_filled(store):
    expected = store[[1, 2]]
    wide, tall = torch.zeros(2, 9, dtype=torch.float16), torch.zeros(6, 2, dtype=torch.float16)
    for targets in (wide[:, 2:8], tall.T):
        store.read([1, 2], out=(targets, torch.empty(2, 2, dtype=torch.bool)))
        assert torch.equal(targets, expected[0])


def test_stores_and_names_are_told_from_what_looks_like_them(tmp_path, store):
    columns = type("Dataset", (), {"column_names": ["a", "b"]})()
    for attempt, message in (
        (lambda: TeacherStore.merge(tmp_path / "m", ["m1"]), r"stores\[0\]: expected a TeacherSto"),
        (lambda: TeacherStore.merge(tmp_path / "m", store), "stores: expected several stores, got"),
        (lambda: TeacherStore.merge(tmp_path / "m", 1), "stores: expected several stores, got one"),
        (lambda: from_arrays(tmp_path / "m", [np.ones((3, 2))]), "arrays: expected a mapping from"),
        (lambda: from_dataset(tmp_path / "m", columns, "ab"), "columns: expected several names"),
        (lambda: store.subset("ab"), r"teachers: expected several names, such as \['a'\], got 'ab"),
        (lambda: store.subset(3), r"teachers: expected several names, such as \['a'\], got 3"),
    ):
        with pytest.raises(TypeError, match=message):
            attempt()
    assert [entry.name for entry in tmp_path.iterdir()] == ["s"]


def test_a_view_counts_its_own_rows(store):
    view = store.subset(rows=range(4, 10))
    assert torch.equal(view[[2]][0], store[[6]][0])
