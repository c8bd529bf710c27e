"""From the matrix of losses ``(N, T)`` to what a training step needs: weights, mask, denominator.

With weights w, mask m (True counts) and losses l, all over rows and teachers::

    none   w l, and 0 where masked
    sum    sum(w m l)
    mean   sum(w m l) / sum(w m), or / denominator when one is given

A zero denominator, as when nothing counts, gives 0 and zero gradients.

Weights may be a rule, a callable ``(matrix, mask) -> weights`` such as those of `mtkd.weighting`.
The matrix has to be known before its coefficients then, so gradients cannot come with the value:
one forward makes the matrix, and backward reads the inputs again, as for reduction "none".

Recipes on tokens reduce the matrix ``(*, L, T)`` to one of images first: `token_mean`,
`cls_and_patches`, then `reduce_matrix`.
"""

from .checks import REDUCTIONS, Weight, check_mask, check_weight
from .matrix import (
    LossOperator,
    coefficients,
    needs_matrix,
    reduce,
    reduce_matrix,
    split_columns,
)
from .tokens import cls_and_patches, token_mean

__all__ = [
    "REDUCTIONS",
    "LossOperator",
    "Weight",
    "check_mask",
    "check_weight",
    "cls_and_patches",
    "coefficients",
    "needs_matrix",
    "reduce",
    "reduce_matrix",
    "split_columns",
    "token_mean",
]
