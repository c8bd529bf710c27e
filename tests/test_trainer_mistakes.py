"""Mistakes raise one clear error, at once or before the first step."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from distilling import DIMS, WIDTH, Store, arguments, bert, gaussian, network, texts, vectors
from torch import nn
from torch.distributed.fsdp import StateDictType
from transformers import TrainingArguments

import mtkd.functional as F
from mtkd.distributed import TeacherParallel
from mtkd.nn import PhiS, Projectors, TeacherNorm
from mtkd.trainer import DistillationTrainer, Encoder, Objective, TeacherModels
from mtkd.trainer.checks import check_fsdp
from mtkd.trainer.targets import fetch


def scalar(student, targets, mask):
    return student.mean()


def constant(student, targets, mask):
    return torch.ones(mask.shape)


def without_row():
    return [{"x": sample["x"]} for sample in vectors()]


class Sums(nn.Module):
    def forward(self, x):
        return x.sum()


class Stateful(nn.Linear):
    """A layer that keeps a count beside its tensors."""

    def get_extra_state(self):
        return 3


class Tokens(nn.Module):
    """Returns an embedding for each token."""

    def forward(self, x):
        return x[:, None, :6]


class Bare(nn.Module):
    def forward(self, x):
        return {"hidden": x}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": scalar}, r"objective: .* \(N, T\) = \(8, 2\) .* got shape \(\)"),
        (
            {"student": Encoder(Sums())},
            r"student: expected embeddings \(N, H\), N = 8 .*, got \(\)",
        ),
        ({"student": Encoder(Bare())}, "student: expected an embedding from Bare .*got dict"),
        ({"student": Encoder(nn.Linear(8, 3), inputs=("x",))}, r"student: expected shape \(8, 6\)"),
        ({"student": nn.Linear(8, 6)}, "batch: expected key input for Linear, got x, row; inputs="),
        ({"data": without_row()}, "batch: expected key 'row', each sample's row in the store"),
        ({"data": [s | {"row": 0.5} for s in vectors()]}, r"batch\['row'\]: expected int64"),
        ({"targets": lambda batch: (torch.ones(8, 7), None)}, "targets: .* got 7 columns"),
        ({"student": Encoder(Tokens())}, r"student: expected embeddings \(N, H\), .*\(8, 1, 6\)"),
        ({"objective": constant}, "objective: expected a loss of what is trained, got a constant"),
        ({"norm": PhiS(DIMS, fallback="hartley")}, "norm: expected PhiS with statistics, got one"),
        ({"targets": lambda batch: (torch.ones(8), None)}, r"targets: .*\(N, D\), got .*\(8,\)"),
        (
            {"targets": lambda batch: (torch.ones(8, 8), torch.ones(8, 2))},
            r"targets: expected a mask of bool \(8, 2\), got torch.float32",
        ),
    ],
)
def test_mistakes_raise_before_the_first_step(tmp_path, changes, message):
    given = {"student": network(), "objective": gaussian(), "targets": Store(), "data": vectors()}
    given |= changes
    args = arguments(tmp_path, max_steps=1, remove_unused_columns=False)
    data = given.pop("data")
    trainer = DistillationTrainer(**given, args=args, train_dataset=data)
    before = [p.clone() for p in trainer.distillation.parameters()]
    with pytest.raises(ValueError, match=message):
        trainer.train()
    torch.testing.assert_close(list(trainer.distillation.parameters()), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"objective": Projectors(WIDTH, (3, 4))}, ValueError, r"objective loss: .* got \(3, 4\)"),
        (
            {"objective": Projectors(WIDTH, {"pca": 3, "cnn": 5})},
            ValueError,
            "objective loss: expected the teachers of targets in their order, .*'pca': 3, 'cnn'",
        ),
        ({"norm": TeacherNorm((8,))}, ValueError, r"norm: .* got \(8,\)"),
        (
            {"targets": lambda batch: None, "objective": lambda *_: None},
            ValueError,
            "dims: expected a mapping from each teacher's name",
        ),
        ({"targets": 3}, TypeError, "targets: expected a store or a callable of a batch, got int"),
        ({"objective": 3}, TypeError, "objective: expected a module or a callable, got int"),
        ({"objective": {}}, ValueError, "objective: expected at least one, got an empty mapping"),
        ({"student": 3}, TypeError, "student: expected a torch.nn.Module or an Encoder, got int"),
        ({"max_skipped": -1}, ValueError, "max_skipped: expected an integer, 0 or more, got -1"),
        (
            {"objective": {"a.b": gaussian()}},
            ValueError,
            "objective: expected names without a dot, .* got 'a.b'",
        ),
        ({"norm": True}, TypeError, "norm: expected TeacherNorm, PhiS or None, got bool"),
        ({"heads_learning_rate": "1e-2"}, TypeError, "heads_learning_rate: expected a number"),
        ({"objective": Projectors}, TypeError, "objective: expected .*, got the class Projectors"),
        ({"objective": {"information": gaussian()}}, ValueError, "other than 'information', got"),
        (
            {"objective": TeacherParallel(partial(Projectors, WIDTH), DIMS)},
            TypeError,
            "objective: expected heads that every process has whole, got TeacherParallel",
        ),
        (
            {"compute_loss_func": lambda *_: 0},
            ValueError,
            "compute_loss_func: expected None, the loss is objective",
        ),
        (
            {"student": Encoder(Stateful(8, 6), inputs=("x",))},
            ValueError,
            r"state dicts of tensors alone, got student.model \(Stateful\), .* state is int",
        ),
    ],
)
def test_what_does_not_fit_is_told_at_once(tmp_path, options, error, message):
    given = {"student": network(), "objective": gaussian(), "targets": Store()} | options
    with pytest.raises(error, match=message):
        DistillationTrainer(**given, args=arguments(tmp_path, save_strategy="steps"))


def test_what_is_never_saved_may_have_any_state(tmp_path):
    student = Encoder(Stateful(8, 6), inputs=("x",))
    DistillationTrainer(student, gaussian(), Store(), arguments(tmp_path))


def test_noise_wants_embeddings_of_tokens(tmp_path):
    args = arguments(tmp_path, neftune_noise_alpha=5.0)
    with pytest.raises(ValueError, match="a student with embeddings of tokens for neftune"):
        DistillationTrainer(network(), gaussian(), Store(), args)
    args = arguments(tmp_path, neftune_noise_alpha=5.0, max_steps=1)
    student = Encoder(bert(), "mean")
    DistillationTrainer(student, gaussian(), Store(), args, train_dataset=texts()).train()


def test_labels_are_not_smoothed(tmp_path):
    args = arguments(tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match=r"expected no smoothing of labels, .* got label_smoothin"):
        DistillationTrainer(network(), gaussian(), Store(), args)


def test_teachers_in_the_loop_are_those_of_the_heads(tmp_path):
    one, other = (Encoder(nn.Linear(8, width), inputs=("x",)) for width in (3, 5))
    swapped = TeacherModels({"pca": other, "cnn": one})
    args = arguments(tmp_path, max_steps=1)
    with pytest.raises(ValueError, match=r"targets: expected the teachers of .* got pca, cnn"):
        DistillationTrainer(network(), gaussian(), swapped, args, train_dataset=vectors())
    wider = TeacherModels({"cnn": other, "pca": one})
    trainer = DistillationTrainer(network(), gaussian(), wider, args, train_dataset=vectors())
    with pytest.raises(ValueError, match=r"widths \(3, 5\), got outputs of widths \(5, 3\)"):
        trainer.train()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Encoder(bert(), "max"), ValueError, "pooling: expected None or one of cls, last"),
        (lambda: Encoder(3), TypeError, "model: expected a torch.nn.Module, got int"),
        (lambda: Encoder(bert(), inputs="x"), TypeError, "inputs: expected a sequence of keys"),
        (lambda: TeacherModels({}), ValueError, "models: expected at least one teacher"),
        (lambda: Objective(gaussian(), weight=torch.ones(2, 2)), ValueError, "weight: .*(T,)"),
        (
            lambda: Objective(partial(F.mse, dims=(3, 5), reduction="mean")),
            ValueError,
            "reduction: expected none, since the trainer gives it, got 'mean'",
        ),
        (lambda: Objective(gaussian(), mask=None), ValueError, "mask: expected none, since"),
        (
            lambda: Objective(gaussian(), weight=torch.ones(3))(
                torch.ones(4, WIDTH), torch.ones(4, 8), torch.ones(4, 2, dtype=torch.bool)
            ),
            ValueError,
            r"weight: expected one for each of 2 columns of GaussianHeads, got shape \(3,\)",
        ),
        (
            lambda: Objective(gaussian(), "0.5"),
            TypeError,
            "coefficient: expected a number",
        ),
        (
            lambda: fetch(lambda batch: torch.ones(2, 8), {}, (3, 5)),
            TypeError,
            r"targets: expected a pair \(packed, mask or None\), got Tensor",
        ),
        (
            lambda: Encoder(nn.Linear(8, 6), "mean", inputs=("x",))({"x": torch.ones(3, 8)}),
            ValueError,
            r"student: expected tokens \(N, L, H\) to pool, got shape \(3, 6\)",
        ),
        (
            lambda: TeacherModels({"a": Encoder(nn.Linear(8, 6), inputs=("x",))})({"x": _tokens()}),
            ValueError,
            r"teacher a: expected embeddings \(N, D\), got shape \(3, 4, 6\)",
        ),
    ],
)
def test_parts_refuse_what_they_cannot_use(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_teacher_that_is_trained_is_refused(tmp_path):
    """It would be frozen: nothing would be learnt, without a word."""
    student = Encoder(nn.Linear(8, 3), inputs=("x",))
    teachers = TeacherModels({"cnn": student, "pca": Encoder(nn.Linear(8, 5), inputs=("x",))})
    with pytest.raises(ValueError, match="teachers apart from the student, got cnn, which shares"):
        DistillationTrainer(student, gaussian(), teachers, arguments(tmp_path))


def test_a_setting_that_the_student_lacks_is_named(tmp_path):
    newer = hasattr(TrainingArguments, "activation_checkpointing")
    setting = f"{'activation' if newer else 'gradient'}_checkpointing"
    args = arguments(tmp_path, max_steps=1, **{setting: True})
    trainer = DistillationTrainer(network(), gaussian(), Store(), args, train_dataset=vectors())
    with pytest.raises(ValueError, match=f"{setting}_enable of Sequential; recompute_student=True"):
        trainer.train()


def test_a_micro_batch_alone_is_no_step(tmp_path):
    args = arguments(tmp_path, gradient_accumulation_steps=2)
    trainer = DistillationTrainer(network(), gaussian(), Store(), args)
    with pytest.raises(RuntimeError, match="expected a step's micro-batches from get_batch_sampl"):
        trainer.training_step(trainer.model, {"x": torch.ones(4, 8), "row": torch.arange(4)})


@pytest.mark.parametrize(
    ("kind", "lean", "refused"),
    [
        ("FULL_STATE_DICT", False, "got FULL_STATE_DICT$"),
        ("SHARDED_STATE_DICT", True, "got SHARDED_STATE_DICT with cpu_ram_efficient_loading$"),
        ("SHARDED_STATE_DICT", False, None),
    ],
)
def test_fsdp_needs_what_packed_parameters_load_from(kind, lean, refused):
    plugin = SimpleNamespace(state_dict_type=StateDictType[kind], cpu_ram_efficient_loading=lean)
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
    check_fsdp(accelerator, nn.Linear(2, 2))
    if refused is None:
        return check_fsdp(accelerator, gaussian())
    with pytest.raises(ValueError, match=refused):
        check_fsdp(accelerator, gaussian())


def _tokens():
    return torch.ones(3, 4, 8)


def test_a_hugging_face_model_needs_a_pooling(tmp_path):
    trainer = DistillationTrainer(
        bert(), gaussian(), Store(), arguments(tmp_path, max_steps=1), train_dataset=texts()
    )
    with pytest.raises(ValueError, match="pooling may be cls, last, mean, pooler"):
        trainer.train()
