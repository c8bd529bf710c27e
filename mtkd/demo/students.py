"""One small student, distilled without labels by one of three losses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..nn import GaussianHeads, TeacherNorm
from .networks import encoder, train

LOSSES = ("gaussian", "mse", "cosine")


def student(width: int = 32) -> nn.Sequential:
    """The student: flat images `(N, 64)` to embeddings `(N, width)`."""
    return encoder(8, width)


def matched_width(in_features: int, dim: float, hidden: int) -> int:
    """Hidden width that gives a point head the parameters of a Gaussian head of width `hidden`.

    A Gaussian head ends in 2 `dim` outputs and a point head in `dim`, so that one gets more units.
    """
    gaussian = (in_features + 1) * hidden + (hidden + 1) * 2 * dim
    return round((gaussian - dim) / (in_features + 1 + dim))


class PointHeads(nn.Module):
    """An MLP a teacher that predicts its standardised embedding; the loss is `mse` or `cosine`."""

    def __init__(self, in_features: int, dims: Sequence[int], hidden: int, loss: str) -> None:
        super().__init__()
        self.dims = list(dims)
        self.loss = loss
        widths = [matched_width(in_features, dim, hidden) for dim in dims]
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(in_features, width), nn.ReLU(), nn.Linear(width, dim))
            for width, dim in zip(widths, dims, strict=True)
        )

    def forward(self, student: Tensor, target: Tensor) -> Tensor:
        """Mean over rows and teachers of the loss; `student` `(N, H)`, `target` `(N, D)`."""
        losses = [
            F.mse_loss(head(student), part)
            if self.loss == "mse"
            else 1 - F.cosine_similarity(head(student), part).mean()
            for head, part in zip(self.heads, torch.split(target, self.dims, 1), strict=True)
        ]
        return torch.stack(losses).mean()


def make_heads(loss: str, in_features: int, dims: Sequence[int], hidden: int = 64) -> nn.Module:
    """Heads with one hidden layer for `loss`, with nearly the same parameters for every loss."""
    if loss == "gaussian":
        return GaussianHeads(in_features, dims, hidden_features=hidden, depth=1)
    return PointHeads(in_features, dims, hidden, loss)


def distil(
    model: nn.Module, heads: nn.Module, images: Tensor, targets: Tensor, epochs: int
) -> None:
    """Train the student and its heads to predict the teachers' standardised embeddings."""
    train(
        lambda rows: heads(model(images[rows]), targets[rows]),
        [*model.parameters(), *heads.parameters()],
        rows=len(images),
        epochs=epochs,
    )


def standardise(targets: Tensor, dims: Sequence[int]) -> Tensor:
    """Targets `(N, D)` of the training images with mean 0 and deviation 1 in every column."""
    norm = TeacherNorm(dims)
    norm(targets)
    result: Tensor = norm.eval()(targets)
    return result
