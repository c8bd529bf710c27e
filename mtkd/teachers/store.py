"""A folder of stored teacher embeddings: made, filled, checked, read, joined and narrowed."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .column import Column
from .folder import (
    check_same,
    create_folder,
    extend_folder,
    hash_rows,
    join_folder,
    load_index,
    merge_indices,
)
from .format import Index, Teacher, make_teachers, plain
from .reading import ResidentStore, as_rows, check_out, common_dtype, empty, gather

PathLike = str | os.PathLike[str]
Dtype = str | torch.dtype


class TeacherStore:
    """Embeddings of the same rows by several teachers, in a folder, read through memory maps.

    ``store[rows]`` gives packed targets ``(n, sum D_t)`` and a mask ``(n, T)``: what every loss
    takes, with ``dims=tuple(store.dims.values())``. `create` makes a store, `open` opens one, and
    ``TeacherStore(path)`` is short for `open`.

    Attributes:
        path: the folder.

    Raises:
        ValueError: a folder that is not a store, or is damaged: the file, what was expected and
            what came. A folder from elsewhere is safe to open: there is no pickle in it, and no
            name, size or link is followed before it is checked. `verify` reads the rows too.

    Note:
        Files are mapped, not loaded: opening reads their headers, and rows that were read before
        come from the system's cache. Stores can be sent to other processes, such
        as a loader's workers, which map the folder themselves.

    Example:
        >>> import tempfile, torch
        >>> from mtkd.teachers import TeacherStore
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = TeacherStore.create(f"{folder}/store", {"clip": 4, "dino": 3}, rows=10)
        ...     written = store.append("clip", torch.randn(6, 4))  # rows 0 to 5
        ...     written = store.append("dino", torch.randn(2, 3), rows=[7, 1])
        ...     targets, mask = store[torch.tensor([1, 7, 9])]
        >>> targets.shape, targets.dtype, mask.tolist()
        (torch.Size([3, 7]), torch.float16, [[True, True], [False, True], [False, False]])
    """

    def __init__(
        self,
        path: PathLike,
        view: Index | None = None,
        chosen: Tensor | None = None,
    ) -> None:
        self.path, self._chosen = Path(path).resolve(), chosen
        self._index = load_index(self.path)
        shown = self._index.teachers if view is None else check_same(self.path, view, self._index)
        self._columns = [Column(self.path, teacher, self._index.rows) for teacher in shown]

    @classmethod
    def open(cls, path: PathLike) -> "TeacherStore":
        """Open a store that is there, once every file is as its index says."""
        return cls(path)

    @classmethod
    def create(
        cls,
        path: PathLike,
        dims: Mapping[str, int],
        rows: int,
        *,
        dtype: Dtype | Mapping[str, Dtype] = "float16",
        revision: Mapping[str, str] | None = None,
        ids: Iterable[str | int] | None = None,
        exist_ok: bool = False,
    ) -> "TeacherStore":
        """Make a store without any row yet.

        Args:
            path: the folder, new or empty.
            dims: the width of each teacher by name: letters, digits, ".", "_" and "-".
            rows: the number of rows, which all teachers share.
            dtype: how numbers are stored: "float16", "bfloat16", "float32" or "int8" (with a
                scale a row), or a mapping by teacher.
            revision: the revision of each model, to be kept with its name.
            ids: the id of each row, strings or integers; their hash is kept, see `hash_ids`.
            exist_ok: whether to open a store that is there, if all of the above is the same.

        Raises:
            ValueError: a folder with something in it, an unknown dtype, a name or width that
                cannot be.
            OSError: the disk has not the room. All of it is taken now, so that it cannot run out
                later; then nothing is left behind.
        """
        teachers = make_teachers(dims, dtype, revision)
        create_folder(path, Index(plain(rows), teachers, hash_rows(rows, ids)), exist_ok)
        return cls(path)

    @classmethod
    def merge(cls, path: PathLike, stores: "Iterable[TeacherStore]") -> "TeacherStore":
        """Copy stores of the same rows into a new one: all their teachers, all that is present.

        Args:
            path: the folder, new or empty.
            stores: stores with as many rows and, where they are kept, the same ids. A teacher may
                be in several of them, with different rows present.

        Raises:
            ValueError: stores that do not fit, a teacher's row that is in two of them, a row that
                is not what was written. Then nothing is left behind.
        """
        views = list(stores)
        index = merge_indices([view._narrowed() for view in views])
        join_folder(path, index, [(view._columns, view._rows(slice(None))) for view in views])
        return cls(path)

    def add(
        self,
        dims: Mapping[str, int],
        *,
        dtype: Dtype | Mapping[str, Dtype] = "float16",
        revision: Mapping[str, str] | None = None,
    ) -> "TeacherStore":
        """Add teachers, without any row yet, to the folder; return the store with them.

        Arguments and errors are those of `create`. This store stays without them.
        """
        new = make_teachers(dims, dtype, revision)
        extend_folder(self.path, self._shown(self._teachers), new)
        return TeacherStore(self.path, self._shown((*self._teachers, *new)), self._chosen)

    def subset(self, teachers: Sequence[str] | None = None, rows: Any = None) -> "TeacherStore":
        """Return a view of some teachers and some rows, in the order given; nothing is copied.

        Raises:
            ValueError: no teacher, one that the store does not have, or one twice.
        """
        names = self.names if teachers is None else teachers
        view = self._shown(self._column(name).teacher for name in names)
        return TeacherStore(self.path, view, self._chosen if rows is None else self._rows(rows))

    def __reduce__(self) -> tuple[Any, ...]:
        """Other processes get the path and map the folder themselves, if it is as it was."""
        return TeacherStore, (self.path, self._shown(self._teachers), self._chosen)

    @property
    def names(self) -> tuple[str, ...]:
        """The teachers, in the order of the columns of targets and mask."""
        return tuple(teacher.name for teacher in self._teachers)

    @property
    def dims(self) -> dict[str, int]:
        """The width of each teacher."""
        return {teacher.name: teacher.dim for teacher in self._teachers}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of targets: that of all teachers if it is one float type, else float32."""
        return common_dtype(self._teachers)

    @property
    def revisions(self) -> dict[str, str | None]:
        """The revision of each teacher's model, where one was given."""
        return {teacher.name: teacher.revision for teacher in self._teachers}

    @property
    def ids(self) -> str | None:
        """The hash of the rows' ids, see `hash_ids`; None if none were given, or of a view."""
        return self._index.ids if self._chosen is None else None

    def __len__(self) -> int:
        return self._index.rows if self._chosen is None else len(self._chosen)

    def __getitem__(self, rows: Any) -> tuple[Tensor, Tensor]:
        """Return targets ``(n, sum D_t)`` and mask ``(n, T)``; absent rows hold 0 and False."""
        return self.read(rows)

    def read(
        self,
        rows: Any,
        *,
        device: torch.device | str | None = None,
        out: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return targets ``(n, sum D_t)`` and mask ``(n, T)`` of rows.

        Args:
            rows: a tensor, array, list, range or slice of row numbers.
            device: where the result goes. A GPU's comes from pinned memory and is copied while
                the host goes on.
            out: targets and mask of a former call to be filled again. Fresh memory for a large
                batch costs as much as reading it.

        Returns:
            Targets in `dtype` and a bool mask, True where a teacher has the row; where it has not,
            its targets are 0.

        Raises:
            ValueError: row numbers that the store does not have, `out` of another shape.
            TypeError: rows that are not integers.

        Note:
            Each teacher's rows are copied once, from the map to their columns, by all threads.
        """
        numbers = self._rows(rows)
        pinned = device is not None and torch.device(device).type == "cuda"
        if out is None:
            out = empty(len(numbers), self._teachers, self.dtype, pinned)
        else:
            check_out(out, len(numbers), self._teachers, self.dtype)
        gather(self._columns, numbers, *out)
        if device is None:
            return out
        targets, mask = (tensor.to(device, non_blocking=pinned) for tensor in out)
        return targets, mask

    def to(self, device: torch.device | str) -> ResidentStore:
        """Return a copy of all rows on a device, which is read in the same way.

        Raises:
            ValueError: a GPU without the room, with the bytes that are needed and free.
        """
        return ResidentStore.of(self._columns, self._rows(slice(None)), device)

    def append(self, teacher: str, values: Any, rows: Any = None, *, present: str = "error") -> int:
        """Write a teacher's embeddings of some rows.

        Args:
            teacher: its name.
            values: finite numbers ``(n, D_t)``, a tensor on any device or an array.
            rows: their rows; None for those that follow the last one present, where "keep" would
                not say which.
            present: what to do with rows that are there already: "error", or "keep" them and write
                the others.

        Returns:
            The number of rows written: on the disk, whole, when this returns.

        Raises:
            ValueError: another width, NaN, infinity or overflow in the stored dtype, with the rows;
                rows that are present, or given twice. Then nothing has been written.
            TypeError: values that are not floating point.
            OSError: a disk that is full or fails; these rows are absent then.

        Note:
            Any number of processes may write. Those that write the same teacher take turns.
        """
        column = self._column(teacher)
        if present not in ("error", "keep"):
            raise ValueError(f"present: expected 'error' or 'keep', got {present!r}")
        if rows is None and present == "keep":
            raise ValueError("rows: expected row numbers with present='keep', got None")
        if rows is None:
            there = self.present(teacher).nonzero()
            first = int(there[-1]) + 1 if len(there) else 0
            rows = range(first, first + len(values))
        numbers = self._rows(rows).numpy()
        if len(np.unique(numbers)) != len(numbers):
            raise ValueError("rows: expected rows that differ, got some twice")
        return column.write(numbers, values, keep=present == "keep")

    def present(self, teacher: str) -> Tensor:
        """Which rows a teacher has now: bool ``(rows,)``."""
        marks = self._column(teacher).present
        return (marks if self._chosen is None else marks[self._chosen]) == 1

    def verify(self) -> dict[str, Tensor]:
        """Read every row that is present; return, by teacher, those that are not as written.

        Teachers without such rows are left out: an intact store gives ``{}``. `discard` makes the
        rows absent, and `embed` writes them anew.
        """
        rows = self._rows(slice(None)).numpy()
        broken = {c.teacher.name: torch.from_numpy(c.broken(rows)) for c in self._columns}
        return {name: bad for name, bad in broken.items() if len(bad)}

    def discard(self, teacher: str, rows: Any) -> None:
        """Make some rows of a teacher absent, so that they can be written again."""
        self._column(teacher).discard(self._rows(rows).numpy())

    def _column(self, teacher: str) -> Column:
        if teacher not in self.names:
            raise ValueError(f"teacher: expected one of {', '.join(self.names)}, got {teacher!r}")
        return self._columns[self.names.index(teacher)]

    @property
    def _teachers(self) -> tuple[Teacher, ...]:
        return tuple(column.teacher for column in self._columns)

    def _shown(self, teachers: Iterable[Teacher]) -> Index:
        """The folder's index with some of its teachers."""
        return Index(self._index.rows, tuple(teachers), self._index.ids)

    def _narrowed(self) -> Index:
        """The index of what this view shows."""
        return Index(len(self), self._teachers, self.ids)

    def _rows(self, rows: Any) -> Tensor:
        """Rows of the folder, on the CPU."""
        numbers = as_rows(rows.cpu() if isinstance(rows, Tensor) else rows, len(self))
        return numbers if self._chosen is None else self._chosen[numbers]
