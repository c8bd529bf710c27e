"""Majority vote in Triton: one kernel for the four operators of the loss.

A program takes a row of the student and all its teachers. Where a block holds every class, each
teacher's logits are read once, and its vote is taken off the gradient at once. Otherwise a first
walk over the classes finds what each vote is made from; a decision is then known by its class, and
only softmaxes and ties are read a second time, for the gradient.
"""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import RowLoss, accumulate_type, as_bytes, on_device_of, strides

TIED = tl.constexpr(1 - 1e-5)  # of the largest share of a vote; what has as much is its equal
SEVERAL, NOBODY = tl.constexpr(-1), tl.constexpr(-2)  # in place of a vote's one class
WHOLE = 4096  # classes that a block may hold, all of a row
BLOCK = 1024  # of longer rows
HELD = 16  # numbers of a block that a lane holds
MOST = 8  # warps


@triton.jit
def _load(x, stride, columns, inside, ACC: tl.constexpr):
    """Return a block of logits; there are none of -inf outside."""
    at = x + columns.to(tl.int64) * stride
    return tl.load(at, mask=inside, other=float("-inf")).to(ACC)


@triton.jit
def _product(q, s):
    """Return q s without 0 * inf, where a student excludes a class for which nobody votes."""
    return q * tl.where(q == 0.0, 0.0, s)


@triton.jit
def _offset(offsets, teacher_t, t, ALIGNED: tl.constexpr):
    """Return where a teacher's logits begin: at equal distances, or where a table says."""
    if offsets is None:
        offset = (tl.zeros([], tl.int64) + t) * teacher_t
    else:
        offset = tl.multiple_of(tl.load(offsets + t), ALIGNED)
    return offset


@triton.jit
def _decision(x):
    """Return a block's largest logit, where it is, and how often; NaN if the block holds one."""
    most = tl.max(x, 0)
    tied = (x == most) & (x > float("-inf"))
    invalid = tl.sum((x != x).to(tl.int32), 0) > 0
    times = tl.sum(tied.to(x.dtype), 0)
    return tl.where(invalid, float("nan"), most), tied, tl.where(invalid, float("nan"), times)


@triton.jit
def _whole_vote(x, scale, HARD: tl.constexpr):
    """Return a teacher's vote, where a block holds every class; NaN where there is none."""
    if HARD:
        _, tied, times = _decision(x)
        vote = tied.to(x.dtype) / times
    else:
        e = tl.exp((x - tl.max(x, 0)) * scale)
        vote = e / tl.sum(e, 0)
    return vote


