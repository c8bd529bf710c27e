"""Alignment of a student with many teachers: cosine, smooth L1, squared error, angle."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import linear, ops
from ..packing import join_small, stack_equal
from ..reduction import Weight, reduce
from ..reference.columns import accumulate_dtype
from .checks import (
    Dims,
    Group,
    check_dims,
    check_number,
    check_shape,
    check_target,
    check_tensor,
    group_teachers,
    is_sequence,
)
from .layers import autocast, input_leading, keeps_stash

Tensors = Tensor | Sequence[Tensor]


def alignment(
    student: Tensors,
    target: Tensors,
    dims: Dims | None = None,
    *,
    cosine: float = 0.5,
    smooth_l1: float = 0.5,
    mse: float = 0.0,
    beta: float = 1.0,
    shift: Tensors | None = None,
    scale: Tensors | None = None,
    eps: float = 1e-8,
    weight: Weight = None,
    mask: Tensor | None = None,
    denominator: float | Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Cosine, smooth L1 and squared error between a student's columns and every teacher's.

    With the standardised target :math:`t = (\text{target} - \text{shift}) \cdot \text{scale}`,
    which is never written, and :math:`e = s - t`, the loss of a row and teacher with columns d is

    .. math:: \ell = c \,(1 - \cos(s, t)) + \tfrac{1}{D_t} \sum_d \lambda\, h(e_d) + m\, e_d^2,
        \qquad h(e) = \begin{cases} e^2 / 2 \beta & |e| < \beta \\ |e| - \beta / 2 \end{cases}

    Args:
        student: the student's columns, packed with `dims` or one tensor a teacher.
        target: the teachers' embeddings, like `student`; any floating dtype, no gradient.
        dims: the width of each teacher, a sequence or a mapping by name, in order; None with a
            tensor means a single teacher.
        cosine: c, the weight of the cosine distance.
        smooth_l1: :math:`\lambda`, the weight of smooth L1.
        mse: m, the weight of the squared error.
        beta: where smooth L1 becomes linear; 0 gives L1.
        shift: subtracted from the target, such as the running mean of `mtkd.nn.TeacherNorm`.
        scale: multiplies the shifted target.
        eps: the least norm in the cosine, as in `torch.nn.functional.cosine_similarity`.
        weight: weights of teachers ``(T,)`` or of entries ``(*, T)``; may require grad; or a
            callable ``(matrix, mask) -> weights`` such as `mtkd.weighting.teacher_dropping`.
        mask: entries that count, ``(*, T)`` bool; whatever the others hold adds nothing.
        denominator: divides the sum, in place of the sum of the counted weights.
        reduction: "none", "mean" or "sum" over rows and teachers.

    Shape:
        - student, target: ``(*, D)`` with ``D = sum(dims)``, or sequences of ``(*, D_t)``.
        - shift, scale: ``(D,)``, or sequences of ``(D_t,)``.

    Returns:
        ``(*, T)`` for "none", else a 0-dim tensor; float32, or float64 for a float64 student.

    Raises:
        ValueError: shapes, widths or devices that do not fit, a target that requires grad, a
            weight of a term that is negative.
        TypeError: not a tensor, an integer dtype, a DTensor.

    Note:
        For "mean" and "sum" student and target are read once (a row's second pass finds them in
        the cache) and the gradient is written once; nothing else of size ``(*, D)`` is made, unless
        leading dimensions do not merge into one, as those of ``x[:, 1:]``: then inputs are copied.
        16-bit tensors are read as they are and computed in float32, whose squares overflow for
        numbers about 1e19. Within 1e-3 of cos = 1 or -1 an angle has few digits in float32.

    Source:
        Sariyildiz et al., "UNIC", ECCV 2024, arXiv 2408.05088, whose weights are the defaults.

    Example:
        >>> import torch
        >>> import mtkd.functional as F
        >>> student = torch.ones(4, 8, requires_grad=True)
        >>> loss = F.alignment(student, -torch.ones(4, 8), (3, 5))
        >>> loss.item()  # 0.5 (1 - cos) + 0.5 (2 - 1 / 2)
        1.75
        >>> F.alignment(student, torch.ones(4, 8), (3, 5), reduction="none").shape
        torch.Size([4, 2])
    """
    settings = _settings(cosine=cosine, smooth_l1=smooth_l1, mse=mse, beta=beta, eps=eps)
    tensors = (student, target, shift, scale, None)
    return _rows(tensors, dims, settings, weight, mask, denominator, reduction)


