"""Negative log-likelihood of teachers under Gaussian heads, and mixtures of them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import linear, ops
from ..packing import join_small, stack_equal
from ..reduction import Weight, reduce, split_columns
from ..reference.columns import accumulate_dtype
from .checks import (
    Dims,
    Group,
    check_bound,
    check_dims,
    check_shape,
    check_target,
    check_tensor,
    group_teachers,
)
from .layers import autocast, input_leading, keeps_stash

ROW_NAMES = ("mean", "log_std", "target")
Tensors = Tensor | Sequence[Tensor]


def gaussian_nll(
    mean: Tensors,
    log_std: Tensors,
    target: Tensors,
    dims: Dims | None = None,
    *,
    mode_logits: Tensor | None = None,
    bound: float | None = None,
    per_dim: bool = True,
    full: bool = False,
    weight: Weight = None,
    mask: Tensor | None = None,
    denominator: float | Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Negative log-likelihood of every teacher under a diagonal Gaussian, or a mixture of M.

    With :math:`z = (t - \mu) / \sigma` and :math:`\sigma = \exp(\text{log\_std})`, the loss of a
    row and teacher with columns d is

    .. math:: \ell = \tfrac{1}{D_t} \sum_d \tfrac{1}{2} z_d^2 + \log \sigma_d

    and, with M modes of energies :math:`e_m` (the sum above, of mode m) and
    :math:`\pi = \text{softmax}(\text{mode\_logits})`,
    :math:`\ell = -\tfrac{1}{D_t} \log \sum_m \pi_m \exp(-e_m)`.

    Args:
        mean: the means, packed with `dims` or one tensor a teacher.
        log_std: natural logarithms of the standard deviations, like `mean`.
        target: the teachers' embeddings; any floating dtype, no gradient.
        dims: the width of each teacher, a sequence or a mapping by name, in order; None with a
            tensor means a single teacher.
        mode_logits: unnormalised log-probabilities of mixture modes; their log-softmax over the
            modes is taken here.
        bound: with b, ``b * tanh(log_std / b)`` takes the place of `log_std`.
        per_dim: divide each teacher's loss by its width (after the logarithm over modes).
        full: add the constant ``D_t / 2 log 2 pi`` (before the division).
        weight: weights of teachers ``(T,)`` or of entries ``(*, T)``; may require grad; or a
            callable (detached matrix ``(*, T)``, mask) -> weights, such as those of
            `mtkd.weighting`.
        mask: entries that count, ``(*, T)`` bool; whatever the others hold adds nothing.
        denominator: divides the sum, in place of the sum of the counted weights.
        reduction: "none", "mean" or "sum" over rows and teachers.

    Shape:
        - mean, log_std: ``(*, D)`` with ``D = sum(dims)``, or sequences of ``(*, D_t)``; with
          modes ``(*, M, D)`` or sequences of ``(*, M, D_t)``.
        - target: ``(*, D)`` or a sequence of ``(*, D_t)``. mode_logits: ``(*, M, T)``.

    Returns:
        ``(*, T)`` for "none", else a 0-dim tensor: nats per dimension (nats without `per_dim`),
        float32, or float64 when `mean` or `log_std` is float64.

    Raises:
        ValueError: shapes, widths or devices that do not fit, a target that requires grad.
        TypeError: not a tensor, an integer dtype, a DTensor.

    Note:
        Forward and backward read each input once and write each gradient once for "mean" and
        "sum"; nothing else of size ``(*, D)`` is made. float16 and bfloat16 are read as they are
        and computed in float32. float16 is read again in backward, when the loss scale is known;
        so is everything with a callable `weight`, since no gradient is known before the matrix is.
        A sequence is one call a teacher unless teachers are small: pack hundreds of them.

    Source:
        Formont et al., "Learning Task-Agnostic Representations through Multi-Teacher
        Distillation", NeurIPS 2025, arXiv 2510.18680: the bound on the conditional entropies
        h(T_k | S). Mixtures: Pichler et al., KNIFE, arXiv 2202.06618.

    Example:
        >>> import torch
        >>> import mtkd.functional as F
        >>> dims = (3, 5)  # two teachers
        >>> mean = torch.zeros(4, 8, requires_grad=True)
        >>> log_std = torch.zeros(4, 8, requires_grad=True)
        >>> loss = F.gaussian_nll(mean, log_std, torch.ones(4, 8), dims)
        >>> loss.item()
        0.5
        >>> loss.backward()
        >>> F.gaussian_nll(mean, log_std, torch.ones(4, 8), dims, reduction="none").shape
        torch.Size([4, 2])
    """
    check_bound(bound)
    groups = group_teachers(dims, mean=mean, log_std=log_std, target=target)
    inner = 1 if mode_logits is None else 2
    leading = _leading(groups[0], mode_logits)
    calls = join_small([_row_arguments(group, leading, inner) for group in groups])
    counts = [len(call[0]) for call in calls]
    logits = _mode_logits(mode_logits, sum(counts), calls[0][1].device)
    return reduce(
        ops.gaussian_nll,
        [
            (*call, part, bound, per_dim, full)
            for call, part in zip(calls, split_columns(logits, counts), strict=True)
        ],
        counts,
        leading=leading,
        dtype=accumulate_dtype(*(tensor for call in calls for tensor in call[1:3])),
        device=calls[0][1].device,
        weight=weight,
        mask=mask,
        denominator=denominator,
        reduction=reduction,
    )


