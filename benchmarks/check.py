"""Whether a case's numbers are right: value and gradients against the formula in float64.

Float32 results may be wrong by 1e-5 of their norm. Gradients of 16 bits are held against what
rounding the exact gradients to their dtype costs, and may be wrong by twice that: all gradients of
a case together, and a few draws of a small one, since rounding may cost few numbers nothing.
"""

import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from math import hypot, inf, isnan
from typing import Any

import torch
from torch import Tensor

from mtkd import ops
from mtkd.dispatch import as_tuple
from mtkd.testing import relative_error

from .cases import ERROR_LIMIT, Case
from .losses import problem
from .problem import Draw

Kernels = Callable[[str], Callable[..., Any]]  # an implementation: its kernel, by role
Made = tuple[Tensor | None, list[Tensor]]  # a matrix and gradients
SCALE = "scale_"  # what a gradient that arrives costs: the only operator that knows no loss
FEW, DRAWS = 1 << 12, 4  # a case of fewer numbers is drawn so often
ROLES = ("forward", "backward", "value_and_grad", "value_and_grad_out", SCALE)


def implementations(loss: str, device: str) -> dict[str, Kernels]:
    """The implementations for GPUs whose kernels can be called by name, of a row loss."""
    found: dict[str, Kernels] = {}
    if loss not in ops.ON_GPU:
        return found
    operators = next(x for x in ops.LOSSES if x.name == loss).kernels | {SCALE: SCALE}
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if find_spec("triton") is not None and (device == "cuda" or interpreted):
        found["triton"] = lambda role: ops.triton_kernel(SCALE if role == SCALE else loss, role)
    compiled = torch._C._dispatch_has_kernel_for_dispatch_key(f"mtkd_cuda::{loss}", "CUDA")
    if device == "cuda" and compiled:
        found["compiled"] = lambda role: getattr(torch.ops.mtkd_cuda, operators[role]).default
    return found


def prepared(kernel: Callable[..., Any], role: str, p: Any) -> Callable[[], Made]:
    """A call of a row loss's operator on a problem, and of nothing else; it returns what it made.

    `scale_` gets the problem's packed tensors for gradients, and -1 as their factor.
    """
    args, coefficient = p.operator_arguments(), p.coefficient()
    wanted = p.wanted()
    room = [torch.empty_like(x) for x in p.trained()]
    if role == SCALE:
        room = [x.detach().clone() for x in p.trained()]
        factor = torch.full((), -1.0, device=room[0].device)

    def call() -> Made:
        if role == "forward":
            return kernel(*args)[0], []
        if role == "backward":
            return None, list(as_tuple(kernel)(coefficient, saved, *args, wanted))
        if role == "value_and_grad":
            matrix, *gradients = kernel(coefficient, *args, wanted)
            return matrix, gradients
        if role == SCALE:
            kernel(room, factor)
            return None, room
        return kernel(coefficient, *args, *room, *[None] * (len(wanted) - len(room))), room

    saved = room[0].new_empty(0)
    return call


class Exact:
    """A problem's value and gradients in float64."""

    def __init__(self, p: Any):
        wide = p.double()
        value = wide.eager()
        self.value = value.detach()
        self.gradients = torch.autograd.grad(value, wide.trained())
        self.dtypes = [x.dtype for x in p.trained()]


class Errors:
    """Relative errors as they come in: of what is float32, and of gradients of 16 bits."""

    def __init__(self) -> None:
        self.wide: list[float] = []
        self.narrow: list[float] = []
        self.rounding: list[float] = []  # what rounding each exact gradient of 16 bits costs

    def add(self, exact: Exact, value: Tensor | None, gradients: Sequence[Tensor]) -> "Errors":
        """Take the errors of a value and gradients."""
        if value is not None:
            self.wide.append(_error(value, exact.value))
        for gradient, right, dtype in zip(gradients, exact.gradients, exact.dtypes, strict=False):
            error = _error(gradient, right)
            if dtype.itemsize == 2:
                self.narrow.append(error)
                self.rounding.append(relative_error(right.to(dtype), right))
            else:
                self.wide.append(error)
        return self

    def largest(self) -> float:
        """The largest error."""
        return max(self.wide + self.narrow)

    def of_allowed(self) -> float:
        """The largest error in units of what is allowed."""
        share = max(self.wide, default=0.0) / ERROR_LIMIT[32]
        if not self.narrow:
            return share
        return max(share, hypot(*self.narrow) / (ERROR_LIMIT[16] * hypot(*self.rounding)))


def _error(actual: Tensor, exact: Tensor) -> float:
    """The relative error; infinite where either is not finite."""
    error = relative_error(actual, exact)
    return inf if isnan(error) else error


def _poison(device: str, count: int) -> None:
    """Leave NaN where the allocator finds its next memory: an unwritten output shows."""
    if device == "cuda":
        for _ in range(2):
            torch.full((count,), float("nan"), device=device)


def _share(kernels: Kernels, p: Any, exact: Exact) -> float:
    """The largest error of an implementation's operators, in units of what is allowed."""
    shares = []
    for role in ROLES:
        matrix, gradients = prepared(kernels(role), role, p)()
        if role == SCALE:
            pairs = zip(gradients, p.trained(), strict=True)
            shares.append(max(_error(scaled, -x) for scaled, x in pairs) / ERROR_LIMIT[32])
            continue
        value = None if matrix is None else (p.coefficient() * matrix).sum()
        shares.append(Errors().add(exact, value, gradients).of_allowed())
    return max(shares)


def checked(case: Case, draw: Draw, rows: int) -> dict[str, Any]:
    """The errors of a case on up to so many rows; of every implementation that has a name."""
    small = Case(**vars(case) | {"rows": min(case.rows, rows), "baselines": ()})
    errors = Errors()
    for _ in range(DRAWS if small.numbers < FEW else 1):
        p = problem(small, draw)
        exact = Exact(p)
        _poison(draw.device, p.gradient_bytes() // 4 + 1)
        errors.add(exact, *p.ours_gradients())
    result = {"gradient_error": errors.largest(), "of_allowed": errors.of_allowed()}
    named = implementations(case.loss, draw.device).items()
    shares = {name: _share(kernels, p, exact) for name, kernels in named}
    return result | ({"of_allowed_by_implementation": shares} if shares else {})


def verdict(result: dict[str, Any]) -> str:
    """What is wrong with a case, or an empty string."""
    named = {"ours": result["of_allowed"]} | result.get("of_allowed_by_implementation", {})
    wrong = [f"{name} {share:.2g}" for name, share in named.items() if not share <= 1]
    return f"error over what is allowed: {', '.join(wrong)}" if wrong else ""
