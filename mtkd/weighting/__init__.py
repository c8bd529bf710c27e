"""Weights of teachers: rules of the matrix of losses, confidence, gradients, routing.

Rules are functions ``(matrix, mask) -> weights``, so they can be given to a loss as they are::

    gaussian_nll(mean, log_std, target, dims, weight=teacher_dropping)
    gaussian_nll(mean, log_std, target, dims, weight=partial(teacher_dropping, p=0.25))

The others make weights of logits before the loss: ``kl_div(student, teacher, weight=weights)``.
"""

from .confidence import (
    confidence_weights,
    teacher_agreement,
    teacher_cross_entropy,
    teacher_entropy,
)
from .dropping import teacher_dropping
from .gradients import gradient_weights
from .routing import Routing, top_k_routing

__all__ = [
    "Routing",
    "confidence_weights",
    "gradient_weights",
    "teacher_agreement",
    "teacher_cross_entropy",
    "teacher_dropping",
    "teacher_entropy",
    "top_k_routing",
]