def _leading(group: Group, mode_logits: Any) -> torch.Size:
    """Return the leading dimensions of the means, which with modes those of the logits decide."""
    name = f"mean{group.suffix}"
    mean: Tensor = group.tensors[0]
    check_tensor(name, mean)
    if mean.dim() < 1:
        raise ValueError(f"{name}: expected shape (*, D), got a 0-dim tensor")
    if mode_logits is None:
        return mean.shape[:-1]
    check_tensor("mode_logits", mode_logits)
    if mode_logits.dim() < 2:
        raise ValueError(
            f"mode_logits: expected shape (*, M, T), got shape {tuple(mode_logits.shape)}"
        )
    if mode_logits.shape[-2] == 0:
        raise ValueError("mode_logits: expected at least one mode, got none")
    check_shape(name, mean, (*mode_logits.shape[:-1], mean.shape[-1]))
    return mean.shape[:-2]


def _row_arguments(group: Group, leading: torch.Size, inner: int) -> tuple[Any, ...]:
    """Check a group; return its dims and its tensors with rows as their only leading dimension."""
    mean, log_std, target = group.tensors
    mean_name, log_std_name, target_name = (name + group.suffix for name in ROW_NAMES)
    check_tensor(mean_name, mean)
    device, shape = mean.device, mean.shape
    check_tensor(log_std_name, log_std, device)
    check_target(target_name, target, device)
    check_shape(mean_name, mean, (*leading, *shape[-inner:]))
    check_shape(log_std_name, log_std, shape)
    check_shape(target_name, target, (*leading, shape[-1]))
    dims = check_dims(group.dims, shape[-1], mean_name)
    if len(leading) == 1:
        return dims, mean, log_std, target
    rows = leading.numel()
    flat = (rows, *shape[-inner:])
    return dims, mean.reshape(flat), log_std.reshape(flat), target.reshape(rows, shape[-1])


def _mode_logits(mode_logits: Tensor | None, teachers: int, device: torch.device) -> Tensor | None:
    if mode_logits is None:
        return None
    check_tensor("mode_logits", mode_logits, device)
    check_shape("mode_logits", mode_logits, (*mode_logits.shape[:-1], teachers))
    return mode_logits.reshape(-1, *mode_logits.shape[-2:])


