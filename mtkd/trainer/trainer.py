"""transformers' Trainer with what distillation needs, and nothing that it has already."""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.trainer_pt_utils import find_batch_size
from transformers.trainer_utils import has_length

from ..nn import TeacherNorm
from ..nn.moments import Estimator
from .checkpoints import CheckpointTrainer
from .checks import (
    check_apart,
    check_arguments,
    check_estimated,
    check_norm,
    check_number,
    check_smoothing,
)
from .encoders import Encoder, as_encoder
from .export import export_student
from .guard import Guard
from .logs import teacher_logs
from .meter import Meter
from .model import Distillation
from .objectives import Objective, as_objectives, count_rows
from .targets import ROW, Targets, as_targets, fetch
from .teachers import agree

LABELS = "labels"
logger = logging.getLogger(__name__)


class DistillationTrainer(CheckpointTrainer):
    r"""Train a student on the embeddings of many teachers, with transformers' Trainer.

    Mixed precision, DDP, accumulation, checkpoints, logs to TensorBoard, progress bars, early
    stopping and the hub are the Trainer's own, and so are `args` and all further arguments.

    Args:
        student: an `Encoder`, or a module whose `forward` takes what a batch holds and returns
            embeddings ``(N, H)``.
        objective: what `Objective` takes, or an `Objective`; or several of them by name, whose
            losses are added.
        targets: a teacher store, `TeacherModels`, or any callable of a batch; see `Targets`.
        args: transformers.TrainingArguments. `learning_rate` is the student's.
        norm: standardises the targets: `mtkd.nn.TeacherNorm`, which learns from a step's targets as
            a whole, in training alone; or `PhiS`, estimated beforehand.
        heads_learning_rate: the learning rate of the objectives' parameters; None: the student's.
        heads_once: whether heads run once a step, on the embeddings of all its micro-batches.
        recompute_student: whether backward makes the student's activations anew, a micro-batch at
            a time, rather than to keep them.
        max_skipped: how many steps may be skipped for a loss or gradient that is not finite.
        dims: a mapping from a teacher's name to its width, where neither targets nor objectives
            say it.
        options: further arguments of transformers.Trainer, by keyword: `train_dataset`,
            `eval_dataset`, `data_collator`, `callbacks`, ...

    Raises:
        ValueError: teachers, widths, keys or shapes that do not fit, before the first step.
        TypeError: an argument of the wrong type.
        NonFiniteError: while training, more than `max_skipped` steps were skipped.

    Note:
        A step's loss is divided by what counts in all its micro-batches and on all processes, so
        accumulation changes nothing but the order of sums. The targets of a step are held at once.
        See docs/training.md.

    Example:
        >>> import tempfile, torch
        >>> from transformers import TrainingArguments
        >>> from mtkd.nn import GaussianHeads
        >>> from mtkd.trainer import DistillationTrainer, Encoder, TeacherModels
        >>> teacher = Encoder(torch.nn.Linear(8, 3), inputs=("x",))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     trainer = DistillationTrainer(
        ...         Encoder(torch.nn.Linear(8, 4), inputs=("x",)),
        ...         GaussianHeads(4, {"linear": 3}),
        ...         TeacherModels({"linear": teacher}),
        ...         TrainingArguments(folder, max_steps=2, disable_tqdm=True, report_to="none"),
        ...         train_dataset=[{"x": x, "row": i} for i, x in enumerate(torch.randn(16, 8))],
        ...     )
        ...     result = trainer.train()  # doctest: +ELLIPSIS
        {'train_runtime': ...}
        >>> result.global_step
        2
    """

    def __init__(
        self,
        student: nn.Module,
        objective: Objective | nn.Module | Callable[..., Tensor] | Mapping[str, Any],
        targets: Targets | Any,
        args: TrainingArguments | None = None,
        *,
        norm: Estimator | None = None,
        heads_learning_rate: float | None = None,
        heads_once: bool = False,
        recompute_student: bool = False,
        max_skipped: int = 10,
        dims: Mapping[str, int] | None = None,
        **options: Any,
    ) -> None:
        check_norm(norm)
        check_smoothing(args)
        check_number("heads_learning_rate", heads_learning_rate)
        self.objectives = as_objectives(objective)
        encoder = as_encoder("student", student)
        self.targets = as_targets(targets)
        self.teachers = agree(dims, self.targets, self.objectives, norm)
        likelihoods = any(each.heads is not None for each in self.objectives.values())
        marginal = TeacherNorm(self.teachers.dims) if likelihoods else None
        self.distillation = Distillation(
            encoder, self.objectives, norm, marginal, recompute_student
        )
        self.heads_learning_rate, self.heads_once = heads_learning_rate, heads_once
        self.guard, self._meter = Guard(max_skipped), Meter()
        self._micro: list[Any] = []  # a step's micro-batches, and once prepared their parts
        self._parts: list[dict[str, Any]] = []
        self._heads_rate: float | None = None
        self._estimated = False
        check_apart(self.targets, self.distillation)
        if options.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func: expected None, the loss is objective, got one")
        super().__init__(self.distillation, args, **options)
        check_arguments(self.args, self.accelerator, self.distillation)
        self.can_return_loss = True
        if not (self.student.keys and hasattr(self.targets, "keys")):  # they may read any column
            self.args.remove_unused_columns = False

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the Trainer does; a step that an error broke off before is forgotten."""
        if self.guard.open:
            self._meter.drop()
            self.guard.restore()
        return super().train(*args, **kwargs)

    # What a step needs, made once for all its micro-batches.

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Collect the micro-batches of a step."""
        self._micro, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._parts = []
        known = has_length(self.callback_handler.train_dataloader)
        if len(self._micro) < num_batches and not known:  # the Trainer would make no step of it
            self._micro = []
        # that there is a number tells the Trainer that the loss is divided already
        return self._micro, sum(find_batch_size(batch) or 0 for batch in self._micro)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Do forward and backward of a micro-batch, or of a step's all at its last one."""
        if not self._parts:
            model.train()
            self.guard.begin(self.distillation)
            batches, self._micro = self._step(inputs), []
            self._parts = self._prepare(batches)
            if self.heads_once:
                empty: list[dict[str, Any]] = [{}] * (len(self._parts) - 1)
                self._parts = [*empty, _join(self._parts)]
        part = self._parts.pop(0)
        if not part:
            return torch.zeros((), device=self.args.device)
        loss: Tensor = super().training_step(model, part, num_items_in_batch)
        return loss

    def _step(self, inputs: dict[str, Any]) -> list[Any]:
        if not self._micro and self.args.gradient_accumulation_steps > 1:
            raise RuntimeError(
                "training_step: expected a step's micro-batches from get_batch_samples beforehand,"
                " got none; accumulation would not be exact"
            )
        return self._micro or [inputs]

    def _prepare(self, batches: Sequence[Any]) -> list[dict[str, Any]]:
        """Return the parts of a step: batches with their targets, and what counts in all."""
        batches = [self._prepare_inputs(batch) for batch in batches]
        pairs = [fetch(self.targets, batch, self.teachers.dims) for batch in batches]
        packed, mask = (torch.cat(tensors) for tensors in zip(*pairs, strict=True))
        model, sizes = self.distillation, [len(each) for each, _ in pairs]
        if model.norm is not None:
            if not self._estimated:  # once, since the host waits for it
                check_estimated(model.norm)
                self._estimated = True
            packed = model.norm(packed, mask)
        if model.marginal is not None and model.training:
            model.marginal.update(packed, mask)
        counts = count_rows(mask)
        if model.training:
            counts = self._sum(counts) / self.accelerator.num_processes
        return [
            {"batches": [batch], "targets": part, "mask": counted, "counts": counts}
            for batch, part, counted in zip(
                batches, packed.split(sizes), mask.split(sizes), strict=True
            )
        ]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the loss of a part of a step, or of an evaluation's batch."""
        part = inputs if "counts" in inputs else self._prepare([inputs])[0]
        counts, mask = part["counts"], part["mask"]
        outputs = model(part["batches"], part["targets"], mask)
        matrices = outputs["matrices"]
        self._meter.add(matrices, mask if model.training else self._once(mask))
        pairs = [(each, matrices[name]) for name, each in self.objectives.items()]
        losses = [each.reduce(matrix, mask, counts) for each, matrix in pairs]
        loss = torch.stack(losses).sum()
        if model.training:
            rows = [batch.get(ROW) for batch in part["batches"]]
            named = all(isinstance(each, Tensor) for each in rows)
            self.guard.see(torch.cat(rows) if named else None, matrices, mask, loss)
            if not loss.requires_grad:
                raise ValueError("objective: expected a loss of what is trained, got a constant")
        return (loss, {"embedding": outputs["embedding"]}) if return_outputs else loss

    def _once(self, mask: Tensor) -> Tensor:
        """Leave out the rows that fill up the last batch of several processes a second time."""
        state, rows = self.accelerator.gradient_state, len(mask)
        if not state.end_of_dataloader or state.remainder <= 0:
            return mask
        own = state.remainder - self.accelerator.process_index * rows
        first: Tensor = torch.arange(rows, device=mask.device) < own
        return mask & first.unsqueeze(1)

    # Parameter groups.

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the Trainer's optimizer, with student and heads in groups of their own."""
        given = self.optimizer is not None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if given:
            return optimizer
        student = {id(p) for p in self.distillation.student.parameters()}
        groups = []
        for group in optimizer.param_groups:
            for heads in (False, True):
                parameters = [p for p in group["params"] if (id(p) not in student) == heads]
                rate = self.heads_learning_rate if heads else None
                rate = group["lr"] if rate is None else rate
                name = "heads" if heads else "student"
                groups += [group | {"params": parameters, "lr": rate, "role": name}]
        optimizer.param_groups[:] = [group for group in groups if group["params"]]
        return optimizer

    # The guard.

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Return the gradient's norm; undo the step beforehand where it or a loss is not finite."""
        norm = super()._get_grad_norm(model, grad_norm)
        self.guard.open = False
        loss_is_bad = bool(self._sum(self.guard.any_bad_loss()))
        finite = norm is None or bool(torch.isfinite(torch.as_tensor(norm)))
        if finite and not loss_is_bad:
            self._meter.commit()
            return norm
        self._meter.drop()
        self.guard.restore()
        if finite or getattr(self.accelerator, "scaler", None) is None:
            model.zero_grad(set_to_none=True)  # an optimizer leaves alone what has no gradient
        elif not loss_is_bad:
            return norm  # the loss scale was too large: the scaler itself skips the step
        logger.warning(self.guard.skip(self.state.global_step, loss_is_bad))
        return norm

    def _sum(self, tensor: Tensor) -> Tensor:
        total: Tensor = self.accelerator.reduce(tensor.double(), "sum")
        return total

    # Logs.

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, and with a training loss what it is made of."""
        if "loss" in logs:
            taken = self._meter.take(self._sum)
            logs |= self._teacher_logs(taken)
            if taken and not _any_counted(taken):
                logger.warning("no target of any teacher counted: is the store filled?")
            if self._heads_rate is not None:
                logs["learning_rate_heads"] = self._heads_rate
            if self.guard.skipped:
                logs["skipped"] = self.guard.skipped
        super().log(logs, start_time)

    def _get_learning_rate(self) -> float:
        """Return the student's learning rate of this step; remember the heads'."""
        roles = {group.get("role"): group["lr"] for group in self.optimizer.param_groups}
        self._heads_rate = roles.get("heads")
        rate: float = super()._get_learning_rate()
        return rate

    def _teacher_logs(self, taken: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
        return teacher_logs(taken, self.teachers, self.objectives, self.distillation.marginal)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Predict; a batch's labels go to `compute_metrics` beside the embeddings."""
        names = self.args.label_names or [LABELS]
        self.label_names = names if all(name in inputs for name in names) else []
        return super().prediction_step(model, inputs, *args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as the Trainer does; the loss is exact for any mask, and told by teacher."""
        training, self._meter = self._meter, Meter()
        try:
            output = super().evaluation_loop(*args, **kwargs)
            self._meter.commit()
            taken = self._meter.take(self._sum)
        finally:
            self._meter = training
        prefix = kwargs.get("metric_key_prefix", "eval")
        losses = [self.objectives[name].total(*both) for name, both in taken.items()]
        logs = {"loss": float(sum(losses)), **self._teacher_logs(taken)}
        if not _any_counted(taken):
            logger.warning("no target of any teacher counted in evaluation: its loss is NaN")
        output.metrics.update({f"{prefix}_{key}": value for key, value in logs.items()})
        return output

    def _own_state(self) -> dict[str, Any]:
        pairs = zip(self.teachers.names, self.teachers.dims, strict=True)
        return {"skipped": self.guard.skipped, "teachers": [list(pair) for pair in pairs]}

    def _load_own_state(self, state: Mapping[str, Any]) -> None:
        saved, here = state.get("teachers"), self._own_state()["teachers"]
        if saved is not None and saved != here:  # statistics have no names: they go by position
            raise ValueError(
                f"resume_from_checkpoint: expected the teachers {dict(here)} in this order,"
                f" got a checkpoint of {dict(saved)}"
            )
        self.guard.skipped = state.get("skipped", 0)

    @property
    def student(self) -> Encoder:
        """The student."""
        return self.distillation.student

    def export_student(self, path: str | os.PathLike[str]) -> None:
        """Write the student alone into a folder; see `mtkd.trainer.export_student`.

        Every process calls it; one writes. A tokenizer given as `processing_class` goes with it.
        """
        state = None
        if self.is_fsdp_enabled:
            whole, prefix = self.accelerator.get_state_dict(self.model), "student.model."
            state = {k[len(prefix) :]: v for k, v in whole.items() if k.startswith(prefix)}
        if self.args.should_save:
            export_student(self.student, path, state)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(str(path))

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the columns of the data that student and targets read."""
        read = getattr(self.targets, "keys", ())
        keys = (*self.student.keys, ROW, *read, *self.label_names)
        self._signature_columns = [*dict.fromkeys((*keys, LABELS, "label", "label_ids"))]


def _any_counted(taken: Mapping[str, tuple[Tensor, Tensor]]) -> bool:
    return any(bool(counts.any()) for _, counts in taken.values())


def _join(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the parts of a step as one."""
    batches = [batch for part in parts for batch in part["batches"]]
    joined = {key: torch.cat([part[key] for part in parts]) for key in ("targets", "mask")}
    return {"batches": batches, "counts": parts[0]["counts"], **joined}
