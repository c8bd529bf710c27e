"""The operator surface: one ``define`` a loss. Importing this module loads the compiled kernels."""

import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

from .dispatch import Loss, define, define_plain, implement
from .reference import alignment as alignment_formulas
from .reference import consensus as consensus_formulas
from .reference import divergence as divergence_formulas
from .reference import gaussian as gaussian_formulas
from .reference import mixtures as mixtures_formulas
from .reference import votes as votes_formulas

gaussian_nll = define(
    "gaussian_nll",
    "Tensor? mask, int[] dims, Tensor mean, Tensor log_std, Tensor target, Tensor? mode_logits,"
    " float? bound, bool per_dim, bool full",
    differentiable=("mean", "log_std", "mode_logits"),
    formula=gaussian_formulas.nll,
    gradient=gaussian_formulas.nll_gradient,
)

linear_gaussian_nll = define(
    "linear_gaussian_nll",
    "Tensor? mask, int[] dims, Tensor input, Tensor weight, Tensor? bias, Tensor? mode_weight,"
    " Tensor? mode_bias, Tensor target, float? bound, bool per_dim, bool full, int workspace,"
    " bool stash",
    differentiable=("input", "weight", "bias", "mode_weight", "mode_bias"),
    formula=gaussian_formulas.linear_nll,
    gradient=gaussian_formulas.linear_nll_gradient,
    saved=gaussian_formulas.linear_nll_saved,
)

_ALIGNMENT = (
    " Tensor? shift, Tensor? scale, Tensor? dispersion, float cosine, float smooth_l1, float mse,"
    " float angle, float beta, float eps"
)

alignment = define(
    "alignment",
    f"Tensor? mask, int[] dims, Tensor student, Tensor target,{_ALIGNMENT}",
    differentiable=("student",),
    formula=alignment_formulas.alignment,
    gradient=alignment_formulas.alignment_gradient,
)

linear_alignment = define(
    "linear_alignment",
    "Tensor? mask, int[] dims, Tensor input, Tensor weight, Tensor? bias, Tensor target,"
    f"{_ALIGNMENT}, int workspace, bool stash",
    differentiable=("input", "weight", "bias"),
    formula=alignment_formulas.linear_alignment,
    gradient=alignment_formulas.linear_alignment_gradient,
    saved=alignment_formulas.linear_alignment_saved,
)

majority_vote = define(
    "majority_vote",
    "Tensor? mask, int[] dims, Tensor student, Tensor[] teacher, Tensor? weight,"
    " float temperature, bool hard",
    differentiable=("student",),
    formula=votes_formulas.majority_vote,
    gradient=votes_formulas.majority_vote_gradient,
    saved=votes_formulas.majority_vote_saved,
)

mixture_kl = define(
    "mixture_kl",
    "Tensor? mask, int[] dims, Tensor student, Tensor[] teacher, Tensor weight, Tensor? counted,"
    " float temperature, float scale",
    differentiable=("student", "weight"),
    formula=mixtures_formulas.mixture_kl,
    gradient=mixtures_formulas.mixture_kl_gradient,
)

dirichlet_mixture = define(
    "dirichlet_mixture",
    "Tensor? mask, int[] dims, Tensor student, Tensor[] teacher, Tensor weight, Tensor? counted,"
    " Tensor concentration",
    differentiable=("student", "weight", "concentration"),
    formula=mixtures_formulas.dirichlet_mixture,
    gradient=mixtures_formulas.dirichlet_mixture_gradient,
)

_DIVERGENCE = "float forward, float reverse, bool mixture, float temperature, float scale"

kl_div = define(
    "kl_div",
    f"Tensor? mask, int[] dims, Tensor student, Tensor teacher, {_DIVERGENCE}",
    differentiable=("student", "teacher"),
    formula=divergence_formulas.kl_div,
    gradient=divergence_formulas.kl_div_gradient,
    spared=("teacher",),
)

linear_kl_div = define(
    "linear_kl_div",
    "Tensor? mask, int[] dims, Tensor input, Tensor weight, Tensor? bias, Tensor? teacher,"
    " Tensor[] features, Tensor[] teacher_weights, Tensor?[] teacher_biases,"
    f" {_DIVERGENCE}, int workspace, bool stash",
    differentiable=("input", "weight", "bias"),
    formula=divergence_formulas.linear_kl_div,
    gradient=divergence_formulas.linear_kl_div_gradient,
    saved=divergence_formulas.linear_kl_div_saved,
)

consensus = define_plain(  # of messages, a target: it has no gradient
    "consensus(Tensor[] messages, Tensor? weight, Tensor? start, Tensor? low, Tensor? unit,"
    " int? class_dim, bool logits, float trim, int kernel, float bandwidth, int iterations)"
    " -> (Tensor, Tensor, Tensor)",
    consensus_formulas.consensus,
)
consensus_spread = define_plain(
    "consensus_spread(Tensor[] messages, Tensor center) -> (Tensor, Tensor)",
    consensus_formulas.spread,
)