def linear_gaussian_nll(
    input: Tensors,
    linear_weight: Tensors,
    target: Tensors,
    dims: Dims | None = None,
    *,
    linear_bias: Tensors | None = None,
    mode_weight: Tensors | None = None,
    mode_bias: Tensors | None = None,
    bound: float | None = None,
    per_dim: bool = True,
    full: bool = False,
    weight: Weight = None,
    mask: Tensor | None = None,
    denominator: float | Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Gaussian negative log-likelihood fused with the last linear layer of its heads.

    Equal to `gaussian_nll` with

    .. math:: \mu = W_0 x + b_0, \quad \text{log\_std} = W_1 x + b_1

    (and mode logits likewise), but neither these nor their gradients are ever held whole.

    Args:
        input: student embeddings shared by the teachers, or one tensor a teacher.
        linear_weight: mean rows, then log_std rows, of all teachers; or one tensor a teacher.
        target: the teachers' embeddings; any floating dtype, no gradient.
        dims: the width of each teacher, a sequence or a mapping by name, in order; None with a
            tensor means a single teacher.
        linear_bias: biases of `linear_weight`.
        mode_weight: weights of the mode logits; makes the heads mixtures of M modes.
        mode_bias: biases of `mode_weight`.
        bound: with b, ``b * tanh(log_std / b)`` takes the place of the log standard deviations.
        per_dim: divide each teacher's loss by its width.
        full: add the constant ``D_t / 2 log 2 pi``.
        weight: weights of teachers ``(T,)`` or of entries ``(*, T)``; may require grad; or a
            callable (detached matrix ``(*, T)``, mask) -> weights, such as those of
            `mtkd.weighting`.
        mask: entries that count, ``(*, T)`` bool.
        denominator: divides the sum, in place of the sum of the counted weights.
        reduction: "none", "mean" or "sum" over rows and teachers.

    Shape:
        - input ``(*, H)``, linear_weight ``(2, D, H)``, linear_bias ``(2, D)``, target
          ``(*, D)`` with ``D = sum(dims)``.
        - mixtures: linear_weight ``(2, M, D, H)``, linear_bias ``(2, M, D)``, mode_weight
          ``(M, T, H)``, mode_bias ``(M, T)``.
        - a teacher's own input: sequences of T such tensors, each with ``T = 1``.

    Returns:
        ``(*, T)`` for "none", else a 0-dim tensor: nats per dimension (nats without `per_dim`),
        float32, or float64 when `input` or `linear_weight` is float64.

    Raises:
        ValueError: shapes, widths or devices that do not fit, a target that requires grad.
        TypeError: not a tensor, an integer dtype, a DTensor.

    Note:
        "mean" and "sum" take three GEMMs, gradients included, and memory for one tile of rows
        and teachers; `mtkd.linear.workspace` bounds it. float16 inputs take a fourth GEMM, and so
        do "none" and a callable `weight` where the gradients do not fit the workspace. Under
        autocast `input` and the weights are cast; what they make is float32. With inputs of their
        own, equal teachers of at most 2^18 numbers a tensor are stacked into one call; others are
        a call each.

    Source:
        As for `gaussian_nll`; the fused form follows ``torch.nn.functional.linear_cross_entropy``.

    Example:
        >>> import torch
        >>> import mtkd.functional as F
        >>> student = torch.randn(4, 16, requires_grad=True)
        >>> heads = torch.zeros(2, 8, 16, requires_grad=True)
        >>> loss = F.linear_gaussian_nll(student, heads, torch.ones(4, 8), (3, 5))
        >>> loss.item()
        0.5
    """
    check_bound(bound)
    groups = group_teachers(
        dims,
        input=input,
        linear_weight=linear_weight,
        target=target,
        linear_bias=linear_bias,
        mode_weight=mode_weight,
        mode_bias=mode_bias,
    )
    leading = input_leading(groups[0])
    calls = [_linear_arguments(group, leading) for group in groups]
    calls = list(stack_equal(calls, columns=(-2, -1, -2, -1, -1)))
    width = sum(map(_projected, calls))
    stash = keeps_stash(calls, leading.numel(), width, weight, reduction)
    budget = linear.workspace_size()
    return reduce(
        ops.linear_gaussian_nll,
        [(*call, bound, per_dim, full, budget, stash) for call in calls],
        [len(call[0]) for call in calls],
        leading=leading,
        dtype=accumulate_dtype(*(tensor for call in calls for tensor in call[1:3])),
        device=calls[0][1].device,
        weight=weight,
        mask=mask,
        denominator=denominator,
        reduction=reduction,
    )


def _linear_arguments(group: Group, leading: torch.Size) -> tuple[Any, ...]:
    """Check a group; return dims, input ``(N, H)``, layers with a mode dimension, target."""
    (input, weight, target, bias, mode_weight, mode_bias), suffix = group.tensors, group.suffix
    check_tensor(f"input{suffix}", input)
    layers = {"linear_weight": weight, "linear_bias": bias}
    layers |= {"mode_weight": mode_weight, "mode_bias": mode_bias}
    for name, tensor in layers.items():
        if tensor is not None or name == "linear_weight":
            check_tensor(name + suffix, tensor, input.device)
    check_target(f"target{suffix}", target, input.device)
    features, inner = input.shape[-1], 1 if mode_weight is None else 2
    check_shape(f"input{suffix}", input, (*leading, features))
    if weight.dim() != inner + 2:
        shape = "(2, D, H)" if inner == 1 else "(2, M, D, H), since mode_weight is given"
        raise ValueError(
            f"linear_weight{suffix}: expected shape {shape}, got shape {tuple(weight.shape)}"
        )
    inside = weight.shape[1:-1]
    check_shape(f"linear_weight{suffix}", weight, (2, *inside, features))
    if inside[0] == 0:
        raise ValueError(f"linear_weight{suffix}: expected at least one mode or column, got none")
    check_shape(f"target{suffix}", target, (*leading, inside[-1]))
    dims = check_dims(group.dims, inside[-1], f"linear_weight{suffix}")
    if bias is not None:
        check_shape(f"linear_bias{suffix}", bias, (2, *inside))
    if mode_weight is not None:
        check_shape(f"mode_weight{suffix}", mode_weight, (inside[0], len(dims), features))
    if mode_bias is not None and mode_weight is None:
        raise ValueError(f"mode_bias{suffix}: expected None without mode_weight")
    if mode_bias is not None:
        check_shape(f"mode_bias{suffix}", mode_bias, (inside[0], len(dims)))
    rows = leading.numel()
    input, target = input.reshape(rows, features), target.reshape(rows, inside[-1])
    input, weight, mode_weight = (autocast(x) for x in (input, weight, mode_weight))
    return dims, input, weight, bias, mode_weight, mode_bias, target


def _projected(call: tuple[Any, ...]) -> int:
    """Return the numbers that a call's layers make of a row."""
    _, _, weight, _, mode_weight, *_ = call
    layers = [weight] if mode_weight is None else [weight, mode_weight]
    return sum(layer.shape[:-1].numel() for layer in layers)
