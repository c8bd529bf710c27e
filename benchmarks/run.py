"""Run one case: first calls, then its check, then its times; no speed without a green check."""

from collections.abc import Callable
from typing import Any

import torch

from . import check, measure
from .cases import FUSED, Case
from .losses import problem
from .measure import OURS, Clock, Step
from .problem import Draw, Problem
from .report import MIB, TOTAL

CHECKED_ROWS = {"cpu": 256, "cuda": 1 << 14}  # float64 formulas are slow on a CPU


class Bench:
    """A case on a device: its sets of inputs, and its contenders."""

    def __init__(self, case: Case, clock: Clock, dtype: torch.dtype, seed: int):
        self.case, self.clock, self.seed = case, clock, seed
        self.dtype = getattr(torch, case.dtype, dtype)
        first = self.draw(0, self.dtype)
        others = range(1, clock.sets_of(first.floor_bytes()))
        self.sets = [first, *(self.draw(i, self.dtype) for i in others)]
        self.wide: list[Problem] = []

    def draw(self, number: int, dtype: torch.dtype) -> Problem:
        """One of the sets of inputs."""
        return problem(self.case, Draw(self.clock.device, dtype, self.seed + number))

    def clear(self) -> None:
        """Forget all gradients."""
        for p in (*self.sets, *self.wide):
            p.clear()

    def steps(self, loss: Callable[[Any], Any]) -> list[Step]:
        """Forward and backward on each set."""
        return [lambda p=p: loss(p).backward() for p in self.sets]

    def contenders(self) -> dict[str, Callable[[], list[Step]]]:
        """How to make the calls of ours and of each baseline."""
        named = {
            OURS: lambda: self.steps(lambda p: p.ours()),
            "eager": lambda: self.steps(lambda p: p.eager()),
            "loop": lambda: self.steps(lambda p: p.loop()),
            "compile": self.compiled,
            "graph": self.graphs,
            "gemms": lambda: [p.gemms() for p in self.sets],
            "float32": self.widened,
            "read": lambda: [p.read for p in self.sets],
        }
        return {name: named[name] for name in (OURS, *self.case.baselines)}

    def compiled(self) -> list[Step]:
        """The packed formula under torch.compile."""
        function = torch.compile(self.sets[0].formula)
        return self.steps(lambda p: function(*p.tensors()))

    def widened(self) -> list[Step]:
        """Ours on float32 inputs."""
        self.wide = [self.draw(number, torch.float32) for number in range(len(self.sets))]
        return [lambda p=p: p.ours().backward() for p in self.wide]

    def graphs(self) -> list[Step]:
        """The loop in CUDA graphs; gradients stay in the graph, nothing is accumulated."""
        sets = self.sets[:4]
        leaves = [[*p.split_inputs, *([p.x] if self.case.loss == FUSED else [])] for p in sets]
        pairs = zip(sets, leaves, strict=True)
        return [
            measure.graphed(lambda p=p, x=x: torch.autograd.grad(p.loop(), x), self.clear)
            for p, x in pairs
        ]

    def unaffordable(self) -> dict[str, str]:
        """Baselines whose temporaries do not fit, and why."""
        needed = self.sets[0].temporaries()
        if needed <= self.clock.memory():
            return {}
        why = f"would take about {needed / 2**30:.0f} GiB"
        return dict.fromkeys(("eager", "loop", "compile", "graph"), why)


def run(
    bench: Bench, ceilings: dict[str, float], budget: float, left_out: dict[str, str]
) -> dict[str, Any]:
    """Check and time a case, some baselines left out; it has "failed" where the check fails.

    The first calls come first, so that what is compiled and cached then is part of them.
    """
    case, clock = bench.case, bench.clock
    contenders = measure.Contenders()
    makers = bench.contenders()
    left_out = left_out | bench.unaffordable()
    contenders.skipped = {name: why for name, why in left_out.items() if name in makers}
    contenders.add(clock, OURS, makers.pop(OURS), bench.clear)
    draw = Draw(clock.device, bench.dtype, bench.seed + 1000)
    result = {"size": case.size(), "dtype": str(bench.dtype).removeprefix("torch.")}
    result |= check.checked(case, draw, CHECKED_ROWS[clock.device])
    wrong = check.verdict(result)
    if wrong:
        return result | {"failed": wrong}
    for name, make in makers.items():
        if name not in contenders.skipped:
            contenders.add(clock, name, make, bench.clear)
    times, spread = measure.interleaved(clock, contenders.blocks, bench.clear, budget)
    result |= {
        "milliseconds": {name: 1e3 * value for name, value in times.items()},
        "spread": spread,
        "first_call_milliseconds": {name: 1e3 * t for name, t in contenders.first.items()},
        "skipped": contenders.skipped,
    }
    floor = bench.sets[0].floor_bytes() / (ceilings["copy_gbs"] * 1e9)
    result["floor_milliseconds"] = 1e3 * max(floor, times.get("gemms", 0.0))
    result["share_of_floor"] = result["floor_milliseconds"] / result["milliseconds"][OURS]
    result |= memory(bench, contenders.blocks)
    if case.tiny:
        result["host_microseconds"] = host(bench, calls=400 if budget else 8)
    if named := by_name(bench, budget / 2):
        result["implementations"] = named
    return result


def memory(bench: Bench, blocks: dict[str, list[Step]]) -> dict[str, Any]:
    """Most memory that a call of each contender adds, gradients included."""
    peaks = {}
    for name, steps in blocks.items():
        bench.clear()
        if name not in ("graph", "gemms", "read"):  # these hold theirs, or need none
            peak = bench.clock.peak_bytes(steps[0])
            peaks[name] = None if peak is None else peak / MIB
    return {"memory_mib": peaks, "gradient_mib": bench.sets[0].gradient_bytes() / MIB}


def host(bench: Bench, calls: int) -> dict[str, float]:
    """Microseconds of the host for a call alone."""
    p = bench.sets[0]

    def without_gradients() -> None:
        with torch.no_grad():
            p.ours()

    steps = {"forward": without_gradients, TOTAL: lambda: p.ours().backward()}
    return {
        name: 1e6 * measure.host_seconds(bench.clock, step, bench.clear, calls)
        for name, step in steps.items()
    }


def by_name(bench: Bench, budget: float) -> dict[str, dict[str, float]]:
    """Milliseconds of each implementation's kernels, by role."""
    found: dict[str, dict[str, float]] = {}
    named = check.implementations(bench.case.loss, bench.clock.device)
    for role in check.ROLES if named else ():
        blocks = {
            name: [check.prepared(kernels(role), role, p) for p in bench.sets]
            for name, kernels in named.items()
        }
        times, _ = measure.interleaved(bench.clock, blocks, bench.clear, budget / len(check.ROLES))
        found[role] = {name: 1e3 * value for name, value in times.items()}
    return found
