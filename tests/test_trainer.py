"""The trainer's loss, gradients, accumulation, groups, logs and evaluation, against plain loops."""

import copy
from functools import partial

import distilling
import numpy as np
import pytest
import torch
from distilling import DIMS, WIDTH, Store, arguments, bert, gaussian, network, sgd, texts, vectors
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import EarlyStoppingCallback, TrainingArguments

import mtkd.functional as F
from mtkd.information import information_gain
from mtkd.nn import Projectors, TeacherNorm
from mtkd.trainer import DistillationTrainer, Encoder, Objective, StoreTargets, TeacherModels
from mtkd.weighting import teacher_dropping

DOUBLE = torch.float64


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.distillation.state_dict().items()}


def trained(folder, objective=None, targets=None, student=None, data=None, **options):
    """Train by plain gradient descent on vectors in float64."""
    own = {"norm", "heads_once", "recompute_student", "heads_learning_rate", "callbacks"}
    ours = {key: options.pop(key) for key in own & options.keys()}
    trainer = DistillationTrainer(
        student or network(DOUBLE),
        objective or gaussian(DOUBLE),
        targets or Store(dtype=DOUBLE),
        sgd(folder, **({"max_steps": 1} | options)),
        train_dataset=data or vectors(dtype=DOUBLE),
        **ours,
    )
    trainer.train()
    return trainer


