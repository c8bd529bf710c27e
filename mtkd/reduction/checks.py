"""What reductions ask of their arguments: one clear error that names the argument."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

REDUCTIONS = ("none", "mean", "sum")
Weight = Tensor | Callable[[Tensor, Tensor | None], Tensor] | None


def as_losses(loss: Tensor, dimensions: int) -> Tensor:
    """Check a matrix that a user gives; return it in the dtype of losses."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss: expected a tensor, got {type(loss).__name__}")
    if not loss.is_floating_point():
        raise TypeError(f"loss: expected a floating-point tensor, got {loss.dtype}")
    if loss.dim() < dimensions or loss.shape[-1] < 1:
        expected = "(*, T)" if dimensions == 1 else "(*, L, T)"
        shape = tuple(loss.shape)
        raise ValueError(f"loss: expected shape {expected}, at least one teacher, got {shape}")
    return loss.to(torch.promote_types(loss.dtype, torch.float32))


def check_arguments(
    shape: tuple[int, ...],
    device: torch.device,
    weight: Weight,
    mask: Tensor | None,
    denominator: float | Tensor | None,
    reduction: str,
) -> None:
    """Raise unless these fit a matrix of losses of this shape ``(*, T)``."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if weight is not None and not callable(weight):
        check_weight("weight", weight, shape, device)
    check_mask(mask, shape, device)
    if denominator is not None and reduction != "mean":
        raise ValueError(f"denominator: expected with reduction='mean' alone, got {reduction!r}")
    if isinstance(denominator, Tensor):
        _check_tensor("denominator", denominator, ((),), device)
    elif denominator is not None and not isinstance(denominator, (int, float)):
        expected = "a number or a 0-dim tensor"
        raise TypeError(f"denominator: expected {expected}, got {type(denominator).__name__}")
    elif denominator is not None and not 0 <= denominator < float("inf"):
        raise ValueError(f"denominator: expected a finite number, 0 or more, got {denominator!r}")


def check_mask(mask: Any, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise unless `mask` is None or a bool tensor of this shape and device."""
    _check_tensor("mask", mask, (shape,), device)
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask: expected a bool tensor (True counts), got {mask.dtype}")


def check_weight(name: str, weight: Any, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise unless `weight` is a floating-point tensor ``(T,)``, or of this shape ``(*, T)``."""
    if not isinstance(weight, Tensor):
        expected = "a tensor or a callable" if name == "weight" else "a tensor"
        raise TypeError(f"{name}: expected {expected}, got {type(weight).__name__}")
    _check_tensor(name, weight, (shape[-1:], shape), device)
    if not weight.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {weight.dtype}")


def _check_tensor(
    name: str, tensor: Any, shapes: tuple[tuple[int, ...], ...], device: torch.device
) -> None:
    if tensor is None:
        return
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tuple(tensor.shape) not in shapes:
        expected = " or ".join(str(tuple(shape)) for shape in shapes)
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected device {device}, got {tensor.device}")
