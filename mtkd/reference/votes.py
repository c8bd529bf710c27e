"""Votes: a student's class probabilities against what its teachers vote for.

Every vote is a distribution q over the C classes, one a column k of the matrix::

    loss_nk              = log sum_c exp(s_nc) - sum_c q_nkc s_nc
    d loss_nk / d s_nc   = softmax(s_n)_c - q_nkc

    each        q_nt uniform over the classes of teacher t's largest logit
    soft        q_nt = softmax(teacher_nt / temperature)
    plurality   q_n  uniform over the classes of the largest sum_t w_nt q_nt, with q_nt of "each"
    mean        q_n  = sum_t w_nt q_nt / sum_t w_nt, with q_nt of "soft"

The first two have a column a teacher, the others a single one and weights ``(N, T)``, 0 where a
teacher does not count. A teacher's row that holds NaN, or no number above -inf, has no vote: q is
NaN. Where q is 0, a student's logit of -inf adds nothing.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .columns import accumulate_dtype

TIED = (
    1e-5  # shares of a vote that differ relatively by less are equal: sums of weights are rounded
)


def largest(logits: Tensor) -> Tensor:
    """Return where a row's largest logit is; nowhere in a row that has no vote."""
    most = logits.amax(-1, keepdim=True)
    return (logits == most) & (most > -torch.inf)


def winners(shares: Tensor) -> Tensor:
    """Return where the largest share of a vote is, up to rounding."""
    return shares >= (1 - TIED) * shares.amax(-1, keepdim=True)


def uniform(chosen: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the distribution that is uniform over the chosen classes; NaN where there are none."""
    return chosen.to(dtype) / chosen.sum(-1, keepdim=True)


def _targets(
    mask: Tensor | None,
    teacher: Sequence[Tensor],
    weight: Tensor | None,
    temperature: float,
    hard: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Return q ``(N, K, C)``."""
    logits = teacher[0] if teacher[0].dim() == 3 else torch.stack(list(teacher), 1)
    counted = mask if weight is None else weight != 0
    logits = logits.to(dtype)
    if counted is not None:  # whatever an uncounted entry holds, it must not become NaN
        logits = logits.masked_fill(~counted.unsqueeze(-1), 0.0)
    q = uniform(largest(logits), dtype) if hard else torch.softmax(logits / temperature, -1)
    if weight is None:
        return q
    weight = weight.to(dtype)
    total = weight.sum(-1, keepdim=True)
    share = weight / total.masked_fill(total == 0, 1.0)
    q = (share.unsqueeze(-1) * q).sum(1, keepdim=True)
    return uniform(winners(q), dtype) if hard else q


def _student(mask: Tensor | None, student: Tensor, dtype: torch.dtype) -> Tensor:
    student = student.to(dtype)
    return student if mask is None else student.masked_fill(~mask.any(-1, keepdim=True), 0.0)


def majority_vote(
    mask: Tensor | None,
    dims: Sequence[int],
    student: Tensor,
    teacher: Sequence[Tensor],
    weight: Tensor | None,
    temperature: float,
    hard: bool,
) -> Tensor:
    """Return the matrix of losses ``(N, K)``; dims has the number of classes for each column.

    Shapes: student ``(N, C)``; teacher one tensor ``(N, T, C)`` or T tensors ``(N, C)``; mask
    ``(N, K)``; weight ``(N, T)`` makes a single column of all teachers, None a column of each.
    """
    dtype = accumulate_dtype(student)
    q = _targets(mask, teacher, weight, temperature, hard, dtype)
    log_p = torch.log_softmax(_student(mask, student, dtype), -1).unsqueeze(1)
    loss = -torch.where(q == 0, 0.0, q * log_p).sum(-1)
    return loss if mask is None else loss.masked_fill(~mask, 0.0)


def majority_vote_gradient(
    grad: Tensor,
    mask: Tensor | None,
    dims: Sequence[int],
    student: Tensor,
    teacher: Sequence[Tensor],
    weight: Tensor | None,
    temperature: float,
    hard: bool,
) -> tuple[Tensor]:
    """Return the gradient to student, given the gradient to the matrix."""
    dtype = accumulate_dtype(student)
    q = _targets(mask, teacher, weight, temperature, hard, dtype)
    grad = grad.to(dtype)
    if mask is not None:
        grad = grad.masked_fill(~mask, 0.0)
    p = torch.softmax(_student(mask, student, dtype), -1)
    total = grad.sum(-1, keepdim=True) * p - (grad.unsqueeze(-1) * q).sum(1)
    return (total.to(student.dtype),)


def majority_vote_saved(
    mask: Tensor | None, dims: Sequence[int], student: Tensor, *args: Any
) -> Tensor:
    """Return a tensor like what kernels save: of each vote, what its q is made from."""
    teacher, weight, _, hard = args
    columns = len(teacher) if teacher[0].dim() == 2 else teacher[0].shape[1]
    if hard:  # the class, -1 where it is not one
        shape = (student.shape[0], columns if weight is None else 1)
        return torch.full(shape, -1, dtype=torch.int64, device=student.device)
    # a teacher's largest logit, and the sum of exponentials of what the others are less
    return student.new_zeros((student.shape[0], columns, 2), dtype=accumulate_dtype(student))
