"""Folders that are damaged or hostile: a ValueError that names the file, or verify tells."""

import json
import os
import shutil
import struct

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from mtkd.teachers import TeacherStore
from mtkd.teachers import format as layout

DIMS = {"half": 6, "brain": 5, "eight": 7}
KINDS = {"half": "float16", "brain": "bfloat16", "eight": "int8"}
FILES = ("values.npy", "checksums.npy", "present.npy")
ROWS, HEADER = 8, 128
PATHS = ["index.json", *(f"{name}/{file}" for name in DIMS for file in FILES), "eight/scales.npy"]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    store = TeacherStore.create(
        tmp_path_factory.mktemp("original") / "s", DIMS, ROWS, dtype=KINDS, ids=range(ROWS)
    )
    for name, dim in DIMS.items():
        values = torch.randn(ROWS - 2, dim, generator=torch.Generator().manual_seed(dim))
        store.append(name, values, range(1, ROWS - 1))
    return store


@pytest.fixture(scope="module")
def copy(original, tmp_path_factory):
    """A function that makes a fresh copy in one folder."""
    path = tmp_path_factory.mktemp("copy") / "s"

    def make():
        if path.exists():
            shutil.rmtree(path)
        shutil.copytree(original.path, path)
        return path

    return make


def check(path, original):
    """The store opens, and what verify does not report is what was written; or a ValueError."""
    try:
        store = TeacherStore.open(path)
    except ValueError as refused:
        return "refused" if str(path) in str(refused) else refused
    assert (store.names, store.dims, len(store)) == (original.names, original.dims, len(original))
    assert (store.ids, store.revisions) == (original.ids, original.revisions)
    broken = store.verify()
    for name in store.names:
        targets, mask = store.subset([name])[:]
        expected, _ = original.subset([name])[:]
        good = mask[:, 0].index_fill(0, broken.get(name, torch.zeros(0, dtype=torch.long)), False)
        assert torch.equal(targets[good], expected[good])
    return "reported" if broken else "intact"


def test_the_copy_is_intact(copy, original):
    assert check(copy(), original) == "intact"


@given(
    st.sampled_from(PATHS),
    st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=3
    ),
)
def test_flipped_bytes(copy, original, name, flips):
    path = copy()
    data = bytearray((path / name).read_bytes())
    for position, change in flips:
        data[int(position * len(data))] ^= change
    (path / name).write_bytes(data)
    assert check(path, original) in ("refused", "reported", "intact")


def outcomes(path, name, original, start):
    """The outcomes of flipping one bit of each byte of a file, from `start`."""
    data = (path / name).read_bytes()
    for position in range(start, len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1
        (path / name).write_bytes(flipped)
        yield check(path, original)


@pytest.mark.parametrize("name", PATHS[1:])
def test_each_byte_of_the_rows(copy, original, name):
    found = list(outcomes(copy(), name, original, HEADER))
    row = len(found) // ROWS
    assert row > 0
    if name.endswith("present.npy"):  # from absent to present, and the other way
        assert found == ["reported"] + ["intact"] * (ROWS - 2) + ["reported"]
    else:  # the first and the last row are absent
        expected = ["intact"] * row + ["reported"] * row * (ROWS - 2) + ["intact"] * row
        assert found == expected


@pytest.mark.parametrize("name", ["index.json", "eight/scales.npy"])
def test_each_byte_of_the_rest(copy, original, name):
    found = list(outcomes(copy(), name, original, 0))
    found = found if name == "index.json" else found[:HEADER]
    assert set(found) <= {"refused", "intact"}  # a change of white space is none
    assert found.count("refused") > len(found) / 3


@given(st.sampled_from(PATHS), st.floats(0, 1, exclude_max=True))
def test_truncated_files(copy, original, name, share):
    path = copy()
    data = (path / name).read_bytes()
    (path / name).write_bytes(data[: int(share * len(data))])
    assert check(path, original) == "refused"


@pytest.mark.parametrize("name", PATHS)
def test_longer_and_missing_files(copy, original, name):
    path = copy()
    with open(path / name, "ab") as file:
        file.write(b"{")
    assert check(path, original) == "refused"
    (path / name).unlink()
    assert check(path, original) == "refused"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)
KEYS = [
    "format",
    "version",
    "rows",
    "ids",
    "teachers",
    *[(n, k) for n in range(3) for k in ("name", "dim", "dtype", "revision")],
]


