"""Majority vote: a student's classes against the decisions of many teachers."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..reduction import Weight, check_mask, check_weight, reduce
from ..reference.columns import accumulate_dtype
from ..reference.votes import largest, uniform, winners
from .checks import check_number, check_teacher_logits, check_tensor, is_sequence

Tensors = Tensor | Sequence[Tensor]
BY_TEACHER, TOGETHER = ("each", "soft"), ("plurality", "mean")
VOTES = (*BY_TEACHER, *TOGETHER)
NO_LABEL = -100  # which torch.nn.functional.cross_entropy ignores


def majority_vote(
    student: Tensor,
    teacher: Tensors,
    *,
    vote: str = "each",
    temperature: float = 1.0,
    weight: Weight = None,
    mask: Tensor | None = None,
    denominator: float | Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Cross-entropy of a student's classes against what its teachers vote for.

    With the student's logits s and a vote q, a distribution over the C classes,

    .. math:: \ell = \log \sum_c e^{s_c} - \sum_c q_c s_c

    - ``each``: a column a teacher; q is the teacher's decision, its class of the largest logit
      (equal ones share the vote equally). A smooth surrogate of the average disagreement.
    - ``soft``: a column a teacher; q is the teacher's softmax at `temperature`.
    - ``plurality``: one column; q is the class that most teachers decide for, by weight (winners of
      a tie share equally).
    - ``mean``: one column; q is the weighted mean of the teachers' softmaxes at `temperature`.

    Args:
        student: the student's logits; its softmax is taken at temperature 1.
        teacher: the teachers' logits, packed or one tensor a teacher; any floating dtype, no
            gradient.
        vote: "each", "soft", "plurality" or "mean".
        temperature: divides the teachers' logits for "soft" and "mean".
        weight: weights of teachers ``(T,)`` or of entries ``(*, T)``; may require grad; or a
            callable ``(matrix, mask) -> weights``. For "plurality" and "mean" they weigh the votes
            in a row: a tensor of numbers of at least 0 without gradient, only their ratios count.
        mask: entries that count, ``(*, T)`` bool; whatever the others hold adds nothing. For
            "plurality" and "mean" a row counts if a teacher of weight above 0 does.
        denominator: divides the sum, in place of the sum of the counted weights, or for "plurality"
            and "mean" of the number of counted rows.
        reduction: "none", "mean" or "sum" over rows and columns.

    Shape:
        - student ``(*, C)``; teacher ``(*, T, C)``, or a sequence of T tensors ``(*, C)``.

    Returns:
        In nats: ``(*, T)``, or ``(*, 1)`` for "plurality" and "mean", with reduction "none", else a
        0-dim tensor; float32, or float64 for a float64 student.

    Raises:
        ValueError: shapes or devices that do not fit, an unknown vote, a teacher that requires
            grad.
        TypeError: not a tensor, an integer dtype, a DTensor.

    Note:
        The teachers' logits are read once and nothing of their size is written. For "mean" and
        "sum" the gradient comes with the value; for "none" the backward of "each" and "plurality"
        reads the teachers again only where a vote was tied. 16-bit tensors are read as they are and
        computed in float32. Shares of "plurality" that differ by less than 1e-5 of the
        largest are a tie. A student's class of logit -inf adds nothing where q is 0, and gives inf
        where it is not. A counted teacher whose row holds NaN, or nothing above -inf, has no vote:
        the loss is NaN.

    Source:
        Formont et al., "Learning Task-Agnostic Representations through Multi-Teacher Distillation",
        NeurIPS 2025, arXiv 2510.18680: the average disagreement with the teachers.

    Example:
        >>> import torch
        >>> import mtkd.functional as F
        >>> student = torch.tensor([[2.0, 0.0, 0.0]], requires_grad=True)
        >>> teacher = torch.tensor([[[3.0, 0.0, 1.0], [0.0, 1.0, 0.0], [5.0, 0.0, 0.0]]])
        >>> F.majority_vote(student, teacher, reduction="none")
        tensor([[0.2395, 2.2395, 0.2395]], grad_fn=<ViewBackward0>)
        >>> print(f"{F.majority_vote(student, teacher, vote='plurality').item():.4f}")
        0.2395
    """
    if vote not in VOTES:
        raise ValueError(f"vote: expected one of {', '.join(VOTES)}, got {vote!r}")
    check_number("temperature", temperature, positive=True)
    check_tensor("student", student)
    teachers, count = check_teacher_logits(teacher, student, least=2)
    leading, classes = student.shape[:-1], student.shape[-1]
    rows, dtype = leading.numel(), accumulate_dtype(student)
    votes, columns = None, count
    if vote in TOGETHER:
        votes, columns = _votes(weight, mask, (*leading, count), dtype, student.device), 1
        known = weight is None and mask is None
        mask = None if known else (votes != 0).any(-1).reshape(*leading, 1)
        weight = None
    flat = [x.reshape(rows, *x.shape[len(leading) :]) for x in teachers]
    settings = float(temperature), vote in ("each", "plurality")
    return reduce(
        ops.majority_vote,
        [((classes,) * columns, student.reshape(rows, classes), flat, votes, *settings)],
        [columns],
        leading=leading,
        dtype=dtype,
        device=student.device,
        weight=weight,
        mask=mask,
        denominator=denominator,
        reduction=reduction,
    )


