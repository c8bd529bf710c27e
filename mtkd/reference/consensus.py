"""Consensus of many messages as plain formulas: quantiles of weighted votes, and mean shift.

Every plain vote is one integral over the quantile function Q of the messages, which takes each
message for its share of the weight::

    consensus = 1 / (1 - 2 trim) * (integral of Q from trim to 1 - trim)

``trim`` 0 is the weighted mean, between it is the trimmed mean, and its limit 1/2 is the weighted
median, the midpoint of two messages where the weight splits in two halves between them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .columns import accumulate_dtype

KERNELS = ("none", "flat", "linear", "gaussian")  # the operators name them by their numbers
TIE = 1e-6  # share of the weight within which a cumulative weight is one half
NO_CLASS = 1e-6  # sum of the classes' votes below which no class has one: the mean decides


def consensus(
    messages: Sequence[Tensor],
    weight: Tensor | None,
    start: Tensor | None,
    low: Tensor | None,
    unit: Tensor | None,
    class_dim: int | None,
    logits: bool,
    trim: float,
    kernel: int,
    bandwidth: float,
    iterations: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the consensus, the confidence, and the shares of the weight that a kernel leaves.

    Args:
        messages: P tensors ``(*,)``.
        weight: ``(P, *)``, class maps without classes; None weighs all alike.
        start: the consensus that mean shift begins at; None begins at the plain vote.
        low: subtracted from distances, ``(*,)``; with `unit`, which then divides them.
        unit: None leaves the distances as they are.
        class_dim: where class maps have their classes.
        logits: whether class maps are logits.
        trim: the share of the weight left out at each end.
        kernel: a number of `KERNELS`.
        bandwidth: the kernel's, and how far a message may be that agrees.
        iterations: steps of mean shift.
    """
    dtype = accumulate_dtype(messages[0])
    x = torch.stack([message.to(dtype) for message in messages])
    if class_dim is not None:
        x = x.movedim(class_dim + 1, 1)
        x = x.softmax(1) if logits else x
        x = torch.where(x.isnan().any(1, keepdim=True), torch.nan, x)
    else:
        x = x.unsqueeze(1)
    base = x.new_ones(()) if weight is None else weight.to(dtype)
    base = torch.where(base > 0, base, 0.0).expand(x[:, 0].shape)
    used = base * ~x[:, 0].isnan()
    center = None if start is None else start.to(dtype).unsqueeze(0)
    if start is not None and class_dim is not None:
        center = start.to(dtype).movedim(class_dim, 0)
    if center is None or not kernel:
        center = _vote(x, used, trim, class_dim is not None)
    for _ in range(iterations if kernel else 0):
        shifted = base * similarity(distance(x, center, low, unit), kernel, bandwidth, unit)
        shifted = torch.where(shifted > 0, shifted, 0.0)  # an abstaining message has none
        center = torch.where(
            shifted.sum(0) > 0, _vote(x, shifted, trim, class_dim is not None), center
        )
        used = shifted
    if class_dim is not None:
        confidence = torch.where(center.isnan().any(0), 0.0, center.amax(0))
        center = center.movedim(0, class_dim)
    else:
        near = distance(x, center, low, unit) <= bandwidth
        confidence = _ratio((base * near).sum(0), base.sum(0))
        center = center.squeeze(0)
    shares = _ratio(used, used.sum(0)) if kernel else x.new_empty(0)
    like = torch.empty_like(messages[0]).copy_(center)  # its layout too
    return like, confidence.contiguous(), shares.contiguous()


def spread(messages: Sequence[Tensor], center: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least and the largest distance of an element's messages to a center.

    A message that abstains has none; where all do, infinity and 0.
    """
    wide = accumulate_dtype(center)
    low = torch.full(center.shape, torch.inf, dtype=wide, device=center.device)
    high = torch.zeros_like(low)
    for message in messages:
        far = _apart(message.to(wide), center.to(wide))
        low = torch.where(far < low, far, low)
        high = torch.where(far > high, far, high)
    return low.contiguous(), high.contiguous()


def distance(x: Tensor, center: Tensor, low: Tensor | None, unit: Tensor | None) -> Tensor:
    """Return each message's distance: absolute of numbers, the total variation of classes."""
    far = _apart(x, center)
    far = far.squeeze(1) if x.shape[1] == 1 else far.sum(1) / 2
    return far if low is None or unit is None else (far - low) / unit


def _apart(x: Tensor, center: Tensor) -> Tensor:
    # equals are at no distance, infinite ones too
    return torch.where(x == center, 0.0, (x - center).abs())


def similarity(far: Tensor, kernel: int, bandwidth: float, unit: Tensor | None) -> Tensor:
    """Return a kernel's weight for each distance."""
    if KERNELS[kernel] == "gaussian":
        return torch.exp(-0.5 * (far / bandwidth).square())
    height = 1 - far / (bandwidth if unit is None else 1.0) if KERNELS[kernel] == "linear" else 1.0
    return torch.where(far <= bandwidth, height, 0.0)


def _vote(x: Tensor, weight: Tensor, trim: float, classes: bool) -> Tensor:
    """Return the vote of ``(P, K, *)`` messages with weights ``(P, *)``."""
    weight = weight.unsqueeze(1).expand(x.shape)
    center = _quantiles(x, weight, trim)
    if not classes:
        return center
    total = center.sum(0)
    mean = _quantiles(x, weight, 0.0) if trim else center
    center = torch.where(total < NO_CLASS, mean, center)
    return center / center.sum(0)


def _quantiles(x: Tensor, weight: Tensor, trim: float) -> Tensor:
    """Return the mean of the quantile function between trim and 1 - trim."""
    total = weight.sum(0)
    if not trim:
        return torch.where(weight > 0, weight * x, 0.0).sum(0) / total
    x, order = torch.where(x.isnan(), torch.inf, x).sort(0)
    weight = weight.gather(0, order)
    end = weight.cumsum(0)
    if trim == 0.5:
        last = len(x) - 1
        lower = (end < (0.5 - TIE) * total).sum(0, keepdim=True).clamp(max=last)
        upper = (end <= (0.5 + TIE) * total).sum(0, keepdim=True).clamp(max=last)
        middle = 0.5 * x.gather(0, lower) + 0.5 * x.gather(0, upper)
        return torch.where(total > 0, middle.squeeze(0), torch.nan)
    first, last_ = trim * total, total - trim * total
    inside = torch.minimum(end, last_) - torch.maximum(end - weight, first)
    return torch.where(inside > 0, inside * x, 0.0).sum(0) / (last_ - first)


def _ratio(x: Tensor, total: Tensor) -> Tensor:
    return torch.where(total > 0, x / total, 0.0)
