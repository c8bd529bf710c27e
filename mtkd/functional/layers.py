"""What losses fused with a linear layer check, cast and decide alike."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import linear
from ..reduction import Weight, needs_matrix
from .checks import Group, check_tensor


def input_leading(group: Group) -> torch.Size:
    """Return the leading dimensions of a group's input."""
    name = f"input{group.suffix}"
    input: Tensor = group.tensors[0]
    check_tensor(name, input)
    if input.dim() < 1:
        raise ValueError(f"{name}: expected shape (*, H), got a 0-dim tensor")
    return input.shape[:-1]


def autocast(operand: Tensor | None) -> Tensor | None:
    """Cast a GEMM's operand as autocast casts those of torch's own linear layers."""
    if operand is None or operand.dtype == torch.float64:
        return operand
    kind = operand.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return operand
    return operand.to(torch.get_autocast_dtype(kind))


def keeps_stash(
    calls: Sequence[Sequence[Any]], rows: int, width: int, weight: Weight, reduction: str
) -> bool:
    """Whether calls keep unit gradients, `width` numbers a row, for a matrix that is trained."""
    if not (needs_matrix(weight, reduction) and torch.is_grad_enabled()):
        return False
    trained = any(isinstance(x, Tensor) and x.requires_grad for call in calls for x in call)
    return trained and linear.stash_fits(rows, width)
