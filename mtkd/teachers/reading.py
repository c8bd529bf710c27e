"""Random rows of all teachers as one packed tensor, from the folder or from a device."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..packing import offsets
from .column import Column
from .encoding import DTYPES
from .files import parts
from .format import Teacher, join_some

CHUNK = 256  # rows that are converted at once: they stay in a cache
LOADED = 4096  # rows that go to a device at once
_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)


def as_rows(rows: Any, length: int) -> Tensor:
    """Return row numbers as a tensor of int64, checked against the number of rows.

    Numbers on a GPU are left to its own check, so that the host need not wait for them.
    """
    if isinstance(rows, slice):
        return torch.from_numpy(np.arange(*rows.indices(length), dtype=np.int64))
    if not isinstance(rows, (Tensor, np.ndarray, list, tuple, range)):
        kind = type(rows).__name__
        raise TypeError(f"rows: expected a tensor, array, list or slice of integers, got {kind}")
    if isinstance(rows, (list, tuple, range)):
        rows = np.asarray(rows if len(rows) else np.zeros(0, np.int64))
    if isinstance(rows, Tensor) and rows.device.type == "cpu" and rows.dtype in _UNSIGNED:
        rows = rows.numpy()  # torch has no least and largest of these
    if not _whole(rows):
        raise TypeError(f"rows: expected integers, got {rows.dtype}")
    if rows.ndim != 1:
        raise ValueError(f"rows: expected shape (n,), got shape {tuple(rows.shape)}")
    if (isinstance(rows, np.ndarray) or rows.device.type == "cpu") and len(rows):
        least, most = int(rows.min()), int(rows.max())
        if least < 0 or most >= length:
            expected = f"numbers from 0 to {length - 1}"
            raise ValueError(f"rows: expected {expected}, got some from {least} to {most}")
    if isinstance(rows, np.ndarray):
        return torch.from_numpy(rows.astype(np.int64, copy=True))
    numbers: Tensor = rows.long()
    return numbers


def _whole(rows: Any) -> bool:
    """Whether a tensor or an array holds integers, Python's too, which may be of any size."""
    if isinstance(rows, Tensor):
        kind = rows.dtype
        return not (kind.is_floating_point or kind.is_complex or kind == torch.bool)
    if rows.dtype == object:
        return all(isinstance(row, int) for row in rows.flat)
    return rows.dtype.kind in "iu"


def common_dtype(teachers: Sequence[Teacher]) -> torch.dtype:
    """The dtype of targets: that of all teachers where it is one float type, else float32."""
    kinds = {teacher.dtype for teacher in teachers}
    dtype: torch.dtype = DTYPES[kinds.pop()] if len(kinds) == 1 else torch.float32
    return dtype if dtype.is_floating_point else torch.float32


def empty(
    rows: int, teachers: Sequence[Teacher], dtype: torch.dtype, pinned: bool
) -> tuple[Tensor, Tensor]:
    """Make targets and mask, to be filled."""
    width = sum(teacher.dim for teacher in teachers)
    mask = torch.empty(rows, len(teachers), dtype=torch.bool, pin_memory=pinned)
    if pinned:
        return torch.empty(rows, width, dtype=dtype, pin_memory=True), mask
    # NumPy asks for huge pages: fresh pages of 4 KB cost more than the copy into them.
    memory = torch.from_numpy(np.empty((rows, width), f"i{dtype.itemsize}"))
    return memory.view(dtype), mask


def check_out(
    out: tuple[Tensor, Tensor], rows: int, teachers: Sequence[Teacher], dtype: torch.dtype
) -> None:
    """Raise unless targets and mask can be filled."""

    def say(shapes: Any) -> str:
        return "targets {} in {} and mask {} in {}".format(*shapes)

    pair = isinstance(out, (tuple, list)) and len(out) == 2
    if not pair or not all(isinstance(each, Tensor) for each in out):
        raise TypeError("out: expected two tensors, targets and mask, got something else")
    targets, mask = out
    width = sum(teacher.dim for teacher in teachers)
    wanted = ((rows, width), dtype, (rows, len(teachers)), torch.bool)
    got = (tuple(targets.shape), targets.dtype, tuple(mask.shape), mask.dtype)
    if got != wanted:
        raise ValueError(f"out: expected {say(wanted)}, got {say(got)}")
    for name, tensor in (("targets", targets), ("mask", mask)):
        if tensor.device.type != "cpu" or tensor.requires_grad:
            got_ = f"{tensor.device}{' with requires_grad' if tensor.requires_grad else ''}"
            raise ValueError(f"out: expected {name} on the CPU without gradients, got it on {got_}")
        if _overlaps(tensor):
            raise ValueError(
                f"out: expected {name} whose numbers each have their own memory,"
                f" got strides {tensor.stride()}"
            )


