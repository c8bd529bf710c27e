"""The guard: a step whose loss or gradient is not finite leaves no trace, and is named."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

SHOWN = 10  # rows that a message names


class NonFiniteError(RuntimeError):
    """Too many steps had a loss or a gradient that is not finite; the message names the last."""


class Guard:
    """Remembers what a step read and what it may spoil; counts the steps that were skipped.

    Args:
        most: how many steps may be skipped before the run stops.
    """

    def __init__(self, most: int) -> None:
        if not isinstance(most, int) or most < 0:
            raise ValueError(f"max_skipped: expected an integer, 0 or more, got {most!r}")
        self.most, self.skipped = most, 0
        self._seen: list[tuple[Tensor | None, Tensor]] = []
        self._losses: list[Tensor] = []
        self.open = False  # whether a step has begun, and no one knows yet whether it is good
        self._buffers: list[tuple[nn.Module, str, Tensor, Tensor]] = []

    @torch.no_grad()
    def begin(self, model: nn.Module) -> None:
        """Keep a step's statistics as they were before it."""
        self._seen, self._losses, self.open = [], [], True
        self._buffers = [
            (module, name, buffer, buffer.clone())
            for module in model.modules()
            for name, buffer in module.named_buffers(recurse=False)
        ]

    @torch.no_grad()
    def see(
        self, rows: Tensor | None, matrices: Mapping[str, Tensor], mask: Tensor, loss: Tensor
    ) -> None:
        """Remember a loss, and which rows of it are not finite; nothing waits for the device."""
        bad = torch.stack([(~m.isfinite() & mask).any(1) for m in matrices.values()]).any(0)
        self._seen.append((rows, bad))
        self._losses.append(loss.detach())

    @torch.no_grad()
    def restore(self) -> None:
        """Put the statistics back."""
        for module, name, buffer, before in self._buffers:
            setattr(module, name, buffer.copy_(before))  # a module may have put another there
        self.open = False

    def any_bad_loss(self) -> Tensor:
        """Whether a loss of this process was not finite, 0-dim: rows of weight 0 may be so."""
        return ~torch.stack(self._losses).isfinite().all()

    def rows(self, loss_is_bad: bool) -> list[int]:
        """Return this process's rows whose losses are not finite, or all rows of the step.

        Rows without a number are counted from the step's first.
        """
        bad = torch.cat([bad for _, bad in self._seen]).cpu()
        named = [rows for rows, _ in self._seen if rows is not None]
        rows = torch.cat(named).cpu() if len(named) == len(self._seen) else torch.arange(len(bad))
        return [int(row) for row in (rows[bad] if loss_is_bad else rows)]

    def skip(self, step: int, loss_is_bad: bool) -> str:
        """Count a skipped step; return what to tell, or raise when there are too many."""
        self.skipped += 1
        rows = self.rows(loss_is_bad)
        shown = ", ".join(map(str, rows[:SHOWN])) + (", ..." if len(rows) > SHOWN else "")
        what = "loss is" if loss_is_bad else "gradient is"
        where = f"step {step}: the {what} not finite, rows {shown or 'of another process'}"
        if self.skipped > self.most:
            raise NonFiniteError(
                f"{where}; {self.skipped} steps were skipped, more than max_skipped={self.most}"
            )
        return f"{where}; the step is skipped, {self.skipped} so far"
