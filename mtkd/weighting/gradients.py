"""Weights that no teacher's gradient pulls against: AEKD's quadratic programme."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import Tensors, check_floating, check_logits, check_positive, wide
from .simplex import capped_simplex_qp

SCOPES = ("batch", "sample")
CHUNK = 1 << 22  # numbers of the gradients (rows, T, C) that are held at once


def gradient_weights(
    student: Tensor,
    teacher: Tensors,
    mask: Tensor | None = None,
    *,
    temperature: float = 1.0,
    largest: float = 1.0,
    per: str = "batch",
) -> Tensor:
    r"""Weights under which the teachers' gradients add up to the shortest vector.

    With a teacher's gradient to the student's logits, that of
    :math:`\tau^2 \mathrm{KL}(q_t \,\|\, p)` at temperature :math:`\tau`,

    .. math:: g_t = \tau\, (p - q_t), \qquad
        w = \arg\min_w \Big\| \sum_t w_t g_t \Big\|^2
        \quad \text{with} \quad \sum_t w_t = 1, \; 0 \le w_t \le C

    A step along the combined gradient then lowers the loss of every teacher (with C = 1): its inner
    product with each :math:`g_t` is at least its own square.

    Args:
        student: the student's logits; read without gradient.
        teacher: the teachers' logits, packed or one tensor a teacher; read without gradient.
        mask: entries that count, ``(*, T)`` bool; whatever the others hold adds nothing.
        temperature: :math:`\tau`.
        largest: C, between 1 / T and 1; where fewer than 1 / C teachers count, they weigh the same.
            The smaller it is, the more teachers have a say.
        per: "batch": one weight a teacher, from the means of its gradients over the rows where it
            counts (as AEKD's code); "sample": weights for each row.

    Shape:
        - student ``(*, C)``; teacher ``(*, T, C)``, or a sequence of T tensors ``(*, C)``.

    Returns:
        Weights ``(T,)``, or ``(*, T)`` per sample, detached, that sum to 1 over what counts:
        float32, or float64 for a float64 student.

    Raises:
        ValueError: shapes or devices that do not fit, an unknown scope, a cap below 1 / T.
        TypeError: an argument of the wrong type or dtype.

    Note:
        "batch" walks over the teachers one at a time and keeps ``(T, C)``; "sample" makes Gram
        matrices ``(*, T, T)``, rows in chunks. The programme is solved on the device without a wait
        of the host, by 25 steps in float64, each some linear systems of T unknowns; with "sample"
        for every row, which may cost more than the loss. Its objective is within 1e-12 of the
        optimum, relative to the mean square of the gradients. Where several weights are optimal, as
        with equal teachers, it is their analytic centre: equal teachers weigh the same.

    Source:
        Du, You, Li, Wu, Wang, Qian, Zhang, "Agree to Disagree: Adaptive Ensemble Knowledge
        Distillation in Gradient Space", NeurIPS 2020.

    Example:
        >>> import torch
        >>> from mtkd.weighting import gradient_weights
        >>> student = torch.zeros(1, 2)
        >>> teacher = torch.tensor([[[4.0, 0.0], [4.0, 0.0], [0.0, 1.0]]])
        >>> weights = gradient_weights(student, teacher)  # the third pulls the other way
        >>> print(" ".join(f"{w:.4f}" for w in weights))
        0.1620 0.1620 0.6760
        >>> gradient_weights(student, teacher, largest=0.5)
        tensor([0.2500, 0.2500, 0.5000])
    """
    teachers, shape = check_logits(teacher, mask)
    _check(student, teachers, temperature, largest, per)
    rows, classes = shape[:-1].numel(), student.shape[-1]
    p = _softmax(student.detach().reshape(rows, classes), temperature)
    flat = [each.reshape(rows, classes) for each in teachers]
    counted = None if mask is None else mask.reshape(rows, len(flat))
    make = _gram_of_means if per == "batch" else _gram_of_rows
    gram, present = make(p, flat, counted, temperature)
    weights = _capped(gram, present, largest).to(p.dtype)
    return weights.reshape(shape if per == "sample" else shape[-1:])


def _softmax(logits: Tensor, temperature: float) -> Tensor:
    return torch.softmax(logits.to(wide(logits.dtype)) / temperature, -1)


def _gram_of_means(
    p: Tensor, teachers: Sequence[Tensor], counted: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return products of the mean gradients ``(1, T, T)``, and which teachers have one."""
    means = []
    for t, logits in enumerate(teachers):
        here = None if counted is None else counted[:, t : t + 1]
        means.append(_differences(p, logits, here, temperature).sum(0, dtype=torch.float64))
    numbers = torch.full((len(teachers),), len(p), dtype=torch.float64, device=p.device)
    if counted is not None:
        numbers = counted.sum(0).double()
    mean = torch.stack(means) / numbers.clamp(min=1.0).unsqueeze(-1)
    return (mean @ mean.T).unsqueeze(0), (numbers > 0).unsqueeze(0)


def _gram_of_rows(
    p: Tensor, teachers: Sequence[Tensor], counted: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return products of each row's gradients ``(N, T, T)``, and which teachers count."""
    size = max(1, CHUNK // (len(teachers) * p.shape[1]))
    grams = [p.new_zeros(0, len(teachers), len(teachers)).double()]
    for start in range(0, len(p), size):
        part = slice(start, start + size)
        columns = []
        for t, logits in enumerate(teachers):
            here = None if counted is None else counted[part, t : t + 1]
            columns.append(_differences(p[part], logits[part], here, temperature))
        gradients = torch.stack(columns, 1).double()
        grams.append(gradients @ gradients.mT)
    everywhere = torch.ones(len(p), len(teachers), dtype=torch.bool, device=p.device)
    return torch.cat(grams), everywhere if counted is None else counted


def _differences(p: Tensor, logits: Tensor, counted: Tensor | None, temperature: float) -> Tensor:
    """Return p - q ``(N, C)``, 0 where a teacher does not count."""
    if counted is None:
        return p - _softmax(logits, temperature)
    difference = p - _softmax(logits.masked_fill(~counted, 0.0), temperature)
    return difference.masked_fill(~counted, 0.0)


def _capped(gram: Tensor, present: Tensor, largest: float) -> Tensor:
    """Return the minimisers; equal weights where the cap leaves no other."""
    number = present.sum(-1, keepdim=True).double()
    equal = present / number.clamp(min=1.0)
    forced = largest * number <= 1.0 + 1e-9
    # a cap of 1 or more, which sum w = 1 implies, is better never met
    cap = torch.full_like(number, 2.0 if largest >= 1.0 else largest)
    weights = capped_simplex_qp(gram, present, cap.masked_fill(forced, 2.0))
    return torch.where(forced, equal, weights)


def _check(
    student: Tensor, teachers: Sequence[Tensor], temperature: float, largest: float, per: str
) -> None:
    check_floating("student", student)
    if student.shape != teachers[0].shape or student.device != teachers[0].device:
        expected = f"shape {tuple(teachers[0].shape)} on {teachers[0].device} like the teachers"
        got = f"shape {tuple(student.shape)} on {student.device}"
        raise ValueError(f"student: expected {expected}, got {got}")
    check_positive("temperature", temperature)
    check_positive("largest", largest)
    if largest < 1.0 / len(teachers) - 1e-12 or largest > 1.0:
        least = f"1 / {len(teachers)}"
        raise ValueError(f"largest: expected a number between {least} and 1, got {largest!r}")
    if per not in SCOPES:
        raise ValueError(f"per: expected {' or '.join(SCOPES)}, got {per!r}")
