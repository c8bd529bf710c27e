"""Losses of many teachers as functions: check, pack, call the operator, reduce."""

from .alignment import alignment, angle, cosine, linear_alignment, mse, smooth_l1
from .gaussian import gaussian_nll, linear_gaussian_nll
from .shifted import shifted_mse
from .votes import consensus_labels, disagreement, majority_vote

__all__ = [
    "alignment",
    "angle",
    "consensus_labels",
    "cosine",
    "disagreement",
    "gaussian_nll",
    "linear_alignment",
    "linear_gaussian_nll",
    "majority_vote",
    "mse",
    "shifted_mse",
    "smooth_l1",
]
