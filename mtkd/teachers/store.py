"""A folder of stored teacher embeddings: made, filled, checked, read, joined and narrowed."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from .folder import create_folder, extend_folder, hash_rows, join_folder, merge_indices
from .format import Index, make_teachers, plain
from .view import PathLike, View

Dtype = str | torch.dtype


class TeacherStore(View):
    """Embeddings of the same rows by several teachers, in a folder, read through memory maps.

    ``store[rows]`` gives packed targets ``(n, sum D_t)`` and a mask ``(n, T)``: what every loss
    takes, with ``dims=tuple(store.dims.values())``. `create` makes a store, `open` opens one, and
    ``TeacherStore(path)`` is short for `open`.

    Attributes:
        path: the folder, absolute.

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
            revision: the revision of each model, any string; `embed` compares its own with it.
            ids: the id of each row, strings or integers; their hash is kept, see `hash_ids`.
            exist_ok: whether to open a store that is there, if all of the above is the same; an
                error says what is not.

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
            TypeError: paths, or anything but stores; one store that is not in a list.
        """
        views = _list_stores(stores)
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
            TypeError: one name that is not in a list.

        Note:
            A view counts its own rows from 0: row i of ``subset(rows=rows)`` is ``rows[i]`` here.
        """
        if isinstance(teachers, str) or not isinstance(teachers, Iterable | None):
            raise TypeError(
                f"teachers: expected several names, such as ['a'], got {teachers!r:.80}"
            )
        names = self.names if teachers is None else teachers
        view = self._shown(self._column(name).teacher for name in names)
        return TeacherStore(self.path, view, self._chosen if rows is None else self._rows(rows))

    def __reduce__(self) -> tuple[Any, ...]:
        """Other processes get the path and map the folder themselves, if it is as it was."""
        return TeacherStore, (self.path, self._shown(self._teachers), self._chosen)

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

    def discard(self, teacher: str, rows: Any) -> None:
        """Make some rows of a teacher absent, so that they can be written again."""
        self._column(teacher).discard(self._rows(rows).numpy())


def _list_stores(stores: Any) -> list[TeacherStore]:
    """The stores of an argument `stores`, which holds nothing else."""
    if isinstance(stores, TeacherStore) or not isinstance(stores, Iterable):
        raise TypeError(f"stores: expected several stores, got one {type(stores).__name__}")
    listed = list(stores)
    for number, each in enumerate(listed):
        if not isinstance(each, TeacherStore):
            kind = type(each).__name__
            raise TypeError(
                f"stores[{number}]: expected a TeacherStore, got {kind};"
                " TeacherStore.open makes one of a path"
            )
    return listed
