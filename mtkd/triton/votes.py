"""Majority vote in Triton: rows that a block holds in one kernel, longer rows in two.

A decision is a softmax of temperature 0: powers of the logits, 1 where a logit is the largest and
else 0. Where a block holds every class, a program takes a row of the student and all its teachers:
their logits are read once, and each vote is taken off the gradient at once. In longer rows a first
kernel walks over a row of one teacher and leaves what its vote is made from; a second one adds up
the votes. A decision is known by its class: only softmaxes and ties are read a second time. The
votes of a plurality are added up first; then it is one more teacher, who decides for the winners.
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
KEPT = tl.constexpr(7)  # numbers of a row and teacher that the second kernel reads
WHOLE = 4096  # classes that a block may hold, all of a row
TILE = 1024  # numbers of several teachers at once, where classes are few
HELD = 8  # numbers of a row that a lane holds
BLOCK, WARPS = 512, 4  # of longer rows


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
def _finite(most):
    return tl.where(most == float("-inf"), 0.0, most)


@triton.jit
def _some(total):
    """Return a sum to divide by: NaN in place of 0, where nothing was added."""
    return tl.where(total == 0.0, float("nan"), total)


@triton.jit
def _powers(x, most, inverse, HARD: tl.constexpr):
    """Return exp((x - most) / temperature), or of a decision the limit at 0; 0 of -inf."""
    if HARD:
        e = ((x == most) & (x > float("-inf"))).to(x.dtype)
        return tl.where(x != x, x, e)
    else:
        return tl.exp((x - _finite(most)) * inverse)


@triton.jit
def _step(most, x, inverse, HARD: tl.constexpr):
    """Return the larger of two logits, and the powers of both beside it; x may be NaN."""
    larger = tl.maximum(most, x)
    power = _powers(tl.minimum(most, x), larger, inverse, HARD)
    e = tl.where(x > most, 1.0, tl.where(x == x, power, x))
    return larger, tl.where(x > most, power, 1.0), e


@triton.jit
def _teacher(teacher, offsets, teacher_t, t, ALIGNED: tl.constexpr):
    """Return where teachers' logits begin: at equal distances, or where a table says."""
    if offsets is None:
        return teacher + t.to(tl.int64) * teacher_t
    else:  # Triton compiles what stands behind a return
        return teacher + tl.load(offsets + t) * ALIGNED


