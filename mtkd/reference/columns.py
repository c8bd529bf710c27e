"""Ragged teachers as columns: sums over a teacher's columns, and values spread over them."""

from collections.abc import Sequence

import torch
from torch import Tensor


def accumulate_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Return float64 when any tensor is float64, else float32: the dtype losses are computed in."""
    double = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if double else torch.float32


def segment_sum(columns: Tensor, dims: Sequence[int]) -> Tensor:
    """Sum ``(*, D)`` over each teacher's columns, giving ``(*, T)``."""
    if len(set(dims)) == 1:
        by_teacher: Tensor = columns.unflatten(-1, (len(dims), dims[0]))
        return by_teacher.sum(-1)
    return torch.stack([segment.sum(-1) for segment in columns.split(list(dims), -1)], -1)


def segment_max(columns: Tensor, dims: Sequence[int]) -> Tensor:
    """Return the largest of ``(*, D)`` among each teacher's columns, ``(*, T)``."""
    if len(set(dims)) == 1:
        by_teacher: Tensor = columns.unflatten(-1, (len(dims), dims[0]))
        return by_teacher.amax(-1)
    return torch.stack([segment.amax(-1) for segment in columns.split(list(dims), -1)], -1)


def expand_columns(values: Tensor, dims: Sequence[int]) -> Tensor:
    """Repeat ``(*, T)`` over each teacher's columns, giving ``(*, D)``."""
    if len(set(dims)) == 1:
        return values.unsqueeze(-1).expand(*values.shape, dims[0]).flatten(-2)
    segments = zip(values.split(1, -1), dims, strict=True)
    return torch.cat([value.expand(*values.shape[:-1], width) for value, width in segments], -1)


def zero_uncounted_rows(input: Tensor, mask: Tensor | None) -> Tensor:
    """Zero rows that count for no teacher: their zero gradients must not meet a NaN in a GEMM.

    Input is ``(N, H)`` for all teachers, or ``(T, N, H)``.
    """
    if mask is None:
        return input
    counted = mask.any(-1) if input.dim() == 2 else mask.T
    return input.masked_fill(~counted.unsqueeze(-1), 0.0)
