"""The one driver of every loss fused with a linear layer (``linear_*``).

Multiplying out the layer would make tensors ``(P, N, D)`` with P parts: gigabytes for wide
students or many teachers. The driver makes them a tile of rows and whole teachers at a time; the
row kernel turns a tile into its own gradient in place, and GEMMs take that straight to the
gradients of input, weight and bias. Tiles and GEMM results are float32 (float64 for float64)
whatever the inputs are: a 16-bit residual would spoil the gradient of a student that is close.

Modes: *stream* makes the gradients together with the value (3 GEMMs; sum and mean). With
reduction "none" the gradient of the matrix is not known in forward: *stash* keeps the tiles'
unit gradients if they fit the workspace (3 GEMMs), *recompute* makes the tiles again (4 GEMMs).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import ops, plan
from .dispatch import Loss
from .packing import offsets
from .reference.columns import accumulate_dtype, expand_columns, zero_uncounted_rows

_workspace = 256 << 20


@contextmanager
def workspace(size: int) -> Iterator[None]:
    """Set the bytes that ``linear_*`` losses may use beside inputs, outputs and gradients.

    Applies to the whole process while the context is open; the default is 256 MiB. A backward
    pass uses what its forward pass was given. The least that a call takes is one row of its
    widest teacher.

    Args:
        size: bytes, a positive integer.

    Raises:
        ValueError: a size that is not positive.

    Example:
        >>> import mtkd.linear
        >>> with mtkd.linear.workspace(64 << 20):
        ...     pass  # losses called here tile for 64 MiB
    """
    global _workspace
    if size <= 0:
        raise ValueError(f"size: expected a positive number of bytes, got {size}")
    previous, _workspace = _workspace, size
    try:
        yield
    finally:
        _workspace = previous


def workspace_size() -> int:
    """Return the bytes that ``linear_*`` losses may use now."""
    return _workspace


def stash_fits(rows: int, width: int) -> bool:
    """Whether the unit gradients of a projection, `width` numbers a row, fit the workspace."""
    return plan.stash_fits(rows, width, _workspace)


@dataclass
class _Layer:
    """A linear layer ``(P, C, H)`` with bias ``(P, C)``, and gradients as they accumulate."""

    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype
    weight_grad: Tensor | None = None
    bias_grad: Tensor | None = None

    def want(self, weight: bool, bias: bool, rows: int) -> None:
        self.weight_grad = _large_empty(self.weight, self.dtype, rows) if weight else None
        if bias and self.bias is not None:
            self.bias_grad = _large_empty(self.bias, self.dtype, rows)

    def project(self, x: Tensor, columns: slice, out: Tensor) -> None:
        for part in range(self.weight.shape[0]):
            weight = self.weight[part, columns].to(self.dtype).T
            if self.bias is None:
                torch.mm(x, weight, out=out[part])
            else:
                torch.addmm(self.bias[part, columns].to(self.dtype), x, weight, out=out[part])

    def accumulate(self, grad: Tensor, x: Tensor, columns: slice, first: bool) -> None:
        for part in range(self.weight.shape[0]):
            if self.weight_grad is not None:
                _add_product(self.weight_grad[part, columns], grad[part].T, x, first)
            if self.bias_grad is not None:
                bias_grad, total = self.bias_grad[part, columns], grad[part].sum(0)
                bias_grad.copy_(total if first else bias_grad + total)

    def input_grad(self, grad: Tensor, columns: slice, out: Tensor, first: bool) -> None:
        for part in range(self.weight.shape[0]):
            weight = self.weight[part, columns].to(self.dtype)
            _add_product(out, grad[part], weight, first and part == 0)

    def gradients(self) -> tuple[Tensor, Tensor]:
        like = self.weight if self.bias is None else self.bias
        return _finish(self.weight_grad, self.weight), _finish(self.bias_grad, like)


def _finish(grad: Tensor | None, like: Tensor) -> Tensor:
    """Return a gradient in its argument's dtype; one that is not wanted is an empty tensor."""
    return like.new_empty(0) if grad is None else grad.to(like.dtype)


