"""A linear layer's three GEMMs, a tile at a time, and the precision of their numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..reference.columns import accumulate_dtype


class Precision(NamedTuple):
    """The dtype of the GEMMs' operands, and that of their results and sums."""

    operand: torch.dtype
    result: torch.dtype


def precision(input: Tensor, weight: Tensor) -> Precision:
    """Choose the precision: a GPU multiplies 16-bit operands as they are, into float32."""
    result = accumulate_dtype(input, weight)
    if ops.on_gpu(input) and input.dtype == weight.dtype and input.dtype.itemsize == 2:
        return Precision(input.dtype, result)
    return Precision(result, result)


@dataclass
class Layer:
    """A linear layer ``(P, C, H)`` with bias ``(P, C)``, and gradients as they accumulate.

    A tile of its projection is ``(n, P, c)``. Where a tile has all columns, its parts are one
    matrix and each of the three products one GEMM. An input ``(t, n, H)`` is that of each of a
    tile's t teachers, of one width: the products are batched, a part at a time.
    """

    weight: Tensor
    bias: Tensor | None
    precision: Precision
    weight_grad: Tensor | None = None
    bias_grad: Tensor | None = None

    @property
    def parts(self) -> int:
        """The number of parts P."""
        return self.weight.shape[0]

    def want(self, weight: bool, bias: bool, rows: int, once: bool) -> None:
        """Make room for the gradients wanted; `once` says that every tile has all rows."""
        operand, result = self.precision
        if weight:  # a gradient written once needs no wider sum
            own = operand if once and operand == self.weight.dtype else result
            self.weight_grad = empty(self.weight, own, rows)
        if bias and self.bias is not None:
            self.bias_grad = empty(self.bias, result, rows)

    def project(self, x: Tensor, columns: slice, out: Tensor, with_bias: bool = True) -> None:
        """Write ``x @ weight.T + bias`` of some columns into a tile."""
        weights = self._matrices(self.weight, columns, x)
        with_bias = with_bias and self.bias is not None
        biases = self._matrices(self.bias, columns, x) if self.bias is not None else ()
        for part, (z, weight) in enumerate(zip(self._tiles(out, x), weights, strict=True)):
            if with_bias:
                z.copy_(biases[part].unsqueeze(-2))
            add_product(z, x, weight.to(x.dtype).mT, first=not with_bias)

    def accumulate(
        self, grad: Tensor, x: Tensor, columns: slice, first: bool, bias_sums: Tensor | None = None
    ) -> None:
        """Add a tile's part of the gradients of weight and bias; `bias_sums` (P, c) if known."""
        tiles = self._tiles(grad, x)
        if self.weight_grad is not None:
            outs = self._matrices(self.weight_grad, columns, x)
            for z, out in zip(tiles, outs, strict=True):
                add_product(out, z.mT, x, first)
        if self.bias_grad is not None:
            if bias_sums is not None:
                sums = [total.squeeze(-2) for total in self._tiles(bias_sums.unsqueeze(0), x)]
            else:
                sums = [z.sum(-2, dtype=self.precision.result) for z in tiles]
            for total, out in zip(sums, self._matrices(self.bias_grad, columns, x), strict=True):
                out.copy_(total if first else out + total)

    def input_grad(self, grad: Tensor, x: Tensor, columns: slice, out: Tensor, first: bool) -> None:
        """Add a tile's part of the gradient of the input."""
        weights = self._matrices(self.weight, columns, x)
        for part, (z, weight) in enumerate(zip(self._tiles(grad, x), weights, strict=True)):
            add_product(out, z, weight.to(z.dtype), first and part == 0)

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Return the gradients of weight and bias; one that is not wanted is an empty tensor."""
        like = self.weight if self.bias is None else self.bias
        return finished(self.weight_grad, self.weight), finished(self.bias_grad, like)

    def _tiles(self, z: Tensor, x: Tensor) -> Sequence[Tensor]:
        """See a tile as the results of the products of `x`."""
        if x.dim() == 3:
            return [part.unflatten(1, (len(x), -1)).transpose(0, 1) for part in z.unbind(1)]
        return [z.flatten(1)] if self._is_whole(z.shape[2]) else z.unbind(1)

    def _matrices(self, tensor: Tensor, columns: slice, x: Tensor) -> Sequence[Tensor]:
        """See weights, or biases, as the factors of the products of `x`."""
        if x.dim() == 3:
            return [part[columns].unflatten(0, (len(x), -1)) for part in tensor]
        if self._is_whole(columns.stop - columns.start):
            return [tensor.flatten(0, 1)]
        return [part[columns] for part in tensor]

    def _is_whole(self, columns: int) -> bool:
        return columns == self.weight.shape[1]


def add_product(out: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """Write ``a @ b``, or add it where it is not the first; 16-bit operands keep a wide result.

    Matrices, or batches of them.
    """
    multiply, add = (torch.mm, torch.addmm) if a.dim() == 2 else (torch.bmm, torch.baddbmm)
    if a.dtype == out.dtype:
        add(out, a, b, beta=0.0 if first else 1.0, out=out)
    elif not a.is_cuda:  # only GPUs have products with wider results
        add_product(out, a.to(out.dtype), b.to(out.dtype), first)
    elif first:
        multiply(a, b, out_dtype=out.dtype, out=out)
    else:
        add(out, a, b, out_dtype=out.dtype, out=out)


def empty(like: Tensor, dtype: torch.dtype, rows: int) -> Tensor:
    """Make a gradient's memory; zeros when there are no rows, since no tile will write it."""
    if rows == 0:
        return torch.zeros(like.shape, dtype=dtype, device=like.device)
    out = torch.empty(like.shape, dtype=dtype, device=like.device)
    if out.device.type == "cpu":
        torch.ops.mtkd.advise_huge_pages(out)
    return out


def finished(grad: Tensor | None, like: Tensor) -> Tensor:
    """Return a gradient in its argument's dtype; one that is not wanted is an empty tensor."""
    return like.new_empty(0) if grad is None else grad.to(like.dtype)
