"""The divergence from the weighted mean of the teachers, and what it is compared with."""

from typing import Any

import torch
from torch import Tensor

import mtkd.functional as F

from .cases import Case
from .problem import Draw, Problem


def packed(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """The loss against packed logits, as a plain formula."""
    share = weight / weight.sum(-1, keepdim=True)
    q = (share.unsqueeze(-1) * torch.softmax(teacher, -1)).sum(1)
    return torch.nn.functional.kl_div(torch.log_softmax(student, -1), q, reduction="batchmean")


class Rows(Problem):
    """mixture_kl of packed teachers; the weights, as a gate's, receive gradients too."""

    def __init__(self, case: Case, draw: Draw):
        super().__init__(case, draw)
        self.student = draw.normal(case.rows, case.width).requires_grad_()
        gate = torch.softmax(draw.normal(case.rows, case.teachers), -1)
        self.weight = gate.requires_grad_()

    @property
    def teacher(self) -> Tensor:
        """All logits, ``(N, T, C)``."""
        return self.target.unflatten(-1, (self.case.teachers, self.case.width))

    def trained(self) -> list[Tensor]:
        return [self.student, self.weight]

    def ours(self) -> Tensor:
        return F.mixture_kl(self.student, self.teacher, self.weight)

    def tensors(self) -> tuple[Any, ...]:
        return self.student, self.teacher, self.weight

    def eager(self) -> Tensor:
        return packed(*self.tensors())

    formula = staticmethod(packed)

    def temporaries(self) -> int:
        return 4 * self.target.numel() * self.target.element_size()

    def floor_bytes(self) -> int:
        """Least traffic: the teachers and the student read, a gradient written."""
        return (self.target.numel() + 2 * self.student.numel()) * self.target.element_size()