def _add_product(out: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    torch.addmm(out, a, b, beta=0.0 if first else 1.0, out=out)


def _large_empty(like: Tensor, dtype: torch.dtype, rows: int) -> Tensor:
    if rows == 0:  # no tile will write it
        return torch.zeros(like.shape, dtype=dtype, device=like.device)
    out = torch.empty(like.shape, dtype=dtype, device=like.device)
    torch.ops.mtkd.advise_huge_pages(out)
    return out


@dataclass
class _Call:
    """One call of a ``linear_*`` operator: its layers, its tiles and its row loss."""

    row: Loss
    mask: Tensor | None
    dims: Sequence[int]
    input: Tensor
    columns: _Layer
    teachers: _Layer | None
    target: Tensor
    arrange: Callable[[Tensor, Tensor | None, Tensor], tuple[Any, ...]]
    workspace: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        self.rows, self.bounds = self.input.shape[0], offsets(self.dims)
        self.parts = self.columns.weight.shape[0]
        item = self.dtype.itemsize
        self.plan = plan.tiles(self.rows, self.dims, self.parts, self.workspace, item)

    def new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.input.device)

    def row_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the rows of each tile, and their input."""
        for start in range(0, self.rows, self.plan.rows):
            rows = slice(start, min(start + self.plan.rows, self.rows))
            mask = None if self.mask is None else self.mask[rows]
            yield rows, zero_uncounted_rows(self.input[rows].to(self.dtype), mask)

    def groups(self) -> Iterator[tuple[slice, slice]]:
        """Yield the teachers of each tile, and their columns."""
        for first, last in self.plan.groups:
            yield slice(first, last), slice(self.bounds[first], self.bounds[last])

    def tile_memory(self) -> Callable[[int, slice], Tensor]:
        widest = max(columns.stop - columns.start for _, columns in self.groups())
        memory = self.new(self.parts * min(self.rows, self.plan.rows) * widest)

        def tile(rows: int, columns: slice) -> Tensor:
            width = columns.stop - columns.start
            return memory[: self.parts * rows * width].view(self.parts, rows, width)

        return tile

    def views(self, stash: Tensor) -> tuple[Tensor, Tensor | None]:
        """See a flat stash as the tiles ``(P, N, D)`` and the teachers' part ``(Q, N, T)``."""
        size = self.parts * self.rows * self.bounds[-1]
        columns = stash[:size].view(self.parts, self.rows, self.bounds[-1])
        if self.teachers is None:
            return columns, None
        return columns, stash[size:].view(-1, self.rows, len(self.dims))

    def project_teachers(self, x: Tensor, out: Tensor | None = None) -> Tensor | None:
        if self.teachers is None:
            return None
        count = self.teachers.weight.shape[0]
        out = self.new(count, x.shape[0], len(self.dims)) if out is None else out
        self.teachers.project(x, slice(None), out)
        return out

    def matrix(self, coefficient: Tensor | None, sink: "_Sink | None", stash: Tensor) -> Tensor:
        """Run every tile; with a coefficient, hand the tiles' gradients to the sink."""
        matrix = self.new(self.rows, len(self.dims))
        tile = self.tile_memory()
        stashed, stashed_logits = self.views(stash) if stash.numel() else (None, None)
        for rows, x in self.row_blocks():
            kept = None if stashed_logits is None else stashed_logits[:, rows]
            logits = self.project_teachers(x, kept)
            for group, columns in self.groups():
                z = tile(x.shape[0], columns) if stashed is None else stashed[:, rows, columns]
                self.columns.project(x, columns, z)
                part = None if logits is None else logits[..., group]
                matrix[rows, group] = self.run_rows(z, part, rows, group, columns, coefficient)
                if sink is not None:
                    sink.take_columns(z, x, rows, columns)
            if sink is not None:
                sink.take_teachers(logits, x, rows)
        return matrix

    def run_rows(
        self,
        z: Tensor,
        logits: Tensor | None,
        rows: slice,
        group: slice,
        columns: slice,
        coefficient: Tensor | None,
    ) -> Tensor:
        mask = None if self.mask is None else self.mask[rows, group]
        dims = self.dims[group]
        arguments = self.arrange(z, logits, self.target[rows, columns])
        if coefficient is None:
            return self.row.forward(mask, dims, *arguments)[0]
        outputs = [arguments[position - 2] for position in self.row.differentiable]  # in place
        coefficient = coefficient[rows, group]
        return self.row.value_and_grad_out(coefficient, mask, dims, *arguments, *outputs)

    def from_stash(self, grad: Tensor, stash: Tensor, sink: "_Sink") -> None:
        """Scale the stashed unit gradients and hand them to the sink."""
        stashed, stashed_logits = self.views(stash)
        tile = self.tile_memory()
        for rows, x in self.row_blocks():
            scale = grad[rows].to(self.dtype)
            for group, columns in self.groups():
                spread = expand_columns(scale[:, group], self.dims[group])
                z = tile(x.shape[0], columns)
                torch.mul(stashed[:, rows, columns], spread, out=z)
                sink.take_columns(z, x, rows, columns)
            logits = None if stashed_logits is None else stashed_logits[:, rows] * scale
            sink.take_teachers(logits, x, rows)


