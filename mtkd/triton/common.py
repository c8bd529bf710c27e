"""What every Triton kernel file stands on: tiles over ragged teachers, launches, small functions.

A row kernel's program takes ``TILE_ROWS`` rows of one teacher, and walks over that teacher's
columns ``TILE_COLUMNS`` at a time. So one launch serves teachers of any widths, every sum has one
owner and one order, and rows as well as teachers spread over the chip.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024  # numbers of each tensor that a program holds at once
WARPS = 4  # that hold so many in registers, without spilling any
WIDTHS = (16, 64, 256, 1024)  # of tiles, in columns: few, since each is compiled
STEP = 32  # columns that one step of a walk costs, however narrow its tile
PROGRAMS = 512  # that fill a large GPU
QUICK = 1 << 20  # numbers that a GPU reads and writes in less time than a launch takes


class Tile(NamedTuple):
    """The shape of a row kernel's tile, and the warps that work on it."""

    rows: int
    columns: int
    warps: int


@cache
def tile(rows: int, dims: tuple[int, ...], modes: int = 0, double: bool = False) -> Tile:
    """Choose the tile for so many rows of teachers of these widths.

    Mixtures and float64 need more registers for each number: they hold half as many, or a quarter.
    Tiles and warps are those at which no configuration of the compile check spills.

    Example:
        >>> tile(8192, (1024,) * 8)
        Tile(rows=1, columns=1024, warps=4)
        >>> tile(32, (16,) * 1024)
        Tile(rows=32, columns=16, warps=2)
    """
    held = TILE >> ((modes > 0) + double)  # by WARPS
    most = held >> (modes > 8)

    def cost(columns: int) -> int:
        return sum(-(-dim // columns) for dim in dims) * (columns + STEP)

    columns = min(most, min(WIDTHS, key=cost))
    height = min(most // columns, triton.next_power_of_2(max(1, rows)))
    height = min(height, max(1, held // 4 // triton.next_power_of_2(max(1, modes))))
    least = held // 4  # numbers: few programs had better be more, each with less in flight
    while height > 1 and -(-rows // height) * len(dims) < PROGRAMS and height * columns >= least:
        height //= 2
    return Tile(height, columns, max(2, WARPS * height * columns // held))


class Teachers(NamedTuple):
    """Where teachers' columns lie: of one width, or between starts (a table on the device)."""

    width: int
    starts: Tensor | None


@cache
def teachers(dims: tuple[int, ...], device: torch.device) -> Teachers:
    """Return the teachers' columns as kernels read them.

    A table is made once a process and never freed: captured graphs keep its address. Making it
    copies from the host, so ragged teachers need one call before a capture.
    """
    if len(set(dims)) == 1:
        return Teachers(dims[0], None)
    return Teachers(0, torch.tensor(list(accumulate(dims, initial=0)), device=device))


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make a tensor's GPU the current one, as launches want it."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def strides(tensor: Tensor | None, count: int) -> tuple[int, ...]:
    """Return a tensor's strides; zeros for one that is absent."""
    return (0,) * count if tensor is None else tensor.stride()


def as_bytes(mask: Tensor | None) -> Tensor | None:
    """See a bool tensor as bytes, which kernels can read."""
    return None if mask is None else mask.view(torch.uint8)


def accumulate_type(*tensors: Tensor) -> Any:
    """Return the Triton type that losses of these tensors are computed in."""
    double = any(tensor.dtype == torch.float64 for tensor in tensors)
    return tl.float64 if double else tl.float32


@dataclass(frozen=True)
class RowLoss:
    """The four operators of a loss on rows, from what launches its kernel.

    Args:
        launch: ``launch(coefficient, args, matrix, gradients)``, where None is not wanted.
        precise: positions of the arguments whose dtypes give the matrix its own.
        differentiable: positions of the arguments that receive gradients.
    """

    launch: Callable[..., None]
    precise: tuple[int, ...]
    differentiable: tuple[int, ...]

    def kernels(self) -> dict[str, Callable[..., Any]]:
        """Return the operators by the names of their roles."""
        return {
            "forward": self.forward,
            "backward": self.backward,
            "value_and_grad": self.value_and_grad,
            "value_and_grad_out": self.value_and_grad_out,
        }

    def matrix(self, args: Sequence[Any]) -> Tensor:
        """Return room for the matrix of losses."""
        tensors = [args[position] for position in self.precise]
        double = any(tensor.dtype == torch.float64 for tensor in tensors)
        dtype = torch.float64 if double else torch.float32
        return torch.empty(len(tensors[0]), len(args[1]), dtype=dtype, device=tensors[0].device)

    def forward(self, *args: Any) -> tuple[Tensor, Tensor]:
        """Return the matrix, and an empty tensor: nothing is saved for the backward."""
        matrix = self.matrix(args)
        self.launch(None, args, matrix, (None,) * len(self.differentiable))
        return matrix, args[2].new_empty(0)

    def backward(self, grad: Tensor, saved: Tensor, *args: Any) -> tuple[Tensor, ...]:
        """Return the gradients, given the gradient to the matrix."""
        *args, wanted = args  # type: ignore[assignment]
        gradients = self._gradients(args, wanted)
        self.launch(grad, args, None, gradients)
        return _returned(args, gradients)

    def value_and_grad(self, coefficient: Tensor, *args: Any) -> tuple[Tensor, ...]:
        """Return the matrix and the gradients, scaled by the coefficient."""
        *args, wanted = args  # type: ignore[assignment]
        matrix, gradients = self.matrix(args), self._gradients(args, wanted)
        self.launch(coefficient, args, matrix, gradients)
        return (matrix, *_returned(args, gradients))

    def value_and_grad_out(self, coefficient: Tensor, *args: Any) -> Tensor:
        """Return the matrix; write the gradients into the last arguments."""
        count = len(self.differentiable)
        args, outputs = args[:-count], args[-count:]
        matrix = self.matrix(args)
        self.launch(coefficient, args, matrix, outputs)
        return matrix

    def _gradients(self, args: Sequence[Any], wanted: Sequence[bool]) -> list[Tensor | None]:
        pairs = zip((args[position] for position in self.differentiable), wanted, strict=True)
        return [
            torch.empty(x.shape, dtype=x.dtype, device=x.device) if want and x is not None else None
            for x, want in pairs
        ]


def _returned(args: Sequence[Any], gradients: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    return tuple(args[2].new_empty(0) if grad is None else grad for grad in gradients)


@triton.jit
def softmax(values):
    """Return the softmax over the last axis, and the logarithm of the sum of exponentials."""
    largest = tl.max(values, 1)
    finite = tl.where(largest == float("-inf"), 0.0, largest)
    exponentials = tl.exp(values - finite[:, None])
    total = tl.sum(exponentials, 1)
    return exponentials / total[:, None], finite + tl.log(total)


@triton.jit
def _tanh_polynomial(z):
    """Return (tanh(x) / x - 1) / z of z = x^2, for |x| up to a limit, and that limit."""
    if z.dtype == tl.float64:  # the Taylor series
        return ((62 / 2835 * z - 17 / 315) * z + 2 / 15) * z - 1 / 3, 1 / 32
    return ((1.7241487e-2 * z - 5.3045493e-2) * z + 1.3325879e-1) * z - 3.3333144e-1, 0.5  # minimax


@triton.jit
def tanh_and_slope(x):
    """Return tanh and its derivative from one exponential; no 1 - e near 0, where it cancels."""
    e = tl.exp(-2.0 * tl.abs(x))
    r = 1.0 / (1.0 + e)
    far = (1.0 - e) * r
    p, limit = _tanh_polynomial(x * x)
    value = tl.where(tl.abs(x) < limit, x + x * (x * x * p), tl.where(x < 0, -far, far))
    return value, 4.0 * e * r * r


@triton.jit
def _scale_kernel(x, scale, size, BLOCK: tl.constexpr):
    factor = tl.load(scale).to(tl.float32) if x.dtype.element_ty != tl.float64 else tl.load(scale)
    if factor != 1.0:
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, size, step):
            at = start + tl.arange(0, BLOCK)
            values = tl.load(x + at, mask=at < size)
            tl.store(x + at, (values * factor).to(values.dtype), mask=at < size)


def scale_(tensors: Sequence[Tensor], scale: Tensor) -> None:
    """Multiply in place by a number on the device; where that is 1, large tensors are not read."""
    large = [t for t in tensors if t.numel() > QUICK and t.is_contiguous()]
    others = [t for t in tensors if t.numel() <= QUICK or not t.is_contiguous()]
    if others:
        torch._foreach_mul_(others, scale)
    for tensor in large:
        blocks = min(PROGRAMS, -(-tensor.numel() // 4096))
        with on_device_of(tensor):
            _scale_kernel[(blocks,)](tensor, scale, tensor.numel(), BLOCK=4096, num_warps=8)


KERNELS: dict[str, Callable[..., Any]] = {"scale_": scale_}
