"""The teacher store: what is written is read, in every dtype; views, copies, exchange, errors."""

import errno
import os
import pickle
import re
from collections import namedtuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import store as store_benchmark
from mtkd.teachers import (
    TeacherStore,
    embed,
    from_arrays,
    from_dataset,
    hash_ids,
    to_dataset,
    to_npy,
)

DTYPES = ("float16", "bfloat16", "float32", "int8")


def random(rows, width, seed=0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def filled(path, dims, rows, dtype="float16"):
    """A store with every row, and what was written by teacher."""
    store = TeacherStore.create(path, dims, rows, dtype=dtype)
    values = {name: random(rows, dim, seed) for seed, (name, dim) in enumerate(dims.items())}
    for name, each in values.items():
        assert store.append(name, each) == rows
    return store, values


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_rows_come_back_rounded_to_the_stored_dtype(tmp_path, dtype):
    store, values = filled(tmp_path / "s", {"a": 5, "b": 3}, 20, dtype)
    rows = torch.tensor([3, 19, 0, 3])
    targets, mask = store[rows]
    stored = getattr(torch, dtype)
    assert targets.dtype == store.dtype == stored
    assert torch.equal(targets, torch.cat([values["a"], values["b"]], 1)[rows].to(stored))
    assert mask.shape == (4, 2)
    assert mask.all()
    assert targets.is_contiguous()


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    return TeacherStore.create(tmp_path_factory.mktemp("int8") / "s", {"a": 16}, 8, dtype="int8")


@given(st.integers(0, 2**31), st.floats(-38, 30), st.sampled_from([torch.float32, torch.bfloat16]))
def test_int8_is_within_half_a_step_of_its_row(eight, seed, exponent, dtype):
    values = (random(8, 16, seed) * 10.0**exponent).to(dtype)
    values[0] = 0
    eight.discard("a", range(8))
    eight.append("a", values)
    targets, _ = eight[:]
    step = values.float().abs().amax(1, keepdim=True) / 127
    error = (targets - values.float()).abs()
    # Rounding of the scale itself, and numbers too small for float32's full precision.
    assert (error <= 0.5 * step * (1 + 1e-4) + 1e-42).all()
    assert (targets[0] == 0).all()


def test_bfloat16_is_exact(tmp_path):
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    every = every[every.isfinite()].view(-1, 16)
    store = TeacherStore.create(tmp_path / "s", {"a": 16}, len(every), dtype=torch.bfloat16)
    store.append("a", every)
    assert torch.equal(store[:][0].view(torch.int16), every.view(torch.int16))
    assert np.load(tmp_path / "s/a/values.npy").dtype == np.uint16


def test_a_disk_without_room_is_an_error_at_once(tmp_path, monkeypatch):
    def refuse(descriptor, start, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(OSError, match=r"expected room for 200 bytes: .*a/values\.npy"):
        TeacherStore.create(tmp_path / "s", {"a": 5}, 20)
    assert list(tmp_path.iterdir()) == []


def test_room_is_taken_where_nothing_can_be_allocated(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    store, values = filled(tmp_path / "s", {"a": 5}, 20)
    assert torch.equal(TeacherStore.open(tmp_path / "s")[:][0], values["a"].half())
    assert store.verify() == {}


def test_files_are_plain_npy(tmp_path):
    _, values = filled(tmp_path / "s", {"a": 5}, 20)
    array = np.load(tmp_path / "s/a/values.npy")
    assert np.array_equal(array, values["a"].half().numpy())


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("kinds", [DTYPES[:1], ("bfloat16",) * 2, ("int8",) * 3, DTYPES])
def test_absent_rows_are_zero_and_resident_equals_mapped(tmp_path, kinds, resident):
    names = [f"t{number}" for number in range(len(kinds))]
    dims = {name: 3 + number for number, name in enumerate(names)}
    store = TeacherStore.create(
        tmp_path / "s", dims, 9000, dtype=dict(zip(names, kinds, strict=True))
    )
    expected, present = [], []
    for number, (name, dim) in enumerate(dims.items()):
        rows = torch.randperm(9000)[: 5000 + number]
        values = random(len(rows), dim)
        store.append(name, values, rows)
        alone, there = store.subset([name])[rows]
        assert there.all()
        expected.append(torch.zeros(9000, dim, dtype=store.dtype))
        expected[-1][rows] = alone.to(store.dtype)
        present.append(torch.zeros(9000, dtype=torch.bool).index_fill(0, rows, True))
        # What an absent row holds on the disk is never read.
        column, absent = store._column(name), np.flatnonzero(~present[-1].numpy())[:1]
        column._put("values.npy", absent, np.ones((1, dim), column.arrays["values.npy"].dtype))
        if column.scales is not None:
            column._put("scales.npy", absent, np.full(1, np.nan, np.float32))
    reader = store.to("cpu") if resident else store
    rows = torch.randperm(9000)
    targets, mask = reader[rows]
    assert torch.equal(targets, torch.cat(expected, 1)[rows])
    assert torch.equal(mask, torch.stack(present, 1)[rows])
    assert reader.dims == store.dims
    assert len(reader) == 9000
    assert [tuple(each.shape) for each in reader[[]]] == [(0, sum(dims.values())), (0, len(dims))]


@pytest.mark.parametrize(
    "rows",
    [
        [4, 2],
        (4, 2),
        range(4, 1, -2),
        np.array([4, 2], np.uint8),
        np.array([4, 2], np.int32),
        torch.tensor([4, 2], dtype=torch.int32),
        slice(4, 1, -2),
    ],
    ids=str,
)
def test_rows_may_be_any_integers(tmp_path, rows):
    store, values = filled(tmp_path / "s", {"a": 5}, 6, "float32")
    assert torch.equal(store[rows][0], values["a"][[4, 2]])
    assert torch.equal(store.to("cpu")[rows][0], values["a"][[4, 2]])


def test_out_is_filled_again(tmp_path):
    store, values = filled(tmp_path / "s", {"a": 5}, 20, "float32")
    first = store[[1, 2]]
    again = store.read([3, 4], out=first)
    assert again[0].data_ptr() == first[0].data_ptr()
    assert torch.equal(first[0], values["a"][[3, 4]])
    with pytest.raises(ValueError, match=r"out: expected targets \(3, 5\)"):
        store.read([1, 2, 3], out=first)


def test_append_continues_and_keeps(tmp_path):
    store = TeacherStore.create(tmp_path / "s", {"a": 2}, 6, dtype="float32")
    assert store.append("a", torch.ones(2, 2)) == 2
    assert store.append("a", np.full((2, 2), 2.0)) == 2
    assert store.append("a", torch.full((4, 2), 3.0), [5, 1, 4, 0], present="keep") == 2
    assert store[:][0][:, 0].tolist() == [1, 1, 2, 2, 3, 3]
    store.discard("a", [2, 2])
    assert store.present("a").tolist() == [True, True, False, True, True, True]
    assert store[[2]][0].tolist() == [[0, 0]]
    assert store.append("a", torch.full((1, 2), 7.0), [2]) == 1
    assert store.verify() == {}


def bad_appends():
    ones = torch.ones(2, 3)
    nan, inf = ones.clone(), ones.clone().double()
    nan[1, 2], inf[0, 0] = float("nan"), float("inf")
    return [
        (
            ValueError,
            "f16: expected values of shape (2, 3), got shape (2, 4)",
            "f16",
            ones[:, :1].expand(2, 4),
            [4, 5],
        ),
        (
            ValueError,
            "f16: expected values of shape (3, 3), got shape (2, 3)",
            "f16",
            ones,
            [4, 5, 6],
        ),
        (
            ValueError,
            "bf16: expected finite numbers, got NaN or infinity in rows 5",
            "bf16",
            nan,
            [4, 5],
        ),
        (
            ValueError,
            "int8: expected finite numbers, got NaN or infinity in rows 4",
            "int8",
            inf,
            [4, 5],
        ),
        (
            ValueError,
            "at most 65504, since it is stored as float16, got larger ones in rows 4, 5",
            "f16",
            ones * 65520,
            [4, 5],
        ),
        (
            ValueError,
            "bf16: expected magnitudes that round to at most 3.38953e+38",
            "bf16",
            ones * 3.4e38,
            [4, 5],
        ),
        (
            ValueError,
            "int8: expected numbers within float32, got larger ones",
            "int8",
            ones.double() * 1e60,
            [4, 5],
        ),
        (
            ValueError,
            "f16: expected rows that are absent, got 1 that are present, such as 1",
            "f16",
            ones,
            [1, 5],
        ),
        (ValueError, "rows: expected rows that differ", "f16", ones, [5, 5]),
        (
            ValueError,
            "rows: expected numbers from 0 to 9, got some from 5 to 10",
            "f16",
            ones,
            [5, 10],
        ),
        (
            ValueError,
            "rows: expected numbers from 0 to 9, got some from -1 to 5",
            "f16",
            ones,
            [-1, 5],
        ),
        (ValueError, "teacher: expected one of f16, bf16, int8, got 'f17'", "f17", ones, [4, 5]),
        (
            TypeError,
            "f16: expected floating-point values, got torch.int64",
            "f16",
            ones.long(),
            [4, 5],
        ),
        (
            TypeError,
            "f16: expected floating-point values, got object",
            "f16",
            np.full((2, 3), None),
            [4, 5],
        ),
        (TypeError, "f16: expected values in a tensor or an array, got list", "f16", [[1.0]], [4]),
        (
            TypeError,
            "rows: expected integers, got torch.float32",
            "f16",
            ones,
            torch.tensor([4.0, 5]),
        ),
        (TypeError, "rows: expected integers, got torch.bool", "f16", ones, torch.ones(10) > 0),
        (
            TypeError,
            "rows: expected a tensor, array, list or slice of integers, got int",
            "f16",
            ones,
            4,
        ),
    ]


@pytest.mark.parametrize(("error", "message", "teacher", "values", "rows"), bad_appends())
def test_bad_values_are_named_and_nothing_is_written(
    tmp_path, error, message, teacher, values, rows
):
    dtypes = {"f16": "float16", "bf16": "bfloat16", "int8": "int8"}
    store = TeacherStore.create(tmp_path / "s", dict.fromkeys(dtypes, 3), 10, dtype=dtypes)
    for name in dtypes:
        store.append(name, torch.ones(2, 3))
    before = {file: file.read_bytes() for file in store.path.rglob("*.*")}
    with pytest.raises(error, match=re.escape(message)):
        store.append(teacher, values, rows)
    assert {file: file.read_bytes() for file in store.path.rglob("*.*")} == before


def test_views_and_copies_of_views(tmp_path):
    store, values = filled(tmp_path / "s", {"a": 5, "b": 3, "c": 2}, 20, "float32")
    view = store.subset(["c", "a"], [7, 3, 11]).subset(rows=[2, 0])
    expected = torch.cat([values["c"], values["a"]], 1)[[11, 7]]
    assert view.names == ("c", "a")
    assert view.dims == {"c": 2, "a": 5}
    assert len(view) == 2
    for reader in (view, view.to("cpu"), pickle.loads(pickle.dumps(view))):
        assert torch.equal(reader[:][0], expected)
    copy = TeacherStore.merge(tmp_path / "copy", [view])
    assert torch.equal(copy[:][0], expected)
    assert len(pickle.dumps(store)) < 1000


def test_merge_of_teachers_and_of_rows(tmp_path):
    one, _ = filled(tmp_path / "1", {"a": 5}, 20, "int8")
    two, _ = filled(tmp_path / "2", {"b": 3}, 20, "bfloat16")
    three = TeacherStore.create(tmp_path / "3", {"c": 2}, 20)
    four = TeacherStore.create(tmp_path / "4", {"c": 2}, 20)
    c = random(20, 2)
    three.append("c", c[:8], range(8))
    four.append("c", c[10:], range(10, 20))
    merged = TeacherStore.merge(tmp_path / "m", [one, two, three, four])
    assert merged.names == ("a", "b", "c")
    for name, source in (("a", one), ("b", two)):
        assert torch.equal(merged.subset([name])[:][0], source[:][0])
    assert merged.present("c").tolist() == [True] * 8 + [False] * 2 + [True] * 10
    assert torch.equal(merged.subset(["c"])[10:][0], c[10:].half())
    assert merged.verify() == {}
    four.append("c", c[7:9], [7, 8])
    with pytest.raises(ValueError, match="expected each row of c in one store, got row 7 in sev"):
        TeacherStore.merge(tmp_path / "n", [three, four])
    assert not (tmp_path / "n").exists()
    assert [file.name for file in tmp_path.glob(".*")] == []


def test_merge_checks_what_it_joins(tmp_path):
    def make(name, rows=4, **options):
        options = {"dims": {"a": 2}, "dtype": "float16"} | options
        return TeacherStore.create(tmp_path / name, rows=rows, **options)

    first = make("1", ids="wxyz")
    for number, (other, message) in enumerate(
        [
            (make("2", rows=5), "stores[1]: expected 4 rows like stores[0], got 5"),
            (make("3", dims={"a": 3}), "stores[1]: dim of a: expected 2, got 3"),
            (make("4", dtype="int8"), "stores[1]: dtype of a: expected 'float16', got 'int8'"),
            (make("5", ids="abcd"), "stores[1]: expected row ids of hash"),
        ]
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            TeacherStore.merge(tmp_path / f"m{number}", [first, other])
    with pytest.raises(ValueError, match="stores: expected at least one"):
        TeacherStore.merge(tmp_path / "m", [])
    merged = TeacherStore.merge(tmp_path / "m", [make("6"), first])
    assert merged.ids == first.ids == hash_ids("wxyz")


def test_merge_refuses_rows_that_are_not_what_was_written(tmp_path):
    store, _ = filled(tmp_path / "s", {"a": 2}, 4)
    with open(tmp_path / "s/a/values.npy", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    assert {name: rows.tolist() for name, rows in store.verify().items()} == {"a": [3]}
    view = store.subset(rows=[3, 1])
    assert {name: rows.tolist() for name, rows in view.verify().items()} == {"a": [0]}
    with pytest.raises(ValueError, match="expected rows that have their checksums, got 1"):
        TeacherStore.merge(tmp_path / "m", [store])
    for name, rows in store.verify().items():
        store.discard(name, rows)
    assert TeacherStore.merge(tmp_path / "m", [store]).present("a").tolist() == [True] * 3 + [False]


def test_teachers_are_added_in_place(tmp_path):
    store, values = filled(tmp_path / "s", {"a": 5}, 20, "float32")
    (tmp_path / "s/b").mkdir()  # what a killed process leaves
    more = store.add({"b": 3}, dtype="float32", revision={"b": "v1"})
    more.append("b", values["a"][:, :3])
    assert TeacherStore.open(tmp_path / "s").names == more.names == ("a", "b")
    assert more.revisions == {"a": None, "b": "v1"}
    assert torch.equal(more[:][0], torch.cat([values["a"], values["a"][:, :3]], 1))
    with pytest.raises(ValueError, match="expected names that differ, got a twice"):
        store.add({"a": 3})
    assert torch.equal(TeacherStore.open(tmp_path / "s")[:][0], more[:][0])


def test_create_opens_the_same_and_refuses_another(tmp_path):
    options = {"dims": {"a": 5}, "rows": 3, "ids": ["x", "y", "z"], "revision": {"a": "main"}}
    store = TeacherStore.create(tmp_path / "deep/s", **options)
    store.append("a", torch.ones(3, 5))
    again = TeacherStore.create(tmp_path / "deep/s", **options, exist_ok=True)
    assert again[:][1].all()
    with pytest.raises(ValueError, match="path: expected a new or an empty folder"):
        TeacherStore.create(tmp_path / "deep/s", **options)
    for change, message in (
        ({"dims": {"a": 4}}, "dim of a: expected 4, got 5"),
        (
            {"rows": 4, "ids": None},
            f"rows: expected 4, got 3; hash of ids: expected None, got '{store.ids}'",
        ),
        ({"ids": "xyw"}, f"hash of ids: expected '{hash_ids('xyw')}', got '{store.ids}'"),
        ({"revision": None}, "revision of a: expected None, got 'main'"),
        ({"dtype": "int8"}, "dtype of a: expected 'int8', got 'float16'"),
        ({"dims": {"b": 5, "a": 5}}, "other teachers: expected b, got none"),
    ):
        # to its end: what is the same is not named
        with pytest.raises(ValueError, match=f"s is another store: {re.escape(message)}$"):
            TeacherStore.create(tmp_path / "deep/s", **options | change, exist_ok=True)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "teachers: expected at least one", {"dims": {}}),
        (ValueError, "rows: expected a positive integer, got 0", {"rows": 0}),
        (ValueError, "rows: expected a positive integer, got True", {"rows": True}),
        (ValueError, "dim of a: expected a positive integer, got 2.0", {"dims": {"a": 2.0}}),
        (ValueError, "dtype of a: expected one of float16, bf", {"dtype": torch.float64}),
        (
            ValueError,
            "dtype: expected some of the teachers ['a'], got ['b']",
            {"dtype": {"b": "int8"}},
        ),
        (ValueError, "revision: expected some of the teachers", {"revision": {"b": "main"}}),
        (ValueError, "revision of a: expected a string or None, got int", {"revision": {"a": 3}}),
        (ValueError, "ids: expected one for each of 4 rows, got 3", {"ids": "xyz"}),
        (TypeError, "ids: expected strings or integers, got int", {"ids": 5}),
        (TypeError, "revision: expected a mapping name -> revision, got str", {"revision": "x"}),
        (TypeError, "ids[0]: expected a string or an integer, got float", {"ids": [1.0] * 4}),
        (TypeError, "dims: expected a mapping name -> width, got list", {"dims": [4]}),
        (ValueError, "expected names that differ, got A twice", {"dims": {"a": 1, "A": 2}}),
        *[
            (ValueError, "teachers: expected names of at most 100 letters", {"dims": {name: 2}})
            for name in ("", ".", "..", "a/b", "/a", "a\\b", "a\n", "INDEX.json", "é", "a" * 101, 3)
        ],
    ],
    ids=str,
)
def test_bad_stores_are_refused(tmp_path, error, message, options):
    with pytest.raises(error, match=re.escape(message)):
        TeacherStore.create(tmp_path / "s", **{"dims": {"a": 2}, "rows": 4} | options)
    assert list(tmp_path.iterdir()) == []


def test_ids_are_told_apart():
    ids = [["a", "b"], ["b", "a"], ["ab", ""], ["", "ab"], [1, 12], [11, 2], ["1,", "2"]]
    assert len({hash_ids(each) for each in ids}) == len(ids)


def test_embed_resumed_equals_uninterrupted(tmp_path):
    items, model = random(50, 16), torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Dropout())
    model.requires_grad_(False)[1].eval()
    model[0].train()
    whole, part = (TeacherStore.create(tmp_path / name, {"a": 8}, 50) for name in "wp")
    assert embed(model, items, whole, "a", batch_size=7, progress=False) == 50
    assert (model.training, model[0].training, model[1].training) == (True, True, False)

    def limited(batch, left=[4]):  # noqa: B006
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("stopped")
        return model.eval()(batch)

    with pytest.raises(RuntimeError, match="stopped"):
        embed(limited, items, part, "a", batch_size=7, write_every=2, progress=False)
    part.discard("a", [3])
    assert embed(model, items, part, "a", batch_size=7, rank=1, world_size=2, progress=False) == 22
    assert embed(model, items, part, "a", batch_size=7, progress=True, num_workers=0) == 1
    assert torch.equal(whole[:][0], part[:][0])
    assert part.verify() == {}


def test_embed_takes_any_model_and_any_rows(tmp_path):
    Output = namedtuple("Output", "last_hidden_state")
    store = TeacherStore.create(tmp_path / "s", {"pooled": 4, "arrays": 4}, 10, dtype="float32")
    texts = ["one", "two", "three"]

    def collate(items):
        return {"lengths": torch.tensor([[len(item)] for item in items]), "texts": items}

    def model(batch):
        assert batch["lengths"].device.type == "cpu"
        return Output(batch["lengths"].float()[:, None].expand(-1, 5, 4))

    def pool(output, batch):
        return output.last_hidden_state.mean(1) + len(batch["texts"])

    options = {"rows": [9, 0, 4], "batch_size": 2, "progress": False}
    embed(model, texts, store, "pooled", collate_fn=collate, pooling=pool, device="cpu", **options)
    encode = lambda batch: np.array([[len(text)] * 4 for text in batch], np.float32)  # noqa: E731
    embed(encode, texts, store, "arrays", collate_fn=list, **options)
    targets, mask = store[[9, 0, 4, 5]]
    assert targets[:, 0].tolist() == [5, 5, 6, 0]
    assert targets[:, 4].tolist() == [3, 3, 5, 0]
    assert mask.tolist() == [[True, True]] * 3 + [[False, False]]


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (
            ValueError,
            "a: expected values of shape (4, 3), got shape (4, 2)",
            {"model": lambda x: x[:, :2]},
        ),
        (
            ValueError,
            "a: expected finite numbers, got NaN or infinity in rows 0",
            {"model": lambda x: x / 0},
        ),
        (
            TypeError,
            "a: expected values in a tensor or an array, got dict",
            {"model": lambda x: {}},
        ),
        (ValueError, "dataset: expected 8 items, as the store has", {"dataset": torch.ones(7, 3)}),
        (ValueError, "rows: expected one for each of 8 items, got 2", {"rows": [1, 2]}),
        (ValueError, "rows: expected rows that differ", {"rows": [1] * 8}),
        (ValueError, "batch_size: expected a positive integer, got 0", {"batch_size": 0}),
        (ValueError, "batch_size: expected a positive integer, got 2.0", {"batch_size": 2.0}),
        (TypeError, "dataset: expected items by number and their", {"dataset": iter([[1.0]])}),
        (ValueError, "write_every: expected a positive integer, got 0", {"write_every": 0}),
        (ValueError, "rank: expected rank and world_size, or neither", {"rank": 1}),
        (ValueError, "rank: expected a number from 0 to 1, got 2", {"rank": 2, "world_size": 2}),
        (ValueError, "teacher: expected one of a, got 'b'", {"teacher": "b"}),
    ],
    ids=str,
)
def test_embed_names_what_is_wrong(tmp_path, error, message, change):
    store = TeacherStore.create(tmp_path / "s", {"a": 3}, 8)
    store.append("a", torch.ones(1, 3), [7])
    options = {"model": lambda x: x, "dataset": torch.ones(8, 3), "teacher": "a", "batch_size": 4}
    options |= {"store": store, "progress": False} | change
    with pytest.raises(error, match=re.escape(message)):
        embed(**options)
    assert store.present("a").sum() == 1


