"""A student against a mixture of its teachers, in probability or in likelihood."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..reduction import LossOperator, check_mask, check_weight, reduce
from ..reference.columns import accumulate_dtype
from .checks import check_number, check_teacher_logits, check_tensor

Tensors = Tensor | Sequence[Tensor]


def mixture_kl(
    student: Tensor,
    teacher: Tensors,
    weight: Tensor | None = None,
    *,
    temperature: float = 1.0,
    temperature_scale: bool = True,
    mask: Tensor | None = None,
    denominator: float | Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Kullback-Leibler divergence of the student from the weighted mean of its teachers.

    With p the student's softmax and :math:`q_t` teacher t's, both at temperature :math:`\tau`, and
    the sums over the teachers that count,

    .. math:: q = \sum_t w_t q_t \Big/ \sum_t w_t, \qquad
        \ell = \tau^2 \sum_c q_c \, (\log q_c - \log p_c)

    One column, since the teachers are mixed in a row. Only ratios of a row's weights matter, so the
    gradient to them has no part along them; through a softmax that makes the weights it is the
    same as without the normalisation.

    Args:
        student: the student's logits.
        teacher: the teachers' logits, packed or one tensor a teacher; any floating dtype, no
            gradient.
        weight: weights of teachers ``(T,)`` or of entries ``(*, T)``, at least 0 (not checked: a
            GPU would have to wait); may require grad, as a gate's do; None means equal ones.
        temperature: divides all logits.
        temperature_scale: whether to multiply by the squared temperature, which keeps the size of
            the gradient.
        mask: entries that count, ``(*, T)`` bool; whatever the others hold adds nothing.
        denominator: divides the sum, in place of the number of counted rows.
        reduction: "none", "mean" or "sum" over rows; a row counts if a teacher of weight above 0
            does.

    Shape:
        - student ``(*, C)``; teacher ``(*, T, C)``, or a sequence of T tensors ``(*, C)``.

    Returns:
        In nats: ``(*, 1)`` for "none", else a 0-dim tensor; float32, or float64 for a float64
        student.

    Raises:
        ValueError: shapes or devices that do not fit, a teacher that requires grad.
        TypeError: not a tensor, an integer dtype, a DTensor.

    Note:
        A kernel on a CPU, which reads the logits once where they lie. Elsewhere a few teachers at
        a time, with some temporaries of ``(*, max(C, 4096))``. A logit of -inf is a class of
        probability 0, and 0 log 0 = 0; where only the student's is 0 the loss is inf, and its
        gradients those of the other classes. In the gradient to the weights a class is
        taken for at least as probable as the least normal number of the dtype, 1e-38, so that
        teachers of weight 0 have a finite one.

    Source:
        The routed teachers of Li et al., "MST-Distill", ACM Multimedia 2025, arXiv 2507.07015,
        mixed in place of their losses; the gradient to the weights is what teaches a gate.

    Example:
        >>> import torch
        >>> import mtkd.functional as F
        >>> student = torch.zeros(1, 2, requires_grad=True)
        >>> teacher = torch.tensor([[[2.0, 0.0], [0.0, 2.0], [3.0, 0.0]]])
        >>> gate = torch.zeros(1, 3, requires_grad=True)
        >>> loss = F.mixture_kl(student, teacher, gate.softmax(-1))
        >>> print(f"{loss.item():.4f}")
        0.0462
        >>> loss.backward()
        >>> gate.grad.argmin().item()  # whose weight should grow: it makes the mixture even
        1
    """
    check_number("temperature", temperature, positive=True)
    rows = _check_rows(student, teacher, weight, mask)
    tau = float(temperature)
    settings = tau, tau * tau if temperature_scale else 1.0
    return _reduce(ops.mixture_kl, rows, settings, denominator, reduction)


