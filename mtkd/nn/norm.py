"""Standardisation of every teacher's columns by running, batch or given statistics."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ..functional.checks import check_tensor
from ..reference.columns import accumulate_dtype, expand_columns
from .moments import Estimator, Moments
from .teachers import Tensors

_Tensors = TypeVar("_Tensors", bound=Tensors)
_MODES = ("cumulative", "running", "batch", "fixed")


@dataclass(frozen=True)
class CosineMomentum:
    r"""A momentum that falls along half a cosine from `start` to `end` within `steps` updates.

    Source:
        Sariyildiz et al., "UNIC", ECCV 2024, arXiv 2408.05088, whose ends are the defaults.

    Example:
        >>> import torch
        >>> from mtkd.nn.norm import CosineMomentum
        >>> momentum = CosineMomentum(100)
        >>> [round(momentum(torch.tensor(float(step))).item(), 4) for step in (0, 50, 100, 200)]
        [1.0, 0.5005, 0.001, 0.001]
    """

    steps: int
    start: float = 1.0
    end: float = 0.001

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps: expected a positive number, got {self.steps}")

    def __call__(self, step: Tensor) -> Tensor:
        """Momentum of an update that comes after `step` others; both 0-dim on the device."""
        progress = (step / self.steps).clamp(max=1.0)
        return self.end + (self.start - self.end) * (1 + torch.cos(math.pi * progress)) / 2


class TeacherNorm(Estimator):
    r"""Standardise every column of the teachers: subtract a mean, divide by a deviation.

    .. math:: (t - \text{shift}) \cdot \text{scale}, \quad \text{shift} = \mu,
        \quad \text{scale} = 1 / \sqrt{\sigma^2 + \text{eps}}

    Raw targets would make a loss depend on the teachers' units. What mean and deviation are,
    in training mode, says `mode`; in evaluation mode they are what has been learnt.

    - ``"cumulative"``: exact statistics of all rows so far, this batch's among them.
    - ``"running"``: exponential moving averages of the batches' means and standard deviations
      (not variances), :math:`\mu \leftarrow (1 - m) \mu + m \mu_\text{batch}`, from 0 and 1, as
      they were before this batch. UNIC's rule.
    - ``"batch"``: this batch's own; for evaluation the averages of "running". DUNE's rule.
    - ``"fixed"``: given to `TeacherNorm.fixed`, or found by `estimate` in one pass over a store.

    `mtkd.nn.PhiS` mixes a teacher's columns too.

    Args:
        dims: the width of each teacher, or a mapping name -> width.
        mode: see above.
        momentum: m, the weight of a new batch in "running" and "batch", or a function that takes
            the number of updates so far, a 0-dim tensor, such as `CosineMomentum`.
        eps: added to the variances: a constant column gets the scale ``1 / sqrt(eps)``.
        sync: whether statistics are those of all ranks where torch.distributed is initialised;
            every rank must then make the same calls.

    Shape:
        - target: ``(*, D)`` with ``D = sum(dims)``, or ``(*, D_t)`` a teacher in a sequence or,
          when `dims` is a mapping, a mapping by name; mask ``(*, T)`` bool, True counts.
        - Returns tensors of the same shapes, in the same structure.
        - Buffers `shift` and `scale`: ``(D,)``, of the present statistics.

    Returns:
        float32, or float64 for a float64 target: mean 0 and variance 1 under the statistics.

    Raises:
        ValueError: widths, shapes or devices that do not fit, an unknown mode.
        TypeError: not a floating-point tensor, a mask that is not bool.

    Note:
        Statistics are the count, the mean and the sum of squared deviations, merged in float64:
        exact for any split into batches, blocks and ranks. Ranks exchange two tensors of ``T + D``
        and ``D`` numbers, never embeddings. Nothing synchronises with the host. A batch is read
        twice to learn from it and once to standardise; `affine` saves the latter where the loss
        takes shift and scale. Masked entries, and a teacher's row with a NaN or an infinity, stay
        out, whatever they hold. "cumulative" and "fixed" divide variances by the count, "running"
        and "batch" by one less, as torch.std and the authors do; a teacher with fewer than two
        rows in a batch keeps its averages, and takes them for that batch. The count of updates, on
        which a schedule depends, is a buffer too. ``module.to(dtype)`` leaves all buffers.

    Source:
        Running: Sariyildiz et al., "UNIC", ECCV 2024, arXiv 2408.05088. Batch: Sariyildiz et al.,
        "DUNE", CVPR 2025, arXiv 2503.14405. Their eps guard a deviation, ours a variance.

    Example:
        >>> import torch
        >>> import mtkd.functional as F
        >>> from mtkd.nn import TeacherNorm
        >>> target = torch.tensor([[1.0, 0.0, 5.0], [3.0, 4.0, 5.0]])
        >>> norm = TeacherNorm((1, 2))
        >>> norm(target)
        tensor([[-1., -1.,  0.],
                [ 1.,  1.,  0.]])
        >>> norm.eval()(torch.tensor([2.0, 2.0, 5.0]))
        tensor([0., 0., 0.])
        >>> running = TeacherNorm((1, 2), mode="running", momentum=0.5)
        >>> shift, scale = running.affine(target)  # then the standardised target is never written
        >>> loss = F.alignment(torch.zeros(2, 3), target, (1, 2), shift=shift, scale=scale)
        >>> running.shift
        tensor([1.0000, 1.0000, 2.5000])
    """

    shift: Tensor
    scale: Tensor
    count: Tensor
    deviations: Tensor
    std: Tensor
    updates: Tensor

    def __init__(
        self,
        dims: Sequence[int] | Mapping[str, int],
        mode: str = "cumulative",
        *,
        momentum: float | Callable[[Tensor], Tensor] = 0.1,
        eps: float = 1e-8,
        sync: bool = True,
    ) -> None:
        super().__init__(dims, eps, sync)
        if mode not in _MODES:
            also = "; phi_s is mtkd.nn.PhiS" if mode == "phi_s" else ""
            raise ValueError(f"mode: expected one of {', '.join(_MODES)}, got {mode!r}{also}")
        if not callable(momentum) and not 0 <= momentum <= 1:
            raise ValueError(f"momentum: expected a number from 0 to 1, got {momentum}")
        self.mode, self.momentum = mode, momentum
        self.averaged = mode in ("running", "batch")
        width = sum(self.teachers.dims)
        self.register_buffer("shift", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        if self.averaged:
            self.register_buffer("std", torch.ones(width, dtype=torch.float64))
            self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        else:
            count = torch.zeros(len(self.teachers.dims), dtype=torch.int64)
            self.register_buffer("count", count)
            self.register_buffer("deviations", torch.zeros(width, dtype=torch.float64))

    @classmethod
    def fixed(
        cls,
        dims: Sequence[int] | Mapping[str, int],
        mean: Tensors,
        std: Tensors,
        *,
        eps: float = 1e-8,
    ) -> "TeacherNorm":
        """Standardise by given means and standard deviations, ``(D,)`` or ``(D_t,)`` a teacher.

        Example:
            >>> import torch
            >>> from mtkd.nn import TeacherNorm
            >>> norm = TeacherNorm.fixed((1, 2), torch.ones(3), torch.tensor([1.0, 2.0, 4.0]))
            >>> norm(torch.tensor([3.0, 3.0, 3.0]))
            tensor([2.0000, 1.0000, 0.5000])
        """
        norm = cls(dims, "fixed", eps=eps)
        columns = [norm._columns(name, x) for name, x in (("mean", mean), ("std", std))]
        if not bool((columns[1] >= 0).all()):
            raise ValueError("std: expected no negative number and no NaN, got one")
        norm.to(columns[0].device)
        one = torch.ones(len(norm.teachers.dims), device=columns[0].device)
        norm._replace(Moments(norm.teachers.dims, one, columns[0], columns[1].square()))
        return norm

    def forward(self, target: _Tensors, mask: Tensor | None = None) -> _Tensors:
        """Return the standardised target; in training mode, learn from it as `mode` says."""
        shift, scale = self._affine(target, mask)

        def standardise(tensor: Tensor, _: slice, columns: slice) -> Tensor:
            check_tensor("target", tensor, self.mean.device)
            dtype = accumulate_dtype(tensor)
            return (tensor.to(dtype) - shift[columns].to(dtype)) * scale[columns].to(dtype)

        return self.teachers.map(standardise, "target", target)  # type: ignore[no-any-return]

    def inverse(self, output: _Tensors) -> _Tensors:
        """Return the target of which `output` is the standardised form, by present statistics."""

        def restore(tensor: Tensor, _: slice, columns: slice) -> Tensor:
            check_tensor("output", tensor, self.mean.device)
            dtype = accumulate_dtype(tensor)
            return tensor.to(dtype) / self.scale[columns].to(dtype) + self.mean[columns].to(dtype)

        return self.teachers.map(restore, "output", output)  # type: ignore[no-any-return]

    def affine(self, target: Tensors, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the shift and scale that a call would apply, and learn as a call would.

        For the losses that take ``shift=`` and ``scale=``. They are copies, ``(D,)``: later
        updates leave them alone.
        """
        shift, scale = self._affine(target, mask)
        given = self.teachers.in_order("target", target)
        dtype = accumulate_dtype(*([given] if isinstance(given, Tensor) else given))
        return shift.to(dtype, copy=True), scale.to(dtype, copy=True)

    @torch.no_grad()
    def update(self, target: Tensors, mask: Tensor | None = None) -> None:
        """Learn from a batch as in training mode; "fixed" learns as "cumulative" does."""
        self._learn(self._batch(target, mask))

    @torch.no_grad()
    def _affine(self, target: Tensors, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        if not self.training or self.mode == "fixed":
            return self.mean, self.scale
        batch = self._batch(target, mask)
        before = self.mean.clone(), self.scale.clone()
        self._learn(batch)
        if self.mode == "cumulative":
            return self.mean, self.scale
        if self.mode == "running":
            return before
        known = expand_columns(batch.counts > 1, batch.dims)
        scale = torch.rsqrt(batch.variance(1) + self.eps).to(self.scale.dtype)
        return torch.where(known, batch.means, before[0]), torch.where(known, scale, before[1])

    def _batch(self, target: Tensors, mask: Tensor | None) -> Moments:
        moments = self._measure(target, mask)
        return moments.over_ranks() if self.sync else moments

    def _learn(self, batch: Moments) -> None:
        if not self.averaged:
            past = Moments(batch.dims, self.count.double(), self.mean, self.deviations)
            self._replace(past.merge(batch))
            return
        momentum = self.momentum
        weight = momentum(self.updates.double()) if callable(momentum) else momentum
        weights = expand_columns((batch.counts > 1).double() * weight, batch.dims)
        self.mean += weights * (batch.means - self.mean)
        self.std += weights * (batch.variance(1).sqrt() - self.std)
        self.updates += 1
        self.shift.copy_(self.mean)
        self.scale.copy_(torch.rsqrt(self.std.square() + self.eps))

    def _replace(self, moments: Moments) -> None:
        seen = expand_columns(moments.counts, moments.dims) > 0
        variance = moments.variance()
        self.mean.copy_(moments.means)
        self.shift.copy_(moments.means)
        self.scale.copy_(torch.where(seen, torch.rsqrt(variance + self.eps), 1.0))
        if self.averaged:
            self.std.copy_(torch.where(seen, variance.sqrt(), 1.0))
            self.updates.zero_()
        else:
            self.count.copy_(moments.counts)
            self.deviations.copy_(moments.scatter)

    def _columns(self, name: str, argument: Tensors) -> Tensor:
        """Pack an argument of columns ``(D,)`` or ``(D_t,)`` a teacher, as float64."""
        given = self.teachers.in_order(name, argument)
        return torch.cat([given] if isinstance(given, Tensor) else list(given)).detach().double()

    def extra_repr(self) -> str:
        """Describe mode and teachers."""
        momentum = f", momentum={self.momentum}" if self.averaged else ""
        return f"{self.mode}, {super().extra_repr()}{momentum}"
