"""Linear layers of losses that are fused with one, as formulas."""

import torch
from torch import Tensor


def project(input: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return ``(N, *weight.shape[:-1])``; input is ``(N, H)``, or ``(T, N, H)`` for T teachers."""
    out = torch.einsum("tnh,...tdh->n...td", *_by_input(input.to(dtype), weight.to(dtype)))
    out = out.flatten(-2)
    return out if bias is None else out + bias.to(dtype)


def project_gradient(
    grad: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients to input, in the dtype of `grad`, to weight and to bias."""
    inputs, weights = _by_input(input.to(grad.dtype), weight.to(grad.dtype))
    grads = grad.unflatten(-1, (inputs.shape[0], -1))
    to_input = torch.einsum("n...td,...tdh->tnh", grads, weights).reshape(input.shape)
    to_weight = torch.einsum("n...td,tnh->...tdh", grads, inputs).reshape(weight.shape)
    to_bias = None if bias is None else grad.sum(0).to(bias.dtype)
    return to_input, to_weight.to(weight.dtype), to_bias


def _by_input(input: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return input ``(T, N, H)`` and weight ``(*, T, D / T, H)``; T is 1 for a shared input."""
    input = input if input.dim() == 3 else input.unsqueeze(0)
    return input, weight.unflatten(-2, (input.shape[0], -1))
