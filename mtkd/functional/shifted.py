"""Squared error between maps of two crops of an image, over what both of them see."""

import torch
from torch import Tensor

from ..reduction import Weight, check_mask, reduce_matrix, token_mean
from .alignment import mse
from .checks import Dims, check_dims, check_target, check_tensor


def shifted_mse(
    student: Tensor,
    target: Tensor,
    offsets: Tensor,
    dims: Dims | None = None,
    *,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    weight: Weight = None,
    mask: Tensor | None = None,
    denominator: float | Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Mean squared error of maps of crops that are shifted by whole positions, where they overlap.

    Position (i, j) of the student's map b shows what position :math:`(i + y_b, j + x_b)` of the
    target's shows, with :math:`(y_b, x_b)` the offsets. Over the set :math:`O_b` of positions that
    lie in both maps, the loss of an image and teacher with columns d is

    .. math:: \ell_b = \frac{1}{|O_b|\, D_t} \sum_{(i, j) \in O_b} \sum_d
        (s_{b, i, j, d} - t_{b, i + y_b, j + x_b, d})^2

    and an image without overlap counts nowhere, as if it were masked: 0, with zero gradients.

    Args:
        student: the student's maps, packed with `dims`.
        target: the teachers' maps; any floating dtype, no gradient.
        offsets: (y, x) of each image, where in the target's map the student's first position
            is: the corner of the student's crop minus that of the teachers', in positions.
        dims: the width of each teacher, a sequence or a mapping by name; None means a single one.
        shift: subtracted from the target, such as the running mean of `mtkd.nn.TeacherNorm`.
        scale: multiplies the shifted target.
        weight: weights of teachers ``(T,)`` or of images and teachers ``(B, T)``; may require
            grad; or a callable (detached matrix ``(B, T)``, mask) -> weights.
        mask: images and teachers that count, ``(B, T)`` bool.
        denominator: divides the sum, in place of the sum of the counted weights.
        reduction: "none", "mean" or "sum" over images and teachers.

    Shape:
        - student ``(B, Hh, Ww, D)`` with ``D = sum(dims)``; target ``(B, Hh', Ww', D)``, of the
          same size or another; offsets ``(B, 2)``, integers; shift, scale ``(D,)``.

    Returns:
        ``(B, T)`` for "none", else a 0-dim tensor; float32, or float64 for a float64 student.

    Raises:
        ValueError: shapes, widths or devices that do not fit, an empty map, a target that requires
            grad.
        TypeError: an argument of the wrong type or dtype.

    Note:
        The shifted target is copied; the rest is `mse` on the positions of the overlap, whose
        gradient is written in backward. The host never reads the offsets. Images weigh the same
        whatever their overlap.

    Source:
        C-RADIOv4, arXiv 2601.17237: the spatial loss.

    Example:
        >>> import torch
        >>> from mtkd.functional.shifted import shifted_mse
        >>> image = torch.randn(1, 9, 9, 8)
        >>> student, target = image[:, 2:8, 1:7], image[:, :6, 3:9]  # crops at (2, 1) and (0, 3)
        >>> offsets = torch.tensor([[2, 1]]) - torch.tensor([[0, 3]])
        >>> shifted_mse(student, target, offsets, (3, 5)).item()
        0.0
    """
    teachers = _check(student, target, offsets, dims)
    check_mask(mask, (student.shape[0], teachers), student.device)
    rows, inside_rows = _positions(student.shape[1], target.shape[1], offsets[:, 0])
    columns, inside_columns = _positions(student.shape[2], target.shape[2], offsets[:, 1])
    images = torch.arange(student.shape[0], device=student.device)[:, None, None]
    shifted = target[images, rows[:, :, None], columns[:, None, :]]
    overlap = inside_rows[:, :, None, None] & inside_columns[:, None, :, None]
    overlap = overlap.expand(*student.shape[:-1], teachers)
    if mask is not None:
        overlap = overlap & mask[:, None, None, :]
    options = {"shift": shift, "scale": scale, "mask": overlap}
    matrix = mse(student, shifted, dims, reduction="none", **options)
    tokens, overlap = matrix.flatten(1, 2), overlap.flatten(1, 2)
    return reduce_matrix(
        token_mean(tokens, overlap),
        weight=weight,
        mask=overlap.any(1),
        denominator=denominator,
        reduction=reduction,
    )


def _positions(size: int, target_size: int, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Return each student position's in the target ``(B, size)``, and whether it is inside."""
    at = torch.arange(size, device=offset.device) + offset[:, None]
    return at.clamp(0, target_size - 1), (at >= 0) & (at < target_size)


def _check(student: Tensor, target: Tensor, offsets: Tensor, dims: Dims | None) -> int:
    """Raise unless the arguments fit; return the number of teachers."""
    check_tensor("student", student)
    check_target("target", target, student.device)
    for name, maps in (("student", student), ("target", target)):
        if maps.dim() != 4 or 0 in maps.shape[1:]:
            shape = tuple(maps.shape)
            raise ValueError(f"{name}: expected shape (B, Hh, Ww, D) of maps, got shape {shape}")
    if student.shape[0] != target.shape[0] or student.shape[-1] != target.shape[-1]:
        wanted = f"({student.shape[0]}, Hh, Ww, {student.shape[-1]})"
        raise ValueError(f"target: expected shape {wanted}, got shape {tuple(target.shape)}")
    if not isinstance(offsets, Tensor):
        raise TypeError(f"offsets: expected a tensor, got {type(offsets).__name__}")
    if offsets.is_floating_point() or offsets.is_complex() or offsets.dtype == torch.bool:
        raise TypeError(f"offsets: expected a tensor of integers, got {offsets.dtype}")
    if offsets.shape != (student.shape[0], 2):
        expected, shape = (student.shape[0], 2), tuple(offsets.shape)
        raise ValueError(f"offsets: expected shape {expected}, got shape {shape}")
    if offsets.device != student.device:
        raise ValueError(f"offsets: expected device {student.device}, got {offsets.device}")
    return len(check_dims(dims, student.shape[-1], "student"))
