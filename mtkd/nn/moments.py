"""Exact moments of teachers' rows in float64: measured in blocks, merged, merged over ranks."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, distributed, nn

from ..functional.checks import check_tensor
from ..reduction import check_mask
from ..reference.columns import expand_columns, segment_sum
from .teachers import Teachers, Tensors

# Numbers turned into float64 at a time: they should stay in a CPU's caches.
_BLOCK = {"cpu": 1 << 18}
_LARGE_BLOCK = 1 << 24


class Moments(NamedTuple):
    """Of each teacher the count of rows, their mean, and the sum of products of deviations.

    `counts` is ``(T,)`` and `means` ``(D,)``. `scatter` is ``(D,)``, the squares alone, or has the
    teachers' flattened ``(D_t, D_t)`` matrices of all products, one after the other.

    Source: Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing
    Sample Variances", 1979.
    """

    dims: tuple[int, ...]
    counts: Tensor
    means: Tensor
    scatter: Tensor

    @classmethod
    def empty(cls, dims: tuple[int, ...], products: bool, device: torch.device) -> "Moments":
        """Moments of no rows."""
        width = sum(dim * dim if products else dim for dim in dims)
        sizes = (len(dims), sum(dims), width)
        return cls(dims, *(torch.zeros(n, dtype=torch.float64, device=device) for n in sizes))

    @classmethod
    def of(
        cls, rows: Tensor, mask: Tensor | None, dims: tuple[int, ...], products: bool
    ) -> "Moments":
        """Moments of rows ``(N, D)``, those that `mask` ``(N, T)`` leaves and that are finite."""
        rows = rows.double()
        counted = segment_sum(rows, dims).isfinite()  # a NaN or infinity spoils its sum
        if mask is not None:
            counted = counted & mask
        spread, count = expand_columns(counted, dims), counted.sum(0).double()
        mean = torch.where(spread, rows, 0.0).sum(0) / expand_columns(count, dims).clamp(min=1)
        deviations = torch.where(spread, rows - mean, 0.0)
        if not products:
            return cls(dims, count, mean, deviations.square_().sum(0))
        parts = [(part.T @ part).flatten() for part in deviations.split(list(dims), 1)]
        return cls(dims, count, mean, torch.cat(parts))

    def merge(self, other: "Moments") -> "Moments":
        """Moments of both sets of rows."""
        share = other.counts / (self.counts + other.counts).clamp(min=1)
        step = other.means - self.means
        mean = self.means + step * expand_columns(share, self.dims)
        scatter = self.scatter + other.scatter + self._products(step, self.counts * share)
        return Moments(self.dims, self.counts + other.counts, mean, scatter)

    def over_ranks(self) -> "Moments":
        """Moments of the rows of all ranks: two all-reduces, of T + D numbers and of `scatter`."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return self
        sums = torch.cat([self.counts, self.means * expand_columns(self.counts, self.dims)])
        distributed.all_reduce(sums)
        count, mean = sums.split([len(self.dims), sum(self.dims)])
        mean = mean / expand_columns(count, self.dims).clamp(min=1)
        scatter = self.scatter + self._products(self.means - mean, self.counts)
        distributed.all_reduce(scatter)
        return Moments(self.dims, count, mean, scatter)

    def variance(self, correction: int = 0) -> Tensor:
        """Variances ``(D,)`` for a `scatter` of squares; divides by the count less `correction`."""
        return self.scatter / expand_columns((self.counts - correction).clamp(min=1), self.dims)

    def _products(self, step: Tensor, weight: Tensor) -> Tensor:
        """Products of steps ``(D,)``, in the form of `scatter`, times a weight a teacher."""
        if len(self.scatter) == len(self.means):  # squares alone, or all teachers have one column
            return step.square() * expand_columns(weight, self.dims)
        steps = zip(step.split(list(self.dims)), weight, strict=True)
        return torch.cat([(part.outer(part) * each).flatten() for part, each in steps])


_Self = TypeVar("_Self", bound="Estimator")


class Estimator(nn.Module):
    """A module of teachers' statistics: measures batches, and its buffers keep their dtypes."""

    expendable = True
    products = False
    mean: Tensor

    def __init__(self, dims: Sequence[int] | Mapping[str, int], eps: float, sync: bool) -> None:
        super().__init__()
        if not eps > 0:
            raise ValueError(f"eps: expected a positive number, got {eps}")
        self.teachers, self.eps, self.sync = Teachers.of(dims), eps, sync
        self.register_buffer("mean", torch.zeros(sum(self.teachers.dims), dtype=torch.float64))

    @torch.no_grad()
    def estimate(self: _Self, batches: Iterable[Any]) -> _Self:
        """Replace the statistics by those of all batches, in one pass; return the module.

        Args:
            batches: an iterable of targets, or of pairs (target, mask). With several ranks each
                brings its own, and all of them call this.
        """
        total = Moments.empty(self.teachers.dims, self.products, self.mean.device)
        for batch in batches:
            target, mask = batch if _has_mask(batch) else (batch, None)
            total = total.merge(self._measure(target, mask))
        self._replace(total.over_ranks() if self.sync else total)
        return self

    def _replace(self, moments: Moments) -> None:
        raise NotImplementedError

    def _measure(self, target: Tensors, mask: Tensor | None) -> Moments:
        """Moments of this rank's batch."""
        found: list[Moments] = []

        def measure(tensor: Tensor, teachers: slice, _: slice) -> Tensor:
            check_tensor("target", tensor, self.mean.device)
            check_mask(mask, (*tensor.shape[:-1], len(self.teachers.dims)), self.mean.device)
            counted = (
                None
                if mask is None
                else mask[..., teachers].reshape(-1, teachers.stop - teachers.start)
            )
            rows, dims = tensor.reshape(-1, tensor.shape[-1]), self.teachers.dims[teachers]
            found.append(_of_blocks(rows, counted, dims, self.products))
            return tensor

        self.teachers.map(measure, "target", target)
        tensors = (torch.cat(parts) for parts in zip(*(each[1:] for each in found), strict=True))
        return Moments(self.teachers.dims, *tensors)

    def _apply(self: _Self, fn: Callable[..., Any], recurse: bool = True) -> _Self:
        """Follow a change of device but not of dtype, which would spoil the statistics."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in self.named_buffers(recurse=False):
            if buffer.dtype != before[name].dtype:
                setattr(self, name, before[name].to(buffer.device))
        return self

    def extra_repr(self) -> str:
        """Describe the teachers."""
        return f"teachers={len(self.teachers.dims)}, width={self.mean.numel()}, eps={self.eps}"


def _has_mask(batch: Any) -> bool:
    """Whether a batch is a pair (target, mask) and not a sequence of two teachers."""
    if not isinstance(batch, tuple) or len(batch) != 2:
        return False
    mask = batch[1]
    return mask is None or (isinstance(mask, Tensor) and mask.dtype == torch.bool)


def _of_blocks(rows: Tensor, mask: Tensor | None, dims: tuple[int, ...], products: bool) -> Moments:
    """Moments of rows, so many at a time that their float64 copies stay small."""
    size = max(1, _BLOCK.get(rows.device.type, _LARGE_BLOCK) // rows.shape[1])
    blocks = rows.split(size)
    masks = [None] * len(blocks) if mask is None else mask.split(size)
    pairs = zip(blocks, masks, strict=True)
    return reduce(Moments.merge, (Moments.of(*pair, dims, products) for pair in pairs))
