"""The implementations that generic tests compare; each gives an operator's roles by name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mtkd import ops
from mtkd.dispatch import Loss

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def formula(loss: Loss, role: str) -> Callable[..., Any]:
    """The plain PyTorch implementation, whatever kernels are registered."""
    return getattr(loss.formulas, role)


def compiled(loss: Loss, role: str) -> Callable[..., Any]:
    """What is registered for the CPU: compiled kernels, and drivers over them."""
    return getattr(loss, role)


IMPLEMENTATIONS = [
    pytest.param(formula, id="formula"),
    pytest.param(
        compiled,
        id="compiled",
        marks=pytest.mark.skipif(ops.extension is None, reason="built without the extension"),
    ),
]
