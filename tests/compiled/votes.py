"""Votes of teachers over classes."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from mtkd.triton import votes

from .common import COMMON, EVERY, Configuration, coefficient


class Votes(NamedTuple):
    """A vote in one configuration; together, teachers have one vote with weights."""

    name: str
    rows: int
    teachers: int
    classes: int
    hard: bool = True
    together: bool = False
    masked: bool = False
    sequence: bool = False
    dtypes: tuple[torch.dtype, ...] = COMMON

    def arguments(self, dtype: torch.dtype) -> tuple[Any, ...]:
        """The operator's arguments."""
        new = partial(torch.empty, dtype=dtype, device="meta")
        columns = 1 if self.together else self.teachers
        mask = new(self.rows, columns, dtype=torch.bool) if self.masked else None
        weight = new(self.rows, self.teachers, dtype=torch.float32) if self.together else None
        teacher = [new(self.rows, self.teachers, self.classes)]
        if self.sequence:
            teacher = [new(self.rows, self.classes) for _ in range(self.teachers)]
        dims, student = (self.classes,) * columns, new(self.rows, self.classes)
        return mask, dims, student, teacher, weight, 2.0, self.hard


VOTES = (
    Votes("votes-thirty-two", 2048, 32, 1000, dtypes=EVERY),
    Votes("votes-soft", 2048, 32, 1000, hard=False, masked=True, dtypes=EVERY),
    Votes("votes-plurality", 2048, 32, 4096, together=True, dtypes=EVERY),
    Votes("votes-mean", 2048, 32, 1024, hard=False, together=True, masked=True),
    Votes("votes-sequence", 2048, 5, 1000, hard=False, sequence=True),
    Votes("votes-many", 512, 1024, 100, masked=True),
    Votes("votes-two", 8192, 3, 2),
    Votes("votes-wide", 512, 4, 150_000, masked=True, dtypes=EVERY),
    Votes("votes-wide-soft", 512, 4, 50_257, hard=False, dtypes=EVERY),
    Votes("votes-wide-plurality", 512, 8, 21_841, together=True, dtypes=EVERY),
    Votes("votes-wide-mean", 512, 8, 21_841, hard=False, together=True, sequence=True),
)


def votes_configurations() -> Iterator[Configuration]:
    """Every role in every dtype."""
    for case in VOTES:
        for dtype in case.dtypes:
            args = case.arguments(dtype)
            grad = coefficient(args[:3])
            same = grad.new_empty(()).expand(grad.shape)  # of a plain mean
            roles = {
                "forward": partial(votes.forward, *args),
                "backward": partial(votes.backward, grad, grad.new_empty(0), *args, [True]),
                "value_and_grad": partial(votes.value_and_grad, same, *args, [True]),
            }
            for role, launch in roles.items():
                yield f"{case.name} {str(dtype).removeprefix('torch.')} {role}", launch