def test_training_is_the_loop_that_one_would_write(tmp_path):
    student, heads, store = network(), gaussian(), Store()
    loop, loop_heads = copy.deepcopy(student), copy.deepcopy(heads)
    trainer = trained(tmp_path, heads, store, student, vectors(), max_steps=5, max_grad_norm=1.0)
    parameters = [*loop.parameters(), *loop_heads.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    x = torch.stack([sample["x"] for sample in vectors()])
    for step in range(5):
        rows = torch.arange(step * 8, step * 8 + 8)
        packed, mask = store[rows]
        loss = loop_heads(loop({"x": x[rows]}), packed, mask=mask)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert trainer.state.log_history[step]["loss"] == pytest.approx(loss.item(), rel=1e-6)
    ours = [*student.parameters(), *heads.parameters()]
    torch.testing.assert_close(ours, parameters)


@pytest.mark.parametrize("options", [{}, {"heads_once": True}, {"recompute_student": True}])
@pytest.mark.parametrize("weight", [None, torch.tensor([0.2, 2.0])])
def test_accumulation_changes_nothing(tmp_path, options, weight):
    """Masks are filled unevenly, and one micro-batch counts for nothing at all."""
    store = Store(dtype=DOUBLE)
    store.mask[8:16] = False
    make = partial(Objective, weight=weight)
    common = {"targets": store, "max_steps": 2}
    one = trained(
        tmp_path, make(gaussian(DOUBLE)), norm=TeacherNorm(DIMS),
        per_device_train_batch_size=32, **common,
    )  # fmt: skip
    four = trained(
        tmp_path, make(gaussian(DOUBLE)), norm=TeacherNorm(DIMS),
        gradient_accumulation_steps=4, **common, **options,
    )  # fmt: skip
    torch.testing.assert_close(weights(four), weights(one), rtol=1e-10, atol=1e-12)
    losses = [trainer.state.log_history[0]["loss"] for trainer in (one, four)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_the_last_step_of_an_epoch_may_have_fewer_micro_batches(tmp_path):
    """40 rows make a step of 32 and one of 8."""
    options = {"data": vectors(40, DOUBLE), "max_steps": 2, "gradient_accumulation_steps": 4}
    kept, once = trained(tmp_path, **options), trained(tmp_path, heads_once=True, **options)
    torch.testing.assert_close(weights(once), weights(kept), rtol=1e-10, atol=1e-12)
    student, heads, store = network(DOUBLE), gaussian(DOUBLE), Store(dtype=DOUBLE)
    optimizer = torch.optim.SGD([*student.parameters(), *heads.parameters()], lr=0.1)
    for rows in (torch.arange(32), torch.arange(32, 40)):
        packed, mask = store[rows]
        x = torch.stack([vectors(dtype=DOUBLE)[row]["x"] for row in rows])
        heads(student({"x": x}), packed, mask=mask).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(dict(kept.student.state_dict()), dict(student.state_dict()))


class HeadCalls(TorchDispatchMode):
    """Counts calls of the heads' operators, forward and backward."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += function.namespace == "mtkd"
        return function(*args, **(kwargs or {}))


def test_heads_once_calls_them_once(tmp_path):
    counts, forwards = {}, {}
    for once in (False, True):
        student = network()
        calls = []
        student.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        with HeadCalls() as mode:
            trained(
                tmp_path, gaussian(), Store(), student, vectors(), heads_once=once,
                recompute_student=once, gradient_accumulation_steps=4,
            )  # fmt: skip
        counts[once], forwards[once] = mode.calls, len(calls)
    assert counts[False] == 4 * counts[True] > 0
    assert forwards == {False: 4, True: 8}  # recomputed: each forward twice


def test_student_and_heads_have_their_own_rates(tmp_path):
    trainer = DistillationTrainer(
        bert(), gaussian(), Store(), arguments(tmp_path, weight_decay=0.1, learning_rate=1e-3),
        heads_learning_rate=1e-2,
    )  # fmt: skip
    groups = trainer.create_optimizer().param_groups
    found = {(g["role"], g["lr"], g["weight_decay"]): {id(p) for p in g["params"]} for g in groups}
    rates = {("student", 1e-3), ("heads", 1e-2)}
    assert set(found) == {(*rate, decay) for rate in rates for decay in (0.1, 0.0)}
    student = {id(p) for p in trainer.student.parameters()}
    assert set.union(*(found[key] for key in found if key[0] == "student")) == student
    everything = {id(p) for p in trainer.distillation.parameters()}
    assert set.union(*found.values()) == everything
    assert trainer.create_optimizer() is trainer.optimizer  # a second call makes no second one


def test_the_heads_rate_is_logged_and_scheduled(tmp_path):
    trainer = trained(
        tmp_path, max_steps=4, heads_learning_rate=1.0, lr_scheduler_type="linear",
    )  # fmt: skip
    logs = trainer.state.log_history[:4]
    assert [log["learning_rate_heads"] for log in logs] == [1.0, 0.75, 0.5, 0.25]
    assert [log["learning_rate"] for log in logs] == pytest.approx([0.1, 0.075, 0.05, 0.025])


def test_an_optimizer_of_ones_own_is_left_alone(tmp_path):
    student, heads = network(), gaussian()
    optimizer = torch.optim.SGD([*student.parameters(), *heads.parameters()], lr=0.5)
    trainer = DistillationTrainer(
        student, heads, Store(), arguments(tmp_path, max_steps=1), optimizers=(optimizer, None),
        train_dataset=vectors(),
    )  # fmt: skip
    trainer.train()
    assert len(optimizer.param_groups) == 1


def test_several_objectives_are_added(tmp_path):
    torch.manual_seed(0)
    projectors = Projectors(WIDTH, DIMS)
    objectives = {
        "nll": gaussian(),
        "cosine": Objective(projectors, 0.5, cosine=1.0, smooth_l1=0.0),
        "own": lambda student, targets, mask: student.square().mean(1, keepdim=True) + 0 * mask,
    }
    student, store = network(), Store()
    with torch.no_grad():
        packed, mask = store[torch.arange(8)]
        embedding = student({"x": torch.stack([sample["x"] for sample in vectors(8)])})
        nll = gaussian()(embedding, packed, mask=mask, reduction="none")
        options = {"cosine": 1.0, "smooth_l1": 0.0, "mask": mask, "reduction": "none"}
        cosine = projectors.alignment(embedding, packed, **options)
        own = embedding.square().mean(1, keepdim=True).expand(8, 2)
    expected = sum(k * m[mask].mean() for k, m in ((1.0, nll), (0.5, cosine), (1.0, own)))
    logs = trained(tmp_path, objectives, store, student, vectors()).state.log_history[0]
    assert logs["loss"] == pytest.approx(expected.item(), rel=1e-5)
    for teacher, name in enumerate(DIMS):
        for label, matrix in (("nll", nll), ("cosine", cosine), ("own", own)):
            mean = matrix[mask[:, teacher], teacher].mean().item()
            assert logs[f"{label}/{name}"] == pytest.approx(mean, rel=1e-5)
        assert f"information/{name}" in logs
    assert logs["grad_norm"] > 0


def test_logs_average_over_all_steps_since_the_last(tmp_path):
    every, last = (
        trained(tmp_path, max_steps=4, logging_steps=steps).state.log_history for steps in (1, 4)
    )
    mask = Store(dtype=DOUBLE).mask[:32].view(4, 8, 2).sum(1)
    for teacher, name in enumerate(DIMS):
        sums = sum(log[f"loss/{name}"] * mask[step, teacher] for step, log in enumerate(every[:4]))
        mean = (sums / mask[:, teacher].sum()).item()
        assert last[0][f"loss/{name}"] == pytest.approx(mean, rel=1e-6)


def test_information_is_the_gain_over_constant_heads(tmp_path):
    trainer = trained(tmp_path, max_steps=1, per_device_train_batch_size=64)
    logs, store = trainer.state.log_history[0], Store(dtype=DOUBLE)
    parts = zip(DIMS, store.packed.split(list(DIMS.values()), 1), store.mask.T, strict=True)
    for name, part, counted in parts:
        marginal = torch.distributions.Normal(part[counted].mean(0), part[counted].std(0, False))
        entropy = -marginal.log_prob(part[counted]).mean() - 0.5 * np.log(2 * np.pi)
        expected = entropy.item() - logs[f"loss/{name}"]
        assert logs[f"information/{name}"] == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_information_waits_for_statistics(tmp_path):
    trainer = DistillationTrainer(
        network(), gaussian(), Store(), arguments(tmp_path), eval_dataset=vectors()
    )
    assert not [key for key in trainer.evaluate() if "information" in key]


def test_information_is_known_for_gaussians():
    """Of correlation .8: the best heads' loss is log sqrt(1 - .64) + 1/2; the gain, I(T; S)."""
    nll = torch.tensor([0.5 * np.log(1 - 0.64) + 0.5])
    assert information_gain(nll, torch.ones(2), (2,)).item() == pytest.approx(-0.5 * np.log(0.36))
    bounded = information_gain(torch.zeros(1), torch.zeros(1), (1,), bound=1.0)
    assert bounded.item() == pytest.approx(-1.0)  # a constant column: heads say at best e^-1
    with pytest.raises(ValueError, match=r"nll, variance: expected shapes \(1,\) and \(2,\)"):
        information_gain(torch.zeros(2), torch.ones(2), (2,))


def test_a_callable_weight_is_for_training_alone(tmp_path):
    seen = []

    def drop(matrix, mask):
        seen.append(matrix.shape)
        return teacher_dropping(matrix, mask, p=1.0)

    objective = Objective(gaussian(DOUBLE), weight=drop)
    trainer = trained(tmp_path, objective, gradient_accumulation_steps=2, heads_once=True)
    assert seen == [(16, 2)]
    store, rows = Store(dtype=DOUBLE), torch.arange(16)
    packed, mask = store[rows]
    x = torch.stack([sample["x"] for sample in vectors(16, DOUBLE)])
    matrix = gaussian(DOUBLE)(network(DOUBLE)({"x": x}), packed, mask=mask, reduction="none")
    expected = (matrix * teacher_dropping(matrix, mask, p=1.0)).sum() / mask.sum()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-6)
    trainer.evaluate(vectors(16, DOUBLE))
    assert len(seen) == 1


def test_evaluation_is_exact_for_any_mask(tmp_path):
    trainer = trained(tmp_path, norm=TeacherNorm(DIMS))
    before = weights(trainer)
    metrics = trainer.evaluate(vectors(20, DOUBLE))  # batches of 8, 8 and 4
    store = Store(dtype=DOUBLE)
    packed, mask = store[torch.arange(20)]
    x = torch.stack([sample["x"] for sample in vectors(20, DOUBLE)])
    model = trainer.distillation.eval()
    with torch.no_grad():
        target = model.norm(packed)
        options = {"mask": mask, "reduction": "none"}
        matrix = trainer.objectives["loss"].loss(model.student({"x": x}), target, **options)
    assert metrics["eval_loss"] == pytest.approx(matrix[mask].mean().item(), rel=1e-9)
    mean = matrix[mask[:, 1], 1].mean().item()
    assert metrics["eval_loss/pca"] == pytest.approx(mean, rel=1e-9)
    torch.testing.assert_close(weights(trainer), before, rtol=0, atol=0)  # it learnt nothing


def test_predict_returns_embeddings(tmp_path):
    trainer = trained(tmp_path, student=network(), objective=gaussian(), data=vectors())
    output = trainer.predict(vectors(20))
    with torch.no_grad():
        expected = trainer.student.eval()({"x": torch.stack([s["x"] for s in vectors(20)])})
    np.testing.assert_allclose(output.predictions, expected.numpy(), rtol=1e-6)
    assert "test_loss/cnn" in output.metrics


def test_compute_metrics_gets_embeddings(tmp_path):
    trainer = DistillationTrainer(
        network(), gaussian(), Store(), arguments(tmp_path), eval_dataset=vectors(20),
        compute_metrics=lambda output: {"width": float(output.predictions.shape[1])},
    )  # fmt: skip
    assert trainer.evaluate()["eval_width"] == WIDTH


def test_a_hugging_face_student_in_bfloat16(tmp_path):
    trainer = DistillationTrainer(
        Encoder(bert(), "cls"), gaussian(), Store(),
        arguments(tmp_path, bf16=True, max_steps=3, gradient_accumulation_steps=2),
        train_dataset=texts(), eval_dataset=texts(16), norm=TeacherNorm(DIMS), heads_once=True,
        recompute_student=True,
    )  # fmt: skip
    seen = []
    trainer.student.model.register_forward_hook(
        lambda module, inputs, output: seen.append(output.last_hidden_state.dtype)
    )
    assert np.isfinite(trainer.train().training_loss)
    assert np.isfinite(trainer.evaluate()["eval_loss"])
    linear = trainer.student.model.encoder.layer[0].output.dense
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(torch.ones(1, 8)).dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in trainer.distillation.parameters())


