"""The teacher store where folders change under it, disks are full and arguments are unusual."""

import errno
import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
import transformers

from mtkd.teachers import TeacherStore, embed, from_arrays, hash_ids, to_npy
from mtkd.teachers import format as layout
from mtkd.trainer import Encoder


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dims": {"a": 8}}, "dim of a: expected 4, got 8"),
        ({"rows": 9}, "rows: expected 10, got 9"),
        ({"dims": {"b": 4}}, "other teachers: expected a, got none"),
    ],
)
def test_a_store_of_another_shape_is_not_unpickled(tmp_path, change, message):
    options = {"dims": {"a": 4}, "rows": 10}
    store = TeacherStore.create(tmp_path / "s", **options)
    sent = pickle.dumps(store)
    store.add({"more": 2})
    assert pickle.loads(sent).names == ("a",)
    shutil.rmtree(tmp_path / "s")
    TeacherStore.create(tmp_path / "s", **options | change)
    for attempt in (lambda: pickle.loads(sent), store.subset, lambda: store.add({"new": 3})):
        with pytest.raises(ValueError, match=f"s is another store: {message}$"):
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


@pytest.mark.parametrize("kind", [dict, transformers.BatchEncoding])
def test_embed_takes_a_hugging_face_encoder_as_the_page_says(tmp_path, kind):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "vocab_size": 20}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.BertModel(transformers.BertConfig(**sizes, **layers)).train()
    tokens = torch.randint(20, (6, 4))

    def collate(items):
        ids = torch.stack(items)
        return kind({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    wrapped = {
        "cls": model,
        "compiled": torch.compile(model, backend="eager"),
        "parallel": torch.nn.DataParallel(model),
        "both": torch.compile(torch.nn.DataParallel(model), backend="eager"),
    }
    dims = dict.fromkeys([*wrapped, "encoder"], 8)
    store = TeacherStore.create(tmp_path / "s", dims, 6, dtype="float32")
    options = {"collate_fn": collate, "device": "cpu", "batch_size": 3, "progress": False}
    first = lambda output, batch: output.last_hidden_state[:, 0]  # noqa: E731
    for name, each in wrapped.items():
        embed(each, tokens, store, name, pooling=first, **options)
        assert model.training
    embed(Encoder(model, "cls"), tokens, store, "encoder", **options)
    with torch.no_grad():
        expected = model.eval()(input_ids=tokens).last_hidden_state[:, 0]
    for part in store[:][0].split(8, 1):
        torch.testing.assert_close(part, expected)


def test_a_module_may_take_the_mapping_itself(tmp_path):
    class Model(torch.nn.Module):
        def forward(self, batch):
            return batch["x"].float()

    items = [{"x": torch.ones(3)} for _ in range(4)]
    store = TeacherStore.create(tmp_path / "s", {"a": 3}, 4)
    assert embed(Model(), items, store, "a", progress=False) == 4


class Passing(torch.nn.Module):
    """A wrapper that passes on what it gets."""

    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, *args, **kwargs):
        return self.inside(*args, **kwargs)


class Named(torch.nn.Module):
    def forward(self, x, **kwargs):
        return x.float()


@pytest.mark.parametrize("wrap", [Passing, lambda model: Passing(Passing(model))])
def test_a_wrapper_is_called_as_what_is_in_it(tmp_path, wrap):
    class Whole(torch.nn.Module):
        def forward(self, batch):
            return 2 * batch["x"].float()

    items = [{"x": torch.ones(3), "row": 0} for _ in range(4)]
    store = TeacherStore.create(tmp_path / "s", {"named": 3, "whole": 3}, 4)
    embed(wrap(Named()), items, store, "named", progress=False)
    embed(wrap(Whole()), items, store, "whole", progress=False)
    assert store[:][0].tolist() == [[1.0] * 3 + [2.0] * 3] * 4


def test_a_model_of_another_revision_is_refused_before_it_is_called(tmp_path):
    def model(batch):
        raise AssertionError("called")

    options = {"dims": {"a": 3, "b": 3}, "revision": {"a": "v1"}, "rows": 4}
    store = TeacherStore.create(tmp_path / "s", **options)
    for name, revision, message in (
        ("a", "v2", "revision: expected 'v1', as the store has it of a, got 'v2'"),
        ("b", "v2", r"has none of b, got 'v2'; give revision={'b': 'v2'} to TeacherStore\.create"),
        ("c", "v2", "teacher: expected one of a, b, got 'c'"),
    ):
        with pytest.raises(ValueError, match=message):
            embed(model, ones(4, 3), store, name, revision=revision, progress=False)
    identity = torch.nn.Identity()
    assert embed(identity, ones(4, 3), store, "a", revision="v1", progress=False) == 4
    with pytest.raises(ValueError, match="expected 'v1'"):  # where nothing is left to compute too
        embed(identity, ones(4, 3), store, "a", revision="v2", progress=False)
    assert embed(identity, ones(4, 3), store, "b", progress=False) == 4


def test_a_store_is_shown_in_one_line(tmp_path):
    dims = {"clip": 24, "dino": 16}
    store = TeacherStore.create(tmp_path / "s", dims, 10, dtype={"dino": "int8"})
    path = repr(str(tmp_path / "s"))
    assert repr(store) == f"TeacherStore(clip 24 float16, dino 16 int8; 10 rows; {path})"
    shown = f"TeacherStore(dino 16 int8; 1 of 2 teachers; 3 rows chosen of 10; {path})"
    assert str(store.subset(["dino"], [4, 2, 3])) == shown
    resident = store.to("cpu")
    assert repr(resident) == "ResidentStore(clip 24, dino 16; 10 rows; float32 on cpu)"
    many = TeacherStore.create(tmp_path / "many", {f"t{n}": 1 for n in range(100)}, 1)
    assert "t7 1 float16, 92 more; 1 rows" in repr(many)


def test_differences_of_many_teachers_are_a_short_message(tmp_path):
    dims = {f"t{number}": 2 for number in range(100)}
    TeacherStore.create(tmp_path / "s", dims, 4)
    for change, message in (
        ({"dtype": "int8"}, "dtype of t7: expected 'int8', got 'float16'; 92 more"),
        ({"dims": dims | {"new": 1}}, "other teachers: expected new, got none"),
        ({"dims": {"t0": 2}}, "other teachers: expected none, got t1, .* t8, 91 more"),
        (
            {"dims": {"t1": 2, "t0": 2} | dims},
            "another store: order of teachers: expected t1, t0, got t0, t1",
        ),
    ):
        with pytest.raises(ValueError, match=f"{message}$"):
            TeacherStore.create(tmp_path / "s", **{"dims": dims} | change, rows=4, exist_ok=True)


def test_a_file_that_cannot_be_written_leaves_what_was_there(tmp_path, monkeypatch):
    store = TeacherStore.create(tmp_path / "s", {"a": 4}, 10)
    store.append("a", ones(10, 4))
    to_npy(store, "a", tmp_path / "out.npy")
    before = (tmp_path / "out.npy").read_bytes()

    def refuse(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("posix_fallocate", "pwrite"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, refuse)
            with pytest.raises(OSError, match="No space left on device"):
                to_npy(store, "a", tmp_path / "out.npy")
        assert (tmp_path / "out.npy").read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.npy", "s"]


def test_to_npy_does_not_write_into_the_store(tmp_path):
    store = TeacherStore.create(tmp_path / "s", {"a": 4}, 10)
    store.append("a", ones(10, 4))
    (tmp_path / "link.npy").symlink_to(tmp_path / "s/a/values.npy")
    for path in (tmp_path / "s/a/values.npy", tmp_path / "link.npy", tmp_path / "s/new.npy"):
        with pytest.raises(ValueError, match="path: expected a file outside the store, got"):
            to_npy(store, "a", path)
    assert store.verify() == {}
    assert store[:][1].all()


def test_an_empty_folder_stays_what_it_is(tmp_path, monkeypatch):
    (tmp_path / "s").mkdir(mode=0o700)
    before = (tmp_path / "s").stat()
    replace = os.replace

    def busy(source, target):  # as a mount is
        if os.fspath(target) == str(tmp_path / "s"):
            raise OSError(errno.EBUSY, "Device or resource busy")
        replace(source, target)

    monkeypatch.setattr(os, "replace", busy)
    (tmp_path / f"s/.making.{'0' * 32}").mkdir()  # what a killed process leaves
    with pytest.raises(ValueError, match="a: expected finite numbers"):
        from_arrays(tmp_path / "s", {"a": ones(10, 4) / 0})
    assert list((tmp_path / "s").iterdir()) == []
    from_arrays(tmp_path / "s", {"a": ones(10, 4)})
    after = (tmp_path / "s").stat()
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert sorted(file.name for file in (tmp_path / "s").iterdir()) == ["a", "index.json"]
    assert [file.name for file in tmp_path.iterdir()] == ["s"]
    with pytest.raises(ValueError, match="path: expected a new or an empty folder"):
        TeacherStore.create(tmp_path / "s", {"a": 4}, 10)


def test_a_folder_that_cannot_be_completed_is_left_empty(tmp_path, monkeypatch):
    (tmp_path / "s").mkdir()
    replace, index = os.replace, str(tmp_path / "s/index.json")

    def fail(source, target):
        if os.fspath(target) == index:
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="Input/output error"):
        TeacherStore.create(tmp_path / "s", {"a": 4}, 10)
    assert list((tmp_path / "s").iterdir()) == []


def test_numbers_of_numpy_are_numbers(tmp_path):
    kinds = {"dims": {"a": np.int32(4)}, "rows": np.int64(3)}
    store = TeacherStore.create(tmp_path / "s", **kinds, ids=np.arange(5, 8))
    assert store.ids == hash_ids([5, 6, 7]) == hash_ids(torch.arange(5, 8))
    assert hash_ids(np.array(["x", "y"])) == hash_ids(list(np.array(["x", "y"]))) == hash_ids("xy")
    assert embed(torch.nn.Identity(), ones(3, 4), store, "a", batch_size=np.int64(2)) == 3


def test_a_version_is_a_number(tmp_path):
    store = TeacherStore.create(tmp_path / "s", {"a": 4}, 3)
    content = json.loads((store.path / "index.json").read_text()) | {"version": True}
    del content["checksum"]
    content["checksum"] = layout._checksum(content)
    (store.path / "index.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"expected mtkd\.teachers version 1, got .* version True"):
        TeacherStore.open(store.path)


def test_float16_takes_what_rounds_to_its_largest(tmp_path):
    store = TeacherStore.create(tmp_path / "s", {"a": 1}, 2)
    store.append("a", torch.tensor([[65519.0]]))
    assert store[[0]][0].item() == 65504
    with pytest.raises(ValueError, match="expected magnitudes that round to at most 65504"):
        store.append("a", torch.tensor([[65520.0]]))
