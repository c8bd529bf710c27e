"""Sums of the matrices between two logs, a teacher each, on the device."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .objectives import columns


class Meter:
    """Sums of rows and counts; a step's are pending until it is known to be good."""

    def __init__(self) -> None:
        self.total: dict[str, Tensor] = {}
        self.pending: dict[str, Tensor] = {}

    def add(self, matrices: Mapping[str, Tensor], mask: Tensor) -> None:
        """Add a part of a step."""
        for name, matrix in matrices.items():
            counts = columns(mask, matrix)
            counted = torch.where(counts, matrix.detach().double(), 0.0)
            both = torch.stack([counted.sum(0), counts.sum(0).double()])
            self.pending[name] = self.pending.get(name, 0.0) + both

    def drop(self) -> None:
        """Forget the step."""
        self.pending = {}

    def commit(self) -> None:
        """Count the step in."""
        for name, both in self.pending.items():
            self.total[name] = self.total.get(name, 0.0) + both
        self.pending = {}

    def take(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """Return each column's sum and count over all processes, and begin anew."""
        taken = {name: reduce(both).cpu() for name, both in self.total.items()}
        self.total = {}
        return {name: (both[0], both[1]) for name, both in taken.items()}
