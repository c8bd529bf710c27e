"""The Gaussian losses and what they are compared with: one set of random inputs each.

Baselines compute in the dtype of their inputs, as the formulas stand: the fastest way to write
them in PyTorch, not the most accurate.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import mtkd.functional as F

from .cases import Case
from .problem import Draw, Problem


def matrix(
    mean: Tensor, log_std: Tensor, target: Tensor, logits: Tensor | None, teachers: int
) -> Tensor:
    """The losses ``(N, T)`` as a plain formula, for equally wide teachers."""
    target = target if logits is None else target.unsqueeze(1)
    energy = 0.5 * ((target - mean) * torch.exp(-log_std)).square() + log_std
    energy = energy.unflatten(-1, (teachers, -1))
    if logits is None:
        return energy.mean(-1)
    joint = torch.log_softmax(logits, 1) - energy.sum(-1)
    return -torch.logsumexp(joint, 1) / energy.shape[-1]


def reduced(losses: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over what counts."""
    return losses.mean() if mask is None else (losses * mask).sum() / mask.sum()


def packed(
    mean: Tensor,
    log_std: Tensor,
    target: Tensor,
    logits: Tensor | None,
    mask: Tensor | None,
    teachers: int,
) -> Tensor:
    """The loss of packed teachers, as it is written for speed."""
    if logits is None and mask is None:  # teachers are equally wide: the mean of their means
        return (0.5 * ((target - mean) * torch.exp(-log_std)).square() + log_std).mean()
    return reduced(matrix(mean, log_std, target, logits, teachers), mask)


class Rows(Problem):
    """gaussian_nll on packed tensors, or on one tensor a teacher."""

    formula = staticmethod(packed)

    def __init__(self, case: Case, draw: Draw):
        super().__init__(case, draw)
        shape = (case.rows, *(case.modes,) * bool(case.modes), case.teachers * case.width)
        self.mean = draw.normal(*shape).requires_grad_()
        self.log_std = draw.normal(*shape, scale=0.3).requires_grad_()
        self.logits: Tensor | None = None
        if case.modes:
            self.logits = draw.normal(case.rows, case.modes, case.teachers).requires_grad_()
        self.parts: list[list[Any]] = []
        if case.sequence or "loop" in case.baselines:
            named = (self.mean, -1), (self.log_std, -1), (self.target, -1), (self.logits, -1)
            self.parts = self.leaves(*named)

    def trained(self) -> list[Tensor]:
        return [x for x in (self.mean, self.log_std, self.logits) if x is not None]

    def ours(self) -> Tensor:
        if self.case.sequence:
            mean, log_std, target, _ = zip(*self.parts, strict=True)
            return F.gaussian_nll(mean, log_std, target, mask=self.mask)
        options = {"mode_logits": self.logits, "mask": self.mask}
        return F.gaussian_nll(self.mean, self.log_std, self.target, self.case.dims, **options)

    def ours_gradients(self) -> tuple[Tensor, list[Tensor]]:
        if not self.case.sequence:
            return super().ours_gradients()
        value = self.ours()
        leaves = [row[k] for k in (0, 1) for row in self.parts]
        gradients = torch.autograd.grad(value, leaves)
        count = self.case.teachers
        return value.detach(), [torch.cat(gradients[i : i + count], -1) for i in (0, count)]

    def tensors(self) -> tuple[Any, ...]:
        """The arguments of `packed`."""
        settings = (self.logits, self.mask, self.case.teachers)
        return self.mean, self.log_std, self.target, *settings

    def eager(self) -> Tensor:
        return packed(*self.tensors())

    def loop(self) -> Tensor:
        return self.together([matrix(*part, 1) for part in self.parts])

    def temporaries(self) -> int:
        return 8 * self.mean.numel() * self.mean.element_size()

    def floor_bytes(self) -> int:
        """Least traffic: what counts of three inputs read, two gradients written."""
        read = sum(x.numel() for x in (self.mean, self.log_std, self.target))
        counted = 1.0 if self.mask is None else float(self.mask.float().mean())
        written = self.mean.numel() + self.log_std.numel()
        return int(counted * read + written) * self.mean.element_size()

    def operator_arguments(self) -> tuple[Any, ...]:
        """What the operators of the loss take after the coefficient."""
        columns = tuple(x.detach() for x in (self.mean, self.log_std, self.target))
        logits = None if self.logits is None else self.logits.detach()
        return self.mask, self.case.dims, *columns, logits, None, True, False

    def wanted(self) -> list[bool]:
        return [True, True, self.logits is not None]

    def coefficient(self) -> Tensor:
        """The matrix c with ``loss = sum(c * matrix)``."""
        shape = (self.case.rows, self.case.teachers)
        if self.mask is None:
            return torch.full((), 1 / (shape[0] * shape[1]), device=self.mean.device).expand(shape)
        return self.mask / self.mask.sum()


