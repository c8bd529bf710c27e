"""Steps that are not finite leave no trace, are named, and are not borne for ever."""

import json
import logging

import numpy as np
import pytest
import torch
from distilling import DIMS, WIDTH, Store, arguments, gaussian, network, sgd, vectors
from torch import nn
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from mtkd.nn import Projectors, TeacherNorm
from mtkd.trainer import DistillationTrainer, Encoder, NonFiniteError, Objective, TeacherModels


class Watch(TrainerCallback):
    """Keeps weights, statistics and the optimizer's state after each step."""

    def __init__(self):
        self.states = []

    def on_step_end(self, args, state, control, model=None, optimizer=None, **_):
        tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        moments = enumerate(optimizer.state_dict()["state"].values())
        tensors |= {f"{i}.{k}": v.clone() for i, each in moments for k, v in each.items()}
        self.states.append(tensors)


def spoilt(rows, kind):
    """Data and store of 64 rows, some of whose inputs or targets are no numbers."""
    data, store = vectors(), Store(missing=0.0)
    for row in rows:
        if kind == "input":
            data[row]["x"] = torch.full((8,), torch.nan)
        else:
            store.packed[row, 4] = torch.inf
    return data, store


def student():
    """With statistics of its own, that a bad row would spoil for good."""
    torch.manual_seed(0)
    layers = (nn.Linear(8, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, WIDTH))
    return Encoder(nn.Sequential(*layers), inputs=("x",))


def guarded(folder, data, store, **options):
    watch = Watch()
    most = options.pop("max_skipped", 10)
    once = options.pop("heads_once", False)
    trainer = DistillationTrainer(
        student(), gaussian(), store, arguments(folder, weight_decay=0.1, **options),
        train_dataset=data, norm=TeacherNorm(DIMS), callbacks=[watch], max_skipped=most,
        heads_once=once,
    )  # fmt: skip
    return trainer, watch


@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        ("target", "17, 30"),
        # batch normalisation spreads a bad input to all rows
        ("input", "16, 17, 18, 19, 20, 21, 22, 23, 24, 25, ..."),
    ],
)
@pytest.mark.parametrize("options", [{}, {"heads_once": True}, {"max_grad_norm": 0.0}])
def test_a_bad_step_leaves_no_trace_and_is_named(tmp_path, caplog, kind, rows, options):
    data, store = spoilt([17, 30], kind)
    trainer, watch = guarded(
        tmp_path, data, store, max_steps=4, gradient_accumulation_steps=2, **options
    )
    with caplog.at_level(logging.WARNING, "mtkd"):
        trainer.train()
    assert trainer.guard.skipped == 1
    message = f"step 1: the loss is not finite, rows {rows}; the step is skipped, 1 so far"
    assert [record.getMessage() for record in caplog.records] == [message]
    assert watch.states[1].keys() == watch.states[0].keys()
    torch.testing.assert_close(watch.states[1], watch.states[0], rtol=0, atol=0)
    assert not torch.equal(*(s["student.model.0.weight"] for s in watch.states[1:3]))
    assert all(bool(tensor.isfinite().all()) for tensor in watch.states[3].values())
    logs = trainer.state.log_history
    assert [log.get("skipped") for log in logs[:4]] == [None, 1, 1, 1]
    assert ["loss/cnn" in log for log in logs[:4]] == [True, False, True, True]


def test_a_masked_target_spoils_nothing(tmp_path):
    data, store = spoilt([17, 30], "target")
    store.mask[[17, 30], 1] = False
    trainer, _ = guarded(tmp_path, data, store, max_steps=4)
    trainer.train()
    assert trainer.guard.skipped == 0


def test_targets_that_are_all_missing_are_told(tmp_path, caplog):
    trainer, _ = guarded(tmp_path, vectors(), Store(missing=1.0), max_steps=1)
    with caplog.at_level(logging.WARNING, "mtkd"):
        trainer.train()
    assert "no target of any teacher counted: is the store filled?" in caplog.text


def test_a_bad_gradient_of_a_good_loss_is_skipped_too(tmp_path, caplog):
    data, store = vectors(), Store()
    trainer, watch = guarded(tmp_path, data, store, max_steps=2)
    weight = trainer.student.model[0].weight
    steps = iter((1.0, torch.nan))
    weight.register_hook(lambda gradient: gradient * next(steps))
    with caplog.at_level(logging.WARNING, "mtkd"):
        trainer.train()
    torch.testing.assert_close(watch.states[1], watch.states[0], rtol=0, atol=0)
    expected = "step 1: the gradient is not finite, rows 8, 9, 10, 11, 12, 13, 14, 15; "
    assert caplog.records[0].getMessage().startswith(expected)


