"""Walk over the tiles of a projection: make one, turn it into its gradient, hand that on."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .. import plan
from ..dispatch import Loss
from ..packing import offsets
from ..reference.columns import expand_columns, zero_uncounted_rows
from .layers import Layer, empty, finished


class Tile(NamedTuple):
    """Some rows of some teachers: what the kernel of a tile reads and writes."""

    x: Tensor  # (n, H), or (t, n, H)
    z: Tensor | None  # (n, P, c), memory for the projection
    grad: Tensor | None  # (n, P, c), for its gradient; may be z
    logits: Tensor | None  # (n, Q, t), turned into their gradient
    mask: Tensor | None  # (n, t)
    coefficient: Tensor | None  # (n, t); no gradients without
    target: Tensor  # (n, c)
    dims: Sequence[int]
    group: slice  # its teachers
    columns: slice


# Returns the tile's matrix (n, t), and sums of its gradient over rows (P, c) if they came along.
Kernel = Callable[[Tile], tuple[Tensor, Tensor | None]]
Buffer = Callable[[slice, slice], Tensor | None]


class Columns(Protocol):
    """What the tiles' targets are taken from: a tensor, or what makes them when they are wanted."""

    def __getitem__(self, at: tuple[slice, slice], /) -> Tensor:
        """Return some rows of some columns."""


