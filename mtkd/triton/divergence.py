"""Divergences in Triton: one kernel for the operators, one more where a student is shared.

A first walk over a teacher's classes finds the largest logits and the sums of exponentials, which
it scales again where a later block has a larger logit; a last one writes the gradients. A mixture
takes a walk between the two, for its logarithms. The gradient to a student that is shared is a sum
over teachers: a second kernel adds it up, in their order, from the rows' numbers that the first
one left behind.
"""

from collections.abc import Sequence
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

INF = tl.constexpr(float("inf"))
TINY = tl.constexpr(1.1754943508222875e-38)  # a mixture that is less adds nothing to any sum
KEPT = tl.constexpr(7)  # numbers of a row and teacher that the second kernel reads


@triton.jit
def _weighted(weight, x):
    """Return the product, and 0 without a weight, whatever x is."""
    return weight * tl.where(weight == 0.0, 0.0, x)


@triton.jit
def _difference(weight, x, y):
    """Return x - y, and 0 without a weight, where both may be -inf."""
    none = weight == 0.0
    return tl.where(none, 0.0, x) - tl.where(none, 0.0, y)


@triton.jit
def _reciprocal(x):
    """Return 1 / x for float32's normal numbers; in float64 by Newton's steps, not by a call."""
    if x.dtype == tl.float64:
        y = (1.0 / x.to(tl.float32)).to(tl.float64)
        y *= 2.0 - x * y
        return y * (2.0 - x * y)
    return 1.0 / x


@triton.jit
def _read(student, teacher, bias, student_d, teacher_d, bias_d, column, width, counted, ACC):
    """Return logits; -inf beyond the teacher's classes, 0 in rows that do not count."""
    here = column < width
    column = column.to(tl.int64)
    read = here & counted[:, None]
    s = tl.load(student[:, None] + column * student_d, mask=read, other=0.0).to(ACC)
    t = tl.load(teacher[:, None] + column * teacher_d, mask=read, other=0.0).to(ACC)
    if bias is not None:
        s += tl.load(bias + column * bias_d, mask=here, other=0.0).to(ACC)
    s, t = tl.where(counted[:, None], s, 0.0), tl.where(counted[:, None], t, 0.0)
    return tl.where(here, s, -INF), tl.where(here, t, -INF)


@triton.jit
def _raised(largest, values, inverse):
    """Return the largest of what was and what comes, 0 if all are -inf, and how exponents move."""
    raised = tl.maximum(largest, tl.max(values, 1))
    base = tl.where(raised == -INF, 0.0, raised)
    first = largest == -INF
    shift = tl.where(first, 0.0, (largest - base) * inverse)
    return raised, base, shift, tl.where(first, 0.0, tl.exp(shift))


