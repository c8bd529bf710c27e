"""Consensus of messages in Triton: a program holds its elements of all messages in registers.

Messages are a tuple of pointers, so they are read where they are, and a tuple of tiles, which an
unrolled sorting network takes through registers alone, without shared memory.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import accumulate_type, on_device_of

MOST = 16  # messages: their values and weights fit the registers, and compile in seconds
# a cumulative weight between these shares of the weight is one half
BELOW_HALF, ABOVE_HALF = tl.constexpr(0.5 - 1e-6), tl.constexpr(0.5 + 1e-6)
FLAT, LINEAR, GAUSSIAN = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)  # as the formulas number


@cache
def network(count: int) -> tuple[int, ...]:
    """Return the comparators of Batcher's odd-even merge sort, one after the other.

    Example:
        >>> network(3)
        (0, 1, 0, 2, 1, 2)
    """
    pairs: list[int] = []
    p = 1
    while p < count:
        k = p
        while k >= 1:
            for j in range(k % p, count - k, 2 * k):
                for i in range(j, min(j + k, count - k)):
                    if i // (2 * p) == (i + k) // (2 * p):
                        pairs += (i, i + k)
            k //= 2
        p *= 2
    return tuple(pairs)


@triton.jit
def _put(v, p: tl.constexpr, x):
    """Return a tuple with one entry replaced."""
    return v[:p] + (x,) + v[p + 1 :]  # noqa: RUF005 Triton cannot unpack


@triton.jit
def _exchange(v, w, i: tl.constexpr, j: tl.constexpr):
    """Put two messages in order, with their weights."""
    swap = v[j] < v[i]
    low, high = tl.where(swap, v[j], v[i]), tl.where(swap, v[i], v[j])
    first, last = tl.where(swap, w[j], w[i]), tl.where(swap, w[i], w[j])
    v = v[:i] + (low,) + v[i + 1 : j] + (high,) + v[j + 1 :]  # noqa: RUF005
    w = w[:i] + (first,) + w[i + 1 : j] + (last,) + w[j + 1 :]  # noqa: RUF005
    return v, w


@triton.jit
def _mean(v, w, total):
    mean = tl.zeros_like(total)
    for p in tl.static_range(len(v)):
        mean += tl.where(w[p] > 0.0, w[p] * v[p], 0.0)
    return mean / total


@triton.jit
def _median(v, w, total):
    """Return the middle of sorted messages."""
    end = tl.zeros_like(total)
    lower, upper = end, end
    for p in tl.static_range(len(v)):
        lower = tl.where(end < total * BELOW_HALF, v[p], lower)
        upper = tl.where(end <= total * ABOVE_HALF, v[p], upper)
        end += w[p]
    return tl.where(total > 0.0, 0.5 * lower + 0.5 * upper, float("nan"))


@triton.jit
def _trimmed_mean(v, w, total, trim):
    """Return the mean of sorted messages without a share of the weight at each end."""
    end = tl.zeros_like(total)
    mean = end
    first, last = trim * total, total - trim * total
    for p in tl.static_range(len(v)):
        begin = end
        end += w[p]
        inside = tl.where(end < last, end, last) - tl.where(begin > first, begin, first)
        mean += tl.where(inside > 0.0, inside * v[p], 0.0)
    return mean / (last - first)


@triton.jit
def _vote(v, w, trim, MEDIAN: tl.constexpr, NETWORK: tl.constexpr):
    """Return the vote, and the weight that counted; a NaN has none."""
    total = tl.zeros_like(v[0])
    for p in tl.static_range(len(v)):
        valid = v[p] == v[p]
        counted = tl.where(valid & (w[p] > 0.0), w[p], 0.0)
        v, w = _put(v, p, tl.where(valid, v[p], float("inf"))), _put(w, p, counted)
        total += counted
    for c in tl.static_range(len(NETWORK) // 2):
        v, w = _exchange(v, w, NETWORK[2 * c], NETWORK[2 * c + 1])
    if MEDIAN:
        voted = _median(v, w, total)
    elif len(NETWORK) > 0:
        voted = _trimmed_mean(v, w, total, trim)
    else:
        voted = _mean(v, w, total)
    return voted, total


@triton.jit
def _distance(x, center, low, unit):
    far = tl.where(x == center, 0.0, tl.abs(x - center))
    if low is not None:
        far = (far - low) / unit
    return far


@triton.jit
def _similarity(far, bandwidth, KERNEL: tl.constexpr, SCALED: tl.constexpr):
    """Return a kernel's weight for distances; NaN for a NaN."""
    height = tl.full(far.shape, 1.0, far.dtype)
    if KERNEL == LINEAR:
        height = 1.0 - (far if SCALED else far / bandwidth)
    if KERNEL == GAUSSIAN:
        u = far / bandwidth
        height = tl.exp(-0.5 * u * u)
    else:
        height = tl.where(far <= bandwidth, height, 0.0)
    return height


