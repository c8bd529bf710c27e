"""Who the teachers are: targets, objectives and norm must mean the same, in the same order."""

from collections.abc import Iterator, Mapping
from typing import Any

from ..nn.moments import Estimator
from ..nn.teachers import Teachers
from .objectives import Objective


def agree(
    dims: Mapping[str, int] | None,
    targets: Any,
    objectives: Mapping[str, Objective],
    norm: Estimator | None,
) -> Teachers:
    """Return the teachers, on whom all that name them agree.

    Raises:
        ValueError: no one names the teachers, or names, widths or their order differ.
    """
    said = list(_said(dims, targets, objectives, norm))
    if not said:
        raise ValueError(
            "dims: expected a mapping from each teacher's name to its width, since neither targets"
            " nor objective say it, got None"
        )
    first = next((pair for pair in said if pair[1].named), said[0])
    for name, teachers in said:
        same = teachers.dims == first[1].dims
        if not same or (teachers.named and teachers.names != first[1].names):
            raise ValueError(
                f"{name}: expected the teachers of {first[0]} in their order, {_show(first[1])},"
                f" got {_show(teachers)}"
            )
    names = getattr(targets, "names", None)
    if names is None:
        return first[1]
    named = Teachers(first[1].dims, tuple(names), True)
    if len(names) != len(named.dims) or (first[1].named and named.names != first[1].names):
        expected = f"the teachers of {first[0]} in their order, {_show(first[1])}"
        raise ValueError(f"targets: expected {expected}, got {', '.join(map(str, names))}")
    return named


def _said(
    dims: Any, targets: Any, objectives: Mapping[str, Objective], norm: Estimator | None
) -> Iterator[tuple[str, Teachers]]:
    if dims is not None:
        yield "dims", Teachers.of(dims)
    if getattr(targets, "dims", None) is not None:
        yield "targets", Teachers.of(targets.dims)
    for name, objective in objectives.items():
        if objective.teachers is not None:
            yield f"objective {name}", objective.teachers
    if norm is not None:
        yield "norm", norm.teachers


def _show(teachers: Teachers) -> str:
    named = dict(zip(teachers.names, teachers.dims, strict=True))
    return str(named if teachers.named else teachers.dims)