def _overlaps(matrix: Tensor) -> bool:
    """Whether two numbers of a matrix may share memory, as those of an expanded one do."""
    reach = 1
    for stride, size in sorted(zip(matrix.stride(), matrix.shape, strict=True)):
        if size > 1 and stride < reach:
            return True
        reach = max(reach, stride * size)
    return False


def gather(columns: Sequence[Column], rows: Tensor, targets: Tensor, mask: Tensor) -> None:
    """Fill targets and mask; each teacher has a file, hence one copy of its rows a teacher."""
    marks = torch.empty(len(columns), len(rows), dtype=torch.uint8)
    for column, mark in zip(columns, marks, strict=True):
        torch.index_select(column.present, 0, rows, out=mark)
    torch.eq(marks.T, 1, out=mask)  # before values are read: what is present by now is whole
    whole = mask.all(0).tolist()
    ends = offsets([column.teacher.dim for column in columns])
    for t, column in enumerate(columns):
        part = targets[:, ends[t] : ends[t + 1]]
        if part.dtype == column.values.dtype:
            torch.index_select(column.values, 0, rows, out=part)
        else:
            _convert(column, rows, part)
        if not whole[t]:
            part.masked_fill_(~mask[:, t, None], 0)


def _convert(column: Column, rows: Tensor, part: Tensor) -> None:
    for some in parts(len(rows), CHUNK):
        into = part[some].copy_(column.values[rows[some]])
        if column.scales is not None:
            into.mul_(column.scales[rows[some], None])


class ResidentStore:
    """A store's rows on a device, packed: `TeacherStore.to` makes it, and it reads as that does.

    Attributes:
        names: the teachers, in the order of the columns.
        dims: the width of each.
        device: where the rows are.

    Note:
        Teachers of one dtype are held as they are stored, int8 with its scales; of several, in
        float32. A batch is one gather of targets and one of the mask, however many teachers there
        are, and the host does not wait for the device where `rows` is there already.
    """

    def __init__(
        self, dims: Mapping[str, int], values: Tensor, scales: Tensor | None, mask: Tensor
    ) -> None:
        self.dims, self.names, self.device = dict(dims), tuple(dims), values.device
        self._values, self._scales, self._mask = values, scales, mask
        self._widths = torch.tensor(list(dims.values()), device=values.device)

    @classmethod
    def of(
        cls, columns: Sequence[Column], rows: Tensor, device: torch.device | str
    ) -> "ResidentStore":
        """Copy rows of columns to a device, some at a time."""
        teachers = [column.teacher for column in columns]
        eight = all(column.scales is not None for column in columns)
        dtype = torch.int8 if eight else common_dtype(teachers)
        width, count = sum(teacher.dim for teacher in teachers), len(columns)
        _check_room(torch.device(device), len(rows) * (width * dtype.itemsize + 5 * count))
        values = torch.empty(len(rows), width, dtype=dtype, device=device)
        scales = torch.empty(len(rows), count, device=device) if eight else None
        mask = torch.empty(len(rows), count, dtype=torch.bool, device=device)
        for part in parts(len(rows), LOADED):
            chosen = rows[part]
            host = empty(len(chosen), teachers, dtype, pinned=False)
            gather(columns, chosen, *host)
            values[part], mask[part] = host
            if scales is not None:
                kept = [column.scales[chosen] for column in columns if column.scales is not None]
                scales[part] = torch.stack(kept, 1).masked_fill(~host[1], 0)
        return cls({teacher.name: teacher.dim for teacher in teachers}, values, scales, mask)

    def __repr__(self) -> str:
        named = join_some([f"{name} {dim}" for name, dim in self.dims.items()], ", ")
        dtype = str(self._values.dtype).removeprefix("torch.")
        return f"ResidentStore({named}; {len(self)} rows; {dtype} on {self.device})"

    def __len__(self) -> int:
        return len(self._mask)

    def __getitem__(self, rows: Any) -> tuple[Tensor, Tensor]:
        """Return targets ``(n, sum D_t)`` and mask ``(n, T)`` of rows, on the device."""
        numbers = as_rows(rows, len(self)).to(self.device, non_blocking=True)
        targets, mask = self._values.index_select(0, numbers), self._mask.index_select(0, numbers)
        if self._scales is None:
            return targets, mask
        scales = self._scales.index_select(0, numbers)
        width = targets.shape[1]
        return targets * scales.repeat_interleave(self._widths, 1, output_size=width), mask


def _check_room(device: torch.device, size: int) -> None:
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < size:
        free = torch.cuda.mem_get_info(device)[0]
        raise ValueError(f"device: expected {size} bytes free on {device}, got {free}")
