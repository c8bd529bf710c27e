"""One teacher's files: what is there, written block by block and checked row by row.

Of a block values, scales and checksums are on the disk before the presence of its rows is written.
A row is there when its byte in present.npy is 1, so that a process killed at any moment leaves rows
that are whole, or absent and written again. A byte a row, not a bit: writers of different rows
never write the same byte.
"""

import os
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .._durable import flush
from .encoding import as_tensor, encode
from .files import lock, make_array, open_array, parts, write_rows
from .format import Teacher

Array = npt.NDArray[Any]
BLOCK = 1 << 24  # bytes that are read at once where everything is


def make_column(folder: Path, teacher: Teacher, rows: int) -> None:
    """Make the files of a teacher without any row."""
    folder.mkdir()
    for name, (dtype, shape) in teacher.files(rows).items():
        make_array(folder / name, dtype, shape)
    flush(folder)


class Column:
    """A teacher's files, mapped read-only; what other processes write appears in them."""

    def __init__(self, root: Path, teacher: Teacher, rows: int) -> None:
        self.teacher, self.folder = teacher, root / teacher.name
        opened = {
            name: open_array(root, f"{teacher.name}/{name}", dtype, shape)
            for name, (dtype, shape) in teacher.files(rows).items()
        }
        self.arrays = {name: array for name, (array, _) in opened.items()}
        self.places = {name: place for name, (_, place) in opened.items()}
        with warnings.catch_warnings():
            # The tensors are read-only as the maps are: nothing here writes to them.
            warnings.simplefilter("ignore")
            self.values = as_tensor(teacher, self.arrays["values.npy"])
            self.present = torch.from_numpy(self.arrays["present.npy"])
            scales = self.arrays.get("scales.npy")
            self.scales: Tensor | None = None if scales is None else torch.from_numpy(scales)

    def write(self, rows: Array, values: Any, keep: bool) -> int:
        """Write rows, which differ, and mark them present; return how many were written.

        Rows that are there stay as they are if `keep`, or else are an error.
        """
        files = encode(self.teacher, values, rows)
        order = np.argsort(rows, kind="stable")
        with self._locked():
            there = self.arrays["present.npy"][rows[order]] == 1
            if there.any() and not keep:
                some = rows[order][there]
                raise ValueError(
                    f"{self.teacher.name}: expected rows that are absent,"
                    f" got {len(some)} that are present, such as {some[0]}; discard them first"
                )
            order = order[~there]
            self.put(rows[order], {name: data[order] for name, data in files.items()})
        return len(order)

    def put(self, rows: Array, files: dict[str, Array]) -> None:
        """Write encoded rows, in ascending order, with their checksums; then mark them present."""
        if len(rows):
            for name, data in (files | {"checksums.npy": checksums(files)}).items():
                self._put(name, rows, data)
            self._put("present.npy", rows, np.ones(len(rows), np.uint8))

    def discard(self, rows: Array) -> None:
        """Mark rows absent."""
        with self._locked():
            rows = np.unique(rows)
            self._put("present.npy", rows, np.zeros(len(rows), np.uint8))

    def _put(self, name: str, rows: Array, data: Array) -> None:
        write_rows(self.places[name], rows, np.ascontiguousarray(data))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock of those who write this teacher; it ends with the process."""
        with self.places["present.npy"].opened(os.O_RDONLY) as descriptor:
            lock(descriptor)
            yield

    def copy(self, source: "Column", rows: Array) -> None:
        """Write what a column of the same teacher has: row i is its row ``rows[i]``."""
        for positions, files, good in source.stored(rows):
            if not good.all():
                bad = rows[positions[~good]]
                expected = "rows that have their checksums"
                got = f"{len(bad)} that have not, such as {bad[0]}"
                raise ValueError(f"{source.folder}: expected {expected}, got {got}")
            twice = positions[self.arrays["present.npy"][positions] == 1]
            if len(twice):
                expected = f"each row of {self.teacher.name} in one store"
                raise ValueError(f"stores: expected {expected}, got row {twice[0]} in several")
            self.put(positions, files)

    def broken(self, rows: Array) -> Array:
        """Positions in `rows` of those that are present without their checksum."""
        found = [positions[~good] for positions, _, good in self.stored(rows)]
        return np.concatenate([np.zeros(0, np.int64), *found])

    def stored(self, rows: Array) -> Iterator[tuple[Array, dict[str, Array], Array]]:
        """Some at a time, those of `rows` that are marked: where, what is stored, is it whole."""
        names = ("values.npy", "scales.npy") if self.scales is not None else ("values.npy",)
        step = max(1, BLOCK // self.arrays["values.npy"].strides[0])
        for some in parts(len(rows), step):
            part = rows[some]
            marks = self.arrays["present.npy"][part]
            there = np.flatnonzero(marks)
            files = {name: self.arrays[name][part[there]] for name in names}
            good = checksums(files) == self.arrays["checksums.npy"][part[there]]
            yield some.start + there, files, good & (marks[there] == 1)


def checksums(files: dict[str, Array]) -> Array:
    """The crc32 of each row: of its values, then of its scale where it has one."""
    values = files["values.npy"]
    sums = map(zlib.crc32, values)
    if "scales.npy" in files:
        sums = map(zlib.crc32, files["scales.npy"][:, None], sums)
    return np.fromiter(sums, np.uint32, len(values))
