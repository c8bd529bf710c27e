"""A small transformer, distilled by `DistillationTrainer` from what the teacher store holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    DataCollatorWithPadding,
    ProgressCallback,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from ...evaluation.checks import Array
from ...nn import GaussianHeads, Projectors, TeacherNorm
from ...teachers import TeacherStore
from ...trainer import DistillationTrainer, Encoder, Objective
from ..students import matched_width
from .teachers import LENGTH


@dataclass(frozen=True)
class Settings:
    """One fixed setting for every loss: none is tuned, so none is tuned better than another."""

    passages: int = 120  # of each subject, at most
    subjects: int | None = None  # None: all
    seeds: int = 1
    epochs: int = 10
    batch: int = 64
    rate: float = 1e-3
    width: int = 128
    hidden: int = 256


def make_student(tokenizer: Any, settings: Settings, seed: int) -> Encoder:
    """Two layers of a BERT that has seen nothing; its embedding is the mean of its tokens."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.width,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=2 * settings.width,
        max_position_embeddings=LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return Encoder(BertModel(config, add_pooling_layer=False), pooling="mean")


def make_objective(loss: str, dims: Mapping[str, int], settings: Settings) -> nn.Module:
    """Heads with one hidden layer for `loss`, with nearly the same parameters for every loss."""
    if loss == "gaussian":
        return GaussianHeads(settings.width, dims, hidden_features=settings.hidden, depth=1)
    mean = sum(dims.values()) / len(dims)
    hidden = matched_width(settings.width, mean, settings.hidden)
    heads = Projectors(settings.width, dims, hidden_features=hidden, depth=1, activation="relu")
    terms: dict[str, Any] = {"cosine": 0.0, "smooth_l1": 0.0, loss: 1.0}
    return Objective(heads, **terms)


def make_trainer(
    loss: str,
    texts: list[str],
    rows: Array,
    store: TeacherStore,
    tokenizer: Any,
    folder: Path,
    settings: Settings,
    seed: int,
) -> DistillationTrainer:
    """A trainer of a student on some rows of the store, the same student for every loss."""
    student = make_student(tokenizer, settings, seed)
    samples = [{**tokenizer(texts[row], truncation=True), "row": int(row)} for row in rows]
    arguments = TrainingArguments(
        str(folder),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch,
        learning_rate=settings.rate,
        lr_scheduler_type="cosine",
        train_sampling_strategy="group_by_length",
        save_strategy="epoch",
        save_total_limit=1,
        logging_strategy="epoch",
        report_to="none",
        disable_tqdm=False,
        use_cpu=True,
        seed=seed,
    )
    trainer = DistillationTrainer(
        student,
        make_objective(loss, store.dims, settings),
        store,
        arguments,
        norm=TeacherNorm(store.dims),
        train_dataset=samples,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Bar(loss))
    return trainer


def train_or_resume(trainer: DistillationTrainer, stop: int | None = None) -> int:
    """Train from the last checkpoint there is, up to step `stop` or to the end; return the step."""
    folder = Path(trainer.args.output_dir)
    checkpoint = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if stop is not None:
        trainer.add_callback(StopAt(stop))
    trainer.train(resume_from_checkpoint=checkpoint)
    return int(trainer.state.global_step)


class Bar(ProgressCallback):  # type: ignore[misc]
    """A progress bar with a name, and no logs between."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def on_train_begin(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        """Open the bar."""
        super().on_train_begin(args, state, control, **options)
        self.training_bar.set_description(self.name)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Print nothing: the log is in the trainer's state."""


class StopAt(TrainerCallback):  # type: ignore[misc]
    """Stops a run after a step, with a checkpoint, as a user does who needs the machine."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ask for a checkpoint, then for the end."""
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


@torch.no_grad()
def encode(student: Encoder, tokenizer: Any, texts: list[str], batch: int = 256) -> Array:
    """Embeddings of texts by a student, ``(N, H)``; texts of like length together."""
    student.eval()
    config: Any = student.model.config
    order = np.argsort([len(text) for text in texts], kind="stable")
    embeddings = np.empty((len(texts), config.hidden_size), dtype=np.float32)
    for start in range(0, len(texts), batch):
        some = order[start : start + batch]
        chosen = [texts[i] for i in some]
        tokens = tokenizer(chosen, truncation=True, padding=True, return_tensors="pt")
        embeddings[some] = student(tokens).numpy()
    return embeddings
