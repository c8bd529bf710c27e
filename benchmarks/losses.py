"""Which inputs and formulas belong to which loss."""

from . import alignment, divergence, gaussian, mixtures, votes
from .cases import ALIGNED, FUSED, FUSED_KL, KL, MIXED, ROWS, VOTES, Case
from .problem import Draw, Problem

PROBLEMS: dict[str, type[Problem]] = {
    ROWS: gaussian.Rows,
    FUSED: gaussian.Fused,
    ALIGNED: alignment.Rows,
    VOTES: votes.Rows,
    MIXED: mixtures.Rows,
    KL: divergence.Rows,
    FUSED_KL: divergence.Fused,
}


def problem(case: Case, draw: Draw) -> Problem:
    """One set of inputs of a case."""
    return PROBLEMS[case.loss](case, draw)