@triton.jit
def _sums(
    student,
    teacher,
    bias,
    student_d,
    teacher_d,
    bias_d,
    width,
    counted,
    inverse,
    FORWARD: tl.constexpr,
    REVERSE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Return each side's largest logit, 1 / its sum of exponentials, and its term of the loss.

    That sum's reciprocal is 0 for a side without any class. Last comes log Z_T / Z_S, of the sums
    that exp(logit / temperature) has; without it and the terms for a mixture.
    """
    ACC: tl.constexpr = inverse.dtype
    none = tl.full([counted.shape[0]], -INF, ACC)
    s_largest, t_largest = none, none
    s_total = tl.zeros([counted.shape[0], COLUMNS], ACC)  # by lane: added up when all is read
    t_total, forward, reverse = s_total, s_total, s_total
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        s, t = _read(
            student, teacher, bias, student_d, teacher_d, bias_d, column, width, counted, ACC
        )
        s_largest, s_base, s_shift, s_scale = _raised(s_largest, s, inverse)
        t_largest, t_base, t_shift, t_scale = _raised(t_largest, t, inverse)
        a, b = (s - s_base[:, None]) * inverse, (t - t_base[:, None]) * inverse
        p, q = tl.exp(a), tl.exp(b)
        if FORWARD:
            moved = forward + _weighted(t_total, (t_shift - s_shift)[:, None])
            forward = _weighted(t_scale[:, None], moved) + q * _difference(q, b, a)
        if REVERSE:
            moved = reverse + _weighted(s_total, (t_shift - s_shift)[:, None])
            reverse = _weighted(s_scale[:, None], moved) + p * _difference(p, b, a)
        s_total = s_total * s_scale[:, None] + p
        t_total = t_total * t_scale[:, None] + q
    s_total, t_total = tl.sum(s_total, 1), tl.sum(t_total, 1)
    forward, reverse = tl.sum(forward, 1), tl.sum(reverse, 1)
    s_largest = tl.where(s_largest == -INF, 0.0, s_largest)
    t_largest = tl.where(t_largest == -INF, 0.0, t_largest)
    empty = (s_total == 0.0) | (t_total == 0.0)
    s_share = tl.where(empty, 0.0, _reciprocal(tl.where(empty, 1.0, s_total)))
    t_share = tl.where(empty, 0.0, _reciprocal(tl.where(empty, 1.0, t_total)))
    log = tl.log(tl.where(empty, 1.0, t_total * s_share))
    s_term = log - _weighted(s_share, reverse)
    t_term = _weighted(t_share, forward) - log
    return s_largest, s_share, t_largest, t_share, s_term, t_term, log


@triton.jit
def _log_ratios(p, q, forward, reverse):
    """Return log p / m and log q / m with the mixture m; 0 where the probability is 0."""
    mixture = forward * q + reverse * p
    inverse = _reciprocal(tl.where(mixture < TINY, TINY, mixture))
    x, y = tl.where(p == 0.0, 1.0, p * inverse), tl.where(q == 0.0, 1.0, q * inverse)
    return tl.log(x), tl.log(y)


@triton.jit
def _probabilities(logits, share, inverse):
    """Softmax of logits less their largest."""
    return tl.exp(logits * inverse) * share[:, None]


@triton.jit
def _ratios(
    student,
    teacher,
    bias,
    student_d,
    teacher_d,
    bias_d,
    width,
    counted,
    s_largest,
    s_share,
    t_largest,
    t_share,
    inverse,
    forward,
    reverse,
    COLUMNS: tl.constexpr,
):
    """Return KL(p_T || m) and KL(p_S || m) with the mixture m."""
    ACC: tl.constexpr = inverse.dtype
    to_teacher = tl.zeros([counted.shape[0]], ACC)
    to_student = to_teacher
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        s, t = _read(
            student, teacher, bias, student_d, teacher_d, bias_d, column, width, counted, ACC
        )
        p = _probabilities(s - s_largest[:, None], s_share, inverse)
        q = _probabilities(t - t_largest[:, None], t_share, inverse)
        x, y = _log_ratios(p, q, forward, reverse)
        to_student += tl.sum(p * x, 1)
        to_teacher += tl.sum(q * y, 1)
    return to_teacher, to_student


@triton.jit
def _own(p, q, own, other, term, to_own, to_other, log, inverse, OWN: tl.constexpr):
    """Return a side's gradient of the two KL: p own, q the other, `log` log(Z_q / Z_p)."""
    gradient = to_other[:, None] * (p - q)
    if OWN:
        x = _difference(p, own, other) * inverse + (log - term)[:, None]
        gradient += to_own[:, None] * (p * x)
    return gradient


@triton.jit
def _gradients(
    s,
    t,
    s_largest,
    s_share,
    t_largest,
    t_share,
    s_term,
    t_term,
    log,
    grad,
    inverse,
    forward,
    reverse,
    FORWARD: tl.constexpr,
    REVERSE: tl.constexpr,
    MIXTURE: tl.constexpr,
):
    """Return a block's gradients to student and teacher; `grad` is 0 where nothing is learned."""
    learned = grad != 0.0  # the other rows' losses may be infinite
    s, t = s - s_largest[:, None], t - t_largest[:, None]  # else sides far apart do not cancel
    p = tl.where(learned[:, None], _probabilities(s, s_share, inverse), 0.0)
    q = tl.where(learned[:, None], _probabilities(t, t_share, inverse), 0.0)
    s_term, t_term = tl.where(learned, s_term, 0.0), tl.where(learned, t_term, 0.0)
    to_forward, to_reverse = grad * forward, grad * reverse
    if MIXTURE:
        x, y = _log_ratios(p, q, forward, reverse)
        to_student = to_reverse[:, None] * (p * (x - s_term[:, None]))
        to_teacher = to_forward[:, None] * (q * (y - t_term[:, None]))
    else:
        to_student = _own(p, q, s, t, s_term, to_reverse, to_forward, log, inverse, REVERSE)
        to_teacher = _own(q, p, t, s, t_term, to_forward, to_reverse, -log, inverse, FORWARD)
    return to_student, to_teacher


@triton.jit
def _kernel(
    mask,
    starts,
    student,
    teacher,
    bias,
    coefficient,
    matrix,
    student_grad,
    teacher_grad,
    kept,
    rows,
    count,
    width,
    mask_n,
    mask_t,
    student_n,
    student_d,
    teacher_n,
    teacher_d,
    bias_d,
    coefficient_n,
    coefficient_t,
    student_grad_n,
    student_grad_d,
    teacher_grad_n,
    teacher_grad_d,
    forward: tl.float64,  # a plain number would come as float32
    reverse: tl.float64,
    inverse: tl.float64,
    scale: tl.float64,
    ACC: tl.constexpr,
    FORWARD: tl.constexpr,  # which terms there are
    REVERSE: tl.constexpr,
    MIXTURE: tl.constexpr,
    SHARED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Take a tile of rows of one teacher; tensors that are None are absent or not wanted."""
    program = tl.program_id(0)
    which = (program % count).to(tl.int64)
    row = (program // count).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    begin = which * width
    end = begin + width
    if starts is not None:
        begin = tl.load(starts + which)
        end = tl.load(starts + which + 1)
    counted = inside
    if mask is not None:
        counted &= tl.load(mask + row * mask_n + which * mask_t, mask=inside, other=0) != 0
    forward = tl.full([], forward, ACC)
    reverse = tl.full([], reverse, ACC)
    inverse = tl.full([], inverse, ACC)
    scale = tl.full([], scale, ACC)
    wide = (end - begin).to(tl.int32)
    own = begin * 0 if SHARED else begin
    student += row * student_n + own * student_d
    teacher += row * teacher_n + begin * teacher_d
    if bias is not None:
        bias += own * bias_d
    s_largest, s_share, t_largest, t_share, s_term, t_term, log = _sums(
        student,
        teacher,
        bias,
        student_d,
        teacher_d,
        bias_d,
        wide,
        counted,
        inverse,
        FORWARD and not MIXTURE,
        REVERSE and not MIXTURE,
        COLUMNS,
    )
    if MIXTURE:
        t_term, s_term = _ratios(
            student,
            teacher,
            bias,
            student_d,
            teacher_d,
            bias_d,
            wide,
            counted,
            s_largest,
            s_share,
            t_largest,
            t_share,
            inverse,
            forward,
            reverse,
            COLUMNS,
        )
    loss = tl.zeros([ROWS], ACC)
    if FORWARD:
        loss += forward * t_term
    if REVERSE:
        loss += reverse * s_term
    loss = tl.where(s_share == 0.0, INF, loss)
    if matrix is not None:
        tl.store(matrix + row * count + which, tl.where(counted, scale * loss, 0.0), mask=inside)
    if coefficient is not None:
        c = coefficient + row * coefficient_n + which * coefficient_t
        grad = tl.load(c, mask=counted, other=0.0).to(ACC) * (scale * inverse)
        grad = tl.where(counted & (loss != INF), grad, 0.0)
        if kept is not None:
            kept += (row * count + which) * KEPT
            tl.store(kept, s_largest, mask=inside)
            tl.store(kept + 1, s_share, mask=inside)
            tl.store(kept + 2, t_largest, mask=inside)
            tl.store(kept + 3, t_share, mask=inside)
            tl.store(kept + 4, s_term, mask=inside)
            tl.store(kept + 5, log, mask=inside)
            tl.store(kept + 6, grad, mask=inside)
        if student_grad is not None or teacher_grad is not None:
            if student_grad is not None:
                student_grad += row * student_grad_n + begin * student_grad_d
            if teacher_grad is not None:
                teacher_grad += row * teacher_grad_n + begin * teacher_grad_d
            for start in range(0, wide, COLUMNS):
                column = start + tl.arange(0, COLUMNS)[None, :]
                s, t = _read(
                    student, teacher, bias, student_d, teacher_d, bias_d, column, wide, counted, ACC
                )
                to_student, to_teacher = _gradients(
                    s,
                    t,
                    s_largest,
                    s_share,
                    t_largest,
                    t_share,
                    s_term,
                    t_term,
                    log,
                    grad,
                    inverse,
                    forward,
                    reverse,
                    FORWARD,
                    REVERSE,
                    MIXTURE,
                )
                write = (column < wide) & inside[:, None]
                column = column.to(tl.int64)
                if student_grad is not None:
                    out = to_student.to(student_grad.dtype.element_ty)
                    tl.store(student_grad[:, None] + column * student_grad_d, out, mask=write)
                if teacher_grad is not None:
                    out = to_teacher.to(teacher_grad.dtype.element_ty)
                    tl.store(teacher_grad[:, None] + column * teacher_grad_d, out, mask=write)


@triton.jit
def _shared_kernel(
    mask,
    student,
    teacher,
    kept,
    student_grad,
    rows,
    count,
    width,
    mask_n,
    mask_t,
    student_n,
    student_d,
    teacher_n,
    teacher_d,
    student_grad_n,
    student_grad_d,
    forward: tl.float64,
    reverse: tl.float64,
    inverse: tl.float64,
    ACC: tl.constexpr,
    FORWARD: tl.constexpr,
    REVERSE: tl.constexpr,
    MIXTURE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Take some rows of some of the student's columns; add up all teachers' gradients."""
    blocks = tl.cdiv(width, COLUMNS)
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (program % blocks) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = row < rows
    forward = tl.full([], forward, ACC)
    reverse = tl.full([], reverse, ACC)
    inverse = tl.full([], inverse, ACC)
    total = tl.zeros([ROWS, COLUMNS], ACC)
    at = kept + row * count * KEPT
    student += row * student_n
    teacher += row * teacher_n
    if mask is not None:
        mask += row * mask_n
    for _ in range(0, count):
        counted = inside
        if mask is not None:
            counted &= tl.load(mask, mask=inside, other=0) != 0
        s_largest = tl.load(at, mask=inside, other=0.0)
        s_share = tl.load(at + 1, mask=inside, other=0.0)
        t_largest = tl.load(at + 2, mask=inside, other=0.0)
        t_share = tl.load(at + 3, mask=inside, other=0.0)
        s_term = tl.load(at + 4, mask=inside, other=0.0)
        log = tl.load(at + 5, mask=inside, other=0.0)
        grad = tl.load(at + 6, mask=inside, other=0.0)
        s, t = _read(
            student,
            teacher,
            None,
            student_d,
            teacher_d,
            0,
            column,
            width,
            counted,
            ACC,
        )
        to_student, _ = _gradients(
            s,
            t,
            s_largest,
            s_share,
            t_largest,
            t_share,
            s_term,
            s_term,
            log,
            grad,
            inverse,
            forward,
            reverse,
            FORWARD,
            REVERSE,
            MIXTURE,
        )
        total += to_student
        at += KEPT
        teacher += width * teacher_d
        if mask is not None:
            mask += mask_t
    write = (column < width) & inside[:, None]
    to = student_grad + row[:, None] * student_grad_n + column.to(tl.int64) * student_grad_d
    tl.store(to, total.to(student_grad.dtype.element_ty), mask=write)


def _launch(
    coefficient: Tensor | None,
    args: Sequence[Any],
    matrix: Tensor | None,
    gradients: Sequence[Tensor | None],
    bias: Tensor | None = None,
) -> None:
    mask, dims, student, teacher, forward, reverse, mixture, temperature, scale = args
    (student_grad, teacher_grad), rows, count = gradients, student.shape[0], len(dims)
    if rows == 0:
        return
    dims = tuple(dims)
    width, starts = teachers(dims, student.device)
    accumulate, shared = accumulate_type(student, teacher), student.shape[1] != sum(dims)
    double = accumulate == tl.float64
    settings = {"ACC": accumulate, "FORWARD": forward != 0, "REVERSE": reverse != 0}
    settings["MIXTURE"] = mixture
    shape = tile(rows, dims, 1, double)  # two sides' exponentials take registers, as a mode does

    def run(
        losses: Tensor | None, own: Tensor | None, other: Tensor | None, numbers: Tensor | None
    ) -> None:
        _kernel[(triton.cdiv(rows, shape.rows) * count,)](
            as_bytes(mask),
            starts,
            student,
            teacher,
            bias,
            coefficient,
            losses,
            own,
            other,
            numbers,
            rows,
            count,
            width,
            *strides(mask, 2),
            *strides(student, 2),
            *strides(teacher, 2),
            *strides(bias, 1),
            *strides(coefficient, 2),
            *strides(own, 2),
            *strides(other, 2),
            forward,
            reverse,
            1.0 / temperature,
            scale,
            **settings,
            SHARED=shared,
            ROWS=shape.rows,
            COLUMNS=shape.columns,
            num_warps=shape.warps,
        )

    with on_device_of(student):
        if student_grad is None or not shared:
            run(matrix, student_grad, teacher_grad, None)
            return
        dtype = torch.float64 if double else torch.float32
        kept = torch.empty(rows, count, KEPT.value, dtype=dtype, device=student.device)
        run(matrix, None, None, kept)
        # what it may take the place of is read until the teachers' gradients are written
        total = student_grad if teacher_grad is None else torch.empty_like(student_grad)
        _add_up(args, kept, total, settings)
        if teacher_grad is not None:
            run(None, None, teacher_grad, None)
            student_grad.copy_(total)


def _add_up(args: Sequence[Any], kept: Tensor, total: Tensor, settings: dict[str, Any]) -> None:
    """Write the gradient to a student that is shared."""
    mask, dims, student, teacher, forward, reverse, _, temperature, _ = args
    rows, width = student.shape
    shape = tile(rows, (width,), 1, kept.dtype == torch.float64)
    _shared_kernel[(triton.cdiv(rows, shape.rows) * triton.cdiv(width, shape.columns),)](
        as_bytes(mask),
        student,
        teacher,
        kept,
        total,
        rows,
        len(dims),
        width,
        *strides(mask, 2),
        *strides(student, 2),
        *strides(teacher, 2),
        *strides(total, 2),
        forward,
        reverse,
        1.0 / temperature,
        **settings,
        ROWS=shape.rows,
        COLUMNS=shape.columns,
        num_warps=shape.warps,
    )


def with_bias(
    bias: Tensor | None, coefficient: Tensor | None, args: Sequence[Any], output: Tensor | None
) -> Tensor:
    """Return the matrix where student lacks a bias ``(D,)``.

    The student's gradient goes into `output`; without a coefficient there is none.
    """
    matrix = _loss.matrix(args)
    _launch(coefficient, args, matrix, (output, None), bias)
    return matrix


_loss = RowLoss(_launch, precise=(2, 3), differentiable=(2, 3))
forward, backward = _loss.forward, _loss.backward
value_and_grad, value_and_grad_out = _loss.value_and_grad, _loss.value_and_grad_out
KERNELS = {"with_bias": with_bias, **_loss.kernels()}
