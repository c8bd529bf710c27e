"""Gaussian negative log-likelihood in Triton: one kernel for the four operators of the loss.

Without mixture modes value and gradients take one walk over a teacher's columns. With modes a
first walk finds each mode's energy, a second one writes the gradients, weighted by the posterior;
a tile's rows are few enough that it finds its inputs in the cache.
"""

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .common import (
    RowLoss,
    accumulate_type,
    as_bytes,
    on_device_of,
    softmax,
    strides,
    tanh_and_slope,
    teachers,
    tile,
)

HALF_LOG_2PI = tl.constexpr(0.91893853320467274178)


@triton.jit
def element(mean, log_std, target, grad, BOUND: tl.constexpr):
    """Return one number's energy and its gradients to the mean and to the log_std argument.

    `grad` scales the gradients; it comes first, so that a 0 meets z, not a z^2 that is infinite.
    """
    slope = 1.0
    if BOUND is not None:
        ratio, slope = tanh_and_slope(log_std / BOUND)
        log_std = BOUND * ratio
    inverse_std = tl.exp(-log_std)
    z = (target - mean) * inverse_std
    gz = grad * z
    return 0.5 * z * z + log_std, -gz * inverse_std, (grad - gz * z) * slope


@triton.jit
def _walk(
    mean,
    log_std,
    target,
    mean_bias,
    log_std_bias,
    mean_grad,
    log_std_grad,
    mean_d,
    log_std_d,
    target_d,
    bias_d,
    mean_grad_d,
    log_std_grad_d,
    begin,
    end,
    inside,
    counted,
    grad,
    BOUND: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sum a tile of rows' energies over one teacher's columns; write the gradients wanted.

    Pointers are those of the rows, one a row, and of biases; gradients that are None are not
    written.
    """
    energy = tl.zeros_like(grad)
    for start in range(begin, end, COLUMNS):
        column = start + tl.arange(0, COLUMNS).to(tl.int64)[None, :]
        here = column < end
        read, write = here & counted[:, None], here & inside[:, None]
        m = tl.load(mean[:, None] + column * mean_d, mask=read, other=0.0).to(grad.dtype)
        s = tl.load(log_std[:, None] + column * log_std_d, mask=read, other=0.0).to(grad.dtype)
        t = tl.load(target[:, None] + column * target_d, mask=read, other=0.0).to(grad.dtype)
        if mean_bias is not None:
            m += tl.load(mean_bias + column * bias_d, mask=here, other=0.0).to(grad.dtype)
            s += tl.load(log_std_bias + column * bias_d, mask=here, other=0.0).to(grad.dtype)
        e, to_mean, to_log_std = element(m, s, t, grad[:, None], BOUND)
        energy += tl.sum(e, 1)
        if mean_grad is not None:
            to_mean = to_mean.to(mean_grad.dtype.element_ty)
            tl.store(mean_grad[:, None] + column * mean_grad_d, to_mean, mask=write)
        if log_std_grad is not None:
            to_log_std = to_log_std.to(log_std_grad.dtype.element_ty)
            tl.store(log_std_grad[:, None] + column * log_std_grad_d, to_log_std, mask=write)
    return energy


@triton.jit
def _at_mode(index, values, mode):
    """Return each row's value of one mode."""
    return tl.sum(tl.where(index == mode, values, 0.0), 1)


@triton.jit
def _kernel(
    mask,
    starts,
    mean,
    log_std,
    target,
    logits,
    mean_bias,
    log_std_bias,
    coefficient,
    matrix,
    mean_grad,
    log_std_grad,
    logits_grad,
    rows,
    count,
    modes,
    width,
    mask_n,
    mask_t,
    mean_n,
    mean_m,
    mean_d,
    log_std_n,
    log_std_m,
    log_std_d,
    target_n,
    target_d,
    logits_n,
    logits_m,
    logits_t,
    bias_m,
    bias_d,
    coefficient_n,
    coefficient_t,
    mean_grad_n,
    mean_grad_m,
    mean_grad_d,
    log_std_grad_n,
    log_std_grad_m,
    log_std_grad_d,
    logits_grad_n,
    logits_grad_m,
    logits_grad_t,
    ACC: tl.constexpr,
    BOUND: tl.constexpr,
    PER_DIM: tl.constexpr,
    FULL: tl.constexpr,
    MODES: tl.constexpr,  # a power of two, at least `modes`; 0 without mode logits
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
    columns = (end - begin).to(ACC)
    grad = tl.zeros([ROWS], ACC)
    if coefficient is not None:
        c = coefficient + row * coefficient_n + teacher * coefficient_t
        grad += tl.load(c, mask=counted, other=0.0).to(ACC)
        if PER_DIM:
            grad /= columns
    constant = tl.zeros([ROWS], ACC)
    if FULL:
        constant += HALF_LOG_2PI * columns
    mean += row * mean_n
    log_std += row * log_std_n
    target += row * target_n
    if mean_grad is not None:
        mean_grad += row * mean_grad_n
    if log_std_grad is not None:
        log_std_grad += row * log_std_grad_n
    if MODES == 0:
        loss = constant + _walk(
            mean,
            log_std,
            target,
            mean_bias,
            log_std_bias,
            mean_grad,
            log_std_grad,
            mean_d,
            log_std_d,
            target_d,
            bias_d,
            mean_grad_d,
            log_std_grad_d,
            begin,
            end,
            inside,
            counted,
            grad,
            BOUND,
            COLUMNS,
        )
    else:
        index = tl.arange(0, MODES)[None, :]
        prior = tl.full([ROWS, MODES], float("-inf"), ACC)
        joint = tl.full([ROWS, MODES], float("-inf"), ACC)
        logits += row * logits_n + teacher * logits_t
        for m in range(modes):
            mode = tl.full([], m, tl.int64)
            logit = tl.load(logits + mode * logits_m, mask=counted, other=0.0).to(ACC)
            energy = constant + _walk(
                mean + mode * mean_m,
                log_std + mode * log_std_m,
                target,
                mean_bias + mode * bias_m if mean_bias is not None else None,
                log_std_bias + mode * bias_m if log_std_bias is not None else None,
                None,
                None,
                mean_d,
                log_std_d,
                target_d,
                bias_d,
                mean_grad_d,
                log_std_grad_d,
                begin,
                end,
                inside,
                counted,
                grad,
                BOUND,
                COLUMNS,
            )
            prior = tl.where(index == mode, logit[:, None], prior)
            joint = tl.where(index == mode, (logit - energy)[:, None], joint)
        prior, normaliser = softmax(prior)
        posterior, evidence = softmax(joint)
        loss = normaliser - evidence
        if coefficient is not None:
            to_logits = prior - posterior
            if logits_grad is not None:
                at = logits_grad + row[:, None] * logits_grad_n + teacher * logits_grad_t
                to_logits = tl.where(counted[:, None], grad[:, None] * to_logits, 0.0)
                tl.store(
                    at + index.to(tl.int64) * logits_grad_m,
                    to_logits.to(logits_grad.dtype.element_ty),
                    mask=inside[:, None] & (index < modes),
                )
            for m in range(modes):
                mode = tl.full([], m, tl.int64)
                _walk(
                    mean + mode * mean_m,
                    log_std + mode * log_std_m,
                    target,
                    mean_bias + mode * bias_m if mean_bias is not None else None,
                    log_std_bias + mode * bias_m if log_std_bias is not None else None,
                    mean_grad + mode * mean_grad_m if mean_grad is not None else None,
                    log_std_grad + mode * log_std_grad_m if log_std_grad is not None else None,
                    mean_d,
                    log_std_d,
                    target_d,
                    bias_d,
                    mean_grad_d,
                    log_std_grad_d,
                    begin,
                    end,
                    inside,
                    counted,
                    grad * _at_mode(index, posterior, mode),
                    BOUND,
                    COLUMNS,
                )
    if matrix is not None:
        if PER_DIM:
            loss /= columns
        loss = tl.where(counted, loss, 0.0)
        tl.store(matrix + row * count + teacher, loss, mask=inside)


def _launch(
    coefficient: Tensor | None,
    args: Sequence[Any],
    matrix: Tensor | None,
    gradients: Sequence[Tensor | None],
    biases: Sequence[Tensor | None] = (None, None),
) -> None:
    mask, dims, mean, log_std, target, logits, bound, per_dim, full = args
    rows, count, modes = mean.shape[0], len(dims), 0 if logits is None else mean.shape[1]
    if rows == 0:
        return
    dims = tuple(dims)
    width, starts = teachers(dims, mean.device)
    accumulate = accumulate_type(mean, log_std)
    shape = tile(rows, dims, modes, accumulate == tl.float64)
    if logits is None:
        mean, log_std = mean.unsqueeze(1), log_std.unsqueeze(1)
        gradients = [None if grad is None else grad.unsqueeze(1) for grad in gradients]
    mean_grad, log_std_grad, logits_grad = gradients
    with on_device_of(mean):
        _kernel[(triton.cdiv(rows, shape.rows) * count,)](
            as_bytes(mask),
            starts,
            mean,
            log_std,
            target,
            logits,
            *biases,
            coefficient,
            matrix,
            mean_grad,
            log_std_grad,
            logits_grad,
            rows,
            count,
            modes,
            width,
            *strides(mask, 2),
            *strides(mean, 3),
            *strides(log_std, 3),
            *strides(target, 2),
            *strides(logits, 3),
            *strides(biases[0], 2),
            *strides(coefficient, 2),
            *strides(mean_grad, 3),
            *strides(log_std_grad, 3),
            *strides(logits_grad, 3),
            ACC=accumulate,
            BOUND=bound,
            PER_DIM=per_dim,
            FULL=full,
            MODES=0 if logits is None else triton.next_power_of_2(modes),
            ROWS=shape.rows,
            COLUMNS=shape.columns,
            num_warps=shape.warps,
        )


def with_biases(
    biases: Sequence[Tensor | None], coefficient: Tensor | None, args: Sequence[Any], *outputs: Any
) -> Tensor:
    """Return the matrix where mean and log_std lack biases ``(M, D)``, or ``(D,)`` without modes.

    The gradients go into `outputs`; without a coefficient there are none.
    """
    matrix = _loss.matrix(args)
    if args[5] is None:
        biases = [None if bias is None else bias.unsqueeze(0) for bias in biases]
    _launch(coefficient, args, matrix, outputs, biases)
    return matrix


_loss = RowLoss(_launch, precise=(2, 3), differentiable=(2, 3, 5))
forward, backward = _loss.forward, _loss.backward
value_and_grad, value_and_grad_out = _loss.value_and_grad, _loss.value_and_grad_out
KERNELS = {"with_biases": with_biases, **_loss.kernels()}
