"""Losses of many teachers as functions: check, pack, call the operator, reduce."""

from .alignment import alignment, angle, cosine, linear_alignment, mse, smooth_l1
from .consensus import Consensus, consensus
from .divergence import kl_div, linear_kl_div
from .gaussian import gaussian_nll, linear_gaussian_nll
from .mixtures import dirichlet_mixture, mixture_kl
from .shifted import shifted_mse
from .votes import consensus_labels, disagreement, majority_vote

__all__ = [
    "Consensus",
    "alignment",
    "angle",
    "consensus",
    "consensus_labels",
    "cosine",
    "dirichlet_mixture",
    "disagreement",
    "gaussian_nll",
    "kl_div",
    "linear_alignment",
    "linear_gaussian_nll",
    "linear_kl_div",
    "majority_vote",
    "mixture_kl",
    "mse",
    "shifted_mse",
    "smooth_l1",
]
