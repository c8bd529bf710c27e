"""Which inputs and formulas belong to which loss."""

from . import alignment, gaussian, votes
from .cases import ALIGNED, FUSED, ROWS, VOTES, Case
from .problem import Draw, Problem

PROBLEMS: dict[str, type[Problem]] = {
    ROWS: gaussian.Rows,
    FUSED: gaussian.Fused,
    ALIGNED: alignment.Rows,
    VOTES: votes.Rows,
}


def problem(case: Case, draw: Draw) -> Problem:
    """One set of inputs of a case."""
    return PROBLEMS[case.loss](case, draw)
