"""Teacher dropping: which teachers of a row count."""

import torch
from torch import Tensor

from .checks import check_matrix, wide

NORMALIZATIONS = ("batch", "sample")


def teacher_dropping(
    loss: Tensor,
    mask: Tensor | None = None,
    *,
    p: float = 0.5,
    normalize: str = "batch",
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Keep each row's teacher of the largest loss; drop every other one with probability p.

    With :math:`t^\star_n` the first counted teacher whose loss is row n's largest, and u uniform on
    [0, 1), drawn for every entry,

    .. math:: k_{nt} = [t = t^\star_n] \lor [u_{nt} \ge p], \qquad
        w_{nt} = k_{nt} \;\text{(batch)}, \qquad
        w_{nt} = k_{nt} / \textstyle\sum_j k_{nj} \;\text{(sample)}

    and :math:`w_{nt} = 0` for what is masked. A loss's "mean" with these weights is then

    - batch: :math:`\sum k \ell / \sum k`: every kept entry weighs the same, so that a row weighs
      as much as it keeps teachers (UNIC);
    - sample: the mean over rows of the mean of a row's kept losses: rows weigh the same, those
      without a counted teacher nothing.

    Args:
        loss: the matrix of losses; read without gradient.
        mask: entries that count (True); the others are neither kept nor compared.
        p: probability that a teacher is dropped: 0 drops none, 1 all but the largest.
        normalize: "batch" or "sample".
        generator: what u is drawn from, on the device of `loss`; by default torch's own.

    Shape:
        - loss ``(*, T)`` of any floating dtype; mask ``(*, T)`` bool.

    Returns:
        Weights ``(*, T)``, 0 where dropped or masked: float32, or float64 when `loss` is float64.

    Raises:
        ValueError: shapes or devices that do not fit, no teacher, p outside [0, 1], an unknown
            `normalize`.
        TypeError: an argument of the wrong type or dtype.

    Note:
        Some operations on ``(*, T)`` on its device; the host never waits. u is
        ``torch.rand(loss.shape)``, whatever the mask, in float32. A counted NaN is the largest, as
        in `torch.argmax`, so it is kept and shows in the loss. Rows are what the matrix has: for a
        draw an image, give it ``(B, T)``, such as `mtkd.reduction.cls_and_patches` makes.

    Source:
        Sariyildiz, Weinzaepfel, Lucas, Larlus, Kalantidis, "UNIC: Universal Classification Models
        via Multi-teacher Distillation", ECCV 2024, arXiv 2408.05088 (batch, p = 0.5).

    Example:
        >>> import torch
        >>> from mtkd.weighting import teacher_dropping
        >>> loss = torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 4.0]])
        >>> teacher_dropping(loss, p=1.0)
        tensor([[0., 1., 0.],
                [1., 0., 0.]])
        >>> mask = torch.tensor([[True, False, True], [False, False, False]])
        >>> teacher_dropping(loss, mask, p=0.0, normalize="sample")
        tensor([[0.5000, 0.0000, 0.5000],
                [0.0000, 0.0000, 0.0000]])
    """
    _check(loss, mask, p, normalize, generator)
    loss = loss.detach()
    counted = torch.ones_like(loss, dtype=torch.bool) if mask is None else mask
    shape, device = loss.shape, loss.device
    if generator is None:  # left out: given, even None, it has no symbolic shapes
        draws = torch.rand(shape, dtype=torch.float32, device=device)
    else:
        draws = torch.rand(shape, dtype=torch.float32, device=device, generator=generator)
    kept = counted & (_largest(loss, counted) | (draws >= p))
    weights = kept.to(wide(loss.dtype))
    if normalize == "sample":
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1.0)
    return weights


def _largest(loss: Tensor, counted: Tensor) -> Tensor:
    """Return where the first of a row's largest counted losses is; NaN is larger than any."""
    compared = loss.masked_fill(~counted, -torch.inf)
    largest = (compared == compared.amax(-1, keepdim=True)) | compared.isnan()
    largest = largest & counted  # where all that count are -inf, the masked ones equal them
    return largest & (largest.cumsum(-1) == 1)


def _check(
    loss: Tensor,
    mask: Tensor | None,
    p: float,
    normalize: str,
    generator: torch.Generator | None,
) -> None:
    check_matrix("loss", loss, mask)
    if not isinstance(p, (int, float)):
        raise TypeError(f"p: expected a number between 0 and 1, got {type(p).__name__}")
    if not 0 <= p <= 1:
        raise ValueError(f"p: expected a number between 0 and 1, got {p!r}")
    if normalize not in NORMALIZATIONS:
        expected_names = " or ".join(NORMALIZATIONS)
        raise ValueError(f"normalize: expected {expected_names}, got {normalize!r}")
    if generator is not None and generator.device.type != loss.device.type:
        kind, got_kind = loss.device.type, generator.device.type
        raise ValueError(f"generator: expected one of device {kind}, got {got_kind}")
