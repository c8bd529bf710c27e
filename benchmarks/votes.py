"""Majority vote of the teachers' logits, and what it is compared with."""

from typing import Any

import torch
from torch import Tensor

import mtkd.functional as F

from .cases import Case
from .problem import Draw, Problem

HARD = ("each", "plurality")


def share(logits: Tensor) -> Tensor:
    """A teacher's vote for its largest classes, equal ones sharing it."""
    largest = (logits == logits.amax(-1, keepdim=True)).to(logits.dtype)
    return largest / largest.sum(-1, keepdim=True)


def together(teacher: Tensor, mask: Tensor | None, vote: str) -> Tensor:
    """What the teachers vote for: a distribution each, ``(N, T, C)``, or one, ``(N, 1, C)``."""
    q = share(teacher) if vote in HARD else torch.softmax(teacher, -1)
    if vote == "soft":
        return q
    counted = 1.0 if mask is None else mask.to(q.dtype).unsqueeze(-1)
    q = (q * counted).sum(1, keepdim=True)
    return share(q) if vote == "plurality" else q / q.sum(-1, keepdim=True)


def packed(student: Tensor, teacher: Tensor, mask: Tensor | None, vote: str) -> Tensor:
    """The loss against packed logits, as a plain formula."""
    if vote == "each":  # by class, as one would write it where no logits are equal
        expected = student.gather(-1, teacher.argmax(-1))
    else:
        expected = (together(teacher, mask, vote) * student.unsqueeze(1)).sum(-1)
    losses = student.logsumexp(-1, keepdim=True) - expected
    if mask is None:
        return losses.mean()
    mask = mask if losses.shape == mask.shape else mask.any(-1, keepdim=True)
    return torch.where(mask, losses, 0.0).sum() / mask.sum()


class Rows(Problem):
    """majority_vote of packed teachers, or of a sequence."""

    formula = staticmethod(packed)

    def __init__(self, case: Case, draw: Draw):
        super().__init__(case, draw)
        self.student = draw.normal(case.rows, case.width).requires_grad_()

    @property
    def teacher(self) -> Tensor:
        """All logits, ``(N, T, C)``."""
        return self.target.unflatten(-1, (self.case.teachers, self.case.width))

    def trained(self) -> list[Tensor]:
        return [self.student]

    def ours(self) -> Tensor:
        teacher = list(self.teacher.unbind(1)) if self.case.sequence else self.teacher
        return F.majority_vote(self.student, teacher, vote=self.case.vote, mask=self.mask)

    def tensors(self) -> tuple[Any, ...]:
        return self.student, self.teacher, self.mask, self.case.vote

    def eager(self) -> Tensor:
        return packed(*self.tensors())

    def loop(self) -> Tensor:
        losses = []
        for t in range(self.case.teachers):
            logits = self.teacher[:, t]
            q = logits.argmax(-1) if self.case.vote == "each" else torch.softmax(logits, -1)
            losses.append(torch.nn.functional.cross_entropy(self.student, q, reduction="none"))
        return self.together([loss.unsqueeze(-1) for loss in losses])

    def read(self) -> None:
        """Read every logit of the teachers, and do no more than a sum with them."""
        self.target.sum()

    def temporaries(self) -> int:
        return 4 * self.target.numel() * self.target.element_size()

    def floor_bytes(self) -> int:
        """Least traffic: what counts of the teachers read, the student read, a gradient written."""
        counted = 1.0 if self.mask is None else float(self.mask.float().mean())
        numbers = int(counted * self.target.numel()) + 2 * self.student.numel()
        return numbers * self.target.element_size()

    def operator_arguments(self) -> tuple[Any, ...]:
        """What the operators of the loss take after the coefficient."""
        together = self.case.vote in ("plurality", "mean")
        mask, weight = self.mask, None
        if together:
            ones = torch.ones(self.case.rows, self.case.teachers, device=self.target.device)
            weight = ones if mask is None else mask.float()
            mask = None if mask is None else mask.any(-1, keepdim=True)
        dims = (self.case.width,) * (1 if together else self.case.teachers)
        settings = (weight, 1.0, self.case.vote in HARD)
        return mask, dims, self.student.detach(), [self.teacher], *settings

    def coefficient(self) -> Tensor:
        """The matrix c with ``loss = sum(c * matrix)``."""
        mask, dims, *_ = self.operator_arguments()
        if mask is None:
            shape = (self.case.rows, len(dims))
            one = torch.full((), 1 / (shape[0] * shape[1]), device=self.student.device)
            return one.expand(shape)
        counted: Tensor = mask / mask.sum()
        return counted
