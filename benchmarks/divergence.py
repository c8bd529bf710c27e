"""KL divergence from many teachers' classes, and what it is compared with."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import mtkd.functional as F

from .cases import Case
from .problem import Draw, Problem

TEMPERATURE = 2.0


def packed(student: Tensor, teacher: Tensor, mask: Tensor | None, teachers: int) -> Tensor:
    """The loss of packed teachers with equally many classes, as a plain formula."""
    s, t = (x.unflatten(-1, (teachers, -1)) / TEMPERATURE for x in (student, teacher))
    losses = TEMPERATURE**2 * by_torch(s, t)
    return losses.mean() if mask is None else (losses * mask).sum() / mask.sum()


def by_torch(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) over the last dimension, by torch's own function."""
    logs = student.log_softmax(-1), teacher.log_softmax(-1)
    return functional.kl_div(*logs, reduction="none", log_target=True).sum(-1)


class Logits(Problem):
    """What the losses on logits and on layers share; `target` holds the teachers' logits."""

    formula = staticmethod(packed)

    def temporaries(self) -> int:
        return 8 * self.target.numel() * max(4, self.target.element_size())

    def one(self, student: Tensor, teacher: Tensor) -> Tensor:
        """One teacher's column of losses, as a training script has it."""
        return TEMPERATURE**2 * by_torch(student / TEMPERATURE, teacher / TEMPERATURE).unsqueeze(-1)


class Rows(Logits):
    """kl_div on packed logits."""

    def __init__(self, case: Case, draw: Draw):
        super().__init__(case, draw)
        self.student = draw.normal(case.rows, case.teachers * case.width).requires_grad_()
        self.parts: list[list[Any]] = []
        if "loop" in case.baselines:
            self.parts = self.leaves((self.student, -1), (self.target, -1))

    def trained(self) -> list[Tensor]:
        return [self.student]

    def wanted(self) -> list[bool]:
        return [True, False]  # none to the teachers

    def ours(self) -> Tensor:
        options = {"temperature": TEMPERATURE, "mask": self.mask}
        return F.kl_div(self.student, self.target, self.case.dims, **options)

    def tensors(self) -> tuple[Any, ...]:
        return self.student, self.target, self.mask, self.case.teachers

    def eager(self) -> Tensor:
        return packed(*self.tensors())

    def loop(self) -> Tensor:
        return self.together([self.one(*part) for part in self.parts])

    def floor_bytes(self) -> int:
        """Least traffic: what counts of two inputs read, a gradient written."""
        counted = 1.0 if self.mask is None else float(self.mask.float().mean())
        return int((2 * counted + 1) * self.student.numel()) * self.student.element_size()

    def operator_arguments(self) -> tuple[Any, ...]:
        """What the operators of the loss take after the coefficient."""
        settings = (1.0, 0.0, False, TEMPERATURE, TEMPERATURE**2)
        return self.mask, self.case.dims, self.student.detach(), self.target, *settings

    def coefficient(self) -> Tensor:
        """The matrix c with ``loss = sum(c * matrix)``."""
        shape = (self.case.rows, self.case.teachers)
        if self.mask is None:
            one = torch.full((), 1 / (shape[0] * shape[1]), device=self.student.device)
            return one.expand(shape)
        return self.mask / self.mask.sum()


class Fused(Logits):
    """linear_kl_div, its unfused form, and its matrix products."""

    def __init__(self, case: Case, draw: Draw):
        super().__init__(case, draw)
        width, features = case.teachers * case.width, case.features
        self.x = draw.normal(case.rows, features).requires_grad_()
        self.weight = draw.normal(width, features, scale=features**-0.5).requires_grad_()
        self.bias = draw.normal(width, scale=0.1).requires_grad_()
        self.parts: list[list[Any]] = []
        if "loop" in case.baselines:  # every teacher a head of its own
            self.parts = self.leaves((self.weight, 0), (self.bias, 0), (self.target, -1))

    def trained(self) -> list[Tensor]:
        return [self.x, self.weight, self.bias]

    def ours(self) -> Tensor:
        options = {"linear_bias": self.bias, "temperature": TEMPERATURE, "mask": self.mask}
        return F.linear_kl_div(self.x, self.weight, self.target, self.case.dims, **options)

    def tensors(self) -> tuple[Any, ...]:
        student = functional.linear(self.x, self.weight, self.bias)
        return student, self.target, self.mask, self.case.teachers

    def eager(self) -> Tensor:
        return packed(*self.tensors())

    def loop(self) -> Tensor:
        heads = ((functional.linear(self.x, *layer), target) for *layer, target in self.parts)
        return self.together([self.one(*pair) for pair in heads])

    def gemms(self) -> Any:
        """The three matrix products of the heads."""
        return self.products(self.x, self.weight)

    def floor_bytes(self) -> int:
        """Least traffic: inputs read, gradients written."""
        inputs = self.x.numel() + self.weight.numel() + self.bias.numel()
        return (2 * inputs + self.target.numel()) * self.x.element_size()
