"""From each rank's matrix of losses to the one number that a single process would have."""

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from ..reduction import Weight, check_weight, reduce_matrix
from .exchange import place


def reduce_over_ranks(
    loss: Tensor,
    *,
    weight: Weight = None,
    mask: Tensor | None = None,
    denominator: float | Tensor | None = None,
    reduction: str = "mean",
    group: ProcessGroup | None = None,
) -> Tensor:
    """Reduce the matrices of all ranks as one process with all their rows would.

    The mean is over what counts on any rank, however unevenly: a mean of the ranks' means weighs
    a rank's rows by how few of them count. Gradients averaged over ranks, as DDP and FSDP average
    them, are those of that one process.

    Args:
        loss: this rank's matrix, such as a loss with reduction="none" returns; differentiable.
        weight: weights of the entries, or a callable that makes them of this rank's detached
            matrix and mask.
        mask: entries that count (True); whatever the others hold adds nothing.
        denominator: for "mean", what the sum over all ranks is divided by; the same on all.
        reduction: "mean" or "sum" over all ranks, or "none": this rank's matrix.
        group: the ranks; by default all. Without torch.distributed there is one.

    Shape:
        - loss ``(*, T)``; weight ``(T,)`` or ``(*, T)``; mask ``(*, T)`` bool. The leading
          dimensions may differ between ranks.

    Returns:
        A 0-dim tensor, the same on every rank, or ``(*, T)`` for "none".

    Raises:
        ValueError: shapes, devices or values that do not fit.
        TypeError: an argument of the wrong type or dtype.

    Note:
        One all-reduce of two numbers. Every rank must call it, and call backward.

    Example:
        >>> import torch
        >>> from mtkd.distributed import reduce_over_ranks
        >>> reduce_over_ranks(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))  # one process
        tensor(2.5000)
    """
    _, ranks = place(group)
    if callable(weight) and isinstance(loss, Tensor):
        weight = weight(loss.detach(), mask)  # once: it may draw random numbers
        check_weight("weight(matrix, mask)", weight, tuple(loss.shape), loss.device)
    if ranks == 1 or reduction != "mean" or denominator is not None:
        own = reduce_matrix(
            loss, weight=weight, mask=mask, denominator=denominator, reduction=reduction
        )
        if ranks == 1 or reduction == "none":
            return own
        return _with_gradient(_sum(own, group), ranks * own)
    total = reduce_matrix(loss, weight=weight, mask=mask, reduction="sum")
    counted = reduce_matrix(torch.ones_like(loss), weight=weight, mask=mask, reduction="sum")
    whole, denominator = _sum(torch.stack((total, counted.to(total))), group).unbind()
    scale = torch.where(
        denominator == 0, 0.0, 1.0 / torch.where(denominator == 0, 1.0, denominator)
    )
    mean = whole * scale
    return _with_gradient(mean, ranks * scale * (total - mean * counted))


def _sum(own: Tensor, group: ProcessGroup | None) -> Tensor:
    total = own.detach().clone()
    distributed.all_reduce(total, group=group)
    return total


def _with_gradient(value: Tensor, own: Tensor) -> Tensor:
    """Return `value` with the gradient of `own`."""
    return value + (own - own.detach())
