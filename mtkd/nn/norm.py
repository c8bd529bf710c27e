"""Running mean and standard deviation of every teacher's columns."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..functional.checks import check_dims, check_shape, check_tensor
from ..reference.columns import accumulate_dtype, expand_columns, segment_sum


class TeacherNorm(nn.Module):
    r"""Standardise teachers: ``(target - shift) * scale``, by statistics of all targets seen.

    In training mode a call first merges its batch into the statistics, exactly (count, mean and
    sum of squared deviations, in float64), then standardises with them; in evaluation mode it
    only standardises. Raw targets make likelihoods and bounds depend on the teachers' units.

    .. math:: \text{shift} = \mathrm{mean}(t), \quad
        \text{scale} = 1 / \sqrt{\mathrm{var}(t) + \text{eps}}

    Args:
        dims: the width of each teacher.
        eps: keeps the scale of a constant column finite.

    Shape:
        - target: ``(*, D)`` with ``D = sum(dims)``; mask: ``(*, T)`` bool, True counts.
        - Returns ``(*, D)`` in float32, or float64 for float64 targets. Buffers `shift` and
          `scale` are ``(D,)`` and saved with the model.

    Raises:
        ValueError: widths or shapes that do not fit.
        TypeError: not a floating-point tensor.

    Note:
        Masked entries, and entries of a row and teacher that hold a NaN or an infinity, do not
        enter the statistics. Nothing is synchronised with the host.

    Source:
        Chan, Golub, LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
        Variances", 1979: the merging of statistics.

    Example:
        >>> import torch
        >>> norm = TeacherNorm((3, 5))
        >>> target = 7 + 2 * torch.randn(1000, 8)
        >>> standard = norm(target)
        >>> bool(standard.mean().abs() < 1e-3), bool((standard.std() - 1).abs() < 1e-2)
        (True, True)
    """

    shift: Tensor
    scale: Tensor
    count: Tensor
    mean: Tensor
    deviations: Tensor

    def __init__(self, dims: Sequence[int], *, eps: float = 1e-5) -> None:
        super().__init__()
        self.dims = check_dims(dims, sum(dims), "target")
        self.eps = eps
        width = sum(self.dims)
        self.register_buffer("shift", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.register_buffer("count", torch.zeros(len(self.dims), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(width, dtype=torch.float64))
        self.register_buffer("deviations", torch.zeros(width, dtype=torch.float64))

    def forward(self, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the standardised target; in training mode, learn from it first."""
        check_tensor("target", target, self.shift.device)
        check_shape("target", target, (*target.shape[:-1], self.shift.numel()))
        if mask is not None:
            check_shape("mask", mask, (*target.shape[:-1], len(self.dims)))
        if self.training:
            self.update(target, mask)
        dtype = accumulate_dtype(target)
        return (target.to(dtype) - self.shift.to(dtype)) * self.scale.to(dtype)

    @torch.no_grad()
    def update(self, target: Tensor, mask: Tensor | None = None) -> None:
        """Merge a batch's statistics into the running ones."""
        rows = target.reshape(-1, target.shape[-1]).to(self.mean.dtype)
        counted = segment_sum((~rows.isfinite()).to(rows.dtype), self.dims) == 0
        if mask is not None:
            counted = counted & mask.reshape(-1, len(self.dims))
        columns = expand_columns(counted, self.dims)
        count = counted.sum(0).to(rows.dtype)
        total, per_column = self.count + count, expand_columns(count, self.dims)
        mean = torch.where(columns, rows, 0.0).sum(0) / per_column.clamp(min=1.0)
        deviations = torch.where(columns, rows - mean, 0.0).square().sum(0)
        step, all_columns = mean - self.mean, expand_columns(total, self.dims).clamp(min=1.0)
        before = expand_columns(self.count, self.dims)
        self.deviations += deviations + step.square() * before * per_column / all_columns
        self.mean += step * per_column / all_columns
        self.count.copy_(total)
        seen = expand_columns(total, self.dims) > 0
        variance = self.deviations / all_columns
        self.shift.copy_(self.mean)
        self.scale.copy_(torch.where(seen, torch.rsqrt(variance + self.eps), 1.0))

    def extra_repr(self) -> str:
        """Describe the teachers."""
        return f"teachers={len(self.dims)}, width={sum(self.dims)}, eps={self.eps}"
