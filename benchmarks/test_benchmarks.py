"""The small cases under pytest-benchmark: ``make bench``."""

import pytest
import torch

from benchmarks import check, measure, run
from benchmarks.cases import SMALL
from benchmarks.problem import Draw


@pytest.mark.parametrize("contender", ["ours", "eager", "loop"])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_forward_and_backward(benchmark, case, contender):
    assert check.verdict(check.checked(case, Draw("cpu", torch.float32, 1), case.rows)) == ""
    bench = run.Bench(case, measure.CpuClock(), torch.float32, seed=0)
    (step,) = bench.contenders()[contender]()
    benchmark.group = case.name
    benchmark.pedantic(step, setup=bench.clear, rounds=10, warmup_rounds=2)
