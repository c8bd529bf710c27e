"""Checks that rules of weights share, and how they read logits: one teacher after another."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..reduction import check_mask

Tensors = Tensor | Sequence[Tensor]


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for float64, else float32: the dtype weights are computed in."""
    return torch.promote_types(dtype, torch.float32)


def check_floating(name: str, tensor: Any) -> None:
    """Raise TypeError unless `tensor` is a floating-point tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")


def check_matrix(name: str, matrix: Any, mask: Any) -> None:
    """Raise unless `matrix` is ``(*, T)``, floating point, and the mask like it, bool, or None."""
    check_floating(name, matrix)
    if matrix.dim() < 1 or matrix.shape[-1] < 1:
        shape = tuple(matrix.shape)
        raise ValueError(f"{name}: expected shape (*, T) with at least one teacher, got {shape}")
    check_mask(mask, tuple(matrix.shape), matrix.device)


def check_logits(teacher: Any, mask: Any) -> tuple[Sequence[Tensor], torch.Size]:
    """Check logits ``(*, T, C)`` or a sequence of ``(*, C)``; return each teacher's, and (*, T)."""
    if not isinstance(teacher, (list, tuple)):
        check_floating("teacher", teacher)
        if teacher.dim() < 2 or 0 in teacher.shape[-2:]:
            shape = tuple(teacher.shape)
            raise ValueError(f"teacher: expected shape (*, T, C), at least one each, got {shape}")
        teacher = teacher.unbind(-2)
    if not teacher:
        raise ValueError("teacher: expected one tensor a teacher, got none")
    for t, each in enumerate(teacher):
        check_floating(f"teacher[{t}]", each)
        if each.dim() < 1 or each.shape[-1] < 1 or each.shape != teacher[0].shape:
            expected = tuple(teacher[0].shape) if t else "(*, C)"
            raise ValueError(f"teacher[{t}]: expected shape {expected}, got {tuple(each.shape)}")
        if each.device != teacher[0].device:
            expected = teacher[0].device
            raise ValueError(f"teacher[{t}]: expected device {expected}, got {each.device}")
    shape = torch.Size((*teacher[0].shape[:-1], len(teacher)))
    check_mask(mask, tuple(shape), teacher[0].device)
    return [each.detach() for each in teacher], shape


def log_probabilities(
    teachers: Sequence[Tensor], mask: Tensor | None, temperature: float = 1.0
) -> Iterator[Tensor]:
    """Yield each teacher's log-softmax ``(*, C)``; uniform where it is masked."""
    for t, logits in enumerate(teachers):
        logits = logits.to(wide(logits.dtype))
        if mask is not None:
            logits = logits.masked_fill(~mask[..., t : t + 1], 0.0)
        yield torch.log_softmax(logits / temperature, -1)


def check_positive(name: str, value: Any) -> None:
    """Raise unless a setting is a positive finite number."""
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a positive number, got {type(value).__name__}")
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}: expected a positive finite number, got {value!r}")
