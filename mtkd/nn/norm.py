"""Running mean and standard deviation of every teacher's columns."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..functional.checks import check_tensor
from ..reference.columns import accumulate_dtype, expand_columns, segment_sum
from .teachers import Teachers, Tensors, check_mask

_Tensors = TypeVar("_Tensors", bound=Tensors)
# Numbers that `update` turns into float64 at a time: they should stay in a CPU's caches.
_BLOCK = {"cpu": 1 << 18}
_LARGE_BLOCK = 1 << 24


class TeacherNorm(nn.Module):
    r"""Standardise every column of the teachers by the statistics of all targets seen.

    .. math:: \frac{t - \text{shift}}{1 / \text{scale}}, \quad \text{shift} = \mathrm{mean}(t),
        \quad \text{scale} = 1 / \sqrt{\mathrm{var}(t) + \text{eps}}

    In training mode a call first merges its batch into the statistics, then standardises with
    them; in evaluation mode it standardises only. Raw targets would make a likelihood depend on
    the teachers' units.

    Args:
        dims: the width of each teacher, or a mapping name -> width.
        eps: added to the variances: a constant column gets the scale ``1 / sqrt(eps)``.

    Shape:
        - target: ``(*, D)`` with ``D = sum(dims)``, or ``(*, D_t)`` a teacher in a sequence or,
          when `dims` is a mapping, a mapping by name; mask ``(*, T)`` bool, True counts.
        - Returns tensors of the same shapes, in the same structure.
        - Buffers `shift` and `scale`: ``(D,)``.

    Returns:
        float32, or float64 for a float64 target: 0 mean and variance 1 for what has been seen.

    Raises:
        ValueError: widths, shapes or devices that do not fit.
        TypeError: not a floating-point tensor, a mask that is not bool.

    Note:
        The statistics are exact for any split into batches: the count, the mean and the sum of
        squared deviations, merged in float64; ``module.to(dtype)`` leaves them as they are.
        Masked entries, and a teacher's row with a NaN or an infinity, stay out of them, whatever
        they hold. Nothing synchronises with the host. Variances divide by the count.

    Source:
        Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
        Variances", 1979.

    Example:
        >>> import torch
        >>> from mtkd.nn import TeacherNorm
        >>> norm = TeacherNorm((1, 2))
        >>> norm(torch.tensor([[1.0, 0.0, 5.0], [3.0, 4.0, 5.0]]))
        tensor([[-1., -1.,  0.],
                [ 1.,  1.,  0.]])
        >>> norm.eval()(torch.tensor([2.0, 2.0, 5.0]))
        tensor([0., 0., 0.])
    """

    shift: Tensor
    scale: Tensor
    count: Tensor
    mean: Tensor
    deviations: Tensor

    def __init__(self, dims: Sequence[int] | Mapping[str, int], *, eps: float = 1e-8) -> None:
        super().__init__()
        if not eps > 0:
            raise ValueError(f"eps: expected a positive number, got {eps}")
        self.teachers, self.eps = Teachers.of(dims), eps
        width, teachers = sum(self.teachers.dims), len(self.teachers.dims)
        self.register_buffer("shift", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.register_buffer("count", torch.zeros(teachers, dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(width, dtype=torch.float64))
        self.register_buffer("deviations", torch.zeros(width, dtype=torch.float64))

    def forward(self, target: _Tensors, mask: Tensor | None = None) -> _Tensors:
        """Return the standardised target; in training mode, learn from it first."""
        if self.training:
            self.update(target, mask)

        def standardise(tensor: Tensor, _: slice, columns: slice) -> Tensor:
            check_tensor("target", tensor, self.shift.device)
            dtype = accumulate_dtype(tensor)
            shift = self.mean if dtype == torch.float64 else self.shift
            shift, scale = (buffer[columns].to(dtype) for buffer in (shift, self.scale))
            return (tensor.to(dtype) - shift) * scale

        return self.teachers.map(standardise, "target", target)  # type: ignore[no-any-return]

    @torch.no_grad()
    def update(self, target: Tensors, mask: Tensor | None = None) -> None:
        """Merge a batch into the statistics."""

        def merge(tensor: Tensor, teachers: slice, columns: slice) -> Tensor:
            check_tensor("target", tensor, self.shift.device)
            check_mask(mask, (*tensor.shape[:-1], len(self.teachers.dims)), self.shift.device)
            rows = tensor.reshape(-1, tensor.shape[-1])
            counted = None if mask is None else mask[..., teachers].flatten(0, -2)
            size = max(1, _BLOCK.get(rows.device.type, _LARGE_BLOCK) // rows.shape[1])
            for start in range(0, rows.shape[0], size):
                part = None if counted is None else counted[start : start + size]
                self._merge(rows[start : start + size].double(), part, teachers, columns)
            return tensor

        self.teachers.map(merge, "target", target)
        seen = expand_columns(self.count, self.teachers.dims)
        variance = self.deviations / seen.clamp(min=1)
        self.shift.copy_(self.mean)
        self.scale.copy_(torch.where(seen > 0, torch.rsqrt(variance + self.eps), 1.0))

    def _merge(self, rows: Tensor, mask: Tensor | None, teachers: slice, columns: slice) -> None:
        dims = self.teachers.dims[teachers]
        counted = segment_sum(rows, dims).isfinite()  # a NaN or infinity spoils its sum
        if mask is not None:
            counted = counted & mask
        spread, count = expand_columns(counted, dims), counted.sum(0)
        counts = (self.count[teachers].double(), count.double())
        old, new = (expand_columns(each, dims) for each in counts)
        mean = torch.where(spread, rows, 0.0).sum(0) / new.clamp(min=1)
        deviations = torch.where(spread, rows - mean, 0.0).square_().sum(0)
        step, share = mean - self.mean[columns], new / (old + new).clamp(min=1)
        self.deviations[columns] += deviations + step.square() * old * share
        self.mean[columns] += step * share
        self.count[teachers] += count

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "TeacherNorm":
        """Follow a change of device but not of dtype, which would spoil the statistics."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in self.named_buffers(recurse=False):
            if buffer.dtype != before[name].dtype:
                setattr(self, name, before[name].to(buffer.device))
        return self

    def extra_repr(self) -> str:
        """Describe the teachers."""
        return f"teachers={len(self.teachers.dims)}, width={self.shift.numel()}, eps={self.eps}"
