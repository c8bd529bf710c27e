"""Divergences between a student's and a teacher's distributions over classes, given as logits.

Over a teacher's classes, with ``p_S = softmax(student / tau)``, ``p_T = softmax(teacher / tau)``::

    loss = scale (forward KL(p_T || p_S) + reverse KL(p_S || p_T))
    loss = scale (forward KL(p_T || m) + reverse KL(p_S || m)),  m = forward p_T + reverse p_S

the second with `mixture`, whose weights sum to 1. So Jeffreys' divergence has both weights 1, and
Jensen-Shannon's is the mixture with weights beta and 1 - beta. With x the logarithms of the ratios
in a sum, the gradients to logits are::

    d KL(p || q) / d own     = p (x - KL(p || q)) / tau        own logits: those of p; x = log p / q
    d KL(p || q) / d other   = (q - p) / tau                   the other ones: those of q
    d loss / d own           = scale w p (x - KL(p || m)) / tau   the mixture; p's weight is w

(m's own derivatives cancel between the mixture's two terms.) A class with logit -inf has
probability 0 on its side: it adds 0 log 0 = 0, and its gradient is 0. A probability that meets a
logit of -inf on the other side makes the loss infinite, and so does a side without any class, which
is no distribution; an infinite loss has gradients 0.

Shapes: teacher ``(N, D)``, student the same, or ``(N, C)`` where it is shared by teachers of C
classes each; mask and loss ``(N, T)``.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .columns import (
    accumulate_dtype,
    expand_columns,
    segment_max,
    segment_sum,
    zero_uncounted_rows,
)
from .layers import project, project_gradient

INF = float("inf")


class Settings(NamedTuple):
    """The numbers of a loss."""

    forward: float
    reverse: float
    mixture: bool
    temperature: float
    scale: float


class _Side(NamedTuple):
    """The distributions of one side."""

    logits: Tensor  # (N, D): less the largest, over the temperature
    p: Tensor  # (N, D)
    normaliser: Tensor  # (N, T): log sum exp logits
    empty: Tensor  # (N, T): whether all probabilities are 0


class _Term(NamedTuple):
    """A divergence of one side from the other, or from the mixture."""

    value: Tensor  # (N, T)
    x: Tensor  # (N, D): logarithms of the ratios; 0 where nothing is added
    infinite: Tensor | None = None  # (N, T)


def _side(logits: Tensor, dims: Sequence[int], temperature: float) -> _Side:
    largest = segment_max(logits.detach(), dims)
    empty = largest == -INF
    largest = largest.masked_fill(empty, 0.0)
    logits = (logits - expand_columns(largest, dims)) / temperature
    exponentials = logits.exp()
    total = torch.where(empty, 1.0, segment_sum(exponentials, dims))
    return _Side(logits, exponentials / expand_columns(total, dims), total.log(), empty)


def _sides(
    mask: Tensor | None, dims: Sequence[int], student: Tensor, teacher: Tensor, temperature: float
) -> tuple[_Side, _Side]:
    dtype = accumulate_dtype(student, teacher)
    student, teacher = student.to(dtype), teacher.to(dtype)
    if is_shared(dims, student):
        student = student.repeat(1, len(dims))
    if mask is not None:  # whatever a masked entry holds, it must not reach a derivative as NaN
        masked = ~expand_columns(mask, dims)
        student, teacher = student.masked_fill(masked, 0.0), teacher.masked_fill(masked, 0.0)
    return _side(student, dims, temperature), _side(teacher, dims, temperature)


def is_shared(dims: Sequence[int], student: Tensor) -> bool:
    """Whether the student's columns are one distribution for all teachers."""
    return student.shape[-1] != sum(dims)


def _from_other(own: _Side, other: _Side, dims: Sequence[int]) -> _Term:
    """Return KL(own || other)."""
    normaliser = expand_columns(own.normaliser - other.normaliser, dims)
    here, there = own.p > 0, other.logits != -INF
    x = torch.where(here & there, own.logits - other.logits - normaliser, 0.0)
    infinite = segment_sum((here & ~there).to(x.dtype), dims) > 0
    return _Term(segment_sum(own.p * x, dims), x, infinite)


def _from_mixture(own: _Side, mixture: Tensor, dims: Sequence[int]) -> _Term:
    """Return KL(own || mixture)."""
    here = own.p > 0
    tiny = torch.finfo(mixture.dtype).tiny
    ratio = torch.where(here, own.p, 1.0) / torch.where(here, mixture, 1.0).clamp(min=tiny)
    x = torch.where(here, ratio.log(), 0.0)
    return _Term(segment_sum(own.p * x, dims), x)


def _terms(
    student: _Side, teacher: _Side, dims: Sequence[int], settings: Settings
) -> tuple[_Term | None, _Term | None]:
    """Return the terms of the teacher's distribution and of the student's; None has weight 0."""
    if settings.mixture:
        mixture = settings.forward * teacher.p + settings.reverse * student.p
        return _from_mixture(teacher, mixture, dims), _from_mixture(student, mixture, dims)
    forward = _from_other(teacher, student, dims) if settings.forward else None
    reverse = _from_other(student, teacher, dims) if settings.reverse else None
    return forward, reverse


