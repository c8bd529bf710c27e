"""Which dimension of a parameter FSDP shards."""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.distributed.tensor import Shard


def shard_evenly(ranks: int) -> Callable[[nn.Parameter], Any]:
    """Return a `shard_placement_fn` for `torch.distributed.fsdp.fully_shard`.

    FSDP shards the first dimension. That of Gaussian heads' last layer is 2, means and log
    standard deviations, so that beyond two ranks the others would hold nothing of it.

    Args:
        ranks: how many ranks a parameter is sharded over.

    Returns:
        A function of a parameter: None, the first dimension, where that is at least `ranks`; else
        the largest dimension that `ranks` divide, if there is one.

    Example:
        >>> import torch
        >>> from mtkd.distributed import shard_evenly
        >>> shard_evenly(8)(torch.nn.Parameter(torch.empty(2, 100, 768)))
        Shard(dim=2)
    """

    def place(parameter: nn.Parameter) -> Any:
        if not parameter.dim() or len(parameter) >= ranks:
            return None
        sizes = [size if size % ranks == 0 else 0 for size in parameter.shape]
        return Shard(sizes.index(max(sizes))) if any(sizes) else None

    return place