def write_index(path, content):
    """Write an index as a forger would: with the right checksum."""
    content.pop("checksum", None)
    content["checksum"] = layout._checksum(content)
    (path / "index.json").write_text(json.dumps(content))


@given(st.sampled_from(KEYS), json_values)
def test_forged_index(copy, original, key, value):
    path = copy()
    content = json.loads((path / "index.json").read_text())
    holder, key = (content, key) if isinstance(key, str) else (content["teachers"][key[0]], key[1])
    assume(holder[key] != value or type(holder[key]) is not type(value))
    holder[key] = value
    write_index(path, content)
    # What nothing on the disk contradicts may be forged; all else is refused.
    harmless = key in ("ids", "revision") and (value is None or isinstance(value, str))
    if not harmless:
        assert check(path, original) == "refused"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("name", "../half", "index.json: teachers: expected names of"),
        ("name", "/etc", "index.json: teachers: expected names of"),
        ("name", "brain", "expected names that differ, got brain twice"),
        ("dim", 10**14, r"half/values.npy: expected float16 of shape \(8, 100000000000000\)"),
        ("dim", 10**15, "index.json: dim of half: expected a positive integer"),
        ("dim", -6, "index.json: dim of half: expected a positive integer"),
        ("dtype", "object", "index.json: dtype of half: expected one of float16"),
        ("dtype", "float32", "half/values.npy: expected float32 of shape"),
        ("revision", ["x"], "index.json: revision of half: expected a string or None, got list"),
    ],
)
def test_forged_teacher(copy, key, value, message):
    path = copy()
    content = json.loads((path / "index.json").read_text())
    content["teachers"][0][key] = value
    write_index(path, content)
    with pytest.raises(ValueError, match=message):
        TeacherStore.open(path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{}",
        '{"format": "mtkd.teachers"}',
        "[" * 100_000,
        "1" * 5000,
        "\ufeff{}",
        "NaN",
    ],
    ids=lambda text: text[:12],
)
def test_other_json(copy, original, text):
    path = copy()
    (path / "index.json").write_text(text)
    assert check(path, original) == "refused"


def test_a_huge_index_is_not_read(copy, original):
    path = copy()
    with open(path / "index.json", "ab") as file:
        file.truncate(layout.LARGEST_INDEX + 1)
    with pytest.raises(ValueError, match=r"index\.json: expected at most 16777216 bytes, got more"):
        TeacherStore.open(path)


def test_pickled_and_misshapen_arrays(copy):
    path = copy()
    file = path / "half/values.npy"
    good = np.load(file)
    for array, message in [
        (np.array([{}] * ROWS, object), "expected float16 of shape"),
        (np.asfortranarray(good), "in Fortran order"),
        (good.T.copy(), r"got float16 of shape \(6, 8\)"),
        (good.astype(">f2"), "got >f2 of shape"),
        (good.astype(np.float32), "got float32 of shape"),
    ]:
        np.save(file, array, allow_pickle=True)
        with pytest.raises(ValueError, match=rf"half/values.npy: .*{message}"):
            TeacherStore.open(path)
    header = b"{'descr': '<f2', 'fortran_order': False, 'shape': (8, 6), 'x': " + b"(" * 3000
    file.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
    with pytest.raises(ValueError, match=r"half/values\.npy: expected an .npy header"):
        TeacherStore.open(path)


@pytest.mark.parametrize("name", ["index.json", "half", "half/values.npy", "eight/scales.npy"])
def test_links_that_lead_elsewhere(copy, original, name):
    path = copy()
    target = path / name
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    target.symlink_to(original.path / name)
    with pytest.raises(ValueError, match="expected a file of this folder, got a link to elsewhere"):
        TeacherStore.open(path)


def test_a_link_to_the_store_itself_is_fine(copy, original, tmp_path):
    (tmp_path / "link").symlink_to(copy())
    assert check(tmp_path / "link", original) == "intact"


@pytest.mark.parametrize("name", ["index.json", "half/present.npy"])
def test_pipes_and_folders_in_place_of_files(copy, name):
    path = copy()
    (path / name).unlink()
    os.mkfifo(path / name)
    with pytest.raises(ValueError, match=f"{name}: expected a regular file"):
        TeacherStore.open(path)
    (path / name).unlink()
    (path / name).mkdir()
    with pytest.raises(ValueError, match=f"{name}: expected a regular file"):
        TeacherStore.open(path)


def test_no_store_at_all(tmp_path):
    with pytest.raises(ValueError, match=r"index.json: expected a readable file, got No such file"):
        TeacherStore.open(tmp_path / "nowhere")
