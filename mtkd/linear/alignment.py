"""What alignment brings to the driver: a tile's student, aligned where the layer makes it."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import ops
from .driver import Call, Kernel, Tile, implement
from .layers import Layer, precision


def _rows(layer: Layer, shift: Tensor | None, scale: Tensor | None, rest: Sequence[Any]) -> Kernel:
    """Return the kernel of two steps: a GEMM, then the operator on rows."""
    row = ops.alignment
    dispersion, *settings = rest

    def run(tile: Tile) -> tuple[Tensor, None]:
        assert tile.z is not None
        layer.project(tile.x, tile.columns, tile.z)
        standard = [None if x is None else x[tile.columns] for x in (shift, scale)]
        spread = None if dispersion is None else dispersion[tile.group]
        arguments = (tile.mask, tile.dims, tile.z[:, 0], tile.target, *standard, spread, *settings)
        if tile.coefficient is None or tile.grad is None:
            return row.forward(*arguments)[0], None
        return row.value_and_grad_out(tile.coefficient, *arguments, tile.grad[:, 0]), None

    return run


def _call(args: Sequence[Any]) -> Call:
    mask, dims, input, weight, bias, target, shift, scale, *rest, budget, _ = args
    parts = (weight.unsqueeze(0), None if bias is None else bias.unsqueeze(0))
    layer = Layer(*parts, precision(input, weight))
    return Call(mask, dims, input, layer, None, target, budget, _rows(layer, shift, scale, rest))


implement(ops.linear_alignment, _call)
