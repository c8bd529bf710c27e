"""The implementations that generic tests compare; each gives an operator's roles by name.

Run with TRITON_INTERPRET=1, the Triton kernels take the place of the compiled ones on a CPU, under
the same dispatcher; where there is a GPU, the kernels for it are further implementations.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import pytest
import torch
from cases import INTERPRETED

from mtkd import ops
from mtkd.dispatch import Loss, as_tuple

FORMULAS_ONLY = {"dirichlet_mixture"}  # losses without kernels of their own
CPU_ONLY = {"mixture_kl"}  # losses whose kernels are for the CPU alone
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Implementation:
    """Where a loss's roles come from; they take tensors on the CPU and return such."""

    name: str
    find: Callable[[Loss, str], Callable[..., Any]]
    device: str = "cpu"
    drivers: bool = True  # whether it has losses fused with a layer, which drivers make of rows
    half_factor: float = 1  # of the 16-bit tolerance, where such losses keep 16-bit operands

    def serves(self, loss: Loss) -> bool:
        if loss.name in FORMULAS_ONLY:
            return self.name == "formula"
        if loss.name in CPU_ONLY:
            return self.name in ("formula", "compiled")
        return self.drivers or not loss.name.startswith("linear_")

    def __call__(self, loss: Loss, role: str) -> Callable[..., Any]:
        function = self.find(loss, role)
        return function if self.device == "cpu" else self._there_and_back(function)

    def _there_and_back(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            lists = [x for x in args if isinstance(x, list)]
            here = [x for x in chain(args, *lists) if isinstance(x, torch.Tensor)]
            there: dict[int, Any] = {id(x): x.to(self.device) for x in here}
            there |= {id(each): [there.get(id(x), x) for x in each] for each in lists}
            result = function(*(there.get(id(x), x) for x in args))
            for x in here:
                x.copy_(there[id(x)])  # what it wrote
            if isinstance(result, torch.Tensor):
                return result.cpu()
            return tuple(x.cpu() for x in result)

        return run


def _formula(loss: Loss, role: str) -> Callable[..., Any]:
    return getattr(loss.formulas, role)


def _registered(loss: Loss, role: str) -> Callable[..., Any]:
    return getattr(loss, role)


def _triton(loss: Loss, role: str) -> Callable[..., Any]:
    return ops.triton_kernel(loss.name, role)


def _compiled_cuda(loss: Loss, role: str) -> Callable[..., Any]:
    operator = getattr(torch.ops.mtkd_cuda, loss.kernels[role]).default
    return as_tuple(operator) if role == "backward" else operator


FORMULA = Implementation("formula", _formula)
REGISTERED = (
    Implementation("triton", _registered, half_factor=2)
    if INTERPRETED
    else Implementation("compiled", _registered)
)
ON_GPU = [
    Implementation("cuda", _registered, "cuda", half_factor=2),
    Implementation("cuda-triton", _triton, "cuda", drivers=False),
    Implementation("cuda-compiled", _compiled_cuda, "cuda", drivers=False),
]


def _present(implementation: Implementation) -> bool:
    """Whether this machine has it: a build without the extension, or no GPU, may not."""
    if implementation.device == "cuda":
        compiled = ops.extension is not None and bool(ops.extension.build_info()["cuda"])
        return torch.cuda.is_available() and (compiled or implementation.name != "cuda-compiled")
    if INTERPRETED:  # the formulas are tested where nothing is interpreted
        return implementation is REGISTERED
    return ops.extension is not None or implementation is FORMULA


IMPLEMENTATIONS = [i for i in (FORMULA, REGISTERED, *ON_GPU) if _present(i)]


def over(cases: Any, implementations: Any = None) -> pytest.MarkDecorator:
    """Parametrise a test over cases and the implementations that serve their losses."""
    pairs = [
        pytest.param(case, implementation, id=f"{case}-{implementation.name}")
        for case in cases
        for implementation in implementations or IMPLEMENTATIONS
        if implementation.serves(case.loss)
    ]
    return pytest.mark.parametrize(("case", "implementation"), pairs)


def _narrow_as_hardware_does() -> None:
    """Round to bfloat16 to nearest: the interpreter cuts off, which no GPU does."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    cast_impl = interpreter.InterpreterBuilder.cast_impl

    def cast(self: Any, src: Any, dst_type: Any) -> Any:
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return cast_impl(self, src, dst_type)
        numbers = torch.from_numpy(np.ascontiguousarray(src.data)).to(torch.bfloat16)
        bits = numbers.view(torch.int16).numpy().view(np.uint16).reshape(src.data.shape)
        return interpreter.TensorHandle(bits, dst_type.scalar)

    interpreter.InterpreterBuilder.cast_impl = cast


if INTERPRETED:
    _narrow_as_hardware_does()
