"""Two processes (gloo), by DDP and by FSDP2, train as one does, stop, and resume."""

import os
import socket
import sys

import distilling
import pytest
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from distilling import DIMS, WIDTH, Store, gaussian, network, sgd, vectors
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from mtkd.nn import Projectors, TeacherNorm
from mtkd.trainer import DistillationTrainer

DOUBLE = torch.float64


BEST = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "eval_steps": 1}
BEST |= {"eval_strategy": "steps", "save_steps": 1, "greater_is_better": True}  # the first one
SHARDED = {"state_dict_type": "SHARDED_STATE_DICT", "auto_wrap_policy": "NO_WRAP"}


def shard(args):
    """Have accelerate take processes on a CPU for some it would use FSDP with, as torch can."""
    assert args.device.type == "cpu"
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def losses(kind):
    """Likelihoods; or projectors and a norm, of which FSDP shall make nothing of its own."""
    torch.manual_seed(6)
    return gaussian(DOUBLE) if kind == "gaussian" else Projectors(WIDTH, DIMS).to(DOUBLE)


def train(folder, batch, resume=False, fsdp=None, kind="gaussian", best=False, **options):
    """Two steps of 32 rows and one of 16, the second of which has a bad row."""
    data, store = vectors(80, DOUBLE), Store(80, dtype=DOUBLE)
    data[41]["x"] = torch.full((8,), torch.nan, dtype=DOUBLE)
    store.mask[41] = True
    args = sgd(
        folder,
        num_train_epochs=1,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        max_grad_norm=0.1,
        **(BEST if best else {"save_steps": 2}),
        **({"fsdp": True, "fsdp_config": fsdp} if fsdp else {}),
    )
    if fsdp:
        shard(args)
    trainer = DistillationTrainer(
        network(DOUBLE), losses(kind), store, args, train_dataset=data,
        eval_dataset=vectors(19, DOUBLE), norm=TeacherNorm(DIMS), **options,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=os.path.join(folder, "checkpoint-2") if resume else None)
    sharded = [isinstance(p, DTensor) for p in trainer.distillation.parameters()]
    assert sharded == [bool(fsdp)] * len(sharded)
    metrics = trainer.evaluate()
    trainer.export_student(os.path.join(folder, "student"))
    weights = {k: whole(v) for k, v in trainer.distillation.state_dict().items()}
    return weights, trainer.state.log_history[:3], metrics, trainer.guard.skipped


def child(rank, port, folder, options, queue):
    torch.set_num_threads(1)
    sys.stdout = sys.stderr
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    weights, *rest = train(folder, 8, **options)
    torch.save(weights, os.path.join(folder, f"weights{rank}.pt"))
    queue.put((rank, rest))
    torch.distributed.destroy_process_group()


def two(folder, options):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = distilling.processes()
    queue = context.Queue()
    arguments = [(rank, port, str(folder), options, queue) for rank in range(2)]
    children = [context.Process(target=child, args=each) for each in arguments]
    for process in children:
        process.start()
    results = dict(queue.get(timeout=120) for _ in children)
    for process in children:
        process.join(60)
    assert [process.exitcode for process in children] == [0, 0]
    weights = [torch.load(folder / f"weights{rank}.pt", weights_only=True) for rank in range(2)]
    return weights, [results[rank] for rank in range(2)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"heads_once": True, "recompute_student": True},
        {"fsdp": SHARDED, "heads_once": True},
        {"fsdp": SHARDED, "kind": "projectors"},
    ],
    ids=["each", "once", "fsdp", "fsdp-projectors"],
)
def test_two_processes_train_as_one(tmp_path, options):
    alone = {name: value for name, value in options.items() if name != "fsdp"}
    expected, logs, metrics, skipped = train(tmp_path / "one", 16, **alone)
    weights, results = two(tmp_path, options)
    for mine, (history, evaluation, count) in zip(weights, results, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-12)
        assert count == skipped == 1
        assert evaluation["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-9)
        for step in (0, 2) if history else ():  # the first process alone keeps logs
            for key in {"loss", "loss/cnn", "information/pca", "grad_norm"} & logs[step].keys():
                assert history[step][key] == pytest.approx(logs[step][key], rel=1e-5)
    student = load_file(tmp_path / "student" / "model.safetensors")
    assert torch.equal(student["0.weight"], weights[0]["student.model.0.weight"])
    again, _ = two(tmp_path, options | {"resume": True})  # the last step, from the checkpoint
    torch.testing.assert_close(again, weights, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"fsdp": SHARDED}], ids=["ddp", "fsdp"])
def test_all_processes_end_with_the_best_checkpoint(tmp_path, options):
    expected, *_ = train(tmp_path / "one", 16, best=True)
    weights, _ = two(tmp_path, options | {"best": True})
    torch.testing.assert_close(weights, [expected] * 2, rtol=1e-9, atol=1e-12)
    last, *_ = train(tmp_path / "last", 16)
    assert not torch.equal(last["student.model.0.weight"], expected["student.model.0.weight"])