def disagreement(student: Tensor, teacher: Tensors) -> Tensor:
    """Where a student's decision differs from each teacher's: 1, else 0.

    A decision is the class of the largest logit. Where several are equal the two agree if one class
    is the largest of both; a row without a decision (NaN, or nothing above -inf) agrees with none.

    Args:
        student: the student's logits, of any floating dtype; read without gradient.
        teacher: the teachers' logits, packed or one tensor a teacher.

    Shape:
        - student ``(*, C)``; teacher ``(*, T, C)``, or a sequence of T tensors ``(*, C)``.

    Returns:
        ``(*, T)``, float32: its mean is the average disagreement.

    Raises:
        ValueError: shapes or devices that do not fit, a teacher that requires grad.
        TypeError: not a tensor, an integer dtype, a DTensor.

    Note:
        Teacher after teacher, with a few temporaries of ``(*, C)``. What `majority_vote` is a
        smooth surrogate of.

    Source:
        Formont et al., arXiv 2510.18680.

    Example:
        >>> import torch
        >>> import mtkd.functional as F
        >>> teacher = torch.tensor([[[3.0, 0.0], [0.0, 1.0], [2.0, 2.0]]])
        >>> F.disagreement(torch.tensor([[1.0, 0.0]]), teacher)
        tensor([[0., 1., 0.]])
    """
    check_tensor("student", student)
    teachers, _ = check_teacher_logits(teacher, student, least=2)
    decision = largest(student.detach())
    agreed = [(largest(x) & decision).any(-1) for x in _each(teachers)]
    return 1.0 - torch.stack(agreed, -1).float()


class Consensus(NamedTuple):
    """What `consensus_labels` returns."""

    labels: Tensor
    share: Tensor
    margin: Tensor


def consensus_labels(
    teacher: Tensors, weight: Tensor | None = None, mask: Tensor | None = None
) -> Consensus:
    """Labels by the weighted vote of the teachers' decisions, and how clear it was.

    A teacher votes for its class of the largest logit (equal ones share its vote); votes are
    those of `majority_vote` with ``vote="plurality"``.

    Args:
        teacher: the teachers' logits, packed or one tensor a teacher.
        weight: weights of teachers ``(T,)`` or of entries ``(*, T)``, at least 0.
        mask: entries that count, ``(*, T)`` bool; whatever the others hold adds nothing.

    Shape:
        - teacher ``(*, T, C)``, or a sequence of T tensors ``(*, C)``.

    Returns:
        The tuple (labels, share, margin), each ``(*)``: the class of most votes (of a tie the
        first) as int64; its share of the votes; that share less the next class's, 0 in a tie. A row
        where no teacher counts has the label -100, which torch's cross-entropy ignores, share and
        margin 0; so has the label, with NaN for both, one where a counted teacher has no vote (NaN,
        or nothing above -inf).

    Raises:
        ValueError: shapes or devices that do not fit, a teacher that requires grad.
        TypeError: not a tensor, an integer dtype, a DTensor.

    Note:
        Teacher after teacher, with a few temporaries of ``(*, C)``.

    Example:
        >>> import torch
        >>> import mtkd.functional as F
        >>> teacher = torch.tensor([[[3.0, 0.0], [0.0, 1.0], [2.0, 1.0]]])
        >>> F.consensus_labels(teacher, weight=torch.tensor([1.0, 2.0, 5.0]))
        Consensus(labels=tensor([0]), share=tensor([0.7500]), margin=tensor([0.5000]))
    """
    like: Any = teacher[0] if is_sequence(teacher) and teacher else teacher
    check_tensor("teacher[0]" if is_sequence(teacher) else "teacher", like)
    if not is_sequence(teacher) and like.dim() > 1 and like.shape[-2]:
        like = like[..., 0, :]
    teachers, count = check_teacher_logits(teacher, like, least=2)
    shape, device = (*like.shape[:-1], count), like.device
    votes = _votes(weight, mask, shape, accumulate_dtype(like), device).reshape(shape)
    total = votes.sum(-1, keepdim=True)
    parts = votes / total.masked_fill(total == 0, 1.0)
    shares = torch.zeros(like.shape, dtype=votes.dtype, device=device)
    for logits, part in zip(_each(teachers), parts.split(1, -1), strict=True):
        vote = uniform(largest(logits), votes.dtype)
        shares += (part * vote).masked_fill(part == 0, 0.0)
    won = winners(shares)
    labels = won.to(torch.uint8).argmax(-1, keepdim=True)  # the first of them
    share = shares.gather(-1, labels)
    margin = share - shares.scatter(-1, labels, 0.0).amax(-1, keepdim=True)
    margin = margin.masked_fill(won.sum(-1, keepdim=True) > 1, 0.0)
    labels = labels.masked_fill((total == 0) | share.isnan(), NO_LABEL)
    return Consensus(labels.squeeze(-1), share.squeeze(-1), margin.squeeze(-1))


def _each(teachers: Sequence[Tensor]) -> Sequence[Tensor]:
    """One teacher after another."""
    views: Sequence[Tensor] = teachers[0].unbind(-2) if len(teachers) == 1 else teachers
    return views


def _votes(
    weight: Any,
    mask: Tensor | None,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Return what each teacher's vote weighs, ``(N, T)``, 0 where it does not count."""
    check_mask(mask, shape, device)
    votes = torch.ones((), dtype=dtype, device=device)
    if weight is not None:
        if not isinstance(weight, Tensor):
            kind = type(weight).__name__
            raise TypeError(f"weight: expected a tensor inside a vote, got {kind}")
        check_weight("weight", weight, shape, device)
        if weight.requires_grad:
            raise ValueError(
                "weight: expected no gradient, since inside a vote weights receive none;"
                " got requires_grad=True; pass weight.detach()"
            )
        votes = weight.to(dtype)
    votes = votes.expand(shape)
    return (votes if mask is None else votes.masked_fill(~mask, 0.0)).reshape(-1, shape[-1])