@triton.jit
def _student(student, student_c, width, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """Return the largest logit, and the sum of exponentials of what the others are less."""
    most = tl.full([], float("-inf"), ACC)
    total = tl.zeros([], ACC)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        s = _load(student, student_c, columns, columns < width, ACC)
        larger = tl.maximum(most, tl.max(s, 0))
        finite = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp(most - finite) + tl.sum(tl.exp(s - finite), 0)
        most = larger
    return most, tl.where(total == 0.0, float("nan"), total)


@triton.jit
def _walk(
    teacher,
    teacher_c,
    student,
    student_c,
    peak,
    scale,
    width,
    HARD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return a vote's largest logit, its sum, its product with the student's excess, its class."""
    ACC: tl.constexpr = peak.dtype
    most = tl.full([], float("-inf"), ACC)
    total = tl.zeros([], ACC)
    product = tl.zeros([], ACC)
    place = tl.full([], -1, tl.int32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        x = _load(teacher, teacher_c, columns, inside, ACC)
        excess = _load(student, student_c, columns, inside, ACC) - peak
        if HARD:
            largest, q, times = _decision(x)
            products = tl.sum(tl.where(q, excess, 0.0), 0)
            found = tl.max(tl.where(q, columns, -1), 0)
            kept = tl.where(largest < most, 0.0, 1.0)  # of this block, and of those before
            before = tl.where(most < largest, 0.0, 1.0)
            product = tl.where(before > 0, product, 0.0) + tl.where(kept > 0, products, 0.0)
            place = tl.where(kept > 0, found, place)
            total = before * total + kept * times
            most = tl.where(kept > 0, largest, most)
        else:
            larger = tl.maximum(most, tl.max(x, 0))
            finite = tl.where(larger == float("-inf"), 0.0, larger)
            e = tl.exp((x - finite) * scale)
            factor = tl.exp((most - finite) * scale)
            total = total * factor + tl.sum(e, 0)
            product = _product(factor, product) + tl.sum(_product(e, excess), 0)
            most = larger
    place = tl.where(total == 1.0, place, SEVERAL)
    return most, tl.where(total == 0.0, float("nan"), total), product, place


@triton.jit
def _votes(
    teacher,
    offsets,
    teacher_t,
    teacher_c,
    statistics,
    classes,
    factors,
    count,
    columns,
    inside,
    scale,
    HARD: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the sum of all teachers' votes, times their factors, of a block of classes."""
    ACC: tl.constexpr = scale.dtype
    q = tl.zeros([BLOCK], ACC)
    for t in range(count):
        place = tl.load(classes + t)
        share = tl.load(factors + t) / tl.load(statistics + 2 * t + 1)
        if place >= 0:
            q += tl.where(columns == place, share, 0.0)
        elif place == SEVERAL:
            most = tl.load(statistics + 2 * t)
            at = teacher + _offset(offsets, teacher_t, t, ALIGNED)
            x = _load(at, teacher_c, columns, inside, ACC)
            if HARD:
                q += tl.where((x == most) & (x > float("-inf")), share, share * 0.0)
            else:
                q += tl.exp((x - most) * scale) * share
    return q


@triton.jit
def _kernel(
    mask,
    weight,
    student,
    teacher,
    offsets,
    coefficient,
    matrix,
    output,
    statistics,
    classes,
    factors,
    count,
    width,
    mask_n,
    mask_k,
    weight_n,
    weight_t,
    student_n,
    student_c,
    teacher_n,
    teacher_t,
    teacher_c,
    coefficient_n,
    coefficient_k,
    output_n,
    output_c,
    scale: tl.float64,
    ACC: tl.constexpr,
    HARD: tl.constexpr,
    WHOLE: tl.constexpr,
    ALIGNED: tl.constexpr,
    TEACHERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    TOGETHER: tl.constexpr = weight is not None
    scale = tl.full([], scale, ACC)
    student += row * student_n
    teacher += row * teacher_n
    if statistics is not None:
        statistics += row * count * 2
        classes += row * count
        factors += row * count
    # what the votes are worth: in the gradient, or for a plurality among themselves
    t = tl.arange(0, TEACHERS)
    voters = t < count
    if TOGETHER:
        weights = tl.load(weight + row * weight_n + t * weight_t, mask=voters, other=0.0).to(ACC)
        everything = tl.sum(weights, 0)
        live = everything != 0.0
        if mask is not None:
            live = tl.load(mask + row * mask_n) != 0
        worth = tl.zeros([], ACC)
        if coefficient is not None:
            worth += tl.load(coefficient + row * coefficient_n, mask=live, other=0.0).to(ACC)
    else:
        counted = voters
        if mask is not None:
            counted &= tl.load(mask + row * mask_n + t * mask_k, mask=voters, other=0) != 0
        live = tl.sum(counted.to(tl.int32), 0) > 0
        worth = tl.zeros([], ACC)
        if coefficient is not None:
            c = coefficient + row * coefficient_n + t * coefficient_k
            worth += tl.sum(tl.load(c, mask=counted, other=0.0).to(ACC), 0)

    columns = tl.arange(0, BLOCK)
    peak, total = _student(student, student_c, width, ACC, BLOCK)
    log_total = tl.log(total)
    excess = tl.zeros([BLOCK], ACC)
    if WHOLE:
        excess = _load(student, student_c, columns, columns < width, ACC) - peak
    q = tl.zeros([BLOCK], ACC)  # of all votes, where a block holds every class
    mean = tl.zeros([], ACC)
    for i in range(count):
        here = live
        if TOGETHER:
            factor = tl.load(weight + row * weight_n + i * weight_t).to(ACC)
            here = here & (factor != 0.0)
            if not HARD:
                factor /= everything
        else:
            factor = tl.zeros([], ACC)
            if mask is not None:
                here = here & (tl.load(mask + row * mask_n + i * mask_k) != 0)
            if coefficient is not None:
                factor += tl.load(coefficient + row * coefficient_n + i * coefficient_k).to(ACC)
        expected = tl.zeros([], ACC)
        place = tl.full([], NOBODY, tl.int32)
        most = tl.zeros([], ACC)
        times = tl.full([], 1.0, ACC)
        if here:
            at = teacher + _offset(offsets, teacher_t, i, ALIGNED)
            if WHOLE:
                x = _load(at, teacher_c, columns, columns < width, ACC)
                vote = _whole_vote(x, scale, HARD)
                expected += tl.sum(_product(vote, excess), 0)
                q += factor * vote
            else:
                most, times, products, place = _walk(
                    at, teacher_c, student, student_c, peak, scale, width, HARD, BLOCK
                )
                expected += products / times
        if not WHOLE:
            tl.store(statistics + 2 * i, most)
            tl.store(statistics + 2 * i + 1, times)
            tl.store(classes + i, place)
            tl.store(factors + i, factor)
        if TOGETHER:
            mean += tl.where(here, factor * expected, 0.0)
        elif matrix is not None:
            tl.store(matrix + row * count + i, tl.where(here, log_total - expected, 0.0))

    if not WHOLE:
        tl.debug_barrier()  # what one lane stored, all will read
    best = tl.full([], float("-inf"), ACC)
    shared = tl.zeros([], ACC)
    if TOGETHER and HARD:  # the plurality: its share of votes, then who has it
        mean = tl.zeros([], ACC)
        for start in range(0, width, BLOCK):
            inside = start + columns < width
            if not WHOLE:
                q = _votes(
                    teacher,
                    offsets,
                    teacher_t,
                    teacher_c,
                    statistics,
                    classes,
                    factors,
                    count,
                    start + columns,
                    inside,
                    scale,
                    HARD,
                    ALIGNED,
                    BLOCK,
                )
            best = tl.maximum(best, tl.max(tl.where(inside, q, float("-inf")), 0))
            invalid = tl.sum((q != q).to(tl.int32), 0) > 0
            shared = tl.where(invalid, float("nan"), shared)
        for start in range(0, width, BLOCK):
            inside = start + columns < width
            if not WHOLE:
                excess = _load(student, student_c, start + columns, inside, ACC) - peak
                q = _votes(
                    teacher,
                    offsets,
                    teacher_t,
                    teacher_c,
                    statistics,
                    classes,
                    factors,
                    count,
                    start + columns,
                    inside,
                    scale,
                    HARD,
                    ALIGNED,
                    BLOCK,
                )
            won = inside & (q >= best * TIED)
            shared += tl.sum(won.to(ACC), 0)
            mean += tl.sum(tl.where(won, excess, 0.0), 0)
        mean /= shared
    if TOGETHER and matrix is not None:
        tl.store(matrix + row, tl.where(live, log_total - mean, 0.0))

    if output is not None:
        for start in range(0, width, BLOCK):
            inside = start + columns < width
            if not WHOLE:
                excess = _load(student, student_c, start + columns, inside, ACC) - peak
                q = _votes(
                    teacher,
                    offsets,
                    teacher_t,
                    teacher_c,
                    statistics,
                    classes,
                    factors,
                    count,
                    start + columns,
                    inside,
                    scale,
                    HARD,
                    ALIGNED,
                    BLOCK,
                )
            if TOGETHER and HARD:
                q = tl.where(q >= best * TIED, worth, 0.0) / shared
            elif TOGETHER:
                q *= worth
            grad = worth / total * tl.exp(excess) - q
            grad = tl.where(live, grad, 0.0)
            at = output + row * output_n + (start + columns).to(tl.int64) * output_c
            tl.store(at, grad.to(output.dtype.element_ty), mask=inside)


def _offsets(teacher: Sequence[Tensor]) -> tuple[Tensor | None, int]:
    """Return a table of where separate teachers begin, beside the first, and what divides it."""
    if len(teacher) == 1:
        return None, 1
    first, size = teacher[0].data_ptr(), teacher[0].element_size()
    places = [(each.data_ptr() - first) // size for each in teacher]
    aligned = 8 if all(place % 8 == 0 for place in places) else 1
    return torch.tensor(places).to(teacher[0].device, non_blocking=True), aligned


def _alike(teacher: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return teachers of one dtype and layout; those that are not, as a packed copy."""
    size = teacher[0].element_size()
    looks = {(each.dtype, each.stride(), each.data_ptr() % size) for each in teacher}
    if len(looks) == 1:
        return teacher
    dtype = reduce(torch.promote_types, (each.dtype for each in teacher))
    return [torch.stack([each.to(dtype) for each in teacher], 1)]


def _launch(
    coefficient: Tensor | None,
    args: Sequence[Any],
    matrix: Tensor | None,
    gradients: Sequence[Tensor | None],
) -> None:
    mask, _, student, teacher, weight, temperature, hard = args
    (output,), (rows, width), teacher = gradients, student.shape, _alike(teacher)
    if rows == 0:
        return
    packed = teacher[0].dim() == 3
    count = teacher[0].shape[1] if packed else len(teacher)
    teacher_n, *teacher_t, teacher_c = teacher[0].stride()
    accumulate = accumulate_type(student)
    double = accumulate == tl.float64
    whole = width <= WHOLE >> double
    block = max(16, triton.next_power_of_2(width)) if whole else BLOCK >> double
    statistics = classes = factors = None
    if not whole:
        dtype = torch.float64 if double else torch.float32
        statistics = student.new_empty((rows, count, 2), dtype=dtype)
        factors = student.new_empty((rows, count), dtype=dtype)
        classes = student.new_empty((rows, count), dtype=torch.int32)
    offsets, aligned = _offsets(teacher)
    with on_device_of(student):
        _kernel[(rows,)](
            as_bytes(mask),
            weight,
            student,
            teacher[0],
            offsets,
            coefficient,
            matrix,
            output,
            statistics,
            classes,
            factors,
            count,
            width,
            *strides(mask, 2),
            *strides(weight, 2),
            *student.stride(),
            teacher_n,
            *(teacher_t or [0]),
            teacher_c,
            *strides(coefficient, 2),
            *strides(output, 2),
            1.0 / temperature,
            ACC=accumulate,
            HARD=hard,
            WHOLE=whole,
            ALIGNED=aligned,
            TEACHERS=triton.next_power_of_2(count),
            BLOCK=block,
            num_warps=max(1, min(MOST, block // (32 * HELD >> double))),
        )


_loss = RowLoss(_launch, precise=(2,), differentiable=(2,))
backward = _loss.backward
value_and_grad, value_and_grad_out = _loss.value_and_grad, _loss.value_and_grad_out


def forward(*args: Any) -> tuple[Tensor, Tensor]:
    """Return the matrix, and a tensor like what other kernels save; this backward needs none."""
    matrix, _ = _loss.forward(*args)
    student, teacher, _, _, hard = args[2:]
    if hard:
        return matrix, torch.full(matrix.shape, -1, dtype=torch.int64, device=student.device)
    count = teacher[0].shape[1] if teacher[0].dim() == 3 else len(teacher)
    return matrix, matrix.new_zeros((len(student), count, 2))


KERNELS = {**_loss.kernels(), "forward": forward}
