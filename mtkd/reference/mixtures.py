"""Losses against a mixture of the teachers: in probability, and in likelihood (Dirichlet).

With p the student's softmax, q_t teacher t's, w_t its weight and W the sum of the counted ones::

    q    = sum_t w_t q_t / W
    loss = scale sum_c q_c (log q_c - log p_c)                             mixture_kl

    d loss / d s   = scale (p - q) / temperature
    d loss / d w_t = scale sum_c (q_tc - q_c) (log q_c - log p_c) / W

    a_t  = lgamma(C + k_t) - sum_c lgamma(1 + k_t q_tc) + k_t sum_c q_tc log p_c
    loss = -log sum_t w_t exp(a_t) / W                                     dirichlet_mixture

    d loss / d s   = sum_t r_t k_t (p - q_t),        r_t = w_t exp(a_t) / sum_u w_u exp(a_u)
    d loss / d w_t = 1 / W - r_t / w_t
    d loss / d k_t = -r_t (digamma(C + k_t) - sum_c q_tc digamma(1 + k_t q_tc) + sum_c q_tc log p_c)

where a_t is the log-density of p under Dirichlet(1 + k_t q_t). Teachers are walked over a few at a
time, one where classes are many: nothing of size ``(N, T, C)`` is made. Shapes: student ``(N, C)``;
teacher one tensor ``(N, T, C)`` or T tensors ``(N, C)``; weight, counted and concentration k ``(N,
T)``; mask and loss ``(N, 1)``.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .columns import accumulate_dtype

TOGETHER = 4096  # classes of a row, of several teachers, that are turned into probabilities at once
FARTHEST = 80.0  # log-densities of teachers of weight 0 count as at most so far above the others'


class _Rows:
    """What both losses read: the student's log-probabilities, the weights, some teachers a time."""

    def __init__(
        self,
        mask: Tensor | None,
        student: Tensor,
        teacher: Sequence[Tensor],
        weight: Tensor,
        counted: Tensor | None,
        temperature: float,
    ) -> None:
        self.dtype, self.temperature = accumulate_dtype(student), temperature
        logits, weight = student.to(self.dtype), weight.to(self.dtype)
        if mask is not None:  # whatever an uncounted entry holds, it must not become NaN
            logits = logits.masked_fill(~mask, 0.0)
            counted = mask.expand_as(weight) if counted is None else counted & mask
        self.counted = counted
        self.weight = self.zero_uncounted(weight)
        self.log_p = torch.log_softmax(logits / temperature, -1)
        self.teachers = teacher
        total = self.weight.sum(-1, keepdim=True)
        self.total = total + (total == 0).to(self.dtype)

    def zero_uncounted(self, matrix: Tensor) -> Tensor:
        """Zero the entries of uncounted teachers."""
        return matrix if self.counted is None else matrix.masked_fill(~self.counted, 0.0)

    def probabilities(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield some teachers, and their probabilities ``(N, t, C)``."""
        count, step = self.weight.shape[-1], max(1, TOGETHER // self.log_p.shape[-1])
        for first in range(0, count, step):
            some = slice(first, first + step)
            logits = self._logits(some)
            if self.counted is not None:
                logits = logits.masked_fill(~self.counted[:, some, None], 0.0)
            yield some, torch.softmax(logits / self.temperature, -1)

    def _logits(self, some: slice) -> Tensor:
        if self.teachers[0].dim() == 3:
            return self.teachers[0][:, some].to(self.dtype)
        return torch.stack([logits.to(self.dtype) for logits in self.teachers[some]], 1)

    def weighted_sum(self, weight: Tensor) -> Tensor:
        """Sum the teachers' probabilities times a weight ``(N, T)`` each."""
        total = torch.zeros_like(self.log_p)
        for some, q in self.probabilities():
            total = total + (weight[:, some, None] * q).sum(1)
        return total


def _upstream(grad: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    grad = grad.to(dtype)
    return grad if mask is None else grad.masked_fill(~mask, 0.0)


def _log_ratio(q: Tensor, p: Tensor, log_p: Tensor) -> Tensor:
    """Return log(q / p), q for this at least the least normal number; 0 where p is 0."""
    tiny = torch.finfo(q.dtype).tiny
    normal, impossible = (q > tiny) & (p > tiny), log_p == -torch.inf
    near = torch.log(torch.where(normal, q, 1.0) / torch.where(normal, p, 1.0))
    far = q.clamp(min=tiny).log() - log_p.masked_fill(impossible, 0.0)
    return torch.where(normal, near, far).masked_fill(impossible, 0.0)


def mixture_kl(
    mask: Tensor | None,
    dims: Sequence[int],
    student: Tensor,
    teacher: Sequence[Tensor],
    weight: Tensor,
    counted: Tensor | None,
    temperature: float,
    scale: float,
) -> Tensor:
    """Return the divergences ``(N, 1)`` in nats, times `scale`; dims has the number of classes."""
    rows = _Rows(mask, student, teacher, weight, counted, temperature)
    q = rows.weighted_sum(rows.weight / rows.total)
    p, impossible = rows.log_p.exp(), (q > 0) & (rows.log_p == -torch.inf)
    # p - q sums to 0, and takes away what rounding of the two sums adds
    terms = q * _log_ratio(q, p, rows.log_p) + (p - q)
    loss = scale * terms.masked_fill(impossible, torch.inf).sum(-1, keepdim=True)
    return loss if mask is None else loss.masked_fill(~mask, 0.0)


def mixture_kl_gradient(
    grad: Tensor,
    mask: Tensor | None,
    dims: Sequence[int],
    student: Tensor,
    teacher: Sequence[Tensor],
    weight: Tensor,
    counted: Tensor | None,
    temperature: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the gradients to student and weight, given the gradient to the matrix."""
    rows = _Rows(mask, student, teacher, weight, counted, temperature)
    grad = scale * _upstream(grad, mask, rows.dtype)
    q = rows.weighted_sum(rows.weight / rows.total)
    p = rows.log_p.exp()
    to_student = grad / temperature * (p - q)
    ratio = _log_ratio(q, p, rows.log_p)
    across = ratio.unsqueeze(1)
    cross = torch.cat([(q_t * across).sum(-1) for _, q_t in rows.probabilities()], -1)
    to_weight = grad / rows.total * (cross - (q * ratio).sum(-1, keepdim=True))
    return to_student.to(student.dtype), rows.zero_uncounted(to_weight).to(weight.dtype)


def _log_densities(rows: _Rows, concentration: Tensor) -> Tensor:
    """Return a less lgamma(C), ``(N, T)``: small, so that posteriors keep their digits."""
    classes = rows.log_p.shape[-1]
    impossible = (rows.log_p == -torch.inf).unsqueeze(1)
    log_p = rows.log_p.unsqueeze(1).masked_fill(impossible, 0.0)
    columns = []
    for some, q in rows.probabilities():
        extra = concentration[:, some, None] * q
        column = (extra * log_p - torch.lgamma(1.0 + extra)).sum(-1)
        missed = (impossible & (extra > 0)).any(-1)
        columns.append(column.masked_fill(missed, -torch.inf))
    normaliser = torch.lgamma(classes + concentration.double()) - math.lgamma(classes)
    return normaliser.to(rows.dtype) + torch.cat(columns, -1)


def _density_slopes(rows: _Rows, concentration: Tensor) -> Tensor:
    """Return the derivatives of a by the concentrations, ``(N, T)``."""
    log_p = rows.log_p.masked_fill(rows.log_p == -torch.inf, 0.0).unsqueeze(1)
    columns = []
    for some, q in rows.probabilities():
        extra = concentration[:, some, None] * q
        columns.append((q * (log_p - torch.digamma(1.0 + extra))).sum(-1))
    return torch.digamma(rows.log_p.shape[-1] + concentration) + torch.cat(columns, -1)


def _likelihood(rows: _Rows, densities: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return exp(a - m) ``(N, T)``, the weighted sum of it and m ``(N, 1)``, the largest a."""
    largest = densities.masked_fill(rows.weight == 0, -torch.inf).amax(-1, keepdim=True).detach()
    largest = largest.masked_fill(largest == -torch.inf, 0.0)
    relative = (densities - largest).clamp(max=FARTHEST).exp()
    return relative, (rows.weight * relative).sum(-1, keepdim=True), largest


def dirichlet_mixture(
    mask: Tensor | None,
    dims: Sequence[int],
    student: Tensor,
    teacher: Sequence[Tensor],
    weight: Tensor,
    counted: Tensor | None,
    concentration: Tensor,
) -> Tensor:
    """Return the negative log-likelihoods ``(N, 1)``; dims has the number of classes."""
    rows = _Rows(mask, student, teacher, weight, counted, 1.0)
    densities = _log_densities(rows, rows.zero_uncounted(concentration.to(rows.dtype)))
    _, total, largest = _likelihood(rows, densities)
    loss = rows.total.log() - total.masked_fill(total == 0, 1.0).log() - largest
    loss = loss.masked_fill(total == 0, torch.inf) - math.lgamma(rows.log_p.shape[-1])
    return loss if mask is None else loss.masked_fill(~mask, 0.0)


def dirichlet_mixture_gradient(
    grad: Tensor,
    mask: Tensor | None,
    dims: Sequence[int],
    student: Tensor,
    teacher: Sequence[Tensor],
    weight: Tensor,
    counted: Tensor | None,
    concentration: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients to student, weight and concentration."""
    rows = _Rows(mask, student, teacher, weight, counted, 1.0)
    k = rows.zero_uncounted(concentration.to(rows.dtype))
    grad = _upstream(grad, mask, rows.dtype)
    relative, total, _ = _likelihood(rows, _log_densities(rows, k))
    share = relative / torch.where(total == 0, 1.0, total)
    posterior = grad * rows.weight * share
    pull = posterior * k
    to_student = pull.sum(-1, keepdim=True) * rows.log_p.exp() - rows.weighted_sum(pull)
    to_weight = rows.zero_uncounted(grad * (1.0 / rows.total - share))
    to_concentration = rows.zero_uncounted(-posterior * _density_slopes(rows, k))
    return (
        to_student.to(student.dtype),
        to_weight.to(weight.dtype),
        to_concentration.to(concentration.dtype),
    )
