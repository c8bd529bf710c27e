"""Weights by how sure teachers are: of the label, of themselves, or of one another."""

import torch
from torch import Tensor

from .checks import Tensors, check_logits, check_matrix, check_positive, log_probabilities, wide

METHODS = ("ca-mkd", "ebkd", "entropy", "agreement")


def confidence_weights(
    matrix: Tensor, mask: Tensor | None = None, *, method: str = "ca-mkd"
) -> Tensor:
    r"""Weights of a row's teachers from a matrix that measures them.

    With a row's measures u and n of its teachers counted,

    .. math::
        \text{ca-mkd: } w_t = \frac{1 - \mathrm{softmax}(u)_t}{n - 1} \qquad
        \text{ebkd: } w_t = \frac{1 - u_t / \sum_j u_j}{n - 1} \qquad
        \text{entropy: } w_t = \mathrm{softmax}(-u)_t \qquad
        \text{agreement: } w_t = \frac{u_t}{\sum_j u_j}

    - ca-mkd: of `teacher_cross_entropy`; the surer of the label, the more.
    - ebkd: of `teacher_entropy`; the surer of itself, the more.
    - entropy: of `teacher_entropy`; as 1 / perplexity, sharper than ebkd.
    - agreement: of `teacher_agreement`; the nearer to the others, the more.

    Args:
        matrix: one measure an entry, read without gradient; for "ebkd" and "agreement" at least 0.
        mask: entries that count (True); the others weigh 0, whatever they hold.
        method: "ca-mkd", "ebkd", "entropy" or "agreement".

    Shape:
        - matrix ``(*, T)`` of any floating dtype; mask ``(*, T)`` bool.

    Returns:
        Weights ``(*, T)``, detached, that sum to 1 in a row, to 0 where nothing counts: float32, or
        float64 for a float64 matrix.

    Raises:
        ValueError: shapes or devices that do not fit, no teacher, an unknown method.
        TypeError: an argument of the wrong type or dtype.

    Note:
        Some operations on ``(*, T)`` on its device; the host never waits. A single counted teacher
        weighs 1. Where all measures of "ebkd" or "agreement" are 0, weights are equal. A measure of
        inf counts as the largest number. A counted NaN shows in its whole row. As a rule of a loss,
        ``weight=confidence_weights``, "ca-mkd" is of the student's own losses.

    Source:
        CA-MKD: Zhang, Chen, Wang, "Confidence-Aware Multi-Teacher Knowledge Distillation", ICASSP
        2022, arXiv 2201.00007. EBKD: Kwon, Na, Lee, Kim, "Adaptive Knowledge Distillation Based on
        Entropy", ICASSP 2020.

    Example:
        >>> import torch
        >>> from mtkd.weighting import confidence_weights, teacher_cross_entropy
        >>> teacher = torch.tensor([[[4.0, 0.0], [0.0, 4.0], [4.0, 0.0]]])  # the second is wrong
        >>> confidence_weights(teacher_cross_entropy(teacher, torch.tensor([0])))
        tensor([[0.4912, 0.0177, 0.4912]])
    """
    check_matrix("matrix", matrix, mask)
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    dtype = wide(matrix.dtype)
    counted = torch.ones_like(matrix, dtype=torch.bool) if mask is None else mask
    measure = matrix.detach().to(dtype).clamp(max=torch.finfo(dtype).max)
    number = counted.sum(-1, keepdim=True).to(dtype)
    share = _share(measure, counted, number, method)
    if method in ("ca-mkd", "ebkd"):
        share = torch.where(number > 1, (1.0 - share) / (number - 1.0).clamp(min=1.0), 1.0)
    return share.masked_fill(~counted, 0.0)


def _share(measure: Tensor, counted: Tensor, number: Tensor, method: str) -> Tensor:
    """Return shares of counted measures, or of their exponentials, that sum to 1."""
    if method in ("ca-mkd", "entropy"):
        energy = measure if method == "ca-mkd" else -measure
        least = torch.finfo(measure.dtype).min  # not -inf, so that empty rows have no NaN
        return torch.softmax(energy.masked_fill(~counted, least), -1)
    measure = measure.masked_fill(~counted, 0.0)
    largest = measure.amax(-1, keepdim=True)  # first, so that the sum does not overflow
    nothing = largest == 0
    measure = measure / largest.masked_fill(nothing, 1.0)
    total = measure.sum(-1, keepdim=True)
    shares = measure / total.masked_fill(nothing, 1.0)
    return torch.where(nothing, 1.0 / number.clamp(min=1.0), shares)


