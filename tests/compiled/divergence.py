"""Divergences, alone and as a fused layer calls them."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from mtkd.triton import divergence

from .common import COMMON, EVERY, ODD, Configuration, coefficient


class Divergence(NamedTuple):
    """A divergence in one configuration; `weights` are forward's, reverse's, whether they mix."""

    name: str
    rows: int
    dims: tuple[int, ...]
    weights: tuple[float, float, bool] = (1.0, 0.0, False)
    masked: bool = False
    shared: bool = False
    dtypes: tuple[torch.dtype, ...] = COMMON

    def arguments(self, dtype: torch.dtype) -> tuple[Any, ...]:
        """The operator's arguments."""
        new = partial(torch.empty, dtype=dtype, device="meta")
        mask = new(self.rows, len(self.dims), dtype=torch.bool) if self.masked else None
        student = new(self.rows, self.dims[0] if self.shared else sum(self.dims))
        return mask, self.dims, student, new(self.rows, sum(self.dims)), *self.weights, 2.0, 4.0


REVERSE, JEFFREYS, MIXED = (0.0, 1.0, False), (1.0, 1.0, False), (0.5, 0.5, True)
DIVERGENCES = (
    Divergence("kl-four", 4096, (1000,) * 4, dtypes=EVERY),
    Divergence("kl-reverse", 4096, (1000,) * 4, REVERSE),
    Divergence("kl-jeffreys", 4096, (1000,) * 4, JEFFREYS, dtypes=EVERY),
    Divergence("kl-js", 4096, (1000,) * 4, MIXED, dtypes=EVERY),
    Divergence("kl-wide", 512, (150_000,), MIXED),
    Divergence("kl-heads", 8192, (10, 100, 21_841), masked=True),
    Divergence("kl-many", 512, (10,) * 1024, JEFFREYS, masked=True),
    Divergence("kl-odd", 37, ODD, MIXED, masked=True, dtypes=EVERY),
    Divergence("kl-tiny", 5, (3, 1, 2), REVERSE),
    Divergence("kl-shared", 4096, (1000,) * 32, masked=True, shared=True, dtypes=EVERY),
    Divergence("kl-shared-js", 512, (150_000,) * 4, MIXED, shared=True),
    Divergence("kl-shared-jeffreys", 512, (10,) * 64, JEFFREYS, shared=True),
)


def divergence_launches(args: tuple[Any, ...]) -> Iterator[Configuration]:
    """The launchers of the loss on tensors of its own, as autograd and reductions call them."""
    grad = coefficient(args)
    same = grad.new_empty(()).expand(grad.shape)  # of a plain mean
    yield "forward", partial(divergence.forward, *args)
    backward = partial(divergence.backward, grad, grad.new_empty(0), *args)
    for wanted in ([True, False], [False, True], [True, True]):
        yield f"backward {wanted}", partial(backward, wanted)
    yield "value_and_grad", partial(divergence.value_and_grad, same, *args, [True, False])


def divergence_in_layers(args: tuple[Any, ...]) -> Iterator[Configuration]:
    """The launcher as a fused layer calls it: the student in float32, and a bias."""
    mask, dims, student, *rest = args
    wide = (mask, dims, student.float(), *rest)
    launch = partial(divergence.with_bias, student[0])
    yield "in layers, forward", partial(launch, None, wide, None)
    yield "in layers, in place", partial(launch, coefficient(wide), wide, wide[2])
    yield "in layers, narrowed", partial(launch, coefficient(wide), wide, student)


def divergence_configurations() -> Iterator[Configuration]:
    """Every role in every dtype, and inside of a layer in bfloat16."""
    for case in DIVERGENCES:
        for dtype in case.dtypes:
            for role, launch in divergence_launches(case.arguments(dtype)):
                yield f"{case.name} {str(dtype).removeprefix('torch.')} {role}", launch
        if not case.shared:
            for role, launch in divergence_in_layers(case.arguments(torch.bfloat16)):
                yield f"{case.name} bfloat16 {role}", launch