@triton.jit
def _shifted(v, w, center, low, unit, bandwidth, KERNEL: tl.constexpr):
    """Return the messages' weights times a kernel of their distances to the center."""
    shifted = w
    for p in tl.static_range(len(v)):
        far = _distance(v[p], center, low, unit)
        s = w[p] * _similarity(far, bandwidth, KERNEL, low is not None)
        shifted = _put(shifted, p, tl.where(s > 0.0, s, 0.0))
    return shifted


@triton.jit
def _ratio(x, total):
    return tl.where(total > 0.0, x / tl.where(total > 0.0, total, 1.0), 0.0)


@triton.jit
def _weight(weight, p, weight_p, weight_n, at, here, TYPE: tl.constexpr):
    if weight is None:
        w = tl.full(at.shape, 1.0, TYPE)
    else:
        first = weight + tl.cast(p, tl.int64) * weight_p  # elementwise weights may pass 2^31
        w = tl.load(first + at * weight_n, mask=here, other=0.0).to(TYPE)
    return w


@triton.jit
def _consensus(
    messages,
    weight,
    start,
    low,
    unit,
    output,
    confidence,
    shares,
    size,
    weight_p,
    weight_n,
    trim: tl.float64,  # a plain number would come as float32
    bandwidth: tl.float64,
    iterations,
    MEDIAN: tl.constexpr,
    KERNEL: tl.constexpr,
    NETWORK: tl.constexpr,
    TYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = at < size
    trim, bandwidth = tl.full([], trim, TYPE), tl.full([], bandwidth, TYPE)
    v, w = messages, messages
    for p in tl.static_range(len(messages)):
        v = _put(v, p, tl.load(messages[p] + at, mask=here, other=0.0).to(TYPE))
        w = _put(w, p, _weight(weight, p, weight_p, weight_n, at, here, TYPE))
    if low is not None:
        low = tl.load(low + at, mask=here, other=0.0).to(TYPE)
        unit = tl.load(unit + at, mask=here, other=1.0).to(TYPE)
    if start is not None:
        center = tl.load(start + at, mask=here, other=0.0).to(TYPE)
    else:
        center, _ = _vote(v, w, trim, MEDIAN, NETWORK)
    if KERNEL:
        for step in range(iterations):
            s = _shifted(v, w, center, low, unit, bandwidth, KERNEL)
            voted, total = _vote(v, s, trim, MEDIAN, NETWORK)
            center = tl.where(total > 0.0, voted, center)
            if step == iterations - 1:
                for p in tl.static_range(len(messages)):
                    to = shares + p * size.to(tl.int64) + at
                    tl.store(to, _ratio(s[p], total), mask=here)
    agreed, weights = tl.zeros([BLOCK], TYPE), tl.zeros([BLOCK], TYPE)
    for p in tl.static_range(len(messages)):
        x = tl.where(w[p] > 0.0, w[p], 0.0)
        weights += x
        agreed += tl.where(_distance(v[p], center, low, unit) <= bandwidth, x, 0.0)
    tl.store(output + at, center.to(output.dtype.element_ty), mask=here)
    tl.store(confidence + at, _ratio(agreed, weights), mask=here)


def _in_order(tensor: Tensor, order: Sequence[int]) -> Tensor:
    """View a tensor with its dimensions in an order; one whose memory has another is copied."""
    return tensor.permute(tuple(order)).contiguous()


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
    """Return consensus, confidence and shares of up to `MOST` messages that have no classes."""
    first, count = messages[0], len(messages)
    output = torch.empty_like(first)  # dense: its strides give the order of the elements
    order = sorted(range(first.dim()), key=output.stride, reverse=True)
    dtype = torch.promote_types(first.dtype, torch.float32)
    shape = [first.shape[d] for d in order]
    confidence = torch.empty(shape, dtype=dtype, device=first.device)
    shares = torch.empty([count, *shape] if kernel else [0], dtype=dtype, device=first.device)
    every = [0, *(d + 1 for d in order)]
    steps = 0, 0
    if weight is not None and not any(weight.stride()[1:]):
        steps = weight.stride(0), 0
    elif weight is not None:
        weight, steps = _in_order(weight, every), (first.numel(), 1)
    double = dtype == torch.float64
    tiles = max(1, (8 if double else 16) // triton.next_power_of_2(count))  # a thread's elements
    block = 128 * tiles
    if first.numel():
        with on_device_of(first):
            _consensus[(triton.cdiv(first.numel(), block),)](
                tuple(_in_order(message, order) for message in messages),
                weight,
                *(None if x is None else _in_order(x, order) for x in (start, low, unit)),
                output.permute(order),
                confidence,
                shares,
                first.numel(),
                *steps,
                trim,
                bandwidth,
                iterations,
                MEDIAN=trim == 0.5,
                KERNEL=kernel,
                NETWORK=network(count) if trim else (),
                TYPE=accumulate_type(first),
                BLOCK=block,
                num_warps=4,
            )
    back = [order.index(d) for d in range(first.dim())]
    if kernel:
        shares = _in_order(shares, [0, *(d + 1 for d in back)])
    return output, _in_order(confidence, back), shares


KERNELS: dict[str, Callable[..., Any]] = {"consensus": consensus}
