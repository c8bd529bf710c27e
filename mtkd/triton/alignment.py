"""Alignment losses in Triton: one kernel for the four operators of the loss.

Cosine and angle depend on whole rows: a first walk over a teacher's columns sums them, a second
one writes the gradient; a tile's rows are few enough that it finds its inputs in the cache. The
other terms need one walk alone.
"""

from collections.abc import Sequence
from math import sqrt
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    RowLoss,
    accumulate_type,
    as_bytes,
    on_device_of,
    strides,
    teachers,
    tile,
)

PI = tl.constexpr(3.14159265358979323846)


@triton.jit
def _error(e, smooth_l1, mse, beta, inverse_beta, HUBER: tl.constexpr, SQUARE: tl.constexpr):
    """Return the weighted terms of one difference, and their derivative; a NaN stays one."""
    term, derivative = tl.zeros_like(e), tl.zeros_like(e)
    if HUBER:  # without beta, it is so small a number that the slope is the sign
        inside = tl.where(e > beta, beta, e)
        inside = tl.where(inside < -beta, -beta, inside)
        slope = inside * inverse_beta
        term += smooth_l1 * (slope * (e - 0.5 * inside))
        derivative += smooth_l1 * slope
    if SQUARE:
        term += mse * e * e
        derivative += 2.0 * mse * e
    return term, derivative