def test_early_stopping_and_the_best_checkpoint(tmp_path):
    """Of three evaluations the first is the best; two more are borne."""
    values, kept = iter((1.0, 2.0, 3.0)), []

    def measure(output):
        kept.append(weights(trainer))
        return {"error": next(values)}

    trainer = DistillationTrainer(
        network(), gaussian(), Store(),
        arguments(
            tmp_path, max_steps=40, eval_strategy="steps", eval_steps=2, save_strategy="steps",
            save_steps=2, load_best_model_at_end=True, metric_for_best_model="error",
            greater_is_better=False, save_total_limit=1,
        ),
        train_dataset=vectors(), eval_dataset=vectors(16), compute_metrics=measure,
        callbacks=[EarlyStoppingCallback(2)],
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 6
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    torch.testing.assert_close(weights(trainer), kept[0], rtol=0, atol=0)
    state = (tmp_path / "checkpoint-2" / "trainer_state.json").read_text()
    assert f'"best_model_checkpoint": "{tmp_path / "checkpoint-2"}"' in state


def test_teachers_in_the_loop_equal_their_stored_rows(tmp_path):
    torch.manual_seed(7)
    teachers = {
        "cnn": Encoder(torch.nn.Linear(8, 3), inputs=("x",)),
        "pca": Encoder(
            torch.nn.Sequential(torch.nn.Linear(8, 5), torch.nn.Dropout()), inputs=("x",)
        ),
    }
    live, store = TeacherModels(teachers, dtype=None), Store(missing=0.0)
    x = torch.stack([sample["x"] for sample in vectors()])
    store.packed = live({"x": x})[0]
    runs = [
        trained(tmp_path, gaussian(), targets, network(), vectors(), max_steps=3)
        for targets in (live, store)
    ]
    torch.testing.assert_close(*(weights(run) for run in runs), rtol=1e-5, atol=1e-5)
    assert not any(name.startswith("targets") for name in weights(runs[0]))
    assert all(p.grad is None for model in live.models for p in model.parameters())
    half = TeacherModels(teachers)({"x": x})[0]
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), store.packed, rtol=2e-2, atol=2e-2)


