"""The student alone, as others load it."""

import os
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from ..nn import student_state_dict
from .checkpoints import savable
from .encoders import Encoder


def export_student(
    student: nn.Module, path: str | os.PathLike[str], state: dict[str, Tensor] | None = None
) -> None:
    """Write a student, without heads or statistics, into a folder.

    Args:
        student: the model, or the `Encoder` that holds it.
        path: the folder; made if it is not there.
        state: the model's weights, where it does not hold them itself.

    Raises:
        TypeError: not a module.

    Note:
        A Hugging Face model is written by its own `save_pretrained`: AutoModel.from_pretrained
        loads it. So is a sentence-transformers model, whole. Of any other module the folder has
        ``model.safetensors``: its state dict, less what is `expendable`. Pooling is no part of a
        Hugging Face encoder: pool as you trained.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import load_file
        >>> from torch import nn
        >>> from mtkd.trainer import export_student
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_student(nn.Linear(8, 4), folder)
        ...     sorted(load_file(f"{folder}/model.safetensors"))
        ['bias', 'weight']
    """
    if not isinstance(student, nn.Module):
        raise TypeError(f"student: expected a torch.nn.Module, got {type(student).__name__}")
    model: Any = student.model if isinstance(student, Encoder) else student
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(model, "save_pretrained"):
        if state is not None:
            model.save_pretrained(str(folder), state_dict=state)
        else:
            model.save_pretrained(str(folder))
        return
    weights = student_state_dict(model) if state is None else state
    save_file(savable(weights), folder / "model.safetensors", metadata={"format": "pt"})
