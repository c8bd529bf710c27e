"""What every benchmarked loss is made of: random inputs, the loss, and the formulas beside it."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .cases import Case


class Draw:
    """Where random numbers come from: device, dtype, seed."""

    def __init__(self, device: str, dtype: torch.dtype, seed: int):
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal numbers of mean 0."""
        numbers = torch.randn(shape, generator=self.generator, device=self.device)
        return (scale * numbers).to(self.dtype)


class Problem:
    """Random inputs of a case, its loss, and the formulas beside it."""

    def __init__(self, case: Case, draw: Draw):
        self.case, self.draw = case, draw
        shape = (case.rows, case.teachers)
        self.mask = draw.normal(*shape) > -0.5 if case.masked else None
        self.target = draw.normal(case.rows, case.teachers * case.width)
        self.split_inputs: list[Tensor] = []  # a loop's leaves

    def trained(self) -> list[Tensor]:
        """The packed tensors that gradients go to."""
        raise NotImplementedError

    def ours(self) -> Tensor:
        """The library's loss."""
        raise NotImplementedError

    def eager(self) -> Tensor:
        """The packed formula."""
        raise NotImplementedError

    def loop(self) -> Tensor:
        """Teacher after teacher, as training scripts write it."""
        raise NotImplementedError

    @staticmethod
    def products(x: Tensor, weight: Tensor) -> Any:
        """The three matrix products of a layer, into buffers that are reused."""
        x, weight = x.detach(), weight.detach().flatten(0, -2)
        z = torch.empty(len(x), len(weight), dtype=x.dtype, device=x.device)
        to_x, to_weight = torch.empty_like(x), torch.empty_like(weight)

        def run() -> None:
            torch.mm(x, weight.T, out=z)
            torch.mm(z, weight, out=to_x)
            torch.mm(z.T, x, out=to_weight)

        return run

    def temporaries(self) -> int:
        """About how many bytes the formulas need beside their inputs."""
        raise NotImplementedError

    def floor_bytes(self) -> int:
        """The least traffic of forward and backward."""
        raise NotImplementedError

    def clear(self) -> None:
        """Forget all gradients."""
        for x in (*self.trained(), *self.split_inputs):
            x.grad = None

    def wanted(self) -> list[bool]:
        """Which gradients the operators of the loss make."""
        return [True] * len(self.trained())

    def double(self) -> "Problem":
        """The same numbers in float64."""
        other = copy.copy(self)
        for name, x in vars(self).items():
            if isinstance(x, Tensor) and x.is_floating_point():
                setattr(other, name, x.detach().double().requires_grad_(x.requires_grad))
        return other

    def gradient_bytes(self) -> int:
        """Bytes of the gradients, which are no extra memory."""
        return sum(x.numel() * x.element_size() for x in self.trained())

    def ours_gradients(self) -> tuple[Tensor, list[Tensor]]:
        """The library's value and its gradients, packed."""
        value = self.ours()
        return value.detach(), list(torch.autograd.grad(value, self.trained()))

    def leaves(self, *packed: tuple[Tensor | None, int]) -> list[list[Any]]:
        """Split tensors by teacher along a dimension into leaves: one row a teacher."""
        columns = []
        for tensor, dim in packed:
            if tensor is None:
                columns.append([None] * self.case.teachers)
                continue
            parts = tensor.detach().chunk(self.case.teachers, dim)
            leaf = [part.clone().requires_grad_(tensor.requires_grad) for part in parts]
            self.split_inputs += leaf if tensor.requires_grad else []
            columns.append(leaf)
        return [list(row) for row in zip(*columns, strict=True)]

    def masks(self) -> Sequence[Tensor | None]:
        """The mask of each teacher."""
        count = self.case.teachers
        return [None] * count if self.mask is None else self.mask.chunk(count, -1)

    def together(self, losses: list[Tensor]) -> Tensor:
        """The reduced loss of teachers' columns."""
        if self.mask is None:
            return torch.stack([loss.mean() for loss in losses]).mean()
        pairs = zip(losses, self.masks(), strict=True)
        return torch.stack([(loss * mask).sum() for loss, mask in pairs]).sum() / self.mask.sum()