class _Sink:
    """Where the tiles' gradients go: the gradients of input, layers and biases."""

    def __init__(self, call: _Call, wanted: Sequence[bool]) -> None:
        self.call = call
        to_input, to_weight, to_bias, to_mode_weight, to_mode_bias = wanted
        self.input_grad = _large_empty(call.input, call.dtype, call.rows) if to_input else None
        call.columns.want(to_weight, to_bias, call.rows)
        if call.teachers is not None:
            call.teachers.want(to_mode_weight, to_mode_bias, call.rows)

    def take_columns(self, z: Tensor, x: Tensor, rows: slice, columns: slice) -> None:
        layer = self.call.columns
        layer.accumulate(z, x, columns, first=rows.start == 0)
        if self.input_grad is not None:
            layer.input_grad(z, columns, self.input_grad[rows], first=columns.start == 0)

    def take_teachers(self, logits: Tensor | None, x: Tensor, rows: slice) -> None:
        layer = self.call.teachers
        if layer is None or logits is None:
            return
        layer.accumulate(logits, x, slice(None), first=rows.start == 0)
        if self.input_grad is not None:
            layer.input_grad(logits, slice(None), self.input_grad[rows], first=False)

    def gradients(self) -> tuple[Tensor, ...]:
        call, like = self.call, self.call.input
        teachers = (like.new_empty(0), like.new_empty(0))
        if call.teachers is not None:
            teachers = call.teachers.gradients()
        return _finish(self.input_grad, like), *call.columns.gradients(), *teachers


def _gaussian_call(args: Sequence[Any]) -> _Call:
    mask, dims, input, weight, bias, mode_weight, mode_bias, target, *settings, budget, _ = args
    dtype = accumulate_dtype(input, weight)
    if mode_weight is not None:  # (2, M, D, H): modes are parts like mean and log_std
        weight, bias = weight.flatten(0, 1), None if bias is None else bias.flatten(0, 1)
    columns = _Layer(weight, bias, dtype)
    teachers = None if mode_weight is None else _Layer(mode_weight, mode_bias, dtype)

    def arrange(z: Tensor, logits: Tensor | None, targets: Tensor) -> tuple[Any, ...]:
        if logits is None:
            return z[0], z[1], targets, None, *settings
        mean, log_std = z.transpose(0, 1).chunk(2, 1)
        return mean, log_std, targets, logits.transpose(0, 1), *settings

    row = ops.gaussian_nll
    return _Call(row, mask, dims, input, columns, teachers, target, arrange, budget, dtype)


def _implement(loss: Loss, make_call: Callable[[Sequence[Any]], _Call]) -> None:
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        call, keep = make_call(args), args[-1]
        width = sum(
            layer.weight[..., 0].numel() for layer in (call.columns, call.teachers) if layer
        )
        stash = call.new(call.rows * width if keep else 0)
        unit = torch.ones((), dtype=call.dtype, device=stash.device) if keep else None
        coefficient = None if unit is None else unit.expand(call.rows, len(call.dims))
        return call.matrix(coefficient, None, stash), stash

    def shaped(sink: _Sink, args: Sequence[Any]) -> tuple[Tensor, ...]:
        """Give gradients the shapes of their arguments, whose leading dimensions calls flatten."""
        pairs = zip(sink.gradients(), loss.differentiable, strict=True)
        return tuple(g.view(args[at].shape) if g.numel() else g for g, at in pairs)

    def backward(grad: Tensor, saved: Tensor, *args: Any) -> tuple[Tensor, ...]:
        call = make_call(args[:-1])
        sink = _Sink(call, args[-1])
        if saved.numel():
            call.from_stash(grad, saved, sink)
        else:
            call.matrix(grad, sink, saved)
        return shaped(sink, args)

    def value_and_grad(coefficient: Tensor, *args: Any) -> tuple[Tensor, ...]:
        call = make_call(args[:-1])
        sink = _Sink(call, args[-1])
        matrix = call.matrix(coefficient, sink, call.new(0))
        return matrix, *shaped(sink, args)

    for device in ("CPU", "CUDA"):
        loss.implement(device, forward=forward, backward=backward, value_and_grad=value_and_grad)


_implement(ops.linear_gaussian_nll, _gaussian_call)
