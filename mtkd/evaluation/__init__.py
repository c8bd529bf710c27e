"""Light probes: what an embedding holds, in seconds, with scikit-learn inside.

Every probe is a function of plain arrays or tensors ``(N, H)`` that returns a number; `evaluate`
runs those for which it is given the data and returns them by name, as a trainer logs them.
"""

try:
    import sklearn  # noqa: F401
except ImportError as error:
    raise ImportError(
        "mtkd.evaluation needs scikit-learn: pip install 'mtkd[evaluation]'"
    ) from error

from .geometry import isotropy, neighbour_overlap, pair_spearman
from .probes import (
    kmeans_nmi,
    knn_probe,
    linear_probe,
    logistic_probe,
    reconstruction_r2,
    ridge_probe,
    standardise,
)
from .scores import evaluate

__all__ = [
    "evaluate",
    "isotropy",
    "kmeans_nmi",
    "knn_probe",
    "linear_probe",
    "logistic_probe",
    "neighbour_overlap",
    "pair_spearman",
    "reconstruction_r2",
    "ridge_probe",
    "standardise",
]