@triton.jit
def _walk(
    student,
    target,
    bias,
    shift,
    scale,
    output,
    student_d,
    target_d,
    bias_d,
    shift_d,
    scale_d,
    output_d,
    width,
    inside,
    counted,
    to_student,
    to_target,
    share,
    smooth_l1,
    mse,
    beta,
    inverse_beta,
    DIRECTION: tl.constexpr,
    HUBER: tl.constexpr,
    SQUARE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sum over one teacher's columns: student^2, target^2, student target, the errors' terms.

    Pointers are those of rows, one a row, and of columns, where the teacher begins. The gradient
    is to_student times student, to_target times target, share times the errors' derivatives.
    """
    square = tl.zeros([share.shape[0], COLUMNS], share.dtype)
    other, product, errors = square, square, square
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        here = column < width
        column = column.to(tl.int64)
        read = here & counted[:, None]
        s = tl.load(student[:, None] + column * student_d, mask=read, other=0.0).to(share.dtype)
        t = tl.load(target[:, None] + column * target_d, mask=read, other=0.0).to(share.dtype)
        if bias is not None:
            s += tl.load(bias + column * bias_d, mask=here, other=0.0).to(share.dtype)
        if shift is not None:
            t -= tl.load(shift + column * shift_d, mask=here, other=0.0).to(share.dtype)
        if scale is not None:
            t *= tl.load(scale + column * scale_d, mask=here, other=0.0).to(share.dtype)
        s, t = tl.where(read, s, 0.0), tl.where(read, t, 0.0)
        e = s - t
        term, derivative = _error(e, smooth_l1, mse, beta, inverse_beta, HUBER, SQUARE)
        errors += term
        if DIRECTION:
            square += s * s
            other += t * t
            product += s * t
        if output is not None:
            to_output = share[:, None] * derivative
            if DIRECTION:
                to_output += to_target[:, None] * t + to_student[:, None] * s
            to_output = to_output.to(output.dtype.element_ty)
            write = here & inside[:, None]
            tl.store(output[:, None] + column * output_d, to_output, mask=write)
    return tl.sum(square, 1), tl.sum(other, 1), tl.sum(product, 1), tl.sum(errors, 1)


@triton.jit
def _exact_sqrt(x):
    """Return the square root of x >= 0; that of a square is exact, by a step of Newton's.

    Like `_exact_ratio` it spills nothing, as a correctly rounded one does, which is a call.
    """
    root = tl.sqrt(x)
    ordinary = (root > 0.0) & (root < float("inf"))
    divisor = tl.where(ordinary, root, 1.0)
    return tl.where(ordinary, root + 0.5 * tl.fma(-root, root, x) / divisor, root)


@triton.jit
def _exact_ratio(x, y, inverse):
    """Return x / y for y > 0, given 1 / y; that of equals is exact, by a step of Newton's."""
    ratio = x * inverse
    return tl.where(y < float("inf"), ratio + tl.fma(-ratio, y, x) * inverse, ratio)


@triton.jit
def _arcsin_polynomial(z):
    """Return (arcsin(x) / x - 1) / z of z = x^2 up to 1 / 4: minimax, to 2.4e-16 of arcsin."""
    p = 0.031564844397216335 * z - 0.011763162111508515
    p = (p * z + 0.0182884271199614) * z + 0.009369528391062752
    p = (p * z + 0.014324685674770308) * z + 0.017313813164631998
    p = (p * z + 0.022374899217346561) * z + 0.030381823859484535
    p = (p * z + 0.04464286021566421) * z + 0.074999999961033187
    return p * z + 0.16666666666683825


@triton.jit
def arccos(x):
    """Return arccos; beyond -1 and 1, what it is there. It keeps its digits near 1."""
    a = tl.abs(x)
    a = tl.where(a > 1.0, 1.0, a)
    near = a > 0.5  # there the half angle's sine is less than 1 / 2
    z = tl.where(near, 0.5 * (1.0 - a), a * a)
    sine = tl.where(near, tl.sqrt(z), a)
    arcsin = sine + sine * (z * _arcsin_polynomial(z))
    acute = tl.where(near, 2.0 * arcsin, 0.5 * PI - arcsin)
    return tl.where(x < 0.0, PI - acute, acute)


@triton.jit
def _directions(square, other, product, eps):
    """Return the cosine, 1 / the norms' product, and the factor of student in -d cos / d s."""
    norm, other_norm = _exact_sqrt(square), _exact_sqrt(other)
    norms = tl.maximum(norm, eps) * tl.maximum(other_norm, eps)
    inverse = 1.0 / norms
    cos = _exact_ratio(product, norms, inverse)  # of a single column exactly 1 or -1
    clamped = norm <= eps
    along = tl.where(clamped, 0.0, cos / tl.where(clamped, 1.0, square))
    return cos, inverse, along


@triton.jit
def _kernel(
    mask,
    starts,
    student,
    target,
    bias,
    shift,
    scale,
    dispersion,
    coefficient,
    matrix,
    output,
    rows,
    count,
    width,
    mask_n,
    mask_t,
    student_n,
    student_d,
    target_n,
    target_d,
    bias_d,
    shift_d,
    scale_d,
    dispersion_t,
    coefficient_n,
    coefficient_t,
    output_n,
    output_d,
    cosine: tl.float64,  # a plain number would come as float32
    smooth_l1: tl.float64,
    mse: tl.float64,
    angle: tl.float64,
    eps: tl.float64,
    beta: tl.float64,
    inverse_beta: tl.float64,
    ACC: tl.constexpr,
    COSINE: tl.constexpr,  # which terms there are
    HUBER: tl.constexpr,
    SQUARE: tl.constexpr,
    ANGLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Take a tile of rows of one teacher; tensors that are None are absent or not wanted."""
    program = tl.program_id(0)
    teacher = (program % count).to(tl.int64)
    row = (program // count).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    begin = teacher * width
    end = begin + width
    if starts is not None:
        begin = tl.load(starts + teacher)
        end = tl.load(starts + teacher + 1)
    counted = inside
    if mask is not None:
        counted &= tl.load(mask + row * mask_n + teacher * mask_t, mask=inside, other=0) != 0
    grad = tl.zeros([ROWS], ACC)
    if coefficient is not None:
        c = coefficient + row * coefficient_n + teacher * coefficient_t
        grad += tl.load(c, mask=counted, other=0.0).to(ACC)
    wide = (end - begin).to(tl.int32)
    per_column = 1.0 / wide.to(ACC)
    spread = tl.full([], 1.0, ACC)
    if dispersion is not None:
        spread = tl.load(dispersion + teacher * dispersion_t).to(ACC)
    smooth_l1 = tl.full([], smooth_l1, ACC)
    mse = tl.full([], mse, ACC)
    beta = tl.full([], beta, ACC)
    inverse_beta = tl.full([], inverse_beta, ACC)
    student += row * student_n + begin * student_d
    target += row * target_n + begin * target_d
    if bias is not None:
        bias += begin * bias_d
    if shift is not None:
        shift += begin * shift_d
    if scale is not None:
        scale += begin * scale_d
    if output is not None:
        output += row * output_n + begin * output_d
    share = grad * per_column
    DIRECTION: tl.constexpr = COSINE or ANGLE
    square, other, product, errors = _walk(
        student,
        target,
        bias,
        shift,
        scale,
        None if DIRECTION else output,
        student_d,
        target_d,
        bias_d,
        shift_d,
        scale_d,
        output_d,
        wide,
        inside,
        counted,
        None,
        None,
        share,
        smooth_l1,
        mse,
        beta,
        inverse_beta,
        DIRECTION,
        HUBER,
        SQUARE,
        COLUMNS,
    )
    loss = errors * per_column
    if DIRECTION:
        cos, inverse, along = _directions(square, other, product, tl.full([], eps, ACC))
        slope = tl.zeros([ROWS], ACC)
        if COSINE:
            weight = tl.full([], cosine, ACC)
            loss += weight * (1.0 - cos)
            slope -= weight
        if ANGLE:
            weight = tl.full([], angle, ACC) / spread
            radians = arccos(cos)
            loss += weight * radians * radians
            between = tl.abs(cos) < 1.0
            sine = tl.sqrt(tl.where(between, (1.0 - cos) * (1.0 + cos), 1.0))
            slope -= tl.where(between, 2.0 * weight * radians / sine, 0.0)
    if matrix is not None:
        tl.store(matrix + row * count + teacher, tl.where(counted, loss, 0.0), mask=inside)
    if DIRECTION and output is not None:
        to_cos = tl.where(counted, grad * slope, 0.0)
        _walk(
            student,
            target,
            bias,
            shift,
            scale,
            output,
            student_d,
            target_d,
            bias_d,
            shift_d,
            scale_d,
            output_d,
            wide,
            inside,
            counted,
            -to_cos * along,
            to_cos * inverse,
            share,
            smooth_l1,
            mse,
            beta,
            inverse_beta,
            DIRECTION,
            HUBER,
            SQUARE,
            COLUMNS,
        )


def _numbers(dtype: torch.dtype, beta: float, eps: float) -> tuple[float, float, float]:
    """Return eps, beta and 1 / beta, at least so large that 1 / eps^2 and 1 / beta are finite."""
    tiny = torch.finfo(dtype).tiny
    beta = max(beta, tiny)
    return max(eps, sqrt(tiny)), beta, 1.0 / beta


def _launch(
    coefficient: Tensor | None,
    args: Sequence[Any],
    matrix: Tensor | None,
    gradients: Sequence[Tensor | None],
    bias: Tensor | None = None,
) -> None:
    mask, dims, student, target, shift, scale, dispersion, *settings = args
    cosine, smooth_l1, mse, angle, beta, eps = settings
    (output,), rows, count = gradients, student.shape[0], len(dims)
    if rows == 0:
        return
    dims = tuple(dims)
    width, starts = teachers(dims, student.device)
    accumulate = accumulate_type(student)
    double = accumulate == tl.float64
    sums = int(cosine != 0 or angle != 0)  # that take registers, as a mode does
    shape = tile(rows, dims, sums, double)
    with on_device_of(student):
        _kernel[(triton.cdiv(rows, shape.rows) * count,)](
            as_bytes(mask),
            starts,
            student,
            target,
            bias,
            shift,
            scale,
            dispersion,
            coefficient,
            matrix,
            output,
            rows,
            count,
            width,
            *strides(mask, 2),
            *strides(student, 2),
            *strides(target, 2),
            *strides(bias, 1),
            *strides(shift, 1),
            *strides(scale, 1),
            *strides(dispersion, 1),
            *strides(coefficient, 2),
            *strides(output, 2),
            cosine,
            smooth_l1,
            mse,
            angle,
            *_numbers(torch.float64 if double else torch.float32, beta, eps),
            ACC=accumulate,
            COSINE=cosine != 0,
            HUBER=smooth_l1 != 0,
            SQUARE=mse != 0,
            ANGLE=angle != 0,
            ROWS=shape.rows,
            COLUMNS=shape.columns,
            num_warps=shape.warps,
        )


def with_bias(
    bias: Tensor | None, coefficient: Tensor | None, args: Sequence[Any], output: Tensor | None
) -> Tensor:
    """Return the matrix where student lacks a bias ``(D,)``.

    The gradient goes into `output`; without a coefficient there is none.
    """
    matrix = _loss.matrix(args)
    _launch(coefficient, args, matrix, (output,), bias)
    return matrix


_loss = RowLoss(_launch, precise=(2,), differentiable=(2,))
forward, backward = _loss.forward, _loss.backward
value_and_grad, value_and_grad_out = _loss.value_and_grad, _loss.value_and_grad_out
KERNELS = {"with_bias": with_bias, **_loss.kernels()}
