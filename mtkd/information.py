"""What losses in nats say about information: bound on the disagreement, gain over no student."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def disagreement_bound(nll: Tensor) -> Tensor:
    r"""The bound on the average disagreement, of conditional entropies of teachers.

    .. math:: 1 - \exp\Big(-\tfrac{1}{T} \sum_t h(T_t \mid S)\Big)

    with the teachers' mean losses, upper bounds of :math:`h(T_t \mid S)`, in place of entropies.

    **When it holds.** For discrete teachers and Shannon entropy: the best predictor of a teacher's
    decision from the student errs with probability at most :math:`1 - e^{-H(T \mid S)}`. A decision
    has no more entropy than its teacher, and by concavity the mean over teachers is bounded by the
    mean entropy.

    **When it does not.** With densities h is a differential entropy: it changes with the units of
    the teachers and can be negative, and so can the bound then. For jointly Gaussian S and T of
    correlation :math:`\rho` and the label "above 0", student and teacher disagree with probability
    :math:`\arccos(\rho) / \pi`, which is more than the bound from :math:`\rho \approx 0.964` on.
    And a classifier of some label Y from the student is not the best predictor of the teacher's
    decision: S constant, P(t1) = .6, P(Y=1|t1) = .51, P(Y=1|t2) = 0 gives disagreement .6 and bound
    .49. So it motivates the loss, and compares students on the same standardised teachers; it is no
    calibrated probability.

    Args:
        nll: losses in total nats of a row and teacher, such as `mtkd.functional.gaussian_nll` with
            ``full=True, per_dim=False, reduction="none"``, or entropies; any shape, all rows and
            teachers counting the same. Differentiable.

    Returns:
        A 0-dim tensor below 1, negative where the mean entropy is; float32, or float64 for float64.

    Raises:
        ValueError: no number.
        TypeError: not a floating-point tensor.

    Source:
        Formont et al., "Learning Task-Agnostic Representations through Multi-Teacher Distillation",
        NeurIPS 2025, arXiv 2510.18680.

    Example:
        >>> import torch
        >>> from mtkd.information import disagreement_bound
        >>> disagreement_bound(torch.tensor([[0.5, 1.0], [0.3, 0.2]]))
        tensor(0.3935)
    """
    if not isinstance(nll, Tensor):
        raise TypeError(f"nll: expected a tensor, got {type(nll).__name__}")
    if not nll.is_floating_point():
        raise TypeError(f"nll: expected a floating-point tensor, got {nll.dtype}")
    if not nll.numel():
        raise ValueError(f"nll: expected at least one number, got shape {tuple(nll.shape)}")
    return -torch.expm1(-nll.to(torch.promote_types(nll.dtype, torch.float32)).mean())


def information_gain(
    nll: Tensor, variance: Tensor, dims: Sequence[int], *, bound: float | None = None
) -> Tensor:
    r"""How many nats a student tells about each teacher: the gain over the best constant Gaussian.

    .. math:: \frac{1}{D_t} \sum_d \Big( \log \sigma_d + \frac{v_d}{2 \sigma_d^2} \Big) - \ell_t,
        \qquad \sigma_d = \min(\max(\sqrt{v_d}, e^{-b}), e^b)

    The first term is the loss of heads that see no student: each column's mean and deviation,
    within the heads' bound b. The difference estimates the mutual information
    :math:`I(T_t; S) / D_t`: it is that, plus the divergence of the teacher's law from a Gaussian of
    independent columns, less the divergence of its law given the student from the heads'. So it is
    no bound, unless the teacher is such a Gaussian: then it is a lower one.

    Args:
        nll: each teacher's mean loss ``(T,)``, in nats per dimension without the constant, as
            `mtkd.nn.GaussianHeads` returns it.
        variance: the variances ``(D,)`` of the targets, as the heads see them.
        dims: the width of each teacher.
        bound: the heads' bound of log standard deviations.

    Returns:
        ``(T,)``, nats per dimension; times ``dims`` it is in nats.

    Raises:
        ValueError: shapes that do not fit.

    Source:
        The estimator: Barber and Agakov, "The IM Algorithm", NeurIPS 2003; its use for teachers:
        Formont et al., NeurIPS 2025, arXiv 2510.18680. The constant Gaussian in place of the
        unknown entropy is ours.

    Example:
        >>> import torch
        >>> from mtkd.information import information_gain
        >>> information_gain(torch.tensor([0.2, 0.5]), torch.ones(5), (2, 3))
        tensor([0.3000, 0.0000])
    """
    if nll.shape != (len(dims),) or variance.shape != (sum(dims),):
        expected = f"({len(dims)},) and ({sum(dims)},)"
        got = f"{tuple(nll.shape)} and {tuple(variance.shape)}"
        raise ValueError(f"nll, variance: expected shapes {expected} for dims, got {got}")
    low = torch.finfo(variance.dtype).tiny ** 0.5 if bound is None else math.exp(-bound)
    high = math.inf if bound is None else math.exp(bound)
    deviation = variance.sqrt().clamp(low, high)
    columns = deviation.log() + 0.5 * (variance.sqrt() / deviation).square()
    return torch.stack([part.mean() for part in columns.split(list(dims))]) - nll
