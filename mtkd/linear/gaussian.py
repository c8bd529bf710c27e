"""What the Gaussian losses bring to the driver: where a tile's means and deviations lie."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import ops
from .driver import Call, Kernel, Tile, implement
from .layers import Layer, precision


def _halves(tile: Tensor, modes: int) -> tuple[Tensor, Tensor]:
    """See a tile as means and log standard deviations, ``(n, c)`` or with modes ``(n, M, c)``."""
    if modes == 0:
        return tile[:, 0], tile[:, 1]
    return tile[:, :modes], tile[:, modes:]


def _row_kernel(layer: Layer, modes: int, settings: Sequence[Any]) -> Kernel:
    """Return the kernel of two steps: one GEMM, then the operator on rows."""
    row = ops.gaussian_nll

    def run(tile: Tile) -> tuple[Tensor, None]:
        assert tile.z is not None
        layer.project(tile.x, tile.columns, tile.z)
        halves, logits = _halves(tile.z, modes), tile.logits
        arguments = (tile.mask, tile.dims, *halves, tile.target, logits, *settings)
        if tile.coefficient is None or tile.grad is None:
            return row.forward(*arguments)[0], None
        outputs = (*_halves(tile.grad, modes), logits)
        return row.value_and_grad_out(tile.coefficient, *arguments, *outputs), None

    return run


def _call(args: Sequence[Any]) -> Call:
    mask, dims, input, weight, bias, mode_weight, mode_bias, target, *settings, budget, _ = args
    numbers, modes = precision(input, weight), 0
    if mode_weight is not None:  # (2, M, D, H): modes are parts like mean and log_std
        modes, weight = weight.shape[1], weight.flatten(0, 1)
        bias = None if bias is None else bias.flatten(0, 1)
    columns = Layer(weight, bias, numbers)
    teachers = None if mode_weight is None else Layer(mode_weight, mode_bias, numbers)
    kernel = _row_kernel(columns, modes, settings)
    return Call(mask, dims, input, columns, teachers, target, budget, kernel)


implement(ops.linear_gaussian_nll, _call)