def cosine(student: Tensors, target: Tensors, dims: Dims | None = None, **options: Any) -> Tensor:
    r"""Cosine distance, :math:`1 - \cos(s, t)`: `alignment` with this term alone.

    Options are those of `alignment`.

    Example:
        >>> import torch
        >>> import mtkd.functional as F
        >>> F.cosine(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])).item()
        1.0
    """
    return alignment(student, target, dims, cosine=1.0, smooth_l1=0.0, mse=0.0, **options)


def mse(student: Tensors, target: Tensors, dims: Dims | None = None, **options: Any) -> Tensor:
    """Mean squared error, ``mean_d (s - t)^2``: `alignment` with this term alone.

    Options are those of `alignment`.

    Example:
        >>> import torch
        >>> import mtkd.functional as F
        >>> F.mse(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])).item()
        2.5
    """
    return alignment(student, target, dims, cosine=0.0, smooth_l1=0.0, mse=1.0, **options)


def smooth_l1(
    student: Tensors, target: Tensors, dims: Dims | None = None, **options: Any
) -> Tensor:
    """Smooth L1 error, a mean over columns: `alignment` with this term alone.

    Options are those of `alignment`, `beta` among them.

    Example:
        >>> import torch
        >>> import mtkd.functional as F
        >>> F.smooth_l1(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])).item()
        1.0
    """
    return alignment(student, target, dims, cosine=0.0, smooth_l1=1.0, mse=0.0, **options)


