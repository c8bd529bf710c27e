"""The Gaussian losses and what they are compared with, forward and backward."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import mtkd.functional as F
from mtkd.testing import relative_error

from .cases import Case

Step = Callable[[], Any]
LARGEST = 6 << 30  # bytes that a baseline's temporaries may take
NUMBER = 4  # bytes


def _energy(mean: Tensor, log_std: Tensor, target: Tensor) -> Tensor:
    return 0.5 * ((target - mean) * torch.exp(-log_std)).square() + log_std


class Rows:
    """gaussian_nll on packed tensors, or on one tensor a teacher."""

    def __init__(self, case: Case, rows: int | None = None, dtype: torch.dtype = torch.float32):
        generator = torch.Generator().manual_seed(0)
        shape = (rows or case.rows, sum(case.dims))
        draw = [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]
        self.case, self.dims = case, case.dims
        self.mean, self.log_std, self.target = draw[0], 0.3 * draw[1], draw[2]
        self.inputs = [self.mean.requires_grad_(), self.log_std.requires_grad_()]
        self.parts = [
            [part.detach().clone().requires_grad_(i < 2) for part in x.split(case.dims, -1)]
            for i, x in enumerate((self.mean, self.log_std, self.target))
        ]

    def ours(self) -> Tensor:
        """The library's loss."""
        if self.case.sequence:
            return F.gaussian_nll(*self.parts)
        return F.gaussian_nll(self.mean, self.log_std, self.target, self.dims)

    def eager(self) -> Tensor:
        """The packed formula (teachers of a case are equally wide: the mean of their means)."""
        return _energy(self.mean, self.log_std, self.target).mean()

    def loop(self) -> Tensor:
        """Teacher after teacher, as training scripts write it."""
        losses = [_energy(*parts).mean() for parts in zip(*self.parts, strict=True)]
        return torch.stack(losses).mean()

    def clear(self) -> None:
        """Forget all gradients."""
        for x in (*self.inputs, *self.parts[0], *self.parts[1]):
            x.grad = None

    def steps(self) -> dict[str, Step]:
        """Forward and backward of every contender."""
        losses = {"ours": self.ours, "eager": self.eager, "loop": self.loop}
        losses["compile"] = torch.compile(self.eager)
        return {name: lambda loss=loss: loss().backward() for name, loss in losses.items()}

    def floor_bytes(self) -> int:
        """Least traffic: three inputs read, two gradients written."""
        return 5 * self.mean.numel() * NUMBER

    def gradient_bytes(self) -> int:
        """Bytes of the gradients, which are no extra memory."""
        return 2 * self.mean.numel() * NUMBER

    def skipped(self) -> dict[str, str]:
        """Baselines that do not fit, and why."""
        return {}


class Fused:
    """linear_gaussian_nll, its unfused form, and its three matrix products."""

    def __init__(self, case: Case, rows: int | None = None, dtype: torch.dtype = torch.float32):
        generator = torch.Generator().manual_seed(0)
        rows, width, features = rows or case.rows, sum(case.dims), case.features
        self.case, self.dims = case, case.dims
        self.x = torch.randn(rows, features, generator=generator).to(dtype).requires_grad_()
        weight = torch.randn(2, width, features, generator=generator) / features**0.5
        self.weight = (0.5 * weight).to(dtype).requires_grad_()
        self.bias = torch.zeros(2, width, dtype=dtype, requires_grad=True)
        self.target = torch.randn(rows, width, generator=generator).to(dtype)
        self.inputs = [self.x, self.weight, self.bias]

    def ours(self) -> Tensor:
        """The library's loss."""
        x, weight, bias = self.inputs
        return F.linear_gaussian_nll(x, weight, self.target, self.dims, linear_bias=bias)

    def eager(self) -> Tensor:
        """One linear layer, then the packed formula."""
        flat = torch.nn.functional.linear(self.x, self.weight.flatten(0, 1), self.bias.flatten())
        return _energy(*flat.chunk(2, -1), self.target).mean()

    def loop(self) -> Tensor:
        """A linear layer and a loss a teacher."""
        losses = []
        start = 0
        for dim in self.dims:
            columns = slice(start, start + dim)
            mean, log_std = (
                torch.nn.functional.linear(self.x, self.weight[k, columns], self.bias[k, columns])
                for k in (0, 1)
            )
            losses.append(_energy(mean, log_std, self.target[:, columns]).mean())
            start += dim
        return torch.stack(losses).mean()

    def clear(self) -> None:
        """Forget all gradients."""
        for x in self.inputs:
            x.grad = None

    def gemms(self) -> Step:
        """The three matrix products of the layer, into buffers that are reused."""
        x, weight = self.x.detach(), self.weight.detach().flatten(0, 1)
        z = torch.empty(len(x), len(weight))
        to_x, to_weight = torch.empty_like(x), torch.empty_like(weight)

        def products() -> None:
            torch.mm(x, weight.T, out=z)
            torch.mm(z, weight, out=to_x)
            torch.mm(z.T, x, out=to_weight)

        return products

    def steps(self) -> dict[str, Step]:
        """Forward and backward of every contender."""
        losses = {"ours": self.ours, "eager": self.eager, "loop": self.loop}
        for name in self.skipped():
            del losses[name]
        steps: dict[str, Step] = {
            name: lambda loss=loss: loss().backward() for name, loss in losses.items()
        }
        return steps | {"gemms": self.gemms()}

    def skipped(self) -> dict[str, str]:
        """Baselines that do not fit, and why."""
        temporaries = 8 * 2 * self.target.numel() * NUMBER
        if temporaries <= LARGEST:
            return {}
        why = f"would take about {temporaries / 2**30:.0f} GiB"
        return {"eager": why, "loop": why}

    def floor_bytes(self) -> int:
        """Least traffic: the layer and its gradient, the input and its, the target."""
        sizes = 2 * self.weight.numel() + 2 * self.x.numel() + self.target.numel()
        return sizes * NUMBER

    def gradient_bytes(self) -> int:
        """Bytes of the gradients, which are no extra memory."""
        return sum(x.numel() for x in self.inputs) * NUMBER


PROBLEMS = {"gaussian_nll": Rows, "linear_gaussian_nll": Fused}


def gradient_error(case: Case) -> float:
    """Largest relative error of value and gradients against float64, on up to 256 rows."""
    rows = min(case.rows, 256)
    problem, exact = (
        PROBLEMS[case.loss](case, rows, dtype) for dtype in (torch.float32, torch.float64)
    )
    with torch.no_grad():  # the same numbers
        for own, wide in zip(problem.inputs, exact.inputs, strict=True):
            wide.copy_(own)
        exact.target.copy_(problem.target)
    value, expected = problem.ours(), exact.eager()
    value.backward()
    expected.backward()
    errors = [relative_error(value, expected)]
    if case.sequence:
        joined = [torch.cat([x.grad for x in parts], -1) for parts in problem.parts[:2]]
    else:
        joined = [x.grad for x in problem.inputs]
    errors += [relative_error(g, x.grad) for g, x in zip(joined, exact.inputs, strict=True)]
    return max(errors)
