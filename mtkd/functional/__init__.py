"""Losses of many teachers as functions: check, pack, call the operator, reduce."""

from .alignment import alignment, angle, cosine, linear_alignment, mse, smooth_l1
from .divergence import kl_div, linear_kl_div
from .gaussian import gaussian_nll, linear_gaussian_nll
from .shifted import shifted_mse

__all__ = [
    "alignment",
    "angle",
    "cosine",
    "gaussian_nll",
    "kl_div",
    "linear_alignment",
    "linear_gaussian_nll",
    "linear_kl_div",
    "mse",
    "shifted_mse",
    "smooth_l1",
]
