"""The small cases under pytest-benchmark: ``make bench``."""

import pytest

from benchmarks.cases import SMALL
from benchmarks.gaussian import PROBLEMS, gradient_error


@pytest.mark.parametrize("contender", ["ours", "eager", "loop"])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_forward_and_backward(benchmark, case, contender):
    assert gradient_error(case) < 1e-5
    problem = PROBLEMS[case.loss](case)
    benchmark.group = case.name
    benchmark.pedantic(problem.steps()[contender], setup=problem.clear, rounds=10, warmup_rounds=2)
