"""One seed of the comparison: split the images, fit the teachers, distil, probe everything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from .probes import ink_shape, probe
from .students import LOSSES, distil, make_heads, standardise, student
from .teachers import TEACHERS, Array


@dataclass(frozen=True)
class Settings:
    """One fixed setting for every loss: none is tuned, so none is tuned better than another."""

    seeds: int = 5
    epochs: int = 60
    teacher_epochs: int = 30
    width: int = 32
    hidden: int = 64
    held_out: float = 1 / 3


@dataclass
class Outcome:
    """Scores of one seed, by embedding and probe, and what came with them."""

    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    dims: dict[str, int] = field(default_factory=dict)
    head_parameters: dict[str, int] = field(default_factory=dict)
    student: nn.Module | None = None


Progress = Callable[[str], None]


def steps(settings: Settings) -> int:
    """How often `run_seed` reports progress, over all seeds."""
    return settings.seeds * 2 * (len(TEACHERS) + len(LOSSES) + 1)


def run_seed(seed: int, settings: Settings, progress: Progress = lambda job: None) -> Outcome:
    """Fit the teachers and distil one student a loss on a training split; probe the held-out rest.

    Every seed draws its own split, teachers and students. All losses start from the same student
    and see the same batches in the same order.
    """
    images, digits = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    train, test, *labels = train_test_split(
        images, digits, test_size=settings.held_out, stratify=digits, random_state=seed
    )
    outcome = Outcome()
    embeddings = _teach(train, test, labels[0], seed, settings, progress)
    outcome.dims = {name: pair[0].shape[1] for name, pair in embeddings.items()}
    targets = torch.from_numpy(np.concatenate([pair[0] for pair in embeddings.values()], axis=1))
    for loss in ("untrained", *LOSSES):
        progress(f"student, {loss}")
        model = _distil(loss, train, targets, seed, settings, outcome)
        with torch.no_grad():
            embeddings[loss] = model(_tensor(train)).numpy(), model(_tensor(test)).numpy()
    shapes = ink_shape(train), ink_shape(test)
    for name, pair in embeddings.items():
        progress(f"probing {name}")
        outcome.scores[name] = probe(*pair, (labels[0], labels[1]), shapes, seed)
    return outcome


def _teach(
    train: Array, test: Array, labels: Array, seed: int, settings: Settings, progress: Progress
) -> dict[str, tuple[Array, Array]]:
    """Fit every teacher on the training images; its embeddings of both parts."""
    embeddings = {}
    for name, fit in TEACHERS.items():
        progress(f"teacher, {name}")
        torch.manual_seed(seed)
        embed = fit(train, labels, seed, settings.teacher_epochs)
        embeddings[name] = embed(train), embed(test)
    return embeddings


def _distil(
    loss: str, train: Array, targets: Tensor, seed: int, settings: Settings, outcome: Outcome
) -> nn.Module:
    torch.manual_seed(seed)
    model = student(settings.width)
    if loss == "untrained":
        return model
    dims = list(outcome.dims.values())
    heads = make_heads(loss, settings.width, dims, settings.hidden)
    outcome.head_parameters[loss] = sum(weight.numel() for weight in heads.parameters())
    torch.manual_seed(seed)  # heads drew different numbers: the batches must not
    distil(model, heads, _tensor(train), standardise(targets, dims), settings.epochs)
    if loss == LOSSES[0]:
        outcome.student = model
    return model


def _tensor(images: Array) -> Tensor:
    return torch.from_numpy(images)
