"""From the matrix of losses ``(N, T)`` to what a training step needs: weights, mask, denominator.

With weights w, mask m (True counts) and losses l, all over rows and teachers::

    none   w l, and 0 where masked
    sum    sum(w m l)
    mean   sum(w m l) / sum(w m), or / denominator when one is given

A zero denominator, as when nothing counts, gives 0 and zero gradients.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

REDUCTIONS = ("none", "mean", "sum")


class LossOperator(Protocol):
    """What `reduce` calls: the operators that ``dispatch.define`` makes."""

    def matrix(self, *args: Any) -> Tensor:
        """Return the matrix of losses."""

    def weighted_sum(self, coefficient: Tensor, *args: Any) -> Tensor:
        """Return the sum of coefficient times matrix."""


def reduce(
    loss: LossOperator,
    calls: Sequence[tuple[Any, ...]],
    counts: Sequence[int],
    *,
    leading: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    weight: Tensor | None,
    mask: Tensor | None,
    denominator: float | Tensor | None,
    reduction: str,
) -> Tensor:
    """Call a loss's operators and reduce their matrices.

    Args:
        loss: the loss's operators.
        calls: the arguments of each call after the mask; calls hold successive teachers.
        counts: number of teachers in each call; they sum to T.
        leading: leading dimensions of the result; their product is N.
        dtype: float32 or float64, the dtype of the result.
        device: the device of the result.
        weight: ``(T,)`` or ``(*leading, T)``, or None; it may require grad.
        mask: ``(*leading, T)`` bool, or None.
        denominator: number or 0-dim tensor to divide by, for reduction="mean" alone.
        reduction: "none", "mean" or "sum".

    Returns:
        ``(*leading, T)`` for "none", else a 0-dim tensor.

    Raises:
        ValueError: an argument of the wrong shape, device or value.
        TypeError: an argument of the wrong type or dtype.
    """
    shape = (*leading, sum(counts))
    _check(shape, device, weight, mask, denominator, reduction)
    teachers = shape[-1]
    if mask is not None:
        mask = mask.reshape(-1, teachers)
    if weight is not None:
        weight = weight.to(dtype)
        weight = weight.reshape(-1, teachers) if weight.dim() > 1 else weight
    if reduction == "none":
        pairs = zip(split_columns(mask, counts), calls, strict=True)
        columns = [loss.matrix(part, *call) for part, call in pairs]
        matrix = columns[0] if len(columns) == 1 else torch.cat(columns, -1)
        return _weigh(matrix, weight, mask).reshape(shape)
    rows = 1
    for size in leading:
        rows *= size
    c = coefficients((rows, teachers), weight, mask, denominator, reduction, dtype, device)
    parts = zip(split_columns(c, counts), split_columns(mask, counts), calls, strict=True)
    sums = [loss.weighted_sum(coefficient, part, *call) for coefficient, part, call in parts]
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum()


def coefficients(
    shape: tuple[int, int],
    weight: Tensor | None,
    mask: Tensor | None,
    denominator: float | Tensor | None,
    reduction: str,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Return the matrix c ``(N, T)`` for which the reduced loss is ``sum(c * matrix)``."""
    if weight is None and mask is None and not isinstance(denominator, Tensor):
        total = shape[0] * shape[1] if denominator is None else denominator
        scale = 1.0 if reduction == "sum" else (1.0 / total if total else 0.0)
        return torch.full((), scale, dtype=dtype, device=device).expand(shape)
    counted = torch.ones((), dtype=dtype, device=device) if weight is None else weight
    counted = _weigh(counted.expand(shape), None, mask)
    if reduction == "sum":
        return counted
    # contiguous, since torch sums an expanded tensor's float32 numbers one by one
    if denominator is None:
        denominator = counted.contiguous().sum()
    if not isinstance(denominator, Tensor):
        return counted * (1.0 / denominator if denominator else 0.0)
    whole = denominator.to(dtype)
    return counted * torch.where(whole == 0, 0.0, 1.0 / torch.where(whole == 0, 1.0, whole))


def split_columns(matrix: Tensor | None, counts: Sequence[int]) -> Sequence[Any]:
    """Split the last dimension, one entry a teacher, by how many teachers each call holds."""
    if matrix is None:
        return [None] * len(counts)
    return (matrix,) if len(counts) == 1 else matrix.split(list(counts), -1)


def _weigh(matrix: Tensor, weight: Tensor | None, mask: Tensor | None) -> Tensor:
    if weight is not None:
        matrix = matrix * weight
    return matrix if mask is None else matrix.masked_fill(~mask, 0.0)


def _check(
    shape: tuple[int, ...],
    device: torch.device,
    weight: Tensor | None,
    mask: Tensor | None,
    denominator: float | Tensor | None,
    reduction: str,
) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    _check_tensor("weight", weight, (shape[-1:], shape), device)
    _check_tensor("mask", mask, (shape,), device)
    if weight is not None and not weight.is_floating_point():
        raise TypeError(f"weight: expected a floating-point tensor, got {weight.dtype}")
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask: expected a bool tensor (True counts), got {mask.dtype}")
    if denominator is not None and reduction != "mean":
        raise ValueError(f"denominator: expected with reduction='mean' alone, got {reduction!r}")
    if isinstance(denominator, Tensor):
        _check_tensor("denominator", denominator, ((),), device)
    elif denominator is not None and not isinstance(denominator, (int, float)):
        expected = "a number or a 0-dim tensor"
        raise TypeError(f"denominator: expected {expected}, got {type(denominator).__name__}")


def _check_tensor(
    name: str, tensor: Any, shapes: tuple[tuple[int, ...], ...], device: torch.device
) -> None:
    if tensor is None:
        return
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tuple(tensor.shape) not in shapes:
        expected = " or ".join(str(tuple(shape)) for shape in shapes)
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected device {device}, got {tensor.device}")
