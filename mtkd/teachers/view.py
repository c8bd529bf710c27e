"""What is read of a store: the teachers and rows that a view of its folder shows."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .column import Column
from .folder import check_same, load_index
from .format import Index, Teacher, join_some
from .reading import ResidentStore, as_rows, check_out, common_dtype, empty, gather

PathLike = str | os.PathLike[str]


class View:
    """Some teachers and rows of a folder, mapped; `TeacherStore` is one that can also write."""

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

    def __repr__(self) -> str:
        named = join_some([f"{each.name} {each.dim} {each.dtype}" for each in self._teachers], ", ")
        shown, there = len(self._columns), len(self._index.teachers)
        teachers = named if shown == there else f"{named}; {shown} of {there} teachers"
        rows = "" if self._chosen is None else f" chosen of {self._index.rows}"
        return f"{type(self).__name__}({teachers}; {len(self)} rows{rows}; {str(self.path)!r})"

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
            ValueError: row numbers that the store does not have; `out` of another shape, elsewhere
                than on the CPU, with gradients, or with numbers that share memory.
            TypeError: rows that are not integers, `out` that is not two tensors.

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
