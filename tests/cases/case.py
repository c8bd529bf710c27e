"""What a case is, and the random numbers that cases are made of."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from mtkd import ops
from mtkd.dispatch import Loss

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
Arguments = tuple[Any, ...]
TINY = (3, 1, 2)
# an interpreted step takes milliseconds: the widest is several tiles either way
RAGGED = (300 if INTERPRETED else 1500, 1, 17, 96, 97, 5)
MANY = (16,) * (20 if INTERPRETED else 130)
# A posterior's relative error is the absolute error of its energies: the roundings, 2^-24 of 1500
# terms of size ~ 1, add up at random to 2^-24 sqrt(1500) = 2e-6, those of partial sums to as much.
POSTERIOR = 6


@dataclass(frozen=True)
class Case:
    """A loss in one configuration."""

    name: str
    loss: Loss
    make: Callable[..., Arguments]
    dims: tuple[int, ...]
    rows: int
    options: dict[str, Any] = field(default_factory=dict)
    large: bool = False
    float32_factor: float = 1  # how far past the usual float32 tolerance its conditioning goes

    def __str__(self) -> str:
        return self.name

    def arguments(self, dtype: torch.dtype, seed: int = 0) -> Arguments:
        """Random arguments; the same numbers, rounded, for every dtype."""
        generator = torch.Generator().manual_seed(seed)
        return self.make(generator, self.rows, self.dims, dtype, **self.options)


def normal(generator: torch.Generator, dtype: torch.dtype, *shape: int, scale: float = 1.0) -> Any:
    """Normal numbers, rounded to a dtype."""
    numbers = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
    return numbers.to(dtype)


def some_mask(generator: torch.Generator, rows: int, teachers: int, masked: bool) -> Any:
    """A mask where most entries count, or None."""
    mask = torch.rand(rows, teachers, generator=generator) > 0.3
    return mask if masked else None


def operators_of(function: Callable[..., Any]) -> Loss:
    """The operators under a public loss, whose import registers drivers as well as kernels."""
    loss: Loss = getattr(ops, function.__name__)
    return loss
