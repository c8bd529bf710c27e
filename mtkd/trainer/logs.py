"""What a log says of each teacher."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..information import information_gain
from ..nn import TeacherNorm
from ..nn.teachers import Teachers
from .objectives import INFORMATION, Objective

TOGETHER = "all"  # the column of a loss that takes all teachers together


def teacher_logs(
    taken: Mapping[str, tuple[Tensor, Tensor]],
    teachers: Teachers,
    objectives: Mapping[str, Objective],
    marginal: TeacherNorm | None,
) -> dict[str, float]:
    """Return the mean of each objective's counted losses by teacher, and the information in them.

    Args:
        taken: sums and counts of an objective's columns, by its name.
        teachers: who they are.
        objectives: the losses by name.
        marginal: statistics of the targets, where there are likelihoods.
    """
    logs: dict[str, float] = {}
    several = sum(each.heads is not None for each in objectives.values()) > 1
    for name, (sums, counts) in taken.items():
        means = sums / counts.clamp(min=1)
        columns = teachers.names if len(sums) == len(teachers.names) else (TOGETHER,)
        logs |= _named(name, columns, means, counts)
        if objectives[name].heads is not None and marginal is not None:
            label = f"{name}_{INFORMATION}" if several else INFORMATION
            known = counts * (marginal.count.cpu() > 0)
            logs |= _named(label, columns, _information(objectives[name], means, marginal), known)
    return logs


def _named(label: str, columns: Sequence[str], values: Tensor, counts: Tensor) -> dict[str, float]:
    triples = zip(columns, values.tolist(), counts.tolist(), strict=True)
    return {f"{label}/{column}": value for column, value, count in triples if count}


def _information(objective: Objective, losses: Tensor, marginal: TeacherNorm) -> Tensor:
    """Return what the student tells about each teacher; losses are those of likelihoods."""
    heads: Any = objective.heads
    dims = heads.teachers.dims
    nll = losses if heads.per_dim else losses / torch.tensor(dims)
    variance = marginal.scale.double().cpu() ** -2
    gain: Tensor = information_gain(nll, variance, dims, bound=heads.bound)
    return gain