@dataclass
class Call:
    """One call of a ``linear_*`` operator: its layers, its tiles and the kernel of a tile."""

    mask: Tensor | None
    dims: Sequence[int]
    input: Tensor
    columns: Layer
    teachers: Layer | None
    target: Columns
    workspace: int
    kernel: Kernel
    makes_projection: bool = False  # in registers: it needs no memory, but that of partial sums
    makes_target: bool = False  # in memory of its own

    def __post_init__(self) -> None:
        self.rows, self.bounds = self.input.shape[-2], offsets(self.dims)
        self.shared = self.input.dim() == 2  # else each teacher has an input of its own
        self.operand, self.result = self.columns.precision
        self.own_grad = self.makes_projection or self.operand != self.result
        item = self.operand.itemsize if self.own_grad else 0
        item += 0 if self.makes_projection else self.result.itemsize
        item += self.result.itemsize if self.makes_target else 0
        self.plan = plan.tiles(
            self.rows,
            tuple(self.dims),
            self.columns.parts,
            self._tile_budget(),
            item,
            fill=self.input.device.type != "cpu",
        )

    def _tile_budget(self) -> int:
        """Return the bytes for a tile: less partial sums and an input gradient of wider numbers."""
        beside = self.workspace // 16 if self.makes_projection else 0
        if self.operand != self.result:
            beside += self.input.numel() * self.result.itemsize
        return max(self.workspace // 2, self.workspace - beside)

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Make a tensor, of results unless a dtype is given."""
        return torch.empty(shape, dtype=dtype or self.result, device=self.input.device)

    @property
    def once(self) -> bool:
        """Whether every tile has all rows, so that no gradient of a weight is a sum of tiles'."""
        return self.plan.rows >= self.rows

    def row_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the rows of each tile, and their input."""
        for start in range(0, self.rows, self.plan.rows):
            rows = slice(start, min(start + self.plan.rows, self.rows))
            mask = None if self.mask is None else self.mask[rows]
            yield rows, zero_uncounted_rows(self.input[..., rows, :].to(self.operand), mask)

    def of(self, group: slice, x: Tensor) -> Tensor:
        """Return the input, or its gradient, of some teachers."""
        return x if self.shared else x[group]

    def groups(self) -> Iterator[tuple[slice, slice]]:
        """Yield the teachers of each tile, and their columns."""
        for first, last in self.plan.groups:
            yield slice(first, last), slice(self.bounds[first], self.bounds[last])

    def tile_memory(self, dtype: torch.dtype) -> Buffer:
        """Return what gives a tile ``(n, P, c)``, ever of the same memory."""
        widest = max(columns.stop - columns.start for _, columns in self.groups())
        parts = self.columns.parts
        memory = self.new(min(self.rows, self.plan.rows) * parts * widest, dtype=dtype)

        def tile(rows: slice, columns: slice) -> Tensor:
            shape = (rows.stop - rows.start, parts, columns.stop - columns.start)
            return memory[: shape[0] * parts * shape[2]].view(shape)

        return tile

    def buffers(self, with_grad: bool, stash: Tensor) -> tuple[Buffer, Buffer]:
        """Return what gives the memory of a tile's projection and that of its gradient."""

        def nothing(rows: slice, columns: slice) -> None:
            return None

        if stash.numel():
            stashed, _ = self.views(stash)

            def kept(rows: slice, columns: slice) -> Tensor:
                return stashed[rows, :, columns]

            return nothing if self.makes_projection else kept, kept
        z = nothing if self.makes_projection else self.tile_memory(self.result)
        if not with_grad:
            return z, nothing
        return z, self.tile_memory(self.operand) if self.own_grad else z

    def views(self, stash: Tensor) -> tuple[Tensor, Tensor | None]:
        """See a flat stash as the tiles ``(N, P, D)`` and the teachers' part ``(N, Q, T)``."""
        size = self.columns.parts * self.rows * self.bounds[-1]
        columns = stash[:size].view(self.rows, self.columns.parts, self.bounds[-1])
        if self.teachers is None:
            return columns, None
        return columns, stash[size:].view(self.rows, -1, len(self.dims))

    def project_teachers(self, x: Tensor, rows: slice, stash: Tensor) -> Tensor | None:
        """Make the mode logits of a row block, in the stash if there is one."""
        if self.teachers is None:
            return None
        kept = self.views(stash)[1] if stash.numel() else None
        shape = (x.shape[-2], self.teachers.parts, len(self.dims))
        out = self.new(*shape) if kept is None else kept[rows]
        self.teachers.project(x, slice(0, len(self.dims)), out)
        return out

    def matrix(self, coefficient: Tensor | None, sink: "Sink | None", stash: Tensor) -> Tensor:
        """Run every tile; with a coefficient, hand the tiles' gradients to the sink."""
        matrix = [self.new(0, len(self.dims))] if self.rows == 0 else []
        z, grad = self.buffers(coefficient is not None, stash)
        for rows, x in self.row_blocks():
            logits = self.project_teachers(x, rows, stash)
            strip = []
            for group, columns in self.groups():
                tile = Tile(
                    self.of(group, x),
                    z(rows, columns),
                    grad(rows, columns),
                    None if logits is None else logits[..., group],
                    None if self.mask is None else self.mask[rows, group],
                    None if coefficient is None else coefficient[rows, group],
                    self.target[rows, columns],
                    self.dims[group],
                    group,
                    columns,
                )
                part, sums = self.kernel(tile)
                strip.append(part)
                if sink is not None and tile.grad is not None:
                    sink.take_columns(tile.grad, tile.x, rows, group, columns, sums)
            matrix.append(_joined(strip, 1))
            if sink is not None:
                sink.take_teachers(logits, x, rows)
        return _joined(matrix, 0)

    def from_stash(self, grad: Tensor, stash: Tensor, sink: "Sink") -> None:
        """Scale the stashed unit gradients and hand them to the sink."""
        stashed, stashed_logits = self.views(stash)
        memory = self.tile_memory(self.operand)
        for rows, x in self.row_blocks():
            scale = grad[rows].to(self.result)
            if self.mask is not None:  # what is not counted may hold anything, and 0 * inf is NaN
                scale = scale.masked_fill(~self.mask[rows], 0.0)
            for group, columns in self.groups():
                spread = expand_columns(scale[:, group], self.dims[group]).unsqueeze(1)
                scaled = torch.mul(stashed[rows, :, columns], spread, out=memory(rows, columns))
                sink.take_columns(scaled, self.of(group, x), rows, group, columns)
            logits = None if stashed_logits is None else stashed_logits[rows] * scale.unsqueeze(1)
            sink.take_teachers(logits, x, rows)


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), dim)


