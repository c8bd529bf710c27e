"""Checkpoints are written aside, then renamed: what has a checkpoint's name is whole."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from .._durable import flush

ASIDE = ".saving"  # a folder beside the checkpoints, whose name no one takes for one
OLD = "old-"  # what it prefixes to a checkpoint that is about to be replaced
STATE = "distillation.json"


class CheckpointTrainer(Trainer):  # type: ignore[misc]
    """A Trainer whose checkpoints are whole or are not, and fit the model or are refused.

    Subclasses have `_own_state` and `_load_own_state` for what fits no file of the Trainer's.
    """

    _aside: str | None = None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if self.args.should_save:
            put_back(Path(self.args.output_dir))

    def _own_state(self) -> dict[str, Any]:
        return {}

    def _load_own_state(self, state: Mapping[str, Any]) -> None:
        pass

    def _get_output_dir(self, trial: Any) -> str:
        run: str = super()._get_output_dir(trial)
        return run if self._aside is None else self._aside

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint aside, then give it its name."""
        run = Path(self._get_output_dir(trial))
        aside, name = run / ASIDE, f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(aside, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._aside = str(aside)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._aside = None
        self._name_best(run, name)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.state.save_to_json(str(aside / name / "trainer_state.json"))
            self._save_own(aside / name)
            publish(aside / name, run / name)
            best, limit = self.state.best_model_checkpoint, self.args.save_total_limit
            rotate_checkpoints(str(run), limit, best, use_mtime=True)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run / name))

    def _name_best(self, run: Path, name: str) -> None:
        """Have every process know the best checkpoint by the name that it will have."""
        if self.state.best_global_step:
            best = run / f"checkpoint-{self.state.best_global_step}"
            if best.exists() or best.name == name:
                self.state.best_model_checkpoint = str(best)

    def _save_own(self, folder: Path) -> None:
        (folder / STATE).write_text(json.dumps(self._own_state()))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._aside is None:  # it is pushed once it has its name
            super()._push_from_checkpoint(checkpoint_folder)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        state = self.model.state_dict() if state_dict is None else state_dict
        super()._save(output_dir, savable(state) if self.args.should_save else state)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        path = Path(resume_from_checkpoint, STATE)
        if path.exists():
            self._load_own_state(json.loads(path.read_text()))
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        except SafetensorError as error:
            raise ValueError(
                f"resume_from_checkpoint: expected whole files in {resume_from_checkpoint}, got one"
                f" of weights that cannot be read: {error}"
            ) from error

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Refuse a checkpoint of another student, or of other teachers."""
        missing, unexpected = load_result.missing_keys, load_result.unexpected_keys
        if missing or unexpected:
            raise ValueError(
                "resume_from_checkpoint: expected the weights of this student and these teachers,"
                f" got none for {missing[:3]} and others for {unexpected[:3]}"
            )


def publish(aside: Path, final: Path) -> None:
    """Give a whole checkpoint its name, in place of an older one; empty the folder it was in."""
    for file in aside.rglob("*"):
        flush(file)
    if final.exists():
        os.replace(final, aside.with_name(OLD + final.name))
    os.replace(aside, final)
    flush(final.parent)
    shutil.rmtree(aside.parent, ignore_errors=True)


def put_back(run: Path) -> None:
    """Give a checkpoint its name again that a kill left without, while a new one took its place."""
    for old in (run / ASIDE).glob(f"{OLD}*"):
        final = run / old.name.removeprefix(OLD)
        if not final.exists():
            os.replace(old, final)


def savable(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return a state dict that safetensors can hold: contiguous tensors that share no memory."""
    seen: set[int] = set()
    result = {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            kind = type(tensor).__name__
            raise ValueError(f"state dict: expected tensors alone, got {kind} for {name}")
        storage = tensor.untyped_storage()
        whole = tensor.is_contiguous() and storage.nbytes() == tensor.nbytes
        result[name] = tensor.detach()
        if not whole or storage.data_ptr() in seen:
            result[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
        seen.add(storage.data_ptr())
    return result
