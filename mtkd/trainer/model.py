"""The module that is trained: student and objectives in one forward, as DDP and FSDP want it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..nn import TeacherNorm
from ..nn.moments import Estimator
from .encoders import Encoder
from .objectives import Objective


class Distillation(nn.Module):
    """Student, objectives, the targets' statistics: all that a checkpoint holds.

    Args:
        student: the encoder.
        objectives: an `Objective` by name.
        norm: what standardises the targets, or None.
        marginal: statistics of the targets as heads see them, where information is estimated.
        recompute: whether backward makes the student's activations anew.
    """

    accepts_loss_kwargs = True  # the loss is scaled for accumulation already

    def __init__(
        self,
        student: Encoder,
        objectives: Mapping[str, Objective],
        norm: Estimator | None,
        marginal: TeacherNorm | None,
        recompute: bool,
    ) -> None:
        super().__init__()
        self.student, self.recompute = student, recompute
        self.objectives = nn.ModuleDict(objectives)
        given = {"norm": norm, "marginal": marginal}
        # not children of this module: accelerate takes what is called a norm for a layer of FSDP's
        self.statistics = nn.ModuleDict({name: each for name, each in given.items() if each})

    @property
    def norm(self) -> Estimator | None:
        """What standardises the targets, or None."""
        norm: Estimator | None = self._statistics("norm")
        return norm

    @property
    def marginal(self) -> TeacherNorm | None:
        """Statistics of the targets as heads see them, or None."""
        marginal: TeacherNorm | None = self._statistics("marginal")
        return marginal

    def _statistics(self, name: str) -> Any:
        return dict(self.statistics.items()).get(name)

    def forward(
        self, batches: Sequence[Mapping[str, Any]], targets: Tensor, mask: Tensor
    ) -> dict[str, Any]:
        """Return the embeddings of all batches, and each objective's matrix."""
        recompute = self.recompute and torch.is_grad_enabled()
        embeddings = [
            checkpoint(self.student, batch, use_reentrant=False)
            if recompute
            else self.student(batch)
            for batch in batches
        ]
        rows = sum(len(embedding) if embedding.dim() else 0 for embedding in embeddings)
        if rows != len(mask) or embeddings[0].dim() != 2:
            got = ", ".join(str(tuple(embedding.shape)) for embedding in embeddings)
            expected = f"embeddings (N, H), N = {len(mask)} as the batch has rows of targets"
            raise ValueError(f"student: expected {expected}, got {got}")
        embedding = embeddings[0] if len(embeddings) == 1 else torch.cat(embeddings)
        matrices = {
            name: objective(embedding, targets, mask) for name, objective in self.objectives.items()
        }
        return {"embedding": embedding, "matrices": matrices}

    # What transformers' settings ask of the model they pass on to the student.

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Turn on the student's checkpointing."""
        self._of_student("activation_checkpointing_enable")(*args, **kwargs)

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Turn on the same, as older transformers call it."""
        self._of_student("gradient_checkpointing_enable")(*args, **kwargs)

    def get_input_embeddings(self) -> nn.Module | None:
        """Return the student's embeddings of tokens, if it has any: NEFTune adds noise to them."""
        find = getattr(self.student.model, "get_input_embeddings", lambda: None)
        module: nn.Module | None = find()
        return module

    def _of_student(self, method: str) -> Callable[..., Any]:
        found: Callable[..., Any] | None = getattr(self.student.model, method, None)
        if found is None:
            raise ValueError(
                f"args: expected settings that the student has, got one that needs {method} of"
                f" {type(self.student.model).__name__}; recompute_student=True works for any module"
            )
        return found
