"""Losses of many teachers as functions: check, pack, call the operator, reduce."""

from .alignment import alignment, angle, cosine, linear_alignment, mse, smooth_l1
from .consensus import Consensus, consensus
from .gaussian import gaussian_nll, linear_gaussian_nll
from .shifted import shifted_mse

__all__ = [
    "Consensus",
    "alignment",
    "angle",
    "consensus",
    "cosine",
    "gaussian_nll",
    "linear_alignment",
    "linear_gaussian_nll",
    "mse",
    "shifted_mse",
    "smooth_l1",
]
