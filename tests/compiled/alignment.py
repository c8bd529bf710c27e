"""Alignment losses, alone and as a fused layer calls them."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from mtkd.triton import alignment

from .common import COMMON, EVERY, ODD, Configuration, coefficient


class Aligned(NamedTuple):
    """An alignment loss in one configuration; `weights` are those of the operator's terms."""

    name: str
    rows: int
    dims: tuple[int, ...]
    weights: tuple[float, float, float, float] = (0.5, 0.5, 0.0, 0.0)
    masked: bool = False
    standard: bool = False
    dispersed: bool = False
    dtypes: tuple[torch.dtype, ...] = COMMON

    def arguments(self, dtype: torch.dtype) -> tuple[Any, ...]:
        """The operator's arguments."""
        new = partial(torch.empty, dtype=dtype, device="meta")
        width, teachers = sum(self.dims), len(self.dims)
        mask = new(self.rows, teachers, dtype=torch.bool) if self.masked else None
        numbers = partial(new, dtype=torch.promote_types(dtype, torch.float32))
        shift, scale = (numbers(width) if self.standard else None for _ in range(2))
        dispersion = numbers(teachers) if self.dispersed else None
        pair = new(self.rows, width), new(self.rows, width)
        return mask, self.dims, *pair, shift, scale, dispersion, *self.weights, 1.0, 1e-8


EVERY_TERM = (0.4, 0.3, 0.2, 0.1)
ALIGNED = (
    Aligned("alignment-four", 25216, (768,) * 4, dtypes=EVERY),
    Aligned("alignment-standard", 25216, (768, 1024, 1280), masked=True, standard=True),
    Aligned("alignment-wide", 16, (8192,), standard=True),
    Aligned("alignment-many", 512, (64,) * 1024, masked=True),
    Aligned("alignment-narrow", 33, (16,) * 130, weights=(1.0, 0.0, 0.0, 0.0)),
    Aligned("alignment-mse", 8192, (1024,) * 8, weights=(0.0, 0.0, 1.0, 0.0), standard=True),
    Aligned("alignment-smooth", 8192, (1024,) * 8, weights=(0.0, 1.0, 0.0, 0.0)),
    Aligned("alignment-angle", 512, (1280,) * 3, weights=(0.0, 0.0, 0.0, 1.0), dispersed=True),
    Aligned("alignment-odd", 37, ODD, EVERY_TERM, True, True, True, dtypes=EVERY),
    Aligned("alignment-tiny", 5, (3, 1, 2), EVERY_TERM, standard=True),
)


def alignment_launches(args: tuple[Any, ...]) -> Iterator[Configuration]:
    """The launchers of the loss on tensors of its own, as autograd and reductions call them."""
    grad = coefficient(args)
    same = grad.new_empty(()).expand(grad.shape)  # of a plain mean
    yield "forward", partial(alignment.forward, *args)
    yield "backward", partial(alignment.backward, grad, grad.new_empty(0), *args, [True])
    yield "value_and_grad", partial(alignment.value_and_grad, same, *args, [True])


def alignment_in_layers(args: tuple[Any, ...]) -> Iterator[Configuration]:
    """The launcher as a fused layer calls it: the student in float32, and a bias."""
    mask, dims, student, *rest = args
    wide = (mask, dims, student.float(), *rest)
    launch = partial(alignment.with_bias, student[0])
    yield "in layers, forward", partial(launch, None, wide, None)
    yield "in layers, in place", partial(launch, coefficient(wide), wide, wide[2])
    yield "in layers, narrowed", partial(launch, coefficient(wide), wide, student)


def alignment_configurations() -> Iterator[Configuration]:
    """Every role in every dtype, and inside of a layer in bfloat16."""
    for case in ALIGNED:
        for dtype in case.dtypes:
            for role, launch in alignment_launches(case.arguments(dtype)):
                yield f"{case.name} {str(dtype).removeprefix('torch.')} {role}", launch
        for role, launch in alignment_in_layers(case.arguments(torch.bfloat16)):
            yield f"{case.name} bfloat16 {role}", launch
