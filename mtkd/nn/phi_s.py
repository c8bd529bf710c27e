"""PHI-S: every teacher rotated so that all its columns have the same variance, then scaled."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor, distributed

from ..functional.checks import check_tensor
from ..reference.columns import accumulate_dtype
from .hadamard import check_order, hadamard
from .moments import Estimator, Moments
from .teachers import Tensors

_Tensors = TypeVar("_Tensors", bound=Tensors)


class PhiS(Estimator):
    r"""Standardise every teacher by one rotation and one scale, as PHI-S does.

    .. math:: t' = \alpha R (t - \mu), \quad R = \tfrac{1}{\sqrt{D}} H U^\top,
        \quad \alpha = \Big(\tfrac{1}{D} \sum_d \lambda_d + \text{eps}\Big)^{-1/2}

    with the covariance's eigenvectors U and eigenvalues :math:`\lambda`, and a Hadamard matrix H.
    Every column of t' has variance 1, yet the teacher's geometry stays: R only rotates, and one
    scale serves all columns, where `TeacherNorm` would blow up those that hardly vary.

    Statistics come from `estimate`, one pass over batches; before it, t' = t. A call, also in
    training mode, learns nothing.

    Args:
        dims: the width of each teacher, or a mapping name -> width.
        fallback: what to do for a width without a Hadamard matrix (see `hadamard`): None raises;
            "hartley" takes the orthogonal matrix of the discrete Hartley transform, then turns
            pairs of columns until their variances are equal. They are 1 as well, but an eigenvector
            is spread over columns in nearly, not exactly, equal parts.
        eps: added to the mean eigenvalue.
        sync: whether `estimate` takes the rows of all ranks where torch.distributed is
            initialised; every rank must then call it.

    Shape:
        - target: ``(*, D)`` with ``D = sum(dims)``, or ``(*, D_t)`` a teacher in a sequence or,
          when `dims` is a mapping, a mapping by name.
        - Returns tensors of the same shapes, in the same structure.
        - Buffers: `mean` ``(D,)``, `gain` ``(T,)`` for alpha, `rotation` for the matrices R.

    Returns:
        float32, or float64 for a float64 target: mean 0 and variance 1 under the statistics.

    Raises:
        ValueError: widths, shapes or devices that do not fit; a width without a Hadamard matrix.
        TypeError: not a floating-point tensor, a mask that is not bool.

    Note:
        `estimate` reads a batch twice, keeps ``sum(D_t^2)`` numbers and merges them in float64,
        exactly for any split into batches and ranks; it ends with an eigendecomposition a teacher.
        Masked entries, and a teacher's row with a NaN or an infinity, stay out. Variances divide by
        the count. A call costs a GEMM a teacher, outside autocast, and does not synchronise with
        the host. Eigenvectors are unique up to their signs at best: keep the state dict. A loss
        cannot fuse a rotation, so there is no `shift` and `scale`.

    Source:
        Ranzinger et al., "PHI-S: Distribution Balancing for Label-Free Multi-Teacher Distillation",
        arXiv 2410.01680. Rotations of the fallback: Bendel and Mickey, "Population Correlation
        Matrices for Sampling Experiments", 1978.

    Example:
        >>> import torch
        >>> from mtkd.nn.phi_s import PhiS
        >>> store = torch.randn(1000, 12) * torch.logspace(-2, 2, 12) + 5
        >>> norm = PhiS((8, 4)).estimate(store.split(100))
        >>> target = norm(store)
        >>> torch.allclose(target.var(0, correction=0), torch.ones(12), rtol=1e-3)
        True
        >>> torch.allclose(norm.inverse(target), store, atol=1e-3)
        True
    """

    products = True
    gain: Tensor
    rotation: Tensor

    def __init__(
        self,
        dims: Sequence[int] | Mapping[str, int],
        *,
        fallback: str | None = None,
        eps: float = 1e-8,
        sync: bool = True,
    ) -> None:
        super().__init__(dims, eps, sync)
        if fallback not in (None, "hartley"):
            raise ValueError(f'fallback: expected None or "hartley", got {fallback!r}')
        widths = self.teachers.dims
        for width in widths if fallback is None else ():
            check_order("dims", width, '; or pass fallback="hartley"')
        self.fallback = fallback
        self.register_buffer("gain", torch.ones(len(widths), dtype=torch.float64))
        identity = [torch.eye(width, dtype=torch.float64).flatten() for width in widths]
        self.register_buffer("rotation", torch.cat(identity))

    def forward(self, target: _Tensors, mask: Tensor | None = None) -> _Tensors:
        """Return the standardised target; `mask`, which `TeacherNorm` learns with, is not used."""

        def standardise(tensor: Tensor, teachers: slice, columns: slice) -> Tensor:
            dtype = self._dtype("target", tensor)
            centred = tensor.to(dtype) - self.mean[columns].to(dtype)
            return self._turn(centred, teachers, [(g * r).T for g, r in self._parts(teachers)])

        return self.teachers.map(standardise, "target", target)  # type: ignore[no-any-return]

    def inverse(self, output: _Tensors) -> _Tensors:
        """Return the target of which `output` is the standardised form."""

        def restore(tensor: Tensor, teachers: slice, columns: slice) -> Tensor:
            dtype = self._dtype("output", tensor)
            matrices = [r / g for g, r in self._parts(teachers)]
            return self._turn(tensor.to(dtype), teachers, matrices) + self.mean[columns].to(dtype)

        return self.teachers.map(restore, "output", output)  # type: ignore[no-any-return]

    def _dtype(self, name: str, tensor: Tensor) -> torch.dtype:
        check_tensor(name, tensor, self.mean.device)
        return accumulate_dtype(tensor)

    def _parts(self, teachers: slice) -> Iterator[tuple[Tensor, Tensor]]:
        """Gain and rotation of each of these teachers."""
        widths = self.teachers.dims
        rotations = self.rotation.split([width * width for width in widths])
        for teacher in range(len(widths))[teachers]:
            yield self.gain[teacher], rotations[teacher].unflatten(0, (widths[teacher], -1))

    def _turn(self, rows: Tensor, teachers: slice, matrices: Sequence[Tensor]) -> Tensor:
        """Multiply the columns of each teacher by its matrix."""
        parts = rows.split(list(self.teachers.dims[teachers]), -1)
        with _without_autocast(rows.device):
            pairs = zip(parts, matrices, strict=True)
            return torch.cat([part @ matrix.to(rows.dtype) for part, matrix in pairs], -1)

    def _replace(self, moments: Moments) -> None:
        widths = self.teachers.dims
        scatters = moments.scatter.split([width * width for width in widths])
        rotations = []
        for teacher, width in enumerate(widths):
            count = moments.counts[teacher]
            covariance = scatters[teacher].unflatten(0, (width, width)) / count.clamp(min=1)
            gain = torch.rsqrt(covariance.trace() / width + self.eps)
            self.gain[teacher] = torch.where(count > 0, gain, 1.0)
            rotation = self._rotation(covariance)
            rotations.append(torch.where(count > 0, rotation, torch.eye(width).to(rotation)))
        self.mean.copy_(moments.means)
        self.rotation.copy_(torch.cat([rotation.flatten() for rotation in rotations]))
        if self.sync and distributed.is_available() and distributed.is_initialized():
            distributed.broadcast(self.rotation, 0)  # eigenvectors may differ in sign

    def _rotation(self, covariance: Tensor) -> Tensor:
        """An orthogonal matrix that gives all columns the same variance."""
        width = len(covariance)
        values, vectors = torch.linalg.eigh(covariance)
        if self.fallback is None:
            spread = hadamard(width).to(vectors) / math.sqrt(width)
        else:
            spread = _equalise(_hartley(width), values.cpu()).to(vectors)
        rotation: Tensor = spread @ vectors.T
        return rotation

    def extra_repr(self) -> str:
        """Describe the teachers."""
        fallback = "" if self.fallback is None else f", fallback={self.fallback!r}"
        return super().extra_repr() + fallback


def _hartley(width: int) -> Tensor:
    """The orthogonal matrix of the discrete Hartley transform, float64."""
    index = torch.arange(width)
    angle = (index[:, None] * index % width).double() * (2 * math.pi / width)
    return (angle.cos() + angle.sin()) / math.sqrt(width)


def _equalise(basis: Tensor, variances: Tensor) -> Tensor:
    """Turn pairs of rows of an orthogonal basis until all have the same variance.

    Each turn gives the row of least variance the mean, so there are at most D - 1.
    """
    covariance, mean = (basis * variances) @ basis.T, variances.mean().item()
    for _ in range(len(basis) - 1):
        diagonal = covariance.diagonal()
        pair = [int(diagonal.argmin()), int(diagonal.argmax())]
        below, above = (diagonal[row].item() - mean for row in pair)
        if below >= 0 or above <= 0 or above - below <= 1e-14 * mean:
            break
        cross = covariance[pair[0], pair[1]].item()
        tangent = below / (cross + math.copysign(math.sqrt(cross**2 - below * above), cross))
        cosine = 1 / math.hypot(1, tangent)
        turn = cosine * basis.new_tensor([[1, -tangent], [tangent, 1]])
        basis[pair] = turn @ basis[pair]
        covariance[pair] = turn @ covariance[pair]
        covariance[:, pair] = covariance[:, pair] @ turn.T
    return basis


def _without_autocast(device: torch.device) -> AbstractContextManager[None]:
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
