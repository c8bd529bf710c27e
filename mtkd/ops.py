"""The operator surface: one ``define`` a loss. Importing this module loads the compiled kernels."""

import os
from importlib import import_module
from importlib.util import find_spec
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


def _load_extension() -> ModuleType | None:
    """Register the compiled kernels, if they were built; a build that does not load is an error."""
    if os.environ.get("MTKD_NO_EXTENSION", "0") not in ("", "0"):
        return None
    if find_spec("._C", __package__) is None:
        return None
    return import_module("._C", __package__)


extension = _load_extension()
