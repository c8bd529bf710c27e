"""Alignment with UNIC's weights and standardised targets, and what it is compared with."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import mtkd.functional as F

from .cases import Case
from .problem import Draw, Problem


def packed(
    student: Tensor,
    target: Tensor,
    shift: Tensor,
    scale: Tensor,
    mask: Tensor | None,
    teachers: int,
) -> Tensor:
    """The loss of packed, equally wide teachers, as a plain formula."""
    target = (target - shift) * scale
    s, t = (x.unflatten(-1, (teachers, -1)) for x in (student, target))
    losses = 0.5 * (1 - functional.cosine_similarity(s, t, dim=-1))
    losses = losses + 0.5 * functional.smooth_l1_loss(s, t, reduction="none").mean(-1)
    return losses.mean() if mask is None else (losses * mask).sum() / mask.sum()


class Rows(Problem):
    """alignment on packed tensors."""

    formula = staticmethod(packed)

    def __init__(self, case: Case, draw: Draw):
        super().__init__(case, draw)
        width = case.teachers * case.width
        self.student = draw.normal(case.rows, width).requires_grad_()
        self.shift, self.scale = draw.normal(width), 1 + draw.normal(width, scale=0.1)
        self.parts: list[list[Any]] = []
        if "loop" in case.baselines:
            standard = (self.shift, -1), (self.scale, -1)
            self.parts = self.leaves((self.student, -1), (self.target, -1), *standard)

    def trained(self) -> list[Tensor]:
        return [self.student]

    def ours(self) -> Tensor:
        options = {"shift": self.shift, "scale": self.scale, "mask": self.mask}
        return F.alignment(self.student, self.target, self.case.dims, **options)

    def tensors(self) -> tuple[Any, ...]:
        settings = (self.mask, self.case.teachers)
        return self.student, self.target, self.shift, self.scale, *settings

    def eager(self) -> Tensor:
        return packed(*self.tensors())

    def loop(self) -> Tensor:
        losses = []
        for student, target, shift, scale in self.parts:
            standard = (target - shift) * scale
            cosine = 1 - functional.cosine_similarity(student, standard, dim=-1)
            l1 = functional.smooth_l1_loss(student, standard, reduction="none").mean(-1)
            losses.append((0.5 * cosine + 0.5 * l1).unsqueeze(-1))
        return self.together(losses)

    def temporaries(self) -> int:
        return 12 * self.student.numel() * self.student.element_size()

    def floor_bytes(self) -> int:
        """Least traffic: what counts of two inputs read, a gradient written."""
        counted = 1.0 if self.mask is None else float(self.mask.float().mean())
        return int((2 * counted + 1) * self.student.numel()) * self.student.element_size()

    def operator_arguments(self) -> tuple[Any, ...]:
        """What the operators of the loss take after the coefficient."""
        standard = (self.shift, self.scale, None)
        settings = (0.5, 0.5, 0.0, 0.0, 1.0, 1e-8)
        return self.mask, self.case.dims, self.student.detach(), self.target, *standard, *settings

    def coefficient(self) -> Tensor:
        """The matrix c with ``loss = sum(c * matrix)``."""
        shape = (self.case.rows, self.case.teachers)
        if self.mask is None:
            one = torch.full((), 1 / (shape[0] * shape[1]), device=self.student.device)
            return one.expand(shape)
        return self.mask / self.mask.sum()