def dirichlet_mixture(
    student: Tensor,
    teacher: Tensors,
    weight: Tensor | None = None,
    concentration: float | Tensor = 1.0,
    *,
    mask: Tensor | None = None,
    denominator: float | Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Negative log-likelihood of the student under a mixture of Dirichlets about its teachers.

    With p the student's softmax, :math:`q_t` teacher t's, :math:`\lambda_t` its concentration and
    the sums over the teachers that count,

    .. math:: \ell = -\log \frac{\sum_t w_t \, \mathrm{Dir}(p;\, 1 + \lambda_t q_t)}{\sum_t w_t}

    A teacher's density is largest at :math:`p = q_t`, the sharper the larger :math:`\lambda_t`: the
    student is drawn to teachers by their posterior probabilities, so it may follow one of
    several that disagree where `mixture_kl` follows their mean. One column, as there.

    Args:
        student: the student's logits.
        teacher: the teachers' logits, packed or one tensor a teacher; any floating dtype, no
            gradient. Divide logits by a temperature where one is wanted.
        weight: weights of teachers ``(T,)`` or of entries ``(*, T)``, at least 0; may require grad;
            None means equal ones.
        concentration: :math:`\lambda`, at least 0: a number, or a tensor ``()``, ``(T,)`` or
            ``(*, T)``, which may require grad.
        mask: entries that count, ``(*, T)`` bool; whatever the others hold adds nothing.
        denominator: divides the sum, in place of the number of counted rows.
        reduction: "none", "mean" or "sum" over rows; a row counts if a teacher of weight above 0
            does.

    Shape:
        - student ``(*, C)``; teacher ``(*, T, C)``, or a sequence of T tensors ``(*, C)``.

    Returns:
        In nats, of a density on the simplex, hence often negative: ``(*, 1)`` for "none", else a
        0-dim tensor; float32, or float64 for a float64 student.

    Raises:
        ValueError: shapes or devices that do not fit, a negative number as
            concentration, a teacher that
            requires grad.
        TypeError: not a tensor, an integer dtype, a DTensor.

    Note:
        A few teachers at a time, with some temporaries of ``(*, max(C, 4096))``, in log space.
        Densities grow with :math:`\lambda`, and with them the rounding of a posterior: in float32
        about :math:`10^{-7} \lambda \log C` of it. A student's class of logit -inf makes the
        density of every teacher 0 that gives it more; where it is 0 for all, the loss is inf and
        its gradients are 0. The gradient to a weight of 0 stops growing where the teacher's density
        is e^80 times the others'; to route with weights of 0, `mixture_kl` is the better loss.

    Source:
        MT-BKD, multi-teacher Bayesian knowledge distillation.

    Example:
        >>> import torch
        >>> import mtkd.functional as F
        >>> student = torch.zeros(1, 2, requires_grad=True)
        >>> teacher = torch.tensor([[[0.0, 0.0], [4.0, 0.0]]])
        >>> loss = F.dirichlet_mixture(student, teacher, torch.tensor([0.5, 0.5]), 6.0)
        >>> print(f"{loss.item():.4f}")
        -0.1521
    """
    rows = _check_rows(student, teacher, weight, mask)
    settings = (_concentrations(concentration, rows),)
    return _reduce(ops.dirichlet_mixture, rows, settings, denominator, reduction)


class _Rows(NamedTuple):
    """What mixtures read, with rows as the only leading dimension, and those that there were."""

    student: Tensor
    teachers: list[Tensor]
    weight: Tensor  # (N, T)
    counted: Tensor | None  # (N, T)
    mask: Tensor | None  # (*, 1): the rows where a teacher of some weight counts
    leading: torch.Size


def _check_rows(
    student: Tensor, teacher: Tensors, weight: Tensor | None, mask: Tensor | None
) -> _Rows:
    check_tensor("student", student)
    teachers, count = check_teacher_logits(teacher, student)
    leading, device = student.shape[:-1], student.device
    shape, flat = (*leading, count), (leading.numel(), count)
    check_mask(mask, shape, device)
    if weight is None:
        weights = torch.ones((), dtype=accumulate_dtype(student), device=device).expand(shape)
    else:
        if not isinstance(weight, Tensor):
            kind = type(weight).__name__
            raise TypeError(f"weight: expected a tensor inside a mixture, got {kind}")
        check_weight("weight", weight, shape, device)
        weights = weight.expand(shape)
    known = weight is None and mask is None
    return _Rows(
        student.reshape(flat[0], student.shape[-1]),
        [x.reshape(flat[0], *x.shape[len(leading) :]) for x in teachers],
        weights.reshape(flat),
        None if mask is None else mask.reshape(flat),
        None if known else _any_counted(weights, mask),
        leading,
    )


def _any_counted(weights: Tensor, mask: Tensor | None) -> Tensor:
    weighed = weights.detach() != 0
    return (weighed if mask is None else weighed & mask).any(-1, keepdim=True)


def _reduce(
    loss: LossOperator,
    rows: _Rows,
    settings: tuple[Any, ...],
    denominator: float | Tensor | None,
    reduction: str,
) -> Tensor:
    dims = (rows.student.shape[-1],)
    return reduce(
        loss,
        [(dims, rows.student, rows.teachers, rows.weight, rows.counted, *settings)],
        [1],
        leading=rows.leading,
        dtype=accumulate_dtype(rows.student),
        device=rows.student.device,
        weight=None,
        mask=rows.mask,
        denominator=denominator,
        reduction=reduction,
    )


def _concentrations(concentration: Any, rows: _Rows) -> Tensor:
    """Return concentrations ``(N, T)``."""
    flat, device = rows.weight.shape, rows.weight.device
    if not isinstance(concentration, Tensor):
        check_number("concentration", concentration)
        dtype = accumulate_dtype(rows.student)
        return torch.full((), concentration, dtype=dtype, device=device).expand(flat)
    check_tensor("concentration", concentration, device)
    whole = (*rows.leading, flat[1])
    if tuple(concentration.shape) not in ((), whole[-1:], whole):
        expected, got = f"(), {whole[-1:]} or {whole}", tuple(concentration.shape)
        raise ValueError(f"concentration: expected shape {expected}, got {got}")
    return concentration.expand(whole).reshape(flat)
