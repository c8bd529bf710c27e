"""A folder of stored teacher embeddings, memory-mapped: made, filled, checked and read here."""

import os
import shutil
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .column import Column, make_column
from .files import locked, open_inside, replace_file, sync_folder
from .format import INDEX, LARGEST_INDEX, Index, Teacher, hash_ids
from .reading import as_rows, common_dtype, gather

Array = npt.NDArray[Any]


class TeacherStore:
    """Embeddings of the same rows by several teachers, in a folder, read by memory map."""

    def __init__(
        self, path: Path, index: Index, columns: Sequence[Column], chosen: Tensor | None = None
    ) -> None:
        self.path, self._index, self._columns, self._chosen = path, index, tuple(columns), chosen
        self._dtype = common_dtype([column.teacher for column in columns])

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        dims: Mapping[str, int],
        rows: int,
        *,
        dtype: str | torch.dtype | Mapping[str, str | torch.dtype] = "float16",
        revision: Mapping[str, str] | None = None,
        ids: Iterable[str | int] | None = None,
        exist_ok: bool = False,
    ) -> "TeacherStore":
        """Make a store without any row; its room on the disk is taken at once."""
        root = Path(path)
        teachers = _teachers(dims, dtype, revision)
        index = Index(rows, teachers, None if ids is None else hash_ids(ids))
        if exist_ok and (root / INDEX).exists():
            return cls._reopen(root, index)
        if root.exists() and (not root.is_dir() or any(root.iterdir())):
            raise ValueError(f"path: expected a new or an empty folder, got {root}")
        aside = root.with_name(f".{root.name}.{uuid.uuid4().hex}")
        aside.mkdir(parents=True)
        try:
            for teacher in teachers:
                make_column(aside / teacher.name, teacher, rows)
            replace_file(aside / INDEX, index.dump())
            os.replace(aside, root)
        except OSError:
            shutil.rmtree(aside)
            if exist_ok and (root / INDEX).exists():  # another process was faster
                return cls._reopen(root, index)
            raise
        sync_folder(root.parent)
        return cls.open(root)

    @classmethod
    def _reopen(cls, root: Path, index: Index) -> "TeacherStore":
        store = cls.open(root)
        if store._index != index:
            raise ValueError(f"path: expected a store of {index}, got {store._index} in {root}")
        return store

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "TeacherStore":
        """Open a store that is there, once every file is as its index says."""
        root = Path(path)
        with open_inside(root, INDEX) as file:
            data = file.read(LARGEST_INDEX + 1)
        if len(data) > LARGEST_INDEX:
            raise ValueError(f"{root / INDEX}: expected at most {LARGEST_INDEX} bytes, got more")
        try:
            index = Index.load(data)
        except ValueError as error:
            raise ValueError(f"{root / INDEX}: {error}") from None
        columns = [Column(root, teacher, index.rows) for teacher in index.teachers]
        return cls(root, index, columns)

    @property
    def names(self) -> tuple[str, ...]:
        """The teachers, in the order of the columns of targets and mask."""
        return tuple(column.teacher.name for column in self._columns)

    @property
    def dims(self) -> dict[str, int]:
        """The width of each teacher."""
        return {column.teacher.name: column.teacher.dim for column in self._columns}

    def __len__(self) -> int:
        return self._index.rows if self._chosen is None else len(self._chosen)

    def __getitem__(self, rows: Any) -> tuple[Tensor, Tensor]:
        """Return targets ``(n, sum D_t)`` and mask ``(n, T)`` of some rows; absent ones hold 0."""
        return gather(self._columns, self._rows(rows), self._dtype)

    def append(self, teacher: str, values: Any, rows: Any = None, *, present: str = "error") -> int:
        """Write embeddings of some rows of a teacher; return how many rows were written."""
        column = self._column(teacher)
        if present not in ("error", "keep"):
            raise ValueError(f"present: expected 'error' or 'keep', got {present!r}")
        if rows is None:
            marks = self.present(teacher).numpy()
            first = int(np.flatnonzero(marks)[-1]) + 1 if marks.any() else 0
            rows = slice(first, first + len(values))
        numbers = self._rows(rows).numpy()
        if len(np.unique(numbers)) != len(numbers):
            raise ValueError("rows: expected rows that differ, got some twice")
        return column.write(numbers, values, present == "keep")

    def present(self, teacher: str) -> Tensor:
        """Which rows a teacher has: bool ``(rows,)``."""
        marks = self._column(teacher).present
        return (marks if self._chosen is None else marks[self._chosen]) == 1

    def verify(self) -> dict[str, Tensor]:
        """Read everything; return the rows whose numbers are not what was written, a teacher."""
        broken = {c.teacher.name: torch.from_numpy(c.broken()) for c in self._columns}
        return {name: rows for name, rows in broken.items() if len(rows)}

    def discard(self, teacher: str, rows: Any) -> None:
        """Forget some rows of a teacher, so that they can be written again."""
        self._column(teacher).discard(self._rows(rows).numpy())

    def _column(self, teacher: str) -> Column:
        if teacher not in self.names:
            expected = ", ".join(self.names)
            raise ValueError(f"teacher: expected one of {expected}, got {teacher!r}")
        return self._columns[self.names.index(teacher)]

    def _rows(self, rows: Any) -> Tensor:
        numbers = as_rows(rows, len(self))
        return numbers if self._chosen is None else self._chosen[numbers]


def _teachers(dims: Any, dtype: Any, revision: Any) -> tuple[Teacher, ...]:
    if not isinstance(dims, Mapping):
        kind = type(dims).__name__
        raise TypeError(f"dims: expected a mapping name -> width, got {kind}")
    teachers = []
    for name, dim in dims.items():
        stored = dtype[name] if isinstance(dtype, Mapping) else dtype
        made = (revision or {}).get(name)
        teachers.append(Teacher(name, dim, str(stored).removeprefix("torch."), made))
    return tuple(teachers)