def angle(
    student: Tensors,
    target: Tensors,
    dims: Dims | None = None,
    *,
    dispersion: Tensor | None = None,
    shift: Tensors | None = None,
    scale: Tensors | None = None,
    eps: float = 1e-8,
    weight: Weight = None,
    mask: Tensor | None = None,
    denominator: float | Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Squared angle between a student's columns and a teacher's, over the teacher's dispersion.

    .. math:: \ell = \arccos(\cos(s, t))^2 / v_t

    The gradient is 0 where the two are parallel or opposite. In units of squared radians.

    Args:
        student: the student's columns, packed with `dims` or one tensor a teacher.
        target: the teachers' embeddings, like `student`.
        dims: the width of each teacher, a sequence or a mapping by name, in order; None with a
            tensor means a single teacher.
        dispersion: v, ``(T,)``: how far a teacher's embeddings spread, such as the mean squared
            angle to their mean; None means 1.
        shift: subtracted from the target; see `alignment`, as for all that follow.
        scale: multiplies the shifted target.
        eps: the least norm in the cosine.
        weight: weights of teachers or entries.
        mask: entries that count.
        denominator: divides the sum.
        reduction: "none", "mean" or "sum".

    Returns:
        As `alignment`.

    Source:
        C-RADIOv4, arXiv 2601.17237: the summary loss.

    Example:
        >>> import torch
        >>> import mtkd.functional as F
        >>> right = F.angle(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
        >>> round(right.item() ** 0.5, 4)  # a right angle
        1.5708
    """
    settings = _settings(angle=1.0, eps=eps)
    tensors = (student, target, shift, scale, dispersion)
    return _rows(tensors, dims, settings, weight, mask, denominator, reduction)


def linear_alignment(
    input: Tensors,
    linear_weight: Tensors,
    target: Tensors,
    dims: Dims | None = None,
    *,
    linear_bias: Tensors | None = None,
    cosine: float = 0.5,
    smooth_l1: float = 0.5,
    mse: float = 0.0,
    beta: float = 1.0,
    shift: Tensors | None = None,
    scale: Tensors | None = None,
    eps: float = 1e-8,
    weight: Weight = None,
    mask: Tensor | None = None,
    denominator: float | Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""`alignment` fused with the last linear layer of the projectors.

    Equal to `alignment` with :math:`s = W x + b`, but neither this nor its gradient is ever held
    whole.

    Args:
        input: what the projectors' last layer takes, shared by the teachers or one tensor each.
        linear_weight: rows of all teachers, or one tensor a teacher.
        target: the teachers' embeddings; any floating dtype, no gradient.
        dims: the width of each teacher, a sequence or a mapping by name, in order; None with a
            tensor means a single teacher.
        linear_bias: biases of `linear_weight`.
        cosine: weight of the cosine distance; see `alignment`, as for all that follow.
        smooth_l1: weight of smooth L1.
        mse: weight of the squared error.
        beta: where smooth L1 becomes linear.
        shift: subtracted from the target.
        scale: multiplies the shifted target.
        eps: the least norm in the cosine.
        weight: weights of teachers or entries.
        mask: entries that count.
        denominator: divides the sum.
        reduction: "none", "mean" or "sum".

    Shape:
        - input ``(*, H)``, linear_weight ``(D, H)``, linear_bias ``(D,)``, target ``(*, D)`` with
          ``D = sum(dims)``; shift and scale ``(D,)``.
        - a teacher's own input: sequences of T such tensors, each with ``T = 1``.

    Returns:
        ``(*, T)`` for "none", else a 0-dim tensor; float32, or float64 when `input` or
        `linear_weight` is float64.

    Raises:
        ValueError: shapes, widths or devices that do not fit, a target that requires grad.
        TypeError: not a tensor, an integer dtype, a DTensor.

    Note:
        Memory, GEMMs and precision are those of `linear_gaussian_nll`.

    Source:
        As for `alignment`.

    Example:
        >>> import torch
        >>> import mtkd.functional as F
        >>> student = torch.randn(4, 16, requires_grad=True)
        >>> projector = torch.zeros(8, 16, requires_grad=True)
        >>> loss = F.linear_alignment(student, projector, torch.ones(4, 8), (3, 5), smooth_l1=1.0)
        >>> loss.item()  # 0.5 (1 - 0) + 1.0 (1 / 2)
        1.0
    """
    settings = _settings(cosine=cosine, smooth_l1=smooth_l1, mse=mse, beta=beta, eps=eps)
    groups = group_teachers(
        dims,
        input=input,
        linear_weight=linear_weight,
        target=target,
        linear_bias=linear_bias,
        shift=_by_teacher(shift, target),
        scale=_by_teacher(scale, target),
    )
    leading = input_leading(groups[0])
    calls = [_linear_arguments(group, leading) for group in groups]
    calls = list(stack_equal(calls, columns=(-2, -1, -1, -1, -1, -1)))
    width = sum(call[2].shape[0] for call in calls)
    stash = keeps_stash(calls, leading.numel(), width, weight, reduction)
    budget = linear.workspace_size()
    return reduce(
        ops.linear_alignment,
        [(*call, *settings, budget, stash) for call in calls],
        [len(call[0]) for call in calls],
        leading=leading,
        dtype=accumulate_dtype(*(tensor for call in calls for tensor in call[1:3])),
        device=calls[0][1].device,
        weight=weight,
        mask=mask,
        denominator=denominator,
        reduction=reduction,
    )


def _settings(
    *,
    cosine: float = 0.0,
    smooth_l1: float = 0.0,
    mse: float = 0.0,
    angle: float = 0.0,
    beta: float = 1.0,
    eps: float = 1e-8,
) -> tuple[float, ...]:
    """Check the numbers of a loss; return them as operators take them."""
    settings = {"cosine": cosine, "smooth_l1": smooth_l1, "mse": mse, "angle": angle}
    settings |= {"beta": beta, "eps": eps}
    for name, value in settings.items():
        check_number(name, value, positive=name == "eps")
    return tuple(float(value) for value in settings.values())


def _rows(
    tensors: tuple[Any, ...],
    dims: Dims | None,
    settings: tuple[float, ...],
    weight: Weight,
    mask: Tensor | None,
    denominator: float | Tensor | None,
    reduction: str,
) -> Tensor:
    """Check student, target, shift, scale and dispersion; call the operator on rows; reduce."""
    student, target, shift, scale, dispersion = tensors
    shift, scale = (_by_teacher(x, target) for x in (shift, scale))
    groups = group_teachers(dims, student=student, target=target, shift=shift, scale=scale)
    first = groups[0].tensors[0]
    check_tensor(f"student{groups[0].suffix}", first)
    leading = first.shape[:-1]
    calls = [_row_arguments(group, leading) for group in groups]
    spread = _dispersions(dispersion, [len(call[0]) for call in calls], first.device)
    calls = list(join_small([(*call, part) for call, part in zip(calls, spread, strict=True)]))
    return reduce(
        ops.alignment,
        [(*call, *settings) for call in calls],
        [len(call[0]) for call in calls],
        leading=leading,
        dtype=accumulate_dtype(*(call[1] for call in calls)),
        device=first.device,
        weight=weight,
        mask=mask,
        denominator=denominator,
        reduction=reduction,
    )


def _by_teacher(columns: Any, target: Any) -> Any:
    """Split packed ``(D,)`` beside a sequence of targets, whose widths then are those of dims."""
    if not isinstance(columns, Tensor) or not is_sequence(target):
        return columns
    widths = [x.shape[-1] if isinstance(x, Tensor) and x.dim() else 0 for x in target]
    if columns.dim() != 1 or len(columns) != sum(widths):
        expected = f"shape ({sum(widths)},) or one tensor a teacher"
        raise ValueError(f"shift, scale: expected {expected}, got shape {tuple(columns.shape)}")
    return columns.split(widths)


def _row_arguments(group: Group, leading: torch.Size) -> tuple[Any, ...]:
    """Check a group; return its dims, and its tensors with rows as their only leading dimension."""
    (student, target, shift, scale), suffix = group.tensors, group.suffix
    check_tensor(f"student{suffix}", student)
    if student.dim() < 1:
        raise ValueError(f"student{suffix}: expected shape (*, D), got a 0-dim tensor")
    check_shape(f"student{suffix}", student, (*leading, student.shape[-1]))
    check_target(f"target{suffix}", target, student.device)
    check_shape(f"target{suffix}", target, student.shape)
    width = student.shape[-1]
    dims = check_dims(group.dims, width, f"student{suffix}")
    shift, scale = _standardisation(suffix, width, student.device, shift=shift, scale=scale)
    rows = leading.numel()
    return dims, student.reshape(rows, width), target.reshape(rows, width), shift, scale


def _standardisation(
    suffix: str, width: int, device: torch.device, **tensors: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Check shift and scale ``(D,)``, which receive no gradient."""
    for name, tensor in tensors.items():
        if tensor is not None:
            check_target(name + suffix, tensor, device)
            check_shape(name + suffix, tensor, (width,))
    return tuple(tensors.values())


def _dispersions(
    dispersion: Tensor | None, counts: Sequence[int], device: torch.device
) -> Sequence[Tensor | None]:
    """Check dispersions ``(T,)``; return those of each call."""
    if dispersion is None:
        return [None] * len(counts)
    check_target("dispersion", dispersion, device)
    check_shape("dispersion", dispersion, (sum(counts),))
    parts: Sequence[Tensor] = dispersion.split(list(counts))
    return parts


def _linear_arguments(group: Group, leading: torch.Size) -> tuple[Any, ...]:
    """Check a group; return dims, input ``(N, H)``, the layer, target and its standardisation."""
    (input, weight, target, bias, shift, scale), suffix = group.tensors, group.suffix
    check_tensor(f"input{suffix}", input)
    check_tensor(f"linear_weight{suffix}", weight, input.device)
    check_target(f"target{suffix}", target, input.device)
    features = input.shape[-1]
    check_shape(f"input{suffix}", input, (*leading, features))
    if weight.dim() != 2 or weight.shape[1] != features:
        raise ValueError(
            f"linear_weight{suffix}: expected shape (D, H), H = {features} as in input,"
            f" got shape {tuple(weight.shape)}"
        )
    width = weight.shape[0]
    check_shape(f"target{suffix}", target, (*leading, width))
    dims = check_dims(group.dims, width, f"linear_weight{suffix}")
    if bias is not None:
        check_tensor(f"linear_bias{suffix}", bias, input.device)
        check_shape(f"linear_bias{suffix}", bias, (width,))
    shift, scale = _standardisation(suffix, width, input.device, shift=shift, scale=scale)
    rows = leading.numel()
    flat = input.reshape(rows, features), target.reshape(rows, width)
    return dims, autocast(flat[0]), autocast(weight), bias, flat[1], shift, scale, None
