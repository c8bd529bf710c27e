"""Alignment of a student with its teachers: cosine, smooth L1, squared error, angle.

For a teacher with columns d, ``t = (target - shift) * scale`` and the differences ``e = s - t``::

    cos  = <s, t> / (max(|s|, eps) max(|t|, eps))
    loss = cosine (1 - cos) + angle arccos(cos)^2 / dispersion
         + (smooth_l1 sum_d h(e_d) + mse sum_d e_d^2) / D_t
    h(e) = e^2 / (2 beta) where |e| < beta, else |e| - beta / 2

    d loss / d s = -(cosine + 2 angle arccos(cos) / (sqrt(1 - cos^2) dispersion)) d cos / d s
                 + (smooth_l1 clamp(e / beta, -1, 1) + 2 mse e) / D_t
    d cos / d s  = t / (max(|s|, eps) max(|t|, eps)) - cos s / |s|^2     (the last if |s| > eps)

The angle's factor is 0 where ``|cos| = 1``. Shapes: student and target ``(N, D)``, shift and scale
``(D,)``, dispersion ``(T,)``, mask and loss ``(N, T)``.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .columns import accumulate_dtype, expand_columns, segment_sum, zero_uncounted_rows
from .layers import project, project_gradient


class Weights(NamedTuple):
    """The settings of a loss: a weight for each term, and the constants of two of them."""

    cosine: float
    smooth_l1: float
    mse: float
    angle: float
    beta: float
    eps: float

    @property
    def directional(self) -> bool:
        """Whether a term depends on the directions of whole rows."""
        return self.cosine != 0 or self.angle != 0


class _Rows(NamedTuple):
    student: Tensor
    target: Tensor
    widths: Tensor  # (T,)


def _rows(
    student: Tensor,
    target: Tensor,
    mask: Tensor | None,
    dims: Sequence[int],
    shift: Tensor | None,
    scale: Tensor | None,
) -> _Rows:
    dtype = accumulate_dtype(student)
    student, target = student.to(dtype), target.to(dtype)
    if shift is not None:
        target = target - shift.to(dtype)
    if scale is not None:
        target = target * scale.to(dtype)
    if mask is not None:  # whatever a masked entry holds, it must not reach a derivative as NaN
        masked = ~expand_columns(mask, dims)
        student, target = student.masked_fill(masked, 0.0), target.masked_fill(masked, 0.0)
    widths = torch.tensor(list(dims), dtype=dtype, device=student.device)
    return _Rows(student, target, widths)


def _least_square(eps: float, dtype: torch.dtype) -> float:
    return max(eps * eps, torch.finfo(dtype).tiny)  # less would be 0, and nothing clamped


class _Directions(NamedTuple):
    cos: Tensor
    square: Tensor  # |s|^2
    norms: Tensor  # max(|s|, eps) max(|t|, eps)


def _directions(rows: _Rows, dims: Sequence[int], eps: float) -> _Directions:
    square = segment_sum(rows.student.square(), dims)
    other = segment_sum(rows.target.square(), dims)
    least = _least_square(eps, square.dtype)
    norms = square.clamp(min=least).sqrt() * other.clamp(min=least).sqrt()
    return _Directions(segment_sum(rows.student * rows.target, dims) / norms, square, norms)


def _angle(cos: Tensor) -> tuple[Tensor, Tensor]:
    """Return the angle, and the derivative of its square by the cosine."""
    inside = cos.abs() < 1
    within = torch.where(inside, cos, 0.0)
    angle = torch.where(inside, torch.arccos(within), torch.arccos(cos.detach().clamp(-1, 1)))
    slope = -2.0 * torch.arccos(within) / (1.0 - within.square()).sqrt()
    return angle, torch.where(inside, slope, 0.0)


def _dispersed(values: Tensor, dispersion: Tensor | None) -> Tensor:
    return values if dispersion is None else values / dispersion.to(values.dtype)


def _huber(error: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Return smooth L1 of an error and its derivative."""
    if beta == 0.0:
        return error.abs(), error.sign()
    slope = (error / beta).clamp(-1.0, 1.0)
    size = error.abs()
    return torch.where(size < beta, 0.5 * error * slope, size - 0.5 * beta), slope


