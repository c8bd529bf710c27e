"""Inputs of the public losses, short teachers beside a long one, for tests of behaviour."""

import pytest
import torch

import mtkd.functional as F

DIMS = (40, 3, 1100)
D = sum(DIMS)


def row(rows=6, dtype=torch.float32):
    torch.manual_seed(0)
    mean, log_std = (x.requires_grad_() for x in (torch.randn(rows, D), 0.3 * torch.randn(rows, D)))
    return mean.to(dtype), log_std.to(dtype), torch.randn(rows, D).to(dtype)


def fused(rows=6, features=9):
    torch.manual_seed(0)
    x, weight = torch.randn(rows, features), 0.2 * torch.randn(2, D, features)
    return x.requires_grad_(), weight.requires_grad_(), torch.randn(rows, D)


BOTH = [
    pytest.param(F.gaussian_nll, row, id="row"),
    pytest.param(F.linear_gaussian_nll, fused, id="linear"),
]
