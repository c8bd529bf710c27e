"""The table of cases: one line a loss and configuration; generic tests run over all of them.

A case makes an operator's arguments, mask and dims first, in any dtype. Sizes are ragged, above
one block of 1024 columns, and on both sides of what kernels treat as a short teacher; gradients of
the large cases, above 4 MiB, are streamed past the caches. They are more than Triton's
interpreter can carry; the others are above one of its tiles in each dimension.
"""

from .alignment import ALIGNMENT_CASES
from .case import INTERPRETED, Case
from .divergence import DIVERGENCE_CASES
from .gaussian import GAUSSIAN_CASES
from .mixtures import MIXTURE_CASES
from .votes import VOTES_CASES

__all__ = ["CASES", "INTERPRETED", "TINY_CASES", "Case"]

ALL_CASES = (
    *GAUSSIAN_CASES,
    *ALIGNMENT_CASES,
    *VOTES_CASES,
    *MIXTURE_CASES,
    *DIVERGENCE_CASES,
)
CASES = tuple(case for case in ALL_CASES if not (case.large and INTERPRETED))
TINY_CASES = tuple(case for case in CASES if sum(case.dims) <= 10)
