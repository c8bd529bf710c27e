"""Shared settings: two threads, repeatable hypothesis examples."""

import torch
from hypothesis import settings

settings.register_profile("mtkd", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("mtkd")
torch.set_num_threads(2)
