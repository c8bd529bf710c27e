"""What ranks send each other: blocks of one tensor, one a rank, differentiably."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup


def place(group: ProcessGroup | None) -> tuple[int, int]:
    """Return this process's rank and how many there are; 0 and 1 without torch.distributed."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    rank, ranks = distributed.get_rank(group), distributed.get_world_size(group)
    if rank < 0:
        raise ValueError("group: expected a process group that this process is in, got another")
    return rank, ranks


def tell(numbers: Sequence[int], last: Tensor, group: ProcessGroup | None) -> Any:
    """Return the numbers of every rank, a list each, which ends with the 0-dim tensor `last`."""
    _, ranks = place(group)
    own = torch.cat([torch.tensor(numbers, device=last.device), last.view(1)])
    if ranks == 1:
        return [own.tolist()]
    every = [torch.empty_like(own) for _ in range(ranks)]
    distributed.all_gather(every, own, group=group)
    return torch.stack(every).tolist()


def exchange(
    blocks: Sequence[Tensor], shapes: Sequence[Sequence[int]], group: ProcessGroup | None
) -> list[Tensor]:
    """Send block r to rank r; return what came from each rank, of these shapes."""
    if len(blocks) == 1:
        return list(blocks)
    sent = torch.cat([block.reshape(-1) for block in blocks])
    return _travel(sent, [block.numel() for block in blocks], shapes, group)


def gather(rows: Tensor, counts: Sequence[int], group: ProcessGroup | None) -> Tensor:
    """Return the rows ``(n, H)`` of all ranks, of which each has so many, in their order.

    The gradient of a rank's rows is the sum of what all ranks send back.
    """
    if len(counts) == 1:
        return rows
    copies = rows.reshape(-1).expand(len(counts), -1).reshape(-1)  # one sum in backward, not many
    shapes = [(count, rows.shape[1]) for count in counts]
    return torch.cat(_travel(copies, [rows.numel()] * len(counts), shapes, group))


def _travel(
    sent: Tensor, sizes: list[int], shapes: Sequence[Sequence[int]], group: ProcessGroup | None
) -> list[Tensor]:
    incoming = [prod(shape) for shape in shapes]
    received: Tensor = _Exchange.apply(sent, sizes, incoming, group)  # type: ignore[no-untyped-call]
    pairs = zip(received.split(incoming), shapes, strict=True)
    return [part.view(*shape) for part, shape in pairs]


class _Exchange(torch.autograd.Function):
    """All-to-all of a flat tensor, whose gradient goes the way back."""

    @staticmethod
    def forward(
        ctx: Any, sent: Tensor, sizes: list[int], incoming: list[int], group: ProcessGroup | None
    ) -> Tensor:
        ctx.sizes, ctx.incoming, ctx.group = sizes, incoming, group
        received = sent.new_empty(sum(incoming))
        distributed.all_to_all_single(received, sent.contiguous(), incoming, sizes, group)
        return received

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        way = grad.contiguous(), ctx.incoming, ctx.sizes, ctx.group
        return _Exchange.apply(*way), None, None, None  # type: ignore[no-untyped-call]