class Fused(Problem):
    """linear_gaussian_nll, its unfused form, and its matrix products."""

    def __init__(self, case: Case, draw: Draw):
        super().__init__(case, draw)
        width, features = case.teachers * case.width, case.features
        inner = (2, *(case.modes,) * bool(case.modes), width)
        self.x = draw.normal(case.rows, features).requires_grad_()
        scale = 0.5 / features**0.5
        self.weight = draw.normal(*inner, features, scale=scale).requires_grad_()
        self.bias = draw.normal(*inner, scale=0.1).requires_grad_()
        self.mode_weight: Tensor | None = None
        self.mode_bias: Tensor | None = None
        if case.modes:
            shape = (case.modes, case.teachers)
            self.mode_weight = draw.normal(*shape, features, scale=scale).requires_grad_()
            self.mode_bias = draw.normal(*shape, scale=0.1).requires_grad_()
        self.parts: list[list[Any]] = []
        if "loop" in case.baselines:  # every teacher a layer of its own
            means, deviations = ((self.weight[k], self.bias[k]) for k in (0, 1))
            columns = [
                (x, dim)
                for pair in (means, deviations)
                for x, dim in zip(pair, (-2, -1), strict=True)
            ]
            modes = (self.mode_weight, 1), (self.mode_bias, 1)
            self.parts = self.leaves(*columns, *modes, (self.target, -1))

    def trained(self) -> list[Tensor]:
        layers = (self.x, self.weight, self.bias, self.mode_weight, self.mode_bias)
        return [x for x in layers if x is not None]

    def ours(self) -> Tensor:
        options = {"mode_weight": self.mode_weight, "mode_bias": self.mode_bias}
        return F.linear_gaussian_nll(
            self.x,
            self.weight,
            self.target,
            self.case.dims,
            linear_bias=self.bias,
            mask=self.mask,
            **options,
        )

    def eager(self) -> Tensor:
        mean, log_std = _layer(self.x, self.weight, self.bias).unbind(1)
        logits = _layer(self.x, self.mode_weight, self.mode_bias)
        return packed(mean, log_std, self.target, logits, self.mask, self.case.teachers)

    def loop(self) -> Tensor:
        losses = []
        for *layers, target in self.parts:
            mean, log_std, logits = (_layer(self.x, *layers[i : i + 2]) for i in (0, 2, 4))
            losses.append(matrix(mean, log_std, target, logits, 1))
        return self.together(losses)

    def gemms(self) -> Any:
        """The three matrix products of the layer."""
        return self.products(self.x, self.weight)

    def temporaries(self) -> int:
        return 8 * self.case.rows * self.weight[..., 0].numel() * self.x.element_size()

    def floor_bytes(self) -> int:
        """Least traffic: the layers and their gradients, the input and its, the target."""
        return 2 * self.gradient_bytes() + self.target.numel() * self.target.element_size()


def _layer(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Any:
    """``(N, *weight.shape[:-1])``, or None without a weight."""
    if weight is None or bias is None:
        return None
    flat = functional.linear(x, weight.flatten(0, -2), bias.flatten())
    return flat.unflatten(-1, weight.shape[:-1])
