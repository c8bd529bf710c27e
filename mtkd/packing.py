"""Teachers of different widths as the columns of one tensor: pack, split, offsets."""

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor


def pack(tensors: Sequence[Tensor]) -> tuple[Tensor, tuple[int, ...]]:
    """Concatenate one tensor ``(*, D_t)`` a teacher into columns ``(*, sum D_t)``.

    Args:
        tensors: at least one tensor; leading dimensions, dtype and device must agree.

    Returns:
        The packed tensor and the widths ``dims``.

    Raises:
        ValueError: no tensors, or leading dimensions that differ.

    Example:
        >>> import torch
        >>> columns, dims = pack([torch.zeros(8, 3), torch.ones(8, 5)])
        >>> columns.shape, dims
        (torch.Size([8, 8]), (3, 5))
    """
    if not tensors:
        raise ValueError("tensors: expected one tensor a teacher, got none")
    leading = tensors[0].shape[:-1]
    for index, tensor in enumerate(tensors):
        if tensor.shape[:-1] != leading:
            raise ValueError(
                f"tensors[{index}]: expected leading dimensions {tuple(leading)} like tensors[0],"
                f" got shape {tuple(tensor.shape)}"
            )
    return torch.cat(tuple(tensors), -1), tuple(tensor.shape[-1] for tensor in tensors)


def split(columns: Tensor, dims: Sequence[int]) -> tuple[Tensor, ...]:
    """View columns ``(*, sum D_t)`` as one tensor ``(*, D_t)`` a teacher.

    Example:
        >>> import torch
        >>> [part.shape[-1] for part in split(torch.zeros(8, 8), (3, 5))]
        [3, 5]
    """
    parts: tuple[Tensor, ...] = columns.split(list(dims), -1)
    return parts


def offsets(dims: Sequence[int]) -> tuple[int, ...]:
    """Return where each teacher's columns begin, and at last where they all end.

    Example:
        >>> offsets((3, 5, 2))
        (0, 3, 8, 10)
    """
    return tuple(accumulate(dims, initial=0))


SMALL = 1 << 16  # numbers that take about as long as one call's overhead


def join_small(calls: Sequence[tuple[Any, ...]]) -> Sequence[tuple[Any, ...]]:
    """Pack calls (dims, tensor, ...) of small teachers into one; leave all others as they are.

    Large tensors are better read where they are: packing them would move more than the loss does.
    """
    kinds = {tuple(None if x is None else x.dtype for x in call[1:]) for call in calls}
    if len(calls) == 1 or len(kinds) > 1 or max(call[1].numel() for call in calls) > SMALL:
        return calls
    dims, *columns = zip(*calls, strict=True)
    joined = (None if tensors[0] is None else torch.cat(tensors, -1) for tensors in columns)
    return [(tuple(chain.from_iterable(dims)), *joined)]


LARGEST = 1 << 18  # numbers whose copies take less time than a call of their own
LARGEST_STACK = 1 << 24  # numbers, of one kind and all teachers


def stack_equal(calls: Sequence[tuple[Any, ...]], columns: Sequence[int]) -> Sequence[Any]:
    """Stack calls (dims, input, ...) of equal teachers into one; leave all others as they are.

    Inputs become ``(T, N, H)``. Other tensors, or None, are concatenated where `columns` says
    that their columns are, an entry each. Large tensors are better read where they are.
    """
    if len(calls) == 1:
        return calls
    looks = {tuple(x if x is None else (x.shape, x.dtype) for x in call[1:]) for call in calls}
    sizes = [x.numel() for x in calls[0][1:] if x is not None]
    if len(looks) > 1 or max(sizes) > LARGEST or len(calls) * max(sizes) > LARGEST_STACK:
        return calls
    dims, inputs, *others = zip(*calls, strict=True)
    joined = [
        None if parts[0] is None else torch.cat(parts, dim)
        for parts, dim in zip(others, columns, strict=True)
    ]
    return [(tuple(chain.from_iterable(dims)), torch.stack(inputs), *joined)]
