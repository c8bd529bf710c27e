"""Students of classes: losses that take a row's teachers together are averaged over rows."""

from functools import partial

import pytest
import torch
from distilling import Store, sgd, vectors
from torch import nn

import mtkd.functional as F
from mtkd.trainer import DistillationTrainer, Encoder, Objective
from mtkd.weighting import confidence_weights, teacher_entropy

CLASSES = 4
DIMS = dict.fromkeys(("cnn", "svm", "tree"), CLASSES)
DOUBLE = torch.float64


def vote(student, targets, mask, kind="plurality"):
    logits = targets.unflatten(1, (len(DIMS), CLASSES))
    return F.majority_vote(student, logits, vote=kind, mask=mask, reduction="none")


def mixture(student, targets, mask):
    logits = targets.unflatten(1, (len(DIMS), CLASSES))
    weight = confidence_weights(teacher_entropy(logits), mask, method="ebkd")
    return F.mixture_kl(student, logits, weight, mask=mask, reduction="none")


def student():
    torch.manual_seed(0)
    return Encoder(nn.Linear(8, CLASSES, dtype=DOUBLE), inputs=("x",))


def logits():
    """Some rows have no teacher at all, and so has one micro-batch."""
    store = Store(dims=DIMS, dtype=DOUBLE, missing=0.6)
    store.mask[8:16] = False
    return store


def trained(folder, loss, **options):
    ours = {key: options.pop(key) for key in ("heads_once",) if key in options}
    trainer = DistillationTrainer(
        student(), loss, logits(), sgd(folder, **({"max_steps": 2} | options)),
        train_dataset=vectors(dtype=DOUBLE), **ours,
    )  # fmt: skip
    trainer.train()
    return trainer


def matrix(loss, model, rows):
    store = logits()
    x = torch.stack([vectors(dtype=DOUBLE)[row]["x"] for row in rows])
    packed, mask = store[rows]
    return loss(model({"x": x}), packed, mask), mask.any(1, keepdim=True)


@pytest.mark.parametrize("loss", [vote, partial(vote, kind="mean"), mixture])
@pytest.mark.parametrize("options", [{}, {"heads_once": True}], ids=["each", "once"])
def test_rows_count_once_however_many_teachers_they_have(tmp_path, loss, options):
    one = trained(tmp_path, loss, per_device_train_batch_size=32)
    four = trained(tmp_path, loss, gradient_accumulation_steps=4, **options)
    torch.testing.assert_close(dict(four.student.state_dict()), dict(one.student.state_dict()))
    losses, counted = matrix(loss, student(), torch.arange(32))
    assert 0 < counted.sum() < 24
    for trainer in (one, four):
        log = trainer.state.log_history[0]
        assert log["loss"] == pytest.approx(losses[counted].mean().item(), rel=1e-6)
        assert log["loss/all"] == pytest.approx(losses[counted].mean().item(), rel=1e-6)
    metrics = one.evaluate(vectors(20, DOUBLE))
    losses, counted = matrix(loss, one.student.eval(), torch.arange(20))
    assert metrics["eval_loss"] == pytest.approx(losses[counted].mean().item(), rel=1e-9)
    assert metrics["eval_loss/all"] == metrics["eval_loss"]


def test_votes_stand_beside_a_matrix_by_teacher(tmp_path):
    each = partial(vote, kind="each")
    trainer = trained(
        tmp_path, {"vote": Objective(vote, 0.5), "each": Objective(each, weight=torch.ones(3))}
    )
    (together, counted), (alone, _) = (matrix(f, student(), torch.arange(8)) for f in (vote, each))
    mask = logits()[torch.arange(8)][1]
    log = trainer.state.log_history[0]
    expected = 0.5 * together[counted].mean() + alone[mask].mean()
    assert log["loss"] == pytest.approx(expected.item(), rel=1e-6)
    assert {"vote/all", "each/cnn", "each/svm", "each/tree"} <= log.keys()


def test_one_column_takes_no_weights_of_teachers(tmp_path):
    with pytest.raises(ValueError, match="weight: expected one for each of 1 columns of function"):
        trained(tmp_path, Objective(vote, weight=torch.ones(3)))
