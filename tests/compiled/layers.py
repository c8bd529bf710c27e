"""Losses fused with the GEMM that makes their parameters."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from mtkd.triton import linear_gaussian

from .common import Configuration


class Layers(NamedTuple):
    """A Gaussian loss fused with the GEMM that makes its parameters, in one configuration."""

    name: str
    rows: int
    dims: tuple[int, ...]
    features: int
    bias: bool = True
    masked: bool = False
    bound: float | None = None
    full: bool = False

    def tile(self, dtype: torch.dtype, grad: torch.dtype | None) -> Callable[[], Any]:
        """The launcher, with gradients of a dtype or without any."""
        new = partial(torch.empty, dtype=dtype, device="meta")
        width, teachers = sum(self.dims), len(self.dims)
        return partial(
            linear_gaussian.tile,
            new(self.rows, self.features),
            new(2, 2 * width, self.features),
            new(2, 2 * width) if self.bias else None,
            slice(width, 2 * width),
            new(self.rows, teachers, dtype=torch.bool) if self.masked else None,
            self.dims,
            new(self.rows, width),
            (self.bound, True, self.full),
            None if grad is None else new(self.rows, teachers, dtype=torch.float32),
            None if grad is None else new(self.rows, 2, width, dtype=grad),
            with_bias_sums=self.bias,
        )


LAYERS = (
    Layers("layer-eight", 8192, (1024,) * 8, 1024),
    Layers("layer-eight-masked", 8192, (1024,) * 8, 768, masked=True, bound=4.0),
    Layers("layer-ragged", 8192, (768, 1024, 1280), 1024, masked=True, bound=4.0, full=True),
    Layers("layer-many", 512, (64,) * 256, 768, bound=4.0),
    Layers("layer-narrow", 512, (32,) * 64, 384, bias=False),
    Layers("layer-blocks", 500, (32, 64, 48), 384, masked=True),
)


def linear_gaussian_configurations() -> Iterator[Configuration]:
    """With gradients to go on with, with gradients that are kept, and without any."""
    for case in LAYERS:
        for dtype in (torch.bfloat16, torch.float16):
            for grad in (dtype, torch.float32, None):
                words = f"{dtype}, gradients {grad}".replace("torch.", "")
                yield f"{case.name} {words}", case.tile(dtype, grad)
