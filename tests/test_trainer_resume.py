"""A run that is killed at random moments and resumed ends as the run that was not, bit for bit."""

import os
import random
import signal
import time

import distilling
import pytest
import torch
from transformers.trainer_utils import get_last_checkpoint

from mtkd.trainer import DistillationTrainer, checkpoints

ROUNDS = int(os.environ.get("MTKD_KILLS", "3"))


@pytest.fixture(autouse=True)
def one_thread():
    """As in the processes: sums depend on how many threads share them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The end of a run that was not killed."""
    folder = tmp_path_factory.mktemp("whole")
    finish(folder)
    return distilling.ended(folder)


def finish(folder):
    process, _ = distilling.start(folder)
    process.join(120)
    assert process.exitcode == 0


def kill(folder, steps, pause):
    """Kill a run so many steps and seconds after it began; it may be anywhere, writing too."""
    process, done = distilling.start(folder)
    while process.is_alive() and done.value < steps:
        time.sleep(0.001)
    time.sleep(pause)
    process.kill()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


def test_a_killed_run_ends_as_the_one_that_was_not(whole, tmp_path):
    draw = random.Random()
    for number in range(ROUNDS):
        folder = tmp_path / str(number)
        folder.mkdir()
        steps, pause = draw.randrange(distilling.STEPS - 4), draw.uniform(0.0, 0.02)
        kill(folder, steps, pause)
        finish(folder)
        resumed = distilling.ended(folder)
        assert resumed.keys() == whole.keys()
        differ = [name for name, tensor in whole.items() if not torch.equal(tensor, resumed[name])]
        assert differ == [], f"killed {pause} s after step {steps}"


class Killed(BaseException):
    pass


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_checkpoint_is_whole_or_it_is_not(whole, tmp_path, monkeypatch, file):
    """Stop right after each file of the second checkpoint is begun: the first one is the last."""
    trainer = distilling.resumable(tmp_path)
    half = tmp_path / checkpoints.ASIDE / "checkpoint-10" / file

    def stop(path):
        assert half.exists()
        raise Killed

    monkeypatch.setattr(trainer, *_after(trainer, file, half, stop))
    with pytest.raises(Killed):
        trainer.train()
    last = get_last_checkpoint(str(tmp_path))
    assert last.endswith("checkpoint-5")
    distilling.run(str(tmp_path))
    ended = distilling.ended(tmp_path)
    assert [k for k, v in whole.items() if not torch.equal(v, ended[k])] == []
    assert not (tmp_path / checkpoints.ASIDE).exists()


def _after(trainer, file, half, stop):
    """What to put in place of the trainer's method that comes after a file is written."""
    name = {
        "model.safetensors": "_save_optimizer_and_scheduler",
        "optimizer.pt": "_save_rng_state",
        "trainer_state.json": "_name_best",
    }[file]
    method = getattr(trainer, name)

    def instead(*arguments):
        if half.parent.exists():
            stop(half)
        return method(*arguments)

    return name, instead


def test_a_step_that_is_trained_again_is_never_without_a_checkpoint(tmp_path, monkeypatch):
    """Stop between the two renames: the older checkpoint has its name again."""
    args = distilling.arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)

    def trainer():
        return DistillationTrainer(
            distilling.network(), distilling.gaussian(), distilling.Store(), args,
            train_dataset=distilling.vectors(),
        )  # fmt: skip

    trainer().train()
    before = (tmp_path / "checkpoint-2" / "model.safetensors").read_bytes()
    renames, replace = [], os.replace

    def stop(source, target):
        renames.append(target)
        if str(target) == str(tmp_path / "checkpoint-2"):
            raise Killed
        replace(source, target)

    monkeypatch.setattr(checkpoints.os, "replace", stop)
    with pytest.raises(Killed):
        trainer().train()
    assert len(renames) == 2
    assert get_last_checkpoint(str(tmp_path)) is None
    monkeypatch.undo()
    trainer()
    assert (tmp_path / "checkpoint-2" / "model.safetensors").read_bytes() == before


def test_a_step_broken_off_does_not_outlive_it(whole, tmp_path, monkeypatch):
    """The same trainer goes on from its checkpoint, with the statistics that are there."""
    trainer = distilling.resumable(tmp_path)
    reduce = trainer.objectives["loss"].reduce

    def stop(*arguments):
        if trainer.state.global_step == 8:
            raise KeyboardInterrupt
        return reduce(*arguments)

    monkeypatch.setattr(trainer.objectives["loss"], "reduce", stop)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    monkeypatch.undo()
    trainer.train(resume_from_checkpoint=True)
    ended = trainer.distillation.state_dict()
    assert [name for name, tensor in whole.items() if not torch.equal(tensor, ended[name])] == []


def test_a_step_broken_off_leaves_statistics_as_they_were(tmp_path, monkeypatch):
    trainer = distilling.resumable(tmp_path)
    before = trainer.distillation.statistics.state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer.objectives["loss"], "reduce", stop)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        assert trainer.distillation.norm.count.any()
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    trainer.guard.restore()
    torch.testing.assert_close(dict(trainer.distillation.statistics.state_dict()), before)


def test_damaged_weights_are_named(tmp_path):
    trainer = distilling.resumable(tmp_path)
    trainer.save_model(str(tmp_path / "saved"))
    file = tmp_path / "saved" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"expected whole files in .*saved, got one of weights"):
        trainer._load_from_checkpoint(str(tmp_path / "saved"))


def test_state_dicts_are_made_fit_for_safetensors():
    whole = torch.arange(6.0)
    state = {"a": whole, "tied": whole, "view": whole.view(2, 3).T, "part": whole[2:4]}
    fit = checkpoints.savable(state)
    assert all(torch.equal(fit[name], state[name]) for name in state)
    assert all(tensor.is_contiguous() for tensor in fit.values())
    assert len({tensor.untyped_storage().data_ptr() for tensor in fit.values()}) == 4
    assert fit["a"].data_ptr() == whole.data_ptr()  # not copied without need
    with pytest.raises(ValueError, match="expected tensors alone, got int for step"):
        checkpoints.savable({"step": 1})


def test_statistics_of_teachers_in_another_order_are_refused(tmp_path):
    distilling.resumable(tmp_path / "a")._save_own(tmp_path)
    other = distilling.resumable(tmp_path / "b")
    other.teachers = other.teachers._replace(names=other.teachers.names[::-1])
    with pytest.raises(ValueError, match=r"expected the teachers .*'pca': 3.* got .*'cnn': 3"):
        other._load_from_checkpoint(str(tmp_path))


def test_a_checkpoint_of_other_teachers_is_refused(tmp_path):
    distilling.resumable(tmp_path / "a").save_model(str(tmp_path / "saved"))
    torch.manual_seed(0)
    other = distilling.resumable(tmp_path / "b")
    other.objectives["loss"].loss.teachers = other.objectives["loss"].loss.teachers._replace(
        names=("cnn", "lda")
    )
    with pytest.raises(ValueError, match=r"resume_from_checkpoint: expected .* got none for .*lda"):
        other._load_from_checkpoint(str(tmp_path / "saved"))