def teacher_cross_entropy(
    teacher: Tensors, target: Tensor, mask: Tensor | None = None, *, temperature: float = 1.0
) -> Tensor:
    r"""Cross-entropy of each teacher's softmax with the labels, in nats.

    .. math:: u_{nt} = -\log \mathrm{softmax}(z_{nt} / \tau)_{y_n}

    Args:
        teacher: logits, packed or one tensor a teacher; read without gradient.
        target: labels; a row of a negative label, such as -100, has 0 for all.
        mask: entries that count, ``(*, T)`` bool; the others have 0, whatever they hold.
        temperature: :math:`\tau`.

    Shape:
        - teacher ``(*, T, C)``, or a sequence of T tensors ``(*, C)``; target ``(*)``, integers.

    Returns:
        ``(*, T)``, detached: float32, or float64 for float64 logits.

    Raises:
        ValueError: shapes or devices that do not fit.
        TypeError: an argument of the wrong type or dtype.

    Note:
        Teacher after teacher; the host never reads the labels.

    Example:
        >>> import torch
        >>> from mtkd.weighting import teacher_cross_entropy
        >>> teacher_cross_entropy(torch.zeros(1, 3, 8), torch.tensor([5]))
        tensor([[2.0794, 2.0794, 2.0794]])
    """
    teachers, shape = check_logits(teacher, mask)
    check_positive("temperature", temperature)
    if not isinstance(target, Tensor) or target.dtype not in (torch.int64, torch.int32):
        kind = target.dtype if isinstance(target, Tensor) else type(target).__name__
        raise TypeError(f"target: expected a tensor of int64 or int32 labels, got {kind}")
    if target.shape != shape[:-1] or target.device != teachers[0].device:
        expected = f"shape {tuple(shape[:-1])} on {teachers[0].device}"
        got = f"shape {tuple(target.shape)} on {target.device}"
        raise ValueError(f"target: expected {expected}, got {got}")
    label = target.clamp(min=0).long().unsqueeze(-1)
    columns = [-x.gather(-1, label) for x in log_probabilities(teachers, mask, temperature)]
    matrix = torch.cat(columns, -1).masked_fill((target < 0).unsqueeze(-1), 0.0)
    return matrix if mask is None else matrix.masked_fill(~mask, 0.0)


def teacher_entropy(
    teacher: Tensors, mask: Tensor | None = None, *, temperature: float = 1.0
) -> Tensor:
    r"""Entropy of each teacher's softmax, in nats.

    .. math:: u_{nt} = -\sum_c q_{ntc} \log q_{ntc}, \qquad q_{nt} = \mathrm{softmax}(z_{nt} / \tau)

    Args:
        teacher: logits, packed or one tensor a teacher; read without gradient.
        mask: entries that count, ``(*, T)`` bool; the others have 0, whatever they hold.
        temperature: :math:`\tau`.

    Shape:
        - teacher ``(*, T, C)``, or a sequence of T tensors ``(*, C)``.

    Returns:
        ``(*, T)``, detached: float32, or float64 for float64 logits.

    Raises:
        ValueError: shapes or devices that do not fit.
        TypeError: an argument of the wrong type or dtype.

    Note:
        Teacher after teacher; a logit of -inf is a class of probability 0, and 0 log 0 = 0.

    Example:
        >>> import torch
        >>> from mtkd.weighting import teacher_entropy
        >>> teacher_entropy(torch.zeros(1, 2, 8))
        tensor([[2.0794, 2.0794]])
    """
    teachers, _ = check_logits(teacher, mask)
    check_positive("temperature", temperature)
    columns = []
    for log_q in log_probabilities(teachers, mask, temperature):
        columns.append(-(log_q.exp() * log_q.masked_fill(log_q == -torch.inf, 0.0)).sum(-1))
    matrix = torch.stack(columns, -1)
    return matrix if mask is None else matrix.masked_fill(~mask, 0.0)


def teacher_agreement(
    teacher: Tensors, mask: Tensor | None = None, *, temperature: float = 1.0
) -> Tensor:
    r"""What each teacher's softmax has in common with the mean of the other teachers'.

    .. math:: u_{nt} = \sum_c \min(q_{ntc}, \bar q_{ntc}), \qquad
        \bar q_{nt} = \frac{1}{n - 1} \sum_{j \ne t} q_{nj}

    which is 1 less their total variation distance: 1 where they are equal, 0 where no class has a
    chance with both.

    Args:
        teacher: logits, packed or one tensor a teacher; read without gradient.
        mask: entries that count, ``(*, T)`` bool; the others have 0, whatever they hold, and no say
            in the mean.
        temperature: divides the logits.

    Shape:
        - teacher ``(*, T, C)``, or a sequence of T tensors ``(*, C)``.

    Returns:
        ``(*, T)``, detached, between 0 and 1; 1 for a teacher that alone counts: float32, or
        float64 for float64 logits.

    Raises:
        ValueError: shapes or devices that do not fit.
        TypeError: an argument of the wrong type or dtype.

    Note:
        Two walks over the teachers, with some temporaries of ``(*, C)``. An outlier that is alone
        in its opinion weighs little; two teachers agree equally with each other.

    Example:
        >>> import torch
        >>> from mtkd.weighting import teacher_agreement
        >>> teacher = torch.tensor([[[9.0, 0.0], [9.0, 0.0], [0.0, 0.0]]])
        >>> teacher_agreement(teacher)
        tensor([[0.7501, 0.7501, 0.5001]])
    """
    teachers, _ = check_logits(teacher, mask)
    check_positive("temperature", temperature)

    def counted(t: int, q: Tensor) -> Tensor:
        return q if mask is None else q.masked_fill(~mask[..., t : t + 1], 0.0)

    total = torch.zeros((), dtype=wide(teachers[0].dtype), device=teachers[0].device)
    for t, log_q in enumerate(log_probabilities(teachers, mask, temperature)):
        total = total + counted(t, log_q.exp())
    others = torch.full_like(total[..., :1], len(teachers) - 1.0)
    if mask is not None:
        others = mask.sum(-1, keepdim=True).to(total.dtype) - 1.0
    columns = []
    for t, log_q in enumerate(log_probabilities(teachers, mask, temperature)):
        q = counted(t, log_q.exp())
        mean = (total - q).clamp(min=0.0) / others.clamp(min=1.0)
        columns.append(torch.minimum(q, mean).sum(-1))
    matrix = torch.where(others < 1.0, 1.0, torch.stack(columns, -1)).clamp(max=1.0)
    return matrix if mask is None else matrix.masked_fill(~mask, 0.0)
