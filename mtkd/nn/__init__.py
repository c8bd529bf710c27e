"""Modules: heads that hold a loss's parameters and settings, and the teachers' normalisation."""

from .gaussian import GaussianHeads
from .norm import CosineMomentum, TeacherNorm
from .phi_s import PhiS

__all__ = ["CosineMomentum", "GaussianHeads", "PhiS", "TeacherNorm"]
