"""The recipe for Lightning, as docs/distributed.md has it, run by two processes and by one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parents[1] / "docs" / "distributed.md"
PREFACE = """
import torch
from torch.utils.data import DataLoader, TensorDataset

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
dims = {"cnn": 12, "pca": 20}
rows = TensorDataset(torch.randn(64, 32), torch.randn(64, 32), torch.rand(64, 2) < 0.7)
loader = DataLoader(rows, batch_size=BATCH)
"""
EPILOGUE = """
if trainer.global_rank == 0:
    torch.save(trainer.model.state_dict(), "weights.pt")
"""


def trained(folder, processes):
    """Run the recipe as a script; return its weights after an epoch of steps of 16 rows."""
    (recipe,) = re.findall(r"```py\n(import lightning.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert recipe.count("devices=2") == 1
    recipe = recipe.replace("devices=2", f"devices={processes}, enable_checkpointing=False")
    script = folder / "train.py"
    script.write_text(PREFACE.replace("BATCH", str(16 // processes)) + recipe + EPILOGUE)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PAGE.parents[1])}
    command = [sys.executable, script.name]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=240)
    assert result.returncode == 0, result.stderr.decode()
    state = torch.load(folder / "weights.pt", weights_only=True)
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def test_two_processes_train_as_one(tmp_path):
    pytest.importorskip("lightning")
    folders = [tmp_path / str(processes) for processes in (1, 2)]
    for folder in folders:
        folder.mkdir()
    one, two = (trained(folder, processes) for processes, folder in enumerate(folders, start=1))
    torch.testing.assert_close(two, one, rtol=1e-9, atol=1e-12)
    assert any("heads" in name for name in one)