def alignment(
    mask: Tensor | None,
    dims: Sequence[int],
    student: Tensor,
    target: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    dispersion: Tensor | None,
    *settings: float,
) -> Tensor:
    """Return the matrix of losses ``(N, T)``; settings are those of `Weights`."""
    weights = Weights(*settings)
    rows = _rows(student, target, mask, dims, shift, scale)
    loss = rows.student.new_zeros(student.shape[0], len(dims))
    if weights.directional:
        cos = _directions(rows, dims, weights.eps).cos
        loss = loss + weights.cosine * (1.0 - cos)
        if weights.angle:
            loss = loss + weights.angle * _dispersed(_angle(cos)[0].square(), dispersion)
    error = rows.student - rows.target
    if weights.smooth_l1:
        huber = segment_sum(_huber(error, weights.beta)[0], dims)
        loss = loss + weights.smooth_l1 * huber / rows.widths
    if weights.mse:
        loss = loss + weights.mse * segment_sum(error.square(), dims) / rows.widths
    return loss if mask is None else loss.masked_fill(~mask, 0.0)


def alignment_gradient(
    grad: Tensor,
    mask: Tensor | None,
    dims: Sequence[int],
    student: Tensor,
    target: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    dispersion: Tensor | None,
    *settings: float,
) -> tuple[Tensor]:
    """Return the gradient to student, given the gradient to the matrix."""
    weights = Weights(*settings)
    rows = _rows(student, target, mask, dims, shift, scale)
    grad = grad.to(rows.student.dtype)
    if mask is not None:
        grad = grad.masked_fill(~mask, 0.0)
    total = torch.zeros_like(rows.student)
    if weights.directional:
        cos, square, norms = _directions(rows, dims, weights.eps)
        slope = torch.full_like(cos, -weights.cosine)
        if weights.angle:
            slope = slope + weights.angle * _dispersed(_angle(cos)[1], dispersion)
        to_cos = grad * slope
        if mask is not None:  # the dispersion of what is masked may be NaN
            to_cos = to_cos.masked_fill(~mask, 0.0)
        clamped = square <= _least_square(weights.eps, square.dtype)
        along = torch.where(clamped, 0.0, to_cos * cos / torch.where(clamped, 1.0, square))
        total = expand_columns(to_cos / norms, dims) * rows.target
        total = total - expand_columns(along, dims) * rows.student
    error, share = rows.student - rows.target, expand_columns(grad / rows.widths, dims)
    if weights.smooth_l1:
        total = total + weights.smooth_l1 * share * _huber(error, weights.beta)[1]
    if weights.mse:
        total = total + 2.0 * weights.mse * share * error
    return (total.to(student.dtype),)


def linear_alignment(
    mask: Tensor | None,
    dims: Sequence[int],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *rest: Any,
) -> Tensor:
    """Return `alignment` of ``student = input @ weight.T + bias``.

    Shapes: input ``(N, H)``, or ``(T, N, H)`` for equally wide teachers with inputs of their own;
    weight ``(D, H)``, bias ``(D,)``. The last two arguments steer kernels only.
    """
    dtype, input = accumulate_dtype(input, weight), zero_uncounted_rows(input, mask)
    student = project(input, weight, bias, dtype)
    return alignment(mask, dims, student, target, *rest[:-2])


def linear_alignment_gradient(
    grad: Tensor,
    mask: Tensor | None,
    dims: Sequence[int],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *rest: Any,
) -> tuple[Tensor | None, ...]:
    """Return the gradients to input, weight and bias."""
    dtype, input = accumulate_dtype(input, weight), zero_uncounted_rows(input, mask)
    student = project(input, weight, bias, dtype)
    (student_grad,) = alignment_gradient(grad, mask, dims, student, target, *rest[:-2])
    to_input, to_weight, to_bias = project_gradient(student_grad, input, weight, bias)
    return to_input.to(input.dtype), to_weight, to_bias


def linear_alignment_saved(mask: Tensor | None, dims: Sequence[int], *args: Any) -> Tensor:
    """Return an empty tensor of the size of the stashed gradient of the projection."""
    input, weight, *_ = args
    size = input.shape[-2] * weight.shape[0] if args[-1] else 0
    return torch.empty(size, dtype=accumulate_dtype(input, weight), device=input.device)
