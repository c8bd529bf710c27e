"""The Gaussian losses, alone and as a fused layer calls them."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from mtkd.triton import gaussian

from .common import COMMON, EVERY, ODD, Configuration, coefficient


class Rows(NamedTuple):
    """A Gaussian loss in one configuration; modes=0 has no mode logits."""

    name: str
    rows: int
    dims: tuple[int, ...]
    modes: int = 0
    masked: bool = False
    bound: float | None = None
    per_dim: bool = True
    full: bool = False
    dtypes: tuple[torch.dtype, ...] = COMMON

    def arguments(self, dtype: torch.dtype) -> tuple[Any, ...]:
        """The operator's arguments."""
        new = partial(torch.empty, dtype=dtype, device="meta")
        width, teachers, inner = sum(self.dims), len(self.dims), (self.modes,) * (self.modes > 0)
        mask = new(self.rows, teachers, dtype=torch.bool) if self.masked else None
        mean, log_std = new(self.rows, *inner, width), new(self.rows, *inner, width)
        logits = new(self.rows, self.modes, teachers) if self.modes else None
        settings = self.bound, self.per_dim, self.full
        return mask, self.dims, mean, log_std, new(self.rows, width), logits, *settings


GAUSSIAN = (
    Rows("gaussian-eight", 8192, (1024,) * 8, dtypes=EVERY),
    Rows("gaussian-wide", 16, (8192,)),
    Rows("gaussian-many", 512, (64,) * 1024, masked=True),
    Rows("gaussian-narrow", 33, (16,) * 130, masked=True, bound=1.0),
    Rows("gaussian-bounded", 8192, (768, 1024, 1280), bound=4.0),
    Rows("gaussian-odd", 37, ODD, masked=True, bound=1.5, per_dim=False, full=True, dtypes=EVERY),
    Rows("gaussian-tiny", 5, (3, 1, 2), full=True),
    Rows("mixture-eight", 8192, (1024,) * 8, modes=4),
    Rows("mixture-bounded", 8192, (768, 1280), modes=16, masked=True, bound=4.0),
    Rows("mixture-hundred", 512, (256,) * 4, modes=100),
    Rows("mixture-odd", 37, ODD, modes=2, masked=True, full=True, dtypes=EVERY),
    Rows("mixture-tiny", 5, (3, 1, 2), modes=3, bound=1.0, per_dim=False),
)


def gaussian_launches(args: tuple[Any, ...]) -> Iterator[Configuration]:
    """The launchers of the loss on tensors of its own, as autograd and reductions call them."""
    grad, wanted = coefficient(args), [True, True, args[5] is not None]
    same = grad.new_empty(()).expand(grad.shape)  # of a plain mean
    yield "forward", partial(gaussian.forward, *args)
    yield "backward", partial(gaussian.backward, grad, grad.new_empty(0), *args, wanted)
    yield "value_and_grad", partial(gaussian.value_and_grad, same, *args, wanted)


def gaussian_in_layers(args: tuple[Any, ...]) -> Iterator[Configuration]:
    """The launcher as a fused layer calls it: parameters side by side, in float32, and biases."""
    mask, dims, mean, log_std, target, logits, *settings = args
    wide = torch.stack([mean, log_std], 1)
    (mean, log_std), narrow = wide.float().unbind(1), wide.unbind(1)
    logits = None if logits is None else logits.float()
    args = (mask, dims, mean, log_std, target, logits, *settings)
    launch = partial(gaussian.with_biases, (wide[0, 0], wide[0, 1]))
    yield "in layers, forward", partial(launch, None, args, None, None, None)
    yield "in layers, in place", partial(launch, coefficient(args), args, mean, log_std, logits)
    yield "in layers, narrowed", partial(launch, coefficient(args), args, *narrow, logits)


def gaussian_configurations() -> Iterator[Configuration]:
    """Every role in every dtype, and inside of a layer in bfloat16."""
    for case in GAUSSIAN:
        for dtype in case.dtypes:
            for role, launch in gaussian_launches(case.arguments(dtype)):
                yield f"{case.name} {str(dtype).removeprefix('torch.')} {role}", launch
        for role, launch in gaussian_in_layers(case.arguments(torch.bfloat16)):
            yield f"{case.name} bfloat16 {role}", launch
