"""Timing and memory, one interface for a CPU and a GPU: medians of interleaved blocks of calls.

A block is a few calls one after another, each on inputs of its own. On a GPU it lies between two
events, behind a fill that is larger than the cache: so no input is in the cache, and the first
launch is queued while the fill runs. What the host needs longer than the GPU counts as time.
"""

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

Step = Callable[[], Any]
SLOW = 8.0  # seconds of a first call that is not worth repeating
BLOCK = 0.05  # seconds that a block should not exceed, where it has more than one call
OURS = "ours"


class CpuClock:
    """Wall time, and resident memory."""

    device = "cpu"
    sets = 1  # of inputs: calls reuse theirs, as a training loop does

    def sets_of(self, nbytes: int) -> int:
        """How many sets of inputs of this size are used in turn."""
        return 1

    def wait(self) -> None:
        """Nothing runs on."""

    def alive(self) -> bool:
        """A process that is not dead can go on."""
        return True

    def block(self, steps: list[Step]) -> float:
        """Seconds of a call, over a block of them."""
        start = time.perf_counter()
        for step in steps:
            step()
        return (time.perf_counter() - start) / len(steps)

    def memory(self) -> int:
        """Bytes that temporaries of a baseline may take."""
        return 6 << 30

    def peak_bytes(self, step: Step) -> int | None:
        """Most resident memory that one call adds, or None where the system does not tell.

        Resident memory counts what the matrix products' library takes too; Linux lets a process
        reset its own high-water mark.
        """
        try:
            ctypes.CDLL(None).malloc_trim(0)  # freed memory still resident would hide a peak
            Path("/proc/self/clear_refs").write_text("5")
            before = _status("VmRSS")
            step()
            return _status("VmHWM") - before
        except (OSError, AttributeError):
            return None


class GpuClock:
    """CUDA events, and the allocator's counts."""

    device = "cuda"

    def __init__(self) -> None:
        gpu = torch.cuda.get_device_properties(0)
        self.cache, self.total = gpu.L2_cache_size, gpu.total_memory
        self.filler = torch.empty(max(256 << 20, 4 * self.cache), dtype=torch.int8, device="cuda")

    def sets_of(self, nbytes: int) -> int:
        """Sets of inputs that together are twice the cache, and at least four where they fit."""
        wanted = max(4, min(16, -(-2 * self.cache // max(1, nbytes))))
        return max(1, min(wanted, self.total // 8 // max(1, nbytes)))

    def wait(self) -> None:
        """Wait for the GPU."""
        torch.cuda.synchronize()

    def alive(self) -> bool:
        """Whether the GPU still takes work: after an access out of bounds it takes none."""
        try:
            self.wait()
        except RuntimeError:
            return False
        return True

    def block(self, steps: list[Step]) -> float:
        """Seconds of a call, over a block of them."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.wait()
        self.filler.fill_(1)
        start.record()
        for step in steps:
            step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / len(steps)

    def memory(self) -> int:
        """Bytes that temporaries of a baseline may take."""
        return self.total // 4

    def peak_bytes(self, step: Step) -> int:
        """Most memory that one call adds to what is allocated."""
        self.wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        self.wait()
        return torch.cuda.max_memory_allocated() - before


Clock = CpuClock | GpuClock


def _status(name: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if name in x)
    return int(line.split()[1]) * 1024


@dataclass
class Contenders:
    """What is timed: blocks of calls by name, first calls, and who does not take part."""

    blocks: dict[str, list[Step]] = field(default_factory=dict)
    first: dict[str, float] = field(default_factory=dict)  # seconds
    skipped: dict[str, str] = field(default_factory=dict)

    def add(self, clock: Clock, name: str, make: Callable[[], list[Step]], clear: Step) -> None:
        """Make a contender's calls and run the first of them; baselines that cannot are skipped."""
        clear()
        start = time.perf_counter()
        try:
            steps = make()
            steps[0]()
            clock.wait()
        except Exception as error:  # a compiler that is missing, say; the others still run
            if name == OURS:
                raise
            self.skipped[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            return
        self.first[name] = time.perf_counter() - start
        if self.first[name] > SLOW and name not in (OURS, "compile"):
            self.skipped[name] = f"one call takes {self.first[name]:.0f} s"
            return
        clear()
        start = time.perf_counter()
        steps[0]()
        clock.wait()
        calls = int(BLOCK / (time.perf_counter() - start))
        self.blocks[name] = steps[: max(1, calls)]


def interleaved(
    clock: Clock,
    blocks: dict[str, list[Step]],
    clear: Step,
    budget: float,
    most: int = 60,
) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds a call, and their interquartile range over it.

    Contenders take turns until the budget (seconds) is spent, five times at least; twice if it is
    nothing.
    """
    taken: dict[str, list[float]] = {name: [] for name in blocks}
    fewest = 5 if budget else 2
    start = time.perf_counter()
    for turn in range(most):
        if turn >= fewest and time.perf_counter() - start > budget:
            break
        for name, steps in blocks.items():
            clear()
            taken[name].append(clock.block(steps))
    medians = {name: median(times) for name, times in taken.items()}
    return medians, {name: _spread(times) for name, times in taken.items()}


def _spread(times: list[float]) -> float:
    low, middle, high = quantiles(times, n=4)
    return (high - low) / middle


def host_seconds(clock: Clock, step: Step, clear: Step, calls: int) -> float:
    """Median wall time of a call that is not waited for: what it costs the host."""
    taken = []
    for call in range(calls):
        if call % 40 == 0:  # the queue never fills
            clock.wait()
        clear()
        start = time.perf_counter()
        step()
        taken.append(time.perf_counter() - start)
    clock.wait()
    return median(taken[calls // 4 :])


def graphed(step: Step, clear: Step) -> Step:
    """Capture a call in a CUDA graph; return its replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = step()  # the graph's memory stays its own while its results live

    def replay(_: Any = kept) -> None:
        graph.replay()

    return replay
