"""What alignment brings to the driver: a tile's student, aligned where the layer makes it."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import ops
from .driver import Call, Kernel, Tile, implement
from .layers import Layer, precision

_row_with_bias = ops.triton_kernel("alignment", "with_bias")


def _rows(layer: Layer, standard: Sequence[Tensor | None], rest: Sequence[Any]) -> Kernel:
    """Return the kernel of two steps: a GEMM, then the operator on rows.

    Triton's adds the bias as well, which would cost the GEMM a pass to write and one to read.
    """
    row = ops.alignment
    dispersion, *settings = rest

    def run(tile: Tile) -> tuple[Tensor, None]:
        assert tile.z is not None
        on_triton = ops.has_triton(tile.x)
        layer.project(tile.x, tile.columns, tile.z, with_bias=not on_triton)
        shift, scale = (None if x is None else x[tile.columns] for x in standard)
        spread = None if dispersion is None else dispersion[tile.group]
        student = tile.z[:, 0]
        arguments = (tile.mask, tile.dims, student, tile.target, shift, scale, spread, *settings)
        if on_triton:
            bias = None if layer.bias is None else layer.bias[0, tile.columns]
            output = None if tile.grad is None else tile.grad[:, 0]
            return _row_with_bias(bias, tile.coefficient, arguments, output), None
        if tile.coefficient is None or tile.grad is None:
            return row.forward(*arguments)[0], None
        return row.value_and_grad_out(tile.coefficient, *arguments, tile.grad[:, 0]), None

    return run


def _call(args: Sequence[Any]) -> Call:
    mask, dims, input, weight, bias, target, shift, scale, *rest, budget, _ = args
    parts = (weight.unsqueeze(0), None if bias is None else bias.unsqueeze(0))
    layer = Layer(*parts, precision(input, weight))
    return Call(mask, dims, input, layer, None, target, budget, _rows(layer, (shift, scale), rest))


implement(ops.linear_alignment, _call)
