"""What a log says of each teacher."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..information import information_gain
from ..nn import TeacherNorm
from ..nn.teachers import Teachers
from .objectives import Objective

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
        values = {name: sums / counts.clamp(min=1)}
        gain = _information(objectives[name], values[name], teachers.dims, marginal)
        if gain is not None:
            values[f"{name}_information" if several else "information"] = gain
        columns = teachers.names if len(sums) == len(teachers.names) else (TOGETHER,)
        for label, row in values.items():
            triples = zip(columns, row.tolist(), counts.tolist(), strict=True)
            logs |= {f"{label}/{column}": value for column, value, count in triples if count}
    return logs


def _information(
    objective: Objective, losses: Tensor, dims: tuple[int, ...], marginal: TeacherNorm | None
) -> Tensor | None:
    """Return what the student tells about each teacher, where the losses are likelihoods."""
    heads = objective.heads
    if heads is None or marginal is None or not bool(marginal.count.all()):
        return None
    nll = losses if heads.per_dim else losses / torch.tensor(dims)
    variance = marginal.scale.double().cpu() ** -2
    return information_gain(nll, variance, dims, bound=heads.bound)