class Sink:
    """Where the tiles' gradients go: the gradients of input, layers and biases."""

    def __init__(self, call: Call, wanted: Sequence[bool]) -> None:
        self.call = call
        to_input, to_weight, to_bias, *self.to_teachers = wanted
        single = call.once and len(call.plan.groups) == 1 and call.teachers is None
        dtype = call.operand if single and call.operand == call.input.dtype else call.result
        self.input_grad = empty(call.input, dtype, call.rows) if to_input else None
        call.columns.want(to_weight, to_bias, call.rows, call.once)
        if call.teachers is not None:
            to_weight, to_bias = self.to_teachers
            call.teachers.want(to_weight, to_bias, call.rows, call.once)

    def take_columns(
        self,
        grad: Tensor,
        x: Tensor,
        rows: slice,
        group: slice,
        columns: slice,
        sums: Tensor | None = None,
    ) -> None:
        """Take a tile's gradient, and its sums over rows if they are known."""
        layer, shared = self.call.columns, self.call.shared
        layer.accumulate(grad, x, columns, rows.start == 0, sums)
        if self.input_grad is not None:
            out = self.call.of(group, self.input_grad)[..., rows, :]
            layer.input_grad(grad, x, columns, out, first=columns.start == 0 or not shared)

    def take_teachers(self, logits: Tensor | None, x: Tensor, rows: slice) -> None:
        """Take the gradient of a row block's mode logits."""
        layer = self.call.teachers
        if layer is None or logits is None:
            return
        grad, columns = logits.to(self.call.operand), slice(0, len(self.call.dims))
        layer.accumulate(grad, x, columns, rows.start == 0, logits.sum(0))
        if self.input_grad is not None:
            layer.input_grad(grad, x, columns, self.input_grad[..., rows, :], first=False)

    def gradients(self) -> tuple[Tensor, ...]:
        """Return the gradients; one that is not wanted is an empty tensor."""
        call, like = self.call, self.call.input
        teachers = tuple(like.new_empty(0) for _ in self.to_teachers)
        if call.teachers is not None:
            teachers = call.teachers.gradients()
        return finished(self.input_grad, like), *call.columns.gradients(), *teachers


def implement(loss: Loss, make_call: Callable[[Sequence[Any]], Call]) -> None:
    """Register the operators of a ``linear_*`` loss, for CPU and GPU alike.

    Args:
        loss: the loss, whose last arguments are the workspace and whether to stash.
        make_call: makes the call that arguments ask for.
    """

    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        call, keep = make_call(args), args[-1]
        layers = [layer for layer in (call.columns, call.teachers) if layer is not None]
        width = sum(layer.weight[..., 0].numel() for layer in layers)
        stash = call.new(call.rows * width if keep else 0)
        unit = torch.ones((), dtype=call.result, device=stash.device) if keep else None
        coefficient = None if unit is None else unit.expand(call.rows, len(call.dims))
        return call.matrix(coefficient, None, stash), stash

    def shaped(sink: Sink, args: Sequence[Any]) -> tuple[Tensor, ...]:
        """Give gradients the shapes of their arguments, whose leading dimensions calls flatten."""
        rows = zip(sink.gradients(), loss.differentiable, args[-1], strict=True)
        return tuple(
            grad.view(args[at].shape) if wanted and args[at] is not None else grad
            for grad, at, wanted in rows
        )

    def backward(grad: Tensor, saved: Tensor, *args: Any) -> tuple[Tensor, ...]:
        call = make_call(args[:-1])
        sink = Sink(call, args[-1])
        if saved.numel():
            call.from_stash(grad, saved, sink)
        else:
            call.matrix(grad, sink, saved)
        return shaped(sink, args)

    def value_and_grad(coefficient: Tensor, *args: Any) -> tuple[Tensor, ...]:
        call = make_call(args[:-1])
        sink = Sink(call, args[-1])
        matrix = call.matrix(coefficient, sink, call.new(0))
        return matrix, *shaped(sink, args)

    for device in ("CPU", "CUDA"):
        loss.implement(device, forward=forward, backward=backward, value_and_grad=value_and_grad)
