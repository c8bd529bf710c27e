"""Objectives: losses that give a matrix ``(N, T)``, and how the trainer reduces it."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import TeacherParallel
from ..nn import GaussianHeads
from ..nn.teachers import Teachers
from ..reduction import Weight, reduce_matrix
from .checks import check_number

INFORMATION = "information"  # what logs call the gain of likelihoods


class Objective(nn.Module):
    """A loss of the student's embeddings, its coefficient, and the teachers' weights.

    Args:
        loss: a module of `mtkd.nn` (`GaussianHeads`, `Projectors`); a loss of `mtkd.functional`
            with its settings, such as ``functools.partial(F.mse, dims=dims)``; or any module or
            function (student, targets, mask) -> matrix ``(N, T)``, or ``(N, 1)`` of losses that
            take a row's teachers together, as votes do. A loss that has an argument `reduction`, or
            options but no `mask`, is called with ``mask=mask, reduction="none"``.
        coefficient: what the loss is multiplied by in a sum of several.
        weight: weights of the teachers ``(T,)``; or a callable (detached matrix, mask) -> weights,
            such as those of `mtkd.weighting`, for training alone: evaluation weighs all the same.
        options: further keyword arguments for every call of the loss.

    Shape:
        - student ``(N, H)``, targets ``(N, D)``, mask ``(N, T)`` bool. Returns ``(N, T)`` or
          ``(N, 1)``.

    Returns:
        The matrix of losses.

    Raises:
        ValueError: a result that is not a matrix ``(N, T)`` or ``(N, 1)``, weights that do not
            fit, a loss whose `reduction` or `mask` is set.
        TypeError: a loss that cannot be called.

    Note:
        A step's loss is ``sum(w m l) / sum(w m)``, over all micro-batches and processes of the
        step; with a callable `weight`, which no one knows before the matrix, it is divided by
        ``sum(m)``. In a matrix ``(N, 1)`` a row counts where one of its teachers does.

    Example:
        >>> import torch
        >>> from mtkd.nn import Projectors
        >>> from mtkd.trainer import Objective
        >>> objective = Objective(Projectors(4, {"cnn": 3, "pca": 5}), cosine=1.0, smooth_l1=0.0)
        >>> mask = torch.ones(6, 2, dtype=torch.bool)
        >>> objective(torch.randn(6, 4), torch.randn(6, 8), mask).shape
        torch.Size([6, 2])
    """

    weight: Weight

    def __init__(
        self,
        loss: nn.Module | Callable[..., Tensor],
        coefficient: float = 1.0,
        *,
        weight: Weight = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if not callable(loss) or isinstance(loss, type):
            got = f"the class {loss.__name__}" if isinstance(loss, type) else _kind(loss)
            raise TypeError(f"objective: expected a module or a callable, got {got}")
        if isinstance(loss, TeacherParallel):
            raise TypeError(
                "objective: expected heads that every process has whole, got TeacherParallel, which"
                " is for training loops of one's own"
            )
        check_number("coefficient", coefficient)
        bound = loss.keywords if isinstance(loss, partial) else {}
        for name in ("mask", "reduction"):
            if name in options or name in bound:
                given = options.get(name, bound.get(name))
                expected = "none, since the trainer gives it"
                raise ValueError(f"{name}: expected {expected}, got {given!r}")
        self.loss, self.coefficient, self.options = loss, coefficient, options
        if isinstance(weight, Tensor):
            if weight.dim() != 1:
                shape = tuple(weight.shape)
                raise ValueError(f"weight: expected a tensor (T,) or a callable, got shape {shape}")
            self.register_buffer("weight", weight, persistent=False)
        else:
            self.weight = weight
        call = getattr(loss, "alignment", loss)  # projectors return predictions when called
        self.reduces = call is not loss or _reduces(loss)

    @property
    def teachers(self) -> Teachers | None:
        """The teachers that the loss is made for, where it says so."""
        teachers = getattr(self.loss, "teachers", None)
        return teachers if isinstance(teachers, Teachers) else None

    def forward(self, student: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        """Return the matrix of losses."""
        call = getattr(self.loss, "alignment", self.loss)
        if self.reduces:
            matrix = call(student, targets, mask=mask, reduction="none", **self.options)
        else:
            matrix = call(student, targets, mask, **self.options)
        shapes = (mask.shape, (len(mask), 1))
        if not isinstance(matrix, Tensor) or matrix.shape not in shapes:
            got = f"shape {tuple(matrix.shape)}" if isinstance(matrix, Tensor) else _kind(matrix)
            raise ValueError(
                f"objective: expected a matrix (N, T) = {tuple(mask.shape)} of losses from"
                f" {_kind(self.loss)}, got {got}; the trainer reduces it"
            )
        if isinstance(self.weight, Tensor) and len(self.weight) != matrix.shape[1]:
            expected = f"one for each of {matrix.shape[1]} columns of {_kind(self.loss)}"
            raise ValueError(f"weight: expected {expected}, got shape {tuple(self.weight.shape)}")
        return matrix

    def reduce(self, matrix: Tensor, mask: Tensor, counts: Tensor) -> Tensor:
        """Return the loss of a part of a step, in all of which `count_rows` gives `counts`."""
        weight = self.weight if self.training or isinstance(self.weight, Tensor) else None
        counts = counts[:-1] if matrix.shape == mask.shape else counts[-1:]
        counts = counts.to(torch.promote_types(matrix.dtype, torch.float32))
        total = (counts * weight).sum() if isinstance(weight, Tensor) else counts.sum()
        mask = columns(mask, matrix)
        return self.coefficient * reduce_matrix(matrix, weight=weight, mask=mask, denominator=total)

    def total(self, sums: Tensor, counts: Tensor) -> Tensor:
        """Return the evaluation's loss of a sum of matrices' rows, a number a column."""
        weight = self.weight.to(sums) if isinstance(self.weight, Tensor) else torch.ones_like(sums)
        weighted = torch.where(weight == 0, 0.0, sums * weight)  # 0 times an infinite loss is 0
        return self.coefficient * weighted.sum() / (counts * weight).sum()

    @property
    def heads(self) -> GaussianHeads | None:
        """The loss, where it is a likelihood in nats."""
        loss = getattr(self.loss, "_orig_mod", self.loss)  # what torch.compile wraps
        return loss if isinstance(loss, GaussianHeads) else None


def columns(mask: Tensor, matrix: Tensor) -> Tensor:
    """Return the mask of a matrix: in one column for all teachers a row counts if one does."""
    return mask if matrix.shape == mask.shape else mask.any(1, keepdim=True)


def count_rows(mask: Tensor) -> Tensor:
    """Return how many rows count for each teacher, then for any, ``(T + 1,)``."""
    return torch.cat([mask, mask.any(1, keepdim=True)], 1).sum(0)


def as_objectives(objective: Any) -> dict[str, Objective]:
    """Return one objective, which is called "loss", or several by name."""
    several = objective if isinstance(objective, Mapping) else {"loss": objective}
    if not several:
        raise ValueError("objective: expected at least one, got an empty mapping")
    for name in several:
        if not isinstance(name, str) or not name or "." in name or name == INFORMATION:
            expected = f"names without a dot, other than {INFORMATION!r}"
            raise ValueError(f"objective: expected {expected}, got {name!r}")
    return {
        name: loss if isinstance(loss, Objective) else Objective(loss)
        for name, loss in several.items()
    }


def _reduces(loss: Any) -> bool:
    """Whether a loss takes `mask` and `reduction` as those of mtkd do, maybe among its options."""
    call = loss.forward if isinstance(loss, nn.Module) else loss
    parameters = inspect.signature(call).parameters
    options = any(each.kind == inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    return "reduction" in parameters or (options and "mask" not in parameters)


def _kind(argument: Any) -> str:
    return type(argument).__name__
