"""The first GEMM of `linear_gaussian_nll` with the loss in its epilogue, in Triton.

A program makes the means and the log standard deviations of one block of rows and columns side by
side in registers, in float32, and turns them into the loss and into their gradients: the
projection itself never reaches memory. Blocks do not cross teachers; a second, small kernel adds
up the blocks of a teacher. Worth it while the student is narrow: with many features the GEMM is
long, and a GEMM library's own loop saves more than the epilogue does.
"""

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .common import as_bytes, on_device_of, strides
from .gaussian import HALF_LOG_2PI, element

MOST_FEATURES = 1900  # that a student may have
MOST_PADDING = 1.15  # columns computed for each that is there
FINISH_ROWS = 128


class Config(NamedTuple):
    """The blocks of a GEMM: their rows, the columns of each half, the step; warps and stages."""

    rows: int
    columns: int
    features: int
    warps: int
    stages: int
    tma: bool = False


# By what a GPU can hold: two float32 accumulators in registers, `stages` steps in shared memory.
INTERPRETED = Config(32, 128, 32, 4, 1)
BY_POINTERS = {"cuda": Config(128, 64, 32, 8, 3), "hip": Config(128, 64, 32, 8, 2)}
BY_TMA = Config(128, 128, 64, 8, 3, tma=True)
WIDTHS = (128, 64, 32)  # of blocks
_UNIT = 16  # divides every width, and the features, so that rows are read in vectors
UNIT = tl.constexpr(_UNIT)


class Blocks(NamedTuple):
    """How teachers' columns are cut: `each` blocks a teacher of one width, or a table.

    The table has the rows teacher, begin, end and width of each block, in units of UNIT columns;
    `first` is the first block of each teacher, and one more.
    """

    total: int
    width: int
    each: int
    table: Tensor | None = None
    first: Tensor | None = None


@triton.jit
def _block_of_columns(table, block, blocks, width, EACH: tl.constexpr, COLUMNS: tl.constexpr):
    """Return a block's teacher, where its columns begin, where they end, the teacher's width."""
    if table is None:
        teacher = block // EACH
        begin = teacher * width + (block % EACH) * COLUMNS
        end = teacher * width + width
    else:
        teacher = tl.load(table + block)
        begin = tl.load(table + blocks + block) * UNIT  # by which Triton sees what is aligned
        end = tl.load(table + 2 * blocks + block) * UNIT
        width = tl.load(table + 3 * blocks + block) * UNIT
    return teacher, begin, end, width


