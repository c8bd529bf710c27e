"""From the matrix of losses ``(N, T)`` to what a training step needs: weights, mask, denominator.

With weights w, mask m (True counts) and losses l, all over rows and teachers::

    none   w l, and 0 where masked
    sum    sum(w m l)
    mean   sum(w m l) / sum(w m), or / denominator when one is given

A zero denominator, as when nothing counts, gives 0 and zero gradients.

Weights may be a rule, a callable ``(matrix, mask) -> weights`` such as those of `mtkd.weighting`.
The matrix has to be known before its coefficients then, so gradients cannot come with the value:
one forward makes the matrix, and backward reads the inputs again, as for reduction "none".

Recipes on tokens reduce the matrix ``(*, L, T)`` to one of images first: `token_mean`,
`cls_and_patches`, then `reduce_matrix`.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

REDUCTIONS = ("none", "mean", "sum")
Weight = Tensor | Callable[[Tensor, Tensor | None], Tensor] | None


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
    _check(shape, device, weight, mask, denominator, reduction)
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
    loss = _wide(loss, 1)
    _check(tuple(loss.shape), loss.device, weight, mask, denominator, reduction)
    return _reduce_matrix(loss, weight, mask, denominator, reduction)


def token_mean(loss: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over tokens of a matrix of losses: of each image and teacher, over what counts.

    Args:
        loss: a matrix of tokens, such as a loss with reduction="none" returns; differentiable.
        mask: entries that count (True); whatever the others hold adds nothing.

    Shape:
        - loss ``(*, L, T)`` with L tokens an image; mask ``(*, L, T)`` bool.

    Returns:
        ``(*, T)``, 0 where no token counts (those entries are ``~mask.any(-2)``): float32, or
        float64 when `loss` is float64.

    Raises:
        ValueError: shapes or devices that do not fit.
        TypeError: an argument of the wrong type or dtype.

    Example:
        >>> import torch
        >>> from mtkd.reduction import token_mean
        >>> loss = torch.tensor([[[1.0, 4.0], [3.0, 8.0]]])  # an image of two tokens
        >>> token_mean(loss)
        tensor([[2., 6.]])
        >>> token_mean(loss, torch.tensor([[[True, False], [False, False]]]))
        tensor([[1., 0.]])
    """
    loss = _wide(loss, 2)
    check_mask(mask, tuple(loss.shape), loss.device)
    if mask is None:
        return loss.sum(-2) / max(loss.shape[-2], 1)
    return loss.masked_fill(~mask, 0.0).sum(-2) / mask.sum(-2).clamp(min=1)


def cls_and_patches(loss: Tensor, mask: Tensor | None = None) -> Tensor:
    """Average of the first token's loss and of the mean over the others, as UNIC has it.

    The first token (cls) weighs as much as all the patches together; where nothing of one of the
    two counts, the other is all there is.

    Args:
        loss: a matrix of tokens, the first of each image its cls token; differentiable.
        mask: entries that count (True); whatever the others hold adds nothing.

    Shape:
        - loss ``(*, L, T)`` with L tokens an image, at least one; mask ``(*, L, T)`` bool.

    Returns:
        ``(*, T)``, 0 where no token counts (those entries are ``~mask.any(-2)``): float32, or
        float64 when `loss` is float64.

    Raises:
        ValueError: shapes or devices that do not fit, no token.
        TypeError: an argument of the wrong type or dtype.

    Source:
        Sariyildiz et al., "UNIC", ECCV 2024, arXiv 2408.05088.

    Example:
        >>> import torch
        >>> import mtkd.functional as F
        >>> from mtkd.reduction import cls_and_patches, reduce_matrix
        >>> from mtkd.weighting import teacher_dropping
        >>> student = torch.randn(2, 5, 8, requires_grad=True)  # two images of a cls and 4 patches
        >>> tokens = F.alignment(student, torch.randn(2, 5, 8), (3, 5), reduction="none")
        >>> images = cls_and_patches(tokens)
        >>> images.shape
        torch.Size([2, 2])
        >>> reduce_matrix(images, weight=teacher_dropping).backward()  # UNIC's loss
    """
    loss = _wide(loss, 2)
    if loss.shape[-2] < 1:
        raise ValueError(f"loss: expected at least one token, got shape {tuple(loss.shape)}")
    check_mask(mask, tuple(loss.shape), loss.device)
    patches = None if mask is None else mask[..., 1:, :]
    both = torch.stack((loss[..., 0, :], token_mean(loss[..., 1:, :], patches)), -2)
    if mask is None or patches is None:
        return token_mean(both) if loss.shape[-2] > 1 else both[..., 0, :]
    return token_mean(both, torch.stack((mask[..., 0, :], patches.any(-2)), -2))


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


def _wide(loss: Tensor, dimensions: int) -> Tensor:
    """Check a matrix that a user gives; return it in the dtype of losses."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss: expected a tensor, got {type(loss).__name__}")
    if not loss.is_floating_point():
        raise TypeError(f"loss: expected a floating-point tensor, got {loss.dtype}")
    if loss.dim() < dimensions or loss.shape[-1] < 1:
        expected = "(*, T)" if dimensions == 1 else "(*, L, T)"
        shape = tuple(loss.shape)
        raise ValueError(f"loss: expected shape {expected}, at least one teacher, got {shape}")
    return loss.to(torch.promote_types(loss.dtype, torch.float32))


def _check(
    shape: tuple[int, ...],
    device: torch.device,
    weight: Weight,
    mask: Tensor | None,
    denominator: float | Tensor | None,
    reduction: str,
) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if weight is not None and not callable(weight):
        check_weight("weight", weight, shape, device)
    check_mask(mask, shape, device)
    if denominator is not None and reduction != "mean":
        raise ValueError(f"denominator: expected with reduction='mean' alone, got {reduction!r}")
    if isinstance(denominator, Tensor):
        _check_tensor("denominator", denominator, ((),), device)
    elif denominator is not None and not isinstance(denominator, (int, float)):
        expected = "a number or a 0-dim tensor"
        raise TypeError(f"denominator: expected {expected}, got {type(denominator).__name__}")


def check_mask(mask: Any, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise unless `mask` is None or a bool tensor of this shape and device."""
    _check_tensor("mask", mask, (shape,), device)
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask: expected a bool tensor (True counts), got {mask.dtype}")


def check_weight(name: str, weight: Any, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise unless `weight` is a floating-point tensor ``(T,)``, or of this shape ``(*, T)``."""
    if not isinstance(weight, Tensor):
        expected = "a tensor or a callable" if name == "weight" else "a tensor"
        raise TypeError(f"{name}: expected {expected}, got {type(weight).__name__}")
    _check_tensor(name, weight, (shape[-1:], shape), device)
    if not weight.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {weight.dtype}")


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
