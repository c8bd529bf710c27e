"""What divergences bring to the driver: a tile's logits, compared where the heads make them."""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..packing import offsets
from .driver import Call, Kernel, Tile, implement
from .layers import Layer, precision

_row_with_bias = ops.triton_kernel("kl_div", "with_bias")


class _Logits:
    """The logits of teachers given as features and a layer each, made for a tile when it asks.

    Every tile gets the same memory.
    """

    def __init__(self, features: Sequence[Tensor], layers: Sequence[Layer], dtype: torch.dtype):
        self.features, self.layers, self.dtype = features, layers, dtype
        self.bounds = offsets([layer.weight.shape[1] for layer in layers])
        self.memory = torch.empty(0, dtype=dtype)

    def __getitem__(self, at: tuple[slice, slice]) -> Tensor:
        rows, columns = at
        first, last = (bisect_left(self.bounds, x) for x in (columns.start, columns.stop))
        out = self._room(rows.stop - rows.start, columns.stop - columns.start)
        for teacher in range(first, last):
            layer, features = self.layers[teacher], self.features[teacher]
            begin, end = (x - columns.start for x in self.bounds[teacher : teacher + 2])
            x = features[rows].to(layer.precision.operand)
            layer.project(x, slice(0, end - begin), out[:, None, begin:end])
        return out

    def _room(self, rows: int, columns: int) -> Tensor:
        if self.memory.numel() < rows * columns:
            device = self.features[0].device
            self.memory = torch.empty(rows * columns, dtype=self.dtype, device=device)
        return self.memory[: rows * columns].view(rows, columns)


def _layer(weight: Tensor, bias: Tensor | None, x: Tensor) -> Layer:
    bias = None if bias is None else bias.unsqueeze(0)
    return Layer(weight.unsqueeze(0), bias, precision(x, weight))


def _rows(layer: Layer, settings: Sequence[Any]) -> Kernel:
    """Return the kernel of two steps: a GEMM, then the operator on rows.

    Triton's adds the bias as well, which would cost the GEMM a pass to write and one to read.
    """
    row = ops.kl_div

    def run(tile: Tile) -> tuple[Tensor, None]:
        assert tile.z is not None
        on_triton = ops.has_triton(tile.x)
        layer.project(tile.x, tile.columns, tile.z, with_bias=not on_triton)
        student, teacher = tile.z[:, 0], tile.target
        if teacher.dtype.itemsize > student.dtype.itemsize:  # the student decides the precision
            teacher = teacher.to(student.dtype)
        arguments = (tile.mask, tile.dims, student, teacher, *settings)
        output = None if tile.grad is None else tile.grad[:, 0]
        if on_triton:
            bias = None if layer.bias is None else layer.bias[0, tile.columns]
            return _row_with_bias(bias, tile.coefficient, arguments, output), None
        if tile.coefficient is None or output is None:
            return row.forward(*arguments)[0], None
        return row.value_and_grad_out(tile.coefficient, *arguments, output, None), None

    return run


def _call(args: Sequence[Any]) -> Call:
    mask, dims, input, weight, bias, teacher, features, weights, biases, *rest = args
    *settings, budget, _ = rest
    layer, target = _layer(weight, bias, input), teacher
    if teacher is None:
        parts = zip(weights, biases, features, strict=True)
        target = _Logits(features, [_layer(*part) for part in parts], layer.precision.result)
    kernel, makes = _rows(layer, settings), teacher is None
    return Call(mask, dims, input, layer, None, target, budget, kernel, makes_target=makes)


implement(ops.linear_kl_div, _call)