@triton.jit
def _products(
    x,
    weight,
    row,
    column,
    second,
    rows,
    columns,
    features,
    x_n,
    x_h,
    weight_p,
    weight_d,
    weight_h,
    TMA: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """Return x times both halves of a block's weights; `second` is where the second half begins."""
    mean = tl.zeros([ROWS, COLUMNS], tl.float32)
    log_std = tl.zeros([ROWS, COLUMNS], tl.float32)
    if not TMA:
        step = tl.full([], FEATURES, tl.int64)
        h = tl.arange(0, FEATURES).to(tl.int64)
        n = (row + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        d = (column + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
        x += n * x_n + h[None, :] * x_h
        weight += d * weight_d + h[:, None] * weight_h
    for start in range(0, features, FEATURES):
        if TMA:
            a = x.load([row, start])
            b = weight.load([column, start]).T
            c = weight.load([second + column, start]).T
        else:
            left = h < features - start
            at = left[:, None] & (d < columns)
            a = tl.load(x, mask=(n < rows) & left[None, :], other=0.0)
            b = tl.load(weight, mask=at, other=0.0)
            c = tl.load(weight + weight_p, mask=at, other=0.0)
            x += step * x_h
            weight += step * weight_h
        mean = tl.dot(a, b, mean)
        log_std = tl.dot(a, c, log_std)
    return mean, log_std


@triton.jit
def _finished(loss, width, counted, PER_DIM: tl.constexpr, FULL: tl.constexpr):
    """Return a teacher's loss from the sum of its energies."""
    if FULL:
        loss += HALF_LOG_2PI * width
    if PER_DIM:
        loss /= width
    return tl.where(counted, loss, 0.0)


@triton.jit
def _halves(values):
    """Return the left and the right half of the columns."""
    pairs = values.reshape(values.shape[0], 2, values.shape[1] // 2)
    return pairs.permute(0, 2, 1).split()


@triton.jit
def _parts(values):
    """Return 128, 64 or 32 columns as parts of 32, from left to right."""
    if values.shape[1] == 32:
        return (values,)
    elif values.shape[1] == 64:
        return _halves(values)
    else:
        left, right = _halves(values)
        a, b = _halves(left)
        c, d = _halves(right)
        return a, b, c, d


@triton.jit
def _kernel(
    x,
    weight,
    bias,
    target,
    mask,
    coefficient,
    table,
    sums,
    mean_grad,
    log_std_grad,
    bias_sums,
    rows,
    columns,
    features,
    first,
    second,
    blocks,
    width,
    x_n,
    x_h,
    weight_p,
    weight_d,
    weight_h,
    bias_p,
    bias_d,
    target_n,
    target_d,
    mask_n,
    mask_t,
    coefficient_n,
    coefficient_t,
    grad_n,
    grad_d,
    EACH: tl.constexpr,  # blocks a teacher; with one the sums are finished losses
    BOUND: tl.constexpr,
    PER_DIM: tl.constexpr,
    FULL: tl.constexpr,
    TMA: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FEATURES: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Take a block of rows and columns.

    In the layer a tile's columns begin at `first`, and those of log_std `second` further on.
    """
    program = tl.program_id(0)  # in groups of rows, which share weights in the cache
    group = program // (GROUP * blocks)
    height = min(tl.cdiv(rows, ROWS) - group * GROUP, GROUP)
    row_block = group * GROUP + (program % (GROUP * blocks)) % height
    block = (program % (GROUP * blocks)) // height
    teacher, begin, end, width = _block_of_columns(table, block, blocks, width, EACH, COLUMNS)
    teacher = teacher.to(tl.int64)
    mean, log_std = _products(
        x,
        weight,
        row_block * ROWS,
        first + begin,
        second,
        rows,
        first + columns,
        features,
        x_n,
        x_h,
        weight_p,
        weight_d,
        weight_h,
        TMA,
        ROWS,
        COLUMNS,
        FEATURES,
    )
    row = (row_block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = row < rows
    counted = inside
    if mask is not None:
        counted &= tl.load(mask + row * mask_n + teacher * mask_t, mask=inside, other=0) != 0
    grad = tl.zeros([ROWS], tl.float32)
    if coefficient is not None:
        c = coefficient + row * coefficient_n + teacher * coefficient_t
        grad += tl.load(c, mask=counted, other=0.0).to(tl.float32)
        if PER_DIM:
            grad /= width
    # one part after the other: what a part needs beside the products has to fit registers too
    PARTS: tl.constexpr = COLUMNS // 32
    means, log_stds = _parts(mean), _parts(log_std)
    # from here on pointers begin at the block's columns
    target += row * target_n + begin.to(tl.int64) * target_d
    if bias is not None:
        bias += (first + begin).to(tl.int64) * bias_d
    if coefficient is not None:
        mean_grad += row * grad_n + begin.to(tl.int64) * grad_d
        log_std_grad += row * grad_n + begin.to(tl.int64) * grad_d
    if bias_sums is not None:
        bias_sums += row_block.to(tl.int64) * 2 * columns + begin
    loss = tl.zeros([ROWS], tl.float32)
    for part in tl.static_range(PARTS):
        mean, log_std = means[part], log_stds[part]
        column = (part * 32 + tl.arange(0, 32)).to(tl.int64)
        here = column < end - begin
        if bias is not None:
            at = bias + column * bias_d
            mean += tl.load(at, mask=here, other=0.0).to(tl.float32)[None, :]
            log_std += tl.load(at + bias_p, mask=here, other=0.0).to(tl.float32)[None, :]
        read = counted[:, None] & here[None, :]
        at = target[:, None] + column[None, :] * target_d
        wanted = tl.load(at, mask=read, other=0.0).to(tl.float32)
        energy, to_mean, to_log_std = element(mean, log_std, wanted, grad[:, None], BOUND)
        loss += tl.sum(tl.where(read, energy, 0.0), 1)
        if coefficient is not None:
            write = inside[:, None] & here[None, :]
            at = column[None, :] * grad_d
            to_mean = tl.where(read, to_mean, 0.0)  # 0 * inf would be NaN
            to_mean_ = to_mean.to(mean_grad.dtype.element_ty)
            tl.store(mean_grad[:, None] + at, to_mean_, mask=write)
            to_log_std = tl.where(read, to_log_std, 0.0)
            to_log_std_ = to_log_std.to(log_std_grad.dtype.element_ty)
            tl.store(log_std_grad[:, None] + at, to_log_std_, mask=write)
            if bias_sums is not None:
                tl.store(bias_sums + column, tl.sum(to_mean, 0), mask=here)
                tl.store(bias_sums + columns + column, tl.sum(to_log_std, 0), mask=here)
    if EACH == 1:
        loss = _finished(loss, width, counted, PER_DIM, FULL)
    tl.store(sums + row * blocks + block, loss, mask=inside)


@triton.jit
def _finish_kernel(
    sums,
    table,
    first,
    mask,
    matrix,
    rows,
    count,
    blocks,
    width,
    mask_n,
    mask_t,
    EACH: tl.constexpr,
    PER_DIM: tl.constexpr,
    FULL: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Add up a teacher's blocks, for a tile of rows."""
    program = tl.program_id(0)
    teacher = (program % count).to(tl.int64)
    row = (program // count).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    if table is None:
        begin = teacher * EACH
        end = begin + EACH
    else:
        begin = tl.load(first + teacher)
        end = tl.load(first + teacher + 1)
        width = tl.load(table + 3 * blocks + begin) * UNIT
    counted = inside
    if mask is not None:
        counted &= tl.load(mask + row * mask_n + teacher * mask_t, mask=inside, other=0) != 0
    loss = tl.zeros([ROWS], tl.float32)
    for block in range(begin, end):
        loss += tl.load(sums + row * blocks + block, mask=inside, other=0.0)
    loss = _finished(loss, width, counted, PER_DIM, FULL)
    tl.store(matrix + row * count + teacher, loss, mask=inside)


@lru_cache(256)
def _cut(dims: tuple[int, ...], most: int) -> tuple[int, float]:
    """Return the best width of blocks up to `most`, and the columns computed for each there is."""

    def computed(columns: int) -> int:
        return sum(-(-dim // columns) for dim in dims) * columns

    best = min((width for width in WIDTHS if width <= most), key=computed)
    return best, computed(best) / sum(dims)


@lru_cache(256)
def _divide(dims: tuple[int, ...]) -> bool:
    return all(dim % _UNIT == 0 for dim in dims)


@cache
def _blocks(dims: tuple[int, ...], columns: int, device: torch.device) -> Blocks:
    """Return the blocks of teachers; a table is made once and stays, as captured graphs need."""
    if len(set(dims)) == 1:
        each = triton.cdiv(dims[0], columns)
        return Blocks(each * len(dims), dims[0], each)
    cuts, first, start = [], [0], 0
    for teacher, dim in enumerate(dims):
        for begin in range(start, start + dim, columns):
            end = min(begin + columns, start + dim)
            cuts.append((teacher, begin // _UNIT, end // _UNIT, dim // _UNIT))
        first.append(len(cuts))
        start += dim
    each = 1 if len(cuts) == len(dims) else 2  # one block a teacher, or some number
    table = torch.tensor(cuts, dtype=torch.int32, device=device).T.contiguous()
    starts = torch.tensor(first, dtype=torch.int32, device=device)
    return Blocks(len(cuts), 0, each, table, starts)


def _config(x: Tensor, weight: Tensor) -> Config:
    """Return the blocks that the current GPU wants for a call."""
    if triton.knobs.runtime.interpret:
        return INTERPRETED
    target = triton.runtime.driver.active.get_current_target()
    if target.backend == "cuda" and target.arch >= 90:
        stacked = weight.stride(0) == weight.shape[1] * weight.stride(1)
        if stacked and _is_described(x) and _is_described(weight):
            return BY_TMA
    return BY_POINTERS[target.backend]


def _is_described(x: Tensor) -> bool:
    """Whether TMA can read a tensor: rows side by side, aligned to 16 bytes."""
    row = x.stride(-2)
    aligned = x.data_ptr() % 16 == 0 and row % 8 == 0
    return aligned and x.stride(-1) == 1 and row >= x.shape[-1]


def fits(dims: Sequence[int], input: Tensor, weight: Tensor) -> bool:
    """Whether the fused kernel is for these teachers and this layer ``(2, D, H)``."""
    dims, features = tuple(dims), input.shape[-1]
    if input.dtype != weight.dtype or input.dtype.itemsize != 2 or input.dim() != 2:
        return False
    if not 0 < features <= MOST_FEATURES or features % _UNIT or not _divide(dims):
        return False
    with on_device_of(input):
        config = _config(input, weight)
    return _cut(dims, config.columns)[1] <= MOST_PADDING


def tile(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    columns: slice,
    mask: Tensor | None,
    dims: Sequence[int],
    target: Tensor,
    settings: Sequence[Any],
    coefficient: Tensor | None,
    grad: Tensor | None,
    with_bias_sums: bool,
) -> tuple[Tensor, Tensor | None]:
    """Run a tile: some teachers, whose columns of the layer are given.

    Args:
        x: ``(n, H)``, of the weights' 16-bit dtype.
        weight: ``(2, D, H)``, all of it.
        bias: ``(2, D)``, all of it.
        columns: those of the tile, c of them.
        mask: ``(n, t)``.
        dims: widths of the tile's teachers.
        target: ``(n, c)``.
        settings: bound, per_dim, full.
        coefficient: ``(n, t)``, the gradient to the matrix; without it there are no gradients.
        grad: ``(n, 2, c)``, where the projection's gradient goes, in any dtype.
        with_bias_sums: whether sums of that gradient over rows are wanted.

    Returns:
        The matrix ``(n, t)``, and those sums ``(2, c)``, in float32.
    """
    with on_device_of(x):
        dims, rows = tuple(dims), x.shape[0]
        config = _config(x, weight)
        if config is INTERPRETED:  # whose tl.dot takes bfloat16 for integers
            x, weight = x.float(), weight.float()
        width = _cut(dims, config.columns)[0]
        config = config._replace(columns=width, warps=config.warps if width >= 64 else 4)
        blocks = _blocks(dims, width, x.device)
        bound, per_dim, full = settings
        row_blocks = triton.cdiv(rows, config.rows)
        means, log_stds = (None, None) if coefficient is None else grad.unbind(1)  # type: ignore
        partial = None
        if with_bias_sums and coefficient is not None:
            partial = x.new_empty(row_blocks, 2, sum(dims), dtype=torch.float32)
        sums = x.new_empty(rows, blocks.total, dtype=torch.float32)
        a, b = x, weight
        if config.tma:
            a = TensorDescriptor.from_tensor(x, [config.rows, config.features])
            b = weight.flatten(0, 1)
            b = TensorDescriptor.from_tensor(b, [config.columns, config.features])
        _kernel[(row_blocks * blocks.total,)](
            a,
            b,
            bias,
            target,
            as_bytes(mask),
            coefficient,
            blocks.table,
            sums,
            means,
            log_stds,
            partial,
            rows,
            columns.stop - columns.start,
            x.shape[1],
            columns.start,
            weight.shape[1],
            blocks.total,
            blocks.width,
            *x.stride(),
            *weight.stride(),
            *strides(bias, 2),
            *target.stride(),
            *strides(mask, 2),
            *strides(coefficient, 2),
            *strides(means, 2),
            EACH=blocks.each,
            BOUND=bound,
            PER_DIM=per_dim,
            FULL=full,
            TMA=config.tma,
            ROWS=config.rows,
            COLUMNS=config.columns,
            FEATURES=config.features,
            GROUP=8,
            num_warps=config.warps,
            num_stages=config.stages,
        )
        matrix = sums
        if blocks.each > 1:
            matrix = x.new_empty(rows, len(dims), dtype=torch.float32)
            _finish_kernel[(triton.cdiv(rows, FINISH_ROWS) * len(dims),)](
                sums,
                blocks.table,
                blocks.first,
                as_bytes(mask),
                matrix,
                rows,
                len(dims),
                blocks.total,
                blocks.width,
                *strides(mask, 2),
                EACH=blocks.each,
                PER_DIM=per_dim,
                FULL=full,
                ROWS=FINISH_ROWS,
                num_warps=4,
            )
    if partial is None:
        return matrix, None
    return matrix, partial[0] if row_blocks == 1 else partial.sum(0)


KERNELS = {"fits": fits, "tile": tile}
