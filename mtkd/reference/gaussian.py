"""Negative log-likelihood of teachers under diagonal Gaussians and their mixtures.

For a teacher with columns d, modes m, standard deviations s = exp(log_std) and z = (t - mean) / s::

    e_m  = sum_d z_md^2 / 2 + log s_md        (+ D_t / 2 log 2 pi with `full`)
    loss = -log sum_m softmax(mode_logits)_m exp(-e_m)    (e_1 without mode logits)

    d loss / d mean_md   = -r_m z_md / s_md
    d loss / d log_std   =  r_m (1 - z_md^2)            (times 1 - tanh^2 with `bound`)
    d loss / d logits_m  =  softmax(mode_logits)_m - r_m

where r_m is the posterior probability of mode m. Shapes: mean, log_std and target ``(N, D)``;
with mode_logits ``(N, M, T)`` mean and log_std are ``(N, M, D)``; mask and loss ``(N, T)``.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .columns import accumulate_dtype, expand_columns, segment_sum, zero_uncounted_rows
from .layers import project, project_gradient


class _Standardised(NamedTuple):
    z: Tensor
    log_std: Tensor
    slope: Tensor | float  # d log_std / d (its argument): 1 without a bound


def _standardise(
    mean: Tensor,
    log_std: Tensor,
    target: Tensor,
    mask: Tensor | None,
    dims: Sequence[int],
    bound: float | None,
) -> _Standardised:
    dtype = accumulate_dtype(mean, log_std)
    mean, log_std, target = (x.to(dtype) for x in (mean, log_std, target))
    target = target.unsqueeze(1)
    if mean.dim() == 2:
        mean, log_std = mean.unsqueeze(1), log_std.unsqueeze(1)
    if mask is not None:  # whatever a masked entry holds, it must not reach a derivative as NaN
        masked = ~expand_columns(mask, dims).unsqueeze(1)
        mean, log_std, target = (x.masked_fill(masked, 0.0) for x in (mean, log_std, target))
    slope: Tensor | float = 1.0
    if bound is not None:
        ratio = torch.tanh(log_std / bound)
        log_std, slope = bound * ratio, 1.0 - ratio.square()
    return _Standardised((target - mean) * torch.exp(-log_std), log_std, slope)


def _mode_energy(state: _Standardised, dims: Sequence[int], full: bool) -> Tensor:
    energy = segment_sum(0.5 * state.z.square() + state.log_std, dims)
    if full:
        widths = torch.tensor(list(dims), dtype=energy.dtype, device=energy.device)
        energy = energy + 0.5 * math.log(2.0 * math.pi) * widths
    return energy


def _log_joint(energy: Tensor, mode_logits: Tensor, mask: Tensor | None) -> Tensor:
    mode_logits = mode_logits.to(energy.dtype)
    if mask is not None:
        mode_logits = mode_logits.masked_fill(~mask.unsqueeze(1), 0.0)
    return torch.log_softmax(mode_logits, dim=1) - energy


def _per_dim(values: Tensor, dims: Sequence[int], per_dim: bool) -> Tensor:
    if not per_dim:
        return values
    return values / torch.tensor(list(dims), dtype=values.dtype, device=values.device)


def nll(
    mask: Tensor | None,
    dims: Sequence[int],
    mean: Tensor,
    log_std: Tensor,
    target: Tensor,
    mode_logits: Tensor | None,
    bound: float | None,
    per_dim: bool,
    full: bool,
) -> Tensor:
    """Return the matrix of negative log-likelihoods ``(N, T)`` in nats."""
    state = _standardise(mean, log_std, target, mask, dims, bound)
    energy = _mode_energy(state, dims, full)
    if mode_logits is None:
        loss = energy.squeeze(1)
    else:
        loss = -torch.logsumexp(_log_joint(energy, mode_logits, mask), dim=1)
    loss = _per_dim(loss, dims, per_dim)
    return loss if mask is None else loss.masked_fill(~mask, 0.0)


def nll_gradient(
    grad: Tensor,
    mask: Tensor | None,
    dims: Sequence[int],
    mean: Tensor,
    log_std: Tensor,
    target: Tensor,
    mode_logits: Tensor | None,
    bound: float | None,
    per_dim: bool,
    full: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients to mean, log_std and mode_logits, given the gradient to the matrix."""
    state = _standardise(mean, log_std, target, mask, dims, bound)
    grad = _per_dim(grad.to(state.z.dtype), dims, per_dim)
    if mask is not None:
        grad = grad.masked_fill(~mask, 0.0)
    mode_grad, logits_grad = grad.unsqueeze(1), None
    if mode_logits is not None:
        log_joint = _log_joint(_mode_energy(state, dims, full), mode_logits, mask)
        posterior = torch.softmax(log_joint, dim=1)
        prior = torch.softmax(mode_logits.to(log_joint.dtype), dim=1)
        if mask is not None:
            prior = prior.masked_fill(~mask.unsqueeze(1), 0.0)
            posterior = posterior.masked_fill(~mask.unsqueeze(1), 0.0)
        logits_grad = ((prior - posterior) * mode_grad).to(mode_logits.dtype)
        mode_grad = posterior * mode_grad
    weight = expand_columns(mode_grad, dims)
    weighted = weight * state.z  # first, so that a 0 meets z, not a z^2 that is infinite
    mean_grad = -weighted * torch.exp(-state.log_std)
    log_std_grad = (weight - weighted * state.z) * state.slope
    mean_grad, log_std_grad = mean_grad.to(mean.dtype), log_std_grad.to(log_std.dtype)
    return mean_grad.reshape(mean.shape), log_std_grad.reshape(log_std.shape), logits_grad


