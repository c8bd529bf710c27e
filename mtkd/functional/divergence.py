"""Divergences between a student's class probabilities and those of many teachers."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import ops
from ..packing import join_small
from ..reduction import Weight, reduce
from ..reference.columns import accumulate_dtype
from .checks import (
    Group,
    check_dims,
    check_number,
    check_shape,
    check_tensor,
    group_teachers,
    is_sequence,
)

Tensors = Tensor | Sequence[Tensor]
DIVERGENCES = ("forward", "reverse", "jeffreys", "js")


def kl_div(
    student: Tensors,
    teacher: Tensors,
    dims: Sequence[int] | None = None,
    *,
    temperature: float = 1.0,
    divergence: str = "forward",
    beta: float = 0.5,
    temperature_scale: bool = True,
    weight: Weight = None,
    mask: Tensor | None = None,
    denominator: float | Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Divergence of a student's distribution over classes from every teacher's.

    With :math:`p_T = \text{softmax}(\text{teacher} / \tau)` and
    :math:`p_S = \text{softmax}(\text{student} / \tau)` over the classes of a teacher, the loss of a
    row and teacher is :math:`\tau^2` times

    .. math::
        \text{forward:} \quad & KL(p_T \,\|\, p_S) = \sum_c p_T \log (p_T / p_S) \\
        \text{reverse:} \quad & KL(p_S \,\|\, p_T) \\
        \text{jeffreys:} \quad & KL(p_T \,\|\, p_S) + KL(p_S \,\|\, p_T) \\
        \text{js:} \quad & \beta\, KL(p_T \,\|\, m) + (1 - \beta)\, KL(p_S \,\|\, m),
            \quad m = \beta\, p_T + (1 - \beta)\, p_S

    Args:
        student: the student's logits: a head a teacher, packed with `dims` or one tensor each; or
            one head, shared by teachers of the same classes.
        teacher: the teachers' logits, like `student`, or all teachers of a shared head. They
            receive a gradient where they require one.
        dims: number of classes of each teacher; None with a tensor means a single teacher, or
            teachers that share the student's head.
        temperature: :math:`\tau`, which divides the logits of both sides.
        divergence: "forward", "reverse", "jeffreys" or "js".
        beta: the teacher's share of the mixture in "js", between 0 and 1.
        temperature_scale: multiply by :math:`\tau^2`, which keeps the size of gradients.
        weight: weights of teachers ``(T,)`` or of entries ``(*, T)``; may require grad; or a
            callable ``(matrix, mask) -> weights`` such as `mtkd.weighting.teacher_dropping`.
        mask: entries that count, ``(*, T)`` bool; whatever the others hold adds nothing.
        denominator: divides the sum, in place of the sum of the counted weights.
        reduction: "none", "mean" or "sum" over rows and teachers.

    Shape:
        - student, teacher: ``(*, C)`` with ``C = sum(dims)``, or sequences of ``(*, C_t)``.
        - a shared head: student ``(*, C)``, teacher ``(*, T, C)`` or T tensors ``(*, C)``.

    Returns:
        ``(*, T)`` for "none", else a 0-dim tensor; nats (times :math:`\tau^2`), float32, or
        float64 when `student` or `teacher` is float64.

    Raises:
        ValueError: shapes, widths or devices that do not fit, a setting out of its range.
        TypeError: not a tensor, an integer dtype, a DTensor.

    Note:
        A logit of -inf is a class of probability 0: it adds nothing on its own side, and its
        gradient is 0. Where it meets a probability of the other side, a forward, reverse or
        Jeffreys divergence is inf, with gradients 0; so is every divergence of a row whose logits
        are all -inf, unless it is masked. No result is NaN unless an input holds NaN.

        For "mean" and "sum" student and teacher are read once (a row's further passes find them in
        the cache) and each gradient is written once; nothing else of size ``(*, C)`` is made.
        16-bit tensors are read as they are and computed in float32. A teacher ``(*, T, C)`` is read
        where it lies if its last two dimensions are contiguous, else copied.

    Source:
        Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv
        1503.02531; a head a teacher: Li et al., "Representation Consolidation for Training
        Expert Students", 2021, arXiv 2107.08039.

    Example:
        >>> import torch
        >>> import mtkd.functional as F
        >>> student = torch.zeros(4, 8, requires_grad=True)  # heads of 3 and 5 classes
        >>> teacher = torch.zeros(4, 8)
        >>> teacher[:, 3:7] = float("-inf")  # the second teacher is sure of its last class
        >>> F.kl_div(student, teacher, (3, 5), reduction="none")[0].tolist()  # 0, log 5
        [0.0, 1.6094379425048828]
        >>> F.kl_div(torch.zeros(4, 6), torch.zeros(4, 9, 6), reduction="none").shape
        torch.Size([4, 9])
    """
    settings = _settings(divergence, beta, temperature, temperature_scale)
    calls, leading = _row_calls(student, teacher, dims)
    return reduce(
        ops.kl_div,
        [(*call, *settings) for call in calls],
        [len(call[0]) for call in calls],
        leading=leading,
        dtype=accumulate_dtype(*(tensor for call in calls for tensor in call[1:])),
        device=calls[0][1].device,
        weight=weight,
        mask=mask,
        denominator=denominator,
        reduction=reduction,
    )


