"""Consensus of messages beside sorting: ``python -m benchmarks.consensus``.

A consensus is a target, without gradients, so it has a table of its own. Each vote is compared
with float64 before it is timed; times are medians of interleaved calls, and fresh results are part
of them.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import mtkd.functional as F
from mtkd.testing import relative_error

from .cases import ERROR_LIMIT
from .measure import CpuClock, GpuClock, interleaved

MESSAGES, MAP = 13, (8, 3, 256, 256)
CLASS_MAP = (8, 12, 128, 128)
BUDGET = 6.0  # seconds for each vote
Vote = Callable[[Tensor, Tensor], Tensor]


def sorted_median(messages: Tensor, weight: Tensor) -> Tensor:
    """The median as scripts write it: stack and sort."""
    return messages.sort(0).values[len(messages) // 2]


def sorted_weighted_median(messages: Tensor, weight: Tensor) -> Tensor:
    """The first message at which half of the weight is reached, after a sort."""
    values, order = messages.sort(0)
    reached = weight[order].cumsum(0) < 0.5 * weight.sum()
    return values.gather(0, reached.sum(0, keepdim=True)).squeeze(0)


def sorted_trimmed_mean(messages: Tensor, weight: Tensor) -> Tensor:
    """The mean without three messages at each end."""
    return messages.sort(0).values[3:-3].mean(0)


def stacked_mean(messages: Tensor, weight: Tensor) -> Tensor:
    """The weighted mean of stacked messages."""
    shares = weight / weight.sum()
    return (shares.reshape(-1, *[1] * (messages.dim() - 1)) * messages).sum(0)


def gaussian_mean_shift(messages: Tensor, weight: Tensor) -> Tensor:
    """Three steps of mean shift from the mean."""
    center = messages.mean(0)
    for _ in range(3):
        kernel = torch.exp(-0.5 * (messages - center).square())
        center = (kernel * messages).sum(0) / kernel.sum(0)
    return center


def softmax_mean(messages: Tensor, weight: Tensor) -> Tensor:
    """The mean of class maps' probabilities."""
    return messages.softmax(2).mean(0)


# name: options of ours, whether weights are given, torch's code, how much faster is asked of ours
VOTES: dict[str, tuple[dict[str, Any], bool, Vote, float]] = {
    "median": ({"method": "median"}, False, sorted_median, 60),
    "weighted median": ({"method": "median"}, True, sorted_weighted_median, 40),
    "trimmed mean": ({"method": "trimmed_mean", "trim": 3 / 13}, False, sorted_trimmed_mean, 0),
    "weighted mean": ({}, True, stacked_mean, 0),
    "mean shift": (
        {"kernel": "gaussian", "bandwidth": 1.0, "iterations": 3},
        False,
        gaussian_mean_shift,
        0,
    ),
    "class maps": ({"class_dim": 1}, False, softmax_mean, 0),
}


def run(name: str, clock: Any, budget: float, small: bool) -> dict[str, float]:
    """Check a vote, then time it beside torch's code; milliseconds, and how many times faster."""
    options, weighted, torch_vote, asked = VOTES[name]
    shape = CLASS_MAP if "class_dim" in options else MAP
    shape = tuple(min(size, 12) for size in shape) if small else shape
    generator = torch.Generator(clock.device).manual_seed(0)
    draw = {"generator": generator, "device": clock.device}
    messages = [torch.randn(shape, **draw) for _ in range(MESSAGES)]
    weight = 0.5 + torch.rand(MESSAGES, **draw)

    def ours() -> Tensor:
        return F.consensus(messages, weight=weight if weighted else None, **options).consensus

    def theirs() -> Tensor:
        return torch_vote(torch.stack(messages), weight)

    exact = torch_vote(torch.stack(messages).double(), weight.double())
    error = relative_error(ours(), exact)
    if error > ERROR_LIMIT[32]:
        raise RuntimeError(f"{name}: error {error:.1e}, no speed")
    times, _ = interleaved(clock, {"ours": [ours], "torch": [theirs]}, lambda: None, budget)
    found = {contender: 1e3 * seconds for contender, seconds in times.items()}
    return found | {"faster": found["torch"] / found["ours"], "asked": asked, "error": error}


def main() -> None:
    """Print a row for each vote."""
    parser = argparse.ArgumentParser("python -m benchmarks.consensus", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="small maps, few repeats")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = GpuClock() if options.device == "cuda" else CpuClock()
    print(f"{MESSAGES} messages, float32, milliseconds")
    for name in VOTES:
        row = run(name, clock, 0.2 if options.quick else BUDGET, options.quick)
        asked = f", asked {row['asked']:.0f}" if row["asked"] and not options.quick else ""
        print(
            f"{name:16s} ours {row['ours']:8.2f}  torch {row['torch']:8.2f}"
            f"  {row['faster']:6.1f} x{asked}  error {row['error']:.0e}"
        )


if __name__ == "__main__":
    main()
