"""Votes of messages."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from mtkd.triton import consensus

from .common import COMMON, EVERY, Configuration


class Messages(NamedTuple):
    """Messages of dense maps, and how they vote."""

    name: str
    count: int
    trim: float = 0.5
    kernel: int = 0
    weight: str = ""  # of messages, or of their elements
    scaled: bool = False
    shape: tuple[int, ...] = (8, 3, 256, 256)
    dtypes: tuple[torch.dtype, ...] = COMMON

    def vote(self, dtype: torch.dtype) -> Callable[[], Any]:
        """The launcher."""
        new = partial(torch.empty, device="meta", dtype=dtype)
        wide = partial(new, dtype=torch.promote_types(dtype, torch.float32))
        messages = [new(self.shape) for _ in range(self.count)]
        every = (self.count, *self.shape)
        weight = {
            "": None,
            "messages": wide(self.count, 1, 1, 1, 1).expand(every),
            "elements": wide(every),
        }[self.weight]
        scale = [wide(self.shape), wide(self.shape)] if self.scaled else [None, None]
        start = new(self.shape) if self.scaled else None
        settings = None, True, self.trim, self.kernel, 0.5, 2
        return partial(consensus.consensus, messages, weight, start, *scale, *settings)


MESSAGES = (
    Messages("consensus-median", 13, dtypes=EVERY),
    Messages("consensus-weighted-median", 13, weight="messages"),
    Messages("consensus-mean", 6, trim=0.0, weight="elements"),
    Messages("consensus-trimmed", 8, trim=0.25, shape=(5, 3, 7, 11), dtypes=EVERY),
    Messages("consensus-cshift", 13, kernel=2, scaled=True),
    Messages("consensus-mean-shift", 13, trim=0.0, kernel=3, weight="elements", dtypes=EVERY),
    Messages("consensus-most", 16, kernel=1, weight="elements", dtypes=(torch.float32,)),
)


def consensus_configurations() -> Iterator[Configuration]:
    """Every vote, up to as many messages as the kernel takes."""
    for case in MESSAGES:
        for dtype in case.dtypes:
            yield f"{case.name} {str(dtype).removeprefix('torch.')}", case.vote(dtype)