LOSSES: tuple[Loss, ...] = (
    gaussian_nll,
    linear_gaussian_nll,
    alignment,
    linear_alignment,
    majority_vote,
    mixture_kl,
    dirichlet_mixture,
    kl_div,
    linear_kl_div,
)

NAMES = (*(loss.name for loss in LOSSES), "consensus")

# Which kernels serve a row loss on a GPU, "triton" or "compiled": the measured faster of the two,
# and Triton where nothing has been measured.
ON_GPU = {
    "gaussian_nll": "triton",
    "alignment": "triton",
    "majority_vote": "triton",
    "kl_div": "triton",
}

_FAMILIES = {  # files of mtkd/triton
    "gaussian_nll": "gaussian",
    "linear_gaussian_nll": "linear_gaussian",
    "alignment": "alignment",
    "majority_vote": "votes",
    "kl_div": "divergence",
    "consensus": "consensus",
    "scale_": "common",
}
_WITH_TRITON = find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
_GPU = "cpu" if _INTERPRETED else "cuda"  # the device type that kernels for GPUs serve


def _load_extension() -> ModuleType | None:
    """Register the compiled kernels, if they were built; a build that does not load is an error."""
    if _INTERPRETED or os.environ.get("MTKD_NO_EXTENSION", "0") not in ("", "0"):
        return None
    if find_spec("._C", __package__) is None:
        return None
    return import_module("._C", __package__)


def on_gpu(tensor: torch.Tensor) -> bool:
    """Whether kernels for GPUs serve a tensor; on a CPU they do where they are interpreted."""
    return tensor.device.type == _GPU


def has_triton(tensor: torch.Tensor) -> bool:
    """Whether Triton kernels can take a tensor."""
    return _WITH_TRITON and on_gpu(tensor)


def triton_kernel(loss: str, role: str) -> Callable[..., Any]:
    """Return a Triton kernel of a loss; Triton is imported when it is first called."""

    def launch(*args: Any) -> Any:
        return _triton_file(_FAMILIES[loss]).KERNELS[role](*args)

    return launch


@cache
def _triton_file(family: str) -> ModuleType:
    return import_module(f".triton.{family}", __package__)


def _has_kernel(operator: str, key: str) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(operator, key))


def _compiled(operator: str) -> Callable[..., Any] | None:
    """A kernel compiled for CUDA, where the extension has it."""
    if not _has_kernel(f"mtkd_cuda::{operator}", "CUDA"):
        return None
    return getattr(torch.ops.mtkd_cuda, operator).default  # type: ignore[no-any-return]


def _gpu_kernel(loss: str, role: str, operator: str) -> tuple[str, Callable[..., Any] | None]:
    """What serves an operator on a GPU, and its kernel; the formula has none to register."""
    if ON_GPU[loss] == "compiled" or not _WITH_TRITON:
        compiled = None if _INTERPRETED else _compiled(operator)
        if compiled is not None:
            return "compiled", compiled
    return ("triton", triton_kernel(loss, role)) if _WITH_TRITON else ("formula", None)


if _INTERPRETED and not _WITH_TRITON:
    raise ImportError("TRITON_INTERPRET=1: expected Triton to be installed; pip install triton")


def _consensus_on_gpu(messages: list[torch.Tensor], *args: Any) -> Any:
    """The kernel for as many messages as it takes; the formula for more, and for classes."""
    class_dim = args[4]
    if class_dim is not None or len(messages) > _triton_file("consensus").MOST:
        return consensus_formulas.consensus(messages, *args)
    return triton_kernel("consensus", "consensus")(messages, *args)


def _serve() -> dict[tuple[str, str], str]:
    """Register the kernels for GPUs; return what serves each operator, by name and device type."""
    served = {(x, "cpu"): "compiled" for x in NAMES if _has_kernel(f"mtkd::{x}", "CPU")}
    for loss in (loss for loss in LOSSES if loss.name in ON_GPU):
        for role, operator in loss.kernels.items():
            served[loss.name, _GPU], kernel = _gpu_kernel(loss.name, role, operator)
            if kernel is not None:
                loss.implement(_GPU.upper(), **{role: kernel})
    scale_ = triton_kernel("scale_", "scale_") if _WITH_TRITON else _compiled("scale_")
    if scale_ is not None:
        implement("scale_", _GPU.upper(), scale_)
    if _WITH_TRITON:
        implement("consensus", _GPU.upper(), _consensus_on_gpu)
        served["consensus", _GPU] = "triton"
    return served


extension = _load_extension()
served = _serve()
