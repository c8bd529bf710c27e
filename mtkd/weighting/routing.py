"""Routing: a gate chooses k teachers a row, learns from their losses, and is kept balanced."""

from operator import index
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import check_matrix, wide

SHARES = ("equal", "gate")


class Routing(NamedTuple):
    """What `top_k_routing` returns."""

    weight: Tensor
    probability: Tensor
    load_balance: Tensor


def top_k_routing(
    gate_logits: Tensor, k: int, mask: Tensor | None = None, *, share: str = "equal"
) -> Routing:
    r"""Choose each row's k teachers of the largest gate probability.

    With g the softmax of a row's gate logits and :math:`v` the weights of the chosen set K, 0 for
    the others, the weights are

    .. math:: w = \mathrm{sg}(v) + g - \mathrm{sg}(g), \qquad
        v_e = \frac1k \;\text{(equal)} \quad\text{or}\quad
        v_e = g_e \Big/ \sum_{j \in K} g_j \;\text{(gate)}

    with sg the stopped gradient: their value is v, and their gradient that of g (straight through),
    for the teachers that were not chosen too. The load-balance loss over the N rows and E teachers
    is

    .. math:: \mathrm{KL}\Big(U \,\Big\|\, \tfrac1N \sum_n g_n\Big)
        = -\log E - \frac1E \sum_e \log \tfrac1N \sum_n g_{ne}

    Args:
        gate_logits: the gate's output for each row and teacher; differentiable.
        k: how many teachers a row has; all that count where fewer do.
        mask: entries that count, ``(*, E)`` bool; the others have probability and weight 0,
            whatever they hold. The uniform U is then the mean over rows of the distributions that
            are uniform over what counts; rows where nothing counts are left out.
        share: "equal" or "gate".

    Shape:
        - gate_logits ``(*, E)`` of any floating dtype; mask ``(*, E)`` bool.

    Returns:
        The tuple (weight, probability, load_balance): ``(*, E)``, ``(*, E)`` and a 0-dim tensor in
        nats, at least 0; float32, or float64 for float64 logits.

    Raises:
        ValueError: shapes or devices that do not fit, k not between 1 and E, an unknown `share`.
        TypeError: an argument of the wrong type or dtype.

    Note:
        Give `weight` to a loss as its ``weight=``: its gradient reaches the gate, which indices of
        the chosen teachers alone would not let through. Of equal probabilities the first are
        chosen. All three results send gradient through `gate_logits`; so that balance, and routing,
        shape the gate and not the student, run the gate on detached features,
        ``gate(features.detach())``. Load balance is a sum over the teachers of U, whose weights
        sum to 1: it is divided by E once. The host never waits.

    Source:
        Li et al., "MST-Distill: Mixture of Specialized Teachers for Cross-Modal Knowledge
        Distillation", ACM Multimedia 2025, arXiv 2507.07015 (k = 1, equal).

    Example:
        >>> import torch
        >>> from mtkd.weighting import top_k_routing
        >>> gate = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 3.0]], requires_grad=True)
        >>> routing = top_k_routing(gate, 2)
        >>> routing.weight.detach()
        tensor([[0.5000, 0.0000, 0.5000],
                [0.0000, 0.5000, 0.5000]])
        >>> losses = torch.tensor([[1.0, 1.0, 9.0], [1.0, 1.0, 1.0]])
        >>> (routing.weight * losses).sum().backward()
        >>> gate.grad[0].argmax().item()  # the gate learns to leave the third
        2
    """
    number = _check(gate_logits, k, mask, share)
    counted = torch.ones_like(gate_logits, dtype=torch.bool) if mask is None else mask
    log_g = _log_gate(gate_logits, counted)
    g = log_g.exp()
    value = _chosen(log_g.detach(), number, counted).to(g.dtype)
    if share == "gate":
        value = value * g.detach()
    total = value.sum(-1, keepdim=True)
    value = value / total.masked_fill(total == 0, 1.0)
    return Routing(value + (g - g.detach()), g, _load_balance(log_g, counted))


def _log_gate(gate_logits: Tensor, counted: Tensor) -> Tensor:
    """Return log-probabilities, -inf where not counted."""
    logits = gate_logits.to(wide(gate_logits.dtype))
    some = counted.any(-1, keepdim=True)
    logits = logits.masked_fill(~counted & some, -torch.inf).masked_fill(~some, 0.0)
    return torch.log_softmax(logits, -1).masked_fill(~counted, -torch.inf)


def _chosen(log_g: Tensor, k: int, counted: Tensor) -> Tensor:
    """Return where a row's k largest are, the first of equal ones."""
    order = torch.sort(log_g, dim=-1, descending=True, stable=True).indices[..., :k]
    return torch.zeros_like(counted).scatter(-1, order, True) & counted


def _load_balance(log_g: Tensor, counted: Tensor) -> Tensor:
    """Return KL(U || mean of g), in log space: a gate may leave a teacher without any weight."""
    log_g, counted = (x.reshape(-1, x.shape[-1]) for x in (log_g, counted))
    number = counted.sum(-1, keepdim=True).to(log_g.dtype)
    rows = (number > 0).sum().clamp(min=1).to(log_g.dtype)
    uniform = (counted / number.clamp(min=1.0)).sum(0) / rows
    served = counted.any(0)
    log_mean = torch.logsumexp(log_g.masked_fill(~served, 0.0), 0) - rows.log()
    log_uniform = torch.where(served, uniform, 1.0).log()
    return (uniform * (log_uniform - log_mean)).masked_fill(~served, 0.0).sum()


def _check(gate_logits: Any, k: Any, mask: Any, share: str) -> int:
    check_matrix("gate_logits", gate_logits, mask)
    if isinstance(k, bool):
        raise TypeError(f"k: expected an integer, got {k!r}")
    try:
        number = index(k)
    except TypeError:
        raise TypeError(f"k: expected an integer, got {type(k).__name__}") from None
    if not 1 <= number <= gate_logits.shape[-1]:
        teachers = gate_logits.shape[-1]
        raise ValueError(f"k: expected a number of teachers from 1 to {teachers}, got {k}")
    if share not in SHARES:
        raise ValueError(f"share: expected {' or '.join(SHARES)}, got {share!r}")
    return number