def _infinite(student: _Side, teacher: _Side, *terms: _Term | None) -> Tensor:
    infinite = student.empty | teacher.empty
    for term in terms:
        if term is not None and term.infinite is not None:
            infinite = infinite | term.infinite
    return infinite


def kl_div(
    mask: Tensor | None,
    dims: Sequence[int],
    student: Tensor,
    teacher: Tensor,
    *settings: Any,
) -> Tensor:
    """Return the matrix of losses ``(N, T)``; settings are those of `Settings`."""
    numbers = Settings(*settings)
    sides = _sides(mask, dims, student, teacher, numbers.temperature)
    forward, reverse = _terms(*sides, dims, numbers)
    loss = torch.zeros_like(sides[0].normaliser)
    for weight, term in ((numbers.forward, forward), (numbers.reverse, reverse)):
        if term is not None:
            loss = loss + weight * term.value
    loss = (numbers.scale * loss).masked_fill(_infinite(*sides, forward, reverse), INF)
    return loss if mask is None else loss.masked_fill(~mask, 0.0)


def kl_div_gradient(
    grad: Tensor,
    mask: Tensor | None,
    dims: Sequence[int],
    student: Tensor,
    teacher: Tensor,
    *settings: Any,
) -> tuple[Tensor, Tensor]:
    """Return the gradients to student and teacher, given the gradient to the matrix."""
    numbers = Settings(*settings)
    own, other = _sides(mask, dims, student, teacher, numbers.temperature)
    forward, reverse = _terms(own, other, dims, numbers)
    nothing = _infinite(own, other, forward, reverse)
    if mask is not None:
        nothing = nothing | ~mask
    factor = (grad * (numbers.scale / numbers.temperature)).masked_fill(nothing, 0.0)
    spread = expand_columns(factor.to(own.p.dtype), dims)
    to_student, to_teacher = torch.zeros_like(own.p), torch.zeros_like(own.p)
    if forward is not None:
        to_teacher = numbers.forward * _to_own(other, forward, dims)
    if reverse is not None:
        to_student = numbers.reverse * _to_own(own, reverse, dims)
    if not numbers.mixture:
        difference = own.p - other.p
        to_student = to_student + numbers.forward * difference
        to_teacher = to_teacher - numbers.reverse * difference
    to_student, to_teacher = spread * to_student, spread * to_teacher
    if is_shared(dims, student):
        to_student = to_student.unflatten(1, (len(dims), -1)).sum(1)
    return to_student.to(student.dtype), to_teacher.to(teacher.dtype)


def _to_own(side: _Side, term: _Term, dims: Sequence[int]) -> Tensor:
    return side.p * (term.x - expand_columns(term.value, dims))


def linear_kl_div(
    mask: Tensor | None,
    dims: Sequence[int],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *rest: Any,
) -> Tensor:
    """Return `kl_div` of ``student = input @ weight.T + bias``.

    Shapes: input ``(N, H)``, or ``(T, N, H)`` for teachers of equally many classes with inputs of
    their own; weight ``(D, H)``, bias ``(D,)``. The teacher's logits are given, or for each teacher
    features, a weight and a bias or None, which make them. The last two arguments steer kernels
    only.
    """
    student, teacher, settings = _linear_sides(mask, input, weight, bias, *rest)
    return kl_div(mask, dims, student, teacher, *settings)


def _linear_sides(
    mask: Tensor | None,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: Tensor | None,
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *rest: Any,
) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    dtype = accumulate_dtype(input, weight)
    student = project(zero_uncounted_rows(input, mask), weight, bias, dtype)
    if teacher is None:
        layers = zip(features, weights, biases, strict=True)
        teacher = torch.cat([project(*layer, dtype) for layer in layers], -1)
    return student, teacher.to(dtype), rest[:-2]


def linear_kl_div_gradient(
    grad: Tensor,
    mask: Tensor | None,
    dims: Sequence[int],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor | None, ...]:
    """Return the gradients to input, weight and bias."""
    student, teacher, settings = _linear_sides(mask, input, weight, bias, *rest)
    student_grad, _ = kl_div_gradient(grad, mask, dims, student, teacher, *settings)
    input = zero_uncounted_rows(input, mask)
    to_input, to_weight, to_bias = project_gradient(student_grad, input, weight, bias)
    return to_input.to(input.dtype), to_weight, to_bias


def linear_kl_div_saved(mask: Tensor | None, dims: Sequence[int], *args: Any) -> Tensor:
    """Return an empty tensor of the size of the stashed gradient of the projection."""
    input, weight, *_ = args
    size = input.shape[-2] * weight.shape[0] if args[-1] else 0
    return torch.empty(size, dtype=accumulate_dtype(input, weight), device=input.device)
