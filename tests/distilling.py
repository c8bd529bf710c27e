"""What tests of the trainer share: a store in memory, students, data, a run to be killed."""

import multiprocessing
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertModel, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from mtkd.nn import GaussianHeads, TeacherNorm
from mtkd.trainer import DistillationTrainer, Encoder

DIMS = {"cnn": 3, "pca": 5}
WIDTH = 6


class Store:
    """A teacher store in memory: `names`, `dims` and ``store[rows] -> (packed, mask)``."""

    def __init__(self, rows=64, dims=DIMS, dtype=torch.float32, missing=0.3):
        generator = torch.Generator().manual_seed(1)
        self.names, self.dims = tuple(dims), dict(dims)
        self.packed = torch.randn(rows, sum(dims.values()), generator=generator, dtype=dtype)
        self.mask = torch.rand(rows, len(dims), generator=generator) >= missing

    def __getitem__(self, rows):
        return self.packed[rows], self.mask[rows]


def vectors(rows=64, dtype=torch.float32):
    """Samples of 8 numbers."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(rows, 8, generator=generator, dtype=dtype)
    return [{"x": x[row], "row": row} for row in range(rows)]


def texts(rows=64):
    """Samples of tokens; odd rows end in padding."""
    tokens = torch.randint(1, 40, (rows, 7), generator=torch.Generator().manual_seed(3))
    attention = torch.ones_like(tokens)
    attention[1::2, 5:] = 0
    return [
        {"input_ids": tokens[row], "attention_mask": attention[row], "row": row, "text": "unused"}
        for row in range(rows)
    ]


def network(dtype=torch.float32, dropout=0.0):
    """A student of vectors."""
    torch.manual_seed(4)
    layers = (nn.Linear(8, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Dropout(dropout))
    model = nn.Sequential(*(layers if dropout else (layers[0], layers[2])), nn.Linear(7, WIDTH))
    return Encoder(model.to(dtype), inputs=("x",))


def bert(dropout=0.0):
    """A student of tokens."""
    torch.manual_seed(5)
    config = BertConfig(
        vocab_size=40,
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=8,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return BertModel(config)


def gaussian(dtype=torch.float32):
    torch.manual_seed(6)
    return GaussianHeads(WIDTH, DIMS, hidden_features=4, depth=1).to(dtype)


def arguments(folder, **options):
    """Arguments of a quick and silent run on a CPU, in the order of the data."""
    quiet = {"disable_tqdm": True, "report_to": "none", "use_cpu": True, "save_strategy": "no"}
    quiet |= {"dataloader_pin_memory": False, "logging_steps": 1, "per_device_train_batch_size": 8}
    quiet |= {"train_sampling_strategy": "sequential"}
    return TrainingArguments(str(folder), **(quiet | options))


def sgd(folder, **options):
    """Plain gradient descent: a step's change of the weights is its gradient."""
    plain = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant"}
    return arguments(folder, **(plain | {"max_grad_norm": 0.0} | options))


STEPS, EVERY = 24, 5


def resumable(folder):
    """A run with all that a checkpoint must bring back: dropout, shuffling, AdamW, statistics."""
    args = arguments(
        folder,
        max_steps=STEPS,
        save_strategy="steps",
        save_steps=EVERY,
        save_total_limit=2,
        train_sampling_strategy="random",
        gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=STEPS,
    )
    student, norm = Encoder(bert(dropout=0.2), "mean"), TeacherNorm(DIMS)
    return DistillationTrainer(
        student, gaussian(), Store(), args, norm=norm, train_dataset=texts(), heads_once=True
    )


class Progress(TrainerCallback):
    """Tells another process how many steps are done."""

    def __init__(self, steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **_):
        self.steps.value = state.global_step


def run(folder, steps=None):
    """Train from the last checkpoint, if there is one, to the end; then write all weights."""
    torch.set_num_threads(1)
    sys.stdout = sys.stderr
    trainer = resumable(folder)
    if steps is not None:
        trainer.add_callback(Progress(steps))
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder))
    trainer.save_model(str(Path(folder, "end")))


def processes():
    """A way to start processes that have transformers imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mtkd.trainer", "transformers.models.bert.modeling_bert"])
    return context


def start(folder):
    """Start `run` in a process of its own; return it and the number of steps that it has done."""
    context = processes()
    steps = context.Value("i", 0)
    process = context.Process(target=run, args=(str(folder), steps))
    process.start()
    return process, steps


def ended(folder):
    """The weights and statistics at the end of a run."""
    return load_file(Path(folder, "end", "model.safetensors"))
