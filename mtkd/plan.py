"""Tiles for losses fused with a linear layer: shapes and a byte budget in, tiles out.

The projection ``(P, N, D)`` of P parts (a mean and a log standard deviation are two) is never
held whole: it is made a tile of rows and whole teachers at a time. Teachers stay whole because
mixtures, norms and softmaxes need all columns of a teacher at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

GOOD_ROWS = 2048  # a CPU's GEMMs run near their peak from about this many rows
GOOD_COLUMNS = 2048  # and columns, all parts counted; the tile stays in a shared cache
WIDE_COLUMNS = 2048  # that a GPU's GEMMs want before they have more rows
FLOAT_BYTES = 4


@dataclass(frozen=True)
class Plan:
    """Rows a tile, and the groups of teachers ``(first, last + 1)`` that tiles are made of."""

    rows: int
    groups: tuple[tuple[int, int], ...]


@lru_cache(256)
def tiles(
    rows: int,
    dims: tuple[int, ...],
    parts: int,
    workspace: int,
    item: int = FLOAT_BYTES,
    fill: bool = False,
) -> Plan:
    """Choose the tiles of a projection.

    Args:
        rows: number of rows N.
        dims: width of each teacher.
        parts: columns made for each teacher column.
        workspace: bytes that a tile may take; when a single row of the widest teacher takes
            more, tiles have one row.
        item: bytes a number.
        fill: take all the workspace, as a GPU wants it: all rows while `WIDE_COLUMNS` fit beside
            them, so that gradients of weights are written once; else a tile good for a cache.

    Returns:
        Rows a tile, at most `rows` and at least 1, and groups that cover all teachers in order.

    Example:
        >>> tiles(8192, (1024,) * 4, parts=2, workspace=64 << 20)
        Plan(rows=2048, groups=((0, 1), (1, 2), (2, 3), (3, 4)))
        >>> tiles(64, (64,) * 256, parts=2, workspace=64 << 20)
        Plan(rows=64, groups=((0, 256),))
        >>> tiles(8192, (1024,) * 4, parts=2, workspace=256 << 20, item=6, fill=True)
        Plan(rows=8192, groups=((0, 2), (2, 4)))
    """
    if fill:
        wanted, good = min(parts * sum(dims), WIDE_COLUMNS), workspace
        height = max(1, min(rows, workspace // (wanted * item)))
        height = max(1, -(-rows // -(-rows // height)))  # blocks of one size, no small last one
    else:
        height = max(1, min(rows, GOOD_ROWS))
        # few rows leave room for wider tiles: fewer, larger GEMMs in the bytes of a good tile
        good = min(workspace, GOOD_ROWS * GOOD_COLUMNS * item)
    width = max(1, good // (height * parts * item))
    groups = _balanced(dims, width)
    widest = max(sum(dims[first:last]) for first, last in groups)
    height = max(1, min(height, workspace // (widest * parts * item)))
    return Plan(height, groups)


def stash_fits(rows: int, width: int, workspace: int, item: int = FLOAT_BYTES) -> bool:
    """Whether the gradient of the whole projection, `width` numbers a row, fits the budget.

    Backward has a scaled tile beside it, and the tile's factors: as much again, twice, at most.
    """
    return 3 * rows * width * item <= workspace


def _balanced(dims: Sequence[int], width: int) -> tuple[tuple[int, int], ...]:
    """Group as few times as the width allows, into groups of about one size."""
    groups = _group(dims, width)
    even = _group(dims, -(-sum(dims) // len(groups)))
    return even if len(even) == len(groups) else groups


def _group(dims: Sequence[int], width: int) -> tuple[tuple[int, int], ...]:
    groups, first, filled = [], 0, 0
    for teacher, dim in enumerate(dims):
        if filled and filled + dim > width:
            groups.append((first, teacher))
            first, filled = teacher, 0
        filled += dim
    return (*groups, (first, len(dims)))