@triton.jit
def _whole_kernel(
    counted,
    factor,
    student,
    teacher,
    offsets,
    coefficient,
    matrix,
    output,
    count,
    width,
    counted_n,
    counted_t,
    factor_n,
    factor_t,
    student_n,
    student_c,
    teacher_n,
    teacher_t,
    teacher_c,
    coefficient_n,
    output_n,
    output_c,
    inverse: tl.float64,  # a plain number would come as float32
    ACC: tl.constexpr,
    TOGETHER: tl.constexpr,
    HARD: tl.constexpr,
    ALIGNED: tl.constexpr,
    TEACHERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Take a row, all of whose classes the block holds; without factors there is no gradient."""
    row = tl.program_id(0).to(tl.int64)
    inverse = tl.full([], inverse, ACC)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    s = _load(student + row * student_n, student_c, columns, inside, ACC)
    excess = s - _finite(tl.max(s, 0))
    total = _some(tl.sum(tl.exp(excess), 0))
    log = tl.log(total)
    q = tl.zeros([TEACHERS, BLOCK], ACC)  # sums are by lane
    worth = tl.zeros([TEACHERS], ACC)
    expected = tl.zeros([TEACHERS], ACC)
    live = tl.zeros([TEACHERS], tl.int1)
    for start in range(0, count, TEACHERS):
        t = start + tl.arange(0, TEACHERS)
        here = t < count
        if counted is not None:
            here &= tl.load(counted + row * counted_n + t * counted_t, mask=here, other=0) != 0
        at = _teacher(teacher + row * teacher_n, offsets, teacher_t, tl.where(here, t, 0), ALIGNED)
        x = _load(at[:, None], teacher_c, columns[None, :], here[:, None] & inside[None, :], ACC)
        e = _powers(x, tl.max(x, 1)[:, None], inverse, HARD)
        vote = e / _some(tl.sum(e, 1))[:, None]
        product = tl.sum(_product(vote, excess[None, :]), 1)
        if not TOGETHER and matrix is not None:
            tl.store(matrix + row * count + t, tl.where(here, log - product, 0.0), mask=t < count)
        if factor is not None:
            f = tl.load(factor + row * factor_n + t * factor_t, mask=here, other=0.0).to(ACC)
            q += tl.where(here[:, None], f[:, None] * vote, 0.0)
            worth += f
            if TOGETHER:
                expected += tl.where(here, f * product, 0.0)
        live |= here
    q = tl.sum(q, 0)
    worth = tl.sum(worth, 0)
    live = tl.max(live.to(tl.int32), 0) > 0
    if TOGETHER:
        expected = tl.sum(expected, 0)
        if HARD:  # shared by the winners
            q = (q >= tl.max(q, 0) * TIED).to(ACC)
            worth = tl.where(expected != expected, expected, tl.sum(q, 0))
            expected = tl.sum(_product(q, excess), 0)
        worth = _some(worth)
        if matrix is not None:
            tl.store(matrix + row, tl.where(live, log - expected / worth, 0.0))
    if output is not None:
        if TOGETHER:
            c = tl.load(coefficient + row * coefficient_n, mask=live, other=0.0).to(ACC)
            q *= c / worth
            worth = c
        grad = tl.where(live, worth / total * tl.exp(excess) - q, 0.0)
        to = output + row * output_n + columns.to(tl.int64) * output_c
        tl.store(to, grad.to(output.dtype.element_ty), mask=inside)


@triton.jit
def _walk_kernel(
    counted,
    factor,
    student,
    teacher,
    offsets,
    matrix,
    kept,
    count,
    width,
    counted_n,
    counted_t,
    factor_n,
    factor_t,
    student_n,
    student_c,
    teacher_n,
    teacher_t,
    teacher_c,
    inverse: tl.float64,
    ACC: tl.constexpr,
    HARD: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Take a row of one teacher: its loss, and what its vote is made from; sums are by lane."""
    program = tl.program_id(0).to(tl.int64)
    row, t = program // count, program % count
    here = tl.full([], True, tl.int1)
    if counted is not None:
        here = tl.load(counted + row * counted_n + t * counted_t) != 0
    inverse = tl.full([], inverse, ACC)
    student += row * student_n
    teacher = _teacher(teacher + row * teacher_n, offsets, teacher_t, t, ALIGNED)
    peak = tl.full([BLOCK], float("-inf"), ACC)
    most = peak
    s_total = tl.zeros([BLOCK], ACC)
    total = s_total
    product = s_total
    place = tl.zeros([BLOCK], tl.int32)
    for start in range(0, tl.where(here, width, 0), BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        s = _load(student, student_c, columns, inside, ACC)
        x = _load(teacher, teacher_c, columns, inside, ACC)
        higher, s_scale, p = _step(peak, s, 1.0, False)
        most, scale, e = _step(most, x, inverse, HARD)
        s_total = s_total * s_scale + p
        product += total * (_finite(peak) - _finite(higher))
        product = _product(scale, product) + _product(e, s - _finite(higher))
        total = total * scale + e
        peak = higher
        if HARD:
            place = tl.where(e == 1.0, columns, place)
    highest, largest = tl.max(peak, 0), tl.max(most, 0)
    scale = _powers(most, largest, inverse, HARD)
    product += total * (_finite(peak) - _finite(highest))
    total *= scale
    times = _some(tl.sum(total, 0))
    expected = tl.sum(_product(scale, product), 0) / times
    sums = _some(tl.sum(s_total * _powers(peak, highest, 1.0, False), 0))
    if matrix is not None:
        tl.store(matrix + program, tl.where(here, tl.log(sums) - expected, 0.0))
    if factor is not None:
        f = tl.load(factor + row * factor_n + t * factor_t, mask=here, other=0.0).to(ACC)
        only = tl.sum(tl.where(total == 1.0, place, 0), 0)
        only = tl.where(HARD & (times == 1.0), only, SEVERAL)
        kept += program * KEPT
        tl.store(kept, tl.where(here, only, NOBODY).to(ACC))
        tl.store(kept + 1, tl.where(here, f / times, 0.0))
        tl.store(kept + 2, largest)
        tl.store(kept + 3, f)
        tl.store(kept + 4, tl.where(here, f * expected, 0.0))
        tl.store(kept + 5, highest)
        tl.store(kept + 6, sums)


@triton.jit
def _long_kernel(
    student,
    teacher,
    offsets,
    coefficient,
    matrix,
    output,
    kept,
    count,
    width,
    student_n,
    student_c,
    teacher_n,
    teacher_t,
    teacher_c,
    coefficient_n,
    output_n,
    output_c,
    inverse: tl.float64,
    ACC: tl.constexpr,
    TOGETHER: tl.constexpr,
    HARD: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Take a block of a row: the gradient, and the loss of a mean; the votes for a plurality."""
    blocks = tl.cdiv(width, BLOCK)
    row, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    inverse = tl.full([], inverse, ACC)
    kept += row * count * KEPT
    teacher += row * teacher_n
    columns = block * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    q = tl.zeros([BLOCK], ACC)
    worth = tl.zeros([], ACC)
    expected = tl.zeros([], ACC)
    peak = tl.zeros([], ACC)
    total = tl.full([], 1.0, ACC)
    live = tl.full([], False, tl.int1)
    for t in range(count):
        at = kept + t * KEPT
        place, share = tl.load(at).to(tl.int32), tl.load(at + 1)
        here = place != NOBODY
        live |= here
        worth += tl.load(at + 3)
        expected += tl.load(at + 4)
        peak = tl.where(here, tl.load(at + 5), peak)
        total = tl.where(here, tl.load(at + 6), total)
        q += tl.where(columns == place, share, 0.0)
        if place == SEVERAL:
            begin = _teacher(teacher, offsets, teacher_t, place * 0 + t, ALIGNED)
            x = _load(begin, teacher_c, columns, inside, ACC)
            q += _powers(x, tl.load(at + 2), inverse, HARD) * share
    if TOGETHER and not HARD:
        mean = _some(worth)
        if matrix is not None:
            loss = tl.where(live, tl.log(total) - expected / mean, 0.0)
            tl.store(matrix + row, loss, mask=block == 0)
        if coefficient is not None:
            worth = tl.load(coefficient + row * coefficient_n, mask=live, other=0.0).to(ACC)
            q *= worth / mean
    if output is not None:
        if not (TOGETHER and HARD):
            s = _load(student + row * student_n, student_c, columns, inside, ACC)
            q = tl.where(live, worth / total * tl.exp(s - _finite(peak)) - q, 0.0)
        to = output + row * output_n + columns.to(tl.int64) * output_c
        tl.store(to, q.to(output.dtype.element_ty), mask=inside)


def _offsets(teacher: Sequence[Tensor]) -> tuple[Tensor | None, int]:
    """Return a table of where separate teachers begin, beside the first, and its unit."""
    if len(teacher) == 1:
        return None, 1
    first, size = teacher[0].data_ptr(), teacher[0].element_size()
    places = [(each.data_ptr() - first) // size for each in teacher]
    aligned = 8 if all(place % 8 == 0 for place in places) else 1
    steps = torch.tensor([place // aligned for place in places])
    return steps.to(teacher[0].device, non_blocking=True), aligned


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
    mask, dims, student, teacher, weight, temperature, hard = args
    (output,), (rows, width), teacher = gradients, student.shape, _alike(teacher)
    if rows == 0:
        return
    count = teacher[0].shape[1] if teacher[0].dim() == 3 else len(teacher)
    teacher_n, *teacher_t, teacher_c = teacher[0].stride()
    logits_strides = *student.stride(), teacher_n, *(teacher_t or [0]), teacher_c
    together, accumulate = weight is not None, accumulate_type(student)
    counted, factor, own = as_bytes(mask), coefficient, None
    if together:
        counted = weight if mask is None else weight.masked_fill(~mask, 0.0)
        factor, own = counted, coefficient
    double = accumulate == tl.float64
    whole = width <= WHOLE >> double
    block, tall, warps = BLOCK, 1, WARPS
    if whole:
        block = max(16, triton.next_power_of_2(width))
        tall = min(triton.next_power_of_2(count), max(1, (TILE >> double) // block))
        warps = max(1, tall * block // (32 * HELD))
    offsets, aligned = _offsets(teacher)
    settings = {"ACC": accumulate, "HARD": hard, "ALIGNED": aligned, "BLOCK": block}
    with on_device_of(student):
        if whole:
            _whole_kernel[(rows,)](
                counted,
                factor,
                student,
                teacher[0],
                offsets,
                own,
                matrix,
                output,
                count,
                width,
                *strides(counted, 2),
                *strides(factor, 2),
                *logits_strides,
                *strides(own, 2)[:1],
                *strides(output, 2),
                1.0 / temperature,
                TOGETHER=together,
                TEACHERS=tall,
                **settings,
                num_warps=warps,
            )
            return
        kept = votes = None
        dtype = torch.float64 if double else torch.float32
        if factor is not None:
            kept = student.new_empty((rows, count, KEPT.value), dtype=dtype)
        if together and hard:
            votes = student.new_empty((rows, width), dtype=dtype)
        _walk_kernel[(rows * count,)](
            counted,
            factor,
            student,
            teacher[0],
            offsets,
            None if together else matrix,
            kept,
            count,
            width,
            *strides(counted, 2),
            *strides(factor, 2),
            *logits_strides,
            1.0 / temperature,
            **settings,
            num_warps=warps,
        )
        if factor is not None:
            to = output if votes is None else votes
            _long_kernel[(rows * triton.cdiv(width, block),)](
                student,
                teacher[0],
                offsets,
                own,
                matrix,
                to,
                kept,
                count,
                width,
                *logits_strides,
                *strides(own, 2)[:1],
                *strides(to, 2),
                1.0 / temperature,
                TOGETHER=together,
                **settings,
                num_warps=warps,
            )
    if votes is not None:  # the plurality decides as one teacher would
        won = votes >= votes.amax(-1, keepdim=True) * TIED.value
        elected = torch.where(won, 0.0, -torch.inf)
        _launch(coefficient, (mask, dims, student, [elected], None, 1.0, True), matrix, gradients)


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
