"""Modules: heads that hold a loss's parameters and settings, and the teachers' normalisation."""

from .gaussian import GaussianHeads
from .ladder import Ladder
from .norm import CosineMomentum, TeacherNorm
from .packed import student_state_dict
from .phi_s import PhiS
from .projectors import Projectors, TokenProjectors

__all__ = [
    "CosineMomentum",
    "GaussianHeads",
    "Ladder",
    "PhiS",
    "Projectors",
    "TeacherNorm",
    "TokenProjectors",
    "student_state_dict",
]
