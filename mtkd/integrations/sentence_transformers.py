"""A loss for sentence-transformers' trainer: labels are the teachers' packed targets."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..distributed import TeacherParallel, reduce_over_ranks
from ..nn import GaussianHeads, Projectors
from ..packing import split
from ..reduction import Weight


class DistillationLoss(nn.Module):
    """Distil many teachers into a SentenceTransformer: a loss for `SentenceTransformerTrainer`.

    Args:
        model: the student, a `SentenceTransformer`.
        heads: `mtkd.nn.GaussianHeads` or `Projectors` of its embedding, or a `TeacherParallel`
            of these.
        norm: what standardises the targets, such as `mtkd.nn.TeacherNorm`, or None.
        weight: weights of the teachers ``(T,)``, or a callable of the matrix and mask.
        options: further keyword arguments of the heads' loss.

    Shape:
        - sentence_features: a dictionary a text column, N rows each; labels ``(N, D)``, the
          packed targets of every column. A teacher whose part of a row holds a NaN or an infinity
          does not count there.

    Returns:
        The mean loss over columns, rows, teachers and ranks, 0-dim.

    Raises:
        ValueError: no labels, labels of the wrong width.
        TypeError: an argument of the wrong type.

    Note:
        The trainer wraps the model in DDP but not the loss, so heads would go apart between ranks:
        they are wrapped here, once there are several. Its checkpoints hold the model alone.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from mtkd.integrations.sentence_transformers import DistillationLoss
        >>> from mtkd.nn import Projectors
        >>> class Student(nn.Linear):  # stands for a SentenceTransformer
        ...     def forward(self, features):
        ...         return {"sentence_embedding": super().forward(features["x"])}
        >>> loss = DistillationLoss(Student(8, 4), Projectors(4, {"cnn": 3, "pca": 5}))
        >>> loss([{"x": torch.randn(2, 8)}], torch.randn(2, 8)).backward()
    """

    def __init__(
        self,
        model: nn.Module,
        heads: GaussianHeads | Projectors | TeacherParallel,
        *,
        norm: nn.Module | None = None,
        weight: Weight = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if not isinstance(heads, (GaussianHeads, Projectors, TeacherParallel)):
            expected = "GaussianHeads, Projectors or TeacherParallel"
            raise TypeError(f"heads: expected {expected}, got {type(heads).__name__}")
        self.model, self.norm, self.weight = model, norm, weight
        self.losses = _Losses(heads, options)
        self._wrapped: list[nn.Module] = []  # in a list: no part of the state dict

    def forward(
        self, sentence_features: Iterable[Mapping[str, Tensor]], labels: Tensor | None
    ) -> Tensor:
        """Return the loss of every text column's embeddings, given the same targets."""
        if labels is None:
            raise ValueError("labels: expected the packed targets (N, D) as label column, got none")
        labels = labels.detach()
        dims = self.losses.dims
        if labels.dim() != 2 or labels.shape[1] != sum(dims):
            expected = f"shape (N, {sum(dims)})"
            raise ValueError(f"labels: expected {expected}, got {tuple(labels.shape)}")
        mask = torch.stack([part.isfinite().all(1) for part in split(labels, dims)], 1)
        embeddings = [self.model(each)["sentence_embedding"] for each in sentence_features]
        targets = labels if self.norm is None else self.norm(labels, mask)
        rows = [torch.cat([each] * len(embeddings)) for each in (targets, mask)]
        matrix = self._synchronised()(torch.cat(embeddings), *rows)
        return reduce_over_ranks(matrix, weight=self.weight, mask=rows[1])

    def _synchronised(self) -> nn.Module:
        """Return the losses, in DDP where there are several ranks to keep alike."""
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not several or isinstance(self.losses.heads, TeacherParallel):
            return self.losses
        if not self._wrapped:
            self._wrapped.append(DistributedDataParallel(self.losses))
        return self._wrapped[0]


class _Losses(nn.Module):
    """Heads as a module whose forward is their loss."""

    def __init__(self, heads: Any, options: dict[str, Any]) -> None:
        super().__init__()
        self.heads, self.options, self.dims = heads, options, heads.teachers.dims

    def forward(self, student: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        loss: Any = self.heads.alignment if isinstance(self.heads, Projectors) else self.heads
        matrix: Tensor = loss(student, target, mask=mask, reduction="none", **self.options)
        return matrix