def test_arrays_in_and_out(tmp_path):
    a, b = random(5000, 4).numpy(), random(5000, 3)
    np.save(tmp_path / "a.npy", a)
    store = from_arrays(
        tmp_path / "s", {"a": tmp_path / "a.npy", "b": b}, dtype={"a": "float32", "b": "bfloat16"}
    )
    to_npy(store, "a", tmp_path / "out.npy")
    assert np.array_equal(np.load(tmp_path / "out.npy"), a)
    to_npy(store, "b", tmp_path / "out.npy")
    assert np.array_equal(np.load(tmp_path / "out.npy"), b.bfloat16().float().numpy())
    store.discard("b", [1])
    with pytest.raises(ValueError, match="b: expected every row to be present, got 1 absent"):
        to_npy(store, "b", tmp_path / "out.npy")


def test_bad_arrays_leave_nothing_behind(tmp_path):
    np.save(tmp_path / "pickled.npy", np.array([{}], object), allow_pickle=True)
    good, bad = torch.ones(4, 3), torch.full((4, 3), float("nan"))
    for arrays, message in [
        ({"a": tmp_path / "pickled.npy"}, "a: expected a plain .npy file"),
        ({"a": good, "b": bad}, "b: expected finite numbers"),
        ({"a": good, "b": good[:2]}, "arrays: expected as many rows of every teacher"),
        ({"a": good[0]}, "a: expected shape (rows, width), got shape (3,)"),
        ({}, "arrays: expected at least one teacher, got none"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            from_arrays(tmp_path / "s", arrays)
    assert [file.name for file in tmp_path.iterdir()] == ["pickled.npy"]


def test_hugging_face_datasets_in_and_out(tmp_path):
    datasets = pytest.importorskip("datasets")
    store, values = filled(tmp_path / "s", {"a": 5, "b": 3}, 20, {"a": "float16", "b": "bfloat16"})
    store.discard("b", [4, 7])
    texts = datasets.Dataset.from_dict({"text": [f"text {row}" for row in range(20)]})
    made = to_dataset(store, texts.select(range(19, -1, -1)))
    assert made.column_names == ["text", "a", "b"]
    assert made[0]["text"] == "text 19"
    assert made[4]["b"] is None
    assert made.with_format("torch")[[3]]["a"].equal(values["a"][[3]].half().float())
    kinds = {"first": "float16", "second": "bfloat16"}
    back = from_dataset(tmp_path / "t", made, {"first": "a", "second": "b"}, dtype=kinds)
    assert all(map(torch.equal, back[:], store[:]))
    shuffled = from_dataset(tmp_path / "u", made.select([5, 4, 3]), ["b"], dtype="float32")
    assert shuffled[:][1][:, 0].tolist() == [True, False, True]
    assert torch.equal(shuffled[[0]][0], store.subset(["b"])[[5]][0].float())
    ragged = datasets.Dataset.from_dict({"a": [[1.0, 2.0], [3.0]]})
    with pytest.raises(ValueError, match="a: expected lists of 2 numbers"):
        from_dataset(tmp_path / "v", ragged, ["a"])
    with pytest.raises(ValueError, match="columns: expected some of"):
        from_dataset(tmp_path / "v", ragged, ["b"])
    assert not (tmp_path / "v").exists()


def test_the_benchmark_runs(tmp_path, capsys):
    sizes = ["--rows", "64", "--width", "8", "--batch", "16", "--repeats", "2"]
    store_benchmark.main(["--teachers", "1", "3", *sizes, "--folder", str(tmp_path)])
    assert "3 x 8 float16, 16 of 64 rows" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
