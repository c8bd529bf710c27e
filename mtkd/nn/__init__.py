"""Modules: heads that hold a loss's parameters and settings, and the teachers' normalisation."""

from .gaussian import GaussianHeads
from .norm import TeacherNorm

__all__ = ["GaussianHeads", "TeacherNorm"]
