"""What `heads_once` saves: ``python -m benchmarks.heads_once``; it needs ``mtkd[train]``.

A step of 8 micro-batches of 16 rows, a small transformer, 8 teachers of width 1024. Ways are
interleaved; figures are medians of a step's time, and of what graphs hold when backward begins.
"""

import copy
import statistics
import tempfile
import time

import torch
from torch import nn
from transformers import BertConfig, BertModel, TrainingArguments

from mtkd.nn import GaussianHeads
from mtkd.trainer import DistillationTrainer, Encoder

DIMS = {f"teacher {number}": 1024 for number in range(8)}
ROWS, MICRO, LENGTH, WIDTH = 16, 8, 8, 384
WAYS = {
    "heads a micro-batch": {},
    "heads once": {"heads_once": True},
    "heads once, student recomputed": {"heads_once": True, "recompute_student": True},
}


def batches() -> list[dict[str, torch.Tensor]]:
    """The micro-batches of a step."""
    return [
        {"input_ids": torch.randint(1, 1000, (ROWS, LENGTH)), "row": torch.arange(ROWS)}
        for _ in range(MICRO)
    ]


def make(student: nn.Module, heads: nn.Module, folder: str, **way: bool) -> DistillationTrainer:
    """A trainer with targets that cost nothing."""
    targets = torch.randn(ROWS, sum(DIMS.values()), dtype=torch.float16)
    args = TrainingArguments(folder, report_to="none", use_cpu=True, dataloader_pin_memory=False)
    model = Encoder(copy.deepcopy(student), "mean")
    return DistillationTrainer(
        model, copy.deepcopy(heads), lambda batch: (targets, None), args, dims=DIMS, **way
    )


def step(trainer: DistillationTrainer, data: list[dict[str, torch.Tensor]]) -> tuple[float, float]:
    """Forward and backward of a step: seconds, and MB that graphs hold when a backward begins."""
    weights = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}
    held: dict[int, int] = {}
    most, began = 0, time.perf_counter()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    _, items = trainer.get_batch_samples(iter(data), MICRO, trainer.args.device)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for batch in data:
            trainer.training_step(trainer.model, batch, items)
            most = max(most, sum(held.values()))
            held.clear()  # a backward freed them
    seconds = time.perf_counter() - began
    trainer.model.zero_grad()
    return seconds, most / 1e6


def main(repeats: int = 5) -> None:
    """Measure all ways, interleaved; print a table."""
    config = BertConfig(
        vocab_size=1000, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=6,
        intermediate_size=4 * WIDTH,
    )  # fmt: skip
    student, heads, data = BertModel(config), GaussianHeads(WIDTH, DIMS), batches()
    with tempfile.TemporaryDirectory() as folder:
        trainers = {name: make(student, heads, folder, **way) for name, way in WAYS.items()}
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
        for trainer in trainers.values():
            step(trainer, data)
        for _ in range(repeats):
            for name, trainer in trainers.items():
                found[name].append(step(trainer, data))
    for name, pairs in found.items():
        seconds, held = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"{name:32} {seconds:6.2f} s {held:7.0f} MB held when backward begins")


if __name__ == "__main__":
    main()
