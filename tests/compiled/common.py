"""What the tables of all families share."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Configuration = tuple[str, Callable[[], Any]]
COMMON = (torch.bfloat16, torch.float32)
EVERY = (*COMMON, torch.float16, torch.float64)
ODD = (1500, 1, 17, 96, 97, 5)


def coefficient(args: tuple[Any, ...]) -> Tensor:
    """A factor for each loss, in the dtype of losses."""
    _, dims, mean, *_ = args
    dtype = torch.promote_types(mean.dtype, torch.float32)
    return torch.empty(len(mean), len(dims), dtype=dtype, device=mean.device)
