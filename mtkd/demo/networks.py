"""The convolutional encoder and the training loop that teachers and students share."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def encoder(channels: int, width: int) -> nn.Sequential:
    """Two convolutions and a linear layer: flat images `(N, 64)` to embeddings `(N, width)`."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, channels, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * channels * 16, width),
    )


def train(
    loss: Callable[[Tensor], Tensor],
    parameters: Iterable[nn.Parameter],
    *,
    rows: int,
    epochs: int,
    rate: float = 2e-3,
    batch: int = 128,
) -> None:
    """Minimise `loss(indices of a batch of rows)` with AdamW and a cosine schedule."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for indices in torch.split(torch.randperm(rows), batch):
            optimizer.zero_grad()
            loss(indices).backward()
            optimizer.step()
        schedule.step()