def linear_nll(
    mask: Tensor | None,
    dims: Sequence[int],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mode_weight: Tensor | None,
    mode_bias: Tensor | None,
    target: Tensor,
    bound: float | None,
    per_dim: bool,
    full: bool,
    workspace: int,
    stash: bool,
) -> Tensor:
    """Return `nll` of ``mean, log_std = input @ weight.T + bias``; the same for mode logits.

    Shapes: input ``(N, H)``, weight ``(2, D, H)``, bias ``(2, D)``; with mode_weight
    ``(M, T, H)`` and mode_bias ``(M, T)``, weight ``(2, M, D, H)`` and bias ``(2, M, D)``; for
    equally wide teachers with inputs of their own, input ``(T, N, H)``. `workspace` and
    `stash` steer kernels only.
    """
    dtype, input = accumulate_dtype(input, weight), zero_uncounted_rows(input, mask)
    mean, log_std = project(input, weight, bias, dtype).unbind(1)
    logits = None if mode_weight is None else project(input, mode_weight, mode_bias, dtype)
    return nll(mask, dims, mean, log_std, target, logits, bound, per_dim, full)


def linear_nll_gradient(
    grad: Tensor,
    mask: Tensor | None,
    dims: Sequence[int],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mode_weight: Tensor | None,
    mode_bias: Tensor | None,
    target: Tensor,
    bound: float | None,
    per_dim: bool,
    full: bool,
    workspace: int,
    stash: bool,
) -> tuple[Tensor | None, ...]:
    """Return the gradients to input, weight, bias, mode_weight and mode_bias."""
    dtype, input = accumulate_dtype(input, weight), zero_uncounted_rows(input, mask)
    mean, log_std = project(input, weight, bias, dtype).unbind(1)
    logits = None if mode_weight is None else project(input, mode_weight, mode_bias, dtype)
    settings = (bound, per_dim, full)
    mean_grad, log_std_grad, logits_grad = nll_gradient(
        grad, mask, dims, mean, log_std, target, logits, *settings
    )
    columns_grad = torch.stack((mean_grad, log_std_grad), 1)
    to_input, to_weight, to_bias = project_gradient(columns_grad, input, weight, bias)
    to_mode_weight = to_mode_bias = None
    if mode_weight is not None and logits_grad is not None:
        more, to_mode_weight, to_mode_bias = project_gradient(
            logits_grad, input, mode_weight, mode_bias
        )
        to_input = to_input + more
    return to_input.to(input.dtype), to_weight, to_bias, to_mode_weight, to_mode_bias


def linear_nll_saved(mask: Tensor | None, dims: Sequence[int], *args: Any) -> Tensor:
    """Return an empty tensor of the size of the stashed gradients of the projections."""
    input, weight, _, mode_weight, *_ = args
    width = weight[..., 0].numel() + (0 if mode_weight is None else mode_weight[..., 0].numel())
    size = input.shape[-2] * width if args[-1] else 0
    return torch.empty(size, dtype=accumulate_dtype(input, weight), device=input.device)
