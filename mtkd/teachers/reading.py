"""Random rows of all teachers as one packed tensor."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..packing import offsets
from .column import Column
from .encoding import DTYPES
from .format import Teacher


def as_rows(rows: Any, length: int) -> Tensor:
    """Return row numbers as a tensor of int64, checked against the number of rows."""
    if isinstance(rows, slice):
        return torch.arange(*rows.indices(length))
    if not isinstance(rows, (Tensor, np.ndarray, list, tuple, range)):
        kind = type(rows).__name__
        raise TypeError(f"rows: expected a tensor, array, list or slice of integers, got {kind}")
    numbers = torch.as_tensor(rows if len(rows) else np.zeros(0, np.int64))
    if numbers.dim() != 1 or numbers.dtype.is_floating_point or numbers.dtype == torch.bool:
        got = f"{numbers.dtype} of shape {tuple(numbers.shape)}"
        raise TypeError(f"rows: expected integers of shape (n,), got {got}")
    if len(numbers) and not (numbers.min() >= 0 and numbers.max() < length):
        got = f"{int(numbers.min())} to {int(numbers.max())}"
        raise ValueError(f"rows: expected numbers from 0 to {length - 1}, got {got}")
    return numbers.long()


def common_dtype(teachers: Sequence[Teacher]) -> torch.dtype:
    """The dtype of targets: what all teachers are stored as if it is a float type, else float32."""
    kinds = {teacher.dtype for teacher in teachers}
    dtype = DTYPES[kinds.pop()] if len(kinds) == 1 else torch.float32
    return dtype if dtype.is_floating_point else torch.float32


def gather(
    columns: Sequence[Column], rows: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return packed targets and mask of rows."""
    ends = offsets([column.teacher.dim for column in columns])
    targets = torch.empty(len(rows), ends[-1], dtype=dtype)
    mask = torch.empty(len(rows), len(columns), dtype=torch.bool)
    for t, column in enumerate(columns):
        # Presence first: what is present by then is whole.
        torch.eq(column.present[rows], 1, out=mask[:, t])
        part = targets[:, ends[t] : ends[t + 1]]
        part.copy_(column.values[rows])
        if column.scales is not None:
            part.mul_(column.scales[rows, None])
        if not mask[:, t].all():
            part.masked_fill_(~mask[:, t, None], 0)
    return targets, mask
