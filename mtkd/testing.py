"""For tests and benchmarks: random arguments of an operator, tolerances, poisoned memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# Largest error, relative to the norm, of results computed in float32 (float64 for float64): some
# roundings of float32, or the one rounding to a 16-bit dtype.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.float16: 2**-11,
    torch.bfloat16: 2**-8,
}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return ``||actual - expected|| / ||expected||`` in float64; inf where one is not finite."""
    actual, expected = actual.detach().double(), expected.detach().double()
    if actual.shape != expected.shape:
        raise AssertionError(f"shapes differ: {tuple(actual.shape)}, {tuple(expected.shape)}")
    if not bool(actual.isfinite().all()):
        return float("inf")
    scale = max(float(expected.norm()), 1e-30)
    return float((actual - expected).norm()) / scale


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype, factor: float = 1) -> None:
    """Raise AssertionError unless `actual` is `expected` up to rounding to `dtype`."""
    error, limit = relative_error(actual, expected), factor * TOLERANCE[dtype]
    if error > limit:
        raise AssertionError(f"relative error {error:.2e} above {limit:.1e} for {dtype}")


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill all fresh tensors, those of compiled kernels too, with NaN: unwritten outputs show."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    settings: Any = torch.utils.deterministic
    filled = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        settings.fill_uninitialized_memory = filled


def cast(arguments: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """Return an operator's arguments with floating tensors in another dtype, detached."""

    def changed(x: Any) -> Any:
        if isinstance(x, list):
            return [changed(each) for each in x]
        return x.detach().to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    return tuple(map(changed, arguments))
