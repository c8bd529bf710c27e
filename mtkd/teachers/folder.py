"""The folder of a store as a whole: its index read and checked, its files made, stores joined."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from .aside import making, replace_file
from .column import Column, make_column
from .files import is_blank, locked, open_inside
from .format import (
    INDEX,
    LARGEST_INDEX,
    Index,
    Teacher,
    compare,
    compare_teachers,
    hash_ids,
    list_ids,
)


def load_index(root: Path) -> Index:
    """Read and check a folder's index.json."""
    with open_inside(root, INDEX) as file:
        data = file.read(LARGEST_INDEX + 1)
    if len(data) > LARGEST_INDEX:
        raise ValueError(f"{root / INDEX}: expected at most {LARGEST_INDEX} bytes, got more")
    try:
        return Index.load(data)
    except ValueError as error:
        raise ValueError(f"{root / INDEX}: {error}") from None


def make_folder(root: Path, index: Index) -> None:
    """Make every file of a store without rows in an empty folder."""
    for teacher in index.teachers:
        make_column(root / teacher.name, teacher, index.rows)
    replace_file(root / INDEX, index.dump())


def create_folder(path: str | os.PathLike[str], index: Index, exist_ok: bool) -> None:
    """Make a store without rows; one that is there has to be the same, and may be so."""
    there = Path(path) / INDEX
    if not (exist_ok and there.exists()):
        advice = "; TeacherStore.open opens a store that is there, and so does exist_ok=True"
        try:
            with making(path, "" if exist_ok else advice) as aside:
                make_folder(aside, index)
        except (OSError, ValueError):
            if not (exist_ok and there.exists()):  # or else another process was faster
                raise
    if differences := compare(index, load_index(Path(path))):
        raise ValueError(f"path: {path} is another store: {differences}")


def join_folder(
    path: str | os.PathLike[str], index: Index, sources: list[tuple[list[Column], Tensor]]
) -> None:
    """Make a store of the rows of others: columns, and which of their rows."""
    with making(path) as aside:
        make_folder(aside, index)
        for teacher in index.teachers:
            target = Column(aside, teacher, index.rows)
            for columns, rows in sources:
                for column in (column for column in columns if column.teacher == teacher):
                    target.copy(column, rows.numpy())


def extend_folder(root: Path, view: Index, new: tuple[Teacher, ...]) -> None:
    """Add teachers without rows to a store that still has what the view shows; or leave none."""
    with locked(root):
        old = load_index(root)
        check_same(root, view, old)
        index = Index(old.rows, (*old.teachers, *new), old.ids)
        folders = {teacher: root / teacher.name for teacher in new}
        for teacher, folder in folders.items():
            if os.path.lexists(folder) and not _is_left(folder, teacher):
                raise ValueError(
                    f"path: expected no {folder} before {teacher.name} is added,"
                    " got one that no add has begun; move it away"
                )
        try:
            for teacher, folder in folders.items():
                # Left by a process that was killed.
                shutil.rmtree(folder, ignore_errors=True)
                make_column(folder, teacher, index.rows)
            replace_file(root / INDEX, index.dump())
        except BaseException:
            if load_index(root) != index:
                for folder in folders.values():
                    shutil.rmtree(folder, ignore_errors=True)
            raise


def _is_left(folder: Path, teacher: Teacher) -> bool:
    """Whether a folder is what a killed `add` leaves: some of a teacher's files, without rows."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    known = {*teacher.files(1), "scales.npy"}  # of another dtype it may have been
    return all(entry.name in known and is_blank(entry) for entry in folder.iterdir())


def check_same(root: Path, view: Index, index: Index) -> tuple[Teacher, ...]:
    """Return a view's teachers, if the folder still has them and the same rows."""
    if differences := compare(view, index, more=True):
        raise ValueError(f"path: {root} is another store: {differences}")
    return view.teachers


def hash_rows(rows: int, ids: Iterable[str | int] | None) -> str | None:
    """The hash of an argument `ids`, which has one for each row or is None."""
    if ids is None:
        return None
    listed = list_ids(ids)
    if len(listed) != rows:
        raise ValueError(f"ids: expected one for each of {rows} rows, got {len(listed)}")
    return hash_ids(listed)


def merge_indices(indices: list[Index]) -> Index:
    """The index of stores together: the same rows, every teacher that one of them has."""
    if not indices:
        raise ValueError("stores: expected at least one, got none")
    teachers: dict[str, Teacher] = {}
    rows, ids = indices[0].rows, None
    for number, own in enumerate(indices):
        if own.rows != rows:
            raise ValueError(
                f"stores[{number}]: expected {rows} rows like stores[0], got {own.rows}"
            )
        if None not in (own.ids, ids) and own.ids != ids:
            raise ValueError(f"stores[{number}]: expected row ids of hash {ids}, got {own.ids}")
        ids = ids or own.ids
        for teacher in own.teachers:
            first = teachers.setdefault(teacher.name, teacher)
            if differences := compare_teachers(first, teacher):
                raise ValueError(f"stores[{number}]: {differences}")
    return Index(rows, tuple(teachers.values()), ids)
