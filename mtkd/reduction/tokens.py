"""Recipes on tokens: the matrix ``(*, L, T)`` of L tokens an image reduced to one of images."""

import torch
from torch import Tensor

from .checks import as_losses, check_mask


def token_mean(loss: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over tokens of a matrix of losses: of each image and teacher, over what counts.

    Args:
        loss: a matrix of tokens, such as a loss with reduction="none" returns; differentiable.
        mask: entries that count (True); whatever the others hold adds nothing.

    Shape:
        - loss ``(*, L, T)`` with L tokens an image; mask ``(*, L, T)`` bool.

    Returns:
        ``(*, T)``, 0 where no token counts (those entries are ``~mask.any(-2)``): float32, or
        float64 when `loss` is float64.

    Raises:
        ValueError: shapes or devices that do not fit.
        TypeError: an argument of the wrong type or dtype.

    Example:
        >>> import torch
        >>> from mtkd.reduction import token_mean
        >>> loss = torch.tensor([[[1.0, 4.0], [3.0, 8.0]]])  # an image of two tokens
        >>> token_mean(loss)
        tensor([[2., 6.]])
        >>> token_mean(loss, torch.tensor([[[True, False], [False, False]]]))
        tensor([[1., 0.]])
    """
    loss = as_losses(loss, 2)
    check_mask(mask, tuple(loss.shape), loss.device)
    if mask is None:
        return loss.sum(-2) / max(loss.shape[-2], 1)
    return loss.masked_fill(~mask, 0.0).sum(-2) / mask.sum(-2).clamp(min=1)


def cls_and_patches(loss: Tensor, mask: Tensor | None = None) -> Tensor:
    """Average of the first token's loss and of the mean over the others, as UNIC has it.

    The first token (cls) weighs as much as all the patches together; where nothing of one of the
    two counts, the other is all there is.

    Args:
        loss: a matrix of tokens, the first of each image its cls token; differentiable.
        mask: entries that count (True); whatever the others hold adds nothing.

    Shape:
        - loss ``(*, L, T)`` with L tokens an image, at least one; mask ``(*, L, T)`` bool.

    Returns:
        ``(*, T)``, 0 where no token counts (those entries are ``~mask.any(-2)``): float32, or
        float64 when `loss` is float64.

    Raises:
        ValueError: shapes or devices that do not fit, no token.
        TypeError: an argument of the wrong type or dtype.

    Source:
        Sariyildiz et al., "UNIC", ECCV 2024, arXiv 2408.05088.

    Example:
        >>> import torch
        >>> import mtkd.functional as F
        >>> from mtkd.reduction import cls_and_patches, reduce_matrix
        >>> from mtkd.weighting import teacher_dropping
        >>> student = torch.randn(2, 5, 8, requires_grad=True)  # two images of a cls and 4 patches
        >>> tokens = F.alignment(student, torch.randn(2, 5, 8), (3, 5), reduction="none")
        >>> images = cls_and_patches(tokens)
        >>> images.shape
        torch.Size([2, 2])
        >>> reduce_matrix(images, weight=teacher_dropping).backward()  # UNIC's loss
    """
    loss = as_losses(loss, 2)
    if loss.shape[-2] < 1:
        raise ValueError(f"loss: expected at least one token, got shape {tuple(loss.shape)}")
    check_mask(mask, tuple(loss.shape), loss.device)
    patches = None if mask is None else mask[..., 1:, :]
    both = torch.stack((loss[..., 0, :], token_mean(loss[..., 1:, :], patches)), -2)
    if mask is None or patches is None:
        return token_mean(both) if loss.shape[-2] > 1 else both[..., 0, :]
    return token_mean(both, torch.stack((mask[..., 0, :], patches.any(-2)), -2))