def _settings(
    divergence: str, beta: float, temperature: float, temperature_scale: bool
) -> tuple[float, float, bool, float, float]:
    """Check the settings of a loss; return them as operators take them."""
    if divergence not in DIVERGENCES:
        expected = ", ".join(DIVERGENCES)
        raise ValueError(f"divergence: expected one of {expected}, got {divergence!r}")
    check_number("beta", beta, positive=True)
    if beta >= 1:
        raise ValueError(f"beta: expected a number between 0 and 1, got {beta!r}")
    check_number("temperature", temperature, positive=True)
    scale = float(temperature) ** 2 if temperature_scale else 1.0
    weights = {"forward": (1.0, 0.0), "reverse": (0.0, 1.0), "jeffreys": (1.0, 1.0)}
    mixture = divergence == "js"
    shares = (float(beta), 1.0 - beta) if mixture else weights[divergence]
    return *shares, mixture, float(temperature), scale


def _row_calls(
    student: Any, teacher: Any, dims: Sequence[int] | None
) -> tuple[list[tuple[Any, ...]], Any]:
    """Check the logits; return calls (dims, student, teacher) on rows, and the leading dimensions.

    One student head and a sequence of teachers are calls that share the student.
    """
    if isinstance(student, Tensor) and is_sequence(teacher):
        student = [student] * len(teacher)
    groups = group_teachers(dims, student=student, teacher=teacher)
    first = groups[0].tensors[0]
    check_tensor(f"student{groups[0].suffix}", first)
    leading = first.shape[:-1]
    return list(join_small([_row_arguments(group, leading) for group in groups])), leading


def _row_arguments(group: Group, leading: Any) -> tuple[Any, ...]:
    """Check a group; return its dims, and its tensors with rows as their only leading dimension."""
    (student, teacher), suffix = group.tensors, group.suffix
    check_tensor(f"student{suffix}", student)
    check_tensor(f"teacher{suffix}", teacher, student.device)
    if student.dim() < 1:
        raise ValueError(f"student{suffix}: expected shape (*, C), got a 0-dim tensor")
    classes, rows = student.shape[-1], leading.numel()
    check_shape(f"student{suffix}", student, (*leading, classes))
    if teacher.dim() == student.dim() + 1 and group.dims is None:
        teachers = teacher.shape[-2]
        check_shape(f"teacher{suffix}", teacher, (*leading, teachers, classes))
        dims = check_dims((classes,) * teachers, teachers * classes, f"teacher{suffix}")
    else:
        check_shape(f"teacher{suffix}", teacher, student.shape)
        dims = check_dims(group.dims, classes, f"student{suffix}")
    return dims, student.reshape(rows, classes), teacher.reshape(rows, sum(dims))
