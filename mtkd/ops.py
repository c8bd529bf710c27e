"""The operator surface: one ``define`` a loss. Importing this module loads the compiled kernels."""

from types import ModuleType

from .dispatch import Loss, define
from .reference import gaussian

gaussian_nll = define(
    "gaussian_nll",
    "Tensor? mask, int[] dims, Tensor mean, Tensor log_std, Tensor target, Tensor? mode_logits,"
    " float? bound, bool per_dim, bool full",
    differentiable=("mean", "log_std", "mode_logits"),
    formula=gaussian.nll,
    gradient=gaussian.nll_gradient,
)

linear_gaussian_nll = define(
    "linear_gaussian_nll",
    "Tensor? mask, int[] dims, Tensor input, Tensor weight, Tensor? bias, Tensor? mode_weight,"
    " Tensor? mode_bias, Tensor target, float? bound, bool per_dim, bool full, int workspace,"
    " bool stash",
    differentiable=("input", "weight", "bias", "mode_weight", "mode_bias"),
    formula=gaussian.linear_nll,
    gradient=gaussian.linear_nll_gradient,
    saved=gaussian.linear_nll_saved,
)

LOSSES: tuple[Loss, ...] = (gaussian_nll, linear_gaussian_nll)

# What runs on a GPU where Triton and a compiled CUDA kernel both exist: the measured faster.
PREFERRED_ON_GPU = dict.fromkeys((loss.name for loss in LOSSES), "triton")

extension: ModuleType | None
try:
    from . import _C as extension
except ModuleNotFoundError:  # built without a compiler or with MTKD_NO_EXTENSION=1
    extension = None
