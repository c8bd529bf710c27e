"""Checkpoints are written aside, then renamed: what has a checkpoint's name is whole."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ASIDE = ".saving"  # a folder beside the checkpoints, whose name no one takes for one
STATE = "distillation.json"


def publish(aside: Path, final: Path) -> None:
    """Give a whole checkpoint its name, in place of an older one."""
    for file in aside.rglob("*"):
        _flush(file)
    old = aside.with_name(f"old-{final.name}")
    if final.exists():
        os.replace(final, old)
    os.replace(aside, final)
    _flush(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    """Have the disk hold what was written, so that a name never outlives its content."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def savable(state: dict[str, Any]) -> dict[str, Tensor]:
    """Return a state dict that safetensors can hold: contiguous tensors that share no memory."""
    seen: set[int] = set()
    result = {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            kind = type(tensor).__name__
            raise ValueError(f"state dict: expected tensors alone, got {kind} for {name}")
        storage = tensor.untyped_storage().data_ptr()
        whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        own = whole and storage not in seen
        result[name] = (
            tensor.detach() if own else tensor.detach().clone(memory_format=torch.contiguous_format)
        )
        seen.add(storage)
    return result


def write_state(folder: str, state: dict[str, Any]) -> None:
    """Write what is ours and fits no file of transformers'."""
    Path(folder, STATE).write_text(json.dumps(state))


def read_state(folder: str) -> dict[str, Any]:
    """Read what `write_state` wrote; nothing for a checkpoint of another trainer."""
    path = Path(folder, STATE)
    return json.loads(path.read_text()) if path.exists() else {}  # type: ignore[no-any-return]
