"""The teacher store where folders change under it, disks are full and arguments are unusual."""

import os
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