def test_a_teacher_reads_its_own_keys():
    teacher = Encoder(torch.nn.Linear(8, 3), inputs=("x",), prefix="teacher_")
    targets = TeacherModels({"cnn": teacher}, dtype=None)
    assert targets.keys == ("teacher_x",)
    x = torch.randn(4, 8)
    packed, mask = targets({"x": torch.zeros(4, 8), "teacher_x": x})
    assert torch.equal(packed, teacher.model(x))
    assert mask is None


def test_columns_that_no_one_reads_are_left_out(tmp_path):
    seen = []

    def collate(samples):
        seen.extend(samples[0])
        return {key: torch.stack([torch.as_tensor(s[key]) for s in samples]) for key in samples[0]}

    trainer = DistillationTrainer(
        Encoder(bert(), "mean"), gaussian(), Store(), arguments(tmp_path, max_steps=1),
        train_dataset=texts(), data_collator=collate,
    )  # fmt: skip
    trainer.train()
    assert set(seen) == {"input_ids", "attention_mask", "row"}


def test_a_callable_may_read_any_column(tmp_path):
    def targets(batch):
        return torch.cat([batch["extra"]] * 4, 1), None

    data = [sample | {"extra": sample["x"][:2]} for sample in vectors(16)]
    trainer = trained(tmp_path, gaussian(), targets, network(), data)
    assert trainer.state.global_step == 1


