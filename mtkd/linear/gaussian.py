"""What the Gaussian losses bring to the driver: how a tile becomes its matrix and its gradient."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import ops
from .driver import Call, Kernel, Tile, implement
from .layers import Layer, precision

_fused_fits = ops.triton_kernel("linear_gaussian_nll", "fits")
_fused_tile = ops.triton_kernel("linear_gaussian_nll", "tile")
_row_with_biases = ops.triton_kernel("gaussian_nll", "with_biases")


def _halves(parts: Tensor, modes: int) -> tuple[Tensor, Tensor]:
    """Split parts ``(*, P, c)`` into those of means and of log standard deviations."""
    if modes == 0:
        return parts[..., 0, :], parts[..., 1, :]
    return parts[..., :modes, :], parts[..., modes:, :]


def _rows(layer: Layer, modes: int, settings: Sequence[Any], on_triton: bool) -> Kernel:
    """Return the kernel of two steps: a GEMM, then the operator on rows.

    Triton's adds the biases as well, which would cost the GEMM a pass to write and one to read.
    """
    row = ops.gaussian_nll

    def run(tile: Tile) -> tuple[Tensor, None]:
        assert tile.z is not None
        layer.project(tile.x, tile.columns, tile.z, with_bias=not on_triton)
        halves, logits = _halves(tile.z, modes), tile.logits
        arguments = (tile.mask, tile.dims, *halves, tile.target, logits, *settings)
        outputs: Sequence[Tensor | None] = (None, None, None)
        if tile.grad is not None:
            outputs = (*_halves(tile.grad, modes), logits)
        if on_triton:
            biases: Sequence[Tensor | None] = (None, None)
            if layer.bias is not None:
                biases = _halves(layer.bias[:, tile.columns], modes)
            return _row_with_biases(biases, tile.coefficient, arguments, *outputs), None
        if tile.coefficient is None:
            return row.forward(*arguments)[0], None
        return row.value_and_grad_out(tile.coefficient, *arguments, *outputs), None

    return run


def _fused(layer: Layer, settings: Sequence[Any]) -> Kernel:
    """Return the kernel of one step: the loss in the epilogue of the GEMM."""

    def run(tile: Tile) -> tuple[Tensor, Tensor | None]:
        matrix, sums = _fused_tile(
            tile.x,
            layer.weight,
            layer.bias,
            tile.columns,
            tile.mask,
            tile.dims,
            tile.target,
            settings,
            tile.coefficient,
            tile.grad,
            layer.bias_grad is not None,
        )
        return matrix, sums

    return run


def _call(args: Sequence[Any]) -> Call:
    mask, dims, input, weight, bias, mode_weight, mode_bias, target, *settings, budget, _ = args
    numbers, modes = precision(input, weight), 0
    if mode_weight is not None:  # (2, M, D, H): modes are parts like mean and log_std
        modes, weight = weight.shape[1], weight.flatten(0, 1)
        bias = None if bias is None else bias.flatten(0, 1)
    columns = Layer(weight, bias, numbers)
    teachers = None if mode_weight is None else Layer(mode_weight, mode_bias, numbers)
    on_triton = ops.has_triton(input)
    fused = on_triton and modes == 0 and _fused_fits(dims, input, weight)
    kernel = _fused(columns, settings) if fused else _rows(columns, modes, settings, on_triton)
    return Call(mask, dims, input, columns, teachers, target, budget, kernel, fused)


implement(ops.linear_gaussian_nll, _call)