class Counting(Encoder):
    """Counts its calls in a buffer that it replaces, not fills."""

    def __init__(self, model):
        super().__init__(model.model, inputs=("x",))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, batch):
        self.calls = self.calls + 1
        return super().forward(batch)


def test_a_bad_loss_of_a_good_gradient_is_skipped_too(tmp_path):
    steps = iter((0.0, torch.nan))

    def loss(student, targets, mask):
        good = (student[:, :1] - targets[:, :1]) ** 2 + 0.0 * student.sum()
        return good.expand(-1, 2) + next(steps)

    args = arguments(tmp_path, max_steps=2, learning_rate=1e-2)
    student, watch = Counting(network()), Watch()
    data = vectors()
    trainer = DistillationTrainer(
        student, loss, Store(missing=0.0), args, train_dataset=data, callbacks=[watch]
    )
    trainer.train()
    assert trainer.guard.skipped == 1
    assert student.calls == 1
    torch.testing.assert_close(watch.states[1], watch.states[0], rtol=0, atol=0)


def test_too_many_bad_steps_stop_the_run(tmp_path):
    data, store = spoilt(range(8, 64), "input")
    trainer, _ = guarded(tmp_path, data, store, max_steps=8, max_skipped=2)
    with pytest.raises(NonFiniteError, match=r"step 3: .* rows 24, .*; 3 steps were skipped"):
        trainer.train()
    assert trainer.state.global_step == 3


def test_the_count_outlives_the_run(tmp_path):
    data, store = spoilt([9], "input")
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 3}
    guarded(tmp_path, data, store, **options)[0].train()
    state = json.loads((tmp_path / "checkpoint-3" / "distillation.json").read_text())
    assert state == {"skipped": 1, "teachers": [["cnn", 3], ["pca", 5]]}
    resumed, _ = guarded(tmp_path, data, store, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.guard.skipped == 1


def test_a_batch_without_row_numbers_counts_from_its_first(tmp_path, caplog):
    data = [{"x": sample["x"]} for sample in spoilt([10], "input")[0]]
    teacher = TeacherModels({"one": Encoder(nn.Linear(8, 8), inputs=("x",))}, dtype=None)
    trainer = DistillationTrainer(
        network(), Projectors(WIDTH, {"one": 8}), teacher, arguments(tmp_path, max_steps=2),
        train_dataset=data,
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, "mtkd"):
        trainer.train()
    assert "rows 2;" in caplog.records[0].getMessage()


# Mistakes.


def test_an_infinite_loss_of_no_weight_is_none(tmp_path):
    """As in `reduce`: 0 times infinity is 0, in training and in evaluation."""

    def loss(student, targets, mask):
        matrix = student.square().mean(1, keepdim=True).expand(mask.shape)
        return torch.where(torch.tensor([False, True]), torch.inf, matrix)

    objective = Objective(loss, weight=torch.tensor([1.0, 0.0]))
    args = arguments(tmp_path, max_steps=2)
    trainer = DistillationTrainer(
        network(), objective, Store(missing=0.0), args, train_dataset=vectors(),
        eval_dataset=vectors(),
    )  # fmt: skip
    trainer.train()
    assert trainer.guard.skipped == 0
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_loss/cnn"])


def test_a_step_without_an_end_leaves_no_trace(tmp_path):
    """Data of unknown length ends within a step, which transformers never takes."""

    class Stream(IterableDataset):
        def __iter__(self):
            rows = vectors(24)
            rows[20]["x"] = torch.full((8,), torch.nan)  # in the part that is left over
            return iter(rows)

    args = sgd(tmp_path, max_steps=3, gradient_accumulation_steps=2, logging_steps=3)
    trainer = DistillationTrainer(
        student(), gaussian(), Store(24), args, train_dataset=Stream(), norm=TeacherNorm(DIMS)
    )
    trainer.train()
    plain = DistillationTrainer(
        student(), gaussian(), Store(24), args, train_dataset=vectors(24)[:16] * 3,
        norm=TeacherNorm(DIMS),
    )  # fmt: skip
    plain.train()
    assert trainer.guard.skipped == 0
    expected = plain.distillation.state_dict()
    torch.testing.assert_close(trainer.distillation.state_dict(), expected, rtol=0, atol=0)
    for key in ("loss", "loss/cnn"):
        assert trainer.state.log_history[0][key] == plain.state.log_history[0][key]


def test_an_evaluation_of_nothing_is_no_good_one(tmp_path, caplog):
    store = Store()
    store.mask[:16] = False
    trainer = DistillationTrainer(network(), gaussian(), store, arguments(tmp_path))
    assert np.isnan(trainer.evaluate(vectors(16))["eval_loss"])
    assert "no target of any teacher counted in evaluation: its loss is NaN" in caplog.text