def test_activation_checkpointing_reaches_the_student(tmp_path):
    newer = hasattr(TrainingArguments, "activation_checkpointing")
    setting = f"{'activation' if newer else 'gradient'}_checkpointing"
    trainer = DistillationTrainer(
        Encoder(bert(), "mean"), gaussian(), Store(),
        arguments(tmp_path, max_steps=1, **{setting: True}), train_dataset=texts(),
    )  # fmt: skip
    trainer.train()
    assert getattr(trainer.student.model, f"is_{setting}")


def test_stand_ins_have_the_store_s_interface():
    targets = StoreTargets(Store())
    assert targets.names == tuple(DIMS)
    assert targets.dims == DIMS
    loss = partial(F.mse, dims=(3, 5))

    class Reader(Store):
        def read(self, rows, device):
            assert device == rows.device
            return self.packed[rows] + 1, self.mask[rows]

    rows = torch.tensor([3, 9])
    assert torch.equal(StoreTargets(Reader())({"row": rows})[0], Store()[rows][0] + 1)
    matrix = Objective(loss)(torch.zeros(4, 8), *distilling.Store()[torch.arange(4)])
    assert matrix.shape == (4, 2)


def test_a_hugging_face_dataset_is_read_as_it_is(tmp_path):
    """Its columns that no one reads are left out, row numbers become integers, order is kept."""
    datasets = pytest.importorskip("datasets")
    runs = []
    plain = texts()
    lists = {
        key: [torch.as_tensor(s[key]).tolist() for s in plain] for key in plain[0] if key != "text"
    }
    table = datasets.Dataset.from_dict(lists | {"text": [s["text"] for s in plain]})
    for data in (plain, table):
        trainer = DistillationTrainer(
            Encoder(bert(), "mean"), gaussian(), Store(), arguments(tmp_path, max_steps=3),
            train_dataset=data, eval_dataset=data,
        )  # fmt: skip
        trainer.train()
        runs.append((weights(trainer), trainer.evaluate()["eval_loss"]))
    torch.testing.assert_close(runs[1], runs[0], rtol=0, atol=0)


def test_labels_reach_compute_metrics(tmp_path):
    data = [sample | {"label": sample["row"] % 3} for sample in vectors(20)]
    trainer = DistillationTrainer(
        network(), gaussian(), Store(), arguments(tmp_path), eval_dataset=data,
        compute_metrics=lambda output: {"sum": int(output.label_ids.sum())},
    )  # fmt: skip
    metrics = trainer.evaluate()
    assert metrics["eval_sum"] == sum(row % 3 for row in range(20))
    trainer.compute_metrics = None
    assert metrics["eval_loss"] == trainer.evaluate(vectors(20))["eval_loss"]
    trainer.args.label_names = ["labels"]  # named, but not there
    assert metrics["eval_loss"] == trainer.evaluate(vectors(20))["eval_loss"]


def test_information_is_told_of_each_teacher_that_was_seen(tmp_path):
    store = Store()
    store.mask[:, 0] = False
    logs = trained(tmp_path, gaussian(), store, network(), vectors()).state.log_history[0]
    assert [key for key in logs if "information" in key] == ["information/pca"]


def test_a_student_in_16_bits_has_heads_in_32(tmp_path):
    student = Encoder(network().model.to(torch.bfloat16), inputs=("x",))
    data = [sample | {"x": sample["x"].to(torch.bfloat16)} for sample in vectors()]
    trainer = trained(tmp_path, gaussian(), Store(), student, data)
    assert trainer.objectives["loss"].loss.depth == 1
    assert np.isfinite(trainer.state.log_history[0]["loss"])


def test_a_student_that_names_no_key_gets_all(tmp_path):
    class Any(torch.nn.Module):
        def forward(self, **batch):
            return batch["x"]

    trainer = DistillationTrainer(
        Encoder(Any()), Projectors(8, DIMS), Store(), arguments(tmp_path, max_steps=1),
        train_dataset=vectors(),
    )  # fmt: skip
    with pytest.raises(ValueError, match="for Any, got x, row; inputs="):
        trainer.train()
