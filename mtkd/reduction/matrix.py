"""The matrix of losses ``(N, T)`` to a scalar, or weighed."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .checks import Weight, as_losses, check_arguments, check_weight


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
    weight: Weight,
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
        weight: ``(T,)`` or ``(*leading, T)``, which may require grad; or a callable that makes
            these of the detached matrix ``(*leading, T)`` and the mask; or None.
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
    check_arguments(shape, device, weight, mask, denominator, reduction)
    rows = None if mask is None else mask.reshape(-1, shape[-1])
    parts: Sequence[Any] = split_columns(rows, counts)
    if needs_matrix(weight, reduction):
        columns = [loss.matrix(part, *call) for part, call in zip(parts, calls, strict=True)]
        matrix = columns[0] if len(columns) == 1 else torch.cat(columns, -1)
        return _reduce_matrix(matrix.reshape(shape), weight, mask, denominator, reduction)
    size = 1
    for length in leading:
        size *= length
    weight = _weight_rows(weight, dtype)
    c = coefficients((size, shape[-1]), weight, rows, denominator, reduction, dtype, device)
    pairs = zip(split_columns(c, counts), parts, calls, strict=True)
    sums = [loss.weighted_sum(coefficient, part, *call) for coefficient, part, call in pairs]
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum()


def needs_matrix(weight: Weight, reduction: str) -> bool:
    """Whether the gradient to the matrix is not known before the matrix is."""
    return reduction == "none" or callable(weight)


def reduce_matrix(
    loss: Tensor,
    *,
    weight: Weight = None,
    mask: Tensor | None = None,
    denominator: float | Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Reduce a matrix of losses as every loss reduces its own.

    Args:
        loss: a matrix, such as a loss with reduction="none" returns; differentiable.
        weight: weights of teachers ``(T,)`` or of entries ``(*, T)``; may require grad; or a
            callable (detached matrix, mask) -> weights, such as those of `mtkd.weighting`.
        mask: entries that count, ``(*, T)`` bool; whatever the others hold adds nothing.
        denominator: divides the sum, in place of the sum of the counted weights.
        reduction: "none", "mean" or "sum" over rows and teachers.

    Shape:
        - loss ``(*, T)``.

    Returns:
        ``(*, T)`` for "none", else a 0-dim tensor: float32, or float64 when `loss` is float64.

    Raises:
        ValueError: an argument of the wrong shape, device or value.
        TypeError: an argument of the wrong type or dtype.

    Example:
        >>> import torch
        >>> from mtkd.reduction import reduce_matrix
        >>> loss = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
        >>> reduce_matrix(loss, weight=torch.tensor([1.0, 0.0]))
        tensor(2.)
        >>> reduce_matrix(loss, weight=lambda matrix, mask: (matrix > 2).float())
        tensor(4.5000)
    """
    loss = as_losses(loss, 1)
    check_arguments(tuple(loss.shape), loss.device, weight, mask, denominator, reduction)
    return _reduce_matrix(loss, weight, mask, denominator, reduction)


def _reduce_matrix(
    matrix: Tensor,
    weight: Weight,
    mask: Tensor | None,
    denominator: float | Tensor | None,
    reduction: str,
) -> Tensor:
    shape, dtype, device = tuple(matrix.shape), matrix.dtype, matrix.device
    if callable(weight):
        weight = weight(matrix.detach(), mask)
        check_weight("weight(matrix, mask)", weight, shape, device)
    weight, teachers = _weight_rows(weight, dtype), shape[-1]
    rows = None if mask is None else mask.reshape(-1, teachers)
    matrix = matrix.reshape(-1, teachers)
    if reduction == "none":
        return _weigh(matrix, weight, rows).reshape(shape)
    flat = (matrix.shape[0], teachers)
    c = coefficients(flat, weight, rows, denominator, reduction, dtype, device)
    return (c * _weigh(matrix, None, rows)).sum()


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
    if mask is not None:
        matrix = matrix.masked_fill(~mask, 0.0)
    if weight is None:
        return matrix
    if mask is not None:  # both, since zero gradients must not meet a NaN in the product's backward
        weight = weight.expand_as(matrix).masked_fill(~mask, 0.0)
    return matrix * weight


def _weight_rows(weight: Any, dtype: torch.dtype) -> Tensor | None:
    """Return weights as ``(T,)`` or ``(N, T)``."""
    if weight is None:
        return None
    rows: Tensor = weight.to(dtype)
    return rows.reshape(-1, rows.shape[-1]) if rows.dim() > 1 else rows
