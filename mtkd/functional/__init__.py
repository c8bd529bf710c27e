"""Losses of many teachers as functions: check, pack, call the operator, reduce."""

from .alignment import alignment, angle, cosine, linear_alignment, mse, smooth_l1
from .gaussian import gaussian_nll, linear_gaussian_nll
from .mixtures import dirichlet_mixture, mixture_kl
from .shifted import shifted_mse

__all__ = [
    "alignment",
    "angle",
    "cosine",
    "dirichlet_mixture",
    "gaussian_nll",
    "linear_alignment",
    "linear_gaussian_nll",
    "mixture_kl",
    "mse",
    "shifted_mse",
    "smooth_l1",
]
