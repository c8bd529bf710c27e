"""The one driver of every loss fused with a linear layer (``linear_*``).

Multiplying out the layer would make tensors ``(N, P, D)`` with P parts: gigabytes for wide
students or many teachers. The driver makes them a tile of rows and whole teachers at a time; a
tile is turned into its own gradient, and GEMMs take that straight to the gradients of input,
weight and bias. Projections and residuals are float32 (float64 for float64) whatever the inputs
are: a 16-bit residual would spoil the gradient of a student that is close. On a GPU the operands
of GEMMs, the projection's gradient among them, stay 16-bit where input and weight are.

Modes: *stream* makes the gradients together with the value (3 GEMMs; sum and mean). With
reduction "none" the gradient of the matrix is not known in forward: *stash* keeps the tiles'
unit gradients if they fit the workspace (3 GEMMs), *recompute* makes the tiles again (4 GEMMs).

`layers` has the GEMMs and their precision, `driver` the tiles, `gaussian` what one family brings;
this file the workspace that they share.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from .. import plan

_workspace = 256 << 20


@contextmanager
def workspace(size: int) -> Iterator[None]:
    """Set the bytes that ``linear_*`` losses may use beside inputs, outputs and gradients.

    Applies to the whole process while the context is open; the default is 256 MiB. A backward
    pass uses what its forward pass was given. The least that a call takes is one row of its
    widest teacher. Not counted are sums of gradients that are wider than their dtype, and on a
    CPU the 16-bit rows and weights of a tile, widened.

    Args:
        size: bytes, a positive integer.

    Raises:
        TypeError: a size that is no integer.
        ValueError: a size that is not positive.

    Example:
        >>> import mtkd.linear
        >>> with mtkd.linear.workspace(64 << 20):
        ...     pass  # losses called here tile for 64 MiB
    """
    global _workspace
    if not isinstance(size, int):
        raise TypeError(f"size: expected an integer number of bytes, got {size!r}")
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


from . import alignment as alignment  # noqa: E402  registers its operators
from . import divergence as divergence  # noqa: E402
from . import gaussian as gaussian  # noqa: E402
